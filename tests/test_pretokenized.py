"""Rows that are tokens already, and `supervise: all`: held against the rendering that the tokens are of, transformers'
own, a loss over all logits, and TRL."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sftflow as sf
from helpers.runs import error_line, run
from helpers.templates import STRIPS, chat, open_with
from sftflow.chat.schema import parse_row
from sftflow.chat.verify import verify
from sftflow.checkpoint import open_renderer, resolve
from sftflow.comparison.prompts import load_prompts
from sftflow.data.mixture import build_mixture
from sftflow.data.run_rows import read_held_out, write_run_rows
from sftflow.data.truncate import TOO_LONG, UNTAUGHT, fit_to_length
from sftflow.foundation.errors import DataError, FormatError, MaskError, SchemaError, SftflowError
from sftflow.recipe import parse_recipe
from sftflow.report.audit_page import audit_page

RENDERER = open_renderer(resolve("builtin:tiny"), "auto")
ALL = RENDERER.supervising("all")
TALK = [
    {"role": "user", "content": "My cat is called Pepper."},
    {"role": "assistant", "content": "A nice name."},
    {"role": "user", "content": "What is 12 * 7?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "It is "},
            {"type": "python", "text": "12*7"},
            {"type": "python_output", "text": "84"},
            {"type": "text", "text": "."},
        ],
    },
]
CONVERSATION = parse_row(TALK, "f:1")
RENDERED = RENDERER.render(CONVERSATION)
IDS, MASK = RENDERED.ids.tolist(), RENDERED.mask.tolist()
LABELS = [i if m else -100 for i, m in zip(IDS, MASK, strict=True)]
N = len(IDS)
ONE_STEP: dict[str, Any] = {"steps": 1, "tokens_per_step": 4096, "max_length": 64, "precision": "fp32"}


# ---- rows of tokens

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=40)
@given(st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=4), st.sampled_from(["mask", "labels"]))
def test_the_tokens_of_a_rendering_are_that_rendering(exchanges: list[tuple[str, str, bool]], key: str) -> None:
    messages: list[dict[str, Any]] = []
    for asked, replied, taught in exchanges:
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": replied, "weight": int(taught)},
        ]
    messages[-1]["weight"] = 1
    whole = RENDERER.render(parse_row(messages, "f:1"))
    ids, mask = whole.ids.tolist(), whole.mask.tolist()
    beside = mask if key == "mask" else [i if m else -100 for i, m in zip(ids, mask, strict=True)]
    row = parse_row({"input_ids": ids, key: beside}, "f:1")
    again = RENDERER.render(row)
    assert (again.ids.tolist(), again.mask.tolist()) == (ids, mask)
    assert RENDERER.render(parse_row(row.to_row(), "f:1")).mask.tolist() == mask


@pytest.mark.parametrize("key", ["mask", "loss_mask", "completion_mask", "assistant_masks"])
def test_each_spelling_of_a_mask(key: str) -> None:
    row = {"input_ids": IDS, key: [bool(m) for m in MASK], "attention_mask": [1] * N, "position_ids": [*range(N)]}
    row["seq_lengths"] = [N]
    assert RENDERER.render(parse_row({**row, "labels": LABELS, "id": "a", "weight": 1}, "f:1")).mask.tolist() == MASK
    assert parse_row({**row, "id": "a"}, "f:1").ignored == ("id",)


def test_ids_that_are_empty_are_not_there() -> None:
    assert parse_row({"messages": TALK, "input_ids": [], "mask": []}, "f:1").messages == CONVERSATION.messages
    with pytest.raises(SchemaError, match=r"f:1\.input_ids: nothing to learn: it is one token"):
        ALL.render(parse_row({"input_ids": IDS[:1]}, "f:1"))


def test_what_is_the_first_token_of_labels_is_not_taught() -> None:
    assert RENDERER.render(parse_row({"input_ids": IDS, "labels": IDS}, "f:1")).mask.tolist() == [0] + [1] * (N - 1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"input_ids": [-1, *IDS[1:]]}, "f:1.input_ids[0]: -1 is not in the vocabulary"),
    "too large": ({"input_ids": [*IDS[1:], 5000]}, f"f:1.input_ids[{N - 1}]: 5000 is not in the vocabulary"),
    "huge": ({"input_ids": [1 << 70, *IDS[1:]]}, "f:1.input_ids[0]: a number of more than 32 bits"),
    "shorter mask": ({"mask": MASK[1:]}, f"f:1.mask: {N - 1} values for {N} input_ids"),
    "longer labels": ({"mask": None, "labels": [*LABELS, 1]}, f"f:1.labels: {N + 1} values for {N} input_ids"),
    "nothing": ({"mask": [0] * N}, "f:1.mask: nothing to learn: no token is taught"),
    "no label": ({"mask": None, "labels": [-100] * N}, "f:1.labels: nothing to learn: no token is taught"),
    "the first": ({"mask": [1] + [0] * (N - 1)}, "f:1.mask: nothing to learn: only the first token is taught"),
    "shifted": ({"mask": None, "labels": [*LABELS[1:], -100]}, "where input_ids has"),
    "differ": ({"labels": IDS}, "f:1: mask and labels differ"),
    "padded": (
        {"attention_mask": [1] * (N - 1) + [0]},
        f"f:1.attention_mask[{N - 1}]: it is 0: padding",
    ),
    "packed": (
        {"position_ids": [0, 1, *range(N - 2)]},
        f"f:1.position_ids: it is not that of one conversation of {N} tokens",
    ),
    "packed by another": ({"attention_mask": [1, 1] + [2] * (N - 2)}, "f:1.attention_mask[2]: it is 2"),
    "lengths": ({"seq_lengths": [2, N - 2]}, f"f:1.seq_lengths: it is not that of one conversation of {N} tokens"),
    "weighted": ({"weights": [0.5] * N}, "f:1: mask and weights differ"),
    "too heavy": ({"weights": [2 * m for m in MASK]}, "f:1.weights: it holds 2; write numbers from 0 to 1"),
    "negative weight": ({"mask": None, "loss_mask": [-0.5] * N}, "f:1.loss_mask: it holds -0.5"),
    "no number": ({"mask": None, "weights": [float("nan")] * N}, "f:1.weights: it holds nan"),
    "a text": ({"mask": None, "weights": ["0.5"] * N}, "f:1.weights[0]: it is a string"),
    "one weight": ({"weights": 0.5}, "f:1.weights: it is a number"),
    "two weights": (
        {"weights": [0.5 * m for m in MASK], "loss_mask": [0.25 * m for m in MASK]},
        "mask and loss_mask and weights differ",
    ),
    "no ids": ({"input_ids": []}, "f:1.input_ids: it is empty"),
    "text": ({"input_ids": "1 2 3"}, "f:1.input_ids: it is a string"),
    "batch": ({"input_ids": [IDS]}, "f:1.input_ids[0]: it is a list"),
    "floats": ({"input_ids": [float(i) for i in IDS]}, "f:1.input_ids[0]: it is a number"),
    "booleans": ({"input_ids": [True] * N}, "f:1.input_ids[0]: it is a boolean"),
    "weights": ({"mask": [0.5] * N}, "f:1.mask[0]: it is a number"),
    "a count": ({"mask": [2, *MASK[1:]]}, "f:1.mask: it holds 2"),
    "messages": ({"messages": TALK}, "f:1.input_ids: messages beside input_ids"),
    "prompt": ({"prompt": "hi"}, "f:1.input_ids: prompt beside input_ids"),
    "pictures": ({"images": ["a.png"]}, "f:1.images: only text is taught"),
    "silent": ({"mask": None}, "f:1: input_ids that do not say what is taught"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_row_of_tokens_is_refused_in_one_line(name: str) -> None:
    changed, said = REFUSED[name]
    with pytest.raises(SchemaError) as error:
        RENDERER.render(parse_row({"input_ids": IDS, "mask": MASK, **changed}, "f:1"))
    assert said in str(error.value) and error.value.remedy and "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_row_of_tokens_asks_nothing(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"input_ids": IDS, "mask": MASK}))
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: a row of tokens, which asks nothing"):
        load_prompts(str(tmp_path / "prompts.jsonl"))
    with pytest.raises(FormatError, match="no turns that could be replied to"):
        RENDERER.render(parse_row({"input_ids": IDS, "mask": MASK}, "f:1"), add_generation_prompt=True)


def test_too_long_or_of_weight_0() -> None:
    row = parse_row({"input_ids": IDS, "mask": MASK}, "f:1")
    assert fit_to_length(row, RENDERER, N, "cut").dropped is None
    assert fit_to_length(row, RENDERER, N - 1, "cut").dropped == TOO_LONG
    assert fit_to_length(row, RENDERER, N - 1, "drop").dropped == TOO_LONG
    assert fit_to_length(row, RENDERER, N - 1, "cut_tokens").cut
    assert fit_to_length(row, RENDERER, MASK.index(1), "cut_tokens").dropped == TOO_LONG
    unwanted = parse_row({"input_ids": IDS, "mask": MASK, "weight": 0}, "f:1")
    assert fit_to_length(unwanted, RENDERER, N, "cut").dropped == UNTAUGHT


def mixture_of(tmp_path: Path, *files: Path, **keys: Any) -> Any:
    recipe = parse_recipe({"mixture": [{"source": str(f)} for f in files], "validation": 2, **keys}, "r.yaml")
    return build_mixture(recipe, RENDERER, every_row=True), recipe


def test_they_train_as_the_conversations_do(tmp_path: Path) -> None:
    """JSON lines, Parquet and a data set of them: the same rows as the conversations', held out and read back, too."""
    rows = [
        [{**TALK[0], "content": f"My cat is called {name}."}, *TALK[1:]] for name in ("Ada", "Bo", "Cy", "Di", "Ed")
    ]
    rendered = [RENDERER.render(parse_row(row, "f")) for row in rows]
    tokens = [{"input_ids": r.ids.tolist(), "mask": r.mask.tolist()} for r in rendered]
    talks, lines, table = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.parquet"
    talks.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    lines.write_text("".join(json.dumps(row) + "\n" for row in tokens))
    pq.write_table(datasets.Dataset.from_list(tokens).data.table, table)
    mixture, recipe = mixture_of(tmp_path, talks, lines, table)
    first, second, third = mixture.rows
    for other in (second, third):
        assert np.array_equal(other.all_ids, first.all_ids) and np.array_equal(other.all_masks, first.all_masks)
    assert (first.meta["pretokenized"], second.meta["pretokenized"]) == (0, 5)
    assert all(counts["checked"] == 5 and not counts["failed"] for counts in mixture.invariants().values())
    assert "b: 5 of 5 rows are tokens already; their masks are taken as they stand" in mixture.notes()
    assert [s["pretokenized"] for s in mixture.sources] == [0, 5, 5]
    assert "10 rows came as tokens" in audit_page(mixture.ledger)
    for train in ({}, {"max_length": 24, "overlong": "cut_tokens"}):
        mixture, recipe = mixture_of(tmp_path, lines, train=train)
        check_held_out(tmp_path, mixture, recipe)


def check_held_out(tmp_path: Path, mixture: Any, recipe: Any) -> None:
    write_run_rows(tmp_path, mixture, recipe)
    held = read_held_out(tmp_path)
    assert len(held) == 2 and all(RENDERER.render(row.conversation).mask.tolist() == row.mask.tolist() for row in held)


def test_from_python_and_the_command_line(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"input_ids": IDS, "labels": LABELS}])
    for rows in (
        data, data.with_format("numpy"), data.with_format("torch"), data.to_pandas(),
        [{"input_ids": IDS, "labels": LABELS}], [{"input_ids": np.array(IDS), "labels": torch.tensor(LABELS)}],
    ):  # fmt: skip
        assert sf.render(rows, "builtin:tiny").to_json()["rows"][0]["mask"] == MASK
    assert sf.render(data, "builtin:tiny", supervise="all").to_json()["rows"][0]["mask"] == [0] + [1] * (N - 1)
    with pytest.raises(SftflowError, match=r"^supervise: it should be 'replies' or 'all'"):
        sf.render(data, "builtin:tiny", supervise="none")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        json.dumps({"input_ids": IDS, "mask": MASK}) + "\n" + json.dumps({"input_ids": [9999, 1], "mask": [0, 1]})
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"mixture: [{{source: bad.jsonl}}]\ntrain: {{out: {tmp_path / 'run'}}}\n")
    said = error_line(run("train", str(recipe)))
    assert "bad.jsonl:2.input_ids[0]: 9999 is not in the vocabulary; " in said and not (tmp_path / "run").exists()
    said = error_line(run("train", str(recipe), "--set", "supervise=user"))
    assert "supervise" in said and "'replies' or 'all'" in said


# ---- supervise: all


def test_all_is_every_token_after_the_first_of_the_reference_rendering() -> None:
    rendered = ALL.render(CONVERSATION)
    messages = [{**m, "content": m["content"] if isinstance(m["content"], str) else "12 times"} for m in TALK]
    plain = ALL.render(parse_row(messages, "f:1"))
    tokenizer = RENDERER.tokenizer
    tokenizer.chat_template = RENDERER.format.template
    assert plain.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert rendered.ids.tolist() == IDS and rendered.mask.tolist() == [0] + [1] * (N - 1)
    assert ALL.render(CONVERSATION.before(3), add_generation_prompt=True).mask.sum() == 0


def test_messages_of_weight_0_stay_out() -> None:
    """What `all` leaves out of them is what `replies` would teach of them alone."""
    for left_out in ([1], [3], [1, 3]):
        weights = [{**m, "weight": 0} if i in left_out else m for i, m in enumerate(TALK)]
        flipped = [{**m, "weight": int(i in left_out)} if i in (1, 3) else m for i, m in enumerate(TALK)]
        mask = ALL.render(parse_row(weights, "f:1")).mask
        theirs = RENDERER.render(parse_row(flipped, "f:1")).mask
        first, last = np.flatnonzero(theirs)[[0, -1]]
        assert mask[0] == 0 and not (mask & theirs).any() and mask[1:first].all() and mask[last + 1 :].all()
        if 3 in left_out:  # the calculator's result is a part of the message
            assert not mask[np.flatnonzero(theirs)[-1] - 5 : last + 1].any()
    assert ALL.render(parse_row({"prompt": TALK[:3], "completion": "It is 84."}, "f:1")).mask[1:].all()  # as TRL has it
    weighed = [TALK[0], {**TALK[1], "weight": 0}, TALK[2]]
    asked = ALL.render(parse_row({"prompt": weighed, "completion": "It is 84."}, "f:1"))
    assert asked.mask[1:].tolist().count(0) == RENDERER.render(parse_row(TALK[:2], "f")).mask.sum()


def test_turns_of_weight_0_stay_out_whoever_wrote_them() -> None:
    """By the control tokens: each turn of a user is what stands between its two."""
    opened, closed = (RENDERER.special[f"<|user_{at}|>"] for at in ("start", "end"))
    for left_out in ([0], [2], [0, 2]):
        weights = [{**m, "weight": 0} if i in left_out else m for i, m in enumerate(TALK)]
        rendered = ALL.render(parse_row({"messages": weights}, "f:1"))
        expected = np.array([0] + [1] * (N - 1))
        for turn in left_out:
            begin, end = (np.flatnonzero(rendered.ids == token)[turn // 2] for token in (opened, closed))
            expected[begin : end + 1] = 0
        assert rendered.ids.tolist() == IDS and rendered.mask.tolist() == expected.tolist()
        assert verify(ALL, parse_row({"messages": weights}, "f:1"), rendered) == {}
        assert RENDERER.render(parse_row({"messages": weights}, "f:1")).mask.tolist() == MASK
    glued = [{"role": "system", "content": "Be brief."}, {**TALK[0], "weight": 0}, TALK[1]]
    with pytest.raises(MaskError, match=r"f:1\.messages\[1\]: weight 0, but the format writes nothing that tells it"):
        ALL.render(parse_row(glued, "f:1"))
    nothing = parse_row({"messages": TALK, "weight": 0}, "f:1")
    assert not ALL.render(nothing).mask.any() and fit_to_length(nothing, ALL, N, "cut").dropped == UNTAUGHT


def test_rows_without_a_reply_can_be_taught_whole(tmp_path: Path) -> None:
    row = parse_row([{"role": "user", "content": "Only this."}], "f:1")
    assert fit_to_length(row, ALL, 64, "cut").pairs[0][1].mask[1:].all()
    with pytest.raises(SchemaError, match="no assistant turn to learn from"):
        fit_to_length(row, RENDERER, 64, "cut")
    longer = fit_to_length(parse_row(TALK, "f:1"), ALL, N - 1, "cut")
    assert longer.cut and len(longer.pairs[0][0].messages) == 2 and longer.pairs[0][1].mask[1:].all()


def test_a_row_is_one_example_and_whole(tokenizer_dir: Path) -> None:
    """A template that cuts earlier thoughts off: where there are some they would be lost."""
    renderer = open_with(tokenizer_dir, STRIPS.replace("not keep_thoughts", "true"))
    whole = renderer.supervising("all")
    thinking, plain = chat("a", "<think>hm</think>b", "c", "<think>so</think>d"), chat("a", "b", "c", "d")
    assert len(renderer.render_rows(thinking)) == 2
    with pytest.raises(MaskError, match="leaves it out of the training text"):
        whole.render_rows(thinking)
    (example,) = whole.render_rows(plain)
    assert example.mask[1:].all() and example.ids.tolist() == renderer.render(plain).ids.tolist()


def test_it_is_counted_checked_and_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [[{**TALK[0], "content": f"Cat {k}"}, {**TALK[1], "weight": k % 2}, *TALK[2:]] for k in range(6)]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    replies, _ = mixture_of(tmp_path, file)
    whole, _ = mixture_of(tmp_path, file, supervise="all")
    assert (replies.ledger["supervise"], whole.ledger["supervise"]) == ("replies", "all")
    left_out = sum(int(whole.rows[0].lengths[i] - 1 - whole.rows[0].supervised[i]) for i in range(6))
    assert left_out == 3 * RENDERER.render(parse_row(TALK[:2], "f")).mask.sum()
    assert all(c["checked"] == 6 and not c["failed"] for c in whole.invariants().values())
    assert np.array_equal(replies.rows[0].all_ids, whole.rows[0].all_ids)
    assert "(<code>supervise: all</code>)" in audit_page(whole.ledger) and "supervise" not in str(replies.notes())
    assert whole.notes()[0].startswith("supervise: all: ")


# ---- TRL


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="the package trl is not installed")
@pytest.mark.parametrize("kind", ["messages, all", "prompts, all", "tokens, labels", "tokens, all"])
def test_labels_and_first_loss_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    talks = [
        [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w}, gladly."}] for w in "abcdef"
    ]
    talks += [
        [*talk, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}] for talk in talks
    ]
    rendered = [RENDERER.render(parse_row(talk, "f")) for talk in talks]
    ids, masks = [r.ids.tolist() for r in rendered], [r.mask.tolist() for r in rendered]
    labels = [[i if m else -100 for i, m in zip(*pair, strict=True)] for pair in zip(ids, masks, strict=True)]
    theirs: list[dict[str, Any]] = [{"input_ids": i} for i in ids]
    mine: list[dict[str, Any]] = theirs
    if kind == "messages, all":
        theirs = mine = [{"messages": talk} for talk in talks]
    elif kind == "prompts, all":
        theirs = mine = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]
    elif kind == "tokens, labels":
        theirs = mine = [{"input_ids": i, "labels": k} for i, k in zip(ids, labels, strict=True)]
    base = sf.load("builtin:tiny")
    base.tokenizer.chat_template = base.renderer.format.template
    seen: dict[str, Any] = {}

    class Watched(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            seen["labels"] = inputs["labels"].clone()
            loss = super().training_step(model, inputs, num_items_in_batch)
            seen["loss"] = float(loss)
            return loss

    config = SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=len(talks), use_cpu=True, bf16=False,
        completion_only_loss=False, max_length=None, shuffle_dataset=False, report_to="none", save_strategy="no",
        train_sampling_strategy="sequential", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    Watched(
        base.model, config, train_dataset=datasets.Dataset.from_list(theirs), processing_class=base.tokenizer
    ).train()

    supervise = "all" if kind.endswith("all") else "replies"
    ours = sf.render(mine, "builtin:tiny", supervise=supervise).to_json()["rows"]
    for row, of_trl in zip(ours, seen["labels"].tolist(), strict=True):
        own = [i if m else -100 for i, m in zip(row["ids"], row["mask"], strict=True)]
        assert own[1:] == of_trl[1 : len(own)] and set(of_trl[len(own) :]) <= {-100}
    mix = sf.mix(mine, "builtin:tiny", supervise=supervise, validation=0)
    made = sf.train(
        "builtin:tiny", mix, out=tmp_path / "run", steps=1, tokens_per_step=4096, precision="fp32", max_length=64
    )
    assert made.losses[0] == pytest.approx(seen["loss"], abs=1e-5)


def test_the_first_loss_is_that_of_all_logits(tmp_path: Path) -> None:
    """Without TRL: transformers' logits, summed here."""
    rows = [
        {"input_ids": IDS, "mask": MASK},
        {"input_ids": IDS[: MASK.index(1) + 3], "mask": MASK[: MASK.index(1) + 3]},
    ]
    model = sf.load("builtin:tiny").model
    for supervise in ("replies", "all"):
        mix = sf.mix(rows, "builtin:tiny", supervise=supervise, validation=0)
        made = sf.train(
            "builtin:tiny",
            mix,
            out=tmp_path / supervise,
            steps=1,
            tokens_per_step=512,
            precision="fp32",
            max_length=128,
        )
        nats, n = 0.0, 0
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            taught = torch.tensor(row["mask"])[1:].bool() if supervise == "replies" else torch.ones(len(ids) - 1).bool()
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits[taught], ids[1:][taught], reduction="sum"))
            n += int(taught.sum())
        assert made.losses[0] == pytest.approx(nats / n, abs=1e-5)


def test_a_reply_in_a_prompt_stays_one_wherever_the_row_is_kept(tmp_path: Path) -> None:
    """What is drawn of a mixture, and what is held out, has the mask that is trained."""
    file, row = tmp_path / "a.jsonl", {"prompt": TALK[:3], "completion": "It is 84."}
    kept = parse_row(row, "f:1")
    assert parse_row(kept.to_row(), "f:1").messages == kept.messages and set(kept.to_row()) == {"prompt", "completion"}
    file.write_text("".join(json.dumps({**row, "completion": f"It is {k}."}) + "\n" for k in range(6)))
    mixture, recipe = mixture_of(tmp_path, file, supervise="all")
    assert mixture.samples[0].mask[1:].all()
    write_run_rows(tmp_path, mixture, recipe)
    held = read_held_out(tmp_path)
    assert all(ALL.render(row.conversation).mask.tolist() == row.mask.tolist() for row in held) and len(held) == 2


def test_a_turn_that_cannot_be_told_from_the_next_is_not_left_out() -> None:
    """An empty reply has no words by which a format's turns could be told apart."""
    for messages in (
        [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "", "weight": 0}, {"role": "assistant", "content": "b"}],
    ):
        try:
            mask = ALL.render(parse_row(messages, "f:1")).mask
        except MaskError as error:
            assert "messages[0]: weight 0, but the format writes nothing that tells it" in str(error)
        else:  # <|bos|>, the user's header, words and end; the assistant's header, words and end
            assert mask[-2:].all() and not mask[:3].any()


def test_rows_of_numpy_and_torch_train_as_they_are_shown() -> None:
    data = datasets.Dataset.from_list(
        [{"input_ids": IDS, "labels": LABELS}, {"input_ids": IDS[:-1], "labels": LABELS[:-1]}]
    )
    plain = sf.mix(sf.read(data, name="a"), "builtin:tiny", validation=0).digest()
    others = [data.with_format("torch"), data.with_format("numpy"), [dict(row) for row in data.with_format("numpy")]]
    others.append([{"input_ids": list(np.array(row["input_ids"])), "labels": row["labels"]} for row in data])
    for other in others:
        read = sf.read(other, name="a")
        assert sf.render(read, "builtin:tiny").to_json()["rows"][0]["mask"] == MASK
        assert sf.mix(read, "builtin:tiny", validation=0).digest() == plain


def test_long_rows_are_dropped_where_the_end_of_a_reply_cannot_be_told(tokenizer_dir: Path) -> None:
    endless = open_with(tokenizer_dir, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    whole = endless.supervising("all")
    short, long = chat("a", "b"), chat("a", "b " * 20, "c", "d " * 20)
    assert fit_to_length(short, whole, 64, "cut").dropped is None
    assert fit_to_length(long, whole, 40, "cut").dropped == TOO_LONG


def test_ids_under_another_name() -> None:
    with pytest.raises(SchemaError, match=r"f:1\.ids: a list under a name that nobody reads; call it input_ids"):
        parse_row({"ids": IDS, "mask": MASK}, "f:1")
