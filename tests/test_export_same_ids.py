"""One conversation has the same prompt ids wherever it goes: training row, evaluation, server, terminal, GGUF."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from helpers.outside import each, outside
from helpers.serving import local
from sftflow import checkpoint
from sftflow.chat.schema import parse_row, text_message
from sftflow.evaluation.prompts_for import chat_prompt
from sftflow.exporting import llamacpp
from sftflow.exporting import to_gguf as exporting
from sftflow.exporting.llamacpp import LlamaCpp
from sftflow.exporting.to_gguf import export_gguf
from sftflow.tasks import Item
from sftflow.terminal.repl import TerminalChat

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp: pip install xllamacpp")


def clauses(n: int) -> Iterator[list[str]]:
    """The package's own sample text, ten clauses at a time, the next time from the next one on."""
    text = resources.files("sftflow.evaluation").joinpath("plain.txt").read_text(encoding="utf-8")
    found = re.split(r"(?<=[.!?,])\s+", text)
    return (found[i : i + 10] for i in range(n))


def dialogues(_: int) -> Iterator[list[str]]:
    """Real ones."""
    rows = json.loads(outside("topical_chat", "valid_freq.json").read_text(encoding="utf-8")).values()
    return ([turn["message"] for turn in row["content"]] for row in rows)


def conversations(source: Callable[[int], Iterator[list[str]]], n: int) -> list[list[dict[str, str]]]:
    """One, three, five or seven turns, user and assistant alternating, and a reply."""
    out = []
    for texts in source(n):
        length = 1 + 2 * (len(out) % 4)
        if len(texts) >= length + 1:
            out.append(
                [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts[: length + 1])]
            )
        if len(out) == n:
            break
    return out


def everywhere(model: str, path: Path, rows: list[list[dict[str, str]]]) -> dict[str, int]:
    """Compare; {"rows", "splits": rows where our renderer encodes two sides of a boundary apart, which llama.cpp does
    not}."""
    assistant = checkpoint.load_assistant(model)
    of_file = checkpoint.load_assistant(str(path)).renderer
    renderer = assistant.renderer
    splits = 0
    server = local(assistant)
    terminal = TerminalChat(assistant, io.StringIO())
    with LlamaCpp(path, context=64) as engine:
        for messages in rows:
            trained = renderer.render(parse_row({"messages": messages}, "row"))
            asked = renderer.render(parse_row({"messages": messages[:-1]}, "row"), add_generation_prompt=True)
            ids = asked.ids.tolist()
            assert trained.ids[: len(ids)].tolist() == ids  # training's row begins with what is asked
            assert trained.mask[len(ids)] == 1
            turns = tuple(text_message(m["role"], m["content"]) for m in messages[:-1])  # type: ignore[arg-type]
            assert list(chat_prompt(assistant.renderer, Item(id="row", messages=turns, answer=""))) == ids  # evaluation
            served = server.post("/v1/render", json={"model": "tiny", "messages": messages[:-1]}).json()
            assert [t["id"] for t in served["tokens"]] == ids
            typed = terminal.conversation(list(turns))
            assert renderer.render(typed, add_generation_prompt=True).ids.tolist() == ids
            # The exported file's own renderer, and llama.cpp with the template and the tokenizer inside the file:
            assert (
                of_file.render(parse_row({"messages": messages[:-1]}, "row"), add_generation_prompt=True).ids.tolist()
                == ids
            )
            text = engine.prompt(messages[:-1])
            assert text == asked.text
            theirs = engine.ids(text)
            if asked.boundary_splits:
                splits += 1
                assert theirs == assistant.tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                assert theirs == ids
    return {"rows": len(rows), "splits": splits}


@pytest.mark.parametrize("source", [clauses, *each([dialogues])])
@pytest.mark.parametrize("format_name", ["sftflow", pytest.param("chatml", marks=pytest.mark.slow)])
def test_a_hundred_conversations(tmp_path: Path, format_name: str, source: Any) -> None:
    assistant = checkpoint.load_assistant("builtin:tiny", format=format_name)
    renderer = assistant.renderer
    import torch

    checkpoint.save(tmp_path / "sft", assistant.model, assistant.tokenizer, renderer, dtype=torch.float32, meta={})
    model = checkpoint.load_assistant(str(tmp_path / "sft"))
    exporting.write(exporting.plan_of(model, "f16"), tmp_path / "m.gguf")
    found = everywhere(str(tmp_path / "sft"), tmp_path / "m.gguf", conversations(source, 100))
    assert found["rows"] == 100
    assert found["splits"] == 0, found


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """A real checkpoint: SFTFLOW_SMOLLM2 is the path of SmolLM2-135M-Instruct, a directory or a .gguf file."""
    model = os.environ.get("SFTFLOW_SMOLLM2", "")
    if not Path(model).exists() or not model:
        pytest.skip("SFTFLOW_SMOLLM2 names no checkpoint")
    found = export_gguf(model, tmp_path / "m.gguf", "f32", say=lambda _: None)
    assert found["passed"], found["failures"][:3]
    assert found["prompts"] == found["ids_equal"] == found["greedy_equal"] == 50
    with LlamaCpp(tmp_path / "m.gguf", context=256) as engine:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
        choice = engine.post("/v1/chat/completions", {**body, "temperature": 0, "max_tokens": 60})["choices"][0]
    assert "Paris" in choice["message"]["content"] and choice["finish_reason"] == "stop"
    assert everywhere(model, tmp_path / "m.gguf", conversations(clauses, 100))["rows"] == 100
