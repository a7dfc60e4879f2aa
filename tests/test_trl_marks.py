"""The training templates that TRL ships say themselves what is to be learnt: their `{% generation %}` marks are held
against our masks, character by character, and few conversations that they can express may be refused.

Where the two differ, it is in this, and in nothing else:

- What stands in the prompt is not taught, though the mark holds it: a header (`<｜Assistant｜>`, `<|start|>assistant`,
  the line break behind `<|im_start|>assistant`), the opened or empty think block that the prompt pre-fills.
- What follows the token that stops generation is not taught: `BEHIND` has what each template writes there.
- What generation must produce is taught, though the mark leaves it out: `UNMARKED`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.oracle import Case, Reference, cases
from helpers.shapes import CLOCK, LIMA, PARIS, SHAPES, WEATHER, assistant, call, result, system, user
from helpers.trl import ABSENT, PATHS, parts_of, stops_of, tokenizer_of
from sftflow.chat.format import TEMPLATE_NOW, choose_format
from sftflow.chat.prefill import drop_prefill
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.template_options import choose_arguments
from sftflow.foundation.errors import FormatError, MaskError

pytestmark = pytest.mark.slow
TRAINING = [path for path in PATHS if path.stem.endswith("_training")]
EACH = [pytest.param(path, id=path.stem) for path in TRAINING] or ABSENT

ROUND = [
    user("How is zqask?"),
    assistant("", tool_calls=[call("zqweather", PARIS, "callAAAA1")]),
    result("zqblue", "callAAAA1"),
    assistant("It is zqfinal."),
]
MORE = {
    "last_only": {
        "messages": [user("One zqa."), assistant("Two zqb.", weight=0), user("Three zqc."), assistant("Four zqd.")]
    },
    "many_turns": {
        "messages": [m for i in range(6) for m in (user(f"Ask zqq{i}a."), assistant(f"Say zqr{i}a."))],
    },
    "call_system": {"messages": [system("Be zqterse."), *ROUND], "tools": [WEATHER]},
    "call_then_turns": {"messages": [*ROUND, user("And zqmore?"), assistant("Yes zqlast.")], "tools": [WEATHER]},
    "turn_then_call": {"messages": [user("Hello zqhi."), assistant("Good zqday."), *ROUND], "tools": [WEATHER]},
    "call_last_taught": {
        "messages": [ROUND[0], {**ROUND[1], "weight": 0}, *ROUND[2:]],
        "tools": [WEATHER],
    },
    "calls_of_one_tool": {
        "messages": [
            user("How is zqask?"),
            assistant(
                "",
                tool_calls=[
                    call("zqweather", PARIS, "callAAAA1"),
                    call("zqweather", {"zqcity": "zqrome"}, "callBBBB2"),
                ],
            ),
            result("zqblue", "callAAAA1"),
            result("zqgrey", "callBBBB2"),
            assistant("It is zqfinal."),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "call_without_definition": {"messages": ROUND},
    "call_reasoning_text": {
        "messages": [
            user("How is zqask?"),
            assistant("Wait zqlook.", reasoning_content="I zqwonder.", tool_calls=[call("zqclock", LIMA, "callAAAA1")]),
            result("zqnoon", "callAAAA1"),
            assistant("It is zqfinal.", reasoning_content="I zqknow."),
        ],
        "tools": [CLOCK],
    },
    "system_reasoning": {
        "messages": [system("Be zqterse."), user("Say zqask."), assistant("So zqreply.", reasoning_content="zqponder.")]
    },
    "code": {"messages": [user("Write zqcode."), assistant("```python\nzqf = {'a': [1, 2]}\n```\n\n- zqlist\n")]},
}

# What stands in the mark behind the token that stops generation.
BEHIND = ("", "\n", "\n</s>")
# Taught without a mark: a call ends with the token that opens its result, and the prompt behind results has no header.
# Their prompts end with `<think>\n`, which no reply that they write begins with (the thoughts of one are cut off): they
# are taught as users can have it, with `drop_prefill: true`.
PREFILLED = ("deepseek_r1_distill_training", "deepseekv3_training")
UNMARKED = {"diffusion_gemma_training": ("<|tool_response>", "<|turn>model\n", "<|turn>model\n<|tool_response>")}


@dataclass
class Account:
    """Of the conversations that the template can express: how many are taught, and why the others are not."""

    taught: int = 0
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def expressed(reference: Reference, row: dict[str, Any]) -> bool:
    """Whether the template takes the conversation and leaves nothing of it out."""
    every = cases(reference, row, {}, ())
    return any(
        case.text(len(case.messages)) is not None and not case.vanished(len(case.messages), set(case.supervised))
        for case in every
    )


def supervised_characters(rendered: Rendered, reference: Reference) -> np.ndarray:
    """(characters,) which of the text are supervised."""
    data = rendered.text.encode()
    spans = reference.spans([int(i) for i in rendered.ids], rendered.text, set())
    assert spans is not None
    by_byte = np.zeros(len(data), bool)
    for (first, last), m in zip(spans, rendered.mask, strict=True):
        by_byte[first:last] |= bool(m)
    starts = np.cumsum([0, *(len(c.encode()) for c in rendered.text)])[:-1]
    return by_byte[starts]


def common(a: str | None, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a or "", b, strict=False)) if x != y), min(len(a or ""), len(b)))


def differences(case: Case, upto: int, rendered: Rendered, taught: list[int], name: str) -> list[str]:
    """In what the mask of one row differs from the marks beyond what is stated above."""
    text, out = rendered.text, []
    ours = supervised_characters(rendered, case.reference)
    theirs = np.zeros(len(text), bool)
    for first, last in case.reference.marks(case.messages[:upto], case.tools):
        theirs[first:last] = True
    seen = np.zeros(len(text), bool)
    for k in taught:
        region = slice(common(case.text(k), text) if k else 0, common(case.text(k + 1), text))
        on = np.flatnonzero(ours[region]) + region.start
        marked = np.flatnonzero(theirs[region]) + region.start
        if not len(on) or not len(marked):
            out.append(f"turn {k}: {len(on)} characters taught, {len(marked)} marked")
            continue
        start, end = int(on[0]), int(on[-1]) + 1
        seen[start:end] = True
        unmarked = "".join(text[i] for i in on if not theirs[i])
        if unmarked not in ("", *UNMARKED.get(name, ())):
            out.append(f"turn {k}: taught but not marked {unmarked!r}")
        prompt = case.prompt(k)
        if prompt is not None and text[:start] != prompt:
            out.append(f"turn {k}: the reply does not begin where its prompt ends")
        lacking = "".join(text[i] for i in marked if start <= i < end and not ours[i])
        behind = "".join(text[i] for i in marked if i >= end)
        if lacking or behind not in BEHIND:
            out.append(f"turn {k}: marked but not taught {lacking!r}, {behind!r}")
    if (ours & ~seen).any():
        out.append("something outside the taught turns is supervised")
    return out


@cache
def account_of(path: Path) -> Account:
    tokenizer, account = tokenizer_of(path), Account()
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer))
    if path.stem in PREFILLED:
        renderer = drop_prefill(renderer)
    plain = Reference(tokenizer, renderer.format.template, TEMPLATE_NOW, parts_of(path), stops_of(path))
    for shape, row in (SHAPES | MORE).items():
        can = expressed(plain, row)
        conversation = parse_row(row, shape)
        try:
            chosen = choose_arguments(renderer, [conversation])
            pairs = chosen.render_pairs(conversation)
        except (FormatError, MaskError) as error:
            account.refused += [str(error)] if can else []
            continue
        account.taught += can
        reference = Reference(tokenizer, chosen.format.template, TEMPLATE_NOW, parts_of(path), stops_of(path))
        whole = conversation.supervised
        for made_from, rendered in pairs:
            upto = len(made_from.messages)
            taught = whole if len(pairs) == 1 else made_from.supervised
            every = list(cases(reference, row, {}, ()))
            # (transformers misplaces the marks of one template where a content is null: those cases come last.)
            every.sort(key=lambda case: any(m["content"] is None for m in case.messages))
            same = [c for c in every if c.text(upto) == rendered.text]
            found = differences(same[0], upto, rendered, taught, path.stem) if same else ["no reference has its text"]
            account.wrong += [f"{path.stem} / {shape} / {problem}" for problem in found]
    return account


@pytest.mark.parametrize("path", EACH)
def test_masks_are_what_the_marks_say(path: Path) -> None:
    assert not account_of(path).wrong, "\n".join(account_of(path).wrong)


@pytest.mark.skipif(not TRAINING, reason="the package trl is not installed")
def test_what_can_be_expressed_is_taught() -> None:
    """At least 98 of a hundred conversations that a template takes whole."""
    accounts = {path.stem: account_of(path) for path in TRAINING}
    taught = sum(a.taught for a in accounts.values())
    refused = [f"{name}: {reason}" for name, a in accounts.items() for reason in a.refused]
    print(f"{taught} taught, {len(refused)} refused")
    assert taught >= 0.98 * (taught + len(refused)), "\n".join(refused)
