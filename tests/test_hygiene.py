"""Chat hygiene: each rule on replies of a real model and on hand-made ones, and no alarm on clean ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.outside import tokenizer_names
from helpers.tiny import make_renderer
from sftflow.chat.schema import parse_row
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.reply_checks import (
    FAULTS,
    answers_itself,
    check_replies,
    distinct,
    lengths,
    loops,
    tool_calls,
    user_header,
)
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.sequence import ReplyDecoder, ReplySequence

CLEAN = [
    "The moon is 384,400 km away.",
    "# Bread\n\n### Instructions\n\n1. Mix **flour** and water.\n2. Wait.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n---\n",
    "Use `print`:\n\n```python\nfor user in users:\n    print(user)\n    print(user)\n    print(user)\n```\n",
    "A user is whoever uses it. The user: a person. Each user has a name, and the user's name is a word.",
    'He read the screen aloud. "User: unknown," it said.\n\n"Human: yes?" asked Ann.\n\nThen it went dark.',
    "A scene:\n\nHuman: Are you there?\nRobot: I am.\nHuman: Good.",
    "Robot: Who is there?\nHuman: I am.",
    "> User: my screen is black\n\nTry another cable.",
    "Question: what is a question? A sentence that asks.",
    "### Request\n\nGET /\n\n### Response\n\n200 OK",
    "A template in ChatML:\n\n```\n<|im_start|>user\nhi<|im_end|>\n```\n\nThe mark `<|im_end|>` ends a turn.",
    "Strike it out: <s>old</s> new. In F#, xs |> map f, and f <| x.",
    "Row, row, row your boat, gently down the stream. No, no, no, no!",
    "Ein Satz mit Umlauten: äöü. 🙂 你好",
    "24",
]


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Any:
    from sftflow.checkpoint import load_assistant

    return load_assistant(str(tiny_base))


def prompt(assistant: Any, text: str) -> tuple[int, ...]:
    row = parse_row([{"role": "user", "content": text}], "p")
    return tuple(int(i) for i in assistant.renderer.render(row, add_generation_prompt=True).ids)


def finished(ids: tuple[int, ...], text: str, parts: Any, finish: Any, n_generated: int) -> Reply:
    return Reply(
        ids=ids, text=text, parts=parts, finish_reason=finish, n_prompt=0, n_generated=n_generated, seconds=0.0
    )


def said(renderer: Any, *pieces: str | int, finish: str = "stop", end: bool = True) -> Reply:
    """A reply of texts and ids, put together as the engine does it."""
    ids = [i for p in pieces for i in ([p] if isinstance(p, int) else renderer.encode_plain(p))]
    n = len(ids)
    if finish == "stop" and end:
        ids.append(renderer.stop_ids()[0])
    parts = ReplyDecoder(renderer).parts(ids)
    text = "".join(p.text for p in parts if p.kind == "text")
    return finished(tuple(ids), text, parts, finish, n)


def faults(found: Any) -> dict[str, tuple[int, ...]]:
    return {name: found.replies[name] for name in FAULTS if found.replies[name]}


# ---- no false alarms


@pytest.mark.parametrize("name", ["sftflow", "chatml", "llama3", "phi3"])
def test_clean_replies_raise_no_alarm(tokenizer_dir: Path, name: str) -> None:
    renderer = make_renderer(tokenizer_dir, name)
    found = check_replies([said(renderer, text) for text in CLEAN], renderer)
    assert faults(found) == {}
    assert found.rate("stop") == 1 and found.n == len(CLEAN)
    assert all(found.faults_of(i) == [] for i in range(found.n))


# ---- each rule


def test_stop_limit_and_empty(renderer: Any) -> None:
    replies = [said(renderer, "hi"), said(renderer, "and so", finish="length"), said(renderer, " \n"), said(renderer)]
    found = check_replies(replies, renderer)
    assert found.replies["stop"] == (0, 2, 3) and found.rate("stop") == 0.75
    assert faults(found) == {"limit": (1,), "empty": (2, 3)}
    assert found.faults_of(1) == ["did not stop"] and found.faults_of(3) == ["empty"]
    data = found.to_json()
    assert (data["stop_rate"], data["limit_rate"], data["empty_rate"]) == (0.75, 0.25, 0.5)
    assert data["replies"]["stop_rate"] == [1] and data["replies"]["empty_rate"] == [2, 3]


def test_control_tokens_leak(renderer: Any) -> None:
    special = renderer.special
    replies = [
        said(renderer, "hi", special["<|user_end|>"], "there"),
        said(renderer, "hi", special["<|assistant_start|>"]),
        said(renderer, "so <|user_end|> it goes"),  # spelled out: plain ids
        said(renderer, "hi"),
    ]
    assert faults(check_replies(replies, renderer)) == {"role_leak": (0, 1, 2)}


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>assistant\nhi",
        "hi [INST] more",
        "a\n### Instruction:\nb",
        "x<|eot_id|>",
        "<|user|>",
        "<<SYS>> be kind",
    ],
)
def test_markers_of_other_formats_leak(renderer: Any, text: str) -> None:
    assert "role_leak" in faults(check_replies([said(renderer, text)], renderer))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("sftflow", "<|user_start|>"),
        ("chatml", "<|im_start|>user"),
        ("llama3", "<|start_header_id|>user<|end_header_id|>"),
        ("phi3", "<|user|>"),
        ("llama2", "[INST]"),
        ("alpaca", "###Instruction:"),
    ],
)
def test_a_user_turn_of_the_format(tokenizer_dir: Path, name: str, header: str) -> None:
    """The reply goes on with what the template itself writes before the next user text."""
    renderer = make_renderer(tokenizer_dir, name)
    assert user_header(renderer) == header
    row = parse_row(
        [{"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "Fine."), ("user", "And now?")]], "p"
    )
    whole = [int(i) for i in renderer.render(row, add_generation_prompt=True).ids]
    text = renderer.decode(whole)
    assert text.count("Fine.") == 1
    stops = set(renderer.stop_ids())
    at = next(i for i, token in enumerate(whole) if "Fine." in renderer.decode(whole[: i + 1]))
    ids = tuple(i for i in whole[at + 1 :] if i not in stops)  # a model that does not know where to stop
    parts = ReplyDecoder(renderer).parts(ids)
    reply = finished(ids, "Fine." + "".join(p.text for p in parts), parts, "length", 0)
    found = faults(check_replies([reply, said(renderer, "Fine.")], renderer))
    assert found["self_turn"] == (0,) and found["role_leak"] == (0,)


@pytest.mark.parametrize(
    ("text", "is_so"),
    [
        ("It is 4.\nUser: And 3+3?\nAssistant: 6", True),
        ("It is 4.\n\nHuman: thanks", True),
        ("It is 4.\nQuestion: What is 5+5?\nAnswer: 10", True),
        ("Assistant: It is 4.\nUser: And 3+3?", True),
        ("Answer: 4\n\nQuestion: why?", True),
        ("User: hi", False),  # no text before
        ("It is 4. User: And 3+3?", False),  # no line of its own
        ("Users: many\nUserland: all", False),
        ("Here is a talk:\n\nUser: hi\nAssistant: hello\nUser: bye", False),
        ("**Robot:** Who?\nHuman: I.", False),
        ("Fine.\n```\nUser: x\n```", None),  # hygiene takes code away first
    ],
)
def test_user_lines(renderer: Any, text: str, is_so: bool | None) -> None:
    if is_so is not None:
        assert answers_itself(text) is is_so
    assert ("self_turn" in faults(check_replies([said(renderer, text)], renderer))) is bool(is_so)


def test_looping_tails(renderer: Any) -> None:
    replies = [
        said(renderer, "Well." + " I am fine." * 20, finish="length"),
        said(renderer, "Well." + " I am fine." * 20),  # a stop behind it changes nothing
        said(renderer, "I am fine. " * 20 + "The cat sat on the mat and looked at the moon."),
        said(renderer, "!" * 60, finish="length"),
        said(renderer, "Well." + " I am fine." * 20 + " I"),  # it was about to leave the loop
        said(renderer, "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
    ]
    assert check_replies(replies, renderer).replies["looping"] == (0, 1, 3, 4)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 30), st.integers(0, 40), st.integers(0, 29))
def test_loops_by_their_definition(head: list[int], period: int, times: int, cut: int) -> None:
    tail = (list(range(10, 10 + period)) * times)[: max(0, period * times - cut % period)]
    assert loops(head + tail) is loops([*head, *tail, 98, 99]) is (len(tail) >= max(24, 3 * period))
    assert not loops([*head, *tail, 97, 98, 99])


def test_distinct_is_the_mean_of_the_replies(renderer: Any) -> None:
    found = check_replies([said(renderer, "the cat the Cat"), said(renderer, "one"), said(renderer, "")], renderer)
    assert found.distinct == (pytest.approx((2 / 4 + 1) / 2), pytest.approx(2 / 3), pytest.approx(1.0))
    # the same replies ten times over are as distinct; pooled they would not be
    more = check_replies([said(renderer, "the cat the Cat"), said(renderer, "one")] * 10, renderer)
    assert more.distinct[0] == pytest.approx(found.distinct[0])
    assert distinct([], 1) is None and distinct([["a"]], 2) is None
    assert check_replies([said(renderer, "你好你好")], renderer).distinct[0] == pytest.approx(0.5)


def test_broken_characters(renderer: Any) -> None:
    face = renderer.encode_plain("🙂")
    assert len(face) > 1
    replies = [
        said(renderer, "hi ", *face),
        said(renderer, "hi ", *face[:-1]),
        said(renderer, "hi ", *face[:-1], finish="length"),  # the limit came within it
        said(renderer, *face[1:], finish="length"),
        said(renderer, "a literal \ufffd is a character like others"),
    ]
    assert "\ufffd" in replies[1].text
    assert check_replies(replies, renderer).replies["invalid_utf8"] == (1, 3)


@pytest.mark.parametrize("name", tokenizer_names("llama2"))
def test_a_tokenizer_with_byte_fallback(known_tokenizers: dict[str, Path], name: str) -> None:
    renderer = make_renderer(known_tokenizers[name], "llama2")
    face = renderer.encode_plain("🜁")
    replies = [said(renderer, *face), said(renderer, *face[:-1]), *(said(renderer, text) for text in CLEAN)]
    found = check_replies(replies, renderer)
    assert faults(found) == {"invalid_utf8": (1,)} and found.tool_calls is None


def test_tool_calls(renderer: Any) -> None:
    start, end, out, out_end = renderer.python_ids()
    engine_made = ReplySequence(GenerationRequest(prompt_ids=(1,)), ReplyDecoder(renderer), 100)
    for token in (start, *renderer.encode_plain("48/2"), end):
        engine_made.accept(token)
    while engine_made.forced:
        engine_made.accept(engine_made.forced.popleft())
    for token in (*renderer.encode_plain("24"), renderer.stop_ids()[0]):
        engine_made.accept(token)
    replies: list[Any] = [
        engine_made.reply(),
        said(renderer, start, "2+2", end, out, "4", out_end, "4. ", start, "1+1", end, out, "2", out_end, "2"),
        said(renderer, start, "2+2", "so it is 4"),  # never closed
        said(renderer, start, "open('x')", end, "?"),  # nothing to calculate
        said(renderer, start, "2+2", end, out, "5", out_end, "5"),  # a result of its own making
        said(renderer, "4", out_end),  # a tool token where none belongs
        said(renderer, start, "2+", start, "2+2", end, out, "4", out_end, "4"),  # one opened within another
        said(renderer, "4"),
    ]
    found = check_replies(replies, renderer)
    assert found.tool_calls == {"calls": 8, "well_formed": 6, "answered": 4}
    assert faults(found) == {"tool_calls": (2, 3, 4, 5, 6), "empty": (2,)}
    speech = ReplyDecoder(renderer)
    assert [tool_calls(r.ids, speech)[:3] for r in replies[:3]] == [(1, 1, 1), (2, 2, 2), (1, 0, 0)]


def test_lengths_are_counted_in_doubling_bins() -> None:
    found = lengths([0, 1, 1, 5, 8, 96])
    assert (found["edges"], found["counts"]) == ([0, 1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 0, 1, 1, 0, 0, 1])
    assert (found["mean"], found["median"], found["p90"], found["max"]) == (18.5, 3.0, 52.0, 96)
    assert lengths([])["counts"] == [0]


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_each_reply_is_in_one_bin(generated: list[int]) -> None:
    assert sum(lengths(generated)["counts"]) == len(generated)


def test_no_replies_have_no_rates(renderer: Any) -> None:
    data = check_replies([], renderer).to_json()
    assert data["n"] == 0 and data["stop_rate"] is data["distinct_1"] is None


# ---- what the engine says


def test_replies_of_a_real_model(assistant: Any) -> None:
    """A random base: it runs to the limit, leaks control tokens and says bytes that are no characters."""
    texts = ["hi", "What is the answer?", "a cat", "1 2 3", "Hello!", "The moon"]
    requests = [
        GenerationRequest(prompt_ids=prompt(assistant, t), max_new_tokens=60, temperature=1.0, seed=i)
        for i, t in enumerate(texts * 4)
    ]
    replies = assistant.engine.generate(requests)
    found = check_replies(replies, assistant.renderer)
    stops = set(assistant.renderer.stop_ids())
    tools = set(assistant.renderer.python_ids())
    control = set(assistant.renderer.special.values()) - stops - tools
    assert found.replies["limit"] == tuple(i for i, r in enumerate(replies) if r.ids[-1] not in stops) != ()
    assert set(found.replies["stop"]) | set(found.replies["limit"]) == set(range(24))
    assert found.replies["role_leak"] == tuple(i for i, r in enumerate(replies) if control & set(r.ids)) != ()
    user = assistant.renderer.special["<|user_start|>"]
    assert found.replies["self_turn"] == tuple(i for i, r in enumerate(replies) if user in r.ids) != ()
    assert found.replies["invalid_utf8"] != ()
    for i in found.replies["invalid_utf8"]:
        assert "\ufffd" in "".join(p.text for p in replies[i].parts)
    assert found.tool_calls is not None
    assert found.tool_calls["calls"] == sum(r.ids.count(assistant.renderer.python_ids()[0]) for r in replies)
    assert found.length["max"] == max(r.n_generated for r in replies)
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_greedy_replies_of_a_random_model_loop(assistant: Any) -> None:
    request = GenerationRequest(
        prompt_ids=prompt(assistant, "hi"), max_new_tokens=120, stop_ids=frozenset(), use_python=False
    )
    (reply,) = assistant.engine.generate([request])
    assert len(set(reply.ids[-24:])) == 1  # the likeliest token again and again
    found = check_replies([reply], assistant.renderer)
    assert found.replies["looping"] == (0,) and found.faults_of(0) == ["did not stop", "looping"]


def test_a_row_is_looked_at_as_its_reply(assistant: Any) -> None:
    requests = [
        GenerationRequest(prompt_ids=prompt(assistant, "hi"), max_new_tokens=40, temperature=1.0, seed=s)
        for s in (0, 1)
    ]
    replies = assistant.engine.generate(requests)
    shared = {"question": "hi", "answer": None, "score": 0.0, "prompt_sha256": ""}
    same = ("finish_reason", "n_prompt", "n_generated", "seconds", "ids")
    rows = [EvalRow(id=r.text, reply=r.text, **shared, **{k: getattr(r, k) for k in same}) for r in replies]
    assert check_replies(rows, assistant.renderer) == check_replies(replies, assistant.renderer)
