"""The chat templates that TRL ships, and what each needs of a tokenizer. They come with the package trl (the extra
`peers`); nothing of it is imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpers.judge import CONTROL, PARTS, control_tokens
from helpers.tokenizers import byte_level

SPEC = find_spec("trl")
FOLDERS = [Path(folder) / "chat_templates" for folder in (SPEC.submodule_search_locations or ())] if SPEC else []
PATHS = sorted(path for folder in FOLDERS for path in folder.glob("*.jinja"))
ABSENT = [pytest.param(None, id="none", marks=pytest.mark.skip(reason="the package trl is not installed"))]

# What a template closes an assistant's turn with, by the longest beginning of its name; read from the templates.
STOPS: dict[str, tuple[str, ...]] = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),  # the second behind calls
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "gemma4_v2": ("<turn|>",),
    "glm4moe": (),
    "glm4moe_training": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),  # only the last reply ends so: a row a turn
    "idefics3": ("<end_of_utterance>",),
    "lfm2": ("<|im_end|>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "llava": ("</s>",),
    "muse": ("<|eot|>",),
    "nemotron": ("<|im_end|>",),
    "phi3": ("<|end|>",),
    "qwen": ("<|im_end|>",),
    "smolvlm": ("<end_of_utterance>",),
}


WITH_PARTS = ("idefics3", "llava", "smolvlm")  # want contents as lists of parts


def stops_of(path: Path) -> tuple[str, ...]:
    return STOPS[max((name for name in STOPS if path.stem.startswith(name)), key=len)]


def parts_of(path: Path) -> tuple[str, ...]:
    return PARTS if path.stem.startswith(WITH_PARTS) else ()


def tokenizer_of(path: Path) -> Any:
    names = control_tokens(path.read_text(encoding="utf-8"), byte_level(), parts_of(path))
    closing = CONTROL.findall("".join(stops_of(path)))
    return byte_level(special=tuple(sorted({*names, *closing})))
