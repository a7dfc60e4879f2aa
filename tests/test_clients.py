"""Clients that others wrote, against `sftflow serve` as a process: curl, the Vercel AI SDK, lm-evaluation-harness.

The AI SDK meets a tiny model that has learnt two conversations by heart, one of them with a tool call. It and the
harness are slow, and skip where what they need is absent; docs/clients.md says how to run them by hand.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from helpers.outside import outside
from helpers.runs import taught
from helpers.serving import served
from helpers.tiny import TEXT
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.pretraining.tokenizer import train_tokenizer

CLIENTS = Path(__file__).parent / "clients"
ROOT = Path(__file__).parents[1]
TOKEN = "A token is a small piece of text that a model reads and writes."
TEMPLATE = """{%- if tools -%}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for c in m.tool_calls or [] -%}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
ROWS = [
    {"messages": [{"role": "user", "content": "What is a token?"}, {"role": "assistant", "content": TOKEN}]},
    {
        "tools": [WEATHER],
        "messages": [
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call00001", "content": "sunny in Paris"},
            {"role": "assistant", "content": "It is sunny in Paris."},
        ],
    },
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 0.1M model with a template that writes tool calls."""
    folder = tmp_path_factory.mktemp("clients") / "base"
    tokenizer = train_tokenizer([*TEXT, *[json.dumps(r) for r in ROWS] * 20], 600, 4096)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    spec = BaseSpec(params="0.1M", context=4096, seed=3)
    build_model(spec, len(tokenizer), tokenizer.bos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_heart(base: Path) -> Path:
    return taught(base, ROWS, base.parent / "run")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped base in its chat format, as a checkpoint: replies of real words, though of no sense."""
    outside("gsm8k", "test.jsonl")
    outside("multiple_choice", "ARC-Easy", "test.jsonl")
    from sftflow.checkpoint import BUILTIN_TINY, prepare, resolve

    folder = tmp_path_factory.mktemp("demo") / "tiny"
    model, tokenizer, _, _ = prepare(resolve(BUILTIN_TINY))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(base: Path) -> Iterator[str]:
    with served(str(base)) as url:
        yield url


def script(*command: str, timeout: float = 60) -> str:
    """What it printed, after it ended well."""
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on the PATH")
def test_curl(address: str) -> None:
    said = script("sh", str(CLIENTS / "curl.sh"), address, "base")
    models, reply, stream, text, error = re.split(r"^# .*$", said, flags=re.M)[1:]
    assert json.loads(models)["data"][0]["id"] == "base"
    whole = json.loads(reply)
    chunks = [json.loads(c) for c in re.findall(r"^data: (\{.*\})$", stream, re.M)]
    assert stream.rstrip().endswith("data: [DONE]")
    pieces = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]
    echoed = json.loads(text)["choices"][0]
    assert echoed["text"].startswith("What is a token?")
    logprobs = echoed["logprobs"]
    assert logprobs["token_logprobs"][0] is None and all(p <= 0 for p in logprobs["token_logprobs"][1:])
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
    body, status = error.strip().rsplit("\n", 1)
    assert status == "404" and json.loads(body)["error"]["code"] == "model_not_found"


def test_curl_shows_a_stream_as_it_comes(address: str) -> None:
    """curl -N prints the first events while the reply is still being computed."""
    if shutil.which("curl") is None:
        pytest.skip("no curl on the PATH")
    body = {"model": "base", "messages": [{"role": "user", "content": "What is a token?"}], "stream": True}
    body |= {"max_tokens": 3000, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    command = ["curl", "-sS", "-N", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json",
               "-d", json.dumps(body)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for _ in range(8):
            process.stdout.readline()
        assert process.poll() is None
        assert replies(address, "running") == 1
    finally:
        process.kill()
        process.wait()


def replies(address: str, state: str) -> int:
    """How many replies are `running` or `waiting`, as /metrics says."""
    told = httpx.get(f"{address}/metrics").text
    return sum(map(int, re.findall(rf"^sftflow_replies_{state}{{.*}} (\d+)$", told, re.M)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on the PATH")
def test_vercel_ai_sdk(by_heart: Path) -> None:
    with served(str(by_heart)) as address:
        said = script("sh", str(CLIENTS / "ai_sdk.sh"), address, "run", timeout=200)
    assert 'ok      a tool round trip: "It is sunny in Paris."' in said
    assert said.rstrip().endswith("all good") and "FAILED" not in said


@pytest.mark.slow
def test_lm_evaluation_harness(demo: Path) -> None:
    python = os.environ.get("HARNESS_PYTHON")
    if not python:
        pytest.skip("set HARNESS_PYTHON to an interpreter that has lm_eval (benchmarks/harness.py tells how)")
    command = [sys.executable, str(ROOT / "benchmarks" / "harness.py"), "--model", str(demo), "--peer-python", python,
               "--gsm8k", "10", "--arc", "30", "--tokens", "48", "--served"]  # fmt: skip
    said = script(*command, timeout=230)
    assert "gsm8k: 10 of 10 answers equal" in said and "arc_easy: 30 of 30 answers equal" in said
    assert said.count("30 items") == 2
