"""The report in a real browser: its filters, its keys, its width, and that it asks for nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.chromium import dom_of, skip_module_without_chromium
from helpers.report_data import HOSTILE, demo, shipped_prompts, with_run
from sftflow.comparison.judge import JudgeResult
from sftflow.comparison.results import Both, Comparison, HeldOutComparison, NotChecked
from sftflow.report.comparison_page import comparison_page

skip_module_without_chromium()

PROBE = """<iframe src="report.html" style="width:%dpx;height:700px;border:0"></iframe><output></output><script>
onload = () => {
  const frame = document.querySelector("iframe"), d = frame.contentDocument, w = frame.contentWindow;
  const lists = [...d.querySelectorAll(".browse")], prompts = lists[0], items = lists[1];
  const shown = (list) => list.querySelector("output").textContent;
  const press = (list, s) => [...list.querySelectorAll(".bar button")].find((b) => b.textContent.startsWith(s)).click();
  const search = (list, text) => {
    const box = list.querySelector("input");
    box.value = text; box.dispatchEvent(new w.Event("input"));
  };
  const key = (key) => d.activeElement.dispatchEvent(new w.KeyboardEvent("keydown", { key, bubbles: true }));
  const at = () => d.activeElement.textContent;
  const wide = () => d.documentElement.scrollWidth - d.documentElement.clientWidth;
  const r = { all: shown(prompts), overflow: wide() };
  const kind = prompts.querySelector("select");
  kind.value = "spelling"; kind.dispatchEvent(new w.Event("change")); r.kind = shown(prompts);
  kind.value = ""; kind.dispatchEvent(new w.Event("change"));
  press(prompts, "SFT did not stop"); r.endless = shown(prompts);
  press(prompts, "form improved"); r.improved = shown(prompts);
  press(prompts, "all"); search(prompts, "STRAWBERRY"); r.text = shown(prompts);
  r.visible = [...prompts.querySelectorAll(".entry")].filter((e) => e.offsetHeight > 0).length;
  r.hidden_target = d.getElementById("p-0").closest(".entry").hidden;
  w.location.hash = "#p-0"; w.dispatchEvent(new w.HashChangeEvent("hashchange"));
  r.found = !d.getElementById("p-0").closest(".entry").hidden;
  items.closest("details").open = true;
  press(items, "regressed"); r.items = shown(items);
  press(items, "improved"); r.gained = shown(items);
  items.querySelector("input").focus(); key("j"); r.letter_is_text = d.activeElement.tagName;
  key("ArrowDown"); r.first = at();
  d.activeElement.click(); key("j"); r.second = at();
  r.open = [...items.querySelectorAll(".entry")].map((e) => +e.open).join("");
  key("j"); r.stays = at(); key("k"); r.back = at(); key("ArrowDown"); r.down = at();
  key("/"); r.search = d.activeElement.tagName;
  search(items, "number 4"); key("Escape"); r.cleared = items.querySelector("input").value;
  d.querySelectorAll("details").forEach((e) => { e.open = true; });
  r.overflow_open = wide();
  r.asked = w.performance.getEntriesByType("resource").length;
  document.querySelector("output").textContent = JSON.stringify(r);
};</script>"""


def long_words() -> Comparison:
    """A long word without a space in every text that may be one, and markup in the kind of a prompt."""
    data = demo()
    prompts = [
        replace(p, sft=replace(p.sft, text=p.sft.text + "w" * 400, faults=p.sft.faults and (*p.sft.faults, "h" * 90)))
        for p in data.prompts
    ]
    prompts[0] = replace(prompts[0], kind=prompts[0].kind + HOSTILE)
    tasks = {("t" * 90 if name == "format" else name): t for name, t in data.tasks.items()}
    spelling = tasks["spelling"]
    tasks["spelling"] = replace(
        spelling,
        contamination=NotChecked(not_checked="o" * 120),
        metrics=Both(spelling.metrics.base, {**spelling.metrics.sft, "q" * 90: 0.5}),
    )
    row, ledger, judge, loss = data.run.mask_example, data.run.ledger, data.judge, data.held_out_loss
    assert row and ledger and isinstance(judge, JudgeResult) and isinstance(loss, HeldOutComparison)
    tokens = [replace(t, text="x" * 300) if i == 3 else t for i, t in enumerate(row.tokens)]
    sources = [ledger["sources"][0] | {"name": "n" * 90}, *ledger["sources"][1:]]
    first = replace(judge.rows[0], pair=replace(judge.rows[0].pair, id="n" * 90))
    changed = replace(
        data,
        names=Both(data.names.base, "v" * 300),
        prompts=tuple(prompts),
        tasks=tasks,
        settings={**data.settings, "k" * 90: "v" * 300},
        judge=replace(judge, model="n" * 90, rows=(first, *judge.rows[1:])),
        held_out_loss=replace(loss, sft=replace(loss.sft, sources={**loss.sft.sources, "m" * 90: 1.0})),
        forgetting=replace(data.forgetting, text="p" * 90),
    )
    return with_run(changed, mask_example=replace(row, tokens=tuple(tokens)), ledger=ledger | {"sources": sources})


@pytest.mark.parametrize(("width", "hostile"), [(360, False), (360, True), (780, True), (1000, True)])
def test_filters_keys_and_width(tmp_path: Path, width: int, hostile: bool) -> None:
    """The policy lets our script run, lists are filtered and walked by keys, and nothing scrolls sideways."""
    (tmp_path / "report.html").write_text(comparison_page(long_words() if hostile else demo()), encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE % width, encoding="utf-8")
    n = len(shipped_prompts())
    endless = len(range(4, n, 9))
    one, two = (f"How do you spell pear number {i}?improved" for i in (0, 4))
    told = json.loads(dom_of(tmp_path / "probe.html", tmp_path / "profile"))
    assert told == {
        "all": f"{n} of {n} prompts", "kind": f"3 of {n} prompts", "endless": f"{endless} of {n} prompts",
        "improved": f"{n - len(range(5, n, 9))} of {n} prompts", "text": f"1 of {n} prompts", "visible": 1,
        "hidden_target": True, "found": True, "items": "1 of 6 items", "gained": "2 of 6 items",
        "letter_is_text": "INPUT", "first": one, "second": two, "open": "000010", "stays": two, "back": one,
        "down": two, "search": "INPUT", "cleared": "", "overflow": 0, "overflow_open": 0, "asked": 0,
    }  # fmt: skip
