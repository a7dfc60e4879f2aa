"""The libraries that people put in front of a server: openai, LangChain, LiteLLM and instructor, against
`sftflow serve` as a process.

Two models: the shipped base, and a tiny one with Qwen3's own tokenizer and chat template that has learnt two
conversations by heart, one with thoughts and one with a tool call. `pip install -e '.[clients]'` installs the
libraries; without them these tests skip.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from helpers.outside import outside, unpack_tokenizer
from helpers.runs import taught
from helpers.serving import served
from sftflow.pretraining.pretrain import BaseSpec, build_model

pytestmark = pytest.mark.slow

QUESTION = "What is a token?"
THOUGHTS = "The user asks for a definition."
ANSWER = "A token is a small piece of text."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}
ASKED = {"role": "user", "content": "What is the weather in Paris?"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "sunny in Paris"}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "reasoning_content": THOUGHTS, "content": ANSWER},
        ]
    },
    {
        "tools": [WEATHER],
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "reasoning_content": "Look it up.", "tool_calls": [CALL]},
            RESULT,
            {"role": "assistant", "reasoning_content": "It says sunny.", "content": "It is sunny in Paris."},
        ],
    },
]
MODELS = ("tiny", "qwen")


class Token(BaseModel):
    """What a reply is parsed into. Closed, for a tiny model in a schema that is open adds keys without end."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["word", "piece"]
    length: int = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3's own tokenizer (its first 3,000 entries) and template, weights that know ROWS by heart."""
    folder = tmp_path_factory.mktemp("qwen")
    template = outside("fixtures", "chat_templates", "llamacpp", "Qwen-Qwen3-0.6B.jinja")
    base = unpack_tokenizer(outside("fixtures", "tokenizers", "hf_qwen3"), folder / "base", 3_000)
    (base / "chat_template.jinja").write_bytes(template.read_bytes())
    words = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    last = max([*words["model"]["vocab"].values(), *(t["id"] for t in words["added_tokens"])])
    build_model(BaseSpec(params="0.1M", context=4096, seed=3), last + 1, None).save_pretrained(base)
    return taught(base, ROWS, folder / "qwen")


@pytest.fixture(scope="module")
def qwen_address(qwen: Path) -> Iterator[str]:
    with served(str(qwen)) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def tiny_address() -> Iterator[str]:
    with served("builtin:tiny", "--name", "tiny") as address:
        yield f"{address}/v1"


@pytest.fixture(params=MODELS)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(name, address) of each model in turn."""
    return request.param, request.getfixturevalue(f"{request.param}_address")


@pytest.fixture
def client(place: tuple[str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=place[1], api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def qwen_client(qwen_address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=qwen_address, api_key="none", max_retries=0, timeout=120)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def called(message: Any) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a message of the openai client: (name, arguments)."""
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []]


def said(message: Any) -> tuple[str, str]:
    """(thoughts, text) of a message of the openai client."""
    return (message.model_extra or {}).get("reasoning_content") or "", message.content or ""


# ---- openai


def test_openai_chat_and_stream_say_the_same(place: tuple[str, str], client: openai.OpenAI) -> None:
    asked: Any = {"model": place[0], "messages": user(QUESTION), "max_tokens": 40, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == (whole.choices[0].message.content or "") and chunks[-1].usage == whole.usage


def test_openai_n_seed_and_log_probabilities(place: tuple[str, str], client: openai.OpenAI) -> None:
    asked: Any = {"model": place[0], "messages": user("Tell me a story."), "max_tokens": 12, "temperature": 1.0}
    two, again, other = (client.chat.completions.create(**asked, n=2, seed=s) for s in (7, 7, 8))
    texts = [[said(c.message) for c in r.choices] for r in (two, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 2
    told = client.chat.completions.create(**asked, seed=7, logprobs=True, top_logprobs=3)
    logprobs = told.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    thoughts = (logprobs.model_extra or {}).get("reasoning_content") or []
    tokens = [*thoughts, *(p.model_dump() for p in logprobs.content)]
    assert tokens and all(p["logprob"] <= 0 and len(p["top_logprobs"]) == 3 for p in tokens)
    assert "".join(p["token"] for p in tokens) == "".join(said(told.choices[0].message))


def test_openai_context_overflow_has_its_type_and_code(place: tuple[str, str], client: openai.OpenAI) -> None:
    for words in (6_000, 200_000):  # counted, and refused by its length alone
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=place[0], messages=user("word " * words))
        assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
        assert "This model's maximum context length is " in refused.value.message


def test_openai_reasoning_is_split_whole_and_streamed(qwen_client: openai.OpenAI) -> None:
    asked: Any = {"model": "qwen", "messages": user(QUESTION), "max_tokens": 64, "temperature": 0}
    message = qwen_client.chat.completions.create(**asked).choices[0].message
    assert message.content == ANSWER and (message.model_extra or {})["reasoning_content"] == THOUGHTS
    deltas = [c.choices[0].delta for c in qwen_client.chat.completions.create(**asked, stream=True)]
    thoughts = [(d.model_extra or {}).get("reasoning_content") or "" for d in deltas]
    assert "".join(thoughts) == THOUGHTS and "".join(d.content or "" for d in deltas) == ANSWER
    assert sum(map(bool, thoughts)) > 1  # as it comes
    # Sent back as it came, with the next question behind it.
    history = [*user(QUESTION), message.model_dump(), *user("And then?")]
    assert qwen_client.chat.completions.create(model="qwen", messages=history, max_tokens=4).choices


@pytest.mark.parametrize("extra", [{"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}])
def test_openai_thinking_can_be_switched_off(qwen_client: openai.OpenAI, extra: dict[str, Any]) -> None:
    """The prompt then has an empty block of thoughts, and nothing comes as reasoning."""
    asked: Any = {"model": "qwen", "messages": user(QUESTION), "max_tokens": 8, "temperature": 0}
    with_thoughts = qwen_client.chat.completions.create(**asked)
    without = qwen_client.chat.completions.create(**asked, extra_body=extra)
    assert without.usage is not None and with_thoughts.usage is not None
    assert without.usage.prompt_tokens > with_thoughts.usage.prompt_tokens
    assert not (without.choices[0].message.model_extra or {}).get("reasoning_content")


def test_openai_tools_in_all_four_choices(place: tuple[str, str], client: openai.OpenAI) -> None:
    name = place[0]
    if name == "tiny":  # its format cannot write calls: said by name
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=name, messages=[ASKED], tools=[WEATHER], tool_choice="required")
        assert refused.value.param == "tools"
        return
    asked: Any = {"model": name, "messages": [ASKED], "tools": [WEATHER, CLOCK], "temperature": 0, "max_tokens": 96}
    auto = client.chat.completions.create(**{**asked, "tools": [WEATHER]}, tool_choice="auto").choices[0]
    assert called(auto.message) == [("weather", {"city": "Paris"})] and auto.finish_reason == "tool_calls"
    assert client.chat.completions.create(**asked, tool_choice="none").choices[0].message.tool_calls is None
    required = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert called(required.message) and required.finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "clock"}}
    got = client.chat.completions.create(**asked, tool_choice=named, parallel_tool_calls=False).choices[0]
    assert [n for n, _ in called(got.message)] == ["clock"]
    streamed = list(client.chat.completions.create(**asked, tool_choice=named, parallel_tool_calls=False, stream=True))
    calls = [c for chunk in streamed for c in chunk.choices[0].delta.tool_calls or []]
    assert [c.function.name for c in calls if c.function and c.function.name] == ["clock"]
    result = [ASKED, auto.message.model_dump(), {**RESULT, "tool_call_id": auto.message.tool_calls[0].id}]
    told = client.chat.completions.create(model=name, messages=result, tools=[WEATHER], temperature=0, max_tokens=64)
    assert told.choices[0].message.content == "It is sunny in Paris."


def test_openai_parses_a_schema(place: tuple[str, str], client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(
        model=place[0], messages=user(QUESTION), response_format=Token, temperature=0, max_tokens=200
    )
    assert isinstance(got.choices[0].message.parsed, Token) and got.choices[0].finish_reason == "stop"


def test_openai_looks_for_responses_and_is_told_where_to_go(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.create(model="tiny", input=QUESTION)
    assert refused.value.code != "model_not_found" and "/v1/chat/completions" in refused.value.message


# ---- LangChain


def chain(place: tuple[str, str], **options: Any) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai")
    settings = {"temperature": 0, "max_tokens": 64, "max_retries": 0, "timeout": 120, **options}
    return langchain_openai.ChatOpenAI(base_url=place[1], api_key="none", model=place[0], **settings)


def test_langchain_chat_and_stream(place: tuple[str, str]) -> None:
    model = chain(place)
    whole = model.invoke(QUESTION)
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == whole.content
    assert whole.usage_metadata["input_tokens"] > 0
    told = chain(place, logprobs=True, top_logprobs=2, seed=3, temperature=1).invoke(QUESTION)
    assert told.response_metadata["logprobs"]["content"]


def test_langchain_knows_context_overflow(place: tuple[str, str]) -> None:
    model = chain(place)
    from langchain_core.exceptions import ContextOverflowError

    for words in (6_000, 200_000):
        with pytest.raises(ContextOverflowError):
            model.invoke("word " * words)


def test_langchain_takes_messages_in_an_order_of_its_own(place: tuple[str, str]) -> None:
    """Agent programs send two user turns in a row, and system messages between."""
    history = [("system", "Be brief."), ("user", "Hello."), ("user", QUESTION), ("system", "Answer now.")]
    assert chain(place, max_tokens=4).invoke(history).usage_metadata["output_tokens"] > 0


def test_langchain_tools(qwen_address: str) -> None:
    model = chain(("qwen", qwen_address), max_tokens=96)
    auto = model.bind_tools([WEATHER]).invoke(ASKED["content"])
    assert [(c["name"], c["args"]) for c in auto.tool_calls] == [("weather", {"city": "Paris"})]
    for choice, names in (("required", {"weather", "clock"}), ("clock", {"clock"}), ("any", {"weather", "clock"})):
        got = model.bind_tools([WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False).invoke("Hello")
        assert len(got.tool_calls) == 1 and got.tool_calls[0]["name"] in names
    assert model.bind_tools([WEATHER], tool_choice="none").invoke("Hello").tool_calls == []


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_langchain_structured_output(place: tuple[str, str], method: str) -> None:
    if place[0] == "tiny" and method == "function_calling":
        pytest.skip("the sftflow chat format has no tool calls")
    if method == "json_mode":  # any JSON object: which keys it has is the model's affair, and when it ends, too
        bound = chain(place, max_tokens=400).bind(response_format={"type": "json_object"})
        asked = {"role": "user", "content": f"{QUESTION} Write JSON."}
        try:
            assert isinstance(json.loads(bound.invoke([asked]).content), dict)
        except openai.LengthFinishReasonError as cut:
            assert cut.completion.choices[0].message.content.lstrip().startswith("{")
        return
    model = chain(place, max_tokens=200)
    assert isinstance(model.with_structured_output(Token, method=method).invoke(QUESTION), Token)


# ---- LiteLLM


def litellm_library() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    return pytest.importorskip("litellm")


def lite(place: tuple[str, str], **options: Any) -> Any:
    litellm = litellm_library()
    settings = {"temperature": 0, "max_tokens": 64, "max_retries": 0, "timeout": 120, **options}
    settings.setdefault("messages", user(QUESTION))
    return litellm.completion(model=f"openai/{place[0]}", api_base=place[1], api_key="none", **settings)


def test_litellm_chat_and_stream(place: tuple[str, str]) -> None:
    whole = lite(place)
    streamed = "".join(c.choices[0].delta.content or "" for c in lite(place, stream=True))
    assert streamed == (whole.choices[0].message.content or "")
    two, again = (lite(place, n=2, seed=5, temperature=1.0, max_tokens=8) for _ in range(2))
    assert [c.message.content for c in two.choices] == [c.message.content for c in again.choices]
    assert lite(place, logprobs=True, top_logprobs=2).choices[0].logprobs.content


def test_litellm_knows_context_overflow(place: tuple[str, str]) -> None:
    litellm = litellm_library()
    for words in (6_000, 200_000):
        with pytest.raises(litellm.ContextWindowExceededError):
            lite(place, messages=user("word " * words))


def test_litellm_splits_reasoning(qwen_address: str) -> None:
    message = lite(("qwen", qwen_address)).choices[0].message
    assert message.reasoning_content == THOUGHTS and message.content == ANSWER
    deltas = [c.choices[0].delta for c in lite(("qwen", qwen_address), stream=True)]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == THOUGHTS


def test_litellm_tools(qwen_address: str) -> None:
    place, asked = ("qwen", qwen_address), {"messages": [ASKED], "tools": [WEATHER], "max_tokens": 96}
    assert called(lite(place, **asked, tool_choice="auto").choices[0].message) == [("weather", {"city": "Paris"})]
    assert called(lite(place, **asked, tool_choice="none").choices[0].message) == []
    assert called(lite(place, **asked, tool_choice="required").choices[0].message)
    named = {"type": "function", "function": {"name": "weather"}}
    calls = called(lite(place, **asked, tool_choice=named, parallel_tool_calls=False).choices[0].message)
    assert [name for name, _ in calls] == ["weather"]


def test_litellm_structured_output(place: tuple[str, str]) -> None:
    got = lite(place, response_format=Token, max_tokens=200)
    Token.model_validate_json(got.choices[0].message.content)


# ---- instructor


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor(place: tuple[str, str], client: openai.OpenAI, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    if place[0] == "tiny" and mode == "TOOLS":
        pytest.skip("the sftflow chat format has no tool calls")
    patched = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    asked = {"model": place[0], "messages": user(QUESTION), "temperature": 0, "max_tokens": 200}
    assert isinstance(patched.create(**asked, response_model=Token, max_retries=0), Token)
