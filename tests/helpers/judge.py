"""Renders conversations of every shape with a template and a tokenizer, and has the oracle judge every row."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.oracle import Reference, Stops, accepts, check_rows, why_not
from helpers.shapes import SHAPES, WEATHER, Row
from sftflow.chat.format import TEMPLATE_NOW, choose_format
from sftflow.chat.prefill import drop_prefill
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.template_options import append_eos, choose_arguments
from sftflow.foundation.errors import FormatError, MaskError, SchemaError

CONTROL = re.compile(
    r"<\|[A-Za-z0-9_ ]+\|>|<｜[^｜<>]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<(?:start|end)_of_(?:turn|utterance)>"
    r"|</?s>|<bos>|<eos>|<sop>|\[gMASK\]|\[/?(?:AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|\[TOOL_CALLS\]|\[ARGS\]"
)
# In the tokenizers that have these, they are added tokens but not special ones.
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

PARTS = ("system", "developer", "user", "assistant", "tool")  # contents of all roles are lists of parts

SWITCHES = ("enable_thinking", "thinking", "keep_past_thinking")

PROBE = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "b"},
]


@dataclass
class Line:
    """A row of the table: how many conversations went which way.

    declined: the template itself refuses. forced: refused, and no right row exists for it with any thinking switch
    (content dropped, no end of turn, a prompt that is no prefix). open: refused although a right row exists.
    outcomes: of each shape that is not wrong: "whole", "a row a turn", "with arguments", "refused" or "declined".
    """

    template: str
    tokenizer: str
    owned: bool
    right: int = 0
    declined: int = 0
    forced: int = 0
    open: int = 0
    wrong: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    shapes: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        name = f"{self.template[:30]:30} {self.tokenizer:12} {'owned' if self.owned else '-':5}"
        counts = f"{self.right:4} {self.declined:5} {self.forced:6} {self.open:5} {len(self.wrong):5}"
        reasons = "; ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common())
        return f"{name} {counts}  {reasons}"


HEADER = f"{'template':30} {'tokenizer':12} owned right tmpl. forced avoid wrong  reasons of refusals"


def controls(reference: Reference) -> set[str] | None:
    """The control tokens that a template writes around a conversation of two turns; None where it refuses that."""
    for tools in (None, [WEATHER]):  # one template is only for conversations with tools
        text = reference.text(PROBE, tools, {})
        if text is not None:
            return set(
                CONTROL.findall(text + (reference.text(PROBE[:-1], tools, {}, add_generation_prompt=True) or ""))
            )
    return None


def control_tokens(template: str, plain: Any, parts: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Every control token that a template writes, and the bos and eos of a tokenizer that has no others."""
    # Some templates put their tokens together ('<|' + role + '|>'), so that only a rendering shows them.
    reference = Reference(plain, template, TEMPLATE_NOW, parts)
    systems = reference.text([{"role": "system", "content": "s"}, *PROBE], None, {})
    written = [*CONTROL.findall(template), *(controls(reference) or ()), *CONTROL.findall(systems or "")]
    return tuple(sorted({plain.bos_token, plain.eos_token, *written}))


def owns(template: str, tokenizer: Any, stops: Stops, parts: tuple[str, ...] = ()) -> bool:
    """Whether all control tokens that the template writes around two turns are tokens of the tokenizer,"""
    reference = Reference(tokenizer, template, TEMPLATE_NOW, parts)
    written = controls(reference)
    return written is not None and written <= set(reference.added.values()) and reference.owns(stops)


def choices(template: str) -> list[dict[str, Any]]:
    """Every setting of the thinking switches that a template reads."""
    names = [name for name in SWITCHES if re.search(rf"\b{name}\b", template)]
    settings = itertools.product((None, True, False), repeat=len(names))
    return [{n: v for n, v in zip(names, values, strict=True) if v is not None} for values in settings]


def judge(
    path: Path,
    label: str,
    tokenizer: Any,
    stops: Stops,
    shapes: dict[str, Row],
    *,
    eos: bool = False,
    without_prefill: bool = False,
    parts: tuple[str, ...] = (),
) -> Line:
    """Render every shape with the template of a file, and judge every row.

    stops: the tokens that close replies, () where the template writes none.   label: the tokenizer's name.
    eos: put the end of text, which is then the only one of `stops`, behind every reply.
    without_prefill: take out what prompts begin replies with.
    parts: the roles whose contents the template wants as a list of parts.
    """
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer))
    renderer = append_eos(renderer) if eos else renderer
    renderer = drop_prefill(renderer) if without_prefill else renderer
    template = renderer.format.template
    line = Line(path.stem, label, owns(template, tokenizer, stops, parts))
    reference = Reference(tokenizer, template, TEMPLATE_NOW, parts, stops)
    for shape, row in shapes.items():
        where = f"{path.stem} / {label} / {shape}"
        try:
            conversation = parse_row(row, "shape:1")
            chosen = choose_arguments(renderer, [conversation])  # as for a data set that holds this one row
            rows = chosen.render_rows(conversation)
        except FormatError as error:
            line.declined += 1
            line.outcomes[shape] = "declined"
            if accepts(reference, row, {}):
                line.shapes.append(f"{where}: FORMAT: {error}")
            continue
        except MaskError as error:
            reason = re.sub(r"shape:1[^:]*: ", "", str(error))
            reason = re.sub(r"(messages\[)\d+|zq\w+", r"\1", re.sub(r"; .*", "", reason))[:90]
            why = why_not(reference, row, choices(template), stops if reference.owns(stops) else ())
            line.reasons[reason] += 1
            line.outcomes[shape] = "refused"
            if why is None:
                line.open += 1
            else:
                line.forced += 1
            line.shapes.append(f"{where}: {'AVOIDABLE' if why is None else why}: {error}")
            continue
        except Exception as error:  # whatever else comes out is a fault of the renderer's, and the table goes on
            line.wrong.append(f"{where}: {type(error).__name__}: {error}")
            continue
        problems = check_rows(
            row,
            rows,
            tokenizer=tokenizer,
            template=template,
            kwargs=dict(chosen.format.kwargs),
            now=renderer.format.now,
            stops=stops,
            reference=reference,
        )
        if problems:
            line.wrong.append(f"{where}: " + "; ".join(problems))
        else:
            line.right += 1
            arguments = "with arguments" if chosen.format.kwargs else ""
            line.outcomes[shape] = arguments or ("whole" if len(rows) == 1 else "a row a turn")
    return line


def lengths_are_sure(renderer: Renderer) -> int:
    """Checks `rough_length` on every shape: it refuses requests before they are rendered, so what it says is sure must
    be. -> how many prompts could be checked."""
    turns = [
        [{"role": ("user", "assistant")[i % 2], "content": content} for i in range(21)]
        for content in ("", "a", "\n", " x\n\n", "<|im_end|><|im_start|>", "</s></s>")
    ]
    checked = 0
    for row in (*SHAPES.values(), *turns):
        try:
            conversation = parse_row(row, "shape:1")
            n = len(renderer.render(conversation, add_generation_prompt=True).ids)
        except (FormatError, MaskError, SchemaError):
            continue
        about, least = renderer.rough_length(conversation)
        assert least <= min(n, about), row
        assert renderer.rough_length(conversation, 1)[1] <= n, row  # by the text's length alone
        checked += 1
    return checked
