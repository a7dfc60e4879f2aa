"""The graded items of each task: what the scores rest on, reply by reply."""

from __future__ import annotations

from collections.abc import Sequence

from sftflow.report.page.parts import as_text, browse, entry, fold, line, note, plural, replies, tag, turns
from sftflow.report.pages import esc
from sftflow.report.wording import UNSTOPPED, Data, better_arm, change_of, number

MOST = 300  # items a task: enough to read, and a page that still opens at once
KINDS = {"improved": "good", "regressed": "alert", "same right": "", "same wrong": ""}


def fewer(rows: Sequence[Data], arm: str, most: int = MOST) -> list[Data]:
    """At most `most` rows: those whose score changed first, then the others, each in their own order."""
    ranked = sorted(rows, key=lambda r: change_of(r, arm) not in ("improved", "regressed"))
    return list(rows) if len(rows) <= most else ranked[:most]


def items(data: Data, say: dict[str, str]) -> str:
    folds = [_task(name, t, say) for name, t in (data.get("tasks") or {}).items() if t.get("rows")]
    if not folds:
        return ""
    said = "What the scores rest on, reply by reply: open a task, filter it, and step through its items."
    return note(said) + "".join(folds)


def _task(name: str, task: Data, say: dict[str, str]) -> str:
    arm, counts = better_arm(task), dict.fromkeys(("improved", "regressed", "wrong", "unstopped"), 0)
    rows = fewer(task["rows"], arm)
    entries = []
    for row in rows:
        change = change_of(row, arm)
        wrong = row.get("sft_score") is not None and row["sft_score"] < 1
        unstopped = row.get("sft_finish") == "length"
        shown = {"improved": change == "improved", "regressed": change == "regressed", "wrong": wrong}
        marks = [m for m, yes in {**shown, "unstopped": unstopped}.items() if yes]
        for mark in marks:
            counts[mark] += 1
        tags = (tag(UNSTOPPED, "alert") if unstopped else "") + (tag(change, KINDS[change]) if change else "")
        asked: list[Data] = [
            {"role": "user", "content": row.get("question")},
            {"role": "expected", "content": as_text(row.get("answer"))},
        ]
        body = f"{turns(asked)}{replies(row, say)}{_cost(row)}"
        entries.append(entry(line(row.get("question")), tags, body, marks=marks))
    names = ("improved", "regressed", f"{say['after']} wrong", f"{say['after']} {UNSTOPPED}")
    buttons = [(mark, name, counts[mark]) for mark, name in zip(counts, names, strict=True)]
    n, left = task.get("n"), (task.get("rows_left_out") or 0) + len(task["rows"]) - len(rows)
    aside = f"{len(rows):,} of {number(n)} items, {counts['improved']} improved, {counts['regressed']} regressed"
    if task.get("max_new_tokens"):
        aside += f", at most {task['max_new_tokens']} new tokens"
    more = (
        note(f"{plural(left, 'item')} left out here, unchanged ones first; the eval folder has every row.")
        if left
        else ""
    )
    return fold(name, more + browse("items", entries, buttons), aside)


def _cost(row: Data) -> str:
    told = [str(esc(row.get("id")))] if row.get("id") is not None else []
    if row.get("sft_tokens") is not None:
        told.append(f"{number(row['sft_tokens'])} tokens")
    if row.get("sft_seconds"):
        told.append(f"{number(row['sft_seconds'], '.2f')} s")
    return f'<p class="small soft id">{" · ".join(told)}</p>' if told else ""
