"""tokenizer.pkl, a pickled tiktoken.Encoding, as a fast tokenizer with the same ids for every text.

tiktoken cuts text by the pattern, takes a piece that is a token whole, and else merges, always the two neighbours whose
bytes together have the lowest rank, the leftmost first. `BPE` of the tokenizers library merges listed pairs. That one
pair for each token is enough stands at `merges_of`. The pickle is read by an unpickler that knows nothing but the one
class, of which it makes a dictionary: no code is run, and tiktoken is not needed.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftflow.chat.format import tokenizer_json
from sftflow.foundation.errors import CheckpointError, first_line, said_of
from sftflow.nanochat.files import Files

MODULE, CLASS = "tiktoken.core", "Encoding"
BEGINNINGS = ("<|bos|>", "<|endoftext|>")
"""what a document begins with, which is also what ends the one before: the first that the tokenizer has"""
BEGUN_BY_BOS = ("nanochat", "sftflow_nanochat")
"""model types whose documents begin with it in pretraining, though the tokenizer does not write it"""
ENDS = ("<|assistant_end|>", *BEGINNINGS)
"""where the projects' engine ends a reply"""
COPY_AGAIN = "copy it again from where it was trained"

# What the two regular expression engines read alike: categories and classes (compared over all of Unicode), groups, and
# quantifiers. Not so `$` and `.`, and braces made possessive.
_CONTRACTIONS = (r"(?i:[sdmt]|ll|ve|re)", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)")
_SIGN = r"\\p\{[LNMPSZC][a-z]?\}|\\[sSrnt]|[A-Za-z0-9 ',/_]"
_TIMES = r"[?*+]\+?|\{\d+(?:,\d*)?\}(?!\+)"
_ALIKE = re.compile(
    rf"(?:{'|'.join(map(re.escape, _CONTRACTIONS))}|\[\^?(?:{_SIGN})+\]|{_SIGN}|\(\?[:!=]|[()|]|{_TIMES})+"
)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a tiktoken.Encoding is made of. ranks: bytes of a token -> its id; special: special token -> its id."""

    name: str
    pattern: str
    ranks: dict[bytes, int]
    special: dict[str, int]


class _State:
    """Stands for tiktoken.Encoding in the pickle: keeps what it is made of."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Refused(Exception):
    """Another class or function than the one; its name."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (MODULE, CLASS):
            return _State
        raise _Refused(f"{module}.{name}")


def read_encoding(path: Path) -> Encoding:
    """Raises CheckpointError for what is no pickled encoding, or one that no tokenizer can be made of."""
    try:
        loaded = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise CheckpointError(str(path), *said_of(error)) from None
    except _Refused as error:
        fact = f"it asks for {error}, and only a pickled {MODULE}.{CLASS} is read"
        raise CheckpointError(str(path), fact, COPY_AGAIN) from None
    except Exception:  # a damaged pickle raises nearly anything
        fact = f"no pickled {MODULE}.{CLASS}, or cut short"
        raise CheckpointError(str(path), fact, COPY_AGAIN) from None
    state = getattr(loaded, "state", None) if isinstance(loaded, _State) else None
    if isinstance(state, str):
        fact = f"it only names an encoding that comes with tiktoken ({state})"
        raise CheckpointError(str(path), fact, "convert it to a tokenizer.json, and put that in its place")
    if not (isinstance(state, dict) and state.keys() == {"name", "pat_str", "mergeable_ranks", "special_tokens"}):
        raise CheckpointError(str(path), f"no pickled {MODULE}.{CLASS}", COPY_AGAIN)
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    if not (_numbers(ranks, bytes) and _numbers(special, str) and isinstance(state["pat_str"], str)):
        raise CheckpointError(str(path), "its tokens are no table of bytes and ids", COPY_AGAIN)
    found = Encoding(name=str(state["name"]), pattern=state["pat_str"], ranks=ranks, special=special)
    if problem := _problem(found):
        raise CheckpointError(str(path), problem, "give a checkpoint with another tokenizer")
    return found


def _numbers(table: object, kind: type) -> bool:
    return isinstance(table, dict) and all(type(key) is kind and type(i) is int for key, i in table.items())


def _problem(encoding: Encoding) -> str | None:
    """Why an encoding has no fast tokenizer of the same ids; None where it has."""
    ranks, special = encoding.ranks, encoding.special
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        return f"no token for the byte {lacking[0]}"
    if sorted(ranks.values()) != [*range(len(ranks))]:
        return "the ids of its tokens are not 0, 1, 2 ..."
    if sorted(special.values()) != [*range(len(ranks), len(ranks) + len(special))]:
        return "its special tokens are not the last ids"
    if both := [token for token in special if token.encode() in ranks]:
        return f"{both[0]!r} is a special token and an ordinary one"
    if not _ALIKE.fullmatch(encoding.pattern):
        return f"its split pattern may be read otherwise by the tokenizers library ({encoding.pattern[:200]})"
    return None


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs to be merged, in order: by these, merging is what tiktoken does by `ranks`.

    A token may be two tokens in several ways, and tiktoken merges whichever stand side by side. But only one way ever
    does: until the two are merged, all merges inside their bytes were the lowest and leftmost there, too, and none
    reached over their ends. So they are those of these bytes alone, and the two are what these end in.

    >>> ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    >>> merges_of(ranks)
    [(b'b', b'c'), (b'a', b'b'), (b'a', b'bc')]
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        ways = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        if len(ways) > 1:
            ways = _last_two(token, ranks)
        merges += [(token[:i], token[i:]) for i in ways]
    return merges


def _last_two(token: bytes, ranks: dict[bytes, int]) -> list[int]:
    """[where the two parts meet that the bytes of a token are merged to], [] where they are never two."""
    cuts = [*range(len(token) + 1)]
    while len(cuts) > 3:
        pairs = zip(cuts, cuts[1:], cuts[2:], strict=False)
        rank, at = min((ranks.get(token[a:c], len(ranks)), n) for n, (a, _, c) in enumerate(pairs))
        if rank == len(ranks):
            return []
        del cuts[at + 1]
    return [cuts[1]]


def tokenizer_of(files: Files) -> Any:
    """The fast tokenizer of a checkpoint. It writes no token of its own before or behind a text.

    Raises CheckpointError as `read_encoding`, and where the model is of another size of vocabulary.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if files.tokenizer.suffix == ".json":
        try:
            backend = Tokenizer.from_file(str(files.tokenizer))
        except Exception as error:  # the tokenizers library raises a bare one
            raise CheckpointError(str(files.tokenizer), f"not a tokenizer ({first_line(error)})", COPY_AGAIN) from None
    else:
        backend = _backend(read_encoding(files.tokenizer))
    size, asked = backend.get_vocab_size(), files.shape.get("vocab_size")
    if size != asked:
        fact = f"{size} tokens in {files.tokenizer}, but vocab_size {asked} in its meta file"
        raise CheckpointError(files.name, fact, "copy the tokenizer that it was trained with")
    begin = next((token for token in BEGINNINGS if backend.token_to_id(token) is not None), None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token=begin,
        model_max_length=files.shape.get("sequence_len"),
        clean_up_tokenization_spaces=False,
    )


def encoding_of(tokenizer: Any) -> Encoding | None:
    """The encoding of which `tokenizer_of` makes this fast tokenizer; None where there is none."""
    data = tokenizer_json(tokenizer)
    byte_of = {letter: byte for byte, letter in enumerate(_letters())}
    try:
        made = Encoding(
            name="rustbpe",
            pattern=data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
            ranks={bytes(map(byte_of.__getitem__, token)): i for token, i in data["model"]["vocab"].items()},
            special={token["content"]: token["id"] for token in data["added_tokens"] if token["special"]},
        )
    except (KeyError, TypeError, IndexError):  # another kind of tokenizer
        return None
    if _problem(made):
        return None
    again = json.loads(_backend(made).to_str())
    same = ("model", "normalizer", "pre_tokenizer", "added_tokens")
    return made if all(again[part] == data[part] for part in same) else None


def ends_of(tokenizer: Any) -> tuple[int, ...]:
    """Ids at which the projects' engine ends a reply."""
    return tuple(i for end in ENDS if (i := tokenizer.added_tokens_encoder.get(end)) is not None)


def _backend(encoding: Encoding) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _letters()
    vocab = {_text(token, letters): i for token, i in encoding.ranks.items()}
    merges = [(_text(left, letters), _text(right, letters)) for left, right in merges_of(encoding.ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = sorted(encoding.special, key=encoding.special.__getitem__)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


def _text(token: bytes, letters: list[str]) -> str:
    return "".join(map(letters.__getitem__, token))
