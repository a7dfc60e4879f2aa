"""The comparison report: whole, closed, and deaf to hostile strings."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from importlib import resources
from typing import Any

import pytest

from helpers.report_data import HOSTILE, Page, demo, poisoned, shipped_prompts, task, tokens
from sftflow.report import token_page as inspect_html
from sftflow.report.comparison_page import render_report

SECTIONS = (
    "scores", "weak", "prompts", "items", "hygiene", "forgetting", "held-out", "judge", "contamination", "ledger",
    "mask", "loss", "made",
)  # fmt: skip


def test_page_parses_and_names_everything() -> None:
    data = demo()
    page = Page(render_report(data))
    for name, t in data["tasks"].items():
        assert name in page.text
        assert page.text.count(t["rows"][0]["question"]) >= len(data["tasks"]), "every task has its items"
    for p in data["prompts"]:
        assert p["id"] in page.text and p["messages"][-1]["content"] in page.text and p["sft"] in page.text
        assert p["base"] in page.text and p["base_plain"] in page.text, "a folded reply is still whole"
    for source in data["ledger"]["sources"]:
        assert source["name"] in page.text
    for said in (
        "83.0",
        "+82.0",
        "+77.0 to +87.0",
        "cannot tell at n=120",
        "< 0.001",
        "Holm 0.840",
        "±9.4",
        "0.02→0.63",
        "2 min 20 s",
        "5 of 6",
        "base: builtin:tiny",
        "c3" * 32,
        "ab12" * 16,
        "tokens a task · arithmetic",
    ):
        assert said in page.text, said  # fmt: skip
    assert "A model of 3.4 million parameters gives weak answers" in page.text
    assert "Yes: the base became an assistant" in page.text
    assert page.count("details", class_="entry") == len(shipped_prompts()) + 6 * 6


def test_sections_come_in_order_and_links_lead_somewhere() -> None:
    page = Page(render_report(demo()))
    assert [a["id"] for t, a in page.elements if t == "section"] == list(SECTIONS)
    assert len(set(page.ids)) == len(page.ids)
    assert {str(a["href"])[1:] for t, a in page.elements if t == "a"} <= set(page.ids)


def test_without_the_script_all_is_there_and_nothing_is_hidden_but_the_bars() -> None:
    hidden = [(t, a.get("class")) for t, a in Page(render_report(demo())).elements if "hidden" in a]
    assert hidden == [("div", "bar")] * 7, "one for the prompts, one a task"


def test_the_first_screen_tells_mean_tasks_stops_and_forgetting() -> None:
    facts = re.findall(r'<div class="fact"><b.*?</b><span>(.*?)</span>', render_report(demo()))
    assert [f.split(",")[0] for f in facts[:4]] == [
        "centred mean", "tasks better (0 worse", "of the replies end by themselves",
        "bits per byte of plain text: it forgot: 4.5% worse on plain text",
    ]  # fmt: skip
    told = Page(render_report(demo() | {"hygiene": None}))
    stopped = sum(p["sft_finish"] == "stop" for p in demo()["prompts"])
    assert f"0→{stopped}of {len(shipped_prompts())} replies end by themselves" in told.text


def test_hostile_strings_stay_text() -> None:
    clean, data = Page(render_report(demo())), demo()
    tasks = {name + HOSTILE: poisoned(t) for name, t in data["tasks"].items()}
    settings = {key + HOSTILE: value for key, value in poisoned(data["settings"]).items()}
    html = render_report(poisoned(data) | {"tasks": tasks, "settings": settings})
    page = Page(html)
    allowed = {tag for tag, _ in clean.elements}
    assert {tag for tag, _ in page.elements} <= allowed
    assert page.count("script") == page.count("style") == 1
    assert page.count("img") == 0 and "alert(" not in page.script and "alert(" not in page.style
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    assert page.text.count("onerror=alert(2)") > 200, "the text itself is shown, not dropped"
    assert "\x00" not in html and html.encode("utf-8")
    rows = [{"source": HOSTILE, "tokens": poisoned(tokens())}, {"source": HOSTILE, "refused": HOSTILE}]
    weird = Page(inspect_html.render_page(rows))
    assert weird.count("img") == weird.count("script") == 0 and "alert(2)" in weird.text


def test_policy_allows_the_script_by_hash_and_nothing_else() -> None:
    html = render_report(demo())
    page = Page(html)
    [policy] = [a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy and "http" not in policy
    assert html.index("Content-Security-Policy") < html.index("<style>"), "the policy must come before what it governs"
    assert page.script == resources.files("sftflow.report").joinpath("report.js").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", page.script + page.style), "nothing is fetched"
    assert not [v for _, a in page.elements for v in a.values() if "http" in (v or "")], "an address is text, no link"
    assert not [a for _, a in page.elements if "src" in a or "style" in a]


@pytest.mark.parametrize(
    "left_out",
    sorted(demo().keys() - {"title", "kind"}),
)
@pytest.mark.parametrize("how", ["null", "absent"])
def test_missing_parts_are_left_out(left_out: str, how: str) -> None:
    data = demo()
    data[left_out] = None
    if how == "absent":
        del data[left_out]
    page = Page(render_report(data))
    assert "None" not in page.text and not re.search(r"\bnan\b", page.text)
    assert {str(a["href"])[1:] for t, a in page.elements if t == "a"} <= set(page.ids)
    gone = {"mask_example": "mask", "tasks": "scores", "held_out_loss": "held-out"}
    if gone.get(left_out, left_out) in SECTIONS and left_out != "weak":  # the open prompts remain
        assert gone.get(left_out, left_out) not in page.ids


@pytest.mark.parametrize(
    "left_out", sorted(demo()["tasks"]["spelling"].keys() - {"n", "chance", "base", "sft", "delta"})
)
def test_a_task_without_its_optional_parts(left_out: str) -> None:
    data = demo()
    for t in data["tasks"].values():
        t[left_out] = None
    page = Page(render_report(data))
    assert "None" not in page.text and "82.0" in page.text
    gone = {"rows": "items", "contamination": "contamination"}
    assert gone.get(left_out, "-") not in page.ids


@pytest.mark.parametrize("part", ["hygiene", "held_out_loss", "forgetting", "judge"])
def test_a_part_that_was_not_measured_is_no_error(part: str) -> None:
    """A dash for what is null inside; nothing for what is null throughout."""
    data = demo()
    nulls: dict[str, Any] = {k: None for k in data[part]}
    assert "None" not in Page(render_report(data | {part: nulls})).text
    inner = {k: dict.fromkeys(v) if isinstance(v, dict) else v for k, v in data[part].items()}
    assert "None" not in Page(render_report(data | {part: inner})).text
    told = Page(render_report(data | {part: {"not_checked": "the run is <gone>"}})).text
    assert part != "held_out_loss" or "Not measured: the run is <gone>." in told


def test_only_the_promised_keys_of_compare_json() -> None:
    """compare.json promises few keys; a file with just these makes a page too."""
    promised = {"n": 9, "chance": 0.5, "base": 0.5, "base_chat": 0.5, "base_plain": 0.4, "sft": 0.9, "delta": 0.4}
    prompt = {"id": "a", "messages": [{"role": "user", "content": "hi"}], "base": "x", "base_plain": "y", "sft": "z"}
    tasks = {"t": promised | {"ci95": [0.1, 0.7]}}
    assert "compare 1 min 1 s" in Page(render_report({"seconds": 61.0})).text, "compare.json has its own time alone"
    page = Page(render_report({"tasks": tasks, "centred_mean": {"base": 0.0, "sft": 0.8}, "prompts": [prompt]}))
    assert "Yes: the base became" in page.text and "better" in page.text and "None" not in page.text
    assert Page(render_report({})).count("h1") == 1


def outcomes(*verdicts: str, **changes: Any) -> str:
    data = demo() | changes
    data["tasks"] = {f"t{i}": task(50, 0.2, 0.5, 0.1, v) for i, v in enumerate(verdicts)}
    [said] = re.findall(r'<h1 class="headline">(.*?)</h1>', render_report(data))
    return str(said)


def test_the_headline_claims_no_more_than_the_tasks() -> None:
    unclear = "cannot tell at n=50"
    assert outcomes("better", "better", unclear).startswith("Yes: the base became")
    assert outcomes("better", unclear, unclear).startswith("Partly")
    assert outcomes("better", "better", "worse").startswith("Mixed")
    assert outcomes("worse", "worse", "better").startswith("No: it got worse on 2 of 3")
    assert outcomes(unclear, unclear).startswith("Cannot tell")
    assert outcomes().startswith("No task was graded")
    assert outcomes("better", centred_mean={"base": 0.0, "sft": 0.1}).startswith("Partly: better than the base")
    endless = [p | {"sft_finish": "length"} for p in demo()["prompts"]]
    assert outcomes("better", prompts=endless).startswith("Partly: better scores, but")


def test_continued_sft_says_before_and_after() -> None:
    page = Page(render_report(demo() | {"kind": "continued SFT"}))
    assert "already instruction-tuned" in page.text and "Before, chat format" in page.text
    assert "SFT, chat" not in page.text and "became an assistant" not in page.text.replace("not whether it became", "")
    assert "Base, " not in page.text


def test_weak_answers_are_open_prompts_and_named_ones() -> None:
    html = render_report(demo())
    weak = html[html.index('<section id="weak">') : html.index('<section id="prompts">')]
    assert weak.count("<dt>") == 4 and "What is a KV cache?" in weak
    assert "gives weak answers" in html and "still gives wrong answers" in render_report(demo() | {"parameters": 7e9})


def test_data_is_left_as_it_was() -> None:
    data = demo()
    before = copy.deepcopy(data)
    assert render_report(data) == render_report(data)
    assert data == before
