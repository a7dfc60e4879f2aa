"""One mixture rendered in parts by processes of their own: all that comes of it is what one process makes."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rendering_ranks import APART, LATE, OFF, SHARED, told_by
from helpers.runs import error_line, run
from helpers.several import launch
from helpers.tiny import make_renderer
from sftflow.chat.data_files import numbered_rows
from sftflow.chat.render import Renderer
from sftflow.chat.verify import ENDS, verify
from sftflow.data import prepare, row_cache
from sftflow.data import render_pool as worker
from sftflow.data.mixture import Mixture, build_mixture
from sftflow.data.mixture_part import PreparedPart, build_part
from sftflow.data.parts import Part, parse_part
from sftflow.foundation.errors import DataError, RecipeError, SchemaError, SftflowError
from sftflow.recipe import Recipe, parse_recipe

CHILD = """
import os, pickle, signal, sys
from sftflow.chat.render import Renderer
from sftflow.data import prepare
from sftflow.data.mixture_part import build_part
spec, recipe, part, killed_at = pickle.load(sys.stdin.buffer)
prepare.BLOCK_ROWS = 16

def progress(source, rows):
    if killed_at and source == "rows" and rows >= killed_at:
        os.kill(os.getpid(), signal.SIGKILL)

print(build_part(recipe, Renderer(None, spec.format, spec=spec), part, progress))
"""
"""a process that prepares a part: of it no more is imported than rendering takes"""


@pytest.fixture(scope="module")
def renderer(tokenizer_dir: Path) -> Renderer:
    return make_renderer(tokenizer_dir, "sftflow")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "BLOCK_ROWS", 16)
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "cache"))


def exchange(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"tell {i} é"}]}


def lines(rows: list[Any]) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


def recipe_of(*entries: dict[str, Any] | Path, **keys: Any) -> Recipe:
    train = {"max_length": 64, "tokens_per_step": 64, **keys.pop("train", {})}
    mixture = [{"source": str(e)} if isinstance(e, Path) else e for e in entries]
    return parse_recipe({"mixture": mixture, "train": train, **keys}, "test")


@pytest.fixture
def many(tmp_path: Path) -> Recipe:
    """Every kind of source, with bad rows, rows that are cut, keys that are ignored, and equal rows."""
    rows: list[Any] = [exchange(i % 190) for i in range(400)]
    rows[70] = {**exchange(70), "score": 1}
    rows[71] = {"messages": [{"role": "user", "content": "a " * 90}, {"role": "assistant", "content": "b"}]}
    for i in (33, 150, 390):
        rows[i] = {"messages": 7}
    (tmp_path / "rows.jsonl").write_bytes(lines([b"", *rows]))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines([exchange(i) for i in range(60)])))
    table = [{"prompt": f"q{i}", "completion": "a" * (i % 7 + 1)} for i in range(90)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "table.parquet", row_group_size=25)
    (tmp_path / "list.json").write_text(json.dumps([exchange(i) for i in range(40)]))
    (tmp_path / "folder").mkdir()
    for name, n in {"a.jsonl": 30, "empty.jsonl": 0, "b.jsonl.gz": 25, "c.jsonl": 20}.items():
        few = lines([*[exchange(i * n) for i in range(n)], *([{"messages": 8}] if name == "c.jsonl" else [])])
        (tmp_path / "folder" / name).write_bytes(gzip.compress(few) if name.endswith(".gz") else few)
    return recipe_of(
        {"source": str(tmp_path / "rows.jsonl"), "repeat": 2},
        {"source": str(tmp_path / "packed.jsonl.gz"), "limit": 41},
        {"source": str(tmp_path / "table.parquet"), "limit": 70},
        tmp_path / "list.json",
        {"source": "spelling", "limit": 50},
        {"source": str(tmp_path / "folder")},
        on_bad_row="skip",
        validation=0.1,
    )


def part(recipe: Recipe, renderer: Renderer, text: str) -> PreparedPart:
    return build_part(recipe, renderer, parse_part(text), lambda *_: None)


def alone(recipe: Recipe, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Mixture:
    """What one process makes that finds no parts, in blocks of the usual size."""
    with monkeypatch.context() as patch:
        patch.setenv("SFTFLOW_CACHE", str(cache))
        patch.setattr(prepare, "BLOCK_ROWS", 256)
        return build_mixture(recipe, renderer, every_row=True)


def files(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def require_same(found: Mixture, expected: Mixture) -> None:
    assert found.digest() == expected.digest()
    assert json.dumps(found.ledger) == json.dumps(expected.ledger)
    assert (found.notes(), found.bad) == (expected.notes(), expected.bad)
    assert found.held_out.chosen.tolist() == expected.held_out.chosen.tolist()
    assert [s.ids.tolist() for s in found.samples] == [s.ids.tolist() for s in expected.samples]


# ---- the split


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 120), of=st.integers(1, 40), size=st.integers(1, 9), key=st.integers(0, 2**64 - 1))
def test_every_row_is_in_one_part(n: int, of: int, size: int, key: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK_ROWS", size)
        patch.setattr(prepare, "BLOCK_BYTES", 20)
        found = []
        for number in range(1, of + 1):
            takes = lambda b, number=number: Part(number, of).takes(b, f"{key:016x}")  # noqa: E731
            rows = ((i, b"x" * (i % 9)) for i in range(n) if takes(i // size))
            blocks = prepare._blocks(rows, filter(takes, count()))
            found.append([(place, [i for i, _ in block]) for place, block in blocks])
    joined = sorted((place, rows) for blocks in found for place, rows in blocks)
    assert [i for _, rows in joined for i in rows] == list(range(n))
    assert all(place == i // size for place, rows in joined for i in rows)
    sizes = [len({place for place, _ in blocks}) for blocks in found]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=20, deadline=None)
@given(wanted=st.sets(st.integers(0, 59)))
def test_wanted_rows_are_those_of_all(tmp_path_factory: pytest.TempPathFactory, wanted: set[int]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(60)]
    (folder / "a.jsonl").write_bytes(lines([b"", *rows[:30], b"  ", *rows[30:]]))
    (folder / "b.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet", row_group_size=7)
    with pa.ipc.new_stream(folder / "d.arrow", pa.Table.from_pylist(rows).schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows), max_chunksize=11)
    for path in sorted(folder.iterdir()):
        everything = list(numbered_rows(str(path)))
        assert list(numbered_rows(str(path), wanted.__contains__)) == [everything[i] for i in sorted(wanted)]


@pytest.mark.parametrize(
    "text, expected", [("2/3", Part(2, 3)), (" 1/1 ", Part(1, 1)), ("0/3", Part(3, 3)), ("3/3", Part(3, 3))]
)
def test_a_part_is_read(text: str, expected: Part) -> None:
    assert parse_part(text) == expected


@pytest.mark.parametrize("text", ["", "2", "4/3", "-1/3", "1/0", "0/0", "a/b", "1/2/3", "1.5/3", "²/3"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^--part: .*; (write I/N|the parts are 1/3 to 3/3, or 0/3 to 2/3)"):
        parse_part(text)


@pytest.mark.parametrize("first", [0, 1])
def test_indexes_from_0_and_from_1_name_every_part_once(first: int) -> None:
    assert {parse_part(f"{i}/5") for i in range(first, first + 5)} == {Part(i, 5) for i in range(1, 6)}


# ---- parts and the whole


def started(recipe: Recipe, renderer: Renderer, which: Part, killed_at: int = 0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert child.stdin is not None
    pickle.dump((renderer.spec, recipe, which, killed_at), child.stdin)
    child.stdin.close()
    return child


def said(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    text = child.stdout.read().decode()
    child.wait()
    return text


def test_three_processes_at_once_one_killed_and_repeated(
    many: Recipe, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(many, renderer, monkeypatch, tmp_path / "other")
    children = [started(many, renderer, Part(i, 3), killed_at=100 if i == 2 else 0) for i in (1, 2, 3)]
    texts = [said(child) for child in children]
    assert [child.returncode for child in children] == [0, -signal.SIGKILL, 0]
    assert any(re.search(r"part [13] of 3: [\d,]+ rows, .*; 2 of 3 parts are ready \(missing: 2\)", t) for t in texts)
    left = [p.name for p in (tmp_path / "cache" / "rows").iterdir() if p.name.startswith(".")]
    assert len(left) == 1  # what was killed is there under no name that is looked for
    again = [started(many, renderer, Part(2, 3)) for _ in range(2)]  # twice at once
    assert all("3 of 3 parts are ready: sftflow mix and train join them" in said(child) for child in again)
    require_same(build_mixture(many, renderer, every_row=True), expected)
    joined = files(tmp_path / "cache")
    assert {name: data for name, data in joined.items() if left[0] not in name} == files(tmp_path / "other")


def test_more_parts_than_rows(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([exchange(i) for i in range(3)]))
    recipe = recipe_of(tmp_path / "rows.jsonl")
    prepared = [part(recipe, renderer, f"{i}/7") for i in range(7)]
    assert sorted(p.rows or 0 for p in prepared) == [0] * 6 + [3] and prepared[-1].ready == list(range(1, 8))
    require_same(build_mixture(recipe, renderer), alone(recipe, renderer, monkeypatch, tmp_path / "other"))
    assert "rows: 7 of 7 parts are joined" in caplog.messages
    assert part(recipe, renderer, "5/7").rows is None


def test_what_is_missing_is_rendered_by_whoever_asks(
    many: Recipe,
    renderer: Renderer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for text in ("1/2", "1/4", "2/4", "4/4"):  # of two kinds of parts the more whole one is joined
        part(many, renderer, text)
    rendered: list[int] = []
    real = prepare.render_block

    def counted(renderer: Renderer, job: Any, items: list[Any], n_verified: int, places: Any) -> Any:
        rendered.append(len(items))
        assert n_verified < 0  # what was proven of the parts is proven of the rest
        return real(renderer, job, items, n_verified, places)

    monkeypatch.setattr(prepare, "render_block", counted)
    found = build_mixture(many, renderer)
    assert "rows: 3 of 4 parts are joined; the rows of part 3 are rendered here" in caplog.messages
    assert 0 < sum(rendered) < 0.5 * 601
    n = len(rendered)
    build_mixture(many, renderer, every_row=True)
    assert len(rendered) == n
    require_same(found, alone(many, renderer, monkeypatch, tmp_path / "other"))


def test_parts_of_other_rows_are_not_joined(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([exchange(i) for i in range(60)]))
    for text in ("1/2", "2/2"):
        part(recipe_of(path), renderer, text)
    path.write_bytes(lines([exchange(i + 1) for i in range(60)]))
    build_mixture(recipe_of(path), renderer)
    path.write_bytes(lines([exchange(i) for i in range(60)]))
    build_mixture(recipe_of(path, train={"max_length": 48}), renderer)
    monkeypatch.setattr(row_cache, "code_hash", lambda *_: "of another version")
    build_mixture(recipe_of(path), renderer)
    assert not caplog.messages
    monkeypatch.undo()
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "cache"))
    build_mixture(recipe_of(path), renderer)
    assert caplog.messages == ["rows: 2 of 2 parts are joined"]


def test_a_file_that_changes_while_it_is_read_gives_no_part(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([exchange(i) for i in range(60)]))

    def progress(*_: Any) -> None:
        with path.open("ab") as file:
            file.write(lines([exchange(0)]))

    with pytest.raises(DataError, match=r"rows.jsonl: it was written to while it was read; run this again"):
        build_part(recipe_of(path), renderer, Part(1, 2), progress)
    assert not list((tmp_path / "cache" / "rows").iterdir())


# ---- what is wrong with rows


def test_the_earliest_bad_row_of_all_parts_is_told(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [exchange(i) for i in range(96)]
    rows[36] = rows[68] = {"messages": 7}
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    recipe, places = recipe_of(tmp_path / "rows.jsonl"), []
    for number in (1, 2, 3):  # six blocks of 16: the bad rows are in the third and the fifth
        try:
            part(recipe, renderer, f"{number}/3")
        except SchemaError as error:
            places.append(error.place.rpartition(":")[2])
    assert sorted(places) == ["37.messages", "69.messages"]
    with pytest.raises(SchemaError) as one:
        alone(recipe, renderer, monkeypatch, tmp_path / "other")
    with pytest.raises(SchemaError) as joined:
        build_mixture(recipe, renderer)
    assert str(joined.value) == str(one.value) and joined.value.place.endswith(":37.messages")


def test_the_share_of_bad_rows_is_that_of_all_parts(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n_bad in (4, 6):  # of 96, in one block: 4.2% and 6.3%
        rows: list[Any] = [{"messages": 7} if i < n_bad else exchange(i) for i in range(96)]
        (tmp_path / "rows.jsonl").write_bytes(lines(rows))
        recipe = recipe_of(tmp_path / "rows.jsonl", on_bad_row="skip")
        for text in ("1/2", "2/2"):
            part(recipe, renderer, text)
        if n_bad == 4:
            expected = alone(recipe, renderer, monkeypatch, tmp_path / "other")
            require_same(build_mixture(recipe, renderer, every_row=True), expected)
            continue
        with pytest.raises(DataError, match=r"6 of 96 rows are bad, more than 5%; the first: .*rows.jsonl:1"):
            build_mixture(recipe, renderer)


def test_the_first_failure_is_that_of_the_first_row(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opinion is told to find fault with some rows."""

    def doubting(renderer: Renderer, conversation: Any, *rest: Any) -> dict[str, str]:
        number = int(conversation.source.rpartition(":")[2])
        return {ENDS: "2 ends"} if number % 40 == 37 else verify(renderer, conversation, *rest)

    monkeypatch.setattr(worker, "verify", doubting)
    (tmp_path / "rows.jsonl").write_bytes(lines([exchange(i) for i in range(96)]))
    recipe = recipe_of(tmp_path / "rows.jsonl")
    for number in (1, 2, 3):
        part(recipe, renderer, f"{number}/3")
    found = build_mixture(recipe, renderer, every_row=True).invariants()
    assert found[ENDS] == {"checked": 96, "failed": 2, "first": f"{tmp_path / 'rows.jsonl'}:37: 2 ends"}
    with pytest.raises(SftflowError, match=r"rows.jsonl:37: .*2 ends \(2 rows fail\)"):
        build_mixture(recipe, renderer)


# ---- where parts are of no use


def test_where_nothing_is_kept_a_part_is_refused(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([exchange(0)]))
    recipe = recipe_of(tmp_path / "rows.jsonl")
    monkeypatch.setenv("SFTFLOW_CACHE", "off")
    with pytest.raises(DataError, match=r"^--part: nothing is kept here.*; set SFTFLOW_CACHE to a folder that all"):
        part(recipe, renderer, "1/2")
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "rows.jsonl" / "cache"))
    with pytest.raises(DataError, match=r"cache/rows: a part cannot be kept here \(Not a directory\); set SFTFLOW_"):
        part(recipe, renderer, "1/2")
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        part(recipe_of(tmp_path / "nowhere.jsonl"), renderer, "1/2")


def test_what_is_old_or_killed_leaves_the_cache_and_what_others_may_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, week = tmp_path / "rows", row_cache.LEFT_SECONDS
    for name in ("a.proven", "b", "b.1-of-2", ".c.7-00.tmp", "kept"):
        for age in ("old", "new"):
            path = folder / f"{name}.tmp" if name[0] == "." else folder / name
            path = path.with_name(f"{path.name}{age}" if name[0] != "." else f".{age}.7-00.tmp")
            path.mkdir(parents=True)
            (path / "ids.bin").write_bytes(bytes(100))
            if age == "old":
                then = time.time() - week - 60
                os.utime(path, (then, then))
    keep = [folder / "keptold"]
    row_cache.prune(folder, keep)  # far below the limit
    assert len(list(folder.iterdir())) == 9 and not (folder / ".old.7-00.tmp").exists()
    monkeypatch.setattr(row_cache, "CACHE_BYTES", 50)
    row_cache.prune(folder, keep)
    left = {"a.provennew", "bnew", "b.1-of-2new", ".new.7-00.tmp", "keptnew", "keptold"}
    assert {p.name for p in folder.iterdir()} == left
    monkeypatch.delenv("SFTFLOW_CACHE")  # a user's own cache has a limit
    row_cache.prune(folder, keep)
    assert {p.name for p in folder.iterdir()} == {"b.1-of-2new", ".new.7-00.tmp", "keptold"}


def test_the_command_tells_of_its_part_and_refuses_an_audit(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([exchange(i) for i in range(40)]))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"base": str(tiny_base), "mixture": [{"source": "rows.jsonl"}]}))
    for option in ("--out", "--html"):
        refused = run("mix", str(path), "--part", "1/2", option, str(tmp_path / "audit"))
        assert error_line(refused).startswith(f"error: --part: {option} writes the audit of all rows")
    done = run("mix", str(path), "--part", "1/2", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["part"], told["of"], told["ready"]) == (0, 1, 2, [1])
    done = run("mix", str(path), "--part", "0/2")
    assert re.fullmatch(r"part 2 of 2: \d+ rows, [\d,]+ tokens in [\d.]+ s; 2 of 2 parts are ready: .*\n", done.stdout)


def test_what_is_not_in_the_cache_is_never_cleared_away(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that cannot be kept lie among temporary files where the cache cannot be written at first."""
    (tmp_path / "kept.jsonl").write_bytes(lines([exchange(0), exchange(1)]))
    monkeypatch.setattr(prepare, "cache_key", lambda entry, *_: "00ab" if "kept" in entry.source else None)
    other = tmp_path / "temporary" / ".not.ours"
    other.mkdir(parents=True)
    os.utime(other, (0, 0))
    monkeypatch.setattr(prepare.tempfile, "tempdir", str(other.parent))
    cache = prepare.cache_folder()
    monkeypatch.setattr(prepare, "cache_folder", iter([None, cache]).__next__)
    (tmp_path / "other.jsonl").write_bytes(lines([exchange(2), exchange(3)]))
    found = build_mixture(recipe_of(tmp_path / "other.jsonl", tmp_path / "kept.jsonl"), renderer)
    assert [rows.directory.parent for rows in found.rows] == [other.parent, cache]
    assert other.is_dir()


# ---- the ranks of one run


def test_another_process_has_the_mixture_without_rendering(
    many: Recipe, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in (str(tmp_path / "cache"), "off"):
        monkeypatch.setenv("SFTFLOW_CACHE", cache)
        built = build_mixture(many, renderer)
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "render_block", None)
            require_same(build_mixture(many, renderer, prepared=pickle.loads(pickle.dumps(built.prepared()))), built)


@pytest.mark.slow
def test_one_rank_of_the_machines_that_share_a_cache_renders(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Two machines of two ranks; and the rendering rank comes later than the process group has patience for."""
    (tmp_path / "rows.jsonl").write_bytes(lines([exchange(i) for i in range(50)]))
    recipe = {"mixture": [{"source": "rows.jsonl"}], "train": {"max_length": 64, "tokens_per_step": 64}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = launch(4, "-m", "helpers.rendering_ranks", str(tmp_path), str(tokenizer_dir))
    assert done.returncode == 0, done.stderr[-3000:]
    told = told_by(tmp_path, 4)
    rendered = {way: [rank[way]["rendered"] for rank in told] for way in told[0]}
    assert rendered == {SHARED: [50, 0, 0, 0], APART: [50, 0, 50, 0], OFF: [50, 0, 50, 0], LATE: [50, 0, 0, 0]}
    ledgers = [rank[way]["ledger"] for rank in told for way in rank]
    assert all(ledger == ledgers[0] for ledger in ledgers)
    left = [path.name for path in (tmp_path / SHARED / "rows").iterdir()]
    assert len(left) == 1 and left[0][0] != "."


@pytest.mark.slow
def test_what_the_rendering_rank_refuses_ends_all_with_one_line(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([*[exchange(i) for i in range(20)], {"messages": 7}]))
    train = {"out": str(tmp_path / "run"), "steps": 2, "max_length": 64, "tokens_per_step": 64}
    recipe = {"base": str(tiny_base), "mixture": [{"source": "rows.jsonl"}], "train": train}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = [sys.executable, "-m", "sftflow", "train", str(tmp_path / "recipe.yaml"), "--nproc", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: {tmp_path / 'rows.jsonl'}:21.messages: it is a number")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_command_three_times_at_once_one_killed_and_repeated(many: Recipe, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([exchange(i) for i in range(1500)]))
    path = tmp_path / "recipe.yaml"
    entries = [entry.model_dump(exclude_none=True) for entry in many.mixture]
    path.write_text(json.dumps({"base": str(tiny_base), "mixture": entries, "on_bad_row": "skip"}))

    def command(*arguments: str, cache: str = "cache") -> subprocess.Popen[bytes]:
        environment = {**os.environ, "SFTFLOW_CACHE": str(tmp_path / cache), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "sftflow", "mix", str(path), *arguments]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)

    one = json.loads(command("--json", cache="other").communicate()[0])
    children = [command("--part", f"{i}/3") for i in (1, 2, 3)]
    while not list((tmp_path / "cache").glob("rows/.*.2-of-3.*.tmp")) and children[1].poll() is None:
        time.sleep(0.001)
    children[1].kill()
    told = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, -signal.SIGKILL, 0], told
    repeated = command("--part", "2/3")
    assert b"3 of 3 parts are ready" in repeated.communicate()[0]
    joined = command("--json")
    out, errors = joined.communicate()
    assert json.loads(out) == one and b"rows: 3 of 3 parts are joined" in errors
