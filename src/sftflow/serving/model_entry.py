"""A model that is served under its name."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sftflow.chat.render import Renderer
from sftflow.chat.thoughts import ThoughtMarks, learn_thoughts
from sftflow.chat.tool_format import CallText, learn_calls, written_calls
from sftflow.chat.tool_parser import CallFormat
from sftflow.serving.engine_thread import EngineThread
from sftflow.serving.logprobs import TokenTable

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant


class ServedModel:
    """One model: its thread, and what is learnt of its tokenizer and format when first needed."""

    def __init__(self, name: str, assistant: Assistant, **limits: int) -> None:
        """limits: see `EngineThread`."""
        self.name, self.assistant = name, assistant
        self.thread = EngineThread(assistant, **limits)
        self.context = assistant.engine.context
        self.table = TokenTable(assistant.tokenizer)
        self.control_ids = frozenset(assistant.renderer.special.values())
        self._with = functools.lru_cache(maxsize=16)(self._renderer_with)

    @functools.cached_property
    def calls(self) -> CallFormat | None:
        """How this format writes tool calls; None where it has none that could be read back."""
        return learn_calls(self.assistant.renderer)

    @functools.cached_property
    def written_calls(self) -> CallText | None:
        """What a reply must be to be calls; None where this format's cannot be asked for."""
        return None if self.calls is None else written_calls(self.assistant.renderer, self.calls)

    @functools.cached_property
    def thoughts(self) -> ThoughtMarks | None:
        """What stands around thoughts in its replies; None where this format knows of none."""
        return learn_thoughts(self.assistant.renderer)

    def renderer(self, arguments: Mapping[str, Any]) -> Renderer:
        """The renderer, with these arguments of the template."""
        return self._with(json.dumps(arguments, sort_keys=True)) if arguments else self.assistant.renderer

    def _renderer_with(self, arguments: str) -> Renderer:
        renderer = self.assistant.renderer
        chat_format = replace(renderer.format, kwargs={**renderer.format.kwargs, **json.loads(arguments)})
        return Renderer(renderer.tokenizer, chat_format, spec=replace(renderer.spec, format=chat_format))
