"""Real parts that all tests share, made once a session: a tiny tokenizer, tiny random checkpoints, an engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.outside import Tokenizers, outside_files, unpack_tokenizer
from helpers.tiny import TEXT, make_renderer
from helpers.tokenizers import KINDS, write_tokenizer

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script. What we start would inherit it, and Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def row_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rendered rows are cached in a folder of the session, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer of 400 entries and no chat template."""
    from sftflow.pretraining.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, 400, 256).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A random 100K-parameter Llama-layout base with that tokenizer, context 256."""
    from transformers import AutoTokenizer

    from sftflow.pretraining.pretrain import BaseSpec, build_model

    directory = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = build_model(BaseSpec(params="0.1M", context=256), len(tokenizer), tokenizer.bos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model in the sftflow format, context 256 (see `serving`)."""
    from helpers.serving import tiny

    return tiny(tmp_path_factory.mktemp("served") / "checkpoint", 256)


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its context is a million tokens: a greedy reply goes on until somebody stops it."""
    from helpers.serving import tiny

    return tiny(tmp_path_factory.mktemp("endless") / "checkpoint", 1 << 20)


@pytest.fixture
def renderer(tokenizer_dir: Path) -> Any:
    """A renderer of the sftflow format."""
    return make_renderer(tokenizer_dir, "sftflow")


@pytest.fixture(scope="session")
def known_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """Directories of tokenizers as Llama 2, Llama 3.1 and Qwen3 have them: "own_llama2" and so on, trained here, and,
    of the outside data where they are present, "hf_llama2" and so on, cut to their first 8,000 entries."""
    folder = tmp_path_factory.mktemp("tokenizers")
    out = Tokenizers({f"own_{kind}": write_tokenizer(kind, folder / f"own_{kind}") for kind in KINDS})
    for source in outside_files("fixtures/tokenizers", "hf_*"):
        out[source.name] = unpack_tokenizer(source, folder / source.name, 8000)
    return out


@pytest.fixture(scope="session")
def whole_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """Those of the outside data as they are, for slow tests."""
    folder = tmp_path_factory.mktemp("whole")
    sources = outside_files("fixtures/tokenizers", "hf_*")
    return Tokenizers({source.name: unpack_tokenizer(source, folder / source.name) for source in sources})


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Any:
    """The engine of `tiny_base`, whose logits are made less flat: greedy replies have no near-ties."""
    import torch

    from sftflow.checkpoint import load_assistant

    loaded = load_assistant(str(tiny_base))
    with torch.no_grad():  # a random model's logits are nearly flat; make its choices clear
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    return loaded.engine
