"""Real sets: loaders and graders on small rows of our own, then on the published files where they lie beside us."""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.outside import each, outside
from sftflow.chat.schema import Conversation, Part
from sftflow.foundation.errors import DataError, SchemaError, SftflowError, TaskError
from sftflow.tasks import make_task
from sftflow.tasks.gsm8k import Gsm8k, split_marks
from sftflow.tasks.humaneval import HumanEval
from sftflow.tasks.mmlu import Mmlu
from sftflow.tasks.multiple_choice import MultipleChoice, first_letter, prompt
from sftflow.tasks.smoltalk import SmolTalk
from sftflow.tasks.task import Item, Task, TaskSource

ALL: tuple[type[Task], ...] = (Gsm8k, Mmlu, MultipleChoice, HumanEval, SmolTalk)

PENS = {
    "question": "Mia packs 3 boxes of 14 pens and keeps 2. How many pens does she send?",
    "answer": "The boxes hold 3*14 = <<3*14=42>>42 pens.\nShe sends <<42-2=40>>40.\n#### 40",
}
WREN = {
    "question": "Which one flies?",
    "choices": {"text": ["a mole", "a wren", "a pike"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}


def real(path: str) -> str:
    return str(outside(*path.split("/")))


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parts_of(conversation: Conversation) -> list[tuple[str, str]]:
    return [(part.kind, part.text) for part in conversation.messages[-1].parts]


def error_of(kind: type[SftflowError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# ---- gsm8k


def test_gsm8k_marks_become_calculator_parts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pens.jsonl", PENS)
    (conversation,) = Gsm8k(TaskSource(path=path)).conversations()
    assert conversation.source == f"{path}:1"
    assert conversation.messages[0].text == PENS["question"]
    assert parts_of(conversation) == [
        ("text", "The boxes hold 3*14 = "),
        ("python", "3*14"),
        ("python_output", "42"),
        ("text", "42 pens.\nShe sends "),
        ("python", "42-2"),
        ("python_output", "40"),
        ("text", "40.\n#### 40"),
    ]


def test_gsm8k_result_is_the_marks_own() -> None:
    """A wrong mark is kept as published: the right-hand side is data, not something to recompute."""
    assert split_marks("<<2+2=5>>5\n#### 5", "x:1")[:2] == (Part("python", "2+2"), Part("python_output", "5"))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("40", 1),
        ("She sends 40 pens.", 1),
        ("40 or 42", 0),
        ("#### 40", 1),
        ("#### $40.00", 1),
        ("#### 40 of the 42", 1),
        ("it is 42\n#### 40", 1),
        ("it is 40\n#### 42", 0),
        ("#### 42\nno:\n#### 40", 1),
        ("It is 40. ####", 1),
        ("forty", 0),
        ("", 0),
    ],
)
def test_gsm8k_grade(tmp_path: Path, reply: str, score: float) -> None:
    task = Gsm8k(TaskSource(path=jsonl(tmp_path / "pens.jsonl", PENS)))
    (item,) = task.items()
    assert (item.id, item.answer, item.choices, task.max_new_tokens) == ("gsm8k:1", "40", (), 256)
    assert task.grade(item, reply) == score


@pytest.mark.parametrize(
    ("gold", "reply", "strict", "flexible"),
    [
        ("1,080", "#### 1,080", 1, 1),
        ("1,080", "He earned $1,080.", 0, 1),
        ("1,080", "#### $1,080.00.", 1, 1),
        ("1,080", "#### 1.080", 0, 0),  # a point is a decimal point
        ("72", "#### 72.0", 1, 1),
        ("72", "#### 72.", 1, 1),
        ("72", "#### 72%", 1, 1),
        ("72", "#### 72 clips", 1, 1),
        ("72", "####72", 1, 1),
        ("72", "#### 72 of the 80", 1, 0),
        ("72", "#### **72**", 0, 1),
        ("72", "72 clips\n#### 70", 0, 0),
        ("72", "#### 70\nno: 72", 0, 1),
        ("72", "#### 70\n#### 72\n####", 1, 1),
        ("-5", "#### -5", 1, 1),
        ("-5", "#### $-5.00", 1, 1),
        ("-5", "it is -5 degrees", 0, 1),
        ("-5", "#### 5", 0, 0),
        ("72", "", 0, 0),
    ],
)
def test_gsm8k_marks(tmp_path: Path, gold: str, reply: str, strict: int, flexible: int) -> None:
    row = {"question": "How many?", "answer": f"So it is.\n#### {gold}"}
    task = Gsm8k(TaskSource(path=jsonl(tmp_path / "sums.jsonl", row)))
    (item,) = task.items()
    marks = task.details(item, reply)
    assert marks == {"strict": strict, "flexible": flexible}
    assert task.grade(item, reply) >= marks["strict"]
    assert task.metrics([marks, {"strict": 1.0, "flexible": 0.0}]) == {
        "strict": (strict + 1) / 2,
        "flexible": flexible / 2,
    }


@given(st.text(alphabet="123456789 #$%\nab"))
def test_gsm8k_grade_is_strict_where_there_is_a_mark_else_flexible(reply: str) -> None:
    """As long as numbers are written in one way, and no `####` is a heading's."""
    task, item = Gsm8k(TaskSource()), Item(id="x", messages=(), answer="7")
    marks, marked = task.details(item, reply), re.search(r"####\s*\$?\s*\d", reply)
    assert task.grade(item, reply) == marks["strict" if marked else "flexible"]


def test_gsm8k_thousands_commas(tmp_path: Path) -> None:
    row = {"question": "How far?", "answer": "That is <<1000*1.08=1080>>1080 m.\n#### 1,080"}
    task = Gsm8k(TaskSource(path=jsonl(tmp_path / "far.jsonl", row)))
    (item,) = task.items()
    assert item.answer == "1080"
    assert [task.grade(item, r) for r in ("1080", "1,080 m", "#### 1,080.0", "#### 1,08")] == [1, 1, 1, 0]
    assert parts_of(task.conversations()[0])[-1] == ("text", "1080 m.\n#### 1,080")


PLAIN = st.text(alphabet=st.characters(exclude_characters="<>", exclude_categories=["Cs"]))
SIDE = st.text(alphabet="0123456789+-*/(). ", min_size=1)


@given(st.lists(st.tuples(PLAIN, SIDE, SIDE)), PLAIN)
def test_gsm8k_split_loses_nothing(marks: list[tuple[str, str, str]], tail: str) -> None:
    """Parts written back as marks give the answer, and no part is empty."""
    answer = "".join(f"{text}<<{call}={output}>>" for text, call, output in marks) + tail
    parts = split_marks(answer, "x:1")
    shape = {"text": "{}", "python": "<<{}", "python_output": "={}>>"}
    assert "".join(shape[part.kind].format(part.text) for part in parts) == answer
    assert all(part.text for part in parts)


# ---- multiple choice


def test_multiple_choice_maps_labels_to_letters(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "birds.jsonl", WREN)
    task = MultipleChoice(TaskSource(path=path))
    (item,), (conversation,) = task.items(), task.conversations()
    asked = "Which one flies?\nA. a mole\nB. a wren\nC. a pike\nAnswer with the letter only."
    assert (item.id, item.answer, item.choices) == ("arc:1", "B", ("A", "B", "C"))
    assert item.messages[0].text == conversation.messages[0].text == asked
    assert (parts_of(conversation), conversation.source) == ([("text", "B")], f"{path}:1")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("A.", "A"),
        ("(A)", "A"),
        ("'A'", "A"),
        ("**A**", "A"),
        ("Answer: A", "A"),
        ("Answer: C\nB would be wrong", "C"),
        ("A mole is blind, so B.", "B"),
        ("A is right, and B is not.", "A"),
        ("A mole.", "A"),
        ("a", None),
        ("D", None),
        ("Bees fly", None),
        ("B's", None),
        ("B2", None),
        ("", None),
    ],
)
def test_first_letter(reply: str, letter: str | None) -> None:
    assert first_letter(reply, ("A", "B", "C")) == letter
    item = Item(id="x", messages=(), answer="A", choices=("A", "B", "C"))
    assert MultipleChoice(TaskSource()).grade(item, reply) == (letter == "A")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("I", "I"),
        ("I.", "I"),
        ("(I) a wren", "I"),
        ("The answer is I because wrens sing.", "I"),
        ("I think the answer is B.", "B"),
        ("I'd say (D), not A.", "D"),
        ("I do not know.", None),
        ("B, I think", "B"),
        (r"I would choose \boxed{I}", "I"),
        ("J", "J"),
        ("K", None),
    ],
)
def test_the_pronoun_is_no_letter(reply: str, letter: str | None) -> None:
    assert first_letter(reply, tuple("ABCDEFGHIJ")) == letter


PRO = {"question": "Which one sings?", "options": [f"bird {n}" for n in range(10)], "answer": "I", "answer_index": 8}


def test_mmlu_pro(tmp_path: Path) -> None:
    rows = [
        PRO | {"category": "biology"},
        PRO | {"options": ["a", "b", "c", "N/A", "N/A"], "answer": "B", "answer_index": 1},
    ]
    task = make_task("mmlu_pro", TaskSource(path=jsonl(tmp_path / "test.jsonl", *rows)))
    ten, three = task.items()
    assert (ten.choices, ten.answer, three.choices) == (tuple("ABCDEFGHIJ"), "I", ("A", "B", "C"))
    assert "\nJ. bird 9\nAnswer with" in ten.messages[0].text and task.grade(ten, "I") == 1
    assert task.conversations()[0].messages[-1].text == "I"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": "abc"}, "no texts under 'options'; write"),
        ({"options": ["a"]}, "the number of options is 1; give 2 to 26"),
        ({"answer_index": 10}, "answer_index 10 is none of its 10 options; correct it"),
        ({"answer_index": None, "answer": "K"}, "answer 'K' is none of its 10 options; correct it"),
        ({"answer": "A"}, "answer 'A', but answer_index 8 is I; correct one"),
    ],
)
def test_a_bad_row_of_mmlu_pro(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "test.jsonl", PRO | change)
    assert error_of(SchemaError, make_task("mmlu_pro", TaskSource(path=path)).items).startswith(f"{path}:1: {said}")


def mmlu_folder(root: Path) -> Path:
    for split, answer in (("dev", "C"), ("test", "1")):
        (root / split).mkdir(parents=True)
        text = f'"Which is ""even""?\nOne of these.",1,"3, or 5",4,7,{answer}\nHow many?,1,2,3,4,{answer}\n'
        if split == "test":
            text = "question,choice0,choice1,choice2,choice3,answer\n" + text
        (root / split / f"counting_{split}.csv").write_text(text, encoding="utf-8")
    return root


def test_mmlu_reads_letters_numbers_headers_and_long_cells(tmp_path: Path) -> None:
    root = mmlu_folder(tmp_path / "mmlu")
    task = Mmlu(TaskSource(path=str(root)))
    train, items = task.conversations(), task.items()
    assert [c.source for c in train] == [f"{root}/dev/counting_dev.csv:{line}" for line in (1, 3)]
    assert [c.messages[-1].text for c in train] == ["C", "C"]
    assert [i.id for i in items] == ["mmlu:counting_test:2", "mmlu:counting_test:4"]
    assert [(i.answer, i.choices) for i in items] == [("B", ("A", "B", "C", "D"))] * 2
    assert items[0].messages[0].text == prompt('Which is "even"?\nOne of these.', ["1", "3, or 5", "4", "7"])


def test_mmlu_folder_of_files_is_its_own_split(tmp_path: Path) -> None:
    """Test files given as the path are never trained on by default: split train wants dev files."""
    root = mmlu_folder(tmp_path)
    task = Mmlu(TaskSource(path=str(root / "test")))
    assert len(task.items()) == 2
    assert error_of(TaskError, task.conversations) == (
        f"mmlu: no dev files in {root}/test; give a folder with dev/SUBJECT_dev.csv"
    )
    assert len(Mmlu(TaskSource(path=str(root / "test" / "counting_test.csv"))).items()) == 2


def test_mmlu_hub_rows(tmp_path: Path) -> None:
    row = {"question": "How many?", "subject": "counting", "choices": ["1", "2", "3", "4"], "answer": 3}
    task = Mmlu(TaskSource(path=jsonl(tmp_path / "rows.jsonl", row)))
    assert [(i.id, i.answer) for i in task.items()] == [("mmlu:1", "D")]


def test_a_set_s_split_is_the_one_asked_for(tmp_path: Path) -> None:
    splits = ("train", "test", "extra")
    for split in splits:
        row = {**PENS, "question": f"{split}: {PENS['question']}"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    task = Gsm8k(TaskSource(path=f"hub:{tmp_path}"))
    (row,), (item,) = task.conversations(), task.items()
    assert row.messages[0].text.startswith("train: ") and row.source == f"{tmp_path}/train.jsonl:1"
    assert item.messages[0].text.startswith("test: ") and item.id == "gsm8k:test.jsonl:1"
    (extra,) = Gsm8k(TaskSource(path=f"hub:{tmp_path}:extra")).items()
    assert extra.messages[0].text.startswith("extra: ")


# ---- humaneval, smoltalk

DOUBLE = {
    "task_id": "own/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(f):\n    assert f(2) == 4\n",
    "entry_point": "double",
}


@pytest.mark.parametrize("name", ["code.jsonl", "code.jsonl.gz"])
def test_humaneval(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = (json.dumps(DOUBLE) + "\n").encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    task = HumanEval(TaskSource(path=str(path)))
    (conversation,), (item,) = task.conversations(), task.items()
    asked, replied = (message.text for message in conversation.messages)
    head = 'def double(x):\n    """Twice x."""\n'
    assert asked == f"Complete this Python function. Reply with the whole function.\n\n```python\n{head}```"
    assert replied == f"```python\n{head}    return 2 * x\n```"
    assert (conversation.source, item.id, item.messages[0].text) == (f"{path}:1", "humaneval:1", asked)
    assert item.answer == {key: DOUBLE[key] for key in ("prompt", "entry_point", "test")}
    assert task.grade(item, replied) == 1.0
    assert item.plain == DOUBLE["prompt"] and "\n\n" not in task.plain_stops


def test_smoltalk_is_for_training_only(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yo"}]} for n in "abc"]
    path = jsonl(tmp_path / "talk.jsonl", *rows)
    task = SmolTalk(TaskSource(path=path))
    assert [(c.source, c.messages[0].text) for c in task.conversations()] == [
        (f"{path}:{line}", f"{n}?") for line, n in enumerate("abc", 1)
    ]
    fact = "smoltalk: its replies have no grader, it is for training only; leave it out of the tasks that are asked"
    assert error_of(TaskError, task.items) == fact
    assert error_of(TaskError, lambda: task.grade(Item(id="x", messages=(), answer=None), "yo")) == fact


# ---- limits, for every task


def test_limit_takes_a_seeded_sample_in_file_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "sums.jsonl", *({"question": f"{n}?", "answer": f"#### {n}"} for n in range(50)))

    def lines(limit: int | None, seed: int = 0) -> list[int]:
        task = Gsm8k(TaskSource(path=path, limit=limit, seed=seed))
        found = [int(item.id.removeprefix("gsm8k:")) for item in task.items()]
        assert [c.source for c in task.conversations()] == [f"{path}:{line}" for line in found]
        return found

    everything = list(range(1, 51))
    assert lines(None) == lines(50) == lines(51) == everything
    ten = lines(10)
    assert len(ten) == 10 and ten == sorted(ten) == lines(10)
    assert ten != everything[:10] and ten != lines(10, seed=1)
    assert set(ten) < set(lines(20))  # a larger limit keeps a smaller one's rows
    assert len(lines(1)) == 1 and lines(0) == []


# ---- errors, word for word


@pytest.mark.parametrize("kind", ALL)
def test_a_missing_path(kind: type[Task]) -> None:
    name = kind.name
    assert error_of(TaskError, lambda: kind(TaskSource()).conversations()) == (
        f"{name}: it needs a path; write {name}=PATH"
    )


@pytest.mark.parametrize("kind", ALL)
def test_a_path_that_is_not_there(kind: type[Task], tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl.gz")
    said = error_of(DataError, lambda: kind(TaskSource(path=missing)).conversations())
    assert said.startswith(f"{missing}: no such file")


GSM8K_SHAPE = 'write {"question": ..., "answer": "... #### 72"}'
CHOICE_SHAPE = 'write {"question": ..., "choices": {"text": [...], "label": [...]}, "answerKey": ...}'


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        (Gsm8k, {"question": "How many?"}, f"no text under 'answer'; {GSM8K_SHAPE}"),
        (Gsm8k, {"question": " ", "answer": "#### 1"}, f"no text under 'question'; {GSM8K_SHAPE}"),
        (Gsm8k, ["How many?"], f"no text under 'question'; {GSM8K_SHAPE}"),
        (
            Gsm8k,
            {"question": "How many?", "answer": "40 pens"},
            "the answer does not end in '#### NUMBER'; end it with a line such as #### 72",
        ),
        (
            Gsm8k,
            {"question": "How many?", "answer": "<<40>>40\n#### 40"},
            "a calculator mark that is not <<CALL=RESULT>>; write it like <<48/2=24>>",
        ),
        (
            MultipleChoice,
            WREN | {"choices": ["a", "b"]},
            f"no lists under choices.text and choices.label; {CHOICE_SHAPE}",
        ),
        (MultipleChoice, WREN | {"answerKey": "4"}, "answerKey '4' is not one of 1, 2, 3; correct it"),
        (
            MultipleChoice,
            WREN | {"choices": {"text": ["a", "b"], "label": ["A"]}},
            "2 choices but 1 labels; give every choice one label",
        ),
        (
            MultipleChoice,
            WREN | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}},
            "labels repeat (A, A); give every choice its own label",
        ),
        (
            MultipleChoice,
            WREN | {"choices": {"text": ["a"] * 27, "label": list(range(27))}},
            "the number of choices is 27; give 2 to 26",
        ),
        (
            MultipleChoice,
            WREN | {"choices": {"text": ["a", 2], "label": ["A", "B"]}},
            "a choice that is not a text; make every choice a string",
        ),
        (
            Mmlu,
            {"question": "How many?", "choices": ["1", "2", "3"], "answer": 0},
            'no four texts under \'choices\'; write {"question": ..., "choices": [four texts], "answer": 0..3}',
        ),
        (
            Mmlu,
            {"question": "How many?", "choices": ["1", "2", "3", "4"], "answer": 4},
            "answer '4' is neither a letter A to D nor 0 to 3; correct it",
        ),
        (
            SmolTalk,
            {"note": "yo"},
            "no conversation in its keys ('note'); give messages, or name its columns: "
            "columns: {ONE: prompt, OTHER: completion}",
        ),
    ],
)
def test_a_bad_row_names_its_line(kind: type[Task], row: Any, said: str, tmp_path: Path) -> None:
    good = {
        Gsm8k: PENS,
        MultipleChoice: WREN,
        Mmlu: {"question": "How many?", "choices": ["1", "2", "3", "4"], "answer": 0},
        SmolTalk: {"prompt": "hi", "completion": "yo"},
    }
    path = jsonl(tmp_path / "rows.jsonl", good[kind], row)
    # found even where the limit would not take the row
    assert error_of(SchemaError, kind(TaskSource(path=path, limit=1)).conversations) == f"{path}:2: {said}"


@pytest.mark.parametrize("kind", ALL)
def test_a_line_that_is_not_json(kind: type[Task], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n{nonsense\n", encoding="utf-8")
    assert error_of(DataError, kind(TaskSource(path=str(path))).conversations) == (
        f"{path}:2: not JSON (Expecting property name enclosed in double quotes at column 2); fix or remove the line"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1?,1,2,3,4,A\n2?,1,2,3,B\n", ":2: the number of columns is 5, not 6; write question,A,B,C,D,answer"),
        (
            '"1\n?",1,2,3,4,A\n"2?",1,2,3,4,E\n',
            ":3: answer 'E' is neither a letter A to D nor 0 to 3; correct it",
        ),
        (",1,2,3,4,A\n", ":1: the question is empty; write question,A,B,C,D,answer"),
    ],
)
def test_mmlu_bad_csv_rows(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "counting_test.csv"
    path.write_text(text, encoding="utf-8")
    assert error_of(SchemaError, Mmlu(TaskSource(path=str(path))).items) == f"{path}{said}"


def test_humaneval_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(DOUBLE) + "\n").encode() * 99)[:-12])
    said = error_of(DataError, HumanEval(TaskSource(path=str(path))).items)
    assert said.startswith(f"{path}: cannot be unpacked (") and said.endswith("; download it again")


# ---- the published files


def arithmetic(call: str) -> Fraction | None:
    """The exact value of digits and + - * / ( ), by our own few lines; None where the call is something else."""
    if not re.fullmatch(r"[\d.+\-*/() ]+", call):
        return None
    try:
        return value_of(ast.parse(call.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, TypeError):
        return None


def value_of(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp):
        return -value_of(node.operand) if isinstance(node.op, ast.USub) else value_of(node.operand)
    if not isinstance(node, ast.BinOp):
        raise TypeError(node)
    left, right = value_of(node.left), value_of(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    if isinstance(node.op, ast.Div):
        return left / right
    raise TypeError(node.op)


@pytest.mark.parametrize(("split", "rows"), each([("train", 7473), ("test", 1319)]))
def test_real_gsm8k(split: str, rows: int) -> None:
    path = real(f"gsm8k/{split}.jsonl")
    raw = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    task = Gsm8k(TaskSource(path=path))
    conversations, items = task.conversations(), task.items()
    assert len(conversations) == len(items) == len(raw) == rows
    evaluated, wrong = 0, []
    for row, conversation, item in zip(raw, conversations, items, strict=True):
        parts = conversation.messages[-1].parts
        assert "".join(p.text for p in parts if p.kind == "text") == re.sub(r"<<.*?>>", "", row["answer"])
        for number, part in enumerate(parts):
            before = parts[number - 1].kind if number else "text"
            assert (part.kind == "python_output") == (before == "python"), conversation.source
            value = arithmetic(part.text) if part.kind == "python" else None
            if value is not None:
                evaluated += 1
                if value != Fraction(parts[number + 1].text):  # exact: the set rounds nothing
                    wrong.append(f"{conversation.source} {part.text}={parts[number + 1].text}")
        assert parts[-1].text.splitlines()[-1].startswith("#### ")
        assert item.answer == row["answer"].rpartition("#### ")[2].replace(",", "")
        assert task.grade(item, row["answer"]) == task.grade(item, f"It is {item.answer}.") == 1
    share = 1 - len(wrong) / evaluated
    assert evaluated > 3 * rows and share > 0.99, f"{share:.4f} of {evaluated} marks are right; {wrong[:9]}"


@pytest.mark.parametrize(
    ("folder", "split", "rows"),
    each(
        [
            ("ARC-Easy", "train", 2251),
            ("ARC-Easy", "test", 2376),
            ("ARC-Challenge", "train", 1119),
            ("ARC-Challenge", "test", 1172),
            ("openbookqa", "train", 4957),
            ("openbookqa", "test", 500),
        ]
    ),
)
def test_real_multiple_choice(folder: str, split: str, rows: int) -> None:
    task = MultipleChoice(TaskSource(path=real(f"multiple_choice/{folder}/{split}.jsonl")))
    items = task.items()
    assert len(items) == len({item.id for item in items}) == rows
    for item, conversation in zip(items, task.conversations(), strict=True):
        assert 3 <= len(item.choices) <= 5 and item.answer in item.choices
        assert conversation.messages[0] == item.messages[0]
        assert task.grade(item, conversation.messages[1].text) == 1


def test_real_mmlu() -> None:
    task = Mmlu(TaskSource(path=real("mmlu")))
    items, train = task.items(), task.conversations()
    assert len(items) == len({item.id for item in items}) == 3546  # 20 subjects
    assert len(train) == len({c.source for c in train}) == 57 * 5
    for letter in "ABCD":
        assert 0.2 < sum(item.answer == letter for item in items) / len(items) < 0.3
    assert len(Mmlu(TaskSource(path=real("mmlu/test"))).items()) == len(items)
    assert len(Mmlu(TaskSource(path=real("mmlu"), limit=200)).items()) == 200


def test_mmlu_by_a_pattern() -> None:
    folder = Path(real("mmlu/test"))
    task = make_task("mmlu", TaskSource(path=str(folder / "high_school_[bgp]*")))
    assert {i.id.split(":")[1] for i in task.items()} == {
        f"high_school_{subject}_test" for subject in ("biology", "geography", "physics")
    }
    said = error_of(TaskError, make_task("mmlu", TaskSource(path=str(folder / "zoology*"))).items)
    assert said == f"mmlu: no CSV file is called {folder}/zoology*; check the pattern"


def test_real_humaneval() -> None:
    task = HumanEval(TaskSource(path=real("humaneval/HumanEval.jsonl.gz")))
    items = task.items()
    assert len(items) == 164
    for item, conversation in zip(items, task.conversations(), strict=True):
        code = conversation.messages[1].text.removeprefix("```python\n").removesuffix("\n```")
        names = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        assert item.answer["entry_point"] in names


def test_real_conversations() -> None:
    assert len(SmolTalk(TaskSource(path=real("identity/identity_conversations.jsonl"))).conversations()) == 1000
