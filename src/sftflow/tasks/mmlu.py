"""MMLU: four choices over 57 subjects, from the published folders of CSV files or rows in the hub's layout. MMLU-Pro:
up to ten choices."""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftflow.chat.data_files import read_rows
from sftflow.chat.files.names import is_pattern
from sftflow.chat.files.packed import readable
from sftflow.foundation.errors import DataError, SchemaError, TaskError
from sftflow.tasks.multiple_choice import LETTERS, MultipleChoice, Question
from sftflow.tasks.published import to_get
from sftflow.tasks.task import path_of, rows_of, text_of

CHOICES = LETTERS[:4]
COLUMNS = "question,A,B,C,D,answer"
PRO_SHAPE = '{"question": ..., "options": [texts], "answer": "C", "answer_index": 2}'
SHAPE = '{"question": ..., "choices": [four texts], "answer": 0..3}'


class Mmlu(MultipleChoice):
    """`path` is a folder holding dev/ and test/, a folder of CSV files, one file, several by a pattern
    (`test/high_*`), or a hub id.

    MMLU has no training rows in these files: split "train" means its `dev` rows.
    """

    name = "mmlu"
    example_splits = ("dev", "val")

    def examples_path(self) -> str | None:
        path = self.source.path
        return path if path and Path(path).is_dir() else super().examples_path()  # a folder that holds dev/, too

    def questions(self, split: str) -> Iterator[Question]:
        split = "dev" if split == "train" else split
        path = path_of(self, split)
        if path.startswith("hub:") or (Path(path).is_file() and Path(path).suffix.lower() != ".csv"):
            for place, row in read_rows(path):
                yield parse_row(row, place, self.id_of(place))
            return
        for file in csv_files(Path(path), split, self.name):
            for line, cells in read_csv(file):
                question = parse_cells(cells, f"{file}:{line}", f"{self.name}:{file.stem}:{line}")
                yield replace(question, group=re.sub(r"_(?:dev|val|test)$", "", file.stem))


class MmluPro(MultipleChoice):
    """MMLU-Pro (Wang et al. 2024): rows of PRO_SHAPE with 3 to 10 choices. Its training rows are its `validation`."""

    name = "mmlu_pro"
    example_splits = ("validation", "dev")

    def questions(self, split: str) -> Iterator[Question]:
        for place, row in rows_of(self, "validation" if split == "train" else split):
            yield parse_options(row, place, self.id_of(place))


def csv_files(path: Path, split: str, name: str) -> list[Path]:
    """The CSV files of a split, sorted. Files that say they are another split's (anatomy_test.csv) are not taken."""
    if path.is_file():
        return [path]
    if is_pattern(str(path)):
        found = sorted(Path(p) for p in glob.glob(str(path)) if p.lower().endswith(".csv"))
        if not found:
            where = "" if path.parent.is_dir() else to_get(name)
            raise TaskError(name, f"no CSV file is called {path}", f"check the pattern{where}")
        return found
    if not path.is_dir():
        raise DataError(str(path), "no such file or folder", f"check the path of {name}")
    folder = path / split if (path / split).is_dir() else path
    files, others = sorted(folder.glob("*.csv")), {"dev", "val", "test"} - {split}
    taken = [f for f in files if f.stem.rpartition("_")[2] not in others]
    if not taken:
        raise TaskError(name, f"no {split} files in {path}", f"give a folder with {split}/SUBJECT_{split}.csv")
    return taken


def read_csv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line where the row begins, its cells); a header row is left out. A quoted cell may run over several lines."""
    line, last = 1, 0
    try:
        with readable(file), file.open(encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f)
            for cells in reader:
                line, last = last + 1, reader.line_num
                header = line == 1 and cells[:1] == ["question"] and cells[-1] == "answer"
                if cells and not header:
                    yield line, cells
    except csv.Error as error:
        raise DataError(f"{file}:{last + 1}", f"not CSV ({error})", "fix or remove the line") from None


def parse_cells(cells: list[str], place: str, name: str) -> Question:
    """A line of COLUMNS -> a Question; the answer is a letter, or 0..3 in the re-published files."""
    if len(cells) != 6:
        raise SchemaError(place, f"the number of columns is {len(cells)}, not 6", f"write {COLUMNS}")
    if not cells[0].strip():
        raise SchemaError(place, "the question is empty", f"write {COLUMNS}")
    return Question(place, name, cells[0], tuple(cells[1:5]), letter_of(cells[5], place))


def parse_row(row: Any, place: str, name: str) -> Question:
    """A row of SHAPE -> a Question."""
    question = text_of(row, "question", place, SHAPE)
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
        raise SchemaError(place, "no four texts under 'choices'", f"write {SHAPE}")
    return Question(place, name, question, tuple(choices), letter_of(row.get("answer"), place), _group(row, "subject"))


def parse_options(row: Any, place: str, name: str) -> Question:
    """A row of PRO_SHAPE -> a Question. "N/A", with which early versions of the set fill up to ten, is no choice."""
    question, options = text_of(row, "question", place, PRO_SHAPE), row.get("options")
    if not isinstance(options, list) or not all(isinstance(text, str) and text.strip() for text in options):
        raise SchemaError(place, "no texts under 'options'", f"write {PRO_SHAPE}")
    while len(options) > 2 and options[-1] == "N/A":
        options = options[:-1]
    if not 2 <= len(options) <= len(LETTERS):
        raise SchemaError(place, f"the number of options is {len(options)}", f"give 2 to {len(LETTERS)}")
    letters, answer, index = LETTERS[: len(options)], row.get("answer"), row.get("answer_index")
    if index is None and answer in letters:
        index = letters.index(answer)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
        said = f"answer {answer!r}" if index is None else f"answer_index {index!r}"
        raise SchemaError(place, f"{said} is none of its {len(options)} options", "correct it")
    if answer not in (None, letters[index]):
        raise SchemaError(place, f"answer {answer!r}, but answer_index {index} is {letters[index]}", "correct one")
    return Question(place, name, question, tuple(options), letters[index], _group(row, "category"))


def _group(row: Any, key: str) -> str:
    return str(row.get(key) or "")


def letter_of(answer: Any, place: str) -> str:
    """'C' -> 'C';  2 -> 'C';  '2' -> 'C'"""
    said = str(answer).strip()
    letter = dict(zip("0123", CHOICES, strict=True)).get(said, said)
    if letter not in CHOICES:
        raise SchemaError(place, f"answer {said!r} is neither a letter A to D nor 0 to 3", "correct it")
    return letter
