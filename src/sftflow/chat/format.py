"""Chat formats: the checkpoint's own template, a built-in one, or a .jinja file.

A new built-in format is one file in formats/ and one row in BUILTIN.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sftflow.foundation.errors import FormatError
from sftflow.foundation.missing import not_there

TEMPLATE_NOW = "2026-01-01T00:00:00"


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A Jinja chat template with the arguments and the clock it is always rendered with.

    tokens: control tokens a checkpoint must have for it (added where they are missing).
    python: (call start, call end, output start, output end) where the format has calculator tokens.
    end: the end-of-turn token of a built-in format; for others it is found by rendering a probe.
    append_eos: whether the template was rewritten to put the end of text behind every reply.
    prefill: what was taken out of the template's prompt, which began every reply with it.
    named: the checkpoint's templates beside `template`, which is the one called "default".
    """

    name: str
    template: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    now: str = TEMPLATE_NOW
    tokens: tuple[str, ...] = ()
    python: tuple[str, str, str, str] | None = None
    end: str | None = None
    append_eos: bool = False
    prefill: str = ""
    named: dict[str, str] = field(default_factory=dict)

    @property
    def with_tools(self) -> ChatFormat | None:
        """The format of conversations with tools, where the checkpoint has a template of its own for them: the one
        called "tool_use", as in transformers."""
        return replace(self, template=self.named["tool_use"], named={}) if "tool_use" in self.named else None

    @property
    def templates(self) -> str | dict[str, str]:
        """All of them, as a tokenizer's `chat_template` has them."""
        return {"default": self.template, **self.named} if self.named else self.template

    def behind(self, front: str, **changes: Any) -> ChatFormat:
        """The format with a text in front of all its templates, and other changes."""
        named = {name: front + template for name, template in self.named.items()}
        return replace(self, template=front + self.template, named=named, **changes)

    def clock(self, pattern: str) -> str:
        """`strftime_now` for the template, frozen at `now`."""
        return datetime.fromisoformat(self.now).strftime(pattern)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kwargs": self.kwargs,
            "template_now": self.now,
            "python": self.python,
            "append_eos": self.append_eos,
        }


PYTHON = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

BUILTIN: dict[str, dict[str, Any]] = {
    "sftflow": {
        "tokens": ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", *PYTHON),
        "python": PYTHON,
        "end": "<|assistant_end|>",
    },
    "chatml": {"tokens": ("<|im_start|>", "<|im_end|>"), "end": "<|im_end|>"},
    "llama2": {},  # written with the tokenizer's own bos and eos tokens, so its end of turn is found by a probe
    "llama3": {
        "tokens": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "end": "<|eot_id|>",
    },
    "alpaca": {},  # as llama2
    "phi3": {"tokens": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "end": "<|end|>"},
}


def builtin_format(name: str) -> ChatFormat:
    path = Path(__file__).parent / "formats" / f"{name}.jinja"
    return ChatFormat(name=name, template=path.read_text(encoding="utf-8").rstrip("\n"), **BUILTIN[name])


def choose_format(name: str, tokenizer: Any, stored: dict[str, Any] | None = None) -> ChatFormat:
    """The format for `--format name`: "auto" is the checkpoint's own template, else `sftflow`.

    stored: the `format` entry of the checkpoint's sftflow.json, which keeps arguments and clock.
    """
    if name == "auto":
        if not getattr(tokenizer, "chat_template", None):
            return builtin_format("sftflow")
        template, named = _default_of(tokenizer.chat_template, tokenizer.name_or_path or "chat_template")
        stored = stored or {}
        return ChatFormat(
            name=stored.get("name", "own"),
            template=template,
            named=named,
            kwargs=stored.get("kwargs", {}),
            now=stored.get("template_now", TEMPLATE_NOW),
            python=tuple(stored.get("python") or ()) or None,  # type: ignore[arg-type]
        )
    if name in BUILTIN:
        return builtin_format(name)
    path = Path(name)
    if path.suffix == ".jinja":
        if not path.is_file():
            raise FormatError(name, *not_there(path, "template file", "give a path to a .jinja file"))
        try:
            return ChatFormat(name=path.stem, template=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise FormatError(name, f"not UTF-8 text (at byte {error.start})", "save it as UTF-8") from None
    remedy = f"use auto (the checkpoint's own), {', '.join(BUILTIN)} or a .jinja path"
    if path.is_file():
        remedy = "call the template's file NAME.jinja"
    elif near := difflib.get_close_matches(name, BUILTIN, 1, 0.75):
        remedy = f"did you mean {near[0]!r}?"
    raise FormatError("--format", f"{name!r} is not a format", remedy)


def _default_of(templates: str | dict[str, str], place: str) -> tuple[str, dict[str, str]]:
    """(the template called "default", the others by name). Raises FormatError where none is called so."""
    if isinstance(templates, str):
        return templates, {}
    names = ", ".join(map(repr, sorted(templates)))
    if "default" not in templates:
        fact = f"it has chat templates called {names}, and none called 'default'"
        raise FormatError(place, fact, "rename one of them to 'default', or give a .jinja file as the format")
    wrong = [name for name in templates if not re.fullmatch(r"[\w.-]+", name)]
    if wrong:
        raise FormatError(place, f"{wrong[0]!r} is no name of a chat template", "use letters, digits and _")
    return templates["default"], {name: text for name, text in templates.items() if name != "default"}


def add_tokens(tokenizer: Any, chat_format: ChatFormat) -> int:
    """Give the tokenizer the format's control tokens and template; returns how many tokens were new."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    missing = [t for t in chat_format.tokens if t not in special]
    added = tokenizer.add_special_tokens({"additional_special_tokens": missing}) if missing else 0
    tokenizer.chat_template = chat_format.templates
    return int(added)


def tokenizer_text(tokenizer: Any) -> str:
    """tokenizer.json of a fast tokenizer, as it is now."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(
            "tokenizer",
            "it is not a fast tokenizer",
            "save it as a fast one (use_fast=True)",
        )
    return str(backend.to_str())


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """The fast tokenizer as JSON, without the padding and truncation state that calls leave behind."""
    data: dict[str, Any] = json.loads(tokenizer_text(tokenizer))
    return {key: value for key, value in data.items() if key not in ("truncation", "padding")}
