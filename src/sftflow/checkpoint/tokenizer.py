"""A checkpoint's tokenizer: read as its tokenizer.json has it, and written so that every reader has the same.

tokenizer.json           how text becomes ids: normalising, splitting, merging, added tokens, decoding
tokenizer_config.json    what special tokens are called, how long a text may be
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def read_tokenizer(directory: Path, **load_args: Any) -> Any:
    """The fast tokenizer of a directory.   load_args: of `AutoTokenizer.from_pretrained`.

    Several of transformers' classes (GPT2Tokenizer, Qwen2Tokenizer, LlamaTokenizer ...) take only the entries from
    tokenizer.json, and split, normalise and decode in a way of their own. The model was pretrained with the file's way:
    so the file itself is opened. What the class calls its special tokens, where the configuration does not say, is
    kept if the file has them.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(directory, **load_args)
    if type(loaded) is PreTrainedTokenizerFast or not (directory / TOKENIZER).is_file():
        return loaded  # it is the file's already, or made of vocab.json and merges.txt, or of a SentencePiece model
    ways = {"model_input_names": loaded.model_input_names, "padding_side": loaded.padding_side}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **ways)
    for role, token in loaded.special_tokens_map.items():
        index = tokenizer.backend_tokenizer.token_to_id(token)
        if index is not None and getattr(tokenizer, role, None) is None:
            tokenizer.add_special_tokens({role: tokenizer.added_tokens_decoder.get(index, token)})
    return tokenizer


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write it so that transformers 4 and 5 read the file's own way of splitting, and tools like vLLM with them.

    Raises OSError where the disk is full.
    """
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library raises a bare Exception where the disk is full
        if isinstance(error, OSError) or f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    path = directory / CONFIG
    config = readable_config(json.loads(path.read_text(encoding="utf-8")), tokenizer)
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


OF_ONE_LOADING = ("auto_map", "backend", "is_local", "local_files_only", "legacy", "add_prefix_space")
"""keys that are dropped: where it was loaded from, code of the base's own, and what classes with a split of their own
would ask for"""


def readable_config(saved: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """tokenizer_config.json of transformers 5, in words that 4.57 reads alike.

    {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], ...}
    -> {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"], ...}
    """
    config = {key: value for key, value in saved.items() if key not in OF_ONE_LOADING}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class without a split of its own
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # That class would also hand out token_type_ids, which no causal language model takes.
    config["model_input_names"] = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    split = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if split.get("type") == "ByteLevel":  # 4.57 changes the file's answer into this one (absent: false)
        config["add_prefix_space"] = split["add_prefix_space"]
    return config
