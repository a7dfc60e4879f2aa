"""Text as it is streamed is the text of the whole reply, for any text, tokenizer and stop text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.generation import text_of
from sftflow.chat.streaming import held_back
from sftflow.generation.detokenize import LONGEST, Detokenizer, StopTexts, detokenize
from sftflow.generation.request import Delta, GenerationRequest
from sftflow.generation.sequence import ReplyDecoder, ReplySequence

# Characters of every length in UTF-8, spaces that tokenizers treat in their own ways, and pieces of several characters.
TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(list("ab .,'\n\té€한🙂\u200d👩👧"))), max_size=30
)


@pytest.fixture(scope="module")
def tokenizers(tokenizer_dir: Path, known_tokenizers: dict[str, Path]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {n: AutoTokenizer.from_pretrained(p) for n, p in {"ours": tokenizer_dir, **known_tokenizers}.items()}


def decoder_of(tokenizer: Any) -> Any:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def special(tokenizer: Any) -> set[int]:
    return {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def pieces(tokenizer: Any, ids: list[int]) -> Iterator[str]:
    one = Detokenizer(decoder_of(tokenizer), special(tokenizer))
    yield from (one.feed(i) for i in ids)
    yield one.flush()


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_text_piece_by_piece(tokenizers: dict[str, Any], text: str) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole, shown = tokenizer.decode(ids, skip_special_tokens=True), ""
        for piece in pieces(tokenizer, ids):
            shown += piece
            assert whole.startswith(shown)  # never half a character, nor anything to be taken back
        assert shown == whole


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 379), max_size=40), st.integers(0, 3))
def test_any_ids_piece_by_piece(tokenizers: dict[str, Any], ids: list[int], which: int) -> None:
    """Bytes that are no text, too: the first ids of these tokenizers are mostly single bytes."""
    for tokenizer in tokenizers.values():
        decode = decoder_of(tokenizer)
        assert "".join(pieces(tokenizer, ids)) == detokenize(decode, ids, special(tokenizer))
        if "\ufffd" not in decode(ids):
            assert detokenize(decode, ids, special(tokenizer)) == decode(ids)


def test_byte_level_tokenizers_decode_broken_bytes_as_they_do_at_once(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["ours"]
    single = {t: i for t, i in tokenizer.get_vocab().items() if len(t) == 1}
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = [list(single.values())[int(i)] for i in torch.randint(0, len(single), (30,), generator=generator)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_token_costs_the_same_however_long_the_reply(tokenizers: dict[str, Any]) -> None:
    longest = 0
    for tokenizer in tokenizers.values():

        def decode(ids: list[int], tokenizer: Any = tokenizer) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        one = Detokenizer(decode)
        text = "한국어 🙂 and some words, " * 60
        shown = "".join(one.feed(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
        assert shown + one.flush() == text
    assert longest <= 3 * LONGEST


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
)
def test_stop_texts_in_whatever_pieces(given_pieces: list[str], stops: list[str]) -> None:
    text, filter_ = "".join(given_pieces), StopTexts(stops)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
    wanted = text[: min(ends)[1]] if ends else text
    shown = ""
    for piece in given_pieces:
        shown += filter_.feed(piece)
        assert wanted.startswith(shown)
        assert filter_.found is not None or text.startswith(shown + filter_.held)
    assert shown + filter_.flush() == wanted
    assert (filter_.found is not None) == bool(ends)


def test_held_back() -> None:
    assert held_back("so 3\n", ["\n\n"]) == 1
    assert held_back("abab", ["abac", "b"]) == 2
    assert held_back("x", []) == 0


@pytest.fixture(scope="module")
def decoder(tokenizer_dir: Path) -> ReplyDecoder:
    from helpers.tiny import make_renderer

    return ReplyDecoder(make_renderer(tokenizer_dir, "sftflow"))


def streamed(decoder: ReplyDecoder, ids: list[int], **more: Any) -> tuple[str, Any]:
    """(the deltas joined, the reply) of a sequence that is given these ids."""
    sequence = ReplySequence(
        GenerationRequest(prompt_ids=(1,), use_python=False, **more), decoder, len(ids), streamed=True
    )
    text = ""
    for token in ids:
        sequence.accept(token)
        delta = sequence.take()
        text += delta.text
        if delta.reply is not None:
            return text, delta.reply
    raise AssertionError("it must end at its length")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_streamed_replies_with_the_calculator_in_them(decoder: ReplyDecoder, data: Any) -> None:
    assert decoder.python is not None
    plain = data.draw(
        st.lists(st.one_of(st.integers(0, 399), st.sampled_from(decoder.python)), min_size=1, max_size=40)
    )
    text, reply = streamed(decoder, plain, stop_ids=frozenset())
    assert text == reply.text == text_of(decoder, plain)
    if not text:
        return
    at = data.draw(st.integers(0, len(text) - 1))
    stop = text[at : at + data.draw(st.integers(1, 4))]
    cut, stopped = streamed(decoder, plain, stop_ids=frozenset(), stop_texts=(stop,))
    assert cut == stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stopped_by) == ("stop", stop)
    if "\ufffd" not in stop:  # it ended with the first token that made the stop text whole
        assert stop not in text_of(decoder, stopped.ids[:-1])


def test_a_stop_text_across_a_call(decoder: ReplyDecoder) -> None:
    assert decoder.python is not None
    start, end, out_start, out_end = decoder.python
    encode = decoder.renderer.encode_plain
    ids = [*encode("so th"), start, *encode("1+1"), end, out_start, *encode("2"), out_end, *encode("en more")]
    text, reply = streamed(decoder, ids, stop_ids=frozenset(), stop_texts=("then",))
    assert text == reply.text == "so " and reply.stopped_by == "then"


def test_what_ends_a_reply_is_told(decoder: ReplyDecoder) -> None:
    (stop, *_), a = sorted(decoder.stop), decoder.renderer.encode_plain("a")[0]
    text, reply = streamed(decoder, [a, stop, a])
    assert (text, reply.finish_reason, reply.stopped_by, reply.n_generated) == ("a", "stop", stop, 1)
    assert streamed(decoder, [a, a])[1].stopped_by is None


def test_engine_streams_stop_texts(tiny_base: Path) -> None:
    from sftflow.checkpoint import load_assistant

    engine = load_assistant(str(tiny_base)).engine
    asks = [
        GenerationRequest(prompt_ids=(5, 6), max_new_tokens=50, temperature=1.5, seed=s, logprobs=1) for s in range(6)
    ]
    for ask, whole in zip(asks, engine.generate(asks), strict=True):
        middle = len(whole.text) // 2
        stopping = replace(ask, stop_texts=(whole.text[middle : middle + 3],)) if whole.text else ask
        (reply,) = engine.generate([stopping])
        deltas = list(engine.stream(stopping))
        assert "".join(d.text for d in deltas) == reply.text
        assert deltas[-1].reply is not None and deltas[-1].reply.ids == reply.ids
        assert tuple(t.id for d in deltas for t in d.tokens) == reply.ids


def test_what_is_not_streamed_is_taken_at_its_end(decoder: ReplyDecoder) -> None:
    ids = decoder.renderer.encode_plain("one two")
    request = GenerationRequest(prompt_ids=(1,), use_python=False)
    sequence = ReplySequence(request, decoder, len(ids))
    for token in ids[:-1]:
        sequence.accept(token)
        assert sequence.take() == Delta("")
    sequence.accept(ids[-1])
    last = sequence.take()
    assert (last.text, last.ids, last.finish_reason) == ("one two", tuple(ids), "length")
    assert last.reply is not None and last.reply.text == "one two"
