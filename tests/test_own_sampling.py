"""What a checkpoint's generation_config.json asks for, in the terminal and in the server, as transformers reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.serving import ASK, local, request
from sftflow.checkpoint import Assistant
from sftflow.checkpoint.generation import sampling_of
from sftflow.foundation.errors import CheckpointError
from sftflow.serving.prompt import requests_for
from sftflow.serving.schemas import ChatBody
from sftflow.terminal.repl import chat

OFF = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def asks_for(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    from transformers import GenerationConfig

    ends = {"eos_token_id": assistant.renderer.stop_ids(), "pad_token_id": 0}
    monkeypatch.setattr(assistant.model, "generation_config", GenerationConfig(**ends, **values))


def test_what_the_checkpoint_asks_for(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    asks_for(assistant, monkeypatch)
    assert assistant.sampling == OFF
    own = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}
    asks_for(assistant, monkeypatch, do_sample=True, **own)
    assert assistant.sampling == own
    (asked,) = requests_for(assistant, ChatBody(model="tiny", messages=ASK), [1], 4)
    assert {key: getattr(asked, key) for key in own} == own
    body = ChatBody(model="tiny", messages=ASK, min_p=0.0, repetition_penalty=1.0)  # a request's own values count
    (asked,) = requests_for(assistant, body, [1], 4)
    assert (asked.min_p, asked.repetition_penalty) == (0.0, 1.0)
    asks_for(assistant, monkeypatch, do_sample=False, repetition_penalty=1.2)
    assert assistant.sampling == {**OFF, "repetition_penalty": 1.2}


def test_a_penalty_counts_in_greedy_decoding_as_in_transformers(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = torch.tensor([request(assistant, 1).prompt_ids])
    n = assistant.engine.context - prompt.shape[1]

    def by_transformers() -> str:
        ids = assistant.model.generate(prompt, max_new_tokens=n)[0, prompt.shape[1] :].tolist()
        return assistant.renderer.decode([i for i in ids if i not in assistant.renderer.special.values()])

    asks_for(assistant, monkeypatch)
    plain = by_transformers()
    asks_for(assistant, monkeypatch, repetition_penalty=8.0)
    expected = by_transformers()
    assert expected != plain
    chat(assistant, prompt=ASK[0]["content"])
    assert capsys.readouterr().out.removesuffix("\n") == expected.removesuffix("\n")
    with local(assistant) as http:
        answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": n})
    assert answer.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": True}, "top_p is True"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_what_no_token_can_be_drawn_by_is_refused(values: dict[str, Any], fact: str) -> None:
    config = SimpleNamespace(do_sample=True, **values)
    with pytest.raises(CheckpointError, match=f"generation_config.json: {fact}; write a number"):
        sampling_of(config)
    with pytest.raises(CheckpointError, match=f"^models/mine/generation_config.json: {fact}"):
        sampling_of(config, "models/mine/generation_config.json")


def test_a_value_of_zero_or_off_is_one(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    asks_for(assistant, monkeypatch, do_sample=True, temperature=1, top_p=1, top_k=-1, min_p=0, repetition_penalty=1)
    assert assistant.sampling == {**OFF, "temperature": 1.0, "top_k": -1}


def test_what_is_asked_for_and_not_done_is_said(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sftflow.checkpoint import load_assistant

    shutil.copytree(tiny_base, tmp_path / "base")
    asked = {"do_sample": True, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "num_beams": 1, "typical_p": 1.0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(asked))
    load_assistant(str(tiny_base))
    load_assistant(str(tmp_path / "base"))
    said = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
    assert len(said) == 1 and said[0].endswith("asks for no_repeat_ngram_size, suppress_tokens; not done here")
