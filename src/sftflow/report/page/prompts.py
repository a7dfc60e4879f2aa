"""The fixed prompts: every one with every reply, and the weak answers among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftflow.report.page.parts import browse, entry, line, message, note, replies, reply, tag, turns
from sftflow.report.pages import esc
from sftflow.report.wording import UNSTOPPED, Data, flags_of, form_change, number

JUDGED = {"a": "won", "b": "lost"}  # the side that the judge prefers: what that is for the model after


def asked(prompt: Data) -> Any:
    """What the user said last."""
    said = [m for m in prompt.get("messages") or [] if m.get("role") == "user"]
    return said[-1].get("content") if said else prompt.get("id")


def weak_prompts(data: Data) -> list[tuple[int, Data]]:
    named = set(data.get("weak") or [])
    prompts = enumerate(data.get("prompts") or [])
    return [(i, p) for i, p in prompts if p.get("kind") == "open" or p.get("id") in named]


def weak(data: Data, say: dict[str, str]) -> str:
    rows = []
    for i, p in weak_prompts(data):
        link = f'<a class="small" href="#p-{i}">side by side</a>'
        rows.append(f"<dt>{message(asked(p))}</dt><dd>{reply('', p.get('sft'), p.get('sft_finish'))}{link}</dd>")
    if not rows:
        return ""
    said = (
        f"Questions unlike those it was trained on, and what the {say['after']} model says to them. "
        "Read these before trusting a reply."
    )
    return f'{note(said)}<div class="weak"><dl>{"".join(rows)}</dl></div>'


def prompts(data: Data, say: dict[str, str]) -> str:
    rows: Sequence[Data] = data.get("prompts") or []
    if not rows:
        return ""
    judged = {str(r.get("id")): str(r.get("verdict")) for r in (data.get("judge") or {}).get("rows") or []}
    kinds: dict[str, int] = {}
    counts: dict[str, int] = {}
    entries = []
    for i, p in enumerate(rows):
        kind = str(p.get("kind") or "other")
        kinds[kind] = kinds.get(kind, 0) + 1
        verdict = judged.get(str(p.get("id")), "")
        marks, tags = _marks(p, verdict, say)
        for mark in marks:
            counts[mark] = counts.get(mark, 0) + 1
        name = f'<p class="small soft id">{esc(kind)} · {esc(p.get("id"))}{_lengths(p)}</p>'
        body = f"{turns(p.get('messages') or [])}{replies(p, say)}{name}"
        # The first of each kind is open: a sample that nobody picked.
        first = kinds[kind] == 1
        entries.append(entry(line(asked(p)), tags, body, marks=marks, kind=kind, id_=f"p-{i}", open_=first))
    buttons = [
        (m, name, counts.get(m, 0)) for m, name in (("improved", "form improved"), ("regressed", "form regressed"))
    ]
    buttons.append(("unstopped", f"{say['after']} {UNSTOPPED}", counts.get("unstopped", 0)))
    if judged:
        buttons += [(m, f"judge: {say['after']} {JUDGED[m[6]]}", counts.get(m, 0)) for m in ("judge-a", "judge-b")]
    about = data.get("prompt_set") or {}
    which = f"Prompt set {about.get('name')}, version {about.get('version')}; " if about else ""
    how = (data.get("settings") or {}).get("decoding")
    which += f"{how.partition(';')[0]} decoding; " if isinstance(how, str) else ""
    said = (
        f"{esc(which)}every prompt and reply is here, none picked. Nothing grades them: form improved or regressed "
        "says only whether a reply lost or gained a fault such as not stopping, looping or being empty."
    )
    return note(said) + browse("prompts", entries, buttons, kinds)


def _marks(p: Data, verdict: str, say: dict[str, str]) -> tuple[list[str], str]:
    """What the list is filtered by, and what the entry's line shows of it."""
    before, after = flags_of(p, "base"), flags_of(p, "sft")
    change = form_change(p)
    marks = [change] if change else []
    tags = "".join(tag(f, "alert") for f in after)
    if UNSTOPPED in after:
        marks.append("unstopped")
    elif UNSTOPPED in before and p.get("sft_finish") == "stop":
        tags += tag("now stops", "good")
    if p.get("sft") is not None and p.get("sft") == p.get("base"):
        tags += tag("same reply")
    if verdict in JUDGED:
        marks.append(f"judge-{verdict}")
        tags += tag(f"judge: {say['after']} {JUDGED[verdict]}")
    elif verdict == "tie":
        tags += tag("judge: tie")
    return marks, tags + tag(str(p.get("kind") or "other"))


def _lengths(p: Data) -> str:
    """How long the replies are, in tokens where these were counted."""
    tokens = p.get("tokens")
    if isinstance(tokens, dict) and tokens.get("base") is not None and tokens.get("sft") is not None:
        return f" · {number(tokens['base'])} → {number(tokens['sft'])} tokens"
    return f" · {len(str(p.get('base') or '')):,} → {len(str(p.get('sft') or '')):,} characters"
