"""Supervised tokens shared out over sources: realised within one row of asked, the same from every door."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sftflow as sf
from helpers.runs import error_line, run
from sftflow.api.mixture import renderer_of
from sftflow.data.mixture import build_mixture
from sftflow.data.mixture_part import build_part
from sftflow.data.parts import Part
from sftflow.data.shares import check_shares, drawn, share_out
from sftflow.foundation.errors import DataError, RecipeError
from sftflow.recipe import Recipe, Train, load_recipe, parse_recipe
from sftflow.report.tables import as_text, mixture_tables
from sftflow.training.batch_plan import RowPlan
from sftflow.training.identity import recipe_identity


def recipe_of(entries: list[dict[str, Any]], **keys: Any) -> Recipe:
    made = parse_recipe({"mixture": [{"source": f"{n}.jsonl", **e} for n, e in enumerate(entries)], **keys}, "r.yaml")
    check_shares(made)
    return made


# ---- what is asked


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.integers(1, 5000), st.integers(0, 9), st.sampled_from([None, 1, 3])), min_size=1, max_size=6
    ),
    rest=st.integers(0, 3),
    temperature=st.sampled_from([None, 0.5, 1.0, 2.0, 1e6]),
    budget=st.one_of(st.none(), st.integers(1, 10**9)),
)
def test_asked_tokens_are_the_budget_in_the_shares_asked(
    sources: list[tuple[int, int, int | None]], rest: int, temperature: float | None, budget: int | None
) -> None:
    """A naive reckoning with fractions: shares as given, what is left in proportion to what the others hold."""
    parts = [part if temperature is None else 0 for _, part, _ in sources]
    others = not all(parts)
    total = sum(parts) + rest * others
    given_shares = [part / total if part else None for part in parts]
    assume(total == 0 or not others or rest)
    entries = [{"share": s, "repeat": r} for s, (_, _, r) in zip(given_shares, sources, strict=True)]
    assume(any(given_shares) or temperature or budget)
    recipe = recipe_of(entries, mixing_temperature=temperature, tokens=budget)
    n = [tokens for tokens, _, _ in sources]
    holds = [tokens * (r or 1) for tokens, _, r in sources]
    weights = [float(h) ** (1 / temperature) if temperature else float(h) for h in holds]
    free = sum(w for w, s in zip(weights, given_shares, strict=True) if not s)
    left = 1 - sum(s or 0 for s in given_shares)
    wanted = [s or left * w / free for s, w in zip(given_shares, weights, strict=True)]
    try:
        asked = share_out(recipe, n)
    except DataError as error:  # only where somebody said how often at most
        over = [
            w * budget > h for w, h, (_, _, r) in zip(wanted, holds, sources, strict=True) if r is not None and budget
        ]
        assert any(over) and "passes over" in str(error)
        return
    whole = sum(a.tokens for a in asked)
    assert whole == budget or (budget is None) or abs(whole - budget) <= len(asked)
    for a, share, hold, (_, _, r) in zip(asked, wanted, holds, sources, strict=True):
        assert abs(a.share - share) < 1e-9 and abs(a.tokens - share * (budget or whole)) <= 2
        assert a.tokens <= hold or (budget is not None and r is None)
    if budget is None:  # one more token would be too many for some source
        assert any(a.tokens + 2 >= hold for a, hold in zip(asked, holds, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    supervised=st.lists(st.integers(0, 50), min_size=1, max_size=40),
    tokens=st.integers(0, 3000),
    more=st.integers(0, 300),
    seed=st.text(max_size=3),
)
def test_rows_are_whole_passes_and_a_part_of_one(supervised: list[int], tokens: int, more: int, seed: str) -> None:
    each = np.array(supervised, np.int32)
    assume(each.sum() > 0)
    rows = drawn(each, tokens, seed)
    assert abs(int(each[rows].sum()) - tokens) <= max(supervised) / 2
    times = Counter(rows.tolist())
    passes = tokens // int(each.sum())
    assert all(passes <= times[row] <= passes + 1 for row in range(len(each)))
    assert drawn(each, tokens, seed).tolist() == rows.tolist()
    assert not times - Counter(drawn(each, tokens + more, seed).tolist())  # a larger budget keeps what a smaller has


HALF = {"share": 0.5}
REFUSED: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    ([{"share": 0.7}, {"share": 0.5}], {}, "mixture.1.share: the shares add up to 1.2; let them"),
    ([HALF, {"share": 0.3}], {}, "add up to 0.8, and there is no source without one to take the rest; let them add"),
    ([HALF, HALF, {}], {}, "the shares add up to 1, and nothing is left for 2; give it a share, too, or leave it out"),
    ([HALF, {}], {"mixing_temperature": 2}, "mixing_temperature: sources have a share, too"),
    ([{"share": 0}, {}], {}, "mixture.0.share: it should be greater than 0"),
    ([{"share": -0.1}, {}], {}, "mixture.0.share: it should be greater than 0"),
    ([{"share": 1.5}, {}], {}, "mixture.0.share: it should be less than or equal to 1"),
    ([{"share": True}, {}], {}, "mixture.0.share: it should be a number"),
    ([{}], {"mixing_temperature": 0}, "mixing_temperature: it should be greater than 0"),
    ([{}], {"tokens": "20X"}, "tokens: '20X' is not a whole number above 0; write for example 20M"),
    ([{}], {"tokens": 0}, "tokens: 0 is not a whole number above 0"),
    ([{}], {"tokens": "-1M"}, "tokens: '-1M' is not a whole number above 0"),
    ([{}], {"tokens": 1.5}, "tokens: 1.5 is not a whole number above 0"),
    ([{}], {"tokens": True}, "tokens: it should be a number"),
    ([{}], {"order": "sorted"}, "order: it should be 'shuffled' or 'listed'"),
]


@pytest.mark.parametrize(("entries", "keys", "said"), REFUSED, ids=[said[:40] for _, _, said in REFUSED])
def test_what_does_not_fit_together_is_one_line(entries: list[dict[str, Any]], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of(entries, **keys)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("said", "meant"), [("20M", 20_000_000), ("1.5k", 1500), ("2G", 2 * 10**9), (4096, 4096), ("2e7", 20_000_000)]
)
def test_a_budget_is_written_as_people_do(said: Any, meant: int) -> None:
    assert recipe_of([{}], tokens=said).tokens == meant


def test_a_repeat_is_never_exceeded_and_the_remedy_fits() -> None:
    entries = [{"share": 0.5, "repeat": 4}, {}]
    with pytest.raises(DataError, match=r"0\.mixture|mixture\.0\.repeat") as refused:
        share_out(recipe_of(entries, tokens=2000), [100, 10_000])
    assert "0.5 of 2,000 supervised tokens are 10 passes over 0" in str(refused.value)
    assert str(refused.value).endswith("lower tokens to 800")
    assert [a.tokens for a in share_out(recipe_of(entries, tokens=800), [100, 10_000])] == [400, 400]
    assert [a.tokens for a in share_out(recipe_of(entries), [100, 10_000])] == [400, 400]  # the largest that there is


def test_a_temperature_near_zero_leaves_all_to_the_largest() -> None:
    for temperature in (1e-2, 1e-9, 5e-324):  # n^(1/T) itself would be no finite number
        recipe = recipe_of([{}, {}], mixing_temperature=temperature)
        assert [asked.tokens for asked in share_out(recipe, [40, 90])] == [0, 90]


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="0 has no supervised token to make its share of"):
        share_out(recipe_of([HALF, {}]), [0, 10])
    with pytest.raises(DataError, match="1 has no supervised token"):
        share_out(recipe_of([HALF, {}]), [10, 0])
    assert [a.tokens for a in share_out(recipe_of([HALF, {}, {}], tokens=8), [10, 0, 10])] == [4, 0, 4]


# ---- what is drawn


def token_rows(n: int, first: int) -> str:
    """Rows that are tokens already: their ids hang on no tokenizer."""
    rows = ([1, *range(first, first + 2 + i % 5), 7 + i % 3] for i in range(n))
    masks = ([0, *[0] * (1 + i % 2), *[1] * (2 + i % 5 - i % 2)] for i in range(n))
    pairs = zip(rows, masks, strict=True)
    return "".join(json.dumps({"input_ids": ids, "mask": mask}) + "\n" for ids, mask in pairs)


@pytest.fixture
def files(tmp_path: Path) -> list[dict[str, Any]]:
    for name, n, first in (("a", 40, 20), ("b", 25, 60), ("c", 60, 100)):
        (tmp_path / f"{name}.jsonl").write_text(token_rows(n, first))
    return [{"source": str(tmp_path / f"{name}.jsonl")} for name in "abc"]


def test_a_recipe_without_shares_is_what_it_was(files: list[dict[str, Any]]) -> None:
    plain = [files[0], {**files[1], "repeat": 3}]
    mixture = sf.mix(plain, "builtin:tiny", validation=0.2)
    assert mixture.digest() == "9afcc1b9fddf628c"  # of the version before there were shares
    assert not {"asked", "share", "passes", "decontaminated"} & set(mixture.sources[1])
    as_they_stand = sf.mix(plain, "builtin:tiny", validation=0.2, mixing_temperature=1)
    assert as_they_stand.digest() == mixture.digest()
    assert [s["passes"] for s in as_they_stand.sources] == [1, 3]


def test_realised_counts_stand_beside_the_asked_ones(files: list[dict[str, Any]]) -> None:
    entries = [{**files[0], "share": 0.5}, {**files[1], "share": 0.2}, files[2]]
    mixture = sf.mix(entries, "builtin:tiny", tokens="1K", validation=0.1)
    ledger = mixture.ledger
    assert [s["asked"] for s in ledger["sources"]] == [
        {"share": 0.5, "tokens": 500},
        {"share": 0.2, "tokens": 200},
        {"share": 0.3, "tokens": 300},
    ]
    for number, source in enumerate(ledger["sources"]):
        rows = mixture.rows[number]
        chosen = mixture.examples.chosen[mixture.examples.chosen[:, 0] == number, 1]
        assert source["supervised_tokens"] == rows.supervised[chosen].sum()
        assert abs(source["supervised_tokens"] - source["asked"]["tokens"]) <= rows.supervised.max()
        assert abs(source["share"] - source["supervised_tokens"] / ledger["supervised_tokens"]) < 1e-6
        assert not set(chosen) & set(mixture.held_out.chosen[mixture.held_out.chosen[:, 0] == number, 1])
    text = as_text(*mixture_tables(ledger))
    assert max(map(len, text.splitlines())) <= 80 and "50.00%" in text
    assert f"x{ledger['sources'][0]['passes']:.3g}" in text
    assert any("a: 500 supervised tokens are asked of" in line for line in mixture.notes())
    page = mixture._repr_html_()
    assert "500" in page and "passes" in page
    few = sf.mix([{**files[0], "share": 0.001}, files[1]], "builtin:tiny", tokens=1000, validation=0)
    assert few.ledger["sources"][0]["rows"] == 0
    assert "a: no row fits into its share, 1 supervised tokens" in few.notes()


def test_equal_digests_from_every_door(
    files: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line, Python, and parts that others have prepared; and what trains on it says the same."""
    entries = [{**files[0], "share": 0.5}, {**files[1], "repeat": 2}, files[2]]
    keys = {"base": "builtin:tiny", "tokens": 700, "validation": 0.1}
    path = tmp_path / "recipe.yaml"
    train = {"out": str(tmp_path / "run"), "max_length": 64, "tokens_per_step": 64, "steps": 1, "lr": 1e-3}
    path.write_text(json.dumps({**keys, "mixture": entries, "train": train, "order": "listed"}))
    said = run("mix", str(path), "--json")
    expected = json.loads(said.stdout)["data_sha256"]
    mixture = sf.mix([sf.read(entries[2]["source"]), *entries[:2]], **keys | {"max_length": 64})
    assert mixture.digest() != expected  # another order is another mixture
    mixture = sf.mix([*entries[:2], sf.read(entries[2]["source"])], **keys, max_length=64)
    assert mixture.digest() == expected
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "shared"))
    for number in (1, 2):
        build_part(mixture.recipe, renderer_of(mixture.recipe), Part(number, 2), lambda *_: None)
    assert build_mixture(mixture.recipe, renderer_of(mixture.recipe)).digest() == expected
    trained = sf.train(mix=mixture, order="listed", **{k: v for k, v in train.items() if k != "max_length"})
    (step,) = (json.loads(x) for x in (trained.directory / "metrics.jsonl").read_text().splitlines())
    assert set(step["source_loss"]) == {"a"}  # the first of the list
    plan = RowPlan(mixture.examples, Train(max_length=64, tokens_per_step=64), listed=True)
    assert json.loads((trained.directory / "ledger.json").read_text())["packed_rows"] == plan.epoch_size(0)
    assert json.loads((trained.directory / "ledger.json").read_text())["data_sha256"] == expected
    kept = load_recipe(trained.directory / "recipe.yaml")
    assert kept.tokens == 700 and [e.share for e in kept.mixture] == [0.5, None, None]
    assert [e.repeat for e in kept.mixture] == [None, 2, None] and sf.mix(recipe=kept).digest() == expected


@pytest.mark.slow
def test_two_processes_prepare_and_a_third_joins(files: list[dict[str, Any]], tmp_path: Path) -> None:
    entries = [{**files[0], "share": 0.5}, {**files[1], "share": 0.25}, files[2]]
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"base": "builtin:tiny", "tokens": "1K", "mixture": entries}))
    expected = sf.mix(recipe=path).digest()
    env = {**os.environ, "SFTFLOW_CACHE": str(tmp_path / "shared")}
    command = [sys.executable, "-m", "sftflow", "mix", str(path)]
    both = [subprocess.Popen([*command, "--part", part], env=env) for part in ("1/2", "2/2")]
    assert [process.wait() for process in both] == [0, 0]
    joined = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True, check=True)
    assert json.loads(joined.stdout)["data_sha256"] == expected


def test_the_name_of_a_source_counts_where_it_decides_what_is_drawn() -> None:
    def named(**keys: Any) -> Any:
        recipe = recipe_of([{"repeat": keys.pop("repeat", None)}], validation=0, **keys)
        return recipe_identity(recipe)

    assert named()["recipe.mixture[0].name"] == "null" and named(tokens=5)["recipe.mixture[0].name"] == '"0"'
    assert named(repeat=1) == named()  # as earlier versions wrote it


def test_a_bad_share_on_the_command_line_is_one_line(files: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"base": "builtin:tiny", "mixture": [{**files[0], "share": 0.5}, files[1]]}))
    for command in ("mix", "train"):
        line = error_line(run(command, str(path), "--set", "mixture.1.share=0.7"))
        assert line == f"error: {path}:1: mixture.1.share: the shares add up to 1.2; let them add up to 1, or less" or (
            "--set mixture.1.share=0.7: mixture.1.share: the shares add up to 1.2" in line
        )
