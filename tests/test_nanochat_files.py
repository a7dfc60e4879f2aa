"""Checkpoints of picollm and nanochat as files: which one a path means, their pickled tokenizer as a fast one of the
same ids, and what was trained written back so that their own code reads it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sftflow as sf
from helpers.outside import each, outside
from sftflow import checkpoint
from sftflow.api.rows import conversation_of_chat
from sftflow.chat.format import builtin_format, tokenizer_json
from sftflow.chat.render import Renderer
from sftflow.checkpoint import location
from sftflow.comparison.lineage import BASE_AND_SFT, kind_of
from sftflow.exporting.to_gguf import export_gguf
from sftflow.exporting.to_nanochat import export_nanochat
from sftflow.foundation.errors import CheckpointError, RecipeError
from sftflow.nanochat import vocabulary
from sftflow.nanochat.files import files_of
from sftflow.nanochat.vocabulary import Encoding, encoding_of, merges_of, read_encoding, tokenizer_of
from sftflow.nanochat.writer import pickled, token_bytes, write_base

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
]
WORDS = (b"he", b"ll", b" w", b"or", b"hell", b"hello", b" wor", b"aa", b"aaa", b"\xc3\xa9", b"<|", b"|>")


def encoding(*tokens: bytes, special: tuple[str, ...] = tuple(SPECIAL), pattern: str = PATTERN) -> Encoding:
    """An encoding of all bytes, these tokens in order, and the special ones."""
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in range(256)), *tokens])}
    return Encoding(
        name="rustbpe",
        pattern=pattern,
        ranks=ranks,
        special={token: len(ranks) + i for i, token in enumerate(special)},
    )


def meta_of(step: int, vocab_size: int, n_layer: int = 2) -> dict[str, Any]:
    shape = {"sequence_len": 64, "vocab_size": vocab_size, "n_layer": n_layer, "n_head": 2, "n_kv_head": 2}
    return {"step": step, "model_config": {**shape, "n_embd": 32, "window_pattern": "SL"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a random model of today's layout, of two layers."""
    import torch

    from sftflow.nanochat import weights
    from sftflow.nanochat.config import SftflowNanochatConfig
    from sftflow.nanochat.model import SftflowNanochatForCausalLM

    torch.manual_seed(0)
    known = encoding(*WORDS)
    size = len(known.ranks) + len(known.special)
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = SftflowNanochatConfig(
        **shape, vocab_size=size, num_attention_heads=2, num_key_value_heads=2, window_pattern="SL", backout_layer=1,
        sliding_window=129, long_window=65,
    )  # fmt: skip
    model = SftflowNanochatForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    out = tmp_path_factory.mktemp("nanochat") / "base"
    write_base(out, "base_checkpoints", weights.state_dict_of(model), meta_of(300, size), known, {})
    return out


# ---- which checkpoint a path means


def put(base: Path, stage: str, model: str, *steps: int, tokenizer: bool = True) -> Path:
    """Files by name only: enough to be found."""
    folder = base / stage / model
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (folder / f"model_{step:06d}.pt").write_bytes(b"")
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta_of(step, 277)), encoding="utf-8")
    if tokenizer:
        (base / "tokenizer").mkdir(exist_ok=True)
        (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickled(encoding(*WORDS)))
    return folder


def meant(path: Path) -> tuple[str, str]:
    found = files_of(path)
    assert found is not None
    return "/".join(found.model.parts[-3:]), found.chosen


def test_the_largest_model_and_its_last_step_are_meant_where_none_is_said(tmp_path: Path) -> None:
    put(tmp_path, "base_checkpoints", "d4", 100, 999999, 1000000)
    put(tmp_path, "base_checkpoints", "d12", 200)
    put(tmp_path, "base_checkpoints", "d20")  # begun, and nothing saved yet
    stage = tmp_path / "base_checkpoints"
    twelve = ("base_checkpoints/d12/model_000200.pt", "d12 of d12, d4")
    assert meant(tmp_path) == meant(stage) == twelve
    assert meant(stage / "d4") == (
        "base_checkpoints/d4/model_1000000.pt", "step 1000000 of 100, 999999, 1000000")  # fmt: skip
    assert meant(stage / "d4" / "model_000100.pt") == ("base_checkpoints/d4/model_000100.pt", "")
    for nothing in (tmp_path / "tokenizer", stage / "d20", stage / "d4" / "meta_000100.json"):
        assert files_of(nothing) is None


def test_what_was_taken_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "base_checkpoints", "d4", 100, 200)
    with caplog.at_level(logging.WARNING):
        assert location.resolve(str(tmp_path)).nanochat == location.resolve(str(tmp_path)).nanochat
    assert [r.getMessage() for r in caplog.records] == [f"note: {tmp_path}: taken is step 200 of 100, 200"]


@pytest.mark.parametrize("stage", ["base_checkpoints", "mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints"])
def test_one_stage_alone_is_meant_and_what_is_no_base_any_more_is_known(tmp_path: Path, stage: str) -> None:
    put(tmp_path, stage, "mine", 7)
    found = checkpoint.resolve(str(tmp_path))
    assert found.file == tmp_path / stage / "mine" / "model_000007.pt"
    assert checkpoint.load_info(found).get("kind") == (None if stage == "base_checkpoints" else "sft")
    (tmp_path / stage).joinpath("yours").symlink_to(tmp_path / stage / "mine")
    assert refused(tmp_path) == ("it holds mine and yours", f"name the one that is meant: {tmp_path / stage / 'mine'}")
    linked = files_of(tmp_path / stage / "yours")  # a model on another disk has the tokenizer that it is named beside
    assert linked is not None and linked.tokenizer == tmp_path / "tokenizer" / "tokenizer.pkl"


def refused(path: Path) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.resolve(str(path))
    return caught.value.fact, caught.value.remedy


def test_what_is_missing_or_damaged_is_said_in_one_line(tmp_path: Path) -> None:
    folder = put(tmp_path, "base_checkpoints", "d4", 100, tokenizer=False)
    assert refused(tmp_path) == (
        "no tokenizer/tokenizer.pkl beside base_checkpoints",
        f"copy the tokenizer folder into {tmp_path}, too",
    )
    put(tmp_path, "chatsft_checkpoints", "d4", 100)
    assert refused(tmp_path) == (
        "it holds base_checkpoints and chatsft_checkpoints",
        f"name the one that is meant: {tmp_path / 'base_checkpoints'}",
    )
    meta = folder / "meta_000100.json"
    for text, fact in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no model_config in it"),
        ('{"model_config": 3}', "no model_config"),
    ):
        meta.write_text(text, encoding="utf-8")
        assert refused(folder)[0].startswith(fact)
    meta.unlink()
    assert refused(folder)[0] == "meta_000100.json is missing, which says the shape of model_000100.pt"
    (folder / "model_000100.pt").unlink()
    (tmp_path / "chatsft_checkpoints" / "d4" / "model_000100.pt").unlink()
    assert refused(tmp_path)[0] == "no model_*.pt in base_checkpoints, chatsft_checkpoints"
    assert refused(folder)[0] == "no config.json in it"


@pytest.mark.parametrize("kept", [0, 10, 3000])
def test_weights_that_are_cut_short_are_refused(tmp_path: Path, base: Path, kept: int) -> None:
    folder = put(tmp_path, "base_checkpoints", "d2", 300)
    whole = (base / "base_checkpoints" / "d2" / "model_000300.pt").read_bytes()
    (folder / "model_000300.pt").write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"model_000300\.pt: damaged"):
        checkpoint.load_model(checkpoint.resolve(str(tmp_path)))


# ---- the tokenizer


def by_definition(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's ids of a piece: whole if it is a token, else the pair of lowest rank is merged, the leftmost first."""
    parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == 1 << 30:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


TOKENS = st.lists(st.text("ab", min_size=2, max_size=6).map(str.encode), unique=True, max_size=14)


@settings(deadline=None, max_examples=60)
@given(tokens=TOKENS, texts=st.lists(st.text("ab", max_size=24), min_size=1, max_size=8))
def test_merging_pairs_is_merging_by_ranks(tokens: list[bytes], texts: list[str]) -> None:
    """Any table of ranks, trained or not: tokens of several splits, of later parts, or that are never merged to."""
    ours = encoding(*tokens)
    fast = vocabulary._backend(ours)
    for text in texts:
        assert fast.encode(text).ids == by_definition(ours.ranks, text.encode()), (tokens, text)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.sampled_from([*"aé 'sLl\t\n\r0123.!<|>", "😀", "ſ", "你", " ", "hello", " world", "<|bos|>"])))
def test_ids_are_those_of_tiktoken(fast: Renderer, parts: list[str]) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="pip install tiktoken")
    text = "".join(parts)
    theirs = pickle.loads(pickled(KNOWN))  # by their own class
    assert isinstance(theirs, tiktoken.Encoding)
    ids = fast.encode_plain(text)
    assert ids == theirs.encode_ordinary(text)
    assert fast.tokenizer.decode(ids) == text
    mixed = [*ids[::2], *range(120, 200, 7)]  # bytes that are no text
    assert fast.tokenizer.decode(mixed) == theirs.decode(mixed)


def made(known: Encoding, folder: Path) -> Any:
    """The fast tokenizer of a checkpoint with this encoding."""
    path = folder / "tokenizer.pkl"
    path.write_bytes(pickled(known))
    shape = {"vocab_size": len(known.ranks) + len(known.special), "sequence_len": 64}
    return tokenizer_of(SimpleNamespace(tokenizer=path, shape=shape, name="it"))  # type: ignore[arg-type]


KNOWN = encoding(*WORDS)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(made(KNOWN, tmp_path_factory.mktemp("fast")), builtin_format("sftflow"))


def test_the_tokenizer_writes_nothing_by_itself_and_goes_there_and_back(tmp_path: Path) -> None:
    tokenizer = made(KNOWN, tmp_path)
    assert tokenizer("hello").input_ids == [KNOWN.ranks[b"hello"]]
    assert tokenizer.bos_token == tokenizer.eos_token == "<|bos|>"
    assert vocabulary.ends_of(tokenizer) == (KNOWN.special["<|assistant_end|>"], KNOWN.special["<|bos|>"])
    assert read_encoding(tmp_path / "tokenizer.pkl") == KNOWN == encoding_of(tokenizer)
    checkpoint.tokenizer.write_tokenizer(tokenizer, tmp_path)
    assert encoding_of(checkpoint.tokenizer.read_tokenizer(tmp_path)) == KNOWN
    tokenizer.add_tokens(["more"])
    assert encoding_of(tokenizer) is None
    assert token_bytes(encoding(b"ab", special=("<|bos|>",)))[254:] == [1, 1, 2, 0]


def test_a_token_of_two_splits_is_merged_as_tiktoken_does() -> None:
    ranks = encoding(b"aa", b"aaa").ranks
    assert merges_of(ranks) == [(b"a", b"a"), (b"aa", b"a")]  # of "aaaa" come aa, aa: "a" and "aa" never stand so
    assert by_definition(ranks, b"aaaa") == [256, 256] and by_definition(ranks, b"aaaaa") == [256, 257]


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def encoded(**changes: Any) -> bytes:
    return pickled(Encoding(**{**vars(KNOWN), **changes}))


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (pickle.dumps(Harmful()), "it asks for posix.system"),
        (pickle.dumps([KNOWN]), "it asks for sftflow.nanochat.vocabulary.Encoding"),
        (b"\x80\x04ctiktoken.core\nEncoding\n)R.", "no pickled tiktoken.core.Encoding; copy it"),  # never built
        (b"\x80\x04cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
        (b"ctiktoken.core\nEncoding.__init__\n.", "it asks for tiktoken.core.Encoding.__init__"),
        (pickled(KNOWN)[:900], "cut short"),
        (b"", "cut short"),
        (b"\x80\x03ctiktoken.core\nEncoding\n)\x81X\x04\x00\x00\x00gpt2b.", r"only names an encoding .* \(gpt2\)"),
        (encoded(ranks={b"ab": 0}), "no token for the byte 0"),
        (encoded(ranks=KNOWN.ranks | {b"ab": 500}), "are not 0, 1, 2"),
        (encoded(ranks=KNOWN.ranks | {"ab": 268}), "no table of bytes and ids"),
        (encoded(special={"<|bos|>": 300}), "its special tokens are not the last ids"),
        (encoded(ranks=KNOWN.ranks | {b"<|bos|>": 268}, special={"<|bos|>": 269}), "a special token and an ordinary"),
        (encoded(pattern=r"\w+$|."), r"split pattern may be read otherwise .*\(\\w\+\$\|\.\)"),
        (encoded(pattern=r"\p{N}{1,3}+"), "split pattern"),
    ],
)  # fmt: skip
def test_only_a_pickled_encoding_is_read(tmp_path: Path, data: bytes, fact: str) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=fact) as caught:
        read_encoding(path)
    assert caught.value.place == str(path) and "\n" not in str(caught.value)
    assert not Path("harmed").exists()


def test_a_tokenizer_json_in_its_place_is_read_and_a_size_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "base_checkpoints", "d2", 1)
    whole = checkpoint.load_tokenizer(checkpoint.resolve(str(tmp_path)))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(whole.backend_tokenizer.to_str(), encoding="utf-8")
    (tmp_path / "tokenizer" / "tokenizer.pkl").unlink()
    assert checkpoint.load_tokenizer(checkpoint.resolve(str(tmp_path))).get_vocab() == whole.get_vocab()
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(pickled(encoding(b"ab")))
    with pytest.raises(CheckpointError, match=r"266 tokens in .*, but vocab_size 277 in its meta file"):
        checkpoint.load_tokenizer(checkpoint.resolve(str(tmp_path)))


# ---- the whole way

ROWS = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello world"}]},
    {
        "messages": [
            {"role": "user", "content": "2+2 <|bos|>"},
            {
                "role": "assistant",
                "content": [{"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"}],
            },
        ]
    },
]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps from that base."""
    out = tmp_path_factory.mktemp("trained") / "run"
    mix = sf.mix(ROWS, base, validation=0)
    return sf.train(base, mix, out=out, steps=2, lr=0.05, tokens_per_step=256, max_length=64).directory


def test_a_run_is_an_ordinary_checkpoint_that_knows_its_base(base: Path, trained: Path) -> None:
    before, after = sf.load(base), sf.load(trained)
    bos = len(KNOWN.ranks)
    assert before.renderer.stop_ids() == after.renderer.stop_ids() == [bos + 4, bos]
    assert after.model.generation_config.eos_token_id == [bos + 4, bos]
    assert kind_of(before, after) == BASE_AND_SFT and after.info["base"]["name"] == str(base)
    for text in ("hello", "<|bos|> x"):
        assert before.plain_ids(text) == after.plain_ids(text) == (bos, *before.renderer.encode_plain(text))
    for row in ROWS:
        rows = [model.renderer.render(conversation_of_chat(row)) for model in (before, after)]
        assert rows[0].ids.tolist() == rows[1].ids.tolist() and rows[0].mask.tolist() == rows[1].mask.tolist()
    file = sf.load(base / "base_checkpoints" / "d2" / "model_000300.pt")
    assert file.chat("hello", max_tokens=8).ids == before.chat("hello", max_tokens=8).ids


def test_gguf_has_no_place_for_it(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match="SftflowNanochatForCausalLM cannot be exported to GGUF"):
        export_gguf(str(base), tmp_path / "m.gguf", "f16")
    assert not any(tmp_path.iterdir())


def test_an_export_is_read_again_as_the_same_model(trained: Path, tmp_path: Path) -> None:
    import torch

    assert export_nanochat(str(trained), tmp_path / "out") == tmp_path / "out" / "chatsft_checkpoints" / "d2"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "out/chatsft_checkpoints/d2/meta_000002.json",
        "out/chatsft_checkpoints/d2/model_000002.pt",
        "out/tokenizer/token_bytes.pt",
        "out/tokenizer/tokenizer.pkl",
    ]
    was, now = sf.load(trained), sf.load(tmp_path / "out")
    state = now.model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in was.model.state_dict().items())
    assert now.info["base"] == was.info["base"] and now.info["kind"] == "sft"
    assert tokenizer_json(now.tokenizer) == tokenizer_json(was.tokenizer)
    assert read_encoding(tmp_path / "out" / "tokenizer" / "tokenizer.pkl") == KNOWN
    export_nanochat(str(trained), tmp_path / "out")  # in its own place
    meta = tmp_path / "out" / "chatsft_checkpoints" / "d2" / "meta_000002.json"
    for other, text in ((meta.with_name("optim_000002_rank0.pt"), ""), (meta, '{"model_config": {}}')):
        other.write_text(text, encoding="utf-8")  # what somebody went on with, or made
        with pytest.raises(RecipeError, match="it holds something other than such an export"):
            export_nanochat(str(trained), tmp_path / "out")
        other.unlink()


def test_what_their_code_would_not_have_is_not_exported(base: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="picollm and nanochat have no LlamaForCausalLM"):
        export_nanochat(str(tiny_base), tmp_path / "out")
    grown = checkpoint.load_assistant(str(base), format="chatml")
    checkpoint.save(tmp_path / "chatml", grown.model, grown.tokenizer, grown.renderer, dtype=grown.model.dtype, meta={})
    with pytest.raises(CheckpointError, match="its chat format is chatml, and picollm and nanochat know one"):
        export_nanochat(str(tmp_path / "chatml"), tmp_path / "out")
    other = checkpoint.load_assistant(str(base))
    other.tokenizer.add_tokens(["more"])
    checkpoint.save(tmp_path / "more", other.model, other.tokenizer, other.renderer, dtype=other.model.dtype, meta={})
    with pytest.raises(CheckpointError, match="its tokenizer is none that tiktoken has"):
        export_nanochat(str(tmp_path / "more"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_names_the_file_of_its_base(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    mix = sf.mix(ROWS, base, validation=0)
    lora = {"rank": 2, "targets": ["q_proj"]}
    run = sf.train(base, mix, out=tmp_path / "run", steps=1, lora=lora, tokens_per_step=256, max_length=64)
    config = json.loads((run.directory / "checkpoint" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(base / "base_checkpoints" / "d2" / "model_000300.pt")
    export_nanochat(str(tmp_path / "run"), tmp_path / "out")
    was, now = sf.load(tmp_path / "run"), sf.load(tmp_path / "out")
    assert now.chat("hello", max_tokens=8).ids == was.chat("hello", max_tokens=8).ids
    assert kind_of(sf.load(base), now) == BASE_AND_SFT


@pytest.mark.slow
def test_transformers_loads_a_run_where_sftflow_is_only_imported(trained: Path) -> None:
    program = (
        "import sys, sftflow\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "chat = [{'role': 'user', 'content': 'hello'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt')['input_ids']\n"
        "print(*model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1]:].tolist())"
    )
    command = [sys.executable, "-c", program, str(trained / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reply = sf.load(trained).chat("hello", max_tokens=8)
    assert [int(i) for i in done.stdout.split()][: len(reply.ids)] == list(reply.ids)


# ---- outside: checkpoints and code of theirs


@pytest.mark.parametrize("name", each(["tiny_d4", "old_layout"]))
def test_ids_masks_and_replies_are_those_of_picollm(name: str) -> None:
    """Texts, conversations and greedy replies that its own code gave for the checkpoint beside them."""
    folder = outside("fixtures", "picollm", name)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = sf.load(folder)
    assert {t: model.tokenizer.convert_tokens_to_ids(t) for t in SPECIAL} == expected["special_tokens"]
    for row in expected["texts"]:
        assert model.renderer.encode_plain(row["text"]) == row["ids"]
    for row in expected["conversations"]:
        messages, most = row["messages"], row["max_tokens"]
        got = model.renderer.render(conversation_of_chat({"messages": messages}))
        assert (got.ids.tolist()[:most], got.mask.tolist()[:most]) == (row["ids"], row["mask"])
        if "for_completion" in row:  # its last message is a reply
            asked = model.request(conversation_of_chat({"messages": messages[:-1]}))
            assert list(asked.prompt_ids) == row["for_completion"]
    for row in expected["greedy"]:
        request = model.request(row["prompt"], max_tokens=len(row["continuation"]))
        assert list(model.engine.generate([request])[0].ids) == row["continuation"]


THEIRS = """
import importlib, json, sys, types
import torch
package, stage, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.modules["rustbpe"] = types.ModuleType("rustbpe")  # what trains tokenizers; imported, and not used here
manager, engine = (importlib.import_module(f"{package}.{name}") for name in ("checkpoint_manager", "engine"))
model, tokenizer, meta = manager.load_model(stage, torch.device("cpu"), phase="eval")
for chat in asked:
    ids = tokenizer.render_for_completion({"messages": [*chat, {"role": "assistant", "content": ""}]})
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1].tolist()
    (reply,), _ = engine.Engine(model, tokenizer).generate_batch(ids, max_tokens=16, temperature=0.0)
    print("SAID", json.dumps([ids, logits, reply[len(ids):]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "package"), [("PICOLLM", "picollm.accelerated"), ("NANOCHAT", "nanochat")])
def test_their_own_code_chats_with_an_export(trained: Path, tmp_path: Path, variable: str, package: str) -> None:
    """SFTFLOW_PICOLLM and SFTFLOW_NANOCHAT name a checkout of Montekkundan/llm and of karpathy/nanochat."""
    import torch

    pytest.importorskip("tiktoken", reason="pip install tiktoken")
    source = os.environ.get(f"SFTFLOW_{variable}", "")
    if not Path(source, *package.split(".")).is_dir():
        pytest.skip(f"SFTFLOW_{variable} names no checkout")
    export_nanochat(str(trained), tmp_path / "out")
    chats = [
        [{"role": "user", "content": "hello"}],
        [{"role": "system", "content": "aa"}, {"role": "user", "content": "2+2 <|bos|> é"}],
    ]
    environment = {**os.environ, f"{variable}_BASE_DIR": str(tmp_path / "out"), "PYTHONPATH": source}
    command = [sys.executable, "-c", THEIRS, package, "sft", json.dumps(chats)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert len(said) == 2, done.stderr[-2000:]
    model = sf.load(trained)
    for chat, (ids, logits, reply) in zip(chats, said, strict=True):
        asked = model.request(conversation_of_chat({"messages": chat}), max_tokens=16)
        assert list(asked.prompt_ids) == ids
        with torch.no_grad():
            ours = model.model(torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(ours, torch.tensor(logits), rtol=0, atol=2e-5)
        (got,) = model.engine.generate([asked])
        assert [i for i in got.ids if i not in model.renderer.stop_ids()] == reply
