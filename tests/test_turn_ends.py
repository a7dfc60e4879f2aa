"""Ends of turns of several tokens, and of tokens that the tokenizer does not mark special: what is taught, where
generation stops, and what a person reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers.judge import control_tokens, judge
from helpers.shapes import SHAPES
from helpers.tokenizers import WITH_TOKENS, byte_level, write_tokenizer
from sftflow.chat.format import choose_format
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.verify import verify
from sftflow.evaluation.heldout_loss import GROUPS, groups_of
from sftflow.evaluation.reply_checks import FAULTS, check_replies
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.sequence import ReplyDecoder, ReplySequence

FOLDER = Path(__file__).parent / "templates"
TURNS = parse_row(SHAPES["turns"], "t:1")
MUTE = {name for name, row in SHAPES.items() if "tools" in row} | {
    name for name, row in SHAPES.items() if any("reasoning_content" in m for m in row["messages"])
}


def renderer_of(name: str, tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, choose_format(str(FOLDER / f"{name}.jinja"), tokenizer))


def plain_end(kind: str) -> Any:
    """A tokenizer whose `<|im_end|>` is an added token like `<think>`, not a special one; and not its end of text."""
    return WITH_TOKENS[kind](special=("<|im_start|>", "<|extra|>"), plain=("<|im_end|>",))


def generated(renderer: Renderer, ids: list[int], *, streamed: bool) -> tuple[str, Reply]:
    """(the text's pieces joined, the reply) where the model says these ids."""
    sequence = ReplySequence(GenerationRequest(prompt_ids=(1,)), ReplyDecoder(renderer), 100, streamed=streamed)
    text = ""
    for token in ids:
        sequence.accept(token)
        delta = sequence.take()
        text += delta.text
        if delta.reply is not None:
            return text, delta.reply
    raise AssertionError("it must stop at its end")


@pytest.fixture(scope="module")
def two_tokens() -> Renderer:
    path = FOLDER / "end_of_two_tokens.jinja"
    return renderer_of(path.stem, byte_level(special=control_tokens(path.read_text(encoding="utf-8"), byte_level())))


# ---- an end of two tokens


def test_both_tokens_are_taught_and_the_last_one_stops(two_tokens: Renderer) -> None:
    rendered = two_tokens.render(TURNS)
    taught = two_tokens.decode(rendered.ids[rendered.mask == 1].tolist())
    replies = [m.text for m in TURNS.messages if m.role == "assistant"]
    assert taught == "".join(f"{text}<|say_end|><|turn_end|>" for text in replies)
    say, turn = (two_tokens.special[t] for t in ("<|say_end|>", "<|turn_end|>"))
    assert two_tokens.end_token == "<|turn_end|>"
    assert turn in two_tokens.stop_ids() and say not in two_tokens.stop_ids()
    assert (say, turn) in two_tokens.ends()
    assert verify(two_tokens, TURNS, rendered) == {}


def test_half_an_end_is_seen(two_tokens: Renderer) -> None:
    rendered = two_tokens.render(TURNS)
    stops = np.isin(rendered.ids, two_tokens.stop_ids())
    rendered.mask[stops] = 0
    assert "one supervised end of turn per supervised turn" in verify(two_tokens, TURNS, rendered)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_reply_stops_behind_both_and_shows_neither(two_tokens: Renderer, streamed: bool) -> None:
    rendered = two_tokens.render(TURNS)
    first = [int(i) for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]
    stop = first.index(two_tokens.special["<|turn_end|>"])
    text, reply = generated(two_tokens, first, streamed=streamed)
    assert (text, reply.text) == ("First zqb answer.",) * 2
    assert list(reply.ids) == first[: stop + 1] and reply.stopped_by == first[stop]
    assert (reply.finish_reason, reply.n_generated) == ("stop", stop - 1)
    assert [n for n in FAULTS if check_replies([reply], two_tokens).replies[n]] == []


def test_both_tokens_are_the_end_in_the_held_out_loss(two_tokens: Renderer) -> None:
    rendered = two_tokens.render(TURNS, turns=True)
    ends = rendered.ids[groups_of(rendered, two_tokens) == GROUPS.index("end_of_turn")]
    assert two_tokens.decode(ends.tolist()) == "<|say_end|><|turn_end|>" * 3


@pytest.mark.parametrize("streamed", [False, True])
def test_words_inside_an_end_are_not_said(streamed: bool) -> None:
    """`<|close|>assistant<|sep|><|end_of_msg|>` is held back, and given out where it turns out to be no end."""
    tokenizer = byte_level(special=("<|open|>", "<|sep|>", "<|close|>", "<|end_of_msg|>"))
    renderer = renderer_of("end_with_words", tokenizer)
    rendered = renderer.render(TURNS)
    said = [int(i) for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]
    stop = said.index(renderer.special["<|end_of_msg|>"])
    assert renderer.special["<|close|>"] not in renderer.stop_ids()
    text, reply = generated(renderer, said, streamed=streamed)
    assert (text, reply.text, len(reply.ids)) == ("First zqb answer.", "First zqb answer.", stop + 1)
    other = [renderer.special["<|close|>"], *renderer.encode_plain("assist"), *renderer.encode_plain(" on")]
    text, reply = generated(renderer, [*other, *said], streamed=streamed)
    assert (text, reply.text) == ("assist onFirst zqb answer.",) * 2
    text, reply = generated(renderer, [*said[: stop - 1], *said[stop:]], streamed=streamed)  # not the end as written
    assert (text, reply.text) == ("First zqb answer.assistant",) * 2
    assert verify(renderer, TURNS, rendered) == {}


def test_a_known_stop_ends_the_end() -> None:
    """What follows the end of text, or another id at which generation stops, is not taught."""
    tokenizer = byte_level(special=("<|turn_start|>", "<|say_start|>", "<|say_end|>", "<|turn_end|>"))
    path = FOLDER / "end_of_two_tokens.jinja"
    stop = tokenizer.convert_tokens_to_ids("<|say_end|>")
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer), ends=(stop,))
    rendered = renderer.render(parse_row(SHAPES["single"], "t:1"))
    assert rendered.text.endswith("<|say_end|><|turn_end|>")
    assert renderer.decode(rendered.ids[rendered.mask == 1].tolist()) == "It is zqreply now.<|say_end|>"


def test_an_end_of_text_behind_the_last_turn_is_no_part_of_its_end() -> None:
    tokenizer = byte_level(special=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"))
    renderer = renderer_of("eos_behind_all", tokenizer)
    rendered = renderer.render(parse_row(SHAPES["single"], "t:1"))
    assert rendered.text.endswith("<|end|></s>")
    assert renderer.decode(rendered.ids[rendered.mask == 1].tolist()) == "It is zqreply now.<|end|>"


# ---- an end that is not marked special


@pytest.mark.parametrize("kind", WITH_TOKENS)
def test_an_end_that_is_not_marked_special(kind: str) -> None:
    """Every row is right and none is refused; in contents it stays text, like any control token."""
    line = judge(FOLDER / "plain.jinja", kind, plain_end(kind), ("<|im_end|>",), SHAPES)
    assert not line.wrong, "\n".join(line.wrong)
    assert {name for name, outcome in line.outcomes.items() if outcome == "refused"} == MUTE


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("streamed", [False, True])
def test_it_stops_a_reply_and_is_not_shown(kind: str, streamed: bool) -> None:
    renderer = renderer_of("plain", plain_end(kind))
    end = renderer.special["<|im_end|>"]
    assert renderer.end_token == "<|im_end|>" and end in renderer.stop_ids()
    said = [*renderer.encode_plain("so it is"), end]
    text, reply = generated(renderer, [*said, *said], streamed=streamed)
    assert (text, reply.text, list(reply.ids)) == ("so it is", "so it is", said)
    assert end not in renderer.encode_plain("an <|im_end|> said aloud")


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_an_end_that_the_files_do_not_mark_special(tmp_path: Path, eos: str) -> None:
    """As in checkpoints whose tokenizer.json has `"special": false` on it, be it the end of text, too, or not."""
    write_tokenizer("qwen3", tmp_path)
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        data = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        for entry in data[key].values() if isinstance(data[key], dict) else data[key]:
            entry["special"] = entry["special"] and entry["content"] != "<|im_end|>"
        data |= {"eos_token": eos} if "eos_token" in data else {}
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    line = judge(FOLDER / "plain.jinja", "qwen3", tokenizer, ("<|im_end|>",), SHAPES)
    assert not line.wrong, "\n".join(line.wrong)
    assert {name for name, outcome in line.outcomes.items() if outcome == "refused"} == MUTE


def test_tags_that_are_no_ends_stay_what_they_are() -> None:
    """`</think>` is an added token, too; contents may hold it as a token."""
    renderer = renderer_of("plain", plain_end("byte-level"))
    tag = renderer.tokenizer.convert_tokens_to_ids("</think>")
    assert "</think>" not in renderer.special
    rendered = renderer.render(parse_row(SHAPES["think_inline"], "t:1"))
    assert tag in rendered.ids[rendered.mask == 1]
