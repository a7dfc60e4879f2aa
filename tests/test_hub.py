"""Hub ids: what is asked, what is said, and what is kept, with the real hub library against a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers.adapters import lora, write_adapter
from sftflow.checkpoint.hub import is_hub_id

NOBODY = "http://127.0.0.1:9"
SHA, OTHER = "a" * 40, "b" * 40
PATHS = [
    "./Qwen3-0.6B",
    "/models/qwen",
    "~/models/qwen",
    "../x",
    "runs/mine/checkpoint",
    "a/b/model.safetensors",
    "d4/model_000300.pt",
]
IDS = ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "o/n@v1.0", "o/n@refs/pr/3", "openai-community/gpt2", "gpt2"]


@pytest.mark.parametrize(("name", "hub"), [*((p, False) for p in PATHS), *((i, True) for i in IDS)])
def test_what_is_a_hub_id(name: str, hub: bool) -> None:
    assert is_hub_id(name) is hub


class Hub(ThreadingHTTPServer):
    """A hub with one open model, one gated, one private. asked: the paths of requests; busy: it answers none."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked, self.busy = files, list[str](), False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.busy:
            self.answer(429)
            return
        gated = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to model o/gated is restricted."}
        if self.path.startswith("/api/models/"):
            name, _, revision = self.path.removeprefix("/api/models/").partition("/revision/")
            if name == "o/private":
                self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif name not in ("o/open-1.5", "o/gated"):
                self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif revision not in ("", "main", "v1.0"):
                self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            else:
                sha = OTHER if revision == "v1.0" else SHA
                siblings = [
                    {"rfilename": file} for file in (*self.server.files, "pytorch_model.bin", "onnx/model.onnx")
                ]
                self.answer(200, json.dumps({"id": name, "sha": sha, "siblings": siblings}).encode())
            return
        name, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if name == "o/gated":
            self.answer(403, **gated)
        elif file in self.server.files:
            commit = {"main": SHA, "v1.0": OTHER}.get(revision, revision)
            self.answer(200, self.server.files[file], ETag=f'"{commit[:8]}{file}"', X_Repo_Commit=commit)
        else:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")


@contextmanager
def serving(*folders: Path) -> Iterator[Hub]:
    """A hub whose model has the files of these folders."""
    server = Hub({p.name: p.read_bytes() for folder in folders for p in folder.iterdir()})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def hub(tiny_base: Path) -> Iterator[Hub]:
    with serving(tiny_base) as server:
        yield server


SCRIPT = """
import json, sys
from pathlib import Path
from sftflow.checkpoint.hub import fetch_weights
from sftflow.checkpoint import load_model, load_tokenizer, resolve
from sftflow.foundation.errors import SftflowError

out = {}
for name in sys.argv[1:]:
    name, _, whole = name.partition(" ")
    try:
        resolve(name)
        location = resolve(name)
        if whole == "fetch":
            fetch_weights(name, Path(location.path))
        out[name] = [location.path, len(load_tokenizer(location)) if whole == "load" else 0]
        if whole == "load":
            load_model(location)
    except SftflowError as error:
        out[name] = f"{error.exit_code} {error}"
print(json.dumps(out))
"""


def find(*names: str, home: Path, endpoint: str, **environment: str) -> dict[str, Any]:
    """What comes of each name ("NAME fetch": its weights are fetched, "NAME load": and read), in a process of its own:
    the hub library reads its settings when it is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_model_of_the_hub_is_fetched_kept_and_loaded(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    small = find("o/open-1.5", home=tmp_path, endpoint=hub.address)["o/open-1.5"]
    assert small[0].endswith(SHA)
    assert sum("/api/models/" in path for path in hub.asked) == 1  # asked once
    assert not any("safetensors" in path for path in hub.asked)  # rendering needs no weights
    both = find("o/open-1.5 fetch", "o/open-1.5@v1.0 fetch", home=tmp_path, endpoint=hub.address)
    assert both["o/open-1.5"] == small and both["o/open-1.5@v1.0"][0].endswith(OTHER)
    assert any(f"/resolve/{OTHER}/model.safetensors" in path for path in hub.asked)
    assert not any("pytorch_model" in path or "onnx" in path for path in hub.asked)
    # What was fetched before is there without the hub.
    offline = {"HF_HUB_OFFLINE": "1"}
    kept = find("o/open-1.5 load", "o/open-1.5@v1.0", home=tmp_path, endpoint=NOBODY, **offline)
    assert kept["o/open-1.5"][1] > 256 and [kept[name][0] for name in both] == [both[name][0] for name in both]
    assert find("o/open-1.5", home=tmp_path, endpoint=NOBODY)["o/open-1.5"] == small
    hub.busy = True  # too many requests
    try:
        assert find("o/open-1.5", home=tmp_path, endpoint=hub.address)["o/open-1.5"] == small
    finally:
        hub.busy = False


@pytest.mark.slow
def test_an_adapter_of_the_hub_is_its_base_with_it(tmp_path: Path, tiny_base: Path) -> None:
    pytest.importorskip("peft", reason="adapters: pip install peft")
    write_adapter(tmp_path / "adapter", tiny_base, lora())
    with serving(tmp_path / "adapter") as hub:
        found = find("o/open-1.5", "o/open-1.5@v1.0 load", home=tmp_path, endpoint=hub.address)
        assert found["o/open-1.5"][0].endswith(SHA) and found["o/open-1.5@v1.0"][1] > 256
        assert [p for p in hub.asked if "safetensors" in p][-1].endswith(f"{OTHER}/adapter_model.safetensors")
    with serving(tmp_path / "adapter", tiny_base) as hub:
        found = find("o/open-1.5", home=tmp_path / "adapter", endpoint=hub.address)
    assert "holds a model (model.safetensors) and an adapter; download the one" in str(found["o/open-1.5"])


def test_why_a_model_cannot_be_had(hub: Hub, tmp_path: Path) -> None:
    words = {
        "o/no-such-1.5": "no such folder here, and no such model on the hub; ",
        "o/private": "HF_TOKEN",
        "o/gated": "this model is gated on the hub; accept its terms on its page there and set HF_TOKEN",
        "o/open-1.5@v9": "no such revision",
        "runs/of/mine": "no such checkpoint directory",
    }
    for name, said in find(*words, home=tmp_path, endpoint=hub.address).items():
        assert said.startswith(f"2 {name}: ") and words[name] in said


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "nobody answers"])
def test_without_a_network_both_places_are_named(tmp_path: Path, offline: dict[str, str]) -> None:
    found = find("Qwen/Qwen3-0.6B", home=tmp_path, endpoint=NOBODY, **offline)
    said = found["Qwen/Qwen3-0.6B"]
    assert "cannot be loaded: no such folder here, and the hub cannot be asked" in said
    assert said.startswith("2 Qwen/Qwen3-0.6B: ") and said.endswith("check the id and the network")
