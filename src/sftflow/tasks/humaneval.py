"""HumanEval: complete a Python function; a reply is right where the row's own tests pass (pass@1).

Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.
"""

from __future__ import annotations

import keyword
import platform
import re
import textwrap
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import SchemaError
from sftflow.sandbox import Outcome, isolation_available, run_python
from sftflow.tasks.answers import answer_of
from sftflow.tasks.task import Item, Task, TaskSource, ask, make_item, rows_of, sample, text_of

SHAPE = '{"prompt": ..., "canonical_solution": ..., "test": ..., "entry_point": ...}'
SECONDS = 10.0
KEPT = 1024  # outcomes remembered, so that a reply's score and its details are one run
FENCE = re.compile(r"^[ \t]*(```+|~~~+)[^`\n]*$", re.M)
QUOTES = re.compile(r'"""|\'\'\'')
FUTURE = re.compile(r"^from __future__ import .*$", re.M)
# An unindented line that may be code: a keyword, an assignment, a call, a decorator, a comment, a closing bracket.
CODE_LINE = re.compile(
    r"(?:def|class|from|import|async|if|for|while|try|except|else|elif|finally|with|assert|print)\b"
    r"|[\w.]+ *[-+*/|&]?=|[\w.]+\(|[@#)\]}\"']"
)


@dataclass
class _Graded:
    """One reply's run, made by the first thread that asks; the others wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcome: Outcome | None = None


class HumanEval(Task):
    """The published HumanEval.jsonl (or .jsonl.gz), or any set with its columns."""

    name = "humaneval"
    max_new_tokens = 512
    runs_code = True
    plain_stops = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # as in the paper: what follows the function
    plain_paragraph = False

    def __init__(self, source: TaskSource) -> None:
        super().__init__(source)
        self._lock = threading.Lock()
        self._graded: OrderedDict[tuple[str, str], _Graded] = OrderedDict()

    def conversations(self, split: str = "train") -> list[Conversation]:
        return sample(self, (self._conversation(place, row) for place, row in rows_of(self, split)))

    def items(self, split: str = "test") -> list[Item]:
        return sample(self, (self._item(place, row) for place, row in rows_of(self, split)))

    def grade(self, item: Item, reply: str) -> float:
        """1.0 where the reply's function passes the item's tests in a sandbox. May be called from many threads."""
        return float(self._outcome(item, reply).ok)

    def details(self, item: Item, reply: str) -> dict[str, Any]:
        """{"outcome": "failed", "error": "AssertionError"}"""
        outcome = self._outcome(item, reply)
        said = [] if outcome.ok else outcome.output.strip().splitlines()
        return {"outcome": outcome.how, "error": said[-1][:300] if said else ""}

    def provenance(self) -> dict[str, str]:
        return {"sandbox": ", ".join(isolation_available()[:1]) or "none", "python": platform.python_version()}

    def _outcome(self, item: Item, reply: str) -> Outcome:
        key = (item.id, reply)
        with self._lock:
            graded = self._graded.setdefault(key, _Graded())
            self._graded.move_to_end(key)
            if len(self._graded) > KEPT:
                self._graded.popitem(last=False)
        with graded.lock:
            if graded.outcome is None:
                graded.outcome = run_python(program_of(reply, **item.answer), seconds=SECONDS)
            return graded.outcome

    def _conversation(self, place: str, row: Any) -> Conversation:
        code = text_of(row, "prompt", place, SHAPE)
        whole = code + text_of(row, "canonical_solution", place, SHAPE)
        return ask(question(code), fenced(whole), place)

    def _item(self, place: str, row: Any) -> Item:
        """answer: what the grader runs: {"prompt", "entry_point", "test"}."""
        answer = {key: text_of(row, key, place, SHAPE) for key in ("prompt", "entry_point", "test")}
        entry = answer["entry_point"]
        if not entry.isidentifier() or keyword.iskeyword(entry):
            raise SchemaError(place, f"entry_point {entry!r} is no function's name", "write the function's name")
        asked = question(answer["prompt"])
        return make_item(self.id_of(place), asked, answer, plain_text=answer["prompt"])


def program_of(reply: str, prompt: str, entry_point: str, test: str) -> str:
    """The program whose last line is reached where the reply is right.

    A reply with the whole function stands after what the prompt has before that function: imports and helpers, which
    tests call, too. A reply with the body alone stands after the prompt.
    """
    code = code_of(reply, entry_point)
    if defines(code, entry_point):
        found = re.search(rf"^(?:async )?def {entry_point}\b", prompt, re.M)
        code = (prompt[: found.start()] if found else "") + code
    else:
        code = prompt.rstrip() + "\n" + body_of(code)
    # `from __future__` stands first or nowhere. The name keeps what is below `if __name__ == "__main__"` from running.
    future = "".join(f"{line}\n" for line in dict.fromkeys(FUTURE.findall(code)))
    return f'{future}__name__ = "{HumanEval.name}"\n{FUTURE.sub("", code)}\n\n{test}\n\ncheck({entry_point})\n'


def defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:(?:async )?def {name}\b|{name} *=)", code, re.M) is not None


def code_of(reply: str, entry_point: str) -> str:
    r"""The code of a reply: its last block that defines the function, else its last block, else its text.

    "Sure:\n```python\ndef f(x):\n    return x\n```\nDone."  ->  "def f(x):\n    return x\n"
    """
    reply = answer_of(reply).replace("\r\n", "\n")
    blocks = blocks_of(reply, entry_point)
    whole = [code for code in map(textwrap.dedent, blocks) if defines(code, entry_point)]
    if blocks:
        return (whole or blocks)[-1]
    return without_prose(reply, entry_point) if defines(reply, entry_point) else reply


def blocks_of(text: str, entry_point: str) -> list[str]:
    """What stands in Markdown's fenced blocks; the last may lack its end. A fence inside a docstring, of a block or of
    a function that stands outside any, is the docstring's own."""
    blocks: list[str] = []
    fences, end = list(FENCE.finditer(text)), 0
    for n, opening in enumerate(fences):
        before = text[end : opening.start()]
        if opening.start() < end or (defines(before, entry_point) and in_docstring(before)):
            continue
        start = min(opening.end() + 1, len(text))
        closing = (fence for fence in fences[n + 1 :] if fence.group().strip() == opening[1])
        first = next(closing, None)
        outside = (
            fence for fence in chain([first], closing) if fence and not in_docstring(text[start : fence.start()])
        )
        last = next(outside, None) or (first if in_docstring(text[start:]) else None)
        blocks.append(text[start : last.start() if last else len(text)])
        end = last.end() if last else len(text)
    return blocks


def in_docstring(code: str) -> bool:
    """Whether code ends inside a triple-quoted string."""
    opened = ""
    for quotes in QUOTES.findall(code):
        opened = quotes if not opened else "" if quotes == opened else opened
    return bool(opened)


def without_prose(text: str, entry_point: str) -> str:
    r"""Code that stands among sentences, outside any block.

    "Here it is:\ndef f(x):\n    return x\nIt returns x."  ->  "def f(x):\n    return x"
    """
    lines = text.split("\n")
    first = next((k for k, line in enumerate(lines) if re.match(r"(?:def|class|from|import|async)\b|@", line)), 0)
    kept: list[str] = []
    for line in lines[first:]:
        if line[:1].strip() and not CODE_LINE.match(line) and not in_docstring("\n".join(kept)):
            if defines("\n".join(kept), entry_point):
                break
            continue
        kept.append(line)
    return "\n".join(kept).rstrip()


def body_of(code: str) -> str:
    r"""A function's body at its place, up to the first line that no longer belongs to it.

    "    return x\n\nprint(f(1))"  ->  "    return x\n"        "return x"  ->  "    return x"
    """
    lines = code.strip("\n").rstrip().split("\n")
    first, rest = lines[0], [line for line in lines[1:] if line.strip()]
    if first[:1].strip():
        # A reply's text is often stripped, which takes the indentation of its first line alone.
        indents = [len(line) - len(line.lstrip()) for line in rest]
        alone = not rest or (min(indents) >= 4 and not (first.endswith(":") and indents[0] <= 4))
        if not alone:
            return textwrap.indent("\n".join(lines), "    ")
        lines[0] = "    " + first
    end = next((k for k, line in enumerate(lines) if line[:1].strip()), len(lines))
    return "\n".join(lines[:end])


def question(code: str) -> str:
    return f"Complete this Python function. Reply with the whole function.\n\n{fenced(code)}"


def fenced(code: str) -> str:
    """Code in a Markdown block, as assistants write it and as the grader reads it."""
    return f"```python\n{code.rstrip()}\n```"
