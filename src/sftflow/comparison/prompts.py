"""The fixed prompt sets of a comparison: ours, versioned and hashed, or the user's own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftflow.chat.data_files import read_rows
from sftflow.chat.schema import Conversation, parse_row
from sftflow.foundation.errors import DataError

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class FixedPrompt:
    """One fixed prompt: a conversation that waits for a reply."""

    id: str
    kind: str
    conversation: Conversation

    @property
    def plain(self) -> str:
        """The prompt as plain text for a base: a question, or the dialogue so far."""
        messages = self.conversation.messages
        if all(m.role != "assistant" for m in messages):
            asked = "\n\n".join(m.text for m in messages)
            return f"Question: {asked}\nAnswer:"
        names = {"user": "Question", "assistant": "Answer"}
        lines = [f"{names.get(m.role, '')}: {m.text}".lstrip(": ") for m in messages]
        return "\n".join([*lines, "Answer:"])

    def messages_json(self) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.text} for m in self.conversation.messages]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    name: str
    version: int
    sha256: str
    prompts: tuple[FixedPrompt, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "sha256": self.sha256}


def load_prompts(source: str = "default") -> PromptSet:
    """The default set, or a file with one prompt a line: any accepted dialect, or {"prompt": TEXT}."""
    path = Path(__file__).with_name("prompts.jsonl") if source == "default" else Path(source)
    prompts = []
    for number, (place, row) in enumerate(read_rows(path), 1):
        if isinstance(row, str):
            row = {"messages": [{"role": "user", "content": row}]}
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row.get("completion") is None:
            row = {**row, "messages": [{"role": "user", "content": row["prompt"]}]}
        conversation = parse_row(row, place)
        if conversation.messages[-1].role == "assistant":
            conversation = conversation.before(len(conversation.messages) - 1)
        if not conversation.messages:
            raise DataError(place, "a prompt without a user turn", "add one")
        meta: dict[str, Any] = conversation.meta
        prompts.append(
            FixedPrompt(
                id=str(meta.get("id", f"prompt-{number}")), kind=str(meta.get("kind", "own")), conversation=conversation
            )
        )
    if not prompts:
        raise DataError(str(path), "no prompts in it", "give one prompt a line")
    digest = hashlib.sha256(
        json.dumps([[p.id, p.messages_json()] for p in prompts], ensure_ascii=False).encode()
    ).hexdigest()
    return PromptSet(
        name=source if source == "default" else path.name, version=VERSION, sha256=digest, prompts=tuple(prompts)
    )
