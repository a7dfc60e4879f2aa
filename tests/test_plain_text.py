"""Plain text among conversations: what a document becomes, what is told from it, that its loss is transformers' own."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import sftflow as sf
from helpers.architectures import tiny
from helpers.runs import error_line, run
from helpers.tiny import TEXT, make_renderer
from helpers.training import FP32, spec
from sftflow.api.mixture import renderer_of
from sftflow.chat.plain_text import Document, PlainText, end_of_text
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, conversation_of, parse_row
from sftflow.checkpoint import load_assistant
from sftflow.data.mixture import build_mixture
from sftflow.data.mixture_part import build_part
from sftflow.data.parts import parse_part
from sftflow.data.run_rows import read_held_out, read_training_rows, write_run_rows
from sftflow.data.truncate import EMPTY, fit_to_length
from sftflow.evaluation.heldout_loss import held_out_loss
from sftflow.fingerprint import rows_digest
from sftflow.foundation.errors import FormatError, RecipeError, SchemaError
from sftflow.packing.pack import Example
from sftflow.recipe import parse_recipe
from sftflow.training.batch_plan import RowPlan
from sftflow.training.trainer import Trainer

CHAT = {"prompt": "What is it?", "completion": "The answer is 42."}
LONG = " ".join(TEXT[:4] * 3)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def renderer(tokenizer_dir: Path) -> Renderer:
    return make_renderer(tokenizer_dir, "sftflow")


def document(text: str, **keys: Any) -> Conversation:
    return Conversation((), source="x:1", document=Document(text, declared=True, **keys))


# ---- a document's tokens


CONTROL = st.sampled_from(["<|bos|>", "<|assistant_end|>", "<|user_start|>", "### Human: hi", "<s>"])
WRITTEN = st.lists(st.one_of(st.text(max_size=12), CONTROL, st.sampled_from(TEXT[:4])), max_size=12).map("".join)


@settings(max_examples=40, deadline=None)
@given(text=WRITTEN, longest=st.integers(8, 40), ends=st.booleans())
def test_pieces_are_the_document_and_all_that_can_be_is_taught(
    renderer: Renderer, text: str, longest: int, ends: bool
) -> None:
    """Joined they are BOS, the ids of its text letter by letter, and the end; a piece's first token is not taught."""
    made = document(text, ends=ends)
    found = fit_to_length(made, renderer, longest, "drop")
    if not text.strip():
        assert found.dropped == EMPTY and not found.pairs
        return
    joined = [int(i) for _, piece in found.pairs for i in piece.ids]
    bos = renderer.special["<|bos|>"]
    assert joined[0] == bos and (joined[-1] == bos) == ends
    words = joined[1 : len(joined) - ends]
    assert not {*words} & {*renderer.special.values()} and renderer.decode(words) == text
    if not any(token in text for token in renderer.special):
        assert joined[: len(joined) - ends] == renderer.tokenizer(text).input_ids  # the outside word on what opens it
    for example, piece in found.pairs:
        assert 2 <= len(piece.ids) <= longest and piece.mask.tolist() == [0, *[1] * (len(piece.ids) - 1)]
        assert np.array_equal(renderer.render(example).ids, piece.ids)  # as where it was held out
    assert len(found.pairs) == -(-len(joined) // longest)


@pytest.mark.parametrize(
    ("kind", "opens", "ends"),
    [
        ("own_llama2", "<s>", "</s>"),
        ("own_llama3_1", "<|begin_of_text|>", "<|end_of_text|>"),
        ("own_qwen3", "", "<|endoftext|>"),
        ("own_smollm2", "", "<|endoftext|>"),
        ("hf_llama2", "<s>", "</s>"),
        ("hf_llama3_1", "<|begin_of_text|>", "<|end_of_text|>"),
        ("hf_qwen3", "", "<|endoftext|>"),
    ],
)
def test_text_stands_as_in_pretraining(known_tokenizers: Any, kind: str, opens: str, ends: str) -> None:
    """Between what the tokenizer writes itself and the base's end of text, whatever the format ends turns with."""
    own = AutoTokenizer.from_pretrained(known_tokenizers[kind])
    for name in ("chatml", "alpaca") if kind.startswith("own") else ("chatml",):
        renderer = make_renderer(known_tokenizers[kind], name)
        assert renderer.decode(renderer.document_opening) == opens and renderer.decode(renderer.document_end) == ends
        assert renderer.render(document("Once upon")).ids[:-1].tolist() == own("Once upon").input_ids
        ids = renderer.render(document("Once <|im_end|> upon")).ids.tolist()
        assert renderer.special.get("<|im_end|>") not in ids


def test_what_only_ends_turns_ends_no_text() -> None:
    assert end_of_text({"eos_token": "<|im_end|>"}, ["<|im_end|>"], []) is None
    assert end_of_text({"eos_token": "<END>"}, ["<END>"], ["<END>"]) is None
    assert end_of_text({"eos_token": "<END>"}, ["<END>"], ["<|im_end|>"]) == "<END>"
    assert end_of_text({"eos_token": "</s>"}, ["</s>", "<|endoftext|>"], ["</s>"]) == "</s>"  # Llama 2's is both
    assert end_of_text({"eos_token": "<|bos|>", "bos_token": "<|bos|>"}, [], ["<|bos|>"]) == "<|bos|>"
    assert end_of_text({}, ["</s>"], []) is None


# ---- told from conversations


@pytest.mark.parametrize(
    ("row", "fact", "remedy"),
    [
        ({"text": "Tokens such as <|bos|> part texts."}, "the control token <|bos|>", "{source: text, path: FILE}"),
        ({"text": "<|im_start|>user\nhi<|im_end|>"}, "written already", "{source: text, path: FILE}"),
        ({"text": "Good film.", "label": 1}, "plain text beside other keys", "{source: text, path: FILE}"),
        ({"text": "Good film.", "ends": "no"}, "it is a string", "write false"),
        ({"text": "Good film.", "weight": 2}, "weight is 2", "0 to 1"),
    ],
)
def test_what_may_be_a_conversation_is_no_text(renderer: Renderer, row: Any, fact: str, remedy: str) -> None:
    with pytest.raises(SchemaError) as error:
        renderer.render(parse_row(row, "x:1"))
    assert fact in error.value.fact and remedy in error.value.remedy


def test_what_the_recipe_calls_text_is_text(renderer: Renderer) -> None:
    said = "### Human: hi### Assistant: yo<|assistant_end|>"
    assert [m.role for m in parse_row({"text": said[:30]}, "x:1").messages] == ["user", "assistant"]
    found = conversation_of(PlainText({"text": said, "url": "u", "label": False}), "x:1")
    assert found.document == Document(said, declared=True) and found.ignored == ("label", "url")
    assert renderer.decode(renderer.render(found).ids[1:-1].tolist()) == said
    for row, fact in (
        ({"messages": []}, "no text in its keys"),
        ({"text": ["a"]}, "a list"),
        ({"text": "a", "images": ["x"]}, "pictures"),
        ("a", "a row is a string"),
    ):
        with pytest.raises(SchemaError, match=fact):
            conversation_of(PlainText(row), "x:1")
    with pytest.raises(FormatError, match="no turns that could be replied to"):
        renderer.render(found, add_generation_prompt=True)


# ---- a mixture


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rows = [{"text": f"{text} {n}", "id": n} for n, text in enumerate(TEXT[:40])]
    lines(folder / "docs.jsonl", [*rows, {"text": " \n"}, {"text": LONG}, {"text": "Goes on", "ends": False}])
    lines(folder / "both.jsonl", [{"text": "The cat sat."}, CHAT, {"text": "It was cold.", "weight": 0.5}])
    lines(folder / "chat.jsonl", [{**CHAT, "prompt": f"What is {n}?"} for n in range(30)])
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_bytes(b"\xef\xbb\xbfOnce upon\r\na time.")
    (folder / "books" / "b.md.gz").write_bytes(gzip.compress(b"# A house\n"))
    (folder / "books" / "README.md").write_text("what these books are")
    return folder


def mixed(data: Path, tiny_base: Path, sources: list[dict[str, Any]], **keys: Any) -> Any:
    entries = [{**s, "path": str(data / s["path"])} if "path" in s else s for s in sources]
    train = {"max_length": 64, "tokens_per_step": 512, "precision": "fp32", **keys.pop("train", {})}
    recipe = {"base": str(tiny_base), "mixture": entries, "validation": 0, **keys, "train": train}
    parsed = parse_recipe(recipe, "r.yaml")
    return build_mixture(parsed, renderer_of(parsed)), parsed


def test_the_ledger_counts_text_apart(data: Path, tiny_base: Path) -> None:
    text, both = {"source": "text", "path": "docs.jsonl", "repeat": 2}, {"source": str(data / "both.jsonl")}
    mixture, _ = mixed(data, tiny_base, [text, both])
    ledger = mixture.ledger
    docs, files = ledger["sources"]
    assert docs["text"] == {key: docs[key] for key in ("rows", "tokens", "supervised_tokens")} | {
        "rows": 2 * docs["rows"]
    }
    assert docs["dropped_why"] == {EMPTY: 1} and docs["expanded"] == 1 and docs["ignored"] == {"id": 40}
    assert files["text"]["rows"] == 2 and files["text"]["supervised_tokens"] < files["supervised_tokens"]
    assert {key: ledger["text"][key] for key in docs["text"]} == {
        key: docs["text"][key] + files["text"][key] for key in docs["text"]
    }
    assert ledger["text"]["opening"] == ledger["text"]["end"] == "<|bos|>"
    assert any("plain text: " in note and "between <|bos|> and <|bos|>" in note for note in mixture.notes())
    assert "supervised_weight" in files and docs["text"]["supervised_tokens"] == docs["tokens"] - docs["text"]["rows"]
    chat, _ = mixed(data, tiny_base, [{"source": str(data / "chat.jsonl")}])
    assert "text" not in chat.ledger and "text" not in chat.ledger["sources"][0]


def test_text_is_read_from_any_name_of_files(data: Path, tiny_base: Path) -> None:
    def texts(path: str, **keys: Any) -> list[str]:
        mixture, _ = mixed(data, tiny_base, [{"source": "text", "path": path, **keys}])
        rows = mixture.rows[0]
        return [mixture.renderer.decode(rows.ids(i)[1:-1].tolist()) for i in range(len(rows))]

    assert texts("books") == ["Once upon\na time.", "# A house\n"]
    assert texts("books/*.txt") == ["Once upon\na time."]
    assert len(texts("docs.jsonl", limit=5)) == 5
    lines(data / "body.jsonl", [{"body": "In a column of its own.", "text": "no"}])
    assert texts("body.jsonl", columns={"body": "text"}) == ["In a column of its own."]
    (data / "large.txt").write_bytes(b"a" * ((8 << 20) + 1))
    with pytest.raises(sf.SftflowError, match="one text of more than 8 MB; cut it into documents"):
        texts("large.txt")
    (data / "large.txt").unlink()


def test_shares_and_budget_count_text_as_what_it_is(data: Path, tiny_base: Path) -> None:
    sources = [{"source": "text", "path": "docs.jsonl", "share": 0.25}, {"source": str(data / "chat.jsonl")}]
    mixture, _ = mixed(data, tiny_base, sources, tokens=2000, validation=4)
    text, chat = mixture.ledger["sources"]
    longest = max(int(rows.supervised.max()) for rows in mixture.rows)
    assert abs(text["supervised_tokens"] - 500) <= longest and abs(chat["supervised_tokens"] - 1500) <= longest
    assert text["text"]["supervised_tokens"] == text["supervised_tokens"] and text["validation_rows"] > 0


def test_parts_are_the_whole(data: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = [{"source": "text", "path": "docs.jsonl"}, {"source": str(data / "both.jsonl")}]
    mixture, recipe = mixed(data, tiny_base, sources)
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path))
    for part in ("1/2", "2/2"):
        build_part(recipe, renderer_of(recipe), parse_part(part), lambda *_: None)
    joined, _ = mixed(data, tiny_base, sources)
    assert [rows_digest(r) for r in joined.rows] == [rows_digest(r) for r in mixture.rows]
    assert all(np.array_equal(a.text, b.text) for a, b in zip(joined.rows, mixture.rows, strict=True))
    assert joined.ledger["text"] == mixture.ledger["text"]


def test_every_door_reads_the_same_text(data: Path, tiny_base: Path) -> None:
    keys = {"validation": 0, "max_length": 64}
    path = str(data / "docs.jsonl")
    recipe, _ = mixed(data, tiny_base, [{"source": "text", "path": "docs.jsonl"}])
    for source in ({"source": "text", "path": path}, sf.task("text", path=path), sf.read(path, text=True)):
        assert sf.mix([source], str(tiny_base), **keys).ledger["data_sha256"] == recipe.ledger["data_sha256"]
    memory = sf.mix([{"text": "The cat sat."}, {"text": LONG}], str(tiny_base), **keys)
    assert memory.ledger["text"]["rows"] == len(memory.examples) > 2
    shown = sf.render(path, str(tiny_base), text=True, index=0).rows[0]
    assert shown.turns == ((0, "text"),) and shown.n_supervised == len(shown.tokens) - 1


def test_rows_that_overlap_with_a_task_go_with_their_document(data: Path, tiny_base: Path) -> None:
    """A question in one piece of a document takes all of it out, and in no other text."""
    asked = "Which river runs behind the small white house that the old cat watched at night?"
    lines(data / "items.jsonl", [{"question": asked, "answer": "The Blue River, they say."}])
    lines(data / "found.jsonl", [{"text": f"{LONG} {asked} {LONG}"}, {"text": "Another one."}])
    tasks = {"eval": {"tasks": [f"jsonl={data / 'items.jsonl'}"], "limit": None}, "decontaminate": "drop"}
    base = {"base": str(tiny_base), "validation": 0, **tasks}
    source = {"source": "text", "path": str(data / "found.jsonl")}
    found = sf.mix(recipe={"mixture": [source], **base, "train": {"max_length": 128}})
    assert found.ledger["rows"] == 1 and found.ledger["sources"][0]["decontaminated"]["rows"] > 5


# ---- the loss


def naive(model: Any, examples: list[Example]) -> float:
    """Transformers' own loss with labels, one row at a time, of all tokens together."""
    nats = tokens = 0.0
    for example in examples:
        labels = torch.from_numpy(np.where(example.mask == 1, example.ids, -100))[None]
        n = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            nats += n * float(model(input_ids=torch.from_numpy(example.ids)[None], labels=labels).loss)
        tokens += n
    return nats / tokens


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_text_is_that_of_labels_that_are_the_ids(data: Path, tiny_base: Path, packing: bool) -> None:
    """Texts and conversations in one packed batch: of each source the loss that transformers finds, row by row."""
    sources = [{"source": "text", "path": "docs.jsonl", "limit": 12}, {"source": str(data / "chat.jsonl"), "limit": 12}]
    mixture, _ = mixed(data, tiny_base, sources)
    model = AutoModelForCausalLM.from_pretrained(tiny_base).float()
    model.resize_token_embeddings(len(mixture.renderer.tokenizer))
    examples = [mixture.examples[i] for i in range(len(mixture.examples))]
    wanted = [naive(model.eval(), [e for e in examples if e.source == number]) for number in (0, 1)]
    of_text = [e for e in examples if e.source == 0]
    everything = [replace(e, mask=np.ones_like(e.mask)) for e in of_text]
    assert naive(model, everything) == wanted[0]  # labels are the ids
    trainer = Trainer(model, RowPlan(examples, spec(packing=packing)), spec(packing=packing), FP32, mixture.names)
    found = trainer.evaluate(examples)
    assert found.by_source() == pytest.approx(wanted, abs=1e-6)


def test_a_model_that_looks_back_gets_pieces_of_their_own() -> None:
    """Models that ask which token came before (picollm's) see nothing across pieces, packed or not."""
    model, rng = tiny("SftflowNanochat"), np.random.default_rng(0)
    rows = [Example(ids=rng.integers(0, 90, n), mask=np.ones(n, np.int8)) for n in (12, 7, 12, 9)]
    wanted = naive(model, rows)
    for packing in (True, False):
        trainer = Trainer(model, RowPlan(rows, spec(packing=packing)), spec(packing=packing), FP32, ["text"])
        assert trainer.evaluate(rows).loss == pytest.approx(wanted, abs=2e-6)


def test_text_that_was_held_out_is_measured_apart(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Whole documents and pieces come back from a run's folder as they were rendered, and count as no reply."""
    sources = [{"source": "text", "path": "docs.jsonl"}, {"source": str(data / "chat.jsonl")}]
    mixture, recipe = mixed(data, tiny_base, sources, validation=0.4)
    write_run_rows(tmp_path, mixture, recipe)
    held = read_held_out(tmp_path)
    rendered = [mixture.renderer.render(row.conversation) for row in held]
    assert all(np.array_equal(r.ids, row.ids) for r, row in zip(rendered, held, strict=True))
    assert {row.conversation.document is not None for row in held} == {True, False}
    kept = read_training_rows(tmp_path)
    assert [rows.text.all() for rows in kept.sources] == [True, False]
    assistant = load_assistant(str(tiny_base))
    loss = held_out_loss(assistant, [(row.source, row.conversation) for row in held])
    alone = held_out_loss(assistant, [(row.source, row.conversation) for row in held if not row.conversation.document])
    assert (loss.all, loss.tokens) == (pytest.approx(alone.all), alone.tokens) and "text" not in alone.roles
    assert loss.roles["text"] == pytest.approx(loss.sources["docs"])


# ---- the text that comes with the package


def replay_rows() -> Iterator[dict[str, Any]]:
    file = Path(sf.__file__).parent / "data" / "replay.jsonl.bz2"
    assert file.stat().st_size <= 700_000
    yield from map(json.loads, bz2.decompress(file.read_bytes()).decode().splitlines())


def test_the_replay_is_small_and_of_the_base() -> None:
    rows = list(replay_rows())
    assert len(rows) >= 50 and all(row["text"].strip() and "\ufffd" not in row["text"] for row in rows)
    assert {row.keys() == {"text"} or row == {"text": row["text"], "ends": False} for row in rows} == {True}
    whole = sf.mix([{"source": "text", "path": "builtin:replay", "limit": 20}], validation=0)
    short = sf.mix([{"source": "builtin:replay", "limit": 20}], validation=0)
    assert whole.ledger["data_sha256"] == short.ledger["data_sha256"] and whole.names == short.names == ["replay"]
    assert whole.rows[0].place(0).startswith("builtin:replay:")
    with pytest.raises(RecipeError, match="it is not said of which file"):
        sf.mix([{"source": "text"}])


def test_the_command_line_shows_and_names_text(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    done = run("render", str(data / "docs.jsonl"), "--model", str(tiny_base), "--text", "--index", "0", "--json")
    row = json.loads(done.stdout)["rows"][0]
    assert done.returncode == 0 and row["mask"] == [0, *[1] * (len(row["ids"]) - 1)]
    recipe = {"base": str(tiny_base), "mixture": [{"source": "text", "path": str(data / "chat.jsonl")}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    done = run("mix", str(tmp_path / "r.yaml"))
    assert done.returncode == 2 and "no text in its keys ('prompt', 'completion')" in error_line(done)
