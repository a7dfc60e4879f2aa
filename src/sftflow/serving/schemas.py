"""The fields of the routes' bodies. Anything wrong is an ApiError 400 that names the field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sftflow.serving.errors import ApiError, wrong

MAX_CHOICES = 64
"""replies that one request may ask for: prompts times n"""
MAX_LOGPROBS = 20
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]  # an empty stop text would end every reply


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class ToolName(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str = Field(min_length=1)


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: ToolName


class ModelBody(BaseModel):
    """What every route reads. Unknown fields are nobody's business; null means the same as left out."""

    model_config = ConfigDict(strict=True, extra="ignore")
    # Known fields that we do not do: each with the values that ask for nothing.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """Check a JSON object. Raises ApiError 400 naming the field."""
        try:
            body = cls.model_validate(value)
        except ValidationError as error:
            raise _told(error) from None
        for field, nothing in cls.unsupported.items():
            if not any(_same(value.get(field), v) for v in (None, *nothing)):
                raise ApiError(400, f"{field} is not supported here", param=field, code="unsupported_parameter")
        return body


def _told(error: ValidationError) -> ApiError:
    """Of the first field that is wrong; where it may be of several kinds, of the one that came furthest."""
    errors = error.errors(include_url=False, include_input=False)
    field = errors[0]["loc"][0]
    tried = [e for e in errors if e["loc"][0] == field]
    one = max(tried, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    inside = ".".join(map(str, one["loc"][2:])) if len(tried) > 1 else ""
    return wrong(str(field), f"{f'{inside}: ' if inside else ''}{one['msg']}")


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it, where true is not 1 and false is not 0."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class PromptBody(ModelBody):
    """What makes a chat's prompt: messages and tools, the template's own arguments, and whether the last message is
    continued. `prompt.chat_prompt` reads it."""

    messages: list[Any] = Field(min_length=1)
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def offered(self) -> list[Any]:
        """The tools that the model is told of."""
        return self.tools or []


class RenderBody(PromptBody):
    """POST /v1/render."""


class TokenizeChatBody(PromptBody):
    """POST /tokenize, of a chat. The template writes the control tokens; more would be another prompt."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"add_special_tokens": (False,), "chat_template": ()}

    return_token_strs: bool | None = None


class TokenizeTextBody(ModelBody):
    """POST /tokenize, of a text. add_special_tokens: those that the tokenizer itself writes; by default it does."""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(ModelBody):
    """POST /detokenize."""

    tokens: list[int]


class SamplingBody(ModelBody):
    """How replies are drawn, how many, and in which form: what chat and plain completions have in common. Names that
    OpenAI does not have (top_k, min_p, repetition_penalty, ignore_eos) are vLLM's."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "logit_bias": ({},),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "min_tokens": (0,),
        "bad_words": ([],),
        "allowed_token_ids": ([],),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": ([],),
        "guided_grammar": (),
        "prompt_logprobs": (),
        "lora": (),
    }

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(SamplingBody, PromptBody):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "verbosity": (),
        "echo": (False,),
        "include_reasoning": (True,),
        "chat_template": (),
        "documents": ([],),
    }

    max_tokens: int | None = Field(None, ge=1, lt=2**63)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def forced(self) -> str | None:
        """The tool that must be called; "": any; None: none need be."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None

    @property
    def offered(self) -> list[Any]:
        """The tools that the model is told of: with `none` it may not call any, so it is not told of them."""
        return [] if self.tool_choice == "none" else self.tools or []


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "suffix": ("",),
        "best_of": (1,),
        "prompt_embeds": (),
    }

    prompt: Any = None
    max_tokens: int | None = Field(None, ge=0, lt=2**63)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def limit(self) -> int:
        """Tokens of a reply at most: 16 where nothing is said, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens
