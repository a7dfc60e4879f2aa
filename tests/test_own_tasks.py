"""A task of one's own: a class in a user's file, trained on, asked, and kept apart by what it rests on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import sftflow as sf
from sftflow.evaluation.options import EvalOptions, How, open_tasks
from sftflow.foundation.errors import SftflowError
from sftflow.recipe import load_recipe
from sftflow.tasks import Item, Task, TaskSource, make_item, make_task
from sftflow.tasks.own import files_of

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
HEAD = "from sftflow.tasks import Task, Item, ask, make_item\n"
MAKES = "    def conversations(self, split='train'):\n        return "
ASKS = """\
    def items(self, split='test'):
        return [make_item(str(n), f'What is {n}?', str(n)) for n in range(3)]
"""
RIGHT = "float(reply == item.answer)"
GRADES = f"    def grade(self, item, reply):\n        return {RIGHT}\n"
WHOLE = ASKS + GRADES


@pytest.fixture(scope="module")
def example() -> str:
    """The class of docs/tasks.md."""
    (code,) = re.findall(r"```python\n(# tasks\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return str(code)


@pytest.fixture
def riddles(tmp_path: Path, example: str) -> Path:
    file = tmp_path / "tasks.py"
    file.write_text(example, encoding="utf-8")
    return file


def write(folder: Path, body: str, head: str = HEAD) -> str:
    (folder / "own.py").write_text(f"{head}class Own(Task):\n{body}", encoding="utf-8")
    return f"{folder / 'own.py'}:Own"


def error_of(call: Any) -> str:
    with pytest.raises(SftflowError) as told:
        call()
    return str(told.value)


def test_the_example_is_trained_on_and_asked(riddles: Path, tmp_path: Path, tiny_base: Path) -> None:
    recipe = load_recipe(_recipe(tmp_path, f"base: {tiny_base}\nmixture: [{{source: ./tasks.py:riddles, repeat: 3}}]"))
    assert recipe.mixture[0].source == str(riddles) + ":riddles" and recipe.mixture[0].label == "riddles"
    assert recipe.eval and recipe.eval.tasks == (f"{riddles}:Riddles={tmp_path / 'more.txt'}",)
    task = make_task(f"{riddles}:riddles", TaskSource())
    trained = {c.messages[0].text for c in task.conversations()}
    asked = {i.messages[0].text for i in task.items()}
    assert trained and asked and not trained & asked and len(trained | asked) == 6
    mixture = sf.mix(recipe=recipe)
    assert mixture.names == ["riddles"] and len(mixture.rows[0]) == len(trained)
    result = sf.evaluate(str(tiny_base), [f"{riddles}:Riddles"], out=tmp_path / "out").models[str(tiny_base)].tasks
    assert result["riddles"].n == len(asked)
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["models"][str(tiny_base)]["tasks"]["riddles"]


def _recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"{text}\neval: {{tasks: ['./tasks.py:Riddles=more.txt']}}\ntrain: {{max_length: 64}}\n")
    return file


def test_python_code_of_the_page_runs(example: str, tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    """The class itself gives the rows and the scores of its file."""
    _, code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {"__name__": "typed"}
    exec(example, names)
    exec(code.replace("builtin:tiny", str(tiny_base)), names)
    assert "riddles" in capsys.readouterr().out
    file = tmp_path / "tasks.py"
    file.write_text(example)
    by_name = sf.mix([sf.task(f"{file}:riddles", repeat=3)], str(tiny_base))
    assert names["mix"].names == ["riddles"] and names["mix"].digest() == by_name.digest()
    instance = names["Riddles"](TaskSource(limit=1))
    assert len(sf.evaluate(str(tiny_base), instance).models[str(tiny_base)].tasks["riddles"].rows) == 1


def test_rows_are_prepared_anew_where_they_changed(riddles: Path, tmp_path: Path, tiny_base: Path) -> None:
    recipe = load_recipe(_recipe(tmp_path, f"base: {tiny_base}\nmixture: [{{source: ./tasks.py:riddles}}]"))
    first = sf.mix(recipe=recipe)
    assert first.rows[0].new and not sf.mix(recipe=recipe).rows[0].new
    riddles.write_text(riddles.read_text() + "\n# a word\n")
    assert not sf.mix(recipe=recipe).rows[0].new
    riddles.write_text(riddles.read_text().replace('"a piano"', '"a PIANO"').replace('"a clock"', '"a CLOCK"'))
    assert sf.mix(recipe=recipe).digest() != first.digest()


def test_what_lies_beside_the_file_counts(tmp_path: Path, tiny_base: Path) -> None:
    """Rows: whatever the class reads. Grades: the modules that it imports."""
    (tmp_path / "beside.txt").write_text("one")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "__init__.py").write_text("")
    (tmp_path / "beside" / "same.py").write_text("from .inner import right\n")
    (tmp_path / "beside" / "inner.py").write_text("def right(a, b):\n    return a == b\n")
    read = f"open({str(tmp_path / 'beside.txt')!r}).read()"
    head = HEAD + "from beside.same import right\n"
    body = f"{MAKES}[ask('q', {read}), {{'prompt': 'hi', 'completion': 'yo'}}]\n"
    name = write(
        tmp_path, body + ASKS + GRADES.replace("reply ==", "right(reply,").replace("answer)", "answer))"), head
    )
    digests = []
    for text in ("one", "two"):
        (tmp_path / "beside.txt").write_text(text)
        digests.append(sf.mix([sf.task(name)], str(tiny_base), max_length=64).digest())
    assert len(set(digests)) == 2
    assert [f.name for f in files_of(tmp_path / "own.py")] == ["own.py", "__init__.py", "same.py", "inner.py"]
    before = make_task(name, TaskSource())
    item = before.items()[0]
    assert before.grade(item, item.answer) == 1
    (tmp_path / "beside" / "inner.py").write_text("def right(a, b):\n    return a != b\n")
    after = make_task(name, TaskSource())
    assert after.grade(item, item.answer) == 0 and after.provenance() != before.provenance()


def test_files_of_two_folders_have_helpers_of_one_name(tmp_path: Path) -> None:
    head, names = HEAD + "from telling import WORD\n", []
    for word in ("one", "two"):
        folder = tmp_path / word
        folder.mkdir()
        (folder / "telling.py").write_text(f"WORD = {word!r}\n")
        names.append(write(folder, MAKES + "[ask('q', WORD)]\n", head))
    said = [make_task(name, TaskSource()).conversations()[0].messages[-1].text for name in (*names, names[0])]
    assert said == ["one", "two", "one"]
    (tmp_path / "random.py").write_text("")
    name = write(tmp_path, MAKES + "[ask('q', 'a')]\n", "import random\n" + HEAD)
    told = error_of(lambda: make_task(name, TaskSource()))
    assert told.startswith(f"{tmp_path / 'own.py'}: import random gives ") and told.endswith("rename that")


def test_another_grader_asks_again(riddles: Path, tmp_path: Path, tiny_base: Path) -> None:
    def graded() -> list[tuple[float, str]]:
        found = sf.evaluate(str(tiny_base), [f"{riddles}:riddles"], out=tmp_path / "out")
        return [(r.score, r.provenance) for r in found.models[str(tiny_base)].tasks["riddles"].rows]

    first = graded()
    assert graded() == first and not (tmp_path / "out" / "eval" / "kept").exists()
    riddles.write_text(riddles.read_text().replace("float(same_text(reply, item.answer))", "0.25"))
    again = graded()
    assert {score for score, _ in again} == {0.25} and {s for _, s in again}.isdisjoint(s for _, s in first)
    assert next((tmp_path / "out" / "eval" / "kept").glob("*.jsonl"))


def test_rows_that_differ_each_time_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    body = MAKES + "[ask('q', str(random.random()))]\n"
    name = write(tmp_path, body, f"import random\n{HEAD}")
    said = error_of(lambda: sf.mix([sf.task(name)], str(tiny_base)))
    assert said == f"{name}: it makes other rows each time; draw what is drawn from random.Random(self.source.seed)"


def test_a_limit_that_the_class_does_not_look_at(tmp_path: Path) -> None:
    name = write(tmp_path, WHOLE)
    (two,), (all_,) = open_tasks([name], 2), open_tasks([name], None)
    assert [i.id for i in two.items] == [i.id for i in all_.items if i in two.items] and len(two.items) == 2
    assert (two.available, all_.available, two.name) == (3, 3, "Own")


def test_an_instance_keeps_what_it_was_made_with() -> None:
    class Sums(Task):
        def __init__(self, numbers: list[int]) -> None:
            self.numbers = numbers

        def items(self, split: str = "test") -> list[Item]:
            return [make_item(str(n), f"What is {n}+1?", str(n + 1)) for n in self.numbers]

        def grade(self, item: Item, reply: str) -> float:
            return float(reply == item.answer)

    (task,) = open_tasks([Sums([4, 5, 6])], 2)
    assert (task.name, len(task.items), task.available) == ("Sums", 2, 3)
    assert open_tasks([Sums([4])], 2)[0].available == 1
    said = error_of(lambda: open_tasks([Sums], 2))
    assert said.startswith(f"{__file__}:") and "items: TypeError: 'TaskSource' object is not iterable; mend" in said


def test_overlap_is_found_by_the_usual_check(tmp_path: Path, tiny_base: Path) -> None:
    body = MAKES + "[ask(i.messages[0].text, i.answer) for i in self.items()]\n"
    name = write(
        tmp_path,
        body + ASKS.replace("What is {n}?", "Which of all the numbers {n} is the one that follows {n - 1}?") + GRADES,
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base: {tiny_base}\nmixture: [{{source: '{name}'}}]\neval: {{tasks: ['{name}']}}\n")
    from sftflow import api

    (overlap,) = api.audit(recipe).ledger["overlap"].values()
    assert overlap["contaminated"] == overlap["items"] == 3


def test_a_part_is_joined_to_what_one_process_makes(
    riddles: Path, tmp_path: Path, tiny_base: Path, monkeypatch: Any
) -> None:
    recipe = _recipe(tmp_path, f"base: {tiny_base}\nmixture: [{{source: ./tasks.py:riddles}}]")
    from sftflow import api

    digests = []
    for cache, parts in (("parts", ("1/2", "2/2")), ("whole", ())):
        monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / cache))
        for part in parts:
            api.prepare_part(recipe, part)
        digests.append(sf.mix(recipe=recipe).digest())
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_many_rows_are_rendered_by_processes(tmp_path: Path, tiny_base: Path, monkeypatch: Any) -> None:
    name = write(tmp_path, MAKES + "[ask(f'What is {n}+{n}?', str(2 * n)) for n in range(2000)]\n")
    digests = []
    for cores in (1, 2):
        monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / str(cores)))
        monkeypatch.setattr("sftflow.data.prepare.n_cores", lambda cores=cores: cores)
        digests.append(sf.mix([sf.task(name)], str(tiny_base)).digest())
    assert digests[0] == digests[1]


def test_examples_ask_none_of_the_items(tmp_path: Path) -> None:
    """Of a class whose conversations and items are of one file."""
    body = MAKES + "[ask(f'What is {n}?', str(n)) for n in range(5)]\n"
    name = write(tmp_path, body + WHOLE)
    (task,) = open_tasks([name], 1, how=How(shots=2))
    assert {e.messages[0].text for e in task.shots[0]} == {"What is 3?", "What is 4?"}
    said = error_of(lambda: open_tasks([name], 1, how=How(shots=3)))
    assert said == "Own: it has 2 examples for --shots 3; lower --shots"


def test_letters_need_no_grade(tmp_path: Path) -> None:
    """They are told by their probabilities, so a class whose items are all choices may leave it out."""
    (task,) = open_tasks([write(tmp_path, ASKS.replace("str(n)) for", "'A', choices=('A', 'B')) for"))], None)
    assert task.by_letter and len(task.items) == 3


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    pass\n", "{f}:Own: it has neither conversations nor items; write class Riddles(Task) with"),
        (ASKS, "{f}:Own: it has no grade; write class"),
        (GRADES, "{f}:Own: it has no items; write class"),
        (f"    name = 'a/b'\n{WHOLE}", "{f}:Own: its name 'a/b' is no name of a file"),
        (f"    name = 'gsm8k'\n{WHOLE}", "{f}:Own: its name 'gsm8k' is a built-in task's; give it a name of"),
        (WHOLE.replace(RIGHT, "1.5"), "{f}:5: grade: 1.5 for item 0 is no number in"),
        (WHOLE.replace(RIGHT, "None"), "{f}:5: grade: None for item 0 is no number"),
        (WHOLE.replace(RIGHT, "item.none"), "{f}:6: grade: AttributeError: 'Item' obj"),
        (f"    max_new_tokens = '9'\n{WHOLE}", "{f}:Own: max_new_tokens is '9', no whole number above 0; write for"),
        (f"    max_new_tokens = 0\n{WHOLE}", "{f}:Own: max_new_tokens is 0, no whole number above 0; write for"),
        (f"{WHOLE}    def provenance(self):\n        return 3\n", "{f}:7: provenance: it gives no mapping that"),
        (f"{WHOLE}    def metrics(self, of):\n        return 3\n", "{f}:7: metrics: it gives no mapping that JSON can"),
        (WHOLE.replace("make_item(str(n), ", "("), "{f}:3: items: number 1 is of type tuple, no Item"),
        (WHOLE.replace("str(n)) for", "{n}) for"), "{f}:3: items: the answer of item '0' cannot be written as"),
        (WHOLE.replace("range(3)", "range(0)"), "{f}:Own: no items to ask; check its file"),
        (f"    def __init__(self):\n        pass\n{WHOLE}", "{f}: Own: TypeError: Own.__init__() takes 1 positional"),
        ("    x = 1 / 0\n", "{f}:3: ZeroDivisionError: division by zero; mend it; sftflow --debug shows the traceback"),
        ("    x = \n", "{f}:3: SyntaxError: invalid syntax"),
        ("    import a_package_that_is_not_there\n", "{f}:3: ModuleNotFoundError: No module named 'a_package_that"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_class_is_one_line(body: str, said: str, tmp_path: Path) -> None:
    name = write(tmp_path, body)

    def ask() -> None:
        (task,) = open_tasks([name], None)
        task.task.grade(task.items[0], "1")
        task.task.provenance()
        task.task.metrics([])

    assert error_of(ask).startswith(said.replace("{f}", str(tmp_path / "own.py")))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("none.py:Own", "--tasks: no such file {t}/none.py; did you mean 'own.py'?"),
        ("own.py:own", "{t}/own.py: no task 'own' in it; did you mean 'Own'?"),
        ("own.py:Zebra", "{t}/own.py: no task 'Zebra' in it; it has Own"),
        ("own.py:ask", "{t}/own.py:ask: it is no Task; write class Riddles(Task)"),
        ("own.py", "{t}/own.py: which of its tasks is not said; it has Own; write {t}/own.py:Own"),
    ],
)
def test_what_is_not_there_is_one_line(named: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, WHOLE)
    told = error_of(lambda: EvalOptions(tasks=[f"{tmp_path}/{named}"]).open("builtin:tiny"))
    assert told.startswith(said.replace("{t}", str(tmp_path)))
    source = error_of(lambda: sf.task(f"{tmp_path}/{named}"))
    assert source.partition(": ")[2] == told.partition(": ")[2]


def test_a_class_without_conversations_is_not_trained_on(tmp_path: Path, tiny_base: Path) -> None:
    name = write(tmp_path, WHOLE)
    said = error_of(lambda: sf.mix([sf.task(name)], str(tiny_base)))
    assert said == "Own: it has no replies to learn from, it is for evaluation only; leave it out of the mixture"


def test_a_bad_row_of_a_class_is_named_by_its_number(tmp_path: Path, tiny_base: Path) -> None:
    name = write(tmp_path, MAKES + "[ask('q', 'a'), {'messages': 3}, 5]\n")
    assert error_of(lambda: sf.mix([sf.task(name)], str(tiny_base))).startswith(
        f"{tmp_path / 'own.py'}:3: conversations: row 3 is of type int, no conversation; make it with ask("
    )
    name = write(tmp_path, MAKES + "[ask('q', 'a'), {'messages': 3}]\n")
    assert error_of(lambda: sf.mix([sf.task(name)], str(tiny_base))).startswith(f"{name}:2.messages: ")
