"""The report's parts: drawings to scale, what changed, what is left out, and the token boxes."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from helpers.report_data import HOSTILE, Page, demo, item, judged, prompt, shipped_prompts, task, token_row, with_run
from sftflow.chat.token_rows import TokenRow
from sftflow.comparison.prompts import load_prompts
from sftflow.comparison.results import Both, Forgetting, NotChecked
from sftflow.comparison.run_artifacts import RunArtifacts
from sftflow.report import charts, figures, line_charts, token_page
from sftflow.report.comparison_page import MOST_ITEMS, comparison_page
from sftflow.report.wording import form_change


def test_forest_puts_zero_and_interval_to_scale() -> None:
    assert charts.forest_scale([(0.5, 0.25, 0.75), (-0.1, -0.2, 0.0)]) == (-0.25, 0.75)
    svg = charts.forest(0.5, (0.25, 0.75), (0.0, 1.0), "better", "")
    assert '<line class="zero" x1="20.0"' in svg and 'cx="160.0"' in svg and "M90.0 10H230.0" in svg
    assert charts.forest_scale([]) == (0.0, 0.25)


def test_lengths_are_shares_of_the_replies_to_one_scale() -> None:
    svg = charts.reply_lengths([0, 4, 8], [3, 1], 0.75, False, "lengths")
    assert re.findall(r'height="([\d.]+)"', svg) == ["72.0", "24.0"]
    assert "0 to 4 tokens: 3 of 4 replies" in svg and "4 to 8 tokens" in svg
    assert "4 to more tokens" in charts.reply_lengths([0, 4], [0, 2], 1.0, True, "lengths")
    assert "<rect" not in charts.reply_lengths([], [], 0.0, True, "lengths")


def test_counts_are_no_shares() -> None:
    metrics: dict[str, float | int] = {"prompt_loose": 1.0, "unsupported": 1}
    counted = replace(task(9, 0.5, 0.5, 0.1, "cannot tell at n=9"), metrics=Both(metrics, metrics))
    page = Page(comparison_page(replace(demo(), tasks={"ifeval": counted})))
    assert "prompt loose100.0%100.0%unsupported11" in page.text


def test_an_item_shows_its_whole_dialogue() -> None:
    told = ({"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hi!"})
    asked = item(0, "improved")
    asked = replace(asked, sft=replace(asked.sft, earlier=told, question="Who am I?"))
    scored = replace(task(1, 0.0, 1.0, 0.1, "better"), items=(asked,))
    html = comparison_page(replace(demo(), tasks={"dialogue": scored}))
    assert "Who am I?improved" in section(html, "items")
    assert "userI am Ada.assistantHi!userWho am I?expectedp e a r" in section(html, "items").replace("\n", "")


def section(html: str, name: str) -> str:
    """A section's text."""
    found = re.search(f'<section id="{name}">.*?</section>', html, re.S)
    assert found
    return Page(found[0]).text


@pytest.mark.parametrize(
    ("after", "said"),
    [(1.9, "It forgot nothing: 5.0% better"), (2.04, "It kept its plain text: +2.0%"), (2.1, "It forgot: 5.0% worse")],
)
def test_forgetting_in_words(after: float, said: str) -> None:
    data = replace(demo(), forgetting=Forgetting(text="t", bytes=9, base=2.0, sft=after))
    assert said in section(comparison_page(data), "forgetting")


@pytest.mark.parametrize(("wins", "said"), [(27, "prefers the SFT"), (2, "prefers the base"), (17, "cannot tell")])
def test_the_judge_is_told_with_its_leanings(wins: int, said: str) -> None:
    data = replace(demo(), judge=judged([p.id for p in demo().prompts], wins, 29 - wins))
    told = section(comparison_page(data), "judge")
    assert said in told and "71.0% (leans)" in told and "52.0%" in told and "52.0% (leans)" not in told
    assert "no verdict" in told and "neither" in told


def test_overlap_says_what_was_found_and_what_was_not_checked() -> None:
    told = section(comparison_page(demo()), "contamination")
    assert "13 words in a row" in told and "which of these is not a planet at all" in told
    assert "not checked: its items have no text of their own" in told and "mine.jsonl:12" in told


def test_overlap_that_was_checked_for_no_task_is_one_sentence() -> None:
    why = NotChecked(not_checked="no run <directory>")
    data = demo()
    html = comparison_page(replace(data, tasks={name: replace(t, contamination=why) for name, t in data.tasks.items()}))
    assert "Not checked for any task: no run <directory>." in section(html, "contamination")
    assert "<table" not in html[html.index('id="contamination"') : html.index('id="ledger"')]


def test_the_default_prompts_cover_what_they_should() -> None:
    found = load_prompts().prompts
    assert len({p.id for p in found}) == len(found)
    assert {p.kind for p in found} == {
        "concept", "identity", "spelling", "counting", "arithmetic", "fact", "format", "code", "open", "multi_turn",
        "system", "refusal", "language", "edge", "injection",
    }  # fmt: skip
    texts = [p.conversation.messages[-1].text for p in found]
    assert "" in texts and any(len(t.split()) > 200 for t in texts) and any(not t.isascii() for t in texts)
    assert any(len(p.conversation.messages) >= 5 for p in found)
    assert all(p.conversation.messages[-1].role == "user" for p in found), "each waits for a reply"


def test_held_out_loss_shows_what_was_measured() -> None:
    told = section(comparison_page(demo()), "held-out")
    assert "end of turn9.8000.003−9.797" in told and "user4.1001.420−2.680" in told
    assert "tool" not in told.split("by role")[1].split("by source")[0], "measured in neither model"


def test_scores_while_it_trained_are_told_at_few_steps() -> None:
    page = comparison_page(demo())
    told = section(page, "loss")
    assert page.count('aria-label="Scores by step"') == 2, "drawn wide and narrow"
    assert "in percent, at step50250400600" in told, "the first, the last and two between"
    assert "spelling8.341.766.7100.0" in told and "4 of 12 times" in told and "stop rate" in told
    assert "times" not in section(comparison_page(with_run(demo(), sampled=demo().run.sampled[:2])), "loss")


def test_a_reply_whose_form_changed() -> None:
    p = prompt(0, shipped_prompts()[0])
    both = replace(p, base=replace(p.base, finish_reason="stop", faults=("empty",)))
    assert form_change(replace(both, sft=replace(p.sft, faults=("empty", "looping")))) == "regressed"
    assert form_change(replace(both, base=replace(p.sft))) == ""
    assert form_change(p) == "improved"


def test_of_very_many_items_those_that_changed_stay() -> None:
    changed = [item(i, "improved") for i in range(50)]
    rest = [item(i, "same right") for i in range(50, MOST_ITEMS + 200)]
    data = demo()
    many = replace(data.tasks["counting"], items=(*changed, *rest))
    page = Page(comparison_page(replace(data, tasks=data.tasks | {"counting": many})))
    assert page.count("details", class_="entry") == len(data.prompts) + 5 * 6 + MOST_ITEMS
    assert "200 items left out" in page.text and page.text.count("left out") == 1
    assert f"{MOST_ITEMS} of 200 items, 50 improved" in page.text


def test_an_entry_has_one_short_line() -> None:
    assert figures.one_line("a\n b\t" + "c" * 999) == "a b " + "c" * 156 + "…"
    first = prompt(0, shipped_prompts()[0])
    data = replace(
        demo(), prompts=tuple(replace(first, messages=({"role": "user", "content": t},)) for t in (" \n", "<b>"))
    )
    heads = re.findall(r'<span class="head">(.*?)</span><span class="tags">', comparison_page(data))
    assert heads[:2] == ['<span class="empty">(empty)</span>', "&lt;b&gt;"]


def loss_of(sources: dict[str, float | None], first: float = 2.0) -> Page:
    """A page of 100 steps at loss 2 (the first at `first`) and validation at three steps, per source."""
    rows = [{"step": s, "loss": 2.0 if s else first, "sources": sources} for s in (0, 50, 100)]
    run = RunArtifacts(losses=[(step, 2.0) for step in range(1, 101)], validation=rows)
    html = comparison_page(replace(demo(), run=run))
    return Page(html[html.index('<section id="loss">') : html.index('<section id="made">')])


def test_loss_of_each_source_is_a_named_line_where_there_are_few() -> None:
    page = loss_of({"one": 1.0, HOSTILE: 3.0, "never held out": None})
    for i in range(2):
        assert page.count("path", class_=f"source s{i}") == 2, "once in the wide drawing, once in the narrow"
        assert page.count("text", class_=f"name s{i}") == page.count("path", class_=f"lead s{i}") == 2
    assert "one" in page.text and "held out, each source" in page.text and "never" not in page.text
    assert not page.count("script") and not page.count("img")
    many = loss_of({str(i): 1.0 for i in range(7)})
    assert "of each of the 7 sources" in many.text
    for sources in (many, loss_of({"only": 2.0})):
        assert not sources.count("path", class_="source s0") and not sources.count("text", class_="name val")


def test_a_loss_that_begins_far_up_does_not_flatten_the_rest() -> None:
    high, level = loss_of({"a": 2.0}, first=20.0), loss_of({"a": 2.0})
    assert "up to 20.0, lie above the drawing" in high.text and "held-out loss 20.00 at step 0, 2.00" in high.text
    assert "above the drawing" not in level.text
    assert level.count("circle", class_="dot") == 6 and high.count("circle", class_="dot") == 4
    ends = [
        float(y) for _, a in high.elements if a.get("class") == "val" for y in re.findall(r" ([\d.]+)", a["d"] or "")
    ]
    assert min(ends) >= 28, "nothing is drawn above the drawing's upper edge"
    assert len(ends) == high.count("circle", class_="dot"), "no line comes from a loss that is not drawn"


def test_loss_skips_values_that_are_no_numbers_and_stays_small() -> None:
    losses: list[float | None] = [math.nan, math.inf, None, *[2.0] * 49_997]
    html = comparison_page(with_run(demo(), losses=list(enumerate(losses)), validation=[]))
    assert Page(html) and len(html) < 1_000_000
    assert not re.search(r'd="[^"]*(nan|inf)', html)
    assert line_charts.smooth([4.0, 2.0, 3.0], 1) == [4.0, 3.0, 2.5]
    assert line_charts.smooth([1.0, 2.0], 0) == [1.0, 2.0]
    assert line_charts.ticks(0.2, 3.1, 5) == [1.0, 2.0, 3.0]


def test_token_boxes_say_mask_id_bytes_and_whitespace() -> None:
    row = token_row()
    page = Page(token_page.token_page([row, TokenRow("d.jsonl:4", refused="two user turns <in> a row")]))
    boxes = [a for t, a in page.elements if t == "span" and "title" in a]
    assert len(boxes) == len(row.tokens)
    assert [a["class"] for a in boxes[-2:]] == ["t s", "t s x"] and boxes[0]["class"] == "t x"
    assert boxes[2]["title"] == "id 102 · 5 bytes: 53 70 65 6c 6c · not supervised"
    assert boxes[11]["title"] == "id 111 · 2 bytes: f0 9f · not UTF-8 · supervised"
    assert "↵" in page.text and "⇥r" in page.text and "·pear" in page.text and "U+200B" in page.text
    assert "two user turns <in> a row" in page.text and "14 tokens, 7 supervised, 1 refused" in page.text
    assert Page(token_page.token_page([])).count("h1") == 1
