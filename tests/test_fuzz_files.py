"""Damaged files of every kind: bytes flipped, cut, doubled, values of other types. Whatever is in one, it is read, or
refused in one line that can be printed and written; what is read can be rendered, and what is refused kept."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from helpers.templates import CHATML
from helpers.tiny import TEXT
from sftflow.api.rows import Rows, rendering_of
from sftflow.chat.data_files import numbered_rows
from sftflow.chat.format import ChatFormat, choose_format
from sftflow.chat.render import Renderer, RendererSpec
from sftflow.chat.schema import parse_row
from sftflow.chat.tool_format import learn_calls
from sftflow.comparison.prompts import load_prompts
from sftflow.data.documents import read_documents
from sftflow.data.render_pool import Job, render_block
from sftflow.foundation.errors import MaskError, SftflowError
from sftflow.pretraining.tokenizer import train_tokenizer
from sftflow.recipe import load_recipe, to_yaml
from sftflow.tasks import TaskSource, make_task

FOLDER = Path(__file__).parent / "templates"
N_EVERYDAY, N_ALL, SEED = 200, 5_000, 20_260_101

CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"é": [1, True, None, 0.5]}}}
TEXTUAL = {"type": "function", "function": {"name": "f", "arguments": '{"a": {"b": "x\\u00e9"}}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {"a": {}}}}}
U, A = {"role": "user", "content": "What is é?"}, {"role": "assistant", "content": "It is<|im_end|> é.", "weight": 1}
ASKED = {"from": "human", "value": "h"}
ROWS: list[Any] = [
    {"messages": [{"role": "system", "content": "s"}, U, A, U, A], "id": 7},
    {
        "messages": [
            U,
            {"role": "assistant", "content": None, "tool_calls": [CALL, TEXTUAL]},
            {"role": "tool", "content": "r", "tool_call_id": "call00001", "name": "f"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "python", "text": "1+1"}]},
        ],
        "tools": [TOOL],
    },
    [U, A],
    {"prompt": "p", "completion": "c"},
    {"prompt": [U], "completion": [A], "tools": json.dumps([TOOL])},
    {"instruction": "i", "input": "x", "output": "o"},
    {
        "conversations": [
            {"from": "human", "value": "h"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
        ]
    },
    {"conversations": [ASKED, {"from": "gpt", "value": "g"}], "system": "s"},
    {"messages": [U, {**A, "reasoning_content": "hm"}]},
]
TASK_ROWS: dict[str, list[Any]] = {
    "gsm8k": [{"question": "2+3?", "answer": "It is <<2+3=5>>5.\n#### 5"}],
    "jsonl": [{"question": "q", "answer": 18}, {"question": "q", "answer": "b", "choices": ["a", "b"]}],
    "boolq": [{"question": "q", "answer": False}],
    "arc": [{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B", "id": "x"}],
    "mmlu": [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "s"}],
    "ifeval": [
        {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 2, "prompt": "p", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a", "b"]}]},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": "def f(a):\n",
            "canonical_solution": "    return a\n",
            "test": "def check(f):\n    assert f(1) == 1\n",
            "entry_point": "f",
        }
    ],
    "smoltalk": [{"messages": [U, A]}],
}
RECIPE = {
    "base": "builtin:tiny",
    "mixture": [
        {"source": "rows.jsonl", "repeat": 2, "limit": 5},
        {"source": "gsm8k", "path": "x.jsonl"},
        {"source": "spelling"},
    ],
    "identity": {"name": "Ada", "maker": "us"},
    "validation": 0.1,
    "on_bad_row": "skip",
    "train": {"out": "run", "max_length": 128, "lr": 1e-3, "steps": 5, "compile": False},
    "eval": {"tasks": ["spelling", "gsm8k=x.jsonl"], "limit": 5},
}
HOSTILE = (
    "{{ range(10 ** 9) | list }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{% if 1 %}" * 120 + "{% endif %}" * 120,
    "{{ 'a' * 10 ** 15 }}{{ messages }}",
    "{{ 1 / 0 }}",
    "{{ '\\ud83d' }}",
    "{{ messages[0].content[0:'a'] }}",
    "{{ '%s %s' % 1 }}",
    "{% include 'x' %}",
    "{{ strftime_now(5) }}",
    "{{ messages | map(attribute='content') | sum }}",
    "{{ messages | tojson(indent='a') }}{{ {1: 2, 'a': 3} | tojson(sort_keys=true) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception(messages) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
)


def other(rng: random.Random) -> Any:
    """A value of another type."""
    deep: Any = 1
    for _ in range(rng.choice((3, 90, 700))):
        deep = [deep] if rng.random() < 0.5 else {"d": deep}
    few = [
        "",
        "x",
        " \n",
        "\ud83d",
        "\0",
        "{}",
        "[1]",
        "<|im_end|>",
        "a" * 2000,
        '{"a": "\\ud83d"}',
        "{" * 2000,
        "1e999",
    ]
    numbers = [0, 1, -1, 2**70, 10**4400, 1.5, float("nan"), float("inf"), True, False, None]
    return rng.choice([*few, *numbers, [], {}, [[]], {"": None}, {"role": "user"}, deep, [rng.choice(few)]])


def retyped(value: Any, rng: random.Random) -> Any:
    """The value with one place in it changed: another type, a key gone, doubled or renamed."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return other(rng)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return [*value[:i], retyped(value[i], rng), *value[i + rng.choice((0, 1, 1, 1)) :]]
    key = rng.choice(list(value))
    if rng.random() < 0.15:
        return {k: v for k, v in value.items() if k != key}
    if rng.random() < 0.15:
        return {rng.choice(("x", "", "\ud83d", "role", "content")) if k == key else k: v for k, v in value.items()}
    return {**value, key: retyped(value[key], rng)}


def dumped(value: Any, rng: random.Random) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a number too long for Python to write
        return b'{"prompt": "p", "completion": ' + b"1" * 5000 + b"}"


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few of them flipped, cut off, doubled, taken out, or written over."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
        before, here, behind = data[:at], data[at : at + n], data[at + n :]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in here)
        inserted = rng.choice((b"\\ud83d", b"\n", b"\r", b'"', b"[", b"{", b"\xff", b"null")) + here
        changed = rng.choice((flipped, rng.randbytes(len(here)), here * 3, b"", bytes(n), inserted))
        data = before if rng.random() < 0.15 else before + changed + behind
    return data


def rows_file(rows: list[Any], rng: random.Random) -> tuple[str, bytes]:
    """Rows in one of the ways that people keep them, with a type changed, or bytes."""
    rows = list(rows)
    if rng.random() < 0.7:
        i = rng.randrange(len(rows))
        rows[i] = retyped(rows[i], rng)
    kind = rng.choice(("jsonl", "jsonl", "jsonl", "json", "gz", "parquet"))
    if kind == "parquet":
        try:
            sink = io.BytesIO()
            column = pa.array([rng.choice((b"x", "x", 1, 1.5))] * len(rows))
            table = pa.Table.from_pylist([r for r in rows if isinstance(r, dict)][:1] or [{"prompt": "a"}])
            pq.write_table(table.append_column("extra", column[: len(table)]), sink)
            data = sink.getvalue()
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError, KeyError):
            return "rows.parquet", damaged(b"PAR1" + bytes(40) + b"PAR1", rng)
        return "rows.parquet", damaged(data, rng) if rng.random() < 0.6 else data
    lines = [dumped(row, rng) for row in rows]
    data = b"[" + b",\n".join(lines) + b"]" if kind == "json" else b"\n".join(lines) + b"\n"
    data = damaged(data, rng) if rng.random() < 0.5 else data
    if kind == "gz":
        data = gzip.compress(data, mtime=0)
        data = damaged(data, rng) if rng.random() < 0.3 else data
    return {"json": "rows.json", "gz": "rows.jsonl.gz"}.get(kind, "rows.jsonl"), data


class Readers:
    """What reads a file: each takes a random source and a folder, makes a damaged file, and reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = train_tokenizer(TEXT, 400, 256)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|e|>"}
        )
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, ChatFormat(name="own", template=CHATML))
        self.spec: RendererSpec = self.renderer.spec

    def written(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def rows(self, rng: random.Random) -> None:
        path = self.written(*rows_file(ROWS, rng))
        items = list(numbered_rows(str(path)))
        job = Job(self.spec, str(path), 128, "cut", rng.choice(("skip", "skip", "skip", "stop")))
        block = render_block(self.renderer, job, items, -1)
        assert all(not entry["failed"] for entry in block.counts.invariants.values()), block.counts.invariants
        json.loads(json.dumps(block.bad))
        if block.error:
            raise block.error

    def shown(self, rng: random.Random) -> None:
        found = rendering_of(Rows(self.written(*rows_file(ROWS, rng))).conversations(), self.renderer)
        json.dumps(found.to_json(), ensure_ascii=False).encode()
        found.save_html(self.folder / "rows.html")
        assert len(str(found)) and (found.exit_code > 0) == bool(found.refused)

    def tasks(self, rng: random.Random) -> None:
        name = rng.choice(list(TASK_ROWS))
        if name == "mmlu" and rng.random() < 0.5:
            path = self.written("rows.csv", damaged(b"question,A,B,C,D,answer\nq,a,b,c,d,B\n" * 3, rng))
        else:
            path = self.written(*rows_file(TASK_ROWS[name] * 2, rng))
        task = make_task(name, TaskSource(path=str(path), seed=0, limit=rng.choice((None, 1))), "x")
        items = task.items("test")
        conversations = task.conversations("train") if name not in ("ifeval", "humaneval", "mmlu") else []
        for item in items[:2]:
            self.renderer.render(parse_row([m.to_json() for m in item.messages], "x"), add_generation_prompt=True)
            task.grade(item, rng.choice(("", "5", "It is 5.", "\ud83d", "B")))
        for conversation in conversations[:2]:
            self.renderer.render_rows(conversation)

    def prompts(self, rng: random.Random) -> None:
        path = self.written(*rows_file([{"prompt": "p", "id": "x", "kind": "k"}, *ROWS, "a text"], rng))
        found = load_prompts(str(path))
        for prompt in found.prompts:
            json.dumps([prompt.id, prompt.kind, prompt.messages_json(), prompt.plain], ensure_ascii=False).encode()
            self.renderer.render(prompt.conversation, add_generation_prompt=True)

    def documents(self, rng: random.Random) -> None:
        name, data = rows_file([{"text": "once"}, {"text": "upon é"}], rng)
        name = rng.choice(("d.txt", "d.jsonl", "d.jsonl.xz", "d.txt.xz"))
        for text in read_documents(self.written(name, data)):
            text.encode()

    def recipes(self, rng: random.Random) -> None:
        data = retyped(RECIPE, rng) if rng.random() < 0.6 else RECIPE
        text = dumped(data, rng) if rng.random() < 0.3 else self._yaml(data)
        path = self.written("recipe.yaml", damaged(text, rng) if rng.random() < 0.6 else text)
        overrides = rng.choice(([], ["train.steps=3"], ["train=" + text.decode("utf-8", "replace")[:200]]))
        to_yaml(load_recipe(path, overrides)).encode()

    @staticmethod
    def _yaml(data: Any) -> bytes:
        try:
            return str(yaml.safe_dump(data, allow_unicode=True)).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError, yaml.YAMLError):
            return b"mixture: [" + b"[" * 3000

    def templates(self, rng: random.Random) -> None:
        own = [p.read_bytes() for p in sorted(FOLDER.glob("*.jinja"))]
        text = rng.choice(own)
        text = damaged(text, rng).decode("ascii", "ignore").encode() if rng.random() < 0.8 else damaged(text, rng)
        path = self.written("own.jinja", text if rng.random() < 0.8 else rng.choice(HOSTILE).encode())
        renderer = Renderer(self.tokenizer, choose_format(str(path), self.tokenizer))
        renderer.arguments()
        learn_calls(renderer)
        for row in ROWS[:4]:
            with contextlib.suppress(MaskError):
                renderer.render_rows(parse_row(row, "x"))
            renderer.text(parse_row(row, "x"))


READERS: tuple[tuple[Callable[[Readers, random.Random], None], int], ...] = (
    (Readers.rows, 8),
    (Readers.tasks, 4),
    (Readers.shown, 1),
    (Readers.prompts, 2),
    (Readers.documents, 1),
    (Readers.recipes, 3),
    (Readers.templates, 3),
)


def fuzz(folder: Path, numbers: range) -> Counter[tuple[str, bool]]:
    """How many inputs each reader took and refused. An input is its number alone."""
    readers, done = Readers(folder), Counter[tuple[str, bool]]()
    turns = [read for read, weight in READERS for _ in range(weight)]
    for number, read in zip(numbers, itertools.cycle(turns), strict=False):
        try:
            read(readers, random.Random(SEED + number))
        except SftflowError as error:
            line = str(error)
            assert line and "\n" not in line and line.encode() and len(line) < 2_000, (number, line[:300])
            done[read.__name__, False] += 1
        except Exception as error:
            raise AssertionError(f"{read.__name__}, input {number}") from error
        else:
            done[read.__name__, True] += 1
    return done


def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    done = fuzz(tmp_path, range(N_EVERYDAY))
    assert all(done[read.__name__, False] for read, _ in READERS), done


@pytest.mark.slow
def test_five_thousand_damaged_files(tmp_path: Path) -> None:
    done = fuzz(tmp_path, range(N_EVERYDAY, N_ALL))
    assert all(done[read.__name__, taken] for read, _ in READERS for taken in (True, False)), done
