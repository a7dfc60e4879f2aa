"""Preparing a data set: the same rows on one core and on all, from the cache and anew; bad rows; the second opinion."""

from __future__ import annotations

import functools
import json
import sys
import unicodedata
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.tiny import make_renderer
from helpers.tokenizers import KINDS
from sftflow.chat import fast_bpe as words
from sftflow.chat.fewest_tokens import NFC_SHRINKS, FewestTokens
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.verify import BOS, CONTROL, ENDS, PARITY, verify
from sftflow.data import prepare
from sftflow.data import render_pool as worker
from sftflow.data.mixture import build_mixture, write_bad_rows
from sftflow.foundation.errors import DataError, MaskError, RunError, SchemaError, SftflowError
from sftflow.packing.pack import best_fit
from sftflow.recipe import Recipe, parse_recipe


def recipe(*sources: Any, **extra: Any) -> Recipe:
    train = {"max_length": 64, "tokens_per_step": 64, **extra.pop("train", {})}
    return parse_recipe({"mixture": [{"source": str(s)} for s in sources], "train": train, **extra}, "test")


def write(path: Path, rows: list[Any]) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def exchange(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"ask {i} é"}, {"role": "assistant", "content": f"tell {i}\n😀"}]}


# ---- words


@pytest.fixture(scope="module")
def caches(tokenizer_dir: Path, known_tokenizers: dict[str, Path]) -> list[tuple[Any, words.WordCache]]:
    """Tokenizers, and what remembers their words."""
    from tokenizers import Tokenizer

    places = [tokenizer_dir, *(p for name, p in known_tokenizers.items() if not name.endswith("llama2"))]
    backends = [Tokenizer.from_file(str(p / "tokenizer.json")) for p in places]
    found = [(backend, words.WordCache.of(backend)) for backend in backends]
    assert all(cache is not None for _, cache in found)
    return found  # type: ignore[return-value]


ANY_TEXT = st.text(
    st.one_of(
        st.sampled_from(list(" \n\r\t'\"s.,!?aA1_-+")),
        st.characters(max_codepoint=0x17F, exclude_categories=("Cs",)),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
def test_remembered_words_are_the_tokenizers_own(caches: list[tuple[Any, words.WordCache]], text: str) -> None:
    for backend, cache in caches:
        assert cache.encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_a_long_word_is_encoded_alike_and_not_remembered(caches: list[tuple[Any, words.WordCache]]) -> None:
    for backend, cache in caches:
        for text in ("w" * 3000, " " * 3000, "é" * 3000, "abc" * 900 + " x"):
            assert cache.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert max(map(len, cache._words)) <= 100


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_text_never_has_fewer_tokens_than_is_said(known_tokenizers: dict[str, Path], data: st.DataObject) -> None:
    """Above all where it is made of the tokenizer's longest tokens, of what composes, of what stands for blanks."""
    for fewest, backend, longest in counters(tuple(known_tokenizers.values())):
        odd = st.sampled_from(
            [*longest, "▁", "▁▁▁▁", "e\u0301", "\u1fbe\u0308\u0301", "\u1100\u1161\u11a8", "\u212a", " \n "]
        )
        text = "".join(data.draw(st.lists(st.one_of(odd, ANY_TEXT), max_size=6))) * data.draw(st.sampled_from([1, 40]))
        assert fewest(text, 1) <= len(backend.encode(text, add_special_tokens=False).ids)


@functools.cache
def counters(paths: tuple[Path, ...]) -> list[tuple[FewestTokens, Any, list[str]]]:
    from tokenizers import Tokenizer

    found = []
    for path in paths:
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
        texts = sorted((backend.decode([i]) for i in range(backend.get_vocab_size())), key=len, reverse=True)
        found.append((FewestTokens((path / "tokenizer.json").read_text(encoding="utf-8")), backend, texts[:60]))
    return found


def test_the_bound_of_a_text_says_something(known_tokenizers: dict[str, Path]) -> None:
    for fewest, backend, longest in counters(tuple(known_tokenizers.values())):
        text = "what is a token? " * 2000
        n = len(backend.encode(text, add_special_tokens=False).ids)
        assert n / 20 < fewest(text, 1000) <= n
        words = text.count("t ") + text.count("s ") + text.count("a ")
        assert fewest._ends_words and fewest(text, words) >= words
        assert fewest(text, n + 1) == 0 and fewest(longest[0], 10**6) == 0


def test_nothing_is_said_where_text_may_vanish() -> None:
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

    text = "some words  " * 500
    for kind in ("qwen3", "llama2"):
        for change in (
            {"normalizer": normalizers.Strip()},
            {"normalizer": normalizers.Replace(Regex("o+"), "")},
            {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])},
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])},
            {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
        ):
            backend = KINDS[kind]()[0]
            for name, value in change.items():
                setattr(backend, name, value)
            assert FewestTokens(backend.to_str())(text, 1) == 0, (kind, change)
        backend = KINDS[kind]()[0]
        backend.add_special_tokens([AddedToken("<|cut|>", lstrip=True, rstrip=True)])
        fewest, blanks = FewestTokens(backend.to_str()), "<|cut|>" + " \u3000\n" * 900 + "<|cut|>"
        assert fewest(blanks, 1) <= len(backend.encode(blanks, add_special_tokens=False).ids)
        data = json.loads(KINDS[kind]()[0].to_str())
        del data["model"]["vocab"]["<0x41>" if kind == "llama2" else "A"]
        assert FewestTokens(json.dumps(data))(text, 1) == 0


def test_composing_makes_one_byte_of_four_at_most() -> None:
    """Each composed character beside the longest text that becomes it."""
    sources: dict[str, int] = {}
    composed = []
    for char in (chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000):
        apart = unicodedata.normalize("NFD", char)
        if apart != char:
            composed.append((char, apart))
        if len(apart) == 1:
            sources[apart] = max(sources.get(apart, 0), len(char.encode()))
    for char, apart in composed:
        after = unicodedata.normalize("NFC", char).encode()
        longest = max(len(char.encode()), sum(sources[c] for c in apart))
        assert longest <= NFC_SHRINKS * len(after), char


def test_other_kinds_of_tokenizers_take_their_own_way(known_tokenizers: dict[str, Path]) -> None:
    from tokenizers import Tokenizer, models, normalizers

    for name, path in known_tokenizers.items():
        if name.endswith("llama2"):
            assert words.WordCache.of(Tokenizer.from_file(str(path / "tokenizer.json"))) is None
    plain = Tokenizer(models.BPE())
    assert words.WordCache.of(plain) is None
    plain.normalizer = normalizers.Lowercase()
    assert words.WordCache.of(plain) is None


@pytest.mark.parametrize("pattern", [r"\w+", r"\p{Han}+", r"[a-z[0-9]]", r"\d", r"\bx"])
def test_a_pattern_that_is_not_translated(pattern: str) -> None:
    assert words.python_pattern(pattern) is None


# ---- rows


def test_all_cores_give_the_rows_of_one(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes; and the same store to the byte."""
    path = write(tmp_path / "rows.jsonl", [exchange(i) for i in range(900)])
    renderer = make_renderer(tokenizer_dir, "sftflow")
    found = []
    for cores, cache in ((2, "many"), (1, "one")):
        monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / cache))
        monkeypatch.setattr(prepare, "n_cores", lambda n=cores: n)
        monkeypatch.setattr(prepare, "ALONE_BLOCKS", 1)
        monkeypatch.setattr(prepare, "BLOCK_ROWS", 100)
        mixture = build_mixture(recipe(path), renderer)
        (directory,) = (tmp_path / cache / "rows").iterdir()
        found.append(({p.name: p.read_bytes() for p in directory.iterdir()}, mixture.ledger))
    assert found[0] == found[1]
    direct = renderer.render(parse_row(exchange(0), f"{path}:1"))
    assert np.array_equal(mixture.rows[0].ids(0), direct.ids) and np.array_equal(mixture.rows[0].mask(0), direct.mask)
    assert mixture.rows[0].place(899) == f"{path}:900"


def test_a_dead_worker_is_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    renderer = make_renderer(tokenizer_dir, "sftflow")
    job = worker.Job(renderer.spec, "x", 64, "cut", "stop")
    with worker.Workers(job, 1) as workers:
        workers._processes[0].kill()
        with pytest.raises(RunError, match="worker process died"):
            list(workers.render([([(1, exchange(1))], 0)]))


def test_the_second_run_renders_nothing(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "rows.jsonl", [exchange(i) for i in range(20)])
    renderer = make_renderer(tokenizer_dir, "sftflow")
    first = build_mixture(recipe(path), renderer)
    calls = []
    real = prepare.render_block

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(prepare, "render_block", counted)
    again = build_mixture(recipe(path), renderer)
    assert not calls and again.ledger == first.ledger
    # whatever a row depends on makes it anew
    build_mixture(recipe(path, train={"max_length": 32}), renderer)
    build_mixture(recipe(path), make_renderer(tokenizer_dir, "chatml"))
    write(path, [exchange(i) for i in range(21)])
    build_mixture(recipe(path), renderer)
    assert len(calls) == 3
    build_mixture(recipe(path), renderer, every_row=True)  # a sample was verified, now all shall be
    assert len(calls) == 4
    build_mixture(recipe(path), renderer)
    assert len(calls) == 4


def test_cache_off_keeps_nothing(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTFLOW_CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(tmp_path / "rows.jsonl", [exchange(1), exchange(2)])
    assert len(build_mixture(recipe(path, validation=0), make_renderer(tokenizer_dir, "sftflow")).examples) == 2
    assert not (tmp_path / "home").exists()


# ---- bad rows

GOOD = exchange(0)
BAD = {
    "bad JSON": (b'{"messages": [', DataError, "not JSON"),
    "bad UTF-8": (b'{"messages": "\xff"}', DataError, "not UTF-8"),
    "half a character": (rb'{"prompt": "x \ud83d", "completion": "y"}', DataError, "a lone surrogate"),
    "deep": (
        b'{"prompt": ' + b"[" * 700 + b"]" * 700 + b', "completion": "y"}',
        DataError,
        "nested more than 100 deep",
    ),
    "a huge number": (b'{"prompt": "x", "completion": "y", "n": 1' + b"0" * 5000 + b"}", DataError, "4,300 digits"),
    "zero bytes": (b'{"prompt": "x", "comp' + bytes(40), DataError, "NUL bytes"),
    "wrong type": ({"messages": 7}, SchemaError, "it is a number"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, SchemaError, "role 'narrator' is not known"),
    "empty": ({"messages": []}, SchemaError, "no messages"),
    "no assistant": ({"messages": [{"role": "user", "content": "x"}]}, SchemaError, "no assistant turn"),
    "role order": (
        [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        SftflowError,
        "two user turns in a row",
    ),
    "no history": ([{"role": "assistant", "content": "x"}], SftflowError, "does not follow a user turn"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_or_is_quarantined(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    row, error, fact = BAD[kind]
    path = write(tmp_path / "rows.jsonl", [*[exchange(i) for i in range(30)], row, GOOD])
    renderer = make_renderer(tokenizer_dir, "sftflow")
    with pytest.raises(error, match=fact) as caught:
        build_mixture(recipe(path), renderer)
    assert caught.value.place.startswith(f"{path}:31")
    mixture = build_mixture(recipe(path, on_bad_row="skip", validation=0), renderer)
    (source,) = mixture.ledger["sources"]
    assert (source["rows"], source["bad"], source["dropped"]) == (31, 1, 1)
    write_bad_rows(tmp_path, mixture)
    (quarantined,) = map(json.loads, (tmp_path / "bad_rows.jsonl").read_text().splitlines())
    assert quarantined["source"] == f"{path}:31" and fact in quarantined["reason"] and quarantined["row"]


def test_a_bad_row_that_json_cannot_hold_is_quarantined_all_the_same(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Dates, bytes and decimals of Parquet; half a character and NaN of a JSON array."""
    bad = {"when": datetime(2020, 1, 1), "raw": b"\xff", "price": Decimal("1.5")}
    rows = [{"prompt": f"q{i}", "completion": "a", **bad} for i in range(30)]
    rows[4]["completion"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    told = [*([exchange(i) for i in range(60)]), {"messages": "\ud83d"}, {"messages": float("nan")}]
    (tmp_path / "rows.json").write_text(json.dumps(told))
    renderer, found = make_renderer(tokenizer_dir, "sftflow"), []
    for name in ("rows.parquet", "rows.json"):
        mixture = build_mixture(recipe(tmp_path / name, on_bad_row="skip", validation=0), renderer)
        write_bad_rows(tmp_path, mixture)
        lines = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
        found += [(Path(row["source"]).name, row["row"]) for row in map(json.loads, lines)]
    assert [place for place, _ in found] == ["rows.parquet:5", "rows.json:61", "rows.json:62"]
    assert (
        found[0][1]["when"].startswith("2020-01-01") and found[1][1] == told[60] and found[2][1] == {"messages": None}
    )


def test_rows_from_memory_are_named_as_such(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [exchange(0), {"messages": 7}])
    loaded = parse_recipe({"mixture": [{"source": str(path), "place": "my list"}], "train": {"max_length": 64}}, "test")
    with pytest.raises(SchemaError, match=r"^my list:2\.messages: it is a number"):
        build_mixture(loaded, make_renderer(tokenizer_dir, "sftflow"))
    assert "place" not in loaded.model_dump()["mixture"][0]  # a written recipe names the file


def test_many_bad_rows_are_an_error_even_when_skipped(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, b"{", GOOD])
    with pytest.raises(DataError, match=r"1 of 3 rows are bad, more than 5%; the first: .*:2: not JSON"):
        build_mixture(recipe(path, on_bad_row="skip"), make_renderer(tokenizer_dir, "sftflow"))


# ---- the second opinion


def test_faults_are_seen(renderer: Renderer) -> None:
    row = parse_row(
        [
            {"role": "user", "content": "say <|bos|>"},
            {"role": "assistant", "content": "no <|assistant_end|> here"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ],
        "t:1",
    )
    right = renderer.render(row)
    assert verify(renderer, row, right) == {}
    n = len(right.ids)
    shifted = replace(right, mask=np.roll(right.mask, 1))
    assert {PARITY, ENDS} <= set(verify(renderer, row, shifted))
    endless = replace(right, mask=np.where(np.arange(n) == n - 1, 0, right.mask).astype(np.int8))
    assert set(verify(renderer, row, endless)) == {ENDS}
    bos = renderer.special["<|bos|>"]
    twice = replace(right, ids=np.concatenate([[bos], right.ids]), mask=np.concatenate([[0], right.mask]))
    assert {CONTROL, BOS, PARITY} <= set(verify(renderer, row, twice))
    look_alike = np.array(renderer.tokenizer(right.text, add_special_tokens=False).input_ids)
    as_control = replace(right, ids=look_alike, mask=np.resize(right.mask, len(look_alike)))
    assert CONTROL in verify(renderer, row, as_control)


def test_a_failing_invariant_stops_the_run(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTFLOW_CACHE", "off")
    monkeypatch.setattr(worker, "verify", lambda *_: {ENDS: "2 ends"})
    path = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(SftflowError, match=r"rows.jsonl:1: one supervised end of turn .*: 2 ends") as caught:
        build_mixture(recipe(path), make_renderer(tokenizer_dir, "sftflow"))
    assert caught.value.exit_code == 1 and not isinstance(caught.value, MaskError)


# ---- packing


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_is_the_plain_best_fit(lengths: list[int]) -> None:
    """Against the textbook's way: of all rows that take the item, the fullest, the earliest of equals."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [20 - sum(lengths[i] for i in row) for row in rows]
        fitting = [n for n in range(len(rows)) if free[n] >= lengths[item]]
        if fitting:
            rows[min(fitting, key=lambda n: (free[n], n))].append(item)
        else:
            rows.append([item])
    assert best_fit(lengths, 20) == [sorted(row) for row in rows]
