"""The comparison report: whole, closed, and deaf to hostile strings."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import fields, replace
from importlib import resources
from typing import Any

import pytest

from helpers.report_data import HOSTILE, Page, checks, demo, poisoned, shipped_prompts, task, token_row
from sftflow.chat.token_rows import TokenRow
from sftflow.comparison.judge import JudgeResult
from sftflow.comparison.results import (
    Both,
    Forgetting,
    HeldOutComparison,
    HeldOutLoss,
    NotChecked,
    NotJudged,
)
from sftflow.comparison.run_artifacts import RunArtifacts
from sftflow.report.comparison_page import comparison_page
from sftflow.report.tables import as_text, score_table
from sftflow.report.token_page import token_page

SECTIONS = (
    "scores", "weak", "prompts", "items", "hygiene", "forgetting", "held-out", "judge", "contamination", "ledger",
    "mask", "loss", "made",
)  # fmt: skip


def test_page_parses_and_names_everything() -> None:
    data = demo()
    page = Page(comparison_page(data))
    for name, t in data.tasks.items():
        assert name in page.text
        assert page.text.count(t.items[0].sft.question) >= len(data.tasks), "every task has its items"
    for p in data.prompts:
        assert p.id in page.text and p.messages[-1]["content"] in page.text and p.sft.text in page.text
        assert p.base.text in page.text and p.base_plain.text in page.text, "a folded reply is still whole"
    assert data.run.ledger
    for source in data.run.ledger["sources"]:
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
        "step 500 of 600, of the lowest held-out loss (0.462) · trained for 2 min 20 s",
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


def test_shares_that_were_asked_for_stand_beside_what_came_of_them() -> None:
    data = demo()
    assert data.run.ledger
    first, *others = data.run.ledger["sources"]
    first = first | {"asked": {"share": 0.4123, "tokens": 59_871}, "share": 0.4125, "passes": 3.25}
    html = comparison_page(replace(data, run=replace(data.run, ledger=data.run.ledger | {"sources": [first, *others]})))
    section = html[html.index('id="ledger"') :]
    assert "41.2%, 59,871 tokens asked" in section and ">3.25<" in section
    assert "tokens asked" not in comparison_page(data)


def test_sections_come_in_order_and_links_lead_somewhere() -> None:
    page = Page(comparison_page(demo()))
    assert [a["id"] for t, a in page.elements if t == "section"] == list(SECTIONS)
    assert len(set(page.ids)) == len(page.ids)
    assert {str(a["href"])[1:] for t, a in page.elements if t == "a"} <= set(page.ids)


def test_without_the_script_all_is_there_and_nothing_is_hidden_but_the_bars() -> None:
    hidden = [(t, a.get("class")) for t, a in Page(comparison_page(demo())).elements if "hidden" in a]
    assert hidden == [("div", "bar")] * 7, "one for the prompts, one a task"


def test_the_first_screen_tells_mean_tasks_stops_prompts_and_forgetting() -> None:
    n = demo().prompt_groups["not_in_training"].healthy.n
    facts = re.findall(r'<div class="fact"><b.*?</b><span>(.*?)</span>', comparison_page(demo()))
    assert [f.split(",")[0] for f in facts[:4]] == [
        "centred mean", "tasks better (0 worse", "of the replies end by themselves",
        f"healthy replies (their form) to {n} fixed prompts that are not in the training rows: better",
    ]  # fmt: skip
    assert facts[4] == "bits per byte of plain text: it forgot: 4.5% worse on plain text"
    assert "2%→93%of the replies end by themselves, base → SFT" in Page(comparison_page(demo())).text


def test_hostile_strings_stay_text() -> None:
    clean = Page(comparison_page(demo()))
    html = comparison_page(poisoned(demo()))
    page = Page(html)
    allowed = {tag for tag, _ in clean.elements}
    assert {tag for tag, _ in page.elements} <= allowed
    assert page.count("script") == page.count("style") == 1
    assert page.count("img") == 0 and "alert(" not in page.script and "alert(" not in page.style
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    assert page.text.count("onerror=alert(2)") > 200, "the text itself is shown, not dropped"
    assert "\x00" not in html and html.encode("utf-8")
    weird = Page(token_page([poisoned(token_row()), TokenRow(HOSTILE, refused=HOSTILE)]))
    assert weird.count("img") == weird.count("script") == 0 and "alert(2)" in weird.text


def test_policy_allows_the_script_by_hash_and_nothing_else() -> None:
    html = comparison_page(demo())
    page = Page(html)
    [policy] = [a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy and "http" not in policy
    assert html.index("Content-Security-Policy") < html.index("<style>"), "the policy must come before what it governs"
    assert page.script == resources.files("sftflow.report").joinpath("report.js").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", page.script + page.style), "nothing is fetched"
    assert not [v for _, a in page.elements for v in a.values() if "http" in (v or "")], "an address is text, no link"
    assert not [a for _, a in page.elements if "src" in a or "style" in a]


NOT_MEASURED = {
    "tasks": {"tasks": {}, "centred_mean": Both(None, None)},
    "prompts": {"prompts": (), "prompts_in_training": NotChecked(not_checked="none"), "prompt_groups": {}},
    "hygiene": {"hygiene": Both(checks(0.0, 0.0, [], n=0), checks(0.0, 0.0, [], n=0))},
    "held-out": {"held_out_loss": None},
    "forgetting": {"forgetting": Forgetting(text="", bytes=0, base=None, sft=None)},
    "judge": {"judge": None},
    "made": {"settings": {}, "fingerprints": {}},
}


@pytest.mark.parametrize("left_out", NOT_MEASURED)
def test_missing_parts_are_left_out(left_out: str) -> None:
    page = Page(comparison_page(replace(demo(), **NOT_MEASURED[left_out])))
    check_whole(page)
    gone = {"tasks": "scores"}
    assert left_out == "made" or gone.get(left_out, left_out) not in page.ids


@pytest.mark.parametrize("left_out", [f.name for f in fields(RunArtifacts)])
def test_what_the_run_does_not_have_is_left_out(left_out: str) -> None:
    data = demo()
    page = Page(comparison_page(replace(data, run=replace(data.run, **{left_out: getattr(RunArtifacts(), left_out)}))))
    check_whole(page)
    gone = {"ledger": "ledger", "mask_example": "mask", "losses": "loss"}
    assert gone.get(left_out, "-") not in page.ids


def check_whole(page: Page) -> None:
    """Nothing is shown for what is missing, and each link leads somewhere."""
    assert "None" not in page.text and not re.search(r"\bnan\b", page.text)
    assert {str(a["href"])[1:] for t, a in page.elements if t == "a"} <= set(page.ids)


@pytest.mark.parametrize(
    ("missing", "gone"),
    [({"items": ()}, "items"), ({"contamination": None}, "contamination"), ({"metrics": Both({}, {})}, "-")],
)
def test_a_task_without_its_optional_parts(missing: dict[str, Any], gone: str) -> None:
    data = demo()
    page = Page(comparison_page(replace(data, tasks={name: replace(t, **missing) for name, t in data.tasks.items()})))
    assert "None" not in page.text and "82.0" in page.text
    assert gone not in page.ids


def test_a_part_that_was_not_measured_is_no_error() -> None:
    """A dash for what is null inside; a reason where there is one."""
    nulls = HeldOutLoss(
        rows=0, tokens=0, all=None, end_of_turn=None, roles={}, sources={}, skipped={}, first_skipped=None
    )
    judge = JudgeResult(model="m", url="u", temperature=None, rows=())
    one_side = Both(demo().hygiene.base, checks(0.0, 0.0, [], n=0))
    for part in (
        {"held_out_loss": HeldOutComparison(rows=0, base=nulls, sft=nulls)},
        {"judge": judge},
        {"hygiene": one_side},
        {"forgetting": Forgetting(text="t", bytes=9, base=None, sft=2.0)},
    ):
        assert "None" not in Page(comparison_page(replace(demo(), **part))).text
    why = "the run is <gone>"
    for part in (
        {"held_out_loss": NotChecked(not_checked=why)},
        {"forgetting": Forgetting(text="", bytes=0, base=None, sft=None, not_checked=why)},
    ):
        assert "Not measured: the run is <gone>." in Page(comparison_page(replace(demo(), **part))).text
    assert (
        "Not judged: the run is <gone>." in Page(comparison_page(replace(demo(), judge=NotJudged(not_judged=why)))).text
    )


def test_the_smallest_comparison_makes_a_page() -> None:
    nothing: dict[str, Any] = {key: value for part in NOT_MEASURED.values() for key, value in part.items()}
    page = Page(comparison_page(replace(demo(), **nothing, run=RunArtifacts(), seconds=61.0)))
    assert (
        page.count("h1") == 1 and "compared in 1 min 1 s" in page.text and "train" not in page.text.split("compared")[0]
    )
    check_whole(page)


def outcomes(*verdicts: str, **changes: Any) -> str:
    tasks = {f"t{i}": task(50, 0.2, 0.5, 0.1, v) for i, v in enumerate(verdicts)}
    [said] = re.findall(r'<h1 class="headline">(.*?)</h1>', comparison_page(replace(demo(), tasks=tasks, **changes)))
    return str(said)


def test_the_headline_claims_no_more_than_the_tasks() -> None:
    unclear = "cannot tell at n=50"
    assert outcomes("better", "better", unclear).startswith("Yes: the base became")
    assert outcomes("better", unclear, unclear).startswith("Partly")
    assert outcomes("better", "better", "worse").startswith("Mixed")
    assert outcomes("worse", "worse", "better").startswith("No: it got worse on 2 of 3")
    assert outcomes(unclear, unclear).startswith("Cannot tell")
    told = (
        r"No task was asked. On fixed prompts that are not in the training rows: healthy replies 0% → \d+% \(better\), "
    )
    assert re.fullmatch(told + r"right answers \d+% → \d+% \(better\)\.", outcomes())
    assert outcomes(prompt_groups={}).endswith("nothing tells the two apart.")
    assert outcomes("better", centred_mean=Both(0.0, 0.1)).startswith("Partly: better than the base")
    endless = tuple(replace(p, sft=replace(p.sft, finish_reason="length")) for p in demo().prompts)
    assert outcomes("better", prompts=endless).startswith("Partly: better scores, but")


def test_continued_sft_says_before_and_after() -> None:
    page = Page(comparison_page(replace(demo(), kind="continued SFT")))
    assert "already instruction-tuned" in page.text and "Before, chat format" in page.text
    assert "SFT, chat" not in page.text and "became an assistant" not in page.text.replace("not whether it became", "")
    assert "Base, " not in page.text


@pytest.mark.parametrize("kind", ["two of one base", "two models", "SFT-versus-base", "one model twice"])
def test_of_two_that_no_training_connects_nothing_is_said_of_training(kind: str) -> None:
    data = replace(demo(), kind=kind)
    page = Page(comparison_page(data))
    assert "First, chat format" in page.text and "The second is better than the first on " in page.text
    assert "against" in page.text and "4.5% worse on plain text than the first" in page.text
    for word in ("forgot", "Forgetting", "continued SFT", "became an assistant", "Base,"):
        assert word not in page.text + as_text(score_table(data)) + " ".join(data.remarks()), word


def test_weak_answers_are_those_to_open_prompts() -> None:
    html = comparison_page(demo())
    weak = html[html.index('<section id="weak">') : html.index('<section id="prompts">')]
    asked = [p.asked for p in demo().prompts if p.kind == "open"]
    assert weak.count("<dt>") == len(asked) == 5 and all(text in Page(weak).text for text in asked)
    assert "gives weak answers" in html and "still gives wrong answers" in comparison_page(
        replace(demo(), n_parameters=7_000_000_000)
    )


def test_data_is_left_as_it_was() -> None:
    data = demo()
    assert comparison_page(data) == comparison_page(data)
    assert data == demo()
