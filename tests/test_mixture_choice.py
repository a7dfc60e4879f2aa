"""What becomes of chosen rows: their order, those that the evaluation asks for, the course's mixture."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sftflow as sf
from helpers.outside import outside
from helpers.runs import Quiet, error_line, outcome, run, write_recipe
from helpers.several import launch
from helpers.training import FP32, spec
from sftflow.api.shared import eval_sets
from sftflow.checkpoint import load_info, resolve
from sftflow.data.audit.overlap import EvalIndex
from sftflow.data.run_rows import read_held_out, read_training_rows
from sftflow.evaluation.contamination import contamination_of_run
from sftflow.evaluation.options import open_tasks
from sftflow.foundation.errors import RecipeError
from sftflow.packing.pack import Example
from sftflow.recipe import load_recipe, parse_recipe
from sftflow.training.base_rate import rate_of_base
from sftflow.training.batch_plan import RowPlan
from sftflow.training.run import run_training
from sftflow.training.settings import resolve_recipe
from sftflow.training.signals import Stopped

Lines = Callable[[str, list[Any]], str]


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    def write(name: str, rows: list[Any]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


# ---- order: listed


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    epochs=st.sampled_from([1, 2, 2.5]),
    per_step=st.sampled_from([64, 128, 512]),
    seed=st.integers(0, 5),
)
def test_sources_come_in_the_order_of_the_list(counts: list[int], epochs: float, per_step: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = [number for number, n in enumerate(counts) for _ in range(n)]
    rng.shuffle(sources)
    rows = [
        Example(ids=np.arange(n), mask=np.ones(n, np.int8), source=s)
        for s, n in zip(sources, rng.integers(2, 60, len(sources)), strict=True)
    ]
    train = spec(tokens_per_step=per_step, micro_tokens=None, steps=None, epochs=epochs, seed=seed)
    plan = RowPlan(rows, train, listed=True)
    steps = [plan.step_rows(step) for step in range(plan.total_steps)]
    packed = [row for step in steps for row in step]
    assert all(len({e.source for e in row}) == 1 for row in packed)  # no row mixes sources
    first = min(sources)
    assert steps[0][0][0].source == first and not plan.unreached()
    for epoch in range(int(epochs)):
        start = sum(plan.epoch_size(i) for i in range(epoch))
        of_epoch = packed[start : start + plan.epoch_size(epoch)]
        order = [row[0].source for row in of_epoch]
        assert order == sorted(order)  # source after source
        assert sorted(id(e) for row in of_epoch for e in row) == sorted(map(id, rows))  # each example once
    ends = np.cumsum([sum(row[0].source == s for row in packed[: plan.epoch_size(0)]) for s in range(len(counts))])
    mixed = [step for step in range(plan.epoch_size(0) // plan.rows_per_step) if len(_sources(steps[step])) > 1]
    assert all(any(step * plan.rows_per_step < end < (step + 1) * plan.rows_per_step for end in ends) for step in mixed)
    again = RowPlan(rows, train, listed=True)  # what a resumed run asks
    assert [[id(e) for e in row] for row in again.step_rows(plan.total_steps - 1)] == [
        [id(e) for e in row] for row in steps[-1]
    ]


def _sources(step: list[list[Example]]) -> set[int]:
    return {e.source for row in step for e in row}


def test_rows_within_a_source_are_shuffled_and_what_steps_do_not_reach_is_known() -> None:
    rows = [Example(ids=np.arange(60), mask=np.ones(60, np.int8), source=n // 20) for n in range(60)]
    plan = RowPlan(rows, spec(tokens_per_step=64, micro_tokens=None, steps=25, epochs=None), listed=True)
    seen = [next(n for n, e in enumerate(rows) if e is row[0]) for s in range(25) for row in plan.step_rows(s)]
    assert sorted(seen[:20]) == list(range(20)) != seen[:20] and {n // 20 for n in seen[20:]} == {1}
    assert plan.unreached() == [2]


def listed_recipe(folder: Path, base: Path, lines: Lines, **train: Any) -> Path:
    path = write_recipe(folder, base, **{"steps": 13, "tokens_per_step": 128, "micro_tokens": 128, **train})
    recipe = json.loads(path.read_text())
    other = lines("other.jsonl", [{"prompt": f"Say {n}.", "completion": f"{n}, {n}."} for n in range(60)])
    recipe |= {"mixture": [{"source": other}, *recipe["mixture"]], "order": "listed"}
    path.write_text(json.dumps(recipe))
    return path


class StopAt(Quiet):
    def step(self, log: Any, total: int) -> None:
        if log.step == 9:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_listed_run_begins_with_the_first_source_and_resumes_bitwise(
    tiny_base: Path, tmp_path: Path, lines: Lines
) -> None:
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    run_training(load_recipe(listed_recipe(folders[0], tiny_base, lines)), Quiet())
    recipe = load_recipe(listed_recipe(folders[1], tiny_base, lines))
    with pytest.raises(Stopped):
        run_training(recipe, StopAt())
    run_training(recipe, Quiet(), resume=True)
    expected, found = (outcome(folder / "run") for folder in folders)
    assert found == expected
    of_step = [set(row["source_loss"]) for row in found["metrics.jsonl"]]
    assert of_step[0] == {"other"} and {"rows"} in of_step
    assert of_step.index({"rows"}) > max(n for n, of in enumerate(of_step) if of == {"other"})


@pytest.mark.slow
def test_two_ranks_take_the_listed_steps_of_one(tiny_base: Path, tmp_path: Path, lines: Lines) -> None:
    rows = []
    for name, world in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        path = listed_recipe(tmp_path / name, tiny_base, lines, optimizer="adamw", steps=12)
        done = launch(world, "-m", "sftflow", "train", str(path))
        assert done.returncode == 0, done.stderr[-2000:]
        rows.append([json.loads(x) for x in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*rows, strict=True):
        assert (one["tokens"], set(one["source_loss"])) == (two["tokens"], set(two["source_loss"]))
        assert abs(one["loss"] - two["loss"]) < 1e-5


# ---- decontaminate: drop

WORDS = [
    "river",
    "stone",
    "maple",
    "copper",
    "lantern",
    "velvet",
    "orbit",
    "pepper",
    "marble",
    "cactus",
    "falcon",
    "ribbon",
    "tunnel",
    "anchor",
    "violin",
]


def question(rng: random.Random) -> str:
    return f"{' '.join(rng.choice(WORDS) for _ in range(18))} {rng.randrange(10**6)}?"


@pytest.fixture
def tested(lines: Lines, tiny_base: Path) -> dict[str, Any]:
    """A recipe whose rows hold five of the items that its tasks ask: copied whole, quoted, in two rows, a short one."""
    rng = random.Random(1)
    own, items = [question(rng) for _ in range(60)], [question(rng) for _ in range(10)]
    short = "Who keeps the amber key?"
    quoted = f"Listen. {' '.join(items[1].split()[2:17])} and so on"
    rows = [{"prompt": q, "completion": f"It is {n}."} for n, q in enumerate(own)]
    leaks = [items[0], quoted, items[2], items[2], short]
    rows += [{"prompt": q, "completion": "The otter family keeps it."} for q in leaks]
    rng.shuffle(rows)
    others = [{"prompt": q, "completion": "Yes."} for q in (items[3], own[0], question(rng), question(rng))]
    tests = [{"question": q, "answer": f"So.\n#### {n}"} for n, q in enumerate(items)]
    return {
        "base": str(tiny_base),
        "mixture": [{"source": lines("mine.jsonl", rows)}, {"source": lines("other.jsonl", others), "repeat": 3}],
        "validation": 0.3,
        "decontaminate": "drop",
        "eval": {
            "tasks": [
                f"gsm8k={lines('test.jsonl', tests)}",
                f"jsonl={lines('own.jsonl', [{'question': short, 'answer': 'The otter family keeps it.'}])}",
            ]
        },
        "train": {"max_length": 256, "tokens_per_step": 256},
    }


def found_in(rows: list[Any], recipe: Any) -> dict[str, int]:
    """How many items of each task the audit's overlap finds in these rows."""
    audited = sf.api.mixture.data_audit.audit(rows, DECODE[0], eval_sets=eval_sets(recipe), control=DECODE[1])
    return {task.task: task.contaminated for task in audited.overlap}


DECODE: list[Any] = []


def test_rows_that_hold_an_item_go_and_nothing_else(tested: dict[str, Any], tmp_path: Path) -> None:
    kept = sf.mix(recipe={**tested, "decontaminate": "report"})
    mixture = sf.mix(recipe=tested)
    tokenizer = mixture.renderer.tokenizer
    DECODE[:] = [
        lambda ids: tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True),
        mixture.renderer.special,
    ]
    recipe = mixture.recipe
    assert found_in(kept.rows_in_use(), recipe) == {"gsm8k": 4, "jsonl": 1}
    assert found_in(mixture.rows_in_use(), recipe) == {"gsm8k": 0, "jsonl": 0}
    ledger = [source["decontaminated"] for source in mixture.sources]
    assert ledger == [
        {"rows": 5, "tasks": {"gsm8k": 4, "jsonl": 1}},  # two equal rows hold one item
        {"rows": 1, "tasks": {"gsm8k": 1, "jsonl": 0}},
    ]
    assert "mine: 5 of 65 rows overlap with gsm8k (4), jsonl (1): left out" in mixture.notes()
    for side in ("examples", "held_out"):  # what is left is on the side where it was
        before, now = ({tuple(x) for x in getattr(m, side).chosen.tolist()} for m in (kept, mixture))
        gone = {(n, int(r)) for n, hit in enumerate(mixture.overlapping) for r in np.flatnonzero(hit.any(axis=1))}
        assert now == before - gone
    assert "decontaminated" not in kept.sources[0]
    audited = sf.api.audit({**tested})
    assert {name: task["contaminated"] for name, task in audited.ledger["overlap"].items()} == {"gsm8k": 0, "jsonl": 0}
    assert audited.ledger["data_sha256"] == mixture.digest()


def test_shares_are_taken_of_what_is_left_and_the_run_keeps_only_that(
    tested: dict[str, Any], tmp_path: Path, lines: Lines
) -> None:
    tested["mixture"][0]["share"], tested["tokens"] = 0.75, 400
    del tested["mixture"][1]["repeat"]
    path = tmp_path / "recipe.yaml"
    tested["train"] |= {"out": str(tmp_path / "run"), "steps": 2, "lr": 1e-3, "precision": "fp32"}
    path.write_text(json.dumps({**tested, "eval": {**tested["eval"], "limit": 3}, "compare": None}))
    made = sf.mix(recipe=path)
    assert [s["asked"]["tokens"] for s in made.sources] == [300, 100]
    recipe = load_recipe(path)
    from sftflow.api.shared import sets_to_drop

    run_training(recipe, Quiet(), eval_sets=sets_to_drop(recipe))
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger["data_sha256"] == made.digest()
    kept = read_training_rows(tmp_path / "run")
    assert [len(rows) for rows in kept.sources] == [int((~c.left_out).sum()) for c in made.choices]
    tasks = open_tasks(recipe.eval.tasks if recipe.eval else (), 3)
    found = contamination_of_run(tasks, tmp_path / "run", made.renderer)
    assert all(task.contaminated == 0 for task in found.values())
    for row in read_held_out(tmp_path / "run"):
        source, number = row.index
        assert kept.held_out[source][number] and np.array_equal(kept.sources[source].ids(number), row.ids)
    # another set of items is another run
    more = load_recipe(path, ["eval.limit=10"])
    with pytest.raises(sf.SftflowError, match="rows that overlap with evaluation tasks"):
        run_training(more, Quiet(), resume=True, eval_sets=sets_to_drop(more))


def test_without_a_task_it_is_one_line(tested: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**tested, "eval": None}))
    for command in ("mix", "train"):
        line = error_line(run(command, str(path)))
        assert line.endswith(
            "decontaminate: there is no evaluation task to look for; name some in eval.tasks, or leave it out"
        )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_row_that_holds_an_item_is_named(data: st.DataObject) -> None:
    """Against a naive search for 13 words in a row, on texts alone."""
    from sftflow.data.audit.ngrams import split_words

    rng = random.Random(data.draw(st.integers(0, 10**6)))
    items = [[rng.choice(WORDS) for _ in range(rng.randint(13, 30))] for _ in range(4)]
    rows = []
    for _ in range(12):
        words = [rng.choice(WORDS) for _ in range(rng.randint(0, 20))]
        item, n = rng.choice(items), rng.randint(5, 20)
        start = rng.randint(0, len(item) - 1)
        rows.append([*words, *item[start : start + n], *words])
    index = EvalIndex({"a": [" ".join(i) for i in items[:2]], "b": [" ".join(i) for i in items[2:]]}, ["rows"])
    found = index.rows_of_tasks(split_words([" ".join(row) for row in rows]))

    def holds(row: list[str], item: list[str]) -> bool:
        text = f" {' '.join(row)} "
        return any(f" {' '.join(item[i : i + 13])} " in text for i in range(len(item) - 12))

    expected = [[any(holds(row, item) for item in some) for some in (items[:2], items[2:])] for row in rows]
    assert found.tolist() == expected


# ---- the base's rate


def rated(info: dict[str, Any], meta: dict[str, Any] | None = None, **train: Any) -> tuple[float, str]:
    keys = {"lr": {"of_base": 0.8}, **train}
    return rate_of_base(parse_recipe({"mixture": [{"source": "spelling"}], "train": keys}, "r.yaml"), info, meta)


def test_a_rate_of_the_base_is_what_the_base_records() -> None:
    ours = {"recipe": {"train": {"lr": 2e-5, "optimizer": "adamw", "lora": None}}}
    assert rated(ours) == (pytest.approx(1.6e-5), "0.8 of the base's 2e-05")
    assert rated(ours, optimizer="adamw8bit")[0] == pytest.approx(1.6e-5)
    assert rated(load_info(resolve("builtin:tiny")), optimizer="muon")[0] == pytest.approx(0.8 * 0.007)
    with pytest.raises(
        RecipeError, match=r"r\.yaml: train\.lr: builtin:tiny does not record its learning rate; write a"
    ):
        rated({})
    with pytest.raises(RecipeError, match="does not record"):
        rated({}, {"user_config": {"matrix_lr": None}})
    with pytest.raises(RecipeError, match="was trained with adamw, whose rate says nothing of muon's; set "):
        rated(ours, optimizer="muon")
    with pytest.raises(RecipeError, match="says nothing of adamw and lora's; write a number"):
        rated(ours, lora={})


def test_of_picollms_base_the_matrices_get_their_rate() -> None:
    import torch

    from sftflow.training.optimizers import make_optimizers

    files = resolve(str(outside("fixtures/picollm/tiny_d4"))).nanochat
    assert files is not None
    meta = files.meta
    rate, _ = rated({}, meta, optimizer="muon")
    model = sf.load("builtin:tiny").model
    made = make_optimizers(model, spec(optimizer="muon", lr=rate))
    assert isinstance(made[0], torch.optim.Muon)
    assert made[0].param_groups[0]["lr"] == pytest.approx(0.8 * meta["user_config"]["matrix_lr"])


def test_the_resolved_recipe_has_the_number() -> None:
    asked = parse_recipe(
        {"mixture": [{"source": "spelling"}], "train": {"lr": {"of_base": 0.5}, "optimizer": "muon"}}, "r"
    )
    made, notes = resolve_recipe(asked, FP32, 3_000_000, load_info(resolve("builtin:tiny")))
    assert made.train.peak_lr == pytest.approx(0.0035) and notes["lr"] == "0.5 of the base's 0.007"


@pytest.mark.slow
def test_a_run_on_a_run_goes_on_from_its_rate(tmp_path: Path) -> None:
    keys = {"lr": {"of_base": 0.5}, "optimizer": "muon", "steps": 1, "max_length": 64, "tokens_per_step": 64}
    trained = sf.train(
        "builtin:tiny", sf.mix(sf.task("spelling", limit=20), "builtin:tiny"), out=tmp_path / "run", **keys
    )
    assert trained.recipe.train.lr == pytest.approx(0.0035)
    again = sf.train(str(tmp_path / "run"), trained_mix(tmp_path), out=tmp_path / "next", **keys)
    assert again.recipe.train.lr == pytest.approx(0.00175)


def trained_mix(tmp_path: Path) -> Any:
    return sf.mix(sf.task("spelling", limit=20), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("lr", "said"),
    [
        ({"of_bas": 0.8}, "train.lr.of_bas: unknown key; did you mean 'of_base'?"),
        ({"of_base": 0}, "train.lr: it should be 'auto', a number above 0, or {of_base: 0.8}"),
        ({}, "train.lr: it should be 'auto', a number above 0, or {of_base: 0.8}"),
        ("fast", "train.lr: it should be 'auto', a number above 0, or {of_base: 0.8}"),
    ],
)
def test_a_wrong_rate_is_one_line(lr: Any, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe({"mixture": [{"source": "spelling"}], "train": {"lr": lr}}, "r.yaml")
    assert said in str(refused.value)


# ---- the course's mixture


def test_the_courses_mixture_in_its_proportions(tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small sample of each source, of the shape that the published one has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello, what can I do?"}]
    chats = lines("smoltalk.jsonl", [{"messages": talk, "source": "everyday"} for _ in range(50)])
    (tmp_path / "data" / "mmlu").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k").mkdir()
    lines(
        "data/identity_conversations.jsonl", [[{**talk[0], "content": f"Who are you? {n}"}, talk[1]] for n in range(5)]
    )
    questions = {
        "question": [f"What is {n} + 1?" for n in range(9)],
        "subject": [""] * 9,
        "choices": [[str(n + k) for k in range(4)] for n in range(9)],
        "answer": [1] * 9,
    }
    pq.write_table(pa.table(questions), tmp_path / "data" / "mmlu" / "auxiliary_train.parquet")
    answer = "48/2 = <<48/2=24>>24 clips.\n#### 24"
    lines("data/gsm8k/train.jsonl", [{"question": f"How many are {n} halves?", "answer": answer} for n in range(7)])
    held = [{**questions, "question": [f"Is {n} + 1 known?" for n in range(9)]}]
    pq.write_table(pa.table(held[0]), tmp_path / "data" / "mmlu" / "test.parquet")
    lines("data/gsm8k/test.jsonl", [{"question": f"How many are {n} thirds?", "answer": answer} for n in range(3)])
    chat = [{**talk[0], "content": "Well?"}, talk[1]]
    sets = [
        "base=builtin:tiny", f"mixture.0.source={chats}", "train.max_length=512",
        f"validation.files.0.source={lines('held.jsonl', [{'messages': chat}])}",
    ]  # fmt: skip
    recipe = load_recipe("builtin:picollm_mixture", sets)
    assert [(e.limit, e.repeat) for e in recipe.mixture] == [
        (None, None), (None, 24), (None, 3), (None, 4), (200_000, None), (80_000, None)
    ]  # fmt: skip
    assert (recipe.train.epochs, recipe.train.schedule.warmup, recipe.train.schedule.warmdown) == (1, 0, 0.5)
    assert recipe.train.lr.of_base == 0.8 and recipe.train.schedule.final == 0  # type: ignore[union-attr]
    small = [f"mixture.{n}.limit={limit}" for n, limit in ((4, 40), (5, 16))]
    ledger = sf.mix(recipe=load_recipe("builtin:picollm_mixture", [*sets, *small])).ledger
    assert {s["name"]: s["validation_rows"] for s in ledger["sources"] if s["validation_rows"]} == {
        "smoltalk_test": 1, "mmlu_test": 9, "gsm8k_test": 3
    }  # fmt: skip
    assert {s["name"]: (s["rows"], s["repeat"]) for s in ledger["sources"] if s["rows"]} == {
        "smoltalk": (50, 1), "identity": (5, 24), "mmlu": (9, 3), "gsm8k": (7, 4), "spelling": (40, 1),
        "spelling_bee": (16, 1),
    }  # fmt: skip
    assert ledger["rows"] == 50 + 5 * 24 + 9 * 3 + 7 * 4 + 40 + 16


@pytest.mark.slow
def test_the_courses_mixture_on_public_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    sets = [
        "base=builtin:tiny", f"mixture.0.source={lines('talk.jsonl', [{'messages': talk}] * 30)}",
        f"mixture.1.source={outside('identity/identity_conversations.jsonl')}",
        f"mixture.2.path={outside('mmlu/dev')}", f"mixture.3.path={outside('gsm8k/train.jsonl')}",
        "mixture.4.limit=2000", "mixture.5.limit=800", "validation=0", "train.max_length=1024",
    ]  # fmt: skip
    ledger = sf.mix(recipe=load_recipe("builtin:picollm_mixture", sets)).ledger
    shown = {s["name"]: s["rows"] * s["repeat"] for s in ledger["sources"]}
    assert shown["identity"] == 24_000 and shown["gsm8k"] == 4 * 7473 and shown["mmlu"] == 3 * 285
    assert (shown["spelling"], shown["spelling_bee"]) == (2000, 800)
