"""What the tests of the server share: a tiny real model, an app in this process, a real uvicorn on a loopback port."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient
from torch.nn.utils.rnn import pad_sequence

from sftflow.chat.schema import parse_row
from sftflow.checkpoint import Assistant, load_assistant
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.pretraining.tokenizer import train_tokenizer
from sftflow.serving import api
from sftflow.serving import uvicorn_limits as listen

SENTENCES = [
    "the cat sat on the mat and the dog ran over the hill",
    "what is a token? a token is a piece of text",
    "1+1=2",
]
ASK = [{"role": "user", "content": "what is a token?"}]
# A random model's greedy text is one token over and over; a seeded draw is as exact, and has something to compare.
DRAW = {"temperature": 1.0, "seed": 5}


def tiny(directory: Path, context: int) -> Assistant:
    """A random 0.1M model, as somebody else's base would come. With this seed its greedy text is `hhh`."""
    tokenizer = train_tokenizer(SENTENCES * 20, 320, context)
    spec = BaseSpec(params="0.1M", vocab=320, context=context, seed=6)
    build_model(spec, len(tokenizer), tokenizer.bos_token_id).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_assistant(str(directory))


def learn_by_heart(assistant: Assistant, rows: list[dict[str, Any]]) -> None:
    """Train until each row's replies are what greedy decoding gives."""
    rendered = [assistant.renderer.render(parse_row(row, "row")) for row in rows]
    ids, masks = (
        pad_sequence([torch.tensor(x) for x in column], batch_first=True)
        for column in zip(*((r.ids, r.mask) for r in rendered), strict=True)
    )
    wanted = masks[:, 1:] == 1  # what stands behind a row's end changes nothing in front of it
    optimizer = torch.optim.AdamW(assistant.model.parameters(), lr=3e-3)
    assistant.model.train()
    for _ in range(400):
        loss = torch.nn.functional.cross_entropy(assistant.model(ids).logits[:, :-1][wanted], ids[:, 1:][wanted])
        if loss.item() < 0.005:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assistant.model.eval()
    assert loss.item() < 0.02


@contextmanager
def running(app: Any, connection: type[listen.Connection] = listen.Connection) -> Iterator[str]:
    """A uvicorn as `serve` runs it, on an ephemeral loopback port; gives its address."""
    sock = listen.open_socket("127.0.0.1", 0)
    server = listen.Server(listen.config(app, connection))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """`sftflow serve` as a process, on a port of its own choice; gives its address."""
    command = [sys.executable, "-m", "sftflow", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = ""
        while "http://" not in line:
            line = process.stderr.readline()
            assert line, "the server ended"
        # The access log would fill the pipe, and the server would wait for a reader.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield re.findall(r"http://[\w.:]+", line)[0]
    finally:
        process.terminate()
        process.wait(20)


def local(assistant: Assistant, **options: Any) -> TestClient:
    """A client of an app in this process, without a socket."""
    app = api.make_app({"tiny": assistant}, **options)
    return TestClient(app, base_url="http://127.0.0.1:8008", raise_server_exceptions=False)


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ASK, "max_tokens": 4, **DRAW, **fields}


def request(assistant: Assistant, n: int, **options: Any) -> GenerationRequest:
    ids = assistant.renderer.render(parse_row({"messages": ASK}, "x"), add_generation_prompt=True).ids
    return GenerationRequest(prompt_ids=tuple(ids.tolist()), max_new_tokens=n, **(options or DRAW))


@functools.cache
def twin(directory: str) -> Assistant:
    """The same model once more: an engine runs one session at a time, and the server's thread may hold it."""
    return load_assistant(directory)


def own(assistant: Assistant, n: int, **options: Any) -> Reply:
    """The engine's own reply to ASK."""
    return twin(assistant.name).engine.generate([request(assistant, n, **options)])[0]


def refusal(response: Any, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Its error, after a look at the shape that every error has."""
    assert response.status_code == status, response.text
    assert len(response.content) < 32 * 1024
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"] and "/work" not in error["message"] and ".py" not in error["message"]
    assert response.headers["x-request-id"] or status in (408, 431)
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return error
