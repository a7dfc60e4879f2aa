"""The report in a real browser: its filters, its keys, its width, and that it asks for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chromium import dom_of, skip_module_without_chromium
from helpers.report_data import HOSTILE, demo, shipped_prompts
from sftflow.report.comparison_page import render_report

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


def long_words() -> dict[str, Any]:
    """A long word without a space in every text that may be one, and markup in the kind of a prompt."""
    data = demo()
    for p in data["prompts"]:
        p["sft"] += "w" * 400
        p["hygiene"]["sft"] = [*p["hygiene"]["sft"], "h" * 90] if p["hygiene"]["sft"] else []
    data["prompts"][0]["kind"] += HOSTILE
    data["tasks"]["t" * 90] = data["tasks"].pop("format")
    data["settings"]["k" * 90] = data["title"] = data["names"]["sft"] = "v" * 300
    data["mask_example"]["tokens"][3]["text"] = "x" * 300
    data["ledger"]["sources"][0]["name"] = data["judge"]["model"] = data["judge"]["rows"][0]["id"] = "n" * 90
    data["held_out_loss"]["sft"]["sources"]["m" * 90] = 1.0
    data["tasks"]["spelling"]["contamination"] = {"not_checked": "o" * 120}
    data["tasks"]["spelling"]["metrics"]["sft"]["q" * 90] = 0.5
    data["forgetting"]["text"] = "p" * 90
    return data


@pytest.mark.parametrize(("width", "hostile"), [(360, False), (360, True), (780, True), (1000, True)])
def test_filters_keys_and_width(tmp_path: Path, width: int, hostile: bool) -> None:
    """The policy lets our script run, lists are filtered and walked by keys, and nothing scrolls sideways."""
    (tmp_path / "report.html").write_text(render_report(long_words() if hostile else demo()), encoding="utf-8")
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
