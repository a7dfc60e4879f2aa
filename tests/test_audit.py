"""The audit against brute force: lengths, duplicates, near-duplicates, overlap with evaluation sets; and its page."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from helpers.outside import outside
from helpers.report_data import HOSTILE, Page
from helpers.templates import CHATML, chat, open_with
from sftflow.chat.token_rows import Token, TokenRow
from sftflow.data.audit import Audit, audit, item_parts
from sftflow.data.audit.lengths import length_edges, spread
from sftflow.data.audit.near_duplicates import AGREE, candidates, minhash
from sftflow.data.audit.ngrams import SHINGLE, mix64, split_words
from sftflow.data.audit.overlap import NGRAM, EvalIndex, template_limit
from sftflow.data.store import ROW, Rows
from sftflow.report.audit_page import audit_page
from sftflow.report.charts import row_lengths
from sftflow.report.tables import audit_tables
from sftflow.tasks import GENERATED, TaskSource, make_task

fixed = settings(derandomize=True, deadline=None, max_examples=60)
WORDS = [f"w{i}" for i in range(5000)]


class Words:
    """A tokenizer whose tokens are whole words."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.words: list[str] = []

    def encode(self, text: str) -> NDArray[np.int32]:
        for word in text.split():
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return np.array([self.ids[w] for w in text.split()], np.int32)

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [" ".join(self.words[i] for i in row) for row in rows]


def in_memory(name: str, rows: list[tuple[NDArray[np.int32], NDArray[np.int8]]]) -> Rows:
    """The (ids, mask) rows of a source."""
    starts = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    lines = [
        (starts[i], len(ids), int(mask.sum()), i + 1, hash(ids.tobytes()) % 2**64, False)
        for i, (ids, mask) in enumerate(rows)
    ]
    ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in rows)])
    masks = np.concatenate([np.zeros(0, np.int8), *(mask for _, mask in rows)])
    return Rows(np.array(lines, ROW), ids, masks, name=name, number=0, prefix=name)


def store(words: Words, name: str, texts: list[str]) -> Rows:
    """Rows whose second half is supervised."""
    ids = [words.encode(text) for text in texts]
    return in_memory(name, [(row, (np.arange(len(row)) >= len(row) // 2).astype(np.int8)) for row in ids])


def run(*sources: list[str], **options: Any) -> Audit:
    words = Words()
    return audit([store(words, f"s{i}", texts) for i, texts in enumerate(sources)], words.decode, **options)


# ---- oracles


def plain_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = plain_words(text)
    if len(words) < SHINGLE:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def similarity(a: str, b: str) -> float:
    x, y = shingle_set(a), shingle_set(b)
    return len(x & y) / len(x | y) if x | y else 0.0


def near_rows(texts: list[str]) -> set[int]:
    """Rows, no exact copies, with an earlier near-duplicate."""
    first = [i for i, t in enumerate(texts) if t not in texts[:i]]
    sets = {i: shingle_set(texts[i]) for i in first}

    def near(i: int, j: int) -> bool:
        return bool(sets[i]) and len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])

    return {i for i in first if any(near(i, j) for j in first if j < i)}


def inside(part: list[str], row: list[str]) -> bool:
    return any(row[i : i + len(part)] == part for i in range(len(row) - len(part) + 1))


def grams(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def overlap_oracle(items: list[tuple[str, ...]], texts: list[str]) -> tuple[set[int], int, int]:
    """(contaminated items, unchecked items, template n-grams) by the rule's words."""
    parts = [[plain_words(p) for p in item] for item in items]
    own = [set().union(*(grams(p) for p in item)) for item in parts]
    often = {g for g, n in Counter(g for s in own for g in s).items() if n > template_limit(len(items))}
    rows = [plain_words(t) for t in texts]
    trained = set().union(*(grams(r) for r in rows)) if rows else set()
    found, unchecked = set(), 0
    for i, item in enumerate(parts):
        if own[i]:
            unchecked += not own[i] - often
            if (own[i] - often) & trained:
                found.add(i)
        elif sum(map(len, item)) < 4:
            unchecked += 1
        elif any(all(inside(p, r) for p in item if p) for r in rows):
            found.add(i)
    return found, unchecked, len(often)


# ---- words


def test_nothing_that_draws_is_loaded_with_the_audit() -> None:
    late = ("sftflow.report", "rich", "jinja2")
    code = f"import sys; from sftflow.data.audit import audit; sys.exit(any(m in sys.modules for m in {late}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@fixed
@given(st.lists(st.text(st.characters(max_codepoint=0x2FF, exclude_categories=["Cs"])), max_size=5))
def test_words_are_those_of_a_regular_expression(texts: list[str]) -> None:
    found = split_words(texts)
    assert [found.row(i).split(" ") if found.row(i) else [] for i in range(len(texts))] == [
        plain_words(t) for t in texts
    ]


def test_scripts_without_spaces_give_a_word_a_character_and_marks_stay() -> None:
    found = split_words(["我们去, ok", "नमस्ते दुनिया", "ひらがな", "a\ud800b"])
    assert [found.row(i) for i in range(4)] == ["我 们 去 ok", "नमस्ते दुनिया", "ひ ら が な", "a b"]


@fixed
@given(st.lists(st.sampled_from(["ab", "c", "é", "好"]), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 4))
def test_equal_runs_of_words_have_equal_hashes_wherever_they_stand(words: list[str], width: int, shift: int) -> None:
    text = " ".join(words)
    found = split_words(["x y " * shift, text, "z. " + text.upper()])
    hashes = found.ngrams(width)
    runs: dict[tuple[str, ...], set[int]] = {}
    at = [i for i in range(len(hashes)) if found.fits(np.array([i]), width)[0]]
    for i in at:
        runs.setdefault(tuple(found.text(i, i + width).split()), set()).add(int(hashes[i]))
    assert all(len(h) == 1 for h in runs.values())
    assert len({h for s in runs.values() for h in s}) == len(runs)
    expected = sum(max(0, len(plain_words(t)) - width + 1) for t in ["x y " * shift, text, "z. " + text])
    assert len(at) == expected


# ---- lengths


@fixed
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=60))
def test_quantiles_and_bins(lengths: list[int]) -> None:
    values = np.array(lengths, np.int32)
    found = spread(values)
    ordered = sorted(lengths)
    for q in (5, 25, 50, 75, 95, 99):
        # The smallest value that at least q% of the rows do not exceed.
        expected = next(v for v in ordered if 100 * sum(x <= v for x in ordered) >= q * len(ordered))
        assert found[f"p{q}"] == expected
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])
    edges = length_edges(values)
    assert edges[0] <= ordered[0] and ordered[-1] < edges[-1] and list(edges) == sorted(set(edges))


def test_lengths_of_sources_share_their_bins() -> None:
    a = run(["a b c", "a b c d e f g h i"], ["x " * 120])
    assert [s.lengths["max"] for s in a.sources] == [9, 120] and a.overall.rows == 3
    one, two, all_ = (s.lengths["histogram"] for s in (*a.sources, a.overall))
    assert one["edges"] == two["edges"] == all_["edges"]
    assert sum(one["counts"]) == 2 and sum(all_["counts"]) == 3
    at = next(i for i, (lo, hi) in enumerate(pairwise(all_["edges"])) if lo <= 120 < hi)
    assert two["counts"][at] == 1
    assert a.sources[0].supervised["max"] == 5 and a.sources[0].supervised["share"] == round(7 / 12, 5)


# ---- duplicates


@fixed
@given(st.lists(st.lists(st.sampled_from(["a", "b", "a b", "b a", "c c c"]), max_size=12), min_size=1, max_size=4))
def test_duplicates_against_brute_force(sources: list[list[str]]) -> None:
    found = run(*sources)
    flat = [(s, t) for s, texts in enumerate(sources) for t in texts]
    first = [next(j for j, (_, u) in enumerate(flat) if u == t) for _, t in flat]
    counts = Counter(t for _, t in flat)
    for s, texts in enumerate(sources):
        copies = [i for i, (owner, _) in enumerate(flat) if owner == s and first[i] != i]
        d = found.sources[s].duplicates
        assert d.rows == len(copies)
        assert d.of_other_sources == sum(flat[first[i]][0] != s for i in copies)
        assert d.groups == len({t for t in texts if counts[t] > 1})
        assert [g.rows for g in d.examples] == sorted((counts[t] for t in set(texts) if counts[t] > 1), reverse=True)
    assert found.overall.duplicates.rows == len(flat) - len(counts)


def test_examples_name_the_first_places() -> None:
    found = run(["a b", "c d", "a b"], ["a b", "a b"])
    group = found.overall.duplicates.examples[0]
    assert group.rows == 4 and group.places == ("s0:1", "s0:3", "s1:1")


# ---- near-duplicates


def families(seed: int) -> list[str]:
    """Rows of many lengths, most with copies that are cut or changed a little or a lot, and some tiny ones."""
    rng = random.Random(seed)
    texts = []
    for _ in range(80):
        base = rng.choices(WORDS, k=rng.choice([3, 20, 60, 60, 100, 200]))
        texts.append(" ".join(base))
        for _ in range(rng.randrange(5)):
            copy = list(base)
            at, wide = rng.randrange(len(copy)), rng.choice([0, 1, 3, 6, 10, 20])
            copy[at : at + wide] = rng.choices(WORDS, k=min(wide, len(copy) - at))
            if rng.random() < 0.3:
                copy = copy[rng.randrange(3) :]
            text = " ".join(copy)
            texts.append(text.upper() + "!" if rng.random() < 0.2 else text)
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_against_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = families(seed)
    expected = near_rows(texts)
    assert len(expected) > 40
    monkeypatch.setattr("sftflow.data.audit.near_duplicates.EXAMPLES", len(texts))
    found = run(texts).overall.near_duplicates
    rows = {int(e.place.partition(":")[2]) - 1 for e in found.examples}
    assert len(rows) == found.rows
    assert rows <= expected  # nothing false
    assert len(rows) >= 0.99 * len(expected)
    for e in found.examples:
        i, j = (int(p.partition(":")[2]) - 1 for p in (e.place, e.of))
        assert j < i and e.similarity == round(similarity(texts[i], texts[j]), 4) >= 0.8


@fixed
@given(st.integers(0, 10_000), st.integers(0, 99))
def test_a_copy_with_one_word_of_a_hundred_changed_is_found(seed: int, at: int) -> None:
    """Its similarity is 0.90 or more, where the bands miss one pair in 10^8."""
    rng = random.Random(seed)
    rows = [rng.choices(WORDS, k=100) for _ in range(5)]
    copy = list(rows[2])
    copy[at] = "changed"
    found = run([" ".join(r) for r in rows], [" ".join(copy)])
    assert found.sources[0].near_duplicates.rows == 0
    near = found.sources[1].near_duplicates
    assert (near.rows, near.of_other_sources) == (1, 1)
    assert near.examples[0].of == "s0:3" and near.examples[0].similarity >= 0.9


@pytest.mark.parametrize(("changed", "low", "high"), [(6, 0.995, 1.0), (32, 0.0, 0.45)])
def test_the_bands_recall(changed: int, low: float, high: float) -> None:
    """Pairs at similarity 0.81 become candidates with probability 0.9996; at 0.45, 0.31 share a band but too few of
    their minima agree."""
    rng = random.Random(1)
    found = 0
    for _ in range(300):
        base = rng.choices(WORDS, k=100)
        copy = [*base[:30], *rng.choices(WORDS, k=changed), *base[30 + changed :]]
        signatures, some = minhash(split_words([" ".join(base), " ".join(copy)]))
        assert some.all()
        found += len(candidates(signatures)[0])
    assert low <= found / 300 <= high


def test_minima_agree_as_often_as_the_sets_overlap() -> None:
    rng = random.Random(2)
    agree, true = [], []
    for _ in range(200):
        base = rng.choices(WORDS, k=60)
        copy = [*base[: rng.randrange(20, 60)], *rng.choices(WORDS, k=10)]
        signatures, _ = minhash(split_words([" ".join(base), " ".join(copy)]))
        agree.append(float((signatures[0] == signatures[1]).mean()))
        true.append(similarity(" ".join(base), " ".join(copy)))
    gap = np.array(agree) - (np.array(true) + (1 - np.array(true)) / 256)
    assert abs(gap.mean()) < 0.01 and gap.std() < 0.06  # sqrt(s (1 - s) / 100) is at most 0.05
    assert AGREE == 65


def test_rows_of_few_words_resemble_only_the_same_words() -> None:
    found = run(["Hi there", "hi, there!", "hi their", "...", "!!!", "there hi"])
    assert found.overall.near_duplicates.rows == 1
    assert found.overall.near_duplicates.examples[0].place == "s0:2"


def test_exact_copies_are_no_near_duplicates_and_the_likest_row_is_named() -> None:
    rng = random.Random(9)
    base = rng.choices(WORDS, k=150)
    little, more = [*base[:-1], "x"], [*base[:-12], *"abcdefghijkl"]
    found = run([" ".join(r) for r in (more, base, little)], [" ".join(little)])
    assert [(s.duplicates.rows, s.near_duplicates.rows) for s in found.sources] == [(0, 2), (1, 0)]
    assert [(e.place, e.of) for e in found.overall.near_duplicates.examples] == [("s0:2", "s0:1"), ("s0:3", "s0:2")]


def test_many_rows_of_one_template_stay_affordable() -> None:
    """A thousand rows, every pair at similarity 0.6 or so: each is compared with a few others, not with all."""
    rng = random.Random(3)
    base = rng.choices(WORDS, k=60)
    texts = [" ".join([*base, *rng.choices(WORDS, k=14)]) for _ in range(1000)]
    signatures, _ = minhash(split_words(texts))
    later, earlier = candidates(signatures)
    assert len(later) < 80 * len(texts) and (earlier < later).all()
    assert run(texts[:200]).overall.near_duplicates.rows == 0


# ---- overlap


@st.composite
def overlap_cases(draw: st.DrawFn) -> tuple[list[tuple[str, ...]], list[str]]:
    """Items and rows made of a few shared sentences, so that they meet in all the ways there are."""
    word = st.sampled_from(["a", "B", "c", "d1", "é"])
    pieces = draw(st.lists(st.lists(word, min_size=1, max_size=9).map(" ".join), min_size=2, max_size=5))
    text = st.lists(st.sampled_from(pieces), min_size=0, max_size=4).map(", ".join)
    items = draw(st.lists(st.lists(text, min_size=1, max_size=2).map(tuple), min_size=1, max_size=8))
    return items, draw(st.lists(text, min_size=0, max_size=6))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(overlap_cases())
def test_overlap_against_brute_force(case: tuple[list[tuple[str, ...]], list[str]]) -> None:
    items, texts = case
    found, unchecked, templates = overlap_oracle(items, texts)
    got = run(texts, eval_sets={"t": items}).overlap[0]
    assert (got.contaminated, got.unchecked, got.template_ngrams) == (len(found), unchecked, templates)
    assert got.items == len(items) and {e.item for e in got.examples} <= found
    assert got.sources == (("s0", len(found)),)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def test_overlap_by_task_and_source() -> None:
    rng = random.Random(4)
    items = {"long": [sentence(rng, 40) for _ in range(50)], "short": [(sentence(rng, 6), "yes") for _ in range(50)]}
    rows = [sentence(rng, 80) for _ in range(200)]
    thirteen = items["long"][7].split()[5 : 5 + NGRAM]
    rows[20] = f"{rows[20]} {' '.join(thirteen).upper()}? {rows[21]}"
    rows[30] = f"{rows[30]} {' '.join(items['long'][8].split()[: NGRAM - 1])} {rows[31]}"  # one word too few
    other = [sentence(rng, 30), f"{items['short'][3][0]}? Why, yes.", f"{items['short'][4][0]}: no", items["long"][7]]
    found = run(rows, other, eval_sets={**items, "none": []})
    long, short, none = found.overlap
    assert (long.contaminated, long.share, long.sources) == (1, 0.02, (("s0", 1), ("s1", 1)))
    assert (long.examples[0].item, long.examples[0].place) == (7, "s0:21")
    assert long.examples[0].words == " ".join(thirteen)
    assert (short.contaminated, short.sources) == (1, (("s0", 0), ("s1", 1)))
    assert (short.examples[0].item, short.examples[0].place) == (3, "s1:2")
    assert (none.items, none.contaminated, none.share) == (0, 0, 0.0)


def test_a_row_of_two_sources_overlaps_in_both() -> None:
    rng = random.Random(8)
    row = sentence(rng, 30)
    found = run([row, row], [row], eval_sets={"t": [row]}).overlap[0]
    assert found.contaminated == 1 and found.sources == (("s0", 1), ("s1", 1))


def test_wording_that_many_items_share_is_a_template() -> None:
    rng = random.Random(5)
    opening = "the following are multiple choice questions with answers about a subject taught in schools"
    items = [f"{opening} {sentence(rng, 20)}" for _ in range(40)]
    rows = [f"{opening} {sentence(rng, 30)}", items[3]]
    found = run(rows[:1], rows[1:], eval_sets={"t": items}).overlap[0]
    assert found.contaminated == 1 and found.sources == (("s0", 0), ("s1", 1))
    assert found.template_ngrams == len(opening.split()) - NGRAM + 1
    few = run(rows[:1], eval_sets={"t": items[:4]}).overlap[0]  # 4 of 4 items have it
    assert (few.contaminated, few.template_ngrams) == (0, found.template_ngrams)
    same = run(rows[:1], eval_sets={"t": [opening] * 30}).overlap[0]
    assert (same.contaminated, same.unchecked) == (0, 30)


def test_a_hash_that_collides_is_no_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    holds = EvalIndex._holds

    def spy(self: Any, *args: Any) -> bool:
        asked.append(args)
        return holds(self, *args)

    monkeypatch.setattr("sftflow.data.audit.ngrams.mix64", lambda x: mix64(x) & np.uint64(0xFFFF))
    monkeypatch.setattr(EvalIndex, "_holds", spy)
    rng = random.Random(6)
    items = [sentence(rng, 30) for _ in range(10)]
    rows = [sentence(rng, 60) for _ in range(100)]
    found = run(rows, [items[2]], eval_sets={"t": items}).overlap[0]
    assert len(asked) > 2 and found.contaminated == 1 and found.sources == (("s0", 0), ("s1", 1))


def test_special_tokens_do_not_glue_question_and_answer(tokenizer_dir: Path) -> None:
    """In `<|user|>Spell the word cat<|assistant|>c a t`, decoded without special tokens, "catc" is one word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    control = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>")}
    said = ["Be brief<|user|>Spell the word cat<|assistant|>", "c a t"]
    prompt, reply = (tokenizer(t, add_special_tokens=False).input_ids for t in said)
    mask = np.array([0] * len(prompt) + [1] * len(reply), np.int8)
    rows = in_memory("s", [(np.array(prompt + reply, np.int32), mask)])

    def decode(ids: list[list[int]]) -> list[str]:
        return [tokenizer.decode(i, skip_special_tokens=True) for i in ids]

    assert "catc" in decode([prompt + reply])[0]
    sets = {"t": [("Spell the word cat.", "c a t")]}
    assert audit([rows], decode, eval_sets=sets, control=control).overlap[0].contaminated == 1
    # The mask parts prompt and reply; nothing but the special token parts "brief" and "spell".
    control.pop("<|assistant|>")
    assert audit([rows], decode, eval_sets=sets, control=control).overlap[0].contaminated == 1
    assert audit([rows], decode, eval_sets=sets).overlap[0].contaminated == 0


def test_control_tokens_in_contents_are_counted(tokenizer_dir: Path) -> None:
    """Those in contents alone, a row that repeats as often as it stands there; by source, and over all."""
    renderer = open_with(tokenizer_dir, CHATML)
    end, start = "<|im_end|>", "<|im_start|>"
    texts = (
        [("a", f"yo{end}"), ("b", f"yo {end} no{end}{start}"), ("a", f"yo{end}"), ("c", "plain < |im_end|>")],
        [(f"what is {start}?", "a word"), ("a", f"yo{end}")],
    )
    sources = []
    for number, of_source in enumerate(texts):
        rendered = [renderer.render(chat(*row)) for row in of_source]
        sources.append(in_memory(f"s{number}", [(r.ids.astype(np.int32), r.mask) for r in rendered]))

    def decode(ids: list[list[int]]) -> list[str]:
        return [renderer.tokenizer.decode(i, skip_special_tokens=True) for i in ids]

    found = audit(sources, decode, control=renderer.special)
    first, second = (s.control_strings for s in found.sources)
    assert first == {end: {"times": 4, "rows": 3, "first": "s0:1"}, start: {"times": 1, "rows": 1, "first": "s0:2"}}
    assert second == {start: {"times": 1, "rows": 1, "first": "s1:1"}, end: {"times": 1, "rows": 1, "first": "s1:2"}}
    assert found.overall.control_strings[end] == {"times": 5, "rows": 4, "first": "s0:1"}
    sources_of_ledger = [{"name": s.name} for s in found.sources]
    ledger = found.into({"sources": sources_of_ledger})
    (table,) = [t for t in audit_tables({**ledger, "duplicates": {}}) if t.caption]
    assert [[str(x) for x in c.cells] for c in table.columns][1:3] == [["4", "1", "1", "1"], ["3", "1", "1", "1"]]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tasks_do_not_overlap_with_their_own_training_rows(name: str) -> None:
    """Formulaic prompts over disjoint words, numbers and phrasings: none of it is contamination."""
    rows = make_task(name, TaskSource(limit=1500)).conversations("train")
    items = make_task(name, TaskSource(limit=200, seed=1234)).items("test")
    texts = ["\n".join(m.text for m in c.messages) for c in rows]
    found = run(texts, eval_sets={name: [item_parts(i) for i in items]}).overlap[0]
    assert found.contaminated == 0 and found.unchecked < 0.2 * found.items
    leaked = run([*texts, "\n".join(item_parts(items[5]))], eval_sets={name: [item_parts(items[5])] * 2})
    assert leaked.overlap[0].contaminated == 2


def test_gsm8k_train_and_test_share_three_items() -> None:
    train = [json.loads(x) for x in outside("gsm8k", "train.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [item_parts(i) for i in make_task("gsm8k", TaskSource(path=str(outside("gsm8k", "test.jsonl")))).items()]
    texts = [f"{row['question']}\n{row['answer']}" for row in train]
    found = run(texts, eval_sets={"gsm8k": items})
    overlap = found.overlap[0]
    assert (overlap.items, overlap.contaminated) == (1319, 3)
    assert sorted({e.item for e in overlap.examples}) == [581, 602, 632]
    trained = set().union(*(grams(plain_words(t)) for t in texts))
    assert {i for i, (question, _) in enumerate(items) if grams(plain_words(question)) & trained} == {581, 602, 632}
    assert found.overall.duplicates.rows == 0 and found.overall.near_duplicates.rows == 0


# ---- the whole


def example() -> tuple[dict[str, Any], Audit]:
    rng = random.Random(7)
    rows = [sentence(rng, rng.randrange(5, 90)) for _ in range(60)]
    rows += [rows[0], rows[1], f"{rows[2]} more"]
    items = {"t": [rows[5], sentence(rng, 20)], "clean": [sentence(rng, 20)]}
    found = run(rows, rows[3:9], eval_sets=items)
    counts = {"cut": 0, "dropped": 0, "bad": 0, "expanded": 0, "validation_rows": 0, "boundary_splits": 0}
    more = {"repeat": 2, "tokens": 100, "supervised_tokens": 40, **counts, "dropped_why": {}}
    sources = [{"name": s.name, "rows": s.rows, **more} for s in found.sources]
    ledger = {"sources": sources, "rows": 69, "tokens": 200, "supervised_tokens": 80, "packed_rows": 3}
    more = {"validation_rows": 0, "bad_rows": [], "data_sha256": "ab12"}
    return {**ledger, **more, "padding_share": 0.25, "max_length": 64}, found


def test_json_is_plain_and_deterministic() -> None:
    (_, a), (ledger, b) = example(), example()
    text = json.dumps(a.to_json())
    assert text == json.dumps(b.to_json()) and json.loads(text) == a.to_json()
    merged = b.into(ledger)
    assert merged["rows"] == 69 and merged["sources"][1]["repeat"] == 2
    assert {"lengths", "supervised", "duplicates", "near_duplicates"} <= set(merged["sources"][0]) & set(merged)
    assert merged["sources"][1]["duplicates"]["of_other_sources"] == 6
    assert merged["overlap"]["t"]["contaminated"] == 1 and merged["overlap"]["clean"]["contaminated"] == 0
    assert "duplicates" not in ledger


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = example()[1].to_json()
    monkeypatch.setattr("sftflow.data.audit.rows.CHUNK_TOKENS", 50)
    assert example()[1].to_json() == whole


@pytest.mark.parametrize("sources", [[], [[]], [[], ["a"]], [["..."], []], [["", "a b"]]])
def test_nothing_to_measure(sources: list[list[str]]) -> None:
    found = run(*sources, eval_sets={"t": ["one two three four five"], "e": [], "p": [(), ("",)]})
    assert found.overall.rows == sum(map(len, sources))
    assert all(t.contaminated == 0 for t in found.overlap)
    assert [t.unchecked for t in found.overlap] == [0, 0, 2]
    json.dumps(found.to_json())


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    run(["a b c"] * 3 + ["d e"], progress=lambda *a: seen.append(a))
    assert seen[-1] == (2, 2)


# ---- the page and the tables


def page_of(ledger: dict[str, Any], *samples: TokenRow) -> str:
    page = audit_page(ledger, samples)
    assert "<script" not in page and "http://" not in page and "https://" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    return page


def test_the_page_says_what_was_found() -> None:
    ledger, found = example()
    merged = found.into(ledger)
    merged["sources"][0] |= {"cut": 4, "dropped": 3, "dropped_why": {"longer than <max>": 3}, "name": "<b>s0"}
    merged["invariants"] = {
        "whole masks": {"checked": 69, "failed": 1, "first": "x:4 <i>"},
        "one end": {"checked": 69, "failed": 0, "first": None},
        "never run": {"checked": 0, "failed": 0, "first": None},
    }
    page = page_of(merged, TokenRow("x:1", (Token(3, "<hi>", b"<hi>", True),)))
    for said in (
        "3 longer than &lt;max&gt;",
        "&lt;b&gt;s0",
        "4 cut, 3 dropped",
        "<b>whole masks</b> failed in 1 of 69 checks",
        "x:4 &lt;i&gt;",
        "✓ holds",
        "not checked",
        "1 of 2 items of <b>t</b>",
        "max_length 64",
        "25.0% padding",
        "One row of each source",
        "&lt;hi&gt;",
    ):
        assert said in page, said
    assert page.count("<svg") == 2 and "<b>s0" not in page


def test_the_page_of_a_plain_ledger() -> None:
    ledger = example()[0]
    page = page_of(ledger)
    assert "<svg" not in page and "Overlap" not in page and "Invariants" not in page and "69 training rows" in page


def test_nothing_of_a_mixture_acts_in_its_page() -> None:
    ledger, found = example()
    merged = found.into(ledger) | {"bad_rows": [HOSTILE], "data_sha256": HOSTILE}
    merged["invariants"] = {HOSTILE: {"checked": 2, "failed": 1, "first": HOSTILE}}
    merged["overlap"] = {name + HOSTILE: task for name, task in merged["overlap"].items()}
    for s in merged["sources"]:
        s |= {"name": HOSTILE, "dropped": 1, "dropped_why": {HOSTILE: 1}}
        for repeated in s["duplicates"]["examples"] + s["near_duplicates"]["examples"]:
            repeated |= {"places": [HOSTILE]} if "places" in repeated else {"place": HOSTILE, "of": HOSTILE}
    for t in merged["overlap"].values():
        t["sources"] = [{"name": HOSTILE, "items": 1, "share": 1.0}]
        t["examples"] = [{"item": 0, "source": HOSTILE, "place": HOSTILE, "words": HOSTILE}]
    html = page_of(merged, TokenRow(HOSTILE, (Token(3, HOSTILE, HOSTILE.encode("utf-8", "replace"), True),)))
    page = Page(html)
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 20 and "\x00" not in html


def test_histograms_hold_at_their_edges() -> None:
    for edges, counts, limit in (((1, 2), (1,), None), ((1, 2), (0,), 1), ((400, 500), (7,), 512), ((10, 13), (9,), 4)):
        ElementTree.fromstring(row_lengths(edges, counts, limit, "<x>"))


def test_the_tables_fit_a_terminal() -> None:
    ledger, found = example()
    merged = found.into(ledger)
    merged["sources"][0]["name"] = "data/a_very_long_folder_name/with_a_long_file_name_in_it.train.jsonl"
    merged["overlap"]["[red]" + "x" * 70] = merged["overlap"]["t"]
    merged["invariants"] = {"a" * 90: {"checked": 1_000_000, "failed": 7, "first": "data.jsonl:" + "1" * 90}}
    console = Console(width=80, force_terminal=False)
    tables = audit_tables(merged)
    assert len(tables) == 3 and audit_tables(ledger) == []
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    lines = capture.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = "".join("".join(line.split()) for line in lines)
    assert "1,000,000" in text and "[red]" in text
