"""llama.cpp in this process (the wheel `xllamacpp`): its tokenizer, its Jinja engine, its logits, greedily decoded.

The wheel runs llama.cpp's own server on a free port of 127.0.0.1 while it is open.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftflow.foundation.errors import ProofError

TOP = 64
"""log-probabilities asked for at each place"""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """tokens: what was generated, without an end token.   logprobs: of the likeliest tokens in the place of each ({id:
    value}; empty where llama.cpp tells none).   stopped: whether llama.cpp took a token for the end."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    stopped: bool


def _unfinished(text: bytes) -> bool:
    """Whether llama.cpp's server takes the text's last character for unfinished: one of the last four bytes leads a
    character that needs more bytes than follow, whatever those are."""
    for back, byte in enumerate(reversed(text[-4:]), 1):
        length = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
        if length > back:
            return True
    return False


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file opened by llama.cpp, on the CPU.

    with LlamaCpp(path, context=512) as engine:
        engine.ids(engine.prompt([{"role": "user", "content": "hi"}]))
    """

    def __init__(self, path: Path, *, context: int) -> None:
        """Raises ProofError where llama.cpp cannot read the file."""
        import xllamacpp

        self._key = secrets.token_hex(16)  # no other program on this machine shall use it
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.n_gpu_layers, params.cpuparams.n_threads = 0, 1
        params.fit_params = False
        params.api_keys = [self._key]
        # Half-precision keys and values are llama.cpp's default; the same numbers as ours need single precision.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ProofError(str(path), f"llama.cpp cannot open it ({error})", "do not trust this file") from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._server = None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer, or the error, as JSON."""
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            answer = json.load(error)
        return answer

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The conversation in the stored template, with the prompt for a reply; or the template's refusal."""
        answer = self.post("/apply-template", {"messages": messages})
        return str(answer["prompt"] if "prompt" in answer else answer["error"]["message"])

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """special: whether strings of control tokens become control tokens."""
        answer = self.post("/tokenize", {"content": text, "add_special": False, "parse_special": special})
        tokens: list[int] = answer["tokens"]
        return tokens

    def greedy(self, ids: list[int], n: int, spell: Callable[[list[int]], list[bytes]]) -> Continuation:
        """At most n likeliest tokens after the ids. spell: the bytes that each of some ids writes.

        llama.cpp tells no log-probabilities of a token that leaves a character unfinished; its place has none.
        """
        body = {
            "prompt": ids,
            "n_predict": n,
            "temperature": 0.0,
            "n_probs": TOP,
            "return_tokens": True,
            "cache_prompt": False,
        }
        answer = self.post("/completion", body)
        if "error" in answer:
            raise ProofError("llama.cpp", str(answer["error"].get("message")), "do not trust this file")
        told = iter(answer.get("completion_probabilities", []))
        logprobs: list[dict[int, float]] = []
        written = b""
        for token, part in zip(answer["tokens"], spell(answer["tokens"]), strict=True):
            written += part
            entry = None if _unfinished(written) else next(told, None)
            if entry is not None and entry["id"] != token:
                entry, told = None, iter(())
            likeliest = entry["top_logprobs"] if entry else []
            # null is what JSON has for a log-probability that is no number
            logprobs.append({t["id"]: math.nan if t["logprob"] is None else t["logprob"] for t in likeliest})
        return Continuation(tokens=answer["tokens"], logprobs=logprobs, stopped=answer.get("stop_type") == "eos")
