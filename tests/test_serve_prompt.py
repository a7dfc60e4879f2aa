"""What a chat's prompt is made of beside its messages, beside transformers: the template's arguments, a message that is
continued, conversations that the format cannot order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bigrams import bigrams, write_checkpoint
from helpers.outside import outside, unpack_tokenizer
from helpers.serving import ASK, ask, local, refusal
from helpers.tokenizers import byte_level
from sftflow.chat.schema import Conversation, Message, Part, parse_row
from sftflow.checkpoint import Assistant, load_assistant
from sftflow.serving.joining import in_turns, joined_ways
from sftflow.serving.prompt import read_messages

CHAT, RENDER = "/v1/chat/completions", "/v1/render"
SYSTEM, TOLD = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Now in French."}
HI, YO, MORE = (
    {"role": role, "content": text} for role, text in (("user", "Hi."), ("assistant", "Yo."), ("user", "?"))
)


def rendered(http: TestClient, **fields: Any) -> list[int]:
    got = http.post(RENDER, json={"model": "tiny", **fields})
    assert got.status_code == 200, got.text
    return [token["id"] for token in got.json()["tokens"]]


def text(http: TestClient, messages: Any, **fields: Any) -> str:
    got = http.post(RENDER, json={"model": "tiny", "messages": messages, **fields})
    assert got.status_code == 200, got.text
    return "".join(token["text"] for token in got.json()["tokens"])


@pytest.fixture(scope="module")
def http(assistant: Assistant) -> TestClient:
    return local(assistant)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """The real tokenizer, cut, and the real template."""
    source, template = (
        outside("fixtures", "tokenizers", "hf_qwen3"),
        outside("fixtures", "chat_templates", "llamacpp", "Qwen-Qwen3-0.6B.jinja"),
    )
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(unpack_tokenizer(source, folder / "tokenizer", 600))
    tokenizer.chat_template = template.read_text()
    return load_assistant(str(write_checkpoint(folder / "model", bigrams(len(tokenizer), [0, 1]), tokenizer)))


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("place", ["chat_template_kwargs", "enable_thinking"])
def test_the_prompt_has_the_templates_arguments(qwen3: Assistant, thinking: bool | None, place: str) -> None:
    http = local(qwen3)
    given = thinking if place == "enable_thinking" else {} if thinking is None else {"enable_thinking": thinking}
    wanted = qwen3.tokenizer.apply_chat_template(
        [SYSTEM, HI], add_generation_prompt=True, **({} if thinking is None else {"enable_thinking": thinking})
    )
    assert rendered(http, messages=[SYSTEM, HI], **{place: given}) == wanted["input_ids"]
    used = http.post(CHAT, json=ask(messages=[SYSTEM, HI], max_tokens=1, **{place: given})).json()["usage"]
    assert used["prompt_tokens"] == len(wanted["input_ids"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs.colour"),
        ({"chat_template_kwargs": {"thinking": False}}, "chat_template_kwargs.thinking"),  # its switch has another name
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ({"chat_template_kwargs": {"enable_thinking": "<|im_end|>"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, "enable_thinking"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "reasoning_effort"),
    ],
)
def test_an_argument_that_would_change_nothing_or_too_much_is_refused(
    qwen3: Assistant, fields: dict[str, Any], param: str
) -> None:
    for path in (CHAT, RENDER):
        refusal(local(qwen3).post(path, json=ask(**fields)), 400, param=param)


def test_whether_a_model_thinks_may_be_asked_of_one_that_does_not(http: TestClient) -> None:
    assert rendered(http, messages=ASK, enable_thinking=False) == rendered(http, messages=ASK)
    assert rendered(http, messages=ASK, chat_template_kwargs={"thinking": False}) == rendered(http, messages=ASK)
    assert rendered(http, messages=ASK, reasoning_effort="none") == rendered(http, messages=ASK)
    refusal(http.post(CHAT, json=ask(enable_thinking=True)), 400, param="enable_thinking")


# ---- the last message is continued


@pytest.mark.parametrize(
    "messages",
    [
        [HI, {"role": "assistant", "content": "The answer"}],
        [HI, {"role": "assistant", "content": "The answer is "}],
        [SYSTEM, HI, YO, MORE, {"role": "assistant", "content": "It is", "reasoning_content": "Hm."}],
        [HI, {"role": "assistant", "content": "<think>\nWell"}],
    ],
)
def test_a_message_is_continued_as_transformers_does(qwen3: Assistant, messages: Any) -> None:
    wanted = qwen3.tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    ids = rendered(local(qwen3), messages=messages, **fields)
    assert qwen3.tokenizer.decode(ids) == wanted
    # The reply's beginning is encoded apart, as in training.
    told = [{**m, "weight": 0} if m in (YO,) else m for m in messages]
    whole = qwen3.renderer.render(parse_row({"messages": told}, "x")).ids.tolist()
    assert ids == whole[: len(ids)] or messages[-1]["content"].endswith(" ")


def test_a_continued_reply_goes_on_in_the_own_format(http: TestClient, assistant: Assistant) -> None:
    begun = [*ASK, {"role": "assistant", "content": "a token is <|assistant_end|>"}]
    ids = rendered(http, messages=begun, continue_final_message=True)
    start = assistant.renderer.render(parse_row({"messages": ASK}, "x"), add_generation_prompt=True).ids.tolist()
    assert ids == start + assistant.renderer.encode_plain("a token is <|assistant_end|>")
    got = http.post(CHAT, json=ask(messages=begun, continue_final_message=True, max_tokens=3, temperature=0)).json()
    plain = {"model": "tiny", "prompt": ids, "max_tokens": 3, "temperature": 0}
    assert (
        got["choices"][0]["message"]["content"] == http.post("/v1/completions", json=plain).json()["choices"][0]["text"]
    )


def test_what_a_template_would_cut_out_of_a_message_is_not_continued(tmp_path: Path) -> None:
    tokenizer = byte_level(special=("<|head|>", "<|halt|>"))
    tokenizer.chat_template = TURN.replace("m.content", "m.content.split('</think>')[-1].strip()").join(
        ("{% for m in messages %}", ASKS)
    )
    http = local(load_assistant(str(write_checkpoint(tmp_path, bigrams(len(tokenizer), [0, 1]), tokenizer))))
    begun = {"role": "assistant", "content": "Yes, \n"}
    assert text(http, [HI, begun], continue_final_message=True).endswith("<|head|>assistant:Yes,")
    body = ask(messages=[HI, {**begun, "content": "<think>Hm.</think>Yes"}], continue_final_message=True)
    refusal(http.post(CHAT, json=body), 400, param="messages[1]")


CALLS = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        (ASK, {}),
        ([*ASK, CALLS], {}),
        ([*ASK, {"role": "assistant", "content": " "}], {}),
        ([*ASK, {"role": "assistant", "content": "x"}], {"add_generation_prompt": True}),
    ],
)
def test_what_cannot_be_continued(http: TestClient, messages: Any, fields: Any) -> None:
    for path in (CHAT, RENDER):
        body = ask(messages=messages, continue_final_message=True, **fields)
        refusal(http.post(path, json=body), 400, param="continue_final_message")


def test_messages_without_a_prompt_can_be_looked_at(http: TestClient) -> None:
    shown = text(http, [*ASK, YO], add_generation_prompt=False)
    assert shown.endswith("<|assistant_start|>Yo.<|assistant_end|>")


# ---- what ends a reply


def test_further_ends_by_their_ids(http: TestClient) -> None:
    whole = http.post(CHAT, json=ask(max_tokens=6, logprobs=True)).json()["choices"][0]
    fifth = local_ids(http, whole)[4]
    for path, body in ((CHAT, ask(max_tokens=6)), ("/v1/completions", {**ask(max_tokens=6), "prompt": prompt(http)})):
        full = http.post(path, json=body).json()["choices"][0]
        cut = http.post(path, json={**body, "stop_token_ids": [fifth]}).json()["choices"][0]
        assert (cut["finish_reason"], full["finish_reason"]) == ("stop", "length")
        shown, said = (c.get("text") or c["message"]["content"] for c in (cut, full))
        assert said.startswith(shown) and len(shown) < len(said)


def local_ids(http: TestClient, choice: Any) -> list[int]:
    table = http.app.state.serving.models["tiny"].table  # type: ignore[attr-defined]
    ids = {bytes(value): key for key, value in table.items()}
    return [ids[bytes(t["bytes"])] for t in choice["logprobs"]["content"]]


def prompt(http: TestClient) -> list[int]:
    return rendered(http, messages=ASK)


# ---- what the format cannot order

NAMED = {"role": "user", "content": "Hello.", "name": "Ann"}
THOUGHT = {"role": "assistant", "content": "Yo.", "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("messages", "same_as"),
    [
        ([HI, MORE], [{"role": "user", "content": "Hi.\n\n?"}]),
        ([HI, YO, YO, MORE], [HI, {"role": "assistant", "content": "Yo.\n\nYo."}, MORE]),
        ([SYSTEM, TOLD, HI], [{"role": "system", "content": "Be brief.\n\nNow in French."}, HI]),
        ([SYSTEM, HI, TOLD], [SYSTEM, {"role": "user", "content": "Hi.\n\nNow in French."}]),
        ([HI, YO, TOLD, MORE], [HI, YO, {"role": "user", "content": "Now in French.\n\n?"}]),
        ([HI, YO, {**TOLD, "role": "developer"}], [HI, YO, {"role": "user", "content": "Now in French."}]),
        ([SYSTEM], [{"role": "user", "content": "Be brief."}]),
        ([YO, HI], [{"role": "user", "content": ""}, YO, HI]),
        ([SYSTEM, YO, HI], [{"role": "user", "content": "Be brief."}, YO, HI]),
        ([HI, THOUGHT, MORE], [HI, {"role": "assistant", "content": "Hm.\n\nYo."}, MORE]),
        ([HI, {"role": "assistant", "content": ""}, YO, MORE], [HI, YO, MORE]),
        ([HI, {"role": "assistant", "content": None}, MORE], [HI, {"role": "assistant", "content": ""}, MORE]),
        ([HI, NAMED], [{"role": "user", "content": "Hi.\n\nAnn: Hello."}]),
    ],
)
def test_what_the_format_cannot_order_is_joined(http: TestClient, messages: Any, same_as: Any) -> None:
    assert text(http, messages) == text(http, same_as)
    assert http.post(CHAT, json=ask(messages=messages, max_tokens=1)).status_code == 200


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["system", "developer", "user", "assistant"]), min_size=1, max_size=8), st.booleans())
def test_any_order_becomes_turns_and_nothing_is_lost(roles: list[str], thinks: bool) -> None:
    said = [Message(role, (Part("text", f"zq{i}"),)) for i, role in enumerate(roles)]
    said = [
        replace(m, reasoning_content=f"zr{i}") if thinks and m.role == "assistant" else m for i, m in enumerate(said)
    ]
    *_, turns = [said, *(way.messages for way in joined_ways(Conversation(tuple(said))))]
    least = in_turns(
        [replace(m, role="system") if m.role == "developer" else m for m in said], system=False, reasoning=False
    )
    assert list(turns) == least
    assert [m.role for m in least] == [("user", "assistant")[i % 2] for i in range(len(least))]
    written = "".join(m.text for m in least)
    for i, message in enumerate(said):
        assert written.count(f"zq{i}") == 1 and written.count(f"zr{i}") == bool(message.reasoning_content)
        assert written.index(f"zq{i}") >= written.index(f"zq{max(0, i - 1)}")  # in order


def test_identities_of_calls_from_elsewhere_are_made_anew_where_the_format_refuses_them() -> None:
    def history(identity: str) -> Conversation:
        called = {"id": identity, "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": identity, "content": "noon"}
        return read_messages([*ASK, {"role": "assistant", "tool_calls": [called]}, result, HI])

    (way,) = joined_ways(history("call_abcdefghijklmnop"))
    (call,), result = way.messages[1].tool_calls, way.messages[2]
    assert call["id"] == result.tool_call_id and len(call["id"]) == 9 and call["id"].isalnum()
    assert list(joined_ways(history("abcdefgh1"))) == []


def test_what_is_too_long_once_joined_is_said_to_be_too_long(http: TestClient) -> None:
    long = {"role": "user", "content": "the cat " * 300}
    refusal(http.post(CHAT, json=ask(messages=[long, long])), 400, code="context_length_exceeded")


def test_a_calculators_result_is_not_continued(http: TestClient) -> None:
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
    ]
    begun = [*ASK, {"role": "assistant", "content": parts}]
    refusal(http.post(CHAT, json=ask(messages=begun, continue_final_message=True)), 400, param="continue_final_message")


TURN = "<|head|>{{ m.role }}:{{ m.content }}<|halt|>"
ASKS = "{% endfor %}{% if add_generation_prompt %}<|head|>assistant:{% endif %}"
STRICT = (
    "{% for m in messages %}{% if m.role != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate, and there is no system role') }}{% endif %}" + TURN + ASKS
)
MUTE = "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + TURN + "{% endif %}" + ASKS


@pytest.mark.parametrize(
    ("template", "messages", "shown"),
    [
        (STRICT, [SYSTEM, HI, YO, MORE], "user:Be brief.\n\nHi.|assistant:Yo.|user:?|assistant:"),
        (STRICT, [HI, TOLD], "user:Hi.\n\nNow in French.|assistant:"),
        (MUTE, [HI, MORE], "user:Hi.|user:?|assistant:"),  # it renders as it stands, and stays so
        (MUTE, [SYSTEM, HI, TOLD], "system:Be brief.|user:Hi.\n\nNow in French.|assistant:"),  # else left out
    ],
)
def test_other_formats(tmp_path: Path, template: str, messages: Any, shown: str) -> None:
    tokenizer = byte_level(special=("<|head|>", "<|halt|>"))
    tokenizer.chat_template = template
    model = load_assistant(str(write_checkpoint(tmp_path, bigrams(len(tokenizer), [0, 1]), tokenizer)))
    assert text(local(model), messages).replace("<|head|>", "").replace("<|halt|>", "|") == shown


def test_how_much_to_think_is_told_where_the_template_asks(tmp_path: Path) -> None:
    tokenizer = byte_level(special=("<|head|>", "<|halt|>"))
    effort = "<|head|>effort:{{ reasoning_effort | default('medium') }}<|halt|>"
    tokenizer.chat_template = effort + "{% for m in messages %}" + TURN + ASKS
    http = local(load_assistant(str(write_checkpoint(tmp_path, bigrams(len(tokenizer), [0, 1]), tokenizer))))
    for fields in ({"reasoning_effort": "low"}, {"chat_template_kwargs": {"reasoning_effort": "low"}}):
        assert text(http, [HI], **fields) == text(http, [HI]).replace("medium", "low")
    refusal(http.post(CHAT, json=ask(reasoning_effort=3)), 400, param="reasoning_effort")


def test_what_has_no_place_at_all_is_still_refused(http: TestClient) -> None:
    result = {"role": "tool", "content": "sunny", "tool_call_id": "x"}
    for messages in ([HI, CALLS, result], [HI, YO, result], [HI, HI, YO]):
        error = refusal(http.post(CHAT, json=ask(messages=messages)), 400)
        assert ("continue_final_message: true" in error["message"]) == (messages[-1] == YO)
