"""Code that a checkpoint brings is never run, whatever is typed, and JSON on stdout stays JSON."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.runs import Result, run

CODE = """
import pathlib
pathlib.Path({trap!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class MineConfig(LlamaConfig): model_type = "mine"
class MineForCausalLM(LlamaForCausalLM): config_class = MineConfig
class MineTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A checkpoint with a module beside it that leaves a file where it is run."""
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "mine.py").write_text(CODE.format(trap=str(tmp_path / "trap")))
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path / "base"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def answered_yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    def start(*args: str) -> Result:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
        return run(*args)

    return start


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_it_is_refused_by_name(base: Path, tmp_path: Path, what: str, answered_yes: Callable[..., Result]) -> None:
    if what == "model":
        auto = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
        change(base / "config.json", model_type="mine", auto_map=auto)
        command = ("chat", "base", "--prompt", "hi")
    else:
        auto = {"AutoTokenizer": [None, "mine.MineTokenizer"]}
        change(base / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=auto)
        command = ("render", "d.jsonl", "--model", "base", "--json")
    result = answered_yes(*command)
    assert (result.returncode, result.stdout) == (2, "")
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: base: it needs code of its own, and code from a checkpoint is not run; ")
    assert "[y/N]" not in result.stderr
    assert not (tmp_path / "trap").exists()


def test_what_transformers_itself_has_is_used_instead(
    base: Path, tmp_path: Path, answered_yes: Callable[..., Result]
) -> None:
    change(base / "config.json", auto_map={"AutoModelForCausalLM": "mine.MineForCausalLM"})
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "mine.MineTokenizer"]})
    result = answered_yes("render", "d.jsonl", "--model", "base", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["rows"]) == 1
    assert answered_yes("chat", "base", "--prompt", "hi").returncode == 0
    assert not (tmp_path / "trap").exists()
