"""Shared real parts: a tiny tokenizer, a tiny random checkpoint, and the paths of the public data where present."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script. What we start would inherit it, and Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

TEXT = [
    "The cat sat on the mat and looked at the moon. It was a cold night, and the wind blew.",
    "A model reads tokens, one after another, and says what may come next: 48/2 = 24.",
    "Once upon a time there was a small house near the river. 1 2 3 4 5 6 7 8 9 0",
    "Hello! How are you? I am fine, thank you. The answer is 42. What is it?",
] * 20


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
    from serving import tiny

    return tiny(tmp_path_factory.mktemp("served") / "checkpoint", 256)


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its context is a million tokens: a greedy reply goes on until somebody stops it."""
    from serving import tiny

    return tiny(tmp_path_factory.mktemp("endless") / "checkpoint", 1 << 20)


@pytest.fixture
def renderer(tokenizer_dir: Path) -> Any:
    """A renderer of the sftflow format."""
    return make_renderer(tokenizer_dir, "sftflow")


def make_renderer(directory: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    from sftflow.chat.format import add_tokens, choose_format
    from sftflow.chat.render import Renderer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat_format = choose_format(name, tokenizer)
    add_tokens(tokenizer, chat_format)
    return Renderer(tokenizer, chat_format)


@pytest.fixture(scope="session")
def real_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unpacked Llama 2, Llama 3.1 and Qwen3 tokenizers of the public fixtures; {} where they are absent."""
    out = {}
    for source in sorted((SHARED / "fixtures" / "tokenizers").glob("hf_*")):
        target = tmp_path_factory.mktemp(source.name)
        for file in source.iterdir():
            data = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
            (target / file.name.removesuffix(".xz")).write_bytes(data)
        out[source.name] = target
    return out


def dom_of(page: Path, profile: Path) -> str:
    """What Chromium makes of a page, scripts run: the text of its first <output>."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--allow-file-access-from-files", f"--user-data-dir={profile}", "--window-size=1400,900",
               "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<output>(.+?)</output>", done.stdout)
    assert found, done.stderr[-500:]
    return found[1]


def shared(*parts: str) -> Path:
    """A path in the public data, or a skip that says what is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"public data absent: {path.name}")
    return path
