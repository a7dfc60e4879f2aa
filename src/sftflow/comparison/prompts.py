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
from sftflow.tasks.answers import holds_text
from sftflow.tasks.task import as_plain_text

VERSION = 3


@dataclass(frozen=True, kw_only=True)
class FixedPrompt:
    """One fixed prompt: a conversation that waits for a reply.

    expects: what a right answer holds, as groups of wordings: one of each. () where nothing can be checked."""

    id: str
    kind: str
    conversation: Conversation
    expects: tuple[tuple[str, ...], ...] = ()

    @property
    def plain(self) -> str:
        """The prompt as plain text for a base."""
        return as_plain_text(self.conversation.messages)

    def right(self, reply: str) -> bool | None:
        """Whether a reply holds the answer, in whole words and by the value of numbers; None where none is expected."""
        if not self.expects:
            return None
        return all(any(holds_text(reply, wording) for wording in group) for group in self.expects)

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
    """The default set, or a file with one prompt a line: any accepted dialect, or {"prompt": TEXT}; each with "id",
    "kind" and "expects" where wanted."""
    path = Path(__file__).with_name("prompts.jsonl") if source == "default" else Path(source)
    prompts = []
    for number, (place, row) in enumerate(read_rows(path), 1):
        if isinstance(row, str):
            row = {"messages": [{"role": "user", "content": row}]}
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row.get("completion") is None:
            row = {**row, "messages": [{"role": "user", "content": row["prompt"]}]}
        expects = _expects(row.get("expects"), place) if isinstance(row, dict) else ()
        conversation = parse_row(row, place)
        if not conversation.messages:
            what = "plain text" if conversation.document else "a row of tokens"
            raise DataError(place, f"{what}, which asks nothing", "give messages, or a prompt")
        if conversation.messages[-1].role == "assistant":
            conversation = conversation.before(len(conversation.messages) - 1)
        if not conversation.messages:
            raise DataError(place, "a prompt without a user turn", "add one")
        meta: dict[str, Any] = conversation.meta
        prompts.append(
            FixedPrompt(
                id=str(meta.get("id", f"prompt-{number}")),
                kind=str(meta.get("kind", "own")),
                conversation=conversation,
                expects=expects,
            )
        )
    if not prompts:
        raise DataError(str(path), "no prompts in it", "give one prompt a line")
    digest = hashlib.sha256(
        json.dumps([[p.id, p.messages_json(), *p.expects] for p in prompts], ensure_ascii=False).encode()
    ).hexdigest()
    return PromptSet(
        name=source if source == "default" else path.name, version=VERSION, sha256=digest, prompts=tuple(prompts)
    )


def _expects(value: Any, place: str) -> tuple[tuple[str, ...], ...]:
    """[["Paris"], ["12", "twelve"]] as it is written, checked; () where nothing is."""
    groups = value if isinstance(value, list) else [None] if value is not None else []
    for group in groups:
        if not isinstance(group, list) or not group or not all(isinstance(w, str) and w.strip() for w in group):
            fact = "expects should be groups of wordings, each a list of texts"
            raise DataError(place, fact, 'write for example "expects": [["12", "twelve"]]')
    return tuple(map(tuple, groups))
