"""Data of others: public data sets, tokenizers and chat templates that are not part of the project.

The environment variable SFTFLOW_TEST_DATA names the folder that has them (CONTRIBUTING.md tells where they are from).
Without it the tests that need them skip, with one reason.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "SFTFLOW_TEST_DATA"
NOT_SET = f"outside data: {VARIABLE} names no folder"
FOLDER = Path(os.environ[VARIABLE]).resolve() if os.environ.get(VARIABLE) else None


def outside(*parts: str) -> Path:
    """A path in the outside data; the test skips where it is absent."""
    if FOLDER is None:
        pytest.skip(NOT_SET)
    path = FOLDER.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"outside data: {VARIABLE} has no {'/'.join(parts)}")
    return path


def outside_files(folder: str, pattern: str) -> list[Path]:
    """The files there, sorted; [] where the data are absent."""
    return sorted((FOLDER / folder).glob(pattern)) if FOLDER else []


def each(values: Sequence[Any]) -> list[Any]:
    """Parameters of a test that needs outside data, paths named by their stem; one that skips where there are none.

    @pytest.mark.parametrize("path", each(outside_files("fixtures/chat_templates", "*/*.jinja")))
    @pytest.mark.parametrize(("split", "rows"), each([("train", 7473), ("test", 1319)]))
    """
    if FOLDER and values:
        return [pytest.param(v, id=v.stem) if isinstance(v, Path) else v for v in values]
    arity = len(values[0]) if values and isinstance(values[0], tuple) else 1
    return [pytest.param(*[None] * arity, id="none", marks=pytest.mark.skip(reason=NOT_SET))]


def tokenizer_names(*kinds: str) -> list[Any]:
    """Names in `known_tokenizers`: our own of these kinds, and those of the outside data.

    tokenizer_names("llama2", "qwen3")  ->  ["own_llama2", "own_qwen3", "hf_llama2", "hf_qwen3"]
    """
    return [*(f"own_{kind}" for kind in kinds), *each([f"hf_{kind}" for kind in kinds])]


class Tokenizers(dict[str, Path]):
    """Directories of tokenizers by name. A test that asks for one of the outside data that is not there skips."""

    def __missing__(self, name: str) -> Path:
        raise KeyError(name, outside("fixtures", "tokenizers", name))


def unpack_tokenizer(source: Path, target: Path, entries: int | None = None) -> Path:
    """Copy a tokenizer's two files, unpacked.

    entries: keep so many of the vocabulary's first, all single characters and all added tokens, and give the ids
    anew. That is a tokenizer of the same kind, with the same control tokens, and loads and saves many times faster.
    """
    packed = source / "tokenizer.json.xz"
    whole = json.loads(lzma.decompress(packed.read_bytes()) if packed.exists() else
                       (source / "tokenizer.json").read_bytes())  # fmt: skip
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if entries is not None:
        model = whole["model"]
        added = {t["id"] for t in whole["added_tokens"]}
        kept = [t for t, i in model["vocab"].items() if i < entries or len(t) == 1]
        old = sorted({*(model["vocab"][t] for t in kept), *added})
        new = {before: now for now, before in enumerate(old)}
        model["vocab"] = {t: new[model["vocab"][t]] for t in kept}
        pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if {a, b, a + b} <= model["vocab"].keys()]
        for token in whole["added_tokens"]:
            token["id"] = new[token["id"]]
        for processor in [whole["post_processor"], *whole["post_processor"].get("processors", [])]:
            for special in processor.get("special_tokens", {}).values():
                special["ids"] = [new[i] for i in special["ids"]]
        config["added_tokens_decoder"] = {str(new[int(i)]): t for i, t in config["added_tokens_decoder"].items()}
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return target
