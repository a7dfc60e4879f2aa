"""Chat templates that transformers keeps with the processor of a multimodal checkpoint, not with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftflow.foundation.errors import CheckpointError

FILES = ("chat_template.json", "processor_config.json")  # as a processor looks for them


def read_templates(directory: Path, tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the one that the directory's processor has.

    Raises CheckpointError where a file holds something else.
    """
    if getattr(tokenizer, "chat_template", None):
        return
    for path in (directory / name for name in FILES):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, list):
                found = {entry["name"]: entry["template"] for entry in found}
        except (ValueError, AttributeError, KeyError, TypeError):
            found = 0
        texts = found.values() if isinstance(found, dict) else [] if found is None else [found]
        if not all(isinstance(text, str) for text in texts):
            fact = "it has no chat_template that is a text"
            raise CheckpointError(str(path), fact, 'write {"chat_template": "..."}, or name a format')
        if found:
            tokenizer.chat_template = found
            return
