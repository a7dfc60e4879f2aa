"""Files as people have them: whatever is in one is read, or it is named for what it is, in one line."""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftflow.api.rows import read
from sftflow.chat.data_files import read_conversations, read_rows
from sftflow.data.documents import read_documents
from sftflow.foundation.errors import DataError
from sftflow.tasks import TaskSource, make_task

ROWS = [{"prompt": f"q{n} \u2028 é", "completion": f"a{n}"} for n in (1, 2, 3)]
LISTS = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in ROWS]
TURNS = [[{"from": "human", "value": r["prompt"]}, {"from": "gpt", "value": r["completion"]}] for r in ROWS]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()
packed = functools.partial(gzip.compress, mtime=0)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
ARRAY, BOM = json.dumps(ROWS).encode(), b"\xef\xbb\xbf"
SINK = pa.BufferOutputStream()
pq.write_table(pa.Table.from_pylist(ROWS), SINK)
PARQUET = SINK.getvalue().to_pybytes()
TWICE = pa.table([["q"], ["a"], ["b"]], names=["prompt", "completion", "completion"])
SINK = pa.BufferOutputStream()
pq.write_table(TWICE, SINK)


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("name", "data", "numbers"),
    [
        ("d.jsonl", LINES, (1, 2, 3)),
        ("D.JSONL", LINES, (1, 2, 3)),
        ("d.json", LINES, (1, 2, 3)),
        ("d.txt", LINES, (1, 2, 3)),
        ("d", LINES, (1, 2, 3)),
        ("no end.jsonl", LINES.rstrip(), (1, 2, 3)),
        ("bom.jsonl", BOM + LINES, (1, 2, 3)),
        ("windows.jsonl", LINES.replace(b"\n", b"\r\n"), (1, 2, 3)),
        ("old mac.jsonl", LINES.replace(b"\n", b"\r"), (1, 2, 3)),
        ("blank.jsonl", b"\n \n" + LINES.replace(b"\n", b"\n\t\n", 1), (3, 5, 6)),
        ("blank mac.jsonl", b"\r" + LINES.replace(b"\n", b"\r\r", 1), (2, 4, 5)),
        ("packed.jsonl.gz", packed(LINES), (1, 2, 3)),
        ("PACKED.JSON.GZ", packed(ARRAY), (1, 2, 3)),
        ("packed, not said.jsonl", packed(LINES), (1, 2, 3)),
        ("not packed.jsonl.gz", LINES, (1, 2, 3)),
        ("d.json", ARRAY, (1, 2, 3)),
        ("bom.json", BOM + ARRAY, (1, 2, 3)),
        ("array.jsonl", ARRAY, (1, 2, 3)),
        ("over lines.json", json.dumps(ROWS, indent=2).encode(), (1, 2, 3)),
        ("over lines.jsonl", b"\n" + json.dumps(ROWS, indent=2).encode(), (1, 2, 3)),
        ("lists.jsonl", "".join(json.dumps(r) + "\n" for r in LISTS).encode(), (1, 2, 3)),
        ("lists.json", json.dumps(LISTS).encode(), (1, 2, 3)),
        ("turns.jsonl", "".join(json.dumps(r) + "\n" for r in TURNS).encode(), (1, 2, 3)),
        ("turns.json", json.dumps(TURNS).encode(), (1, 2, 3)),
        ("d.parquet", PARQUET, (1, 2, 3)),
        ("D.Parquet", PARQUET, (1, 2, 3)),
        ("not said.jsonl", PARQUET, (1, 2, 3)),
    ],
    ids=name_of,
)
def test_a_file_is_read_for_what_it_is(name: str, data: bytes, numbers: tuple[int, ...], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    found = list(read_conversations(file))
    assert [[m.text for m in c.messages] for c in found] == [[r["prompt"], r["completion"]] for r in ROWS]
    assert [c.source for c in found] == [f"{file}:{n}" for n in numbers]


def test_one_object_over_many_lines_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(ROWS[0], indent=2))
    assert [place for place, _ in read_rows(tmp_path / "d.json")] == [f"{tmp_path / 'd.json'}:1"]


@pytest.mark.parametrize("turns", [LISTS[0], TURNS[0]])
def test_one_list_of_messages_on_a_line_is_one_row(turns: list[Any], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(turns))
    (found,) = read_conversations(tmp_path / "d.jsonl")
    assert [m.text for m in found.messages] == list(ROWS[0].values())


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz"])
@pytest.mark.parametrize("data", [b"", b"\n \r\n\n", BOM, b"[]\n"])
def test_a_file_without_rows_has_none(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert list(read_rows(tmp_path / name)) == []


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("torn.jsonl", LINES + b"\0" * 512, ":4: NUL bytes: it was not written to its end"),
        ("torn.json", ARRAY + b"\0" * 512, ":1: NUL bytes: it was not written to its end"),
        ("wide.jsonl", LINES.decode().encode("utf-16"), ": UTF-16 text; convert it to UTF-8"),
        ("wide.json", ARRAY.decode().encode("utf-16-le"), ": UTF-16 text; convert it to UTF-8"),
        ("wide.jsonl", LINES.decode().encode("utf-16-be"), ": UTF-16 text; convert it to UTF-8"),
        ("wider.jsonl", LINES.decode().encode("utf-32"), ": UTF-32 text; convert it to UTF-8"),
        ("wider.json.gz", packed(ARRAY.decode().encode("utf-32-le")), ": UTF-32 text; convert it to UTF-8"),
        ("zeros.jsonl", b"\0" * 512, ": NUL bytes"),
        ("pointer.jsonl", POINTER, ": a Git LFS pointer, not the data; get the file itself: git lfs pull"),
        ("pointer.parquet", POINTER, ": a Git LFS pointer, not the data"),
        ("latin.jsonl", LINES.decode().replace("\u2028", "").encode("latin-1"), ":1: not UTF-8 text"),
        ("latin.json", b'[{"a": "\xe9"}]', ": not UTF-8 text (invalid continuation byte at byte 8 of the file)"),
        ("d.csv", b"prompt,completion\nq,a\n", ": neither JSON nor Parquet (it begins with 'prompt,completion')"),
        ("quoted.csv", b'"prompt","completion"\n"q","a"\n', ": neither JSON nor Parquet"),
        ("d.txt", b"Once upon a time", ": neither JSON nor Parquet (it begins with 'Once upon a time')"),
        ("d.jsonl", b"oops\n", ":1: not JSON"),
        ("d.jsonl", b"# rows\n" + LINES, "; remove the line, or give a file whose lines are JSON objects"),
        ("csv.jsonl", b"prompt,completion\nq,a\n", ": neither JSON nor Parquet (it begins with 'prompt,completion')"),
        ("csv.json", b"prompt,completion\nq,a\n", ": neither JSON nor Parquet (it begins with 'prompt,completion')"),
        ("page.jsonl", b"<!DOCTYPE html><html></html>", ": neither JSON nor Parquet (it begins with '<!DOCTYPE html>"),
        ("page.ndjson", b"<html>\n<body>\n</html>\n", ": neither JSON nor Parquet (it begins with '<html>')"),
        ("wide.jsonl", b'{\n  "prompt": "a"\n}\n', ": an object over several lines; write each row in one line"),
        ("d.xlsx", b"PK\x03\x04 and more", ": a zip archive, or a spreadsheet; unpack it"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd and more", ": packed with zstd; unpack it"),
        ("d.jsonl.xz", b"\xfd7zXZ\0 and more", ": packed with xz; unpack it"),
        ("d.jsonl.bz2", b"BZh9 and more", ": packed with bzip2; unpack it"),
        ("d.arrow", b"ARROW1\0\0 and more", ": cannot be read as Arrow (ArrowInvalid: "),
        ("d.arrow", b"\xff\xff\xff\xff and more", ": cannot be read as Arrow ("),
        ("d.parquet.gz", packed(PARQUET), ": a Parquet file packed with gzip; unpack it"),
        ("cut.jsonl.gz", cut(packed(LINES * 100)), ": cannot be unpacked ("),
        ("noise.parquet", b"PAR1" + b"x" * 40, ": cannot be read as Parquet (ArrowInvalid: Parquet magic bytes not"),
        ("cut.parquet", cut(PARQUET), ": cannot be read as Parquet ("),
        ("twice.parquet", SINK.getvalue().to_pybytes(), ": the column 'completion' stands twice; keep one of them"),
        ("empty.parquet", b"", ": it is empty; write or download it again"),
        ("text.parquet", LINES, ": named .parquet, and no Parquet file; name it as what it is"),
        ("big.json", b'[{"prompt": "a", "n": 1' + b"0" * 5000 + b"}]", ": a number of more than 4,300 digits"),
        ("deep.json", DEEP, ": nested more than 100 deep"),
        ("deep.jsonl", b'{"prompt": ' + DEEP + b"}", ":1: nested more than 100 deep"),
        ("row.json", b'[{"prompt": "a"}, {"prompt": "\\ud83d"}]', ":2.prompt: a lone surrogate"),
        ("deep row.json", b'[{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}]", "nested more than 100 deep"),
        ("line.json", b'[{"prompt": "a"},\n{"prompt": oops}]', ":2: not JSON (Expecting value at column 12)"),
    ],
    ids=name_of,
)
def test_a_file_that_cannot_be_read_is_named(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(DataError) as error:
        list(read_rows(file))
    line = str(error.value)
    assert line.startswith(str(file)) and said in line and error.value.remedy and "\n" not in line


@pytest.mark.parametrize("table", [TWICE, TWICE.to_pandas()], ids=["pyarrow", "pandas"])
def test_a_column_twice_in_a_table_in_memory_is_named(table: Any) -> None:
    with pytest.raises(DataError, match="mine: the column 'completion' stands twice"):
        read(table, name="mine")


def test_a_folder_is_named_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"a folder, not a file \(in it: a.jsonl, b.jsonl\); give one file"):
        list(read_rows(tmp_path))


def test_a_name_that_no_file_can_have() -> None:
    for name in ("x" * 5000, "a\0b", "no/such"):
        with pytest.raises(DataError):
            list(read_rows(name))


def test_endings_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "Q.CSV").write_text("question,A,B,C,D,answer\nq,a,b,c,d,B\n")
    (item,) = make_task("mmlu", TaskSource(path=str(tmp_path / "Q.CSV"))).items("test")
    assert item.answer == "B"
    (tmp_path / "D.JSONL.XZ").write_bytes(lzma.compress(b'{"text": "once"}\r\n{"text": "upon"}\n'))
    assert list(read_documents(tmp_path / "D.JSONL.XZ")) == ["once", "upon"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": 1}\n', ":2: not a JSON object with `text`"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', ":2.text: a lone surrogate"),
        ("d.txt", b"caf\xe9", ": not UTF-8 text"),
        ("d.txt.xz", b"plain", ": cannot be unpacked"),
        ("d.jsonl.xz", cut(lzma.compress(b'{"text": "a"}\n')), ": cannot be unpacked"),
    ],
    ids=name_of,
)
def test_documents_that_cannot_be_read_are_named(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}{said}")):
        list(read_documents(tmp_path / name))
