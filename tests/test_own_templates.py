"""Chat templates of our own, one for each thing that is hard: what is right for each is stated here, and every row that
is made is judged by the oracle. Needs nothing from outside: the two tokenizers are trained here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.judge import PARTS, Line, control_tokens, judge, lengths_are_sure
from helpers.oracle import check_rows
from helpers.shapes import SHAPES, assistant, user
from helpers.tokenizers import WITH_TOKENS
from sftflow.chat.format import TEMPLATE_NOW, choose_format
from sftflow.chat.prefill import drop_prefill
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row

FOLDER = Path(__file__).parent / "templates"
GROUPS = {
    "tools": [name for name, row in SHAPES.items() if "tools" in row],
    "results": [name for name, row in SHAPES.items() if any(m["role"] == "tool" for m in row["messages"])],
    "reasoning": [name for name, row in SHAPES.items() if any("reasoning_content" in m for m in row["messages"])],
    "everything": list(SHAPES),
}


@dataclass(frozen=True)
class Own:
    """What is right for a template. Shapes, or groups of them, that are not named are one whole row.

    stops: the tokens that close its replies.   refused: no mask can be proven, or something would vanish.
    declined: the template itself refuses.   by_turn: a row for each reply.   arguments: whole, with arguments built in.
    whole: exceptions from the others.   parts: the roles whose contents are lists of parts.
    """

    stops: tuple[str, ...] = ("<|im_end|>",)
    refused: str = ""
    declined: str = ""
    by_turn: str = ""
    arguments: str = ""
    whole: str = ""
    parts: tuple[str, ...] = ()

    def outcomes(self) -> dict[str, str]:
        """The outcome of every shape; of the words that name a shape, the last in this order is right."""
        out = dict.fromkeys(SHAPES, "whole")
        for outcome, named in (
            ("refused", self.refused),
            ("a row a turn", self.by_turn),
            ("with arguments", self.arguments),
            ("declined", self.declined),
            ("whole", self.whole),
        ):
            for name in named.split():
                out.update(dict.fromkeys(GROUPS.get(name, [name]), outcome))
        return out


EOS, EOT, END = ("</s>",), ("<|eot_id|>",), ("<|end|>",)
MUTE = "tools reasoning"  # a template that writes neither: nothing may vanish
TURNS = (
    "turns system_turns think_inline_turns empty_turn space_only newlines_first padded unicode_composed "
    "combining_first repeated repeated_inside lookalikes_user lookalikes_assistant lookalikes_edges headers"
)
SYSTEMS = "system system_turns developer padded lookalikes_edges"

TEMPLATES = {
    "plain": Own(refused=MUTE),
    "generation_marks": Own(refused=MUTE),
    "strips_reasoning": Own(refused=MUTE, by_turn="think_inline_turns"),
    "strips_unless_asked": Own(refused="tools", arguments="reasoning_turns reasoning_mixed think_inline_turns"),
    "prefills_think": Own(refused=f"{MUTE} think_inline_turns", arguments="assistant_first"),
    "prefills_always": Own(refused="everything", whole="think_inline"),
    "prefills_in_a_word": Own(refused="everything", whole="think_inline"),
    "prefills_closed": Own(
        refused=MUTE,
        by_turn=f"{TURNS} assistants_in_a_row assistant_first",
        arguments="empty empty_turn space_only",
    ),
    "empty_thoughts_last": Own(
        refused=f"{MUTE} assistants_in_a_row assistant_first", by_turn=TURNS, whole="think_inline_turns"
    ),
    "no_end_of_turn": Own((), refused="everything"),
    "end_is_text": Own((), refused="everything"),
    "last_end_missing": Own(refused="everything"),
    "other_end_last": Own(
        ("<|end|>", "<|return|>"),
        by_turn=TURNS,
        refused=f"{MUTE} assistants_in_a_row assistant_first",
    ),
    "merges_at_boundary": Own(EOS, refused=MUTE),
    "trims": Own(EOS, refused=MUTE),
    "normalises": Own(refused=MUTE),
    "capitals": Own(refused="everything"),
    "dates": Own(EOT, refused=MUTE),
    "alternation": Own(
        ("<end_of_turn>",),
        refused=MUTE,
        declined=f"{SYSTEMS} tools_system results users_in_a_row assistants_in_a_row assistant_first",
    ),
    "drops_tool_calls": Own(refused=MUTE),
    "tool_calls_json": Own(refused="reasoning"),
    "tool_calls_own_syntax": Own(END, refused="reasoning"),
    "tool_calls_tags": Own(END, refused="reasoning"),
    "tool_calls_tokens": Own(EOS, refused="reasoning", by_turn="call_rounds"),
    "two_ends": Own(("<|eot_id|>", "<|eom_id|>"), refused="reasoning", declined="calls_parallel"),
    "header_first": Own(END, refused=MUTE),
    "default_system": Own(refused=MUTE),
    "system_in_user": Own(EOS, refused=MUTE, declined="developer results"),
    "reasoning_kept": Own(EOS, refused="tools assistant_first"),
    "reasoning_dropped": Own(refused=MUTE),
    "asks_unasked": Own(END, refused=MUTE),
    "looks_into_contents": Own(refused=MUTE),
    "end_of_two_tokens": Own(("<|say_end|><|turn_end|>",), refused=MUTE),
    "end_with_words": Own(("<|close|>assistant<|sep|><|end_of_msg|>",), refused=MUTE),
    "calls_end_of_two_tokens": Own(
        ("<|say_end|><|turn_end|>", "<|call_end|><|turn_end|>"), refused="reasoning assistant_first"
    ),
    "two_ends_and_eos": Own(("<|end|>\n</s>",), refused=MUTE),
    "header_always": Own(refused=MUTE),
    "header_always_no_end": Own((), refused="everything"),
    "eos_behind_all": Own(END, refused=MUTE),
    "parts": Own(("<end_of_utterance>",), refused=MUTE, parts=PARTS),
    "parts_of_users": Own(refused=MUTE, parts=("user", "tool")),
    "parts_written_out": Own(refused=MUTE, parts=("user",)),
}
# Refused although a right row exists: a first message that nothing prompts for.
AVOIDABLE = {"empty_thoughts_last": 1, "other_end_last": 1, "reasoning_kept": 1, "calls_end_of_two_tokens": 1}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.jinja"


def tokenizer_for(name: str, kind: str) -> Any:
    """The tokenizer with every control token that the template writes."""
    make = WITH_TOKENS[kind]
    return make(special=control_tokens(path_of(name).read_text(encoding="utf-8"), make(), TEMPLATES[name].parts))


@cache
def renderer_of(name: str, kind: str = "byte-level") -> Renderer:
    tokenizer = tokenizer_for(name, kind)
    return Renderer(tokenizer, choose_format(str(path_of(name)), tokenizer))


@cache
def line_of(name: str, kind: str) -> Line:
    own = TEMPLATES[name]
    return judge(path_of(name), kind, tokenizer_for(name, kind), own.stops, SHAPES, parts=own.parts)


def test_every_template_is_in_the_table() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.jinja")) == sorted(TEMPLATES)


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_right_happens(name: str, kind: str) -> None:
    """No row is wrong, nothing is refused that is not in the table, and nothing is accepted that is."""
    line = line_of(name, kind)
    assert not line.wrong, "\n".join(line.wrong)
    assert line.owned
    assert line.outcomes == TEMPLATES[name].outcomes()
    assert line.open == AVOIDABLE.get(name, 0), [s for s in line.shapes if ": AVOIDABLE: " in s]


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("name", ["no_end_of_turn", "end_is_text"])
def test_an_end_is_put_where_there_is_none(name: str, kind: str) -> None:
    line = judge(path_of(name), kind, tokenizer_for(name, kind), EOS, SHAPES, eos=True)
    assert not line.wrong, "\n".join(line.wrong)
    assert {name for name, outcome in line.outcomes.items() if outcome == "refused"} == set(
        GROUPS["tools"] + GROUPS["reasoning"]
    )


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("name", ["prefills_always", "prefills_in_a_word"])
def test_what_prompts_begin_replies_with_is_taken_out(name: str, kind: str) -> None:
    """Then every reply can be taught that the template writes whole, with thoughts and without."""
    line = judge(path_of(name), kind, tokenizer_for(name, kind), ("<|im_end|>",), SHAPES, without_prefill=True)
    assert not line.wrong, "\n".join(line.wrong)
    refused = {name for name, outcome in line.outcomes.items() if outcome == "refused"}
    assert refused == set(GROUPS["tools"] + GROUPS["reasoning"])


THOUGHTS_ALONE = {
    "reasoning": {"messages": [user("Say zqask."), assistant("", reasoning_content="Only zqthought.")]},
    "inline": {"messages": [user("Say zqask."), assistant("<think>Only zqthought.</think>")]},
    "turns": {"messages": [user("a"), assistant("Said zqb."), user("c"), assistant("", reasoning_content="A zqd.")]},
}


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("name", ["reasoning_kept", "strips_unless_asked"])
def test_a_reply_may_be_thoughts_alone(name: str, kind: str) -> None:
    """Its end follows what closes them, the row's own tag or the template's, which is no token of the tokenizer."""
    line = judge(path_of(name), kind, tokenizer_for(name, kind), TEMPLATES[name].stops, THOUGHTS_ALONE)
    assert not line.wrong, "\n".join(line.wrong)
    assert line.outcomes == dict.fromkeys(THOUGHTS_ALONE, "whole")


def test_thoughts_alone_where_the_template_cuts_them_out_of_a_content(tmp_path: Path) -> None:
    path = tmp_path / "cuts.jinja"
    path.write_text(
        "{%- for m in messages -%}{%- set said = m.content.split('</think>') -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
        "{{- '<think>\\n' + said[0].split('<think>')[-1].strip() + '\\n</think>\\n\\n' if said | length > 1 else '' -}}"
        "{{- said[-1].strip() + '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
    tokenizer = WITH_TOKENS["byte-level"](special=("<|im_start|>", "<|im_end|>"))
    row = {"inline": THOUGHTS_ALONE["inline"]}
    line = judge(path, "byte-level", tokenizer, ("<|im_end|>",), row)
    assert not line.wrong and line.outcomes == {"inline": "whole"}


def test_a_template_that_begins_no_reply_stays_as_it_is() -> None:
    for name in ("plain", "prefills_think", "end_of_two_tokens"):
        assert drop_prefill(renderer_of(name)) is renderer_of(name)


def test_a_token_across_the_boundary_is_split_and_counted() -> None:
    """Where no control token stands between prompt and reply, the two are encoded apart, as serving will have them."""
    renderer = renderer_of("merges_at_boundary")
    row = parse_row([{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer"}], "t:1")
    rendered = renderer.render(row)
    assert rendered.boundary_splits == 1
    together = renderer.tokenizer.encode(rendered.text, add_special_tokens=False)
    assert rendered.ids.tolist() != together and renderer.decode(rendered.ids.tolist()) == rendered.text
    prompt = renderer.render(row.before(1), add_generation_prompt=True).ids.tolist()
    assert rendered.ids[: len(prompt)].tolist() == prompt
    assert renderer.decode(rendered.ids[rendered.mask == 1].tolist()) == "The answer</s>"


def test_the_day_is_the_stored_one() -> None:
    row = parse_row(SHAPES["single"], "t:1")
    assert "Today is 01 Jan 2026." in renderer_of("dates").render(row).text


def test_generation_marks_agree_with_the_proof() -> None:
    assert renderer_of("generation_marks").disagreement() is None


def test_both_ends_stop_a_reply() -> None:
    renderer = renderer_of("two_ends")
    assert renderer.end_token == "<|eot_id|>"
    assert {renderer.special[token] for token in ("<|eot_id|>", "<|eom_id|>")} <= set(renderer.stop_ids())


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_never_shorter_than_is_surely_said(name: str, kind: str) -> None:
    assert lengths_are_sure(renderer_of(name, kind))


def _fault(name: str, rows: list[Any], tokenizer: Any) -> list[Any]:
    """The rows with one fault planted in the first."""
    row, rest = rows[0], rows[1:]
    ids, mask = row.ids.tolist(), row.mask.tolist()
    on = [t for t, m in enumerate(mask) if m]
    text, splits = row.text, row.boundary_splits
    match name:
        case "first token lost":
            mask[on[0]] = 0
        case "end of turn lost":
            mask[on[-1]] = 0
        case "header supervised":
            mask[on[0] - 1] = 1
        case "newline after the end supervised":
            mask[on[-1] + 1] = 1
        case "everything supervised":
            mask = [1] * len(ids)
        case "nothing supervised":
            mask = [0] * len(ids)
        case "shifted":
            mask = [0, *mask[:-1]]
        case "first turn lost":
            end = next(t for t in on if not mask[t + 1])
            mask = [0] * (end + 1) + mask[end + 1 :]
        case "second BOS":
            ids, mask = [tokenizer.bos_token_id, *ids], [0, *mask]
        case "control id from content":  # what plain encoding of the text makes of a look-alike
            text = tokenizer.decode(ids)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            mask = (mask + [0] * len(ids))[: len(ids)]
        case "token lost":
            del ids[3], mask[3]
        case "other segmentation":  # the same text from single bytes
            t = next(t for t in on if len(tokenizer.convert_ids_to_tokens(ids[t])) > 3)
            letters = tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(ids[t])))
            ids[t : t + 1], mask[t : t + 1] = letters, [1] * len(letters)
        case "other text":
            text = text.replace("zqa", "zqz")
        case "row twice":
            rest = [row]
        case _:
            raise ValueError(name)
    faulty = SimpleNamespace(ids=np.array(ids), mask=np.array(mask), text=text, boundary_splits=splits)
    return [faulty, *rest]


@pytest.mark.parametrize(
    ("fault", "shape"),
    [
        ("first token lost", "turns"),
        ("first token lost", "empty"),
        ("end of turn lost", "turns"),
        ("header supervised", "single"),
        ("newline after the end supervised", "single"),
        ("everything supervised", "repeated"),
        ("nothing supervised", "single"),
        ("shifted", "turns"),
        ("first turn lost", "turns"),
        ("second BOS", "single"),
        ("control id from content", "lookalikes_user"),
        ("token lost", "single"),
        ("other segmentation", "turns"),
        ("other text", "turns"),
        ("row twice", "single"),
    ],
)
def test_planted_faults_are_seen(fault: str, shape: str) -> None:
    """The checker is itself checked: each way in which a row can be wrong must be reported."""
    path, renderer = path_of("plain"), renderer_of("plain")
    tokenizer = renderer.tokenizer
    rows = renderer.render_rows(parse_row(SHAPES[shape], "shape:1"))

    def check(rendered: list[Any]) -> list[str]:
        return check_rows(
            SHAPES[shape],
            rendered,
            tokenizer=tokenizer,
            template=path.read_text(encoding="utf-8"),
            kwargs=dict(renderer.format.kwargs),
            now=TEMPLATE_NOW,
            stops=("<|im_end|>",),
        )

    assert check(rows) == []
    assert check(_fault(fault, rows, tokenizer)) != []


def test_weight_zero_fault_is_seen() -> None:
    """A row that teaches a turn of weight 0 is as wrong as one that leaves out a turn of weight 1."""
    path, renderer, unlike = path_of("plain"), renderer_of("plain"), SHAPES["weight_zero"]
    tokenizer = renderer.tokenizer
    alike = {"messages": [{k: v for k, v in m.items() if k != "weight"} for m in unlike["messages"]]}
    for shown, judged_as in ((alike, unlike), (unlike, alike)):
        problems = check_rows(
            judged_as,
            renderer.render_rows(parse_row(shown, "shape:1")),
            tokenizer=tokenizer,
            template=path.read_text(encoding="utf-8"),
            kwargs=dict(renderer.format.kwargs),
            now=TEMPLATE_NOW,
            stops=("<|im_end|>",),
        )
        assert any("are to be taught" in p for p in problems)
