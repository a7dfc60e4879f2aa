"""A model that is served under its name."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sftflow.chat.tool_format import learn_calls
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

    @functools.cached_property
    def calls(self) -> CallFormat | None:
        """How this format writes tool calls; None where it has none that could be read back."""
        return learn_calls(self.assistant.renderer)
