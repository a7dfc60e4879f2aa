"""What a recipe declares of conversations: `turns: last`, `join_turns`, and a long exchange cut within a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sftflow as sf
from helpers.runs import error_line, run
from helpers.templates import CHATML, HEAD, TAIL
from helpers.tokenizers import byte_level
from sftflow.chat.declared import has_turns_in_a_row, join_turns, only_last
from sftflow.chat.format import choose_format
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.verify import verify
from sftflow.data.mixture import build_mixture
from sftflow.data.render_pool import Job, render_block
from sftflow.data.truncate import TOO_LONG, UNTAUGHT, first_tokens, fit_to_length
from sftflow.foundation.errors import FormatError, RecipeError, SchemaError
from sftflow.recipe import parse_recipe
from sftflow.report.audit_page import audit_page

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}


def said(letters: str, **more: Any) -> list[dict[str, Any]]:
    """ "uaA" -> a user's message and two of the assistant's; s a system message, t a tool's result, c a call."""
    out: list[dict[str, Any]] = []
    for letter in letters:
        role = {"u": "user", "s": "system", "t": "tool"}.get(letter.lower(), "assistant")
        if letter == "c":
            out.append({"role": role, "content": None, "tool_calls": [CALL]})
        else:
            out.append({"role": role, "content": f"{letter}{len(out)}", **more.get(letter, {})})
    return out


def open_template(template: str) -> Renderer:
    tokenizer = byte_level(special=("</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|end_reply|>"))
    tokenizer.chat_template = template
    return Renderer(tokenizer, choose_format("auto", tokenizer))


# ---- turns: last


@pytest.mark.parametrize(
    ("letters", "taught"),
    [("ua", [1]), ("uaua", [3]), ("uactua", [5]), ("uauctctau", [3, 5, 7]), ("uaaua", [4]), ("uuaa", [2, 3]),
     ("suacta", [2, 3, 5]), ("a", [0]), ("uau", [1]), ("uct", [1]), ("u", [])],
)  # fmt: skip
def test_the_last_turn_is_all_behind_the_last_question(letters: str, taught: list[int]) -> None:
    row = parse_row(said(letters), "f:1")
    found = only_last(row)
    assert found.supervised == taught and only_last(found) == found
    assert [m.text for m in found.messages] == [m.text for m in row.messages]


def test_weights_of_ones_own_stay() -> None:
    messages = [{**m, "weight": w} for m, w in zip(said("aaa"), (0.5, 0, 0.25), strict=True)]
    row = parse_row([said("u")[0], messages[0], said("u")[0], *messages[1:]], "f:1")
    assert [m.weight for m in only_last(row).messages] == [1, 0, 1, 0, 0.25]
    none = parse_row({"prompt": said("uau"), "completion": said("aua")}, "f:1")
    assert [m.weight for m in only_last(none).messages] == [1, None, 1, 0, 1, 1]


def test_only_the_last_reply_is_in_the_mask(renderer: Renderer) -> None:
    last = renderer.supervising("replies", turns="last")
    row = parse_row(said("uaua"), "f:1")
    (rendered,) = last.render_rows(last.declared(row))
    whole = renderer.render(row)
    assert np.array_equal(rendered.ids, whole.ids)
    start = len(renderer.render(row.before(3), add_generation_prompt=True).ids)
    assert rendered.mask.tolist() == [0] * start + whole.mask[start:].tolist()
    assert verify(last, last.declared(row), rendered) == {}
    silent = parse_row(said("uaua", a={"weight": 0}), "f:1")
    assert fit_to_length(last.declared(silent), last, 64, "cut").dropped == UNTAUGHT
    assert fit_to_length(last.declared(row), last, len(whole.ids) - 1, "cut").dropped == TOO_LONG
    with pytest.raises(SchemaError, match="f:2: turns: last, but a row of tokens does not say"):
        last.declared(parse_row({"input_ids": [5, 6], "mask": [0, 1]}, "f:2"))


# ---- join_turns


@pytest.mark.parametrize(
    ("letters", "joined"),
    [("uaua", ["u0", "a1", "u2", "a3"]), ("uuaaa", ["u0\n\nu1", "a2\n\na3\n\na4"]), ("suu", ["s0", "u1\n\nu2"]),
     ("ss", ["s0", "s1"]), ("uctta", ["u0", "", "t2", "t3", "a4"]), ("uac", ["u0", "a1"]), ("ucc", ["u0", ""])],
)  # fmt: skip
def test_messages_in_a_row_become_one(letters: str, joined: list[str]) -> None:
    row = parse_row(said(letters), "f:1")
    found = join_turns(row)
    assert [m.text for m in found.messages] == joined
    assert sum(len(m.tool_calls) for m in found.messages) == letters.count("c")
    assert not has_turns_in_a_row(found) and join_turns(found) == found
    assert parse_row(found.to_row(), "f:1").messages == found.messages


@pytest.mark.parametrize(
    ("messages", "fact"),
    [
        (said("uca"), "a reply behind tool calls"),
        (said("uaA", A={"weight": 0}), "another weight"),
        (said("uaA", a={"weight": 0.5}, A={"weight": 0.25}), "another weight"),
        (said("uaA", A={"reasoning_content": "hm"}), "reasoning behind a reply"),
        (said("uU", u={"name": "Ann"}, U={"name": "Bob"}), "another name"),
    ],
)
def test_what_cannot_be_joined_is_named(messages: list[dict[str, Any]], fact: str) -> None:
    number = len(messages) - 1
    with pytest.raises(SchemaError, match=rf"f:1\.messages\[{number}\]: it cannot be joined .*: {fact}; "):
        join_turns(parse_row(messages, "f:1"))


def test_reasoning_and_calculator_parts_are_joined_in_their_order() -> None:
    parts = [{"type": "text", "text": "So "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    thinking = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    row = parse_row([*said("u"), thinking, {"role": "assistant", "content": parts}, *said("a")], "f:1")
    (_, reply) = join_turns(row).messages
    assert reply.reasoning_content == "hm"
    assert [(p.kind, p.text) for p in reply.parts] == [
        ("text", "So "), ("python", "1+1"), ("python_output", "2"), ("text", "\n\n"), ("text", "a0")
    ]  # fmt: skip


@given(st.lists(st.sampled_from("ua"), min_size=1, max_size=8).map("".join))
def test_joined_rows_alternate_and_lose_nothing(letters: str) -> None:
    row = parse_row(said(letters), "f:1")
    found = join_turns(row)
    assert "\n\n".join(m.text for m in found.messages) == "\n\n".join(m.text for m in row.messages)
    assert not has_turns_in_a_row(found)


@pytest.mark.parametrize("letters", ["uua", "uaa", "uaauua"])
def test_a_format_that_wants_turns_to_alternate_says_how(renderer: Renderer, letters: str) -> None:
    row = parse_row(said(letters), "f:1")
    with pytest.raises(FormatError, match=r"^f:1: [^\n]*; [^\n]*join_turns: true in the recipe"):
        renderer.render_rows(row)
    joining = renderer.supervising("replies", join_turns=True)
    assert joining.render_rows(joining.declared(row))
    with pytest.raises(FormatError) as other:
        renderer.render_rows(parse_row(said("tu"), "f:1"))
    assert "join_turns" not in str(other.value)


# ---- in a recipe


def test_they_are_counted_checked_and_named(renderer: Renderer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"messages": said("uuaua")}, {"messages": said("uaa")}, {"messages": said("ua")}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"mixture": [{"source": str(file)}], "validation": 0, "train": {"max_length": 64, "tokens_per_step": 64}}

    def mixed(**more: Any) -> Any:
        return build_mixture(parse_recipe({**keys, **more}, "r"), renderer, every_row=True)

    with pytest.raises(FormatError, match=r"a\.jsonl:1: .*join_turns: true"):
        mixed()
    every, last = mixed(join_turns=True), mixed(join_turns=True, turns="last")
    assert np.array_equal(every.rows[0].all_ids, last.rows[0].all_ids)
    assert (every.ledger["turns"], last.ledger["turns"], last.ledger["join_turns"]) == ("all", "last", True)
    assert last.ledger["supervised_tokens"] < every.ledger["supervised_tokens"]
    assert all(c["checked"] == 3 and not c["failed"] for c in last.invariants().values())
    assert [note.partition(":")[0] for note in last.notes()[:2]] == ["join_turns", "turns"]
    assert "(<code>turns: last</code>)" in audit_page(last.ledger)
    assert "turns: last" not in audit_page(every.ledger) + str(every.notes())
    with pytest.raises(RecipeError, match="turns: last teaches a reply, and supervise: all every token"):
        parse_recipe({**keys, "turns": "last", "supervise": "all"}, "r")


def test_render_takes_both(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [{"messages": said("uuaua")}]
    refused = sf.render(rows, tokenizer_dir)
    assert "join_turns: true" in refused.refused[0]["reason"] and refused.exit_code == 2
    (every,) = sf.render(rows, tokenizer_dir, join_turns=True).rows
    (last,) = sf.render(rows, tokenizer_dir, join_turns=True, turns="last").rows
    assert [t.id for t in every.tokens] == [t.id for t in last.tokens] and 0 < last.n_supervised < every.n_supervised
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    base = ["render", str(tmp_path / "a.jsonl"), "--model", str(tokenizer_dir), "--json", "--join-turns", "--turns"]
    shown = json.loads(run(*base, "last").stdout)
    assert sum(shown["rows"][0]["mask"]) == last.n_supervised
    assert "--turns: it should be 'all' or 'last' (given: 'first')" in error_line(run(*base, "first"))


# ---- a long exchange


def test_of_an_end_of_turn_that_is_cut_in_two_nothing_is_taught() -> None:
    """The end is two tokens: `<|end_reply|><|im_end|>`."""
    end = "{{ '<|end_reply|>' if m.role == 'assistant' else '' }}"
    renderer = open_template(HEAD + "{{ m.content }}" + end + TAIL + "{% endif %}")
    assert len(renderer.ends()[0]) == 2
    row = parse_row(said("ua"), "f:1")
    whole = renderer.render(row)
    stop = int(np.flatnonzero(np.isin(whole.ids, renderer.stop_ids()) & (whole.mask == 1))[-1])
    for n, taught in ((stop, stop - 1), (stop - 1, stop - 1), (stop + 1, stop + 1)):
        fitted = fit_to_length(row, renderer, n, "cut_tokens")
        assert [fitted.dropped, fitted.cut] == [None, n < len(whole.ids)]
        cut = first_tokens(fitted.pairs[0][1], n, renderer)
        assert cut.ids.tolist() == whole.ids[:n].tolist()
        assert cut.mask.tolist() == [*whole.mask[:taught].tolist(), *[0] * (n - taught)]
    empty = parse_row([{"role": "user", "content": "u"}, {"role": "assistant", "content": ""}], "f:1")
    n = int(np.flatnonzero(renderer.render(empty).mask)[0]) + 1
    assert fit_to_length(empty, renderer, n, "cut_tokens").dropped == TOO_LONG


@pytest.mark.parametrize("weight", [1, 0.5])
def test_rows_cut_within_a_turn_are_counted_apart(weight: float) -> None:
    renderer = open_template(CHATML)
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "tell me " * 40, "weight": weight}]
    rows = [(n, parse_row(row, f"t:{n}")) for n, row in enumerate((long, [*said("ua"), *long], said("ua")), 1)]
    block = render_block(renderer, Job(renderer.spec, "t", 64, "cut_tokens", "stop"), rows, -1)
    assert block.error is None and (block.counts.cut, block.counts.cut_tokens) == (2, 2)
    assert all(not check["failed"] for check in block.counts.invariants.values())
    turns = render_block(renderer, Job(renderer.spec, "t", 64, "cut", "stop"), rows, -1)
    assert (turns.counts.cut, turns.counts.cut_tokens, turns.counts.dropped[TOO_LONG]) == (1, 0, 1)
    assert set(block.spans["weight"]) == ({0.5} if weight == 0.5 else set())
    assert not len(block.spans) or block.spans["end"].max() == 64
