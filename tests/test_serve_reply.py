"""What a chat's reply holds: thoughts, words, calls, and the log-probabilities of just these, whole and streamed.

The replies are written by the tests: their tokens go through the engine's own bookkeeping as if a model had drawn them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bigrams import bigrams, write_checkpoint
from helpers.outside import outside, unpack_tokenizer
from helpers.serving import local, running
from helpers.templates import CHATML
from helpers.thoughts import BRACKETS, CALLING, CHANNELS, CLOSED, SPECIAL
from helpers.tokenizers import byte_level, sentencepiece
from sftflow.checkpoint import Assistant, load_assistant
from sftflow.generation.request import TokenLogprob
from sftflow.generation.sequence import ReplySequence
from sftflow.serving import api
from sftflow.serving.chat import chat_response
from sftflow.serving.completions import completion_response
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.responses import ResponseShape
from sftflow.serving.schemas import ChatBody, CompletionBody

ASK: Any = [{"role": "user", "content": "Hi."}]
BEGINS = "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
THINKS = CHATML.replace("'\n' + (m.content or '') -}}", "'\n' }}" + BEGINS + "{{ m.content or '' -}}").replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, assistant: Assistant) -> dict[str, ServedModel]:
    def made(name: str, template: str, maker: Any = byte_level) -> ServedModel:
        tokenizer = maker(special=("<|im_start|>", "<|im_end|>", *SPECIAL), plain=("<think>", "</think>"))
        tokenizer.chat_template = template
        directory = tmp_path_factory.mktemp(name) / name
        return ServedModel(
            name, load_assistant(str(write_checkpoint(directory, bigrams(len(tokenizer), [0, 1]), tokenizer)))
        )

    return {
        "calculator": ServedModel("calculator", assistant),
        "calls": made("calls", CHATML),
        "spaces": made("spaces", CHATML, sentencepiece),
        "thinks": made("thinks", THINKS),
        "channels": made("channels", CHANNELS),
        "brackets": made("brackets", BRACKETS),
        "closed": made("closed", CLOSED),
        "calling": made("calling", CALLING),
    }


def replied(model: ServedModel, text: str, *, streamed: bool, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """(the choice, the chunks) of a reply with this text, in which strings of control tokens are these tokens."""
    body = ChatBody.read({"model": "m", "messages": ASK, "logprobs": True, **fields})
    return drawn(model, chat_response(model, body), text, streamed=streamed)


def drawn(model: ServedModel, shape: ResponseShape, text: str, *, streamed: bool) -> tuple[dict[str, Any], list[Any]]:
    assistant = model.assistant
    pieces = []
    at = 0
    for match in assistant.renderer.special_re.finditer(text):
        pieces += [
            *assistant.renderer.encode_plain(text[at : match.start()]),
            assistant.renderer.special[match.group()],
        ]
        at = match.end()
    tokens = [*pieces, *assistant.renderer.encode_plain(text[at:])]
    sequence = ReplySequence(
        shape.requests[0], assistant.engine.reply_decoder, room=len(tokens) + 99, streamed=streamed
    )
    choice, chunks = shape.choices[0], []
    while not sequence.over:
        token = sequence.forced.popleft() if sequence.forced else tokens.pop(0)
        sequence.logprobs.append(TokenLogprob(token, -1.0, ((token, -1.0),)))
        if not tokens and not sequence.forced:
            sequence.room = len(sequence.ids) + 1
        sequence.accept(token)
        delta = sequence.take()
        if streamed or delta.reply is not None:
            chunks += choice.feed(delta)
    return choice.whole(chunks), chunks


def told(choice: dict[str, Any], kind: str = "content") -> str:
    """The text that the entries of this kind are."""
    return b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"].get(kind, [])).decode("utf-8", "replace")


FINAL = "<|channel|>final<|message|>"
PYTHON = "It is <|python_start|>6*7<|python_end|> indeed 🙂.<|assistant_end|>"
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("calculator", PYTHON, {}, {"content": "It is  indeed 🙂."}),
    ("calculator", "It is <|python_start|>6*7", {}, {"content": "It is "}),  # unfinished
    ("calculator", "<|python_start|>1/0<|python_end|>?", {}, {"content": "?"}),  # without a value
    ("calculator", "the cat sat on", {"stop": "at s"}, {"content": "the c"}),  # inside a token, or over several
    ("calculator", "한🙂é", {"stop": "🙂"}, {"content": "한"}),
    ("calculator", "<think>no</think>", {}, {"content": "<think>no</think>"}),  # a format without thoughts
    ("spaces", "Hello you. é<|im_end|>", {}, {"content": "Hello you. é"}),
    ("calls", f"Well. {CALL}<|im_end|>", {"tools": [TOOL]}, {"content": "Well.", "tool_calls": f" {CALL}"}),
    ("calls", f"{CALL}", {"tools": [TOOL]}, {"content": None, "tool_calls": CALL}),
    ("calls", f"{CALL} then {CALL[:-20]}", {"tools": [TOOL]},
     {"content": f"then {CALL[:-20]}", "tool_calls": f"{CALL} "}),
    ("thinks", "Hm 🙂.\n</think>\n\nYes.<|im_end|>", {}, {"reasoning_content": "Hm 🙂.", "content": "Yes."}),
    ("thinks", "Hm", {}, {"reasoning_content": "Hm", "content": ""}),
    ("thinks", "Hm</think>", {}, {"reasoning_content": "Hm", "content": ""}),
    ("thinks", "</think>\n\nYes.", {}, {"reasoning_content": None, "content": "Yes."}),
    ("thinks", "Hm so</think>Yes", {"stop": "</think>"}, {"reasoning_content": "Hm so", "content": ""}),
    ("thinks", "Hm</think>Yes or no", {"stop": " or"}, {"reasoning_content": "Hm", "content": "Yes"}),
    ("thinks", f"Hm</think>So {CALL}", {"tools": [TOOL]},
     {"reasoning_content": "Hm", "content": "So", "tool_calls": f" {CALL}"}),
    ("channels", f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{FINAL}Yes<|return|>", {},
     {"reasoning_content": "Hm", "content": "Yes"}),
    ("channels", f"{FINAL}Yes<|return|>", {}, {"reasoning_content": None, "content": "Yes"}),
    ("channels", "<|channel|>analysis<|message|>Hm", {}, {"reasoning_content": "Hm", "content": ""}),
    ("brackets", "<|channel>thought\nHm\n<channel|>Yes<turn|>", {}, {"reasoning_content": "Hm", "content": "Yes"}),
    ("closed", "<|channel>thought\nHm<channel|>Yes<turn|>", {"enable_thinking": True},
     {"reasoning_content": "Hm", "content": "Yes"}),
    ("closed", "Yes<turn|>", {}, {"reasoning_content": None, "content": "Yes"}),
    ("calling", "<|START_THINKING|>Hm<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|><|end|>", {},
     {"reasoning_content": "Hm", "content": "Yes"}),
    ("brackets", "<|channel>thought\nHm\n<channel|>Yes", {"stop": "m\nY"},
     {"reasoning_content": "Hm", "content": "Yes"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "fields", "wanted"), CASES)
def test_a_reply_and_its_tokens(
    models: dict[str, ServedModel], name: str, text: str, fields: dict[str, Any], wanted: dict[str, Any]
) -> None:
    whole, _ = replied(models[name], text, streamed=False, **fields)
    streamed, chunks = replied(models[name], text, streamed=True, **fields)
    message, calls = whole["message"], wanted.get("tool_calls", "")
    assert {k: message[k] for k in wanted if k != "tool_calls"} == {
        k: v for k, v in wanted.items() if k != "tool_calls"
    }
    assert bool(message.get("tool_calls")) == bool(calls)
    assert ("reasoning_content" in message) == (models[name].thoughts is not None)
    for kind, shown in {"content": "", "reasoning_content": "", "tool_calls": calls, **wanted}.items():
        assert told(whole, kind) == (shown or ""), kind
    for one in (streamed, whole):
        for call in one["message"].get("tool_calls", []):
            del call["id"]
    assert streamed == whole
    if name != "spaces" and "🙂" not in text and "한" not in text:  # no character lies across tokens
        assert "".join(t["token"] for t in whole["logprobs"]["content"]) == (message["content"] or "")
    assert all("<" not in c["delta"].get("reasoning_content", "") for c in chunks)  # never half a tag


def test_a_forced_token_is_no_entry(models: dict[str, ServedModel]) -> None:
    """A calculator's result has probabilities that nothing was drawn by."""
    whole, _ = replied(models["calculator"], "<|python_start|>6*7<|python_end|>!", streamed=False)
    assert [t["token"] for t in whole["logprobs"]["content"]] == ["!"]


@pytest.mark.parametrize("stop", [None, "deed"])
@pytest.mark.parametrize("streamed", [True, False])
def test_the_offsets_of_a_plain_completion_are_places_of_its_text(
    models: dict[str, ServedModel], streamed: bool, stop: str | None
) -> None:
    body = CompletionBody.read({"model": "m", "prompt": "the cat", "logprobs": 0, "stop": stop, "max_tokens": 99})
    shape = completion_response(models["calculator"], body)
    choice, _ = drawn(models["calculator"], shape, PYTHON.replace("🙂", ""), streamed=streamed)
    text, told = choice["text"], choice["logprobs"]
    assert text == ("It is  in" if stop else "It is  indeed .")
    ends = [*told["text_offset"][1:], len(text)]
    control = ("<|python_start|>", "<|python_end|>", "<|assistant_end|>")
    for token, start, end in zip(told["tokens"], told["text_offset"], ends, strict=True):
        assert 0 <= start <= end <= len(text)
        assert text[start:end] in (token, "") or stop
        assert start == end if token in control else start < end or token in "6*7" or stop


PARTS = ["<think>", "</think>", "\n", " ", "the cat", "🙂", "한", "é", ".", CALL, "<tool", "<|im_end|>", "at"]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["calls", "thinks", "spaces"]), st.lists(st.sampled_from(PARTS), min_size=1, max_size=8),
    st.sampled_from([None, "at", "\n", "🙂", "k>"]), st.booleans(),
)  # fmt: skip
def test_tokens_are_the_text_whatever_it_is(
    models: dict[str, ServedModel], name: str, parts: Sequence[str], stop: str | None, tools: bool
) -> None:
    model, fields = models[name], {"stop": stop, "tools": [TOOL] if tools else None}
    whole, _ = replied(model, "".join(parts), streamed=False, **fields)
    streamed, _ = replied(model, "".join(parts), streamed=True, **fields)
    for one in (whole, streamed):
        for kind in ("content", "reasoning_content"):
            blocks = (one["message"].get(kind) or "").replace("\n\n", "") if kind == "reasoning_content" else None
            text = told(one, kind)
            assert text == (one["message"].get(kind) or "") or text.replace("\n\n", "") == blocks
        one["message"].pop("tool_calls", None)
    assert streamed == whole


# ---- a real tokenizer, a real template, a real client


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """It always says the same."""
    from transformers import AutoTokenizer

    source = outside("fixtures", "tokenizers", "hf_qwen3")
    template = outside("fixtures", "chat_templates", "llamacpp", "Qwen-Qwen3-0.6B.jinja")
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(unpack_tokenizer(source, folder / "tokenizer", 600))
    tokenizer.chat_template = template.read_text()
    said = tokenizer("<think>\nHm, so</think>\n\nYes.<|im_end|>").input_ids
    for opening in ("\n", "\n\n"):  # the prompt's last token, with thoughts and without
        assert len(tokenizer(opening).input_ids) == 1
    assert len(set(said)) == len(said)
    chain = [*tokenizer("\n").input_ids, *said]
    model = bigrams(len(tokenizer), [*chain[:1], chain[1]], [chain[1], *chain[3:]])
    return load_assistant(str(write_checkpoint(folder / "model", model, tokenizer)))


def test_reasoning_through_the_openai_client(qwen3: Assistant) -> None:
    with running(api.make_app({"m": qwen3})) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20)
        ask: Any = {"model": "m", "messages": ASK, "max_tokens": 30, "logprobs": True}
        choice = client.chat.completions.create(**ask).choices[0]
        assert (choice.message.reasoning_content, choice.message.content) == ("Hm, so", "Yes.")  # type: ignore[attr-defined]
        deltas = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm, so"
        assert "".join(d.content or "" for d in deltas) == "Yes."
        quiet = client.chat.completions.create(**ask, extra_body={"enable_thinking": False}).choices[0].message
        assert (quiet.reasoning_content, quiet.content) == (None, "Yes.")  # type: ignore[attr-defined]
        short = client.chat.completions.create(**{**ask, "max_tokens": 3}).choices[0]
        assert (short.finish_reason, short.message.content) == ("length", "")
        assert short.message.reasoning_content in ("Hm", "Hm,")  # type: ignore[attr-defined]


def test_thoughts_that_are_continued_go_on(qwen3: Assistant) -> None:
    http = local(qwen3)
    parts = [{"type": "text", "text": "<think>\nHm"}]
    for begun, thought, said in ((parts[0]["text"], ", so", "Yes."), (parts, ", so", "Yes."), ("Yes", None, ".")):
        body = {"model": "tiny", "messages": [*ASK, {"role": "assistant", "content": begun}], "max_tokens": 20}
        message = http.post("/v1/chat/completions", json={**body, "continue_final_message": True}).json()["choices"][0]
        assert (message["message"]["reasoning_content"], message["message"]["content"]) == (thought, said)


def test_thoughts_sent_back_are_where_the_template_has_them(qwen3: Assistant) -> None:
    http = local(qwen3)
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm, so"}
    messages = [*ASK, said, {"role": "user", "content": "?"}]
    body = {"model": "tiny", "messages": messages}
    ids = [token["id"] for token in http.post("/v1/render", json=body).json()["tokens"]]
    assert ids == qwen3.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    kept = {"role": "assistant", "content": "Ye", "reasoning": "Hm, so"}
    got = http.post("/v1/render", json={**body, "messages": [*ASK, kept], "continue_final_message": True}).json()[
        "tokens"
    ]
    assert "".join(t["text"] for t in got).endswith("<think>\nHm, so\n</think>\n\nYe")
