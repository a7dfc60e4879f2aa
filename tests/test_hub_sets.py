"""Data sets of the hub: configurations, revisions, splits, with the real hub library against a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

NOBODY = "http://127.0.0.1:9"
NEW, OLD = "a" * 40, "b" * 40
README = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train*.jsonl}, {split: test, path: main/test.jsonl}]
- config_name: socratic
  data_files: socratic.jsonl
---
"""


def line(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt, "completion": "a", "note": None}).encode() + b"\n"


FILES = {
    NEW: {
        "README.md": README,
        "main/train-0.jsonl": line("first") + line("second"),
        "main/train-1.jsonl": line("third"),
        "main/test.jsonl": line("test"),
        "socratic.jsonl": line("socratic"),
    },
    OLD: {"train.jsonl": line("old"), "test.jsonl": line("old test")},
}
REVISIONS = {"main": NEW, "v1": OLD, NEW: NEW, OLD: OLD}


class Hub(BaseHTTPRequestHandler):
    """A hub with one set, of two commits."""

    asked: list[str] = []  # noqa: RUF012

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
        self.asked.append(self.path)
        path = self.path.strip("/")
        if path == "api/datasets/o/set/refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": REVISIONS[n]} for n in ("main", "v1")]
            self.answer(200, json.dumps({"branches": refs[:1], "tags": refs[1:], "converts": []}).encode())
        elif path.startswith("api/datasets/"):
            name, _, revision = path.removeprefix("api/datasets/").partition("/revision/")
            if name != "o/set":
                self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif (commit := REVISIONS.get(revision or "main")) is None:
                self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            else:
                siblings = [{"rfilename": file} for file in FILES[commit]]
                self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        else:
            commit, _, file = path.removeprefix("datasets/o/set/resolve/").partition("/")
            data = FILES[commit].get(file)
            if data is None:
                self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            else:
                self.answer(200, data, ETag=f'"{commit[:8]}{file.replace("/", "-")}"', X_Repo_Commit=commit)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
from sftflow.chat.data_files import read_rows
from sftflow.chat.files.sets import pinned
from sftflow.data.row_cache import cache_key
from sftflow.data.render_pool import Job
from sftflow.foundation.errors import SftflowError
from sftflow.recipe import Recipe, SourceEntry

out = {}
for name in sys.argv[1:]:
    try:
        entry = SourceEntry(source=name)
        key = cache_key(entry, Recipe(mixture=(entry,)), Job(None, "", 1, "cut", "stop"), [])
        out[name] = [pinned(name), [[place, row["prompt"]] for place, row in read_rows(name)], key]
    except SftflowError as error:
        out[name] = f"{error.exit_code} {error}"
print(json.dumps(out))
"""


def read(*names: str, home: Path, endpoint: str, **environment: str) -> dict[str, Any]:
    """What comes of each name, in a process of its own: the hub library reads its settings when it is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "SFTFLOW_CACHE": str(home / "cache"), **environment}
    env["HF_HUB_DISABLE_XET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, env=env, cwd=home, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow  # three processes that import the libraries
def test_a_set_of_the_hub_is_read_by_configuration_revision_and_split(address: str, tmp_path: Path) -> None:
    files = {
        "hub:o/set:main:train": ["main/train-0.jsonl:1", "main/train-0.jsonl:2", "main/train-1.jsonl:1"],
        "hub:o/set:main:test": ["main/test.jsonl:1"],
        "hub:o/set:socratic:train": ["socratic.jsonl:1"],
        "hub:o/set@v1": ["train.jsonl:1"],
        "hub:o/set@v1:test": ["test.jsonl:1"],
    }
    refused = {
        "hub:o/set": "it has several configurations: main, socratic; write config: main beside it, or in one name",
        "hub:o/set:main:dev": "no split 'dev' (there are: train, test); write hub:o/set:main:train",
        "hub:o/set:mian:train": "no configuration 'mian' (there are: main, socratic)",
        "hub:o/set@v1:dev": "no split 'dev' (there are: train, test); write hub:o/set@v1:train",
        "hub:o/set@v2": "the hub has this set, but no such revision (there are: main, v1); check what stands behind",
        "hub:o/other": "no such folder here, and no such set on the hub; check the name",
    }
    found = read(*files, *refused, home=tmp_path, endpoint=address)
    for name, places in files.items():
        commit, rest = (OLD, name[len("hub:o/set@v1") :]) if "@v1" in name else (NEW, name[len("hub:o/set") :])
        assert found[name][0] == f"hub:o/set@{commit}{rest}"
        assert [place for place, _ in found[name][1]] == [f"hub:o/set/{place}" for place in places]
    assert [prompt for _, prompt in found["hub:o/set:main:train"][1]] == ["first", "second", "third"]
    assert found["hub:o/set@v1"][1][0][1] == "old"
    assert len({found[name][2] for name in files} - {None}) == len(files)  # each has a key of its own
    for name, said in refused.items():
        assert found[name].startswith("2 hub:o/") and said in found[name] and "\n" not in found[name]
    assert sum(path == "/api/datasets/o/set" for path in Hub.asked) == 1  # asked once for all that is of one revision
    # What was fetched before is there without the hub, and what was not is named in one line, soon.
    started = time.perf_counter()
    kept = read(*files, f"hub:o/set@{OLD}", "hub:o/other", home=tmp_path, endpoint=NOBODY, HF_HUB_OFFLINE="1")
    assert {name: kept[name] for name in files} == {name: found[name] for name in files}
    assert kept[f"hub:o/set@{OLD}"][1] == found["hub:o/set@v1"][1]
    assert "not here, and the hub is not asked (HF_HUB_OFFLINE); unset" in kept["hub:o/other"]
    nobody = read("hub:o/other", home=tmp_path, endpoint=NOBODY)["hub:o/other"]
    assert "the hub cannot be asked (" in nobody and time.perf_counter() - started < 40
