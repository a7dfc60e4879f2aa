"""The comparison report and the token page: whole, closed, and deaf to hostile strings."""

from __future__ import annotations

import base64
import copy
import doctest
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from conftest import CHROMIUM, dom_of
from sftflow.chat import inspect_html
from sftflow.compare import charts
from sftflow.compare.report import render_report

HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp; \u202e\x00\ud800"
VOID = {"meta", "br", "wbr", "input", "img", "link", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; gathers elements, ids, visible text and the script."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.script = self.style = ""
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            setattr(self, self.open[-1], getattr(self, self.open[-1]) + data)
        else:
            self.text += data

    def count(self, tag: str, **attrs: str) -> int:
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in attrs.items()) for t, a in self.elements)

    @property
    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if a.get("id")]  # type: ignore[misc]


def shipped_prompts() -> list[dict[str, Any]]:
    lines = resources.files("sftflow.compare").joinpath("prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def task(n: int, base: float, sft: float, half: float, verdict: str, chance: float = 0.0) -> dict[str, Any]:
    delta = sft - base
    row: dict[str, Any] = {
        "question": "How do you spell pear?",
        "answer": "p e a r",
        "base": "pear pear pear",
        "base_plain": " p e a",
    }
    row |= {"sft": "p e a r", "base_score": 0.0, "base_plain_score": 0.0, "sft_score": 1.0}
    return {
        "n": n, "chance": chance, "base": base, "base_chat": base * 0.5, "base_plain": base, "base_arm": "plain",
        "sft": sft, "delta": delta, "ci95": [delta - half, delta + half], "base_stderr": 0.01, "sft_stderr": 0.03,
        "p_value": 1e-9 if verdict == "better" else 0.42, "verdict": verdict, "max_new_tokens": 64,
        "rows": [row | {"id": f"item-{i}"} for i in range(3)],
    }  # fmt: skip


def tokens() -> list[dict[str, Any]]:
    pieces = [("<|bos|>", 0, 1), ("<|user_start|>", 0, 1), ("Spell", 0, 0), (" pear", 0, 0), (".\n\n", 0, 0)]
    pieces += [("<|user_end|>", 0, 1), ("<|assistant_start|>", 0, 1), ("p", 1, 0), (" e", 1, 0), (" a", 1, 0)]
    pieces += [("\tr", 1, 0), ("\ufffd", 1, 0), ("\u200b", 1, 0), ("<|assistant_end|>", 1, 1)]
    return [{"text": t, "id": 100 + i, "supervised": bool(s), "special": bool(x)} for i, (t, s, x) in enumerate(pieces)]


def demo() -> dict[str, Any]:
    """What a run of the tiny base looks like: the base rambles and never stops, the SFT model answers and stops."""
    prompts = []
    for i, p in enumerate(shipped_prompts()):
        ramble = f"{i} the letters of the words of the letters, and then " * (30 if i % 5 == 0 else 4)
        prompts.append(
            p | {"base": ramble, "base_plain": "" if i % 7 == 0 else ramble[:200], "sft": f"Reply {i}: p-e-a-r\nDone.",
                 "base_finish": "length", "sft_finish": "length" if i % 9 == 4 else "stop"}
        )  # fmt: skip
    steps = list(range(1, 601))
    curve = [0.4 + 3.2 * math.exp(-s / 90) + 0.15 * math.sin(s * 1.7) * math.cos(s * 0.37) for s in steps]
    tasks = {
        "spelling": task(200, 0.01, 0.83, 0.05, "better"),
        "counting": task(200, 0.05, 0.61, 0.07, "better"),
        "arithmetic": task(200, 0.02, 0.44, 0.07, "better"),
        "identity": task(40, 0.0, 0.95, 0.06, "better"),
        "arc=data/arc.jsonl": task(120, 0.26, 0.24, 0.08, "cannot tell at n=120", chance=0.25),
        "format": task(60, 0.1, 0.55, 0.12, "better"),
    }
    names = ["spelling", "counting", "arithmetic", "identity", "concepts", "mine"]
    sources = [
        {"name": n, "rows": 4000 // (i + 1), "tokens": 180_000 // (i + 1), "supervised_tokens": 60_000 // (i * i + 1),
         "cut": i, "dropped": 2 * i, "repeat": 1 + i}
        for i, n in enumerate(names)
    ]  # fmt: skip
    return {
        "title": "runs/demo", "kind": "base-versus-SFT", "names": {"base": "builtin:tiny", "sft": "runs/demo"},
        "parameters": 3_400_000, "tasks": tasks, "centred_mean": {"base": 0.021, "sft": 0.634}, "prompts": prompts,
        "prompt_set": {"name": "default", "version": 1, "sha256": "ab12" * 16},
        "ledger": {"sources": sources, "rows": 9800, "tokens": 441_000, "supervised_tokens": 120_500,
                   "packed_rows": 900, "padding_share": 0.013},
        "loss": {"step": steps, "loss": curve,
                 "validation": [{"step": s, "loss": 0.45 + 3.0 * math.exp(-s / 90)} for s in range(100, 601, 100)]},
        "mask_example": {"source": "spelling:12", "tokens": tokens()}, "weak": ["kv-cache"],
        "recipe_yaml": "base: builtin:tiny\nmixture:\n  - {source: spelling, limit: 4000}\n",
        "settings": {"decoding": "greedy", "precision": "fp32"},
        "fingerprints": {"base": "a1" * 32, "sft": "b2" * 32, "format": "c3" * 32},
        "generated": "2026-11-23 06:10 UTC", "version": "0.1.0", "seconds": {"train": 140.0, "compare": 60.0},
    }  # fmt: skip


def poisoned(value: Any) -> Any:
    """Every string of the data, keys of free-form maps included, with the hostile text at its end."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return {k: poisoned(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_page_parses_and_names_everything() -> None:
    data = demo()
    page = Page(render_report(data))
    for name in data["tasks"]:
        assert name in page.text
    for p in data["prompts"]:
        assert p["id"] in page.text and p["messages"][-1]["content"] in page.text and p["sft"] in page.text
        assert p["base"] in page.text and p["base_plain"] in page.text, "a folded reply is still whole"
    for source in data["ledger"]["sources"]:
        assert source["name"] in page.text
    for said in ("83.0", "+82.0", "+77.0 to +87.0", "cannot tell at n=120", "p < 0.001", "0.02→0.63", "2 min 20 s"):
        assert said in page.text, said
    assert "A model of 3.4 million parameters gives weak answers" in page.text
    assert "5 of 6" in page.text and "Yes: the base became an assistant" in page.text
    assert "0→43" in page.text and "of 48 replies end by themselves" in page.text
    assert "base: builtin:tiny" in page.text and "c3" * 32 in page.text and "ab12" * 16 in page.text
    assert page.count("article", class_="card") == 48 + 3 * 6
    assert sum("data-unstopped" in a for t, a in page.elements if t == "article") == 5


def test_sections_come_in_order_and_links_lead_somewhere() -> None:
    page = Page(render_report(demo()))
    sections = [a["id"] for t, a in page.elements if t == "section"]
    assert sections == ["scores", "weak", "prompts", "ledger", "loss", "mask", "items", "made"]
    assert len(set(page.ids)) == len(page.ids)
    assert {str(a["href"])[1:] for t, a in page.elements if t == "a"} <= set(page.ids)


def test_hostile_strings_stay_text() -> None:
    clean, data = Page(render_report(demo())), demo()
    tasks = {name + HOSTILE: poisoned(t) for name, t in data["tasks"].items()}
    settings = {key + HOSTILE: value for key, value in poisoned(data["settings"]).items()}
    html = render_report(poisoned(data) | {"tasks": tasks, "settings": settings})
    page = Page(html)
    allowed = {tag for tag, _ in clean.elements} | {"details", "summary"}
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
    assert page.script == resources.files("sftflow.compare").joinpath("report.js").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", html), "nothing is fetched"
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
    gone = {"ledger": "ledger", "loss": "loss", "mask_example": "mask", "tasks": "scores", "prompts": "prompts"}
    assert gone.get(left_out, "-") not in page.ids


def loss_of(sources: dict[str, float], first: float = 2.0) -> Page:
    """A page of 100 steps at loss 2 (the first at `first`) and validation at three steps, per source."""
    rows = [{"step": s, "loss": 2.0 if s else first, "sources": sources} for s in (0, 50, 100)]
    return Page(render_report({"loss": {"step": list(range(1, 101)), "loss": [2.0] * 100, "validation": rows}}))


def test_loss_of_each_source_is_a_named_line_where_there_are_few() -> None:
    page = loss_of({"one": 1.0, HOSTILE: 3.0, "never held out": None})  # type: ignore[dict-item]
    for i in range(2):
        assert page.count("path", class_=f"source s{i}") == 2, "once in the wide drawing, once in the narrow"
        assert page.count("text", class_=f"name s{i}") == 2
    assert "one" in page.text and "all, and each source" in page.text and "never" not in page.text
    assert page.count("script") == 1 and not page.count("img")
    many = loss_of({str(i): 1.0 for i in range(7)})
    assert "of each of the 7 sources" in many.text
    for sources in (many, loss_of({"only": 2.0})):
        assert not sources.count("path", class_="source s0") and not sources.count("text", class_="name val")


def test_a_loss_that_begins_far_up_does_not_flatten_the_rest() -> None:
    high, level = loss_of({"a": 2.0}, first=20.0), loss_of({"a": 2.0})
    assert "up to 20.0, lie above the drawing" in high.text and "above the drawing" not in level.text
    assert level.count("circle", class_="dot") == 6 and high.count("circle", class_="dot") == 4
    ends = [
        float(y) for _, a in high.elements if a.get("class") == "val" for y in re.findall(r" ([\d.]+)", a["d"] or "")
    ]
    assert min(ends) >= 28, "nothing is drawn above the drawing's upper edge"


def test_only_the_promised_keys_of_compare_json() -> None:
    """compare.json promises few keys; a file with just these makes a page too."""
    promised = {"n": 9, "chance": 0.5, "base": 0.5, "base_chat": 0.5, "base_plain": 0.4, "sft": 0.9, "delta": 0.4}
    prompt = {"id": "a", "messages": [{"role": "user", "content": "hi"}], "base": "x", "base_plain": "y", "sft": "z"}
    tasks = {"t": promised | {"ci95": [0.1, 0.7]}}
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


def test_forest_puts_zero_and_interval_to_scale() -> None:
    tasks = [{"delta": 0.5, "ci95": [0.25, 0.75]}, {"delta": -0.1, "ci95": [-0.2, 0.0]}]
    assert charts.scale(tasks) == (-0.25, 0.75)
    svg = charts.forest(tasks[0], 0.0, 1.0)
    assert '<line class="zero" x1="12.0"' in svg and 'cx="100.0"' in svg and "M56.0 12H144.0" in svg
    assert charts.scale([]) == (0.0, 0.25)


def test_loss_skips_values_that_are_no_numbers_and_stays_small() -> None:
    data = demo()
    n = 50_000
    data["loss"] = {"step": list(range(n)), "loss": [math.nan, math.inf, None] + [2.0] * (n - 3), "validation": []}
    html = render_report(data)
    assert Page(html) and len(html) < 1_000_000
    assert not re.search(r'd="[^"]*(nan|inf)', html)
    assert charts.smooth([4.0, 2.0, 3.0], 1) == [4.0, 3.0, 2.5]
    assert charts.smooth([1.0, 2.0], 0) == [1.0, 2.0]
    assert charts.ticks(0.2, 3.1, 5) == [1.0, 2.0, 3.0]


def test_token_boxes_say_mask_id_bytes_and_whitespace() -> None:
    row = {"source": "d.jsonl:3", "tokens": tokens()}
    page = Page(inspect_html.render_page([row, {"source": "d.jsonl:4", "refused": "two user turns <in> a row"}]))
    boxes = [a for t, a in page.elements if t == "span" and "title" in a]
    assert len(boxes) == len(tokens())
    assert [a["class"] for a in boxes[-2:]] == ["t s", "t s x"] and boxes[0]["class"] == "t x"
    assert boxes[2]["title"] == "id 102 · 5 bytes: 53 70 65 6c 6c · not supervised"
    assert "part of a character" in str(boxes[11]["title"])
    assert "↵" in page.text and "⇥r" in page.text and "·pear" in page.text and "U+200B" in page.text
    assert "two user turns <in> a row" in page.text and "14 tokens, 7 supervised, 1 refused" in page.text
    assert Page(inspect_html.render_page([])).count("h1") == 1


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(inspect_html).failed == doctest.testmod(charts).failed == 0


def test_data_is_left_as_it_was() -> None:
    data = demo()
    before = copy.deepcopy(data)
    assert render_report(data) == render_report(data)
    assert data == before


PROBE = """<iframe src="report.html" style="width:%dpx;height:700px;border:0"></iframe><output></output><script>
onload = () => {
  const d = document.querySelector("iframe").contentDocument;
  const shown = () => d.querySelector("#filter output").textContent;
  const r = { all: shown(), overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth };
  const by = (s) => [...d.querySelectorAll("#filter button")].find((b) => b.textContent.startsWith(s));
  by("spelling").click(); r.kind = shown();
  by("all").click(); by("SFT did not stop").click(); r.endless = shown();
  by("SFT did not stop").click();
  const search = d.querySelector("#filter input");
  search.value = "STRAWBERRY"; search.dispatchEvent(new Event("input")); r.text = shown();
  r.visible = [...d.querySelectorAll("#cards > .card")].filter((c) => c.offsetHeight > 0).length;
  document.querySelector("output").textContent = JSON.stringify(r);
};</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "hostile"), [(360, False), (360, True), (760, True), (880, True)])
def test_filter_and_width_in_a_browser(tmp_path: Path, width: int, hostile: bool) -> None:
    """The policy lets our script run, the filters filter, and nothing scrolls sideways."""
    data = demo()
    if hostile:  # a long word without a space in every text that may be one
        for p in data["prompts"]:
            p["sft"] += "w" * 400
        data["tasks"]["t" * 90] = data["tasks"].pop("format")
        data["settings"]["k" * 90] = data["title"] = data["names"]["sft"] = "v" * 300
        data["mask_example"]["tokens"][3]["text"] = "x" * 300
        data["ledger"]["sources"][0]["name"] = "n" * 90
    (tmp_path / "report.html").write_text(render_report(data), encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE % width, encoding="utf-8")
    assert json.loads(dom_of(tmp_path / "probe.html", tmp_path / "profile")) == {
        "all": "48 of 48 prompts", "kind": "3 of 48 prompts", "endless": "5 of 48 prompts",
        "text": "1 of 48 prompts", "visible": 1, "overflow": 0,
    }  # fmt: skip
