"""Which arguments a template is rendered with, and how an end of turn is added where it writes none.

Both become a part of the template itself, so that whoever loads the checkpoint (transformers, vLLM, llama.cpp) renders
what was trained on. Arguments are built in as defaults: a caller who sets one is heard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

from sftflow.chat.format import ChatFormat
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, text_message
from sftflow.foundation.errors import FormatError, MaskError

_MOST_ARGUMENTS = 6
_THINKING = re.compile(r"(?:enable_|use_)?(?:thinking|think|reasoning)(?:_enabled|_mode)?")
_REFUSED = 3  # as many rows as this to be expanded are as bad as one that is refused

# The end-of-text token is put behind every reply before the template sees it. (namespace: a `set` inside a `for` would
# be forgotten after it.)
_APPEND_EOS = """\
{%- set sftflow = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' and message.content is string and not message.tool_calls -%}
    {%- set sftflow.messages = sftflow.messages + [dict(message, content=message.content + eos_token)] -%}
  {%- else -%}
    {%- set sftflow.messages = sftflow.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = sftflow.messages -%}
"""


def with_arguments(chat_format: ChatFormat, arguments: dict[str, bool]) -> ChatFormat:
    """The format with defaults for template arguments built in.

    >>> with_arguments(ChatFormat(name="own", template="..."), {"thinking": False}).template
    '{%- set thinking = thinking if thinking is defined else false -%}...'
    """
    front = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {str(value).lower()} -%}}"
        for name, value in arguments.items()
    )
    return chat_format.behind(front, kwargs={**chat_format.kwargs, **arguments})


def set_thinking(renderer: Renderer, *, on: bool) -> Renderer:
    """The renderer whose prompts ask for thoughts, or for none, by the template's own argument for that
    (`enable_thinking` in most). Raises FormatError where it has none."""
    probe = Conversation((text_message("user", "u"),))
    for name in dict.fromkeys([*renderer.format.kwargs, *renderer.arguments()]):
        if _THINKING.fullmatch(name):
            yes, no = (renderer.with_format(with_arguments(renderer.format, {name: value})) for value in (True, False))
            if yes.text(probe, add_generation_prompt=True) != no.text(probe, add_generation_prompt=True):
                return yes if on else no
    fact = "its template has no argument that switches thinking on or off, such as enable_thinking"
    raise FormatError(renderer.format.name, fact, "leave --thinking out")


def append_eos(renderer: Renderer) -> Renderer:
    """The renderer of a format that writes no end of turn, with the end-of-text token behind every reply; a format
    that writes one is left as it is. Raises FormatError where the tokenizer has no such token."""
    if renderer.end_token is not None:
        return renderer
    if not renderer.spec.names.get("eos_token"):
        raise FormatError(
            "append_eos",
            "the tokenizer has no end-of-text token",
            "set eos_token in its tokenizer_config.json, or leave append_eos off",
        )
    found = renderer.format.behind(_APPEND_EOS, append_eos=True)
    of_tools = renderer.format.with_tools
    if of_tools and renderer.with_format(of_tools).end_token is not None:
        found = replace(found, named={**found.named, "tool_use": of_tools.template})
    return renderer.with_format(found)


def options_note(renderer: Renderer) -> str | None:
    """In words, what was built into the template; None where nothing was."""
    chat_format = renderer.format
    parts = [f"{name}={str(value).lower()}" for name, value in chat_format.kwargs.items()]
    parts += ["the end of text behind every reply"] if chat_format.append_eos else []
    parts += [f"no {chat_format.prefill!r} at the end of prompts"] if chat_format.prefill else []
    return f"built into the {chat_format.name} template: {', '.join(parts)}" if parts else None


def choose_arguments(renderer: Renderer, sample: Sequence[Conversation]) -> Renderer:
    """The renderer whose template arguments make the most of the sample provable (rows of tokens need none).

    Where every row is proven as one example, or the template has no arguments, the renderer itself. Arguments are
    found in the template (names it reads and nobody sets), not in a list; each is tried as true and false, alone and
    in pairs, and taken only where fewer rows must be expanded or refused. What asks for a conversation's first reply
    is left as it is wherever a reply can be taught behind it: what serving sends by default, such as whether a model
    is told to think, is not changed for the sake of longer examples.
    """
    sample = [c for c in sample if c.messages]
    arguments = renderer.arguments()[:_MOST_ARGUMENTS]
    if not arguments or renderer.format.kwargs:
        return renderer
    costs = [_cost(renderer, c) for c in sample]
    hard = [c for c, cost in zip(sample, costs, strict=True) if cost]
    if not hard:
        return renderer
    taught = [c for c, cost in zip(sample, costs, strict=True) if cost < _REFUSED]
    asked = [_first_prompt(renderer, c) for c in taught]
    best, best_cost = renderer, sum(costs)
    for choice in _choices(arguments):
        candidate = renderer.with_format(with_arguments(renderer.format, choice))
        if sum(_cost(candidate, c) for c in hard[:50]) >= sum(_cost(best, c) for c in hard[:50]):
            continue  # most candidates end here, before the whole sample is rendered
        if any(_first_prompt(candidate, c) != before for c, before in zip(taught, asked, strict=True)):
            continue
        cost = sum(_cost(candidate, c) for c in sample)
        if cost < best_cost:
            best, best_cost = candidate, cost
        if not cost:
            break
    return best


def _first_prompt(renderer: Renderer, conversation: Conversation) -> str | None:
    """The prompt for the conversation's first reply; None where the template gives none."""
    first = next((i for i, m in enumerate(conversation.messages) if m.role == "assistant"), 0)
    try:
        return renderer.text(conversation.before(first), add_generation_prompt=True)
    except FormatError:
        return None


def _choices(arguments: Sequence[str]) -> list[dict[str, bool]]:
    """Each argument alone, then the first three in pairs; true first."""
    chosen = [*((name,) for name in arguments), *combinations(arguments[:3], 2)]
    both = (True, False)
    return [dict(zip(n, values, strict=True)) for n in chosen for values in product(both, repeat=len(n))]


def _cost(renderer: Renderer, conversation: Conversation) -> int:
    """0: proven whole; 1: one example per turn; _REFUSED."""
    try:
        return int(len(renderer.render_rows(conversation)) > 1)
    except (MaskError, FormatError):
        return _REFUSED
