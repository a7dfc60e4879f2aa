"""Text to train a tiny tokenizer on, and a renderer of a tokenizer directory in a given format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = [
    "The cat sat on the mat and looked at the moon. It was a cold night, and the wind blew.",
    "A model reads tokens, one after another, and says what may come next: 48/2 = 24.",
    "Once upon a time there was a small house near the river. 1 2 3 4 5 6 7 8 9 0",
    "Hello! How are you? I am fine, thank you. The answer is 42. What is it?",
] * 20


def make_renderer(directory: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    from sftflow.chat.format import add_tokens, choose_format
    from sftflow.chat.render import Renderer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat_format = choose_format(name, tokenizer)
    add_tokens(tokenizer, chat_format)
    return Renderer(tokenizer, chat_format)
