"""What the engine is asked: messages, tools or plain prompts -> the exact ids, as in training -> requests.

All of it may take seconds for a large body, and runs in a thread.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import Conversation, parse_row
from sftflow.foundation.errors import FormatError, SftflowError
from sftflow.generation.request import GenerationRequest
from sftflow.generation.sampling import derived_seed
from sftflow.serving.errors import ApiError, wrong
from sftflow.serving.joining import joined_ways
from sftflow.serving.schemas import PromptBody, SamplingBody
from sftflow.serving.template_arguments import template_arguments

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant
    from sftflow.serving.model_entry import ServedModel

Ending = Literal["prompt", "continued", "whole"]
"""how a rendering ends: with the beginning of a reply, in the last message, or behind it"""
MOST_MESSAGES = 2_000
"""a conversation is rendered once for each of its replies, which grows with the square of their number"""
MOST_PARTS, MOST_TOOLS = 4_000, 128
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
SAMPLED = (SamplingBody.model_fields.keys() & {f.name for f in fields(GenerationRequest)}) - {"seed"}
"""fields of a body that the request to the engine has, too; the seed differs from reply to reply"""
_OF_A_FUNCTION = {
    "parameters": (dict, "a JSON schema object"),
    "description": (str, "a text"),
    "strict": (bool, "a boolean"),
}
_TOOL_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)


def chat_prompt(model: ServedModel, body: PromptBody, *, replied: bool = True) -> Rendered:
    """The exact prompt for a chat's next reply, or for going on with its last message. What the format refuses, or
    (nothing may vanish) leaves out, is joined (see `joining`).

    replied: whether a reply will follow; else the messages may also stand alone (`add_generation_prompt: false`).
    Raises ApiError 400: wrong, too long, or refused by the chat format however it is joined.
    """
    conversation = read_messages(body.messages, body.offered)
    if conversation.tools and model.calls is None:
        fact = f"the {model.assistant.renderer.format.name} chat format has no tool calls that could be read back"
        raise wrong("tools", fact, "unsupported_parameter")
    renderer = model.renderer(template_arguments(model, body))
    ends = _how_it_ends(body, conversation, replied)
    refused: ApiError | None = None
    for way in (conversation, *joined_ways(conversation)):
        try:
            return _rendered(renderer, model.context, way, ends)
        except ApiError as error:
            if error.body["error"]["code"] == "context_length_exceeded":
                raise
            refused = refused or error
    assert refused is not None
    if ends == "prompt" and conversation.messages[-1].role == "assistant":
        fact = f"{refused}; put a user turn behind it, or go on with it by continue_final_message: true"
        raise ApiError(400, fact, param="messages", code="invalid_messages")
    raise refused


def _how_it_ends(body: PromptBody, conversation: Conversation, replied: bool) -> Ending:
    """Raises ApiError 400 where the fields contradict each other or the last message."""
    place, last = "continue_final_message", conversation.messages[-1]
    if not body.continue_final_message:
        if body.add_generation_prompt is not False:
            return "prompt"
        if replied:
            fact = "false leaves the reply without its beginning; leave it out, or continue a message that has one"
            raise wrong("add_generation_prompt", f"{fact} (continue_final_message: true)")
        return "whole"
    if body.add_generation_prompt:
        raise wrong(place, "it contradicts add_generation_prompt: true")
    if last.role != "assistant":
        raise wrong(place, f"the last message is of the role {last.role}; only an assistant's can be continued")
    if last.tool_calls:
        raise wrong(place, "the last message calls tools, which ends it")
    if not last.text.strip() or last.parts[-1].kind != "text":
        raise wrong(place, "the last message does not end with text, which could be continued")
    return "continued"


def read_messages(messages: Sequence[Any], tools: Sequence[Any] = ()) -> Conversation:
    """OpenAI messages and tools in our schema. Raises ApiError 400 naming the message or the tool."""
    if len(messages) > MOST_MESSAGES:
        raise wrong("messages", f"{len(messages)} messages; at most {MOST_MESSAGES} are taken", "too_many_messages")
    n_parts = sum(len(m["content"]) for m in messages if isinstance(m, dict) and isinstance(m.get("content"), list))
    if n_parts > MOST_PARTS:
        raise wrong("messages", f"{n_parts} parts of contents; at most {MOST_PARTS} are taken", "too_many_messages")
    known = [_known_fields(m, f"messages[{i}]") for i, m in enumerate(messages)]
    row = {"messages": known, "tools": _checked_tools(tools)}
    try:
        return parse_row(row, "request")
    except SftflowError as error:
        raise _refused(error) from None


def _refused(error: SftflowError) -> ApiError:
    """A 400 in the error's own words; its place is the field. (Remedies of a format speak of rows: left out.)"""
    remedy = "" if isinstance(error, FormatError) or not error.remedy else f"; {error.remedy}"
    return wrong(error.place.removeprefix("request").lstrip(".") or "messages", error.fact + remedy, "invalid_messages")


def _known_fields(message: Any, place: str) -> Any:
    """A message with the fields that we know: clients send back what they got, with `refusal`, `annotations` and
    whatever else a server once wrote."""
    if not isinstance(message, dict):
        return message
    for field in ("function_call", "audio"):
        if message.get(field) is not None:
            raise wrong(f"{place}.{field}", "it is not supported here", "unsupported_parameter")
    if not isinstance(message.get("tool_calls"), list | None):
        raise wrong(f"{place}.tool_calls", "not a list of calls")
    out = {k: v for k, v in message.items() if k in MESSAGE_KEYS and (k == "content" or v is not None)}
    if message.get("reasoning") is not None:  # what some servers call it
        out.setdefault("reasoning_content", message["reasoning"])
    if out.get("tool_calls") == []:  # what some clients write for none
        del out["tool_calls"]
    if out.get("role") == "assistant" and out.get("content") is None and "tool_calls" not in out:
        out["content"] = ""  # it said nothing
    if out.get("content") == []:
        raise wrong(f"{place}.content", 'it has no parts; write "" for an empty message')
    if isinstance(out.get("content"), list):
        out["content"] = [
            {k: v for k, v in p.items() if k in ("type", "text")} if isinstance(p, dict) else p for p in out["content"]
        ]
    return out


def _checked_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools in the OpenAI shape. Raises ApiError 400."""
    if len(tools) > MOST_TOOLS:
        raise wrong("tools", f"{len(tools)} tools; at most {MOST_TOOLS} are taken")
    for i, tool in enumerate(tools):
        place = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise wrong(place, 'not a function tool; write {"type": "function", "function": {"name": ...}}')
        name = tool["function"].get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise wrong(f"{place}.function.name", "not a name of letters, digits, underscores and dashes")
        for key, (kind, what) in _OF_A_FUNCTION.items():
            if not isinstance(tool["function"].get(key), kind | None):
                raise wrong(f"{place}.function.{key}", f"not {what}")
    return [dict(tool) for tool in tools]


def _rendered(renderer: Renderer, context: int, conversation: Conversation, ends: Ending) -> Rendered:
    messages = conversation.messages
    # What is asked for a reply: the messages in front of the last one, where that is continued or shown.
    asked = conversation if ends == "prompt" or messages[-1].role != "assistant" else conversation.before(-1)
    unweighted = replace(conversation, messages=tuple(replace(m, weight=0) for m in messages))
    try:
        # First what is linear in the length: what does not fit is refused before anything else is done with it.
        fewest = renderer.rough_length(asked, context)[1]
        if fewest < context and asked is not conversation:
            said, text = messages[-1].text, renderer.text(conversation)  # a template may trim what is said
            fewest = max(renderer.fewest_tokens(s, context) for s in (said, said.strip(), "") if s in text)
        if fewest >= context:
            raise too_long("messages", fewest, context, at_least=True)
        for place in renderer.missing_from_prompt(asked):
            fact = f"the {renderer.format.name} chat format leaves it out"
            raise wrong(place, fact, "unsupported_parameter")
        rendered = renderer.render(
            conversation if ends == "prompt" else unweighted,
            add_generation_prompt=ends == "prompt",
            continue_final_message=ends == "continued",
        )
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply", code="invalid_json") from None
    except SftflowError as error:
        raise _refused(error) from None
    if len(rendered.ids) >= context:
        raise too_long("messages", len(rendered.ids), context)
    return rendered


def too_long(param: str, n_tokens: int, context: int, *, at_least: bool = False) -> ApiError:
    """In OpenAI's own words and code, by which clients know that they have to shorten. The code stands in the words,
    too: LangChain looks for it in an exception's text, and newer `openai` packages put nothing but the words there."""
    message = (
        f"This model's maximum context length is {context} tokens. However, your {param} resulted in "
        f"{'at least ' if at_least else ''}{n_tokens} tokens. Please reduce the length of the {param}. "
        "(context_length_exceeded)"
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def plain_prompts(value: Any) -> list[str | list[int]]:
    """The `prompt` of a plain completion: a text, a list of texts, token ids, or a list of lists of them.

    >>> plain_prompts("hi"), plain_prompts([5, 6]), plain_prompts([[5], [6]])
    (['hi'], [[5, 6]], [[5], [6]])
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", "give a text, a list of texts, token ids, or a list of lists of token ids")
    if all(isinstance(v, str) for v in value):
        return list(value)
    if all(type(v) is int for v in value):
        return [list(value)]
    if all(isinstance(v, list) and v and all(type(i) is int for i in v) for v in value):
        return [list(v) for v in value]
    raise wrong("prompt", "texts and token ids are mixed, or an id is not an integer, or a list is empty")


def prompt_ids(assistant: Assistant, prompt: str | list[int]) -> tuple[int, ...]:
    """Ids of one plain prompt: text as the base was pretrained to read it, its control-token strings as text; ids as
    they are. Raises ApiError 400, for what cannot fit before anything else is done with it."""
    context = assistant.engine.context
    fewest = assistant.renderer.fewest_tokens(prompt, context + 1) if isinstance(prompt, str) else len(prompt)
    if fewest > context:
        raise too_long("prompt", fewest, context, at_least=isinstance(prompt, str))
    if isinstance(prompt, str):
        ids = assistant.plain_ids(prompt)
    else:
        ids = known_ids(assistant, prompt, "prompt")
    if not ids:
        raise wrong("prompt", "it has no tokens")
    return ids


def known_ids(assistant: Assistant, ids: Sequence[int], field: str) -> tuple[int, ...]:
    """The ids, once each has been found in the model's vocabulary. Raises ApiError 400."""
    size = int(assistant.model.get_input_embeddings().weight.shape[0])
    for i in ids:
        if not 0 <= i < size:
            raise wrong(field, f"{str(i)[:40]} is no token id of this model; ids go from 0 to {size - 1}")
    return tuple(ids)


def requests_for(
    assistant: Assistant, body: SamplingBody, prompt: Sequence[int], max_tokens: int | None, **more: Any
) -> list[GenerationRequest]:
    """What the engine is asked for the n replies to one prompt, each with a seed of its own.

    more: further fields of `GenerationRequest`.
    """
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    seed = secrets.randbits(63) if body.seed is None else body.seed
    ends = frozenset() if body.ignore_eos else assistant.engine.reply_decoder.stop
    stop_ids = ends.union(known_ids(assistant, body.stop_token_ids or (), "stop_token_ids"))
    first = assistant.request(
        prompt,
        max_tokens=max_tokens,
        stop_texts=tuple(stops),
        stop_ids=stop_ids,
        **body.model_dump(include=SAMPLED),
        **more,
    )
    return [replace(first, seed=derived_seed(seed, i)) for i in range(body.n or 1)]
