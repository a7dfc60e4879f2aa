"""A fast tokenizer as GGUF fields: tokens, their types, merges, special ids, and how text is split before merging.

llama.cpp does not read regular expressions from the file: it knows a list of pre-tokenizers by name. A name is taken
only where the tokenizer splits by exactly the expressions that llama.cpp has under it; parity.py then compares ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftflow.chat.format import tokenizer_json
from sftflow.foundation.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type of llama.h

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _DIGITS = "byte-level", "digits"  # ByteLevel's own expression; every digit alone

# (expressions in order, ignore_merges) -> llama.cpp's name of it.
SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_BYTES,), False): "gpt-2",
    ((_DIGITS, _BYTES), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_TEKKEN,), True): "tekken",
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What GGUF says of a tokenizer. tokens, types, scores: one entry an id, in order (scores: SentencePiece only).

    model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).   notes: where llama.cpp reads rare text otherwise.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_prefix: bool = False
    notes: tuple[str, ...] = ()

    def write(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        writer.add_add_space_prefix(self.space_prefix)
        writer.add_add_bos_token(False)  # the template writes it; llama.cpp would put a second one in front
        writer.add_add_eos_token(False)


def vocabulary_of(tokenizer: Any, rows: int, place: str) -> Vocabulary:
    """The vocabulary, filled up to the `rows` of the embedding. Raises CheckpointError naming what GGUF cannot hold."""
    data = tokenizer_json(tokenizer)
    model = data["model"]
    if model.get("type") != "BPE":
        raise _refused(place, f"a {model.get('type')} tokenizer cannot be exported to GGUF")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise _refused(place, "this tokenizer marks parts of words, or drops merges")
    added = {t["id"]: t for t in data["added_tokens"]}
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refused(place, f"the token {token['content']!r} takes in the spaces beside it")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    by_id = {i: t for t, i in model["vocab"].items()}
    size = max([*by_id, *added]) + 1
    if size > rows:
        fact = f"{size} tokens, but {rows} rows in the embedding"
        raise CheckpointError(place, fact, "copy the tokenizer of this model beside its weights")
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = [], []
    for i in range(rows):
        if i in added:
            tokens.append(added[i]["content"])
            types.append(CONTROL if added[i]["special"] else USER_DEFINED)
        elif i in by_id:
            tokens.append(by_id[i])
            types.append(_type_of(by_id[i]) if sentencepiece else NORMAL)
        else:
            tokens.append(f"[PAD{i}]")
            types.append(UNUSED)
    unknown = model.get("unk_token")
    if sentencepiece and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    if not sentencepiece:
        pre, notes = _byte_level(data, place)
        joined = tuple(" ".join(m) for m in merges)
        return Vocabulary(model="gpt2", pre=pre, tokens=tokens, types=types, merges=joined, notes=notes)
    # llama.cpp merges the pair whose result has the best score; the tokenizer the pair that comes first in its list.
    rank: dict[str, int] = {}
    for n, (left, right) in enumerate(merges):
        rank.setdefault(left + right, n)
    kinds = zip(tokens, types, strict=True)
    scores = tuple(-float(rank.get(t, len(merges))) if k == NORMAL else 0.0 for t, k in kinds)
    prefix = _space_prefix(data, place)
    return Vocabulary(model="llama", pre="default", tokens=tokens, types=types, scores=scores, space_prefix=prefix)


def _refused(place: str, fact: str) -> CheckpointError:
    return CheckpointError(place, fact, "llama.cpp would read text otherwise; serve the directory itself")


def _type_of(token: str) -> int:
    return BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _parts(step: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[several]) if step["type"] == "Sequence" else [step]


def _byte_level(data: dict[str, Any], place: str) -> tuple[str, tuple[str, ...]]:
    """(llama.cpp's name of the pre-tokenizer, notes) of a byte-level tokenizer."""
    notes: tuple[str, ...] = ()
    for step in _parts(data["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise _refused(place, f"the tokenizer normalises text ({step['type']})")
        notes = ("the tokenizer composes characters (NFC) and llama.cpp does not: text must come composed",)
    split: list[str] = []
    for step in _parts(data["pre_tokenizer"], "pretokenizers"):
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            split.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step["individual_digits"]:
            split.append(_DIGITS)
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            split += [_BYTES] if step["use_regex"] else []
        else:
            raise _refused(place, f"the tokenizer's step {kind} has no counterpart in llama.cpp")
    key = (tuple(split), bool(data["model"].get("ignore_merges")))
    if key not in SPLITS or "ByteLevel" not in str(data["pre_tokenizer"]):
        raise _refused(place, f"llama.cpp has no pre-tokenizer that splits by {' then '.join(split) or 'nothing'}")
    return SPLITS[key], notes


def _space_prefix(data: dict[str, Any], place: str) -> bool:
    """Whether a SentencePiece tokenizer writes a space before the text after each control token."""
    prefix = False
    for step in _parts(data["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁"):
            raise _refused(place, f"the tokenizer normalises text ({step['type']})")
    for step in _parts(data["pre_tokenizer"], "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("split"):
            raise _refused(place, f"the tokenizer's step {step['type']} has no counterpart in llama.cpp")
        prefix = prefix or step["prepend_scheme"] == "always"  # "first": never behind a control token
    return prefix


# llama.cpp's other names of the same splits (llama-vocab.cpp); those of `llama-bpe` and `tekken` ignore merges, too.
ALIASES: dict[str, tuple[str, ...]] = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "kormo", "megrez", "f2llmv2"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
    "tekken": (),
}
OTHERS = ("qwen35", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")
"""splits that llama.cpp and transformers know, and this module does not"""


def as_llama_cpp_splits(tokenizer: Any, told: dict[str, Any], place: str) -> None:
    """Give a tokenizer that transformers made from a GGUF file the way of splitting that llama.cpp has for the file:
    transformers takes GPT-2's for all names that it does not know.   told: the file's `tokenizer.ggml.` fields.

    Raises CheckpointError where the file names none, or one that is not known here.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if told.get("model") == "llama" and told.get("architecture", "")[:5] != "gemma":
        spaces = normalizers.Replace(" ", "▁")
        prefix = told.get("add_space_prefix", True)  # behind each control token, as in Llama 2's own tokenizer.json
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
        backend.pre_tokenizer = None
    pre = told.get("pre")
    if told.get("model") != "gpt2" or pre in OTHERS:
        return
    name = next((name for name, others in ALIASES.items() if pre in (name, *others)), None)
    if name is None:
        fact = f"its text is split by {pre!r}, which is not known here" if pre else "it does not say how text is split"
        raise CheckpointError(place, fact, "give the checkpoint it was made from")
    steps, backend.model.ignore_merges = next(key for key, value in SPLITS.items() if value == name)
    parts: list[Any] = []
    for step in steps:
        if step == _DIGITS:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != _BYTES:
            parts.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_BYTES in steps))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
