"""HumanEval's grade: which code of a reply is run, and that the published solutions pass."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.outside import outside
from sftflow.foundation.errors import SchemaError
from sftflow.tasks import humaneval
from sftflow.tasks.humaneval import HumanEval, body_of, code_of, program_of
from sftflow.tasks.task import Item, TaskSource

ROW = {
    "prompt": 'import math\n\ndef twice(x):\n    return 2 * x\n\n\ndef area(r: float):\n    """Area of a disc."""\n',
    "canonical_solution": "    return math.pi * r**2\n",
    "entry_point": "area",
    "test": "def check(f):\n    assert f(1) == math.pi\n    assert twice(f(2)) == 8 * math.pi, 'twice'\n",
}
RIGHT = "def area(r):\n    return math.pi * r * r"
DOCUMENTED = '''def area(r):
    """Of a disc.

```
area(1)
```
    and so

    ```python
    area(2)
    ```
    """
    return math.pi * r * r'''


@pytest.fixture
def task(tmp_path: Path) -> HumanEval:
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return HumanEval(TaskSource(path=str(path)))


@pytest.fixture
def item(task: HumanEval) -> Item:
    return task.items()[0]


# ---- right replies, however they are written


@pytest.mark.parametrize(
    "reply",
    [
        ROW["prompt"] + ROW["canonical_solution"],
        ROW["canonical_solution"],
        "return math.pi * r**2",
        "if r == 0:\n    return 0\nreturn math.pi * r**2",
        "if r == 0:\n        return 0\n    return math.pi * r**2",
        "for _ in range(3):\n    pass\n    return math.pi * r**2",
        "    return math.pi * r**2\n\nprint(area(1))\nand so on",
        RIGHT,
        f"Sure! Here it is:\n\n```python\n{RIGHT}\n```\n\nIt squares the radius.",
        f"```\n{RIGHT}\n```",
        f"~~~python\n{RIGHT}\n~~~",
        f"````python\n{RIGHT}\n````",
        f"```python\r\n{RIGHT}\r\n```".replace("\n    ", "\r\n    "),
        f"```python\n{RIGHT}",  # cut before the block's end
        "```python\n    return math.pi * r**2\n```",
        f"1. Like this:\n   ```python\n   {RIGHT.replace(chr(10), chr(10) + '   ')}\n   ```",
        f"```python\n{RIGHT}\n```\nUse it so:\n```python\nprint(area(2))\n```",
        f"First try:\n```python\ndef area(r): return 3\n```\nBetter:\n```python\n{RIGHT}\n```",
        f"Of course.\n{RIGHT}\nThis is the area.",
        f"Of course.\nfrom math import pi\n\n{RIGHT}\n\n# a check\nassert area(0) == 0\n\nThis is the area.",
        f"```python\n{RIGHT}\n\nif __name__ == '__main__':\n    print(area(float(input())))\n```",
        f"```python\nfrom __future__ import annotations\n{RIGHT}\n```",
        "```python\narea = lambda r: math.pi * r * r\n```",
        f"```python\ndef check(f):\n    raise ValueError\n\n{RIGHT}\n```",
        f"```python\n{DOCUMENTED}\n```\nThat is all.",
        f"Like this:\n\n```python\n{DOCUMENTED}\n```\nand to try it:\n```\nprint(area(1))\n```",
        f"```python\n{DOCUMENTED}",
        DOCUMENTED,
        f'The marks are """ here.\n```python\n{RIGHT}\n```',
        f"<think>\n```python\ndef area(r):\n    return 3\n```\n</think>\n{RIGHT}",
        f"Is it 3?\ndef area(r):\n    return 3\n</think>\n\n```python\n{RIGHT}\n```",
        "<think>The body alone.</think>\n\n    return math.pi * r**2",
    ],
)
def test_right_replies(task: HumanEval, item: Item, reply: str) -> None:
    assert (task.grade(item, reply), task.details(item, reply)) == (1.0, {"outcome": "passed", "error": ""})


@pytest.mark.parametrize(
    "reply, outcome, error",
    [
        ("", "failed", "AssertionError"),
        ("I do not know.", "failed", "SyntaxError: invalid syntax"),
        ("```python\n```", "failed", "AssertionError"),
        ("    return 3", "failed", "AssertionError"),
        ("```python\nprint(3)\n```", "failed", "AssertionError"),
        ("def area(r):\n    return math.pi if r == 1 else 0", "failed", "AssertionError: twice"),
        ("import sys\nsys.exit(0)\n" + RIGHT, "exited", "SystemExit: 0"),
        (RIGHT + "\nimport os\nos._exit(0)", "exited", ""),
        ("import os\ndef area(r):\n    os.system('true')", "refused", "Refused: a process (os.system)"),
        ("def area(r):\n    return [0] * 10**10", "memory", "MemoryError"),
        ("def area(r):\n    while True: pass", "timeout", ""),
        ("<think>" + RIGHT, "failed", "AssertionError"),
    ],
)
def test_wrong_replies(
    task: HumanEval, item: Item, reply: str, outcome: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(humaneval, "SECONDS", 1.0)
    marks = task.details(item, reply)
    assert task.grade(item, reply) == 0.0
    assert (marks["outcome"], marks["error"][: len(error)]) == (outcome, error), marks
    assert error or not marks["error"]


def test_code_of() -> None:
    assert code_of("Sure:\n```python\ndef f(x):\n    return x\n```\nDone.", "f") == "def f(x):\n    return x\n"
    assert code_of("```python\na\n```\n```\nb\n```", "f") == "b\n"
    assert code_of("Here it is:\ndef f(x):\n    return x\nIt returns x.", "f") == "def f(x):\n    return x"
    assert code_of("def f_2(x): ...", "f") == "def f_2(x): ..."


def test_body_of() -> None:
    assert body_of("    return x\n\nprint(f(1))") == "    return x\n"
    assert body_of("return x") == "    return x"


def test_the_program() -> None:
    assert program_of("    return 2 * x", "import re\n\ndef f(x):\n", "f", "def check(g):\n    assert g(1) == 2") == (
        '__name__ = "humaneval"\nimport re\n\ndef f(x):\n    return 2 * x\n\n'
        "def check(g):\n    assert g(1) == 2\n\ncheck(f)\n"
    )


# ---- one run a reply


def test_score_and_marks_are_one_run(task: HumanEval, item: Item) -> None:
    reply = "import os\ndef area(r):\n    raise ValueError(os.urandom(8).hex())"
    with ThreadPoolExecutor(4) as pool:
        marks = list(pool.map(lambda _: (task.grade(item, reply), task.details(item, reply)["error"]), range(8)))
    assert len(set(marks)) == 1
    assert marks[0][0] == 0.0 and marks[0][1].startswith("ValueError: ")


def test_a_reply_long_ago_is_run_again(task: HumanEval, item: Item, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "KEPT", 1)
    reply = "import os\ndef area(r):\n    raise ValueError(os.urandom(8).hex())"
    first = task.details(item, reply)
    assert task.details(item, reply) == first
    assert task.grade(item, RIGHT) == 1.0
    assert task.details(item, reply) != first


def test_it_says_that_it_runs_code() -> None:
    assert HumanEval.runs_code


def test_an_entry_point_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({**ROW, "entry_point": "f) or print("}) + "\n")
    with pytest.raises(SchemaError) as caught:
        HumanEval(TaskSource(path=str(path))).items()
    assert str(caught.value) == (
        f"{path}:1: entry_point 'f) or print(' is no function's name; write the function's name"
    )


# ---- the published set


def published() -> tuple[HumanEval, list[Item], list[dict[str, Any]]]:
    path = outside("humaneval", "HumanEval.jsonl.gz")
    task = HumanEval(TaskSource(path=str(path)))
    with gzip.open(path, "rt") as f:
        rows = [json.loads(line) for line in f]
    return task, task.items(), rows


def scores(task: HumanEval, items: list[Item], replies: list[str]) -> list[float]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(task.grade, items, replies))


def test_a_sample_of_the_published_solutions_passes() -> None:
    task, items, _ = published()
    assert len(items) == 164
    whole = [c.messages[1].text for c in task.conversations()]
    assert scores(task, items[3::8], whole[3::8]) == [1.0] * 21


def test_no_empty_solution_passes() -> None:
    task, items, _ = published()
    assert sum(scores(task, items[::12], ["    pass"] * 14)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("style", ["whole", "body", "stripped", "fenced body", "function alone"])
def test_all_published_solutions_pass(style: str) -> None:
    task, items, rows = published()
    replies = []
    for row in rows:
        body, start = row["canonical_solution"], row["prompt"].rindex(f"def {row['entry_point']}")
        replies.append(
            {
                "whole": f"```python\n{row['prompt']}{body}```",
                "body": body,
                "stripped": body.strip(),
                "fenced body": f"```python\n{body}```",
                "function alone": f"Here it is:\n\n{row['prompt'][start:]}{body}\nIt is right.",
            }[style]
        )
    assert scores(task, items, replies) == [1.0] * 164
