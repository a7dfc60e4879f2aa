"""The comparison report: one self-contained HTML page, made from a `Comparison`.

    Comparison -> sections, each a template of templates/comparison/ -> page under a policy that lets nothing load

Model output is hostile text: the templates escape every string, and no data is put inside a script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sftflow.comparison.results import Comparison, TaskComparison, fields_to_json
from sftflow.comparison.run_artifacts import RunArtifacts
from sftflow.report import charts, line_charts, wording
from sftflow.report.line_charts import MOST_LINES, Points
from sftflow.report.pages import cell, render
from sftflow.report.token_page import token_boxes
from sftflow.report.wording import UNSTOPPED, ModelNames, faults_of, form_change

SECTIONS = {
    "scores": "Scores",
    "weak": "Weak answers",
    "prompts": "Fixed prompts",
    "items": "Graded items",
    "hygiene": "Hygiene of the replies",
    "forgetting": "Forgetting",
    "held-out": "Held-out loss",
    "judge": "A judge's view",
    "contamination": "Overlap with training",
    "ledger": "What it was trained on",
    "mask": "One training conversation",
    "loss": "Loss",
    "made": "How it was made",
}
SECTION_CSS = ("tokens.css", "charts.css", "sections.css", "report.css")
MOST_ITEMS = 300
"""of a task: enough to read, and a page that still opens at once"""
SEEN = {"whole": "in training", "last question": "last question in training"}
RIGHT = {True: ("✓ right", "good"), False: ("✗ wrong", "alert")}
MOST_STEPS = 4
"""of the scores while it trained, in numbers"""


def comparison_page(comparison: Comparison) -> str:
    """The page. A section that has nothing to show is left out, with its link."""
    values = _values(comparison)
    bodies = {anchor: Markup(render(f"comparison/{anchor}", **values)) for anchor in SECTIONS}
    titles = SECTIONS if comparison.trained else {**SECTIONS, "forgetting": "Plain text"}
    kept = [(anchor, title, bodies[anchor]) for anchor, title in titles.items() if bodies[anchor].strip()]
    return render("comparison/page", sections=kept, **values)


def section_cell(comparison: Comparison, anchor: str) -> str:
    """One of the SECTIONS for a notebook's cell."""
    return cell(Markup(render(f"comparison/{anchor}", **_values(comparison))), *SECTION_CSS)


def loss_cell(run: RunArtifacts, under: Markup = Markup("")) -> str | None:
    """The loss by step for a notebook's cell; None where no loss is a number."""
    loss = loss_figure(run)
    drawn = render("comparison/loss", loss=loss, sampled=sampled_figure(run.sampled), most_lines=MOST_LINES)
    return cell(Markup(drawn) + under, *SECTION_CSS) if loss else None


def _values(comparison: Comparison) -> dict[str, Any]:
    """What the templates of the sections are handed."""
    names = wording.model_names(comparison)
    lengths = [side.length["counts"] for side in (comparison.hygiene.base, comparison.hygiene.sft)]
    return {
        "c": comparison,
        "names": names,
        "cost": fields_to_json(comparison.cost),
        "wording": wording,
        "charts": charts,
        "item_entries": item_entries,
        "prompts": prompt_entries(comparison, names),
        "n_marked": n_marked,
        "loss": loss_figure(comparison.run),
        "sampled": sampled_figure(comparison.run.sampled),
        "most_lines": MOST_LINES,
        "forest_scale": charts.forest_scale([(t.delta, *t.ci95) for t in comparison.tasks.values()]),
        # the largest share of a model's replies in one bin of their lengths
        "tallest": max(max(n, default=0) / (sum(n) or 1) for n in lengths),
        "token_boxes": token_boxes,
    }


# ---- lists to browse


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a list. marks: by which the list is filtered.   tags: (text, class) in the entry's one line."""

    content: Any
    marks: Sequence[str]
    tags: Sequence[tuple[str, str]]
    kind: str = ""


def item_entries(task: TaskComparison) -> list[Entry]:
    """A task's items, those that changed first; of very many the first."""
    classes = {"improved": "good", "regressed": "alert"}
    entries = []
    for item in task.items[:MOST_ITEMS]:
        unstopped = item.sft.finish_reason == "length"
        marks = {item.change: item.change in classes, "wrong": item.sft.score < 1, "unstopped": unstopped}
        tags = [(UNSTOPPED, "alert")] if unstopped else []
        tags.append((item.change, classes.get(item.change, "")))
        entries.append(Entry(content=item, marks=[mark for mark, has in marks.items() if has], tags=tags))
    return entries


def prompt_entries(comparison: Comparison, names: ModelNames) -> list[Entry]:
    """The fixed prompts, each with what the judge said of it."""
    judged = {"a": f"judge: {names.after} won", "b": f"judge: {names.after} lost", "tie": "judge: tie"}
    verdicts = {row.pair.id: row.verdict for row in comparison.verdicts}
    entries = []
    for prompt in comparison.prompts:
        before, after, change = faults_of(prompt.base), faults_of(prompt.sft), form_change(prompt)
        marks = [change] if change else []
        marks += ["seen"] if prompt.in_training else []
        marks += ["wrong"] if prompt.sft.right is False else []
        tags = [(fault, "alert") for fault in after]
        if UNSTOPPED in after:
            marks.append("unstopped")
        elif UNSTOPPED in before and prompt.sft.finish_reason == "stop":
            tags.append(("now stops", "good"))
        if prompt.sft.text == prompt.base.text:
            tags.append(("same reply", ""))
        if verdict := verdicts.get(prompt.id):
            marks.append(f"judge-{verdict}")
            tags.append((judged[verdict], ""))
        tags += [RIGHT[prompt.sft.right]] if prompt.sft.right is not None else []
        tags += [(SEEN[prompt.seen], "")] if prompt.seen in SEEN else []
        entries.append(Entry(content=prompt, marks=marks, tags=[*tags, (prompt.kind, "")], kind=prompt.kind))
    return entries


def n_marked(entries: Sequence[Entry], mark: str) -> int:
    """How many entries a filter keeps."""
    return sum(mark in e.marks for e in entries)


# ---- what training wrote


def loss_figure(run: RunArtifacts) -> dict[str, Any] | None:
    """The loss by step as a chart, and what the chart says in words; None where no loss is a number."""
    raw = _finite(run.losses)
    if not raw:
        return None
    smoothed = list(zip((x for x, _ in raw), line_charts.smooth([y for _, y in raw], len(raw) // 40), strict=True))
    validation = _finite((v["step"], v["loss"]) for v in run.validation)
    names = dict.fromkeys(name for v in run.validation for name in v["sources"])
    found = {name: _finite((v["step"], v["sources"].get(name)) for v in run.validation) for name in names}
    sources = {name: points for name, points in found.items() if points}
    drawn = sources if 2 <= len(sources) <= MOST_LINES else {}
    top, highest = line_charts.ceiling(raw, [validation, *drawn.values()])
    return {
        "first": smoothed[0][1],
        "last": smoothed[-1][1],
        "validation": validation,
        "best": min(validation, key=lambda point: point[1]) if validation else None,
        "by_source": bool(drawn),
        "n_sources": len(sources),
        "highest": highest if highest > top else None,
        "chart": line_charts.loss_by_step(raw, smoothed, validation, drawn),
    }


def _finite(points: Iterable[tuple[float, float | None]]) -> Points:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def sampled_figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Scores and rates of the replies while it trained: drawn, and in numbers at a few steps."""
    if not rows:
        return None
    lines: dict[str, Points] = {}
    for row in rows:
        for name, value in {"ends by itself": row["hygiene"].get("stop_rate"), **row["tasks"]}.items():
            if value is not None:
                lines.setdefault(name, []).append((row["step"], value))
    last = len(rows) - 1
    chosen = [rows[i] for i in sorted({round(k * last / (MOST_STEPS - 1)) for k in range(MOST_STEPS)})]
    groups = {}
    for title, key in (("score on a sample", "tasks"), ("replies", "hygiene")):
        names = dict.fromkeys(name for row in chosen for name in row[key])
        groups[title] = {name: [row[key].get(name) for row in chosen] for name in names}
    return {
        "steps": [row["step"] for row in chosen],
        "n": len(rows),
        "groups": groups,
        "chart": line_charts.scores_by_step(lines) if lines and len(rows) > 1 else "",
    }
