"""At which tokens llama.cpp ends a reply: those that the file's fields name, and those that it knows by their text.

The names are those of `llama_vocab` (src/llama-vocab.cpp); a test asks llama.cpp itself about each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sftflow.foundation.errors import CheckpointError

NAMED = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "[e~["),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"),
    )
)
"""tokens that end a reply by their text alone, whatever their type"""
_KEY = "tokenizer.ggml.{}_token_id"
EOS, EOT, EOM = (_KEY.format(name) for name in ("eos", "eot", "eom"))
FILL_IN = {
    _KEY.format("fim_pad"): ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    _KEY.format("fim_rep"): ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    _KEY.format("fim_sep"): ("<|file_sep|>",),
}
"""fields of fill-in-the-middle whose tokens end replies, too, with the texts by which llama.cpp finds them unasked"""
KEYS = (EOS, EOT, EOM, *FILL_IN)
_DEFAULT_EOS = {"gpt2": 11, "llama": 2}  # by tokenizer.ggml.model, where no field names one


def ends_of(tokens: Sequence[str], fields: Mapping[str, int], model: str) -> list[int]:
    """Ids at which llama.cpp ends a reply, in their order.

    tokens: the file's, by id.   fields: those of KEYS that the file has.   model: its tokenizer.ggml.model.

    >>> ends_of(["a", "</s>", "b", "<|im_end|>"], {"tokenizer.ggml.eos_token_id": 2}, "gpt2")
    [1, 2, 3]
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = {EOS: _DEFAULT_EOS.get(model, -1), **fields}.values()
    ends = {i for i in found if 0 <= i < len(tokens)} | {ids[token] for token in NAMED & ids.keys()}
    for key, names in FILL_IN.items():
        ends |= set() if key in fields else {ids[name] for name in names if name in ids}
    texts = {tokens[i] for i in ends}
    calls = texts & {"<|call|>", "<|calls|>"}
    if ("<|return|>" in texts and "<|call|>" in texts) or ("<|flush|>" in texts and calls):
        ends.discard(ids.get("<|end|>", -1))  # there it ends a message inside a reply
    if "<|tool_response>" in texts:
        ends.discard(ids.get("</s>", -1))
    return sorted(ends)


def fields_for(ends: Sequence[int], eos: int, tokens: Sequence[str], model: str, place: str) -> dict[str, int]:
    """The fields of KEYS with which llama.cpp stops at all of these ends.

    ends: the most usual first.   eos: the end of text.   tokens: the file's, by id.

    Raises CheckpointError where there is no place for all of them.
    """
    fields = {EOS: eos}
    others = [i for i in ends if i != eos]
    unnamed = [i for i in others if tokens[i] not in NAMED]
    wanted = list(dict.fromkeys([*others[:1], *unnamed, *others]))
    fields |= dict(zip((EOT, EOM), wanted, strict=False))
    known = {key: [i for i, token in enumerate(tokens) if token in names] for key, names in FILL_IN.items()}
    fields |= {key: found[0] for key, found in known.items() if len(found) > 1}  # else llama.cpp takes any of them
    free = [key for key, found in known.items() if not found]
    fields |= dict(zip(free, [i for i in unnamed if i not in fields.values()], strict=False))
    left = [tokens[i] for i in ends if i not in ends_of(tokens, fields, model)]
    if left:
        fact = f"llama.cpp would not stop at {', '.join(left)}, as this checkpoint's replies do"
        raise CheckpointError(
            place, fact, "serve the directory itself; only where no reply ends so, take it out of eos_token_id"
        )
    return fields
