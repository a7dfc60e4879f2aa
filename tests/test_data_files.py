"""Files as people have them: whatever is in one is read, or it is named for what it is, in one line."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftflow.api.rows import read
from sftflow.chat.data_files import numbered_rows, read_conversations, read_rows
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


def table(sep: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=sep)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


CSV = table(",")
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
        ("packed.jsonl.bz2", bz2.compress(LINES), (1, 2, 3)),
        ("packed.json.xz", lzma.compress(ARRAY), (1, 2, 3)),
        ("packed.jsonl.zst", zstd(LINES), (1, 2, 3)),
        ("packed in two.jsonl.zst", zstd(LINES[:40]) + zstd(LINES[40:]), (1, 2, 3)),
        ("packed, not said", zstd(BOM + LINES), (1, 2, 3)),
        ("d.csv", CSV, (2, 3, 4)),
        ("D.CSV", BOM + CSV.replace(b"\r\n", b"\n"), (2, 3, 4)),
        ("old mac.csv", CSV.replace(b"\r\n", b"\r"), (2, 3, 4)),
        ("semicolons.csv", table(";"), (2, 3, 4)),
        ("d.tsv", table("\t"), (2, 3, 4)),
        ("not said.txt", CSV, (2, 3, 4)),
        ("lines.csv", LINES, (1, 2, 3)),
        ("not said.jsonl", table("\t"), (2, 3, 4)),
        ("packed.csv.gz", packed(CSV), (2, 3, 4)),
        ("packed.tsv.zst", zstd(table("\t")), (2, 3, 4)),
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


NOISE = "".join(json.dumps({"prompt": str(n * n % 97), "completion": str(n)}) + "\n" for n in range(3000)).encode()
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
        ("d.txt", b"Once upon a time", ": neither JSON, Parquet nor a table (it begins with 'Once upon a time')"),
        ("d.jsonl", b"oops\n", ":1: not JSON"),
        ("d.jsonl", b"# rows\n" + LINES, "; remove the line, or give a file whose lines are JSON objects"),
        (
            "page.jsonl",
            b"<!DOCTYPE html><html></html>",
            ": neither JSON, Parquet nor a table (it begins with '<!DOCT",
        ),
        ("page.ndjson", b"<html>\n<body>\n</html>\n", ": neither JSON, Parquet nor a table (it begins with '<html>')"),
        ("wide.jsonl", b'{\n  "prompt": "a"\n}\n', ": an object over several lines; write each row in one line"),
        ("d.xlsx", b"PK\x03\x04 and more", ": a zip archive, or a spreadsheet; unpack it"),
        ("d.arrow", b"ARROW1\0\0 and more", ": cannot be read as Arrow (ArrowInvalid: "),
        ("d.arrow", b"\xff\xff\xff\xff and more", ": cannot be read as Arrow ("),
        ("d.parquet.gz", packed(PARQUET), ": a Parquet file packed with gzip; unpack it"),
        ("cut.jsonl.gz", cut(packed(LINES * 100)), ": cannot be unpacked ("),
        ("cut.jsonl.zst", cut(zstd(NOISE)), ": cannot be unpacked ("),
        ("cut.jsonl.xz", cut(lzma.compress(NOISE)), ": cannot be unpacked ("),
        ("cut.jsonl.bz2", cut(bz2.compress(NOISE)), ": cannot be unpacked ("),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd and more", ": cannot be unpacked ("),
        ("d.jsonl.xz", b"\xfd7zXZ\0 and more", ": cannot be unpacked ("),
        ("d.jsonl.bz2", b"BZh9 and more", ": cannot be unpacked ("),
        ("d.arrow.zst", zstd(b"ARROW1\0\0 and more"), ": an Arrow file packed with zstd; unpack it"),
        ("ragged.csv", b'prompt,completion\n"q\n",a\nq\n', ":4: 1 cells where the header has 2"),
        ("ragged.csv", b"prompt,completion\nq,a,b\n", ":2: 3 cells where the header has 2"),
        ("open.csv", b'prompt,completion\nq,a\n"q,a\nq,a\n', ":3: a quote that is opened here is never closed"),
        ("quote.csv", b'prompt,completion\n"q"s,a\n', ":2: not CSV ("),
        ("twice.csv", b"prompt,completion,completion\nq,a,b\n", ": the column 'completion' stands twice"),
        ("both.csv", b"a,b;c\nq,a;b\n", ":1: the header's names may be parted by ',' and by ';'"),
        ("latin.csv", b"prompt,completion\nq,caf\xe9!\n", ":2: not UTF-8 text (invalid continuation byte at byte 5"),
        ("zeros.csv", b"prompt,completion\nq,a\n\0\0\0", ":3: NUL bytes: it was not written to its end"),
        ("wide.csv", "prompt,completion\nq,a\n".encode("utf-16"), ": UTF-16 text; convert it to UTF-8"),
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


# ---- several files


def written(folder: Path, **files: bytes) -> Path:
    """A folder with files in it: a name's `__` is a dot, its `___` a slash."""
    for name, data in files.items():
        file = folder / name.replace("___", "/").replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder


def places_of(name: str) -> list[str]:
    """Where the rows of a name stand, which are each file's three."""
    found = list(read_conversations(name))
    assert [c.messages[0].text for c in found] == [r["prompt"] for r in ROWS] * (len(found) // 3)
    return [c.source for c in found]


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path, caplog: Any) -> None:
    folder = written(
        tmp_path / "d", b__csv=CSV, a__jsonl=LINES, sub___c__jsonl__gz=packed(LINES), a1__parquet=PARQUET, e__jsonl=b"",
        README__md=b"# rows", _hidden__jsonl=LINES, sub___notes__txt=b"Once",
    )  # fmt: skip
    (folder / "_hidden.jsonl").rename(folder / ".hidden.jsonl")
    d = str(folder)
    order = [f"{d}/a.jsonl", f"{d}/a1.parquet", f"{d}/b.csv", f"{d}/sub/c.jsonl.gz"]
    expected = [f"{file}:{n + (file[-3:] == 'csv')}" for file in order for n in (1, 2, 3)]
    assert places_of(d) == expected
    assert f"{d}: not read, by their names: README.md, sub/notes.txt" in caplog.text
    assert places_of(f"{d}/**/*.jsonl*") == [p for p in expected if ".jsonl" in p]
    numbers = [n for n, _ in numbered_rows(d)]
    assert numbers == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]  # they count on through the files
    assert [n for n, _ in numbered_rows(d, wanted={0, 4, 11}.__contains__)] == [1, 5, 13]


def test_what_lies_beside_data_is_not_read_by_a_pattern(tmp_path: Path, caplog: Any) -> None:
    for name in ("a.jsonl", "part-1", "README.md", "LICENSE", "state.json"):
        (tmp_path / name).write_bytes(LINES if name in ("a.jsonl", "part-1") else b"# x")
    with caplog.at_level("WARNING"):
        found = [place for place, _ in read_rows(f"{tmp_path}/*")]
    assert {Path(place).name.partition(":")[0] for place in found} == {"a.jsonl", "part-1"}
    assert "README.md" in caplog.text
    with pytest.raises(DataError, match=r"README\.md: neither JSON"):
        list(read_rows(f"{tmp_path}/READ*"))


def test_a_name_with_the_signs_of_a_pattern_means_that_file_itself(tmp_path: Path) -> None:
    written(tmp_path, d1__jsonl=b"oops", **{"d[1]__jsonl": LINES})
    assert len(places_of(str(tmp_path / "d[1].jsonl"))) == 3
    (tmp_path / "d[1].jsonl").unlink()
    with pytest.raises(DataError, match=r"d1\.jsonl:1: not JSON"):
        list(read_rows(str(tmp_path / "d[1].jsonl")))


def test_a_fault_names_its_own_file(tmp_path: Path) -> None:
    written(tmp_path, a__jsonl=LINES, b__jsonl=LINES + b"oops\n", c__jsonl=LINES)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/b.jsonl:4: not JSON")):
        list(read_rows(tmp_path))


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ({}, "", ": an empty folder; what is read of a folder is .jsonl"),
        ({"a__txt": b"x"}, "", ": a folder without data files (in it: a.txt)"),
        ({"a__jsonl": LINES}, "b*", ": no file fits the pattern"),
        ({"a___b__jsonl": LINES}, "*", ": only folders fit the pattern"),
        ({"a__jsonl": LINES, "a-test__jsonl": LINES}, "", "its files are of several splits (a-test.jsonl is not for"),
        ({"train___a__jsonl": LINES, "dev___a__jsonl": LINES}, "", "(dev/a.jsonl is not for training); write hub:"),
        ({"state__json": b"{", "dataset_info__json": b"{}"}, "", "state.json: not JSON"),
        ({"state__json": b"{}", "dataset_info__json": b"{}"}, "", "state.json: no list of files in it"),
    ],
)
def test_a_folder_or_pattern_that_means_no_rows_is_named(
    files: dict[str, bytes], name: str, said: str, tmp_path: Path
) -> None:
    written(tmp_path, **files)
    with pytest.raises(DataError, match=re.escape(said)):
        list(read_rows(str(tmp_path / name)))


def test_files_of_a_test_alone_are_no_several_splits(tmp_path: Path) -> None:
    assert len(places_of(str(written(tmp_path / "test", a__jsonl=LINES, b__jsonl=LINES)))) == 6
    assert len(places_of(str(written(tmp_path / "x", latest__jsonl=LINES, testament__jsonl=LINES)))) == 6


# ---- data sets in folders

CONFIGS = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: "main*.jsonl"}, {split: test, path: socratic.jsonl}]
- config_name: socratic
  data_files: socratic.jsonl
---
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`several`: configurations main and socratic; `splits`: by names; `one` and `two`: saved by `datasets`."""
    folder = tmp_path_factory.mktemp("sets")
    written(folder / "several", README__md=CONFIGS, main2__jsonl=LINES, main10__jsonl=LINES, socratic__jsonl=LINES)
    written(folder / "splits", train___b__jsonl=LINES, train___a__jsonl=LINES, test___t__jsonl=LINES)
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(folder / "one", num_shards=3)
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(folder / "two")
    written(folder / "parameters", README__md=CONFIGS.replace(b"data_files: soc", b"field: rows\n  data_files: soc"))
    written(folder / "parameters", main__jsonl=LINES, socratic__jsonl=LINES)
    written(folder / "pictures", a__png=b"", b__png=b"")
    return folder


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("hub:{}/several:main:train", ["several/main10.jsonl", "several/main2.jsonl"]),
        ("hub:{}/several:main:test", ["several/socratic.jsonl"]),
        ("hub:{}/several:socratic:train", ["several/socratic.jsonl"]),
        ("hub:{}/splits", ["splits/train/a.jsonl", "splits/train/b.jsonl"]),
        ("hub:{}/splits:test", ["splits/test/t.jsonl"]),
        ("{}/two", ["two/train/data-00000-of-00001.arrow"]),
        ("hub:{}/two:test", ["two/test/data-00000-of-00001.arrow"]),
    ],
)
def test_a_set_in_a_folder_is_read_by_configuration_and_split(name: str, files: list[str], sets: Path) -> None:
    assert places_of(name.format(sets)) == [f"{sets}/{file}:{n}" for file in files for n in (1, 2, 3)]


def test_a_folder_that_datasets_saved_is_read_in_its_order(sets: Path) -> None:
    assert places_of(str(sets / "one")) == [f"{sets}/one/data-0000{n}-of-00003.arrow:1" for n in range(3)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "{}/several",
            "it has several configurations: main, socratic; write config: main beside it, or in one name hub:",
        ),
        ("hub:{}/several:socratic", "it has several configurations: main, socratic; write config: socratic beside it"),
        ("hub:{}/several:mian:train", "no configuration 'mian' (there are: main, socratic)"),
        ("hub:{}/several:main:tset", "no split 'tset' (there are: train, test); write hub:{}/several:main:train"),
        ("hub:{}/splits:dev", "no split 'dev' (there are: train, test); write hub:{}/splits:train"),
        ("hub:{}/two:dev", "no split 'dev' (there are: train, test); write hub:{}/two:train"),
        ("hub:{}/two:a:test", "a set without configurations"),
        ("hub:{}/one:test", "a single set, without configurations and splits; write {}/one"),
        ("hub:{}/parameters:socratic:train", "its README.md wants its files read with field: rows"),
        ("hub:{}/pictures", "no set of rows of text: its files are for the builder ImageFolder"),
        ("hub:{}/nowhere/at/all", "neither the name of a set on the hub, nor a folder that is there"),
        ("hub:a/b:", "neither the name of a set"),
        ("hub:a/b:c:d:e", "neither the name of a set"),
    ],
)
def test_a_choice_in_a_set_that_is_not_there_is_named(name: str, said: str, sets: Path) -> None:
    with pytest.raises(DataError, match=re.escape(said.format(sets))) as error:
        list(read_rows(name.format(sets)))
    assert error.value.remedy and "\n" not in str(error.value)


def test_values_that_datasets_keeps_as_json_are_read_as_what_they_are(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], "extra": [1, "a"]}]
    saved = datasets.Dataset.from_dict({k: [r[k] for r in rows] for k in rows[0]}, on_mixed_types="use_json")
    assert "Json" in str(saved.features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "d.parquet")
    for name in ("saved", "d.parquet"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows == list(saved)


# ---- tables


def test_a_table_has_texts_and_json_where_a_key_wants_it(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": 'say "a,\nb"'}, {"role": "assistant", "content": "1"}])
    file = io.StringIO(newline="")
    csv.writer(file).writerows(
        [["", "messages", "weight", "topic"], ["0", turns, "0", ""], ["1", turns, "", "7"], [""] * 4]
    )
    (tmp_path / "d.csv").write_text(file.getvalue())
    rows = list(read_rows(tmp_path / "d.csv"))
    assert [row for _, row in rows] == [
        {"column 1": "0", "messages": json.loads(turns), "weight": 0},
        {"column 1": "1", "messages": json.loads(turns), "topic": "7"},
    ]
    (tmp_path / "e.csv").write_text('\n"prompt";completion\n"1, 2";3\n\n;\n"a\n\nb";"c ""d"""\n')
    assert [(place[-2:], row) for place, row in read_rows(tmp_path / "e.csv")] == [
        (":3", {"prompt": "1, 2", "completion": "3"}),
        (":6", {"prompt": "a\n\nb", "completion": 'c "d"'}),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv", 'prompt, completion\n"a, b", "c"\n'),
        ("d.csv", "\ufeffsep=;\r\nprompt;completion\r\na, b;c\r\n"),
        ("d.csv", '"sep=\t"\nprompt\tcompletion\na, b\tc\n'),
        ("d.tsv", "prompt;completion\na, b;c\n"),
        ("d.csv", '{"prompt": "a, b", "completion": "c"}\n'),
        ("d.tsv", '[\n  {"prompt": "a, b", "completion": "c"}\n]\n'),
    ],
)
def test_a_table_as_people_write_it(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert [row for _, row in read_rows(tmp_path / name)] == [{"prompt": "a, b", "completion": "c"}]


def test_blanks_that_are_a_cell_s_own_stay(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,completion\n a, b\n")
    assert [row for _, row in read_rows(tmp_path / "d.csv")] == [{"prompt": " a", "completion": " b"}]


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(TEXT, TEXT).filter(any), max_size=4),
    sep=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\r\n", "\n", "\r"]),
)
def test_what_pythons_csv_writes_is_read_back(cells: list[tuple[str, str]], sep: str, end: str, tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=sep, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "completion"), *cells])
    found = [(row.get("prompt", ""), row.get("completion", "")) for _, row in read_rows(tmp_path / "d.csv")]
    assert found == cells
