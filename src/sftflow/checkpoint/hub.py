"""Checkpoints on the hub: asked once, kept in the hub library's own cache, then a directory like any other."""

from __future__ import annotations

import functools
import json
import re
from fnmatch import fnmatch
from http.client import TOO_MANY_REQUESTS
from pathlib import Path
from typing import NoReturn

from sftflow.foundation.errors import CheckpointError, first_line

TIMEOUT = 10.0
"""seconds that the hub has for an answer"""
SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
"""everything but the weights: config, tokenizer, templates, the list of shards"""
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w.-][\w./-]*)?")
_LOG_IN = "set HF_TOKEN to a token of an account that may read it, or run: hf auth login"


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be OWNER/NAME[@REVISION].

    >>> [is_hub_id(n) for n in ("Qwen/Qwen3-0.6B", "gpt2", "Qwen/Qwen3-0.6B@main", "./base", "runs/mine/checkpoint")]
    [True, True, True, False, False]
    """
    return bool(_ID.fullmatch(name)) and not name.startswith((".", "/", "~")) and not name.endswith((".gguf", ".pt"))


@functools.lru_cache(maxsize=64)
def snapshot(name: str) -> Path:
    """The folder in the hub library's cache with the checkpoint's small files: `OWNER/NAME`, or `OWNER/NAME@REVISION`.

    Where the hub cannot be reached, what was fetched before. Raises CheckpointError that says why there is none.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repo, _, revision = name.partition("@")
    try:
        info = HfApi().model_info(repo, revision=revision or None, timeout=TIMEOUT)
        there = [f.rfilename for f in info.siblings or ()]
        files = [f for f in there if any(fnmatch(f, p) for p in SMALL)]
        whole = [f for f in there if fnmatch(f, "model*.safetensors")]
        if "adapter_config.json" in files and whole:
            fact = f"the hub's model holds a model ({whole[0]}) and an adapter"
            raise CheckpointError(name, fact, "download the one that is meant into a folder of its own")
        if not any(
            f in files for f in ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json")
        ):
            remedy = "give a Hugging Face checkpoint"
            if any(fnmatch(f, "*model_*.pt") for f in there):  # of picollm or nanochat
                remedy = f"download it, and name the folder: hf download {repo} --local-dir DIR"
            raise CheckpointError(name, "the hub's model has no config.json", remedy)
        files.sort(key=lambda f: "/" in f)
        # The first by the revision's name: so that the cache knows later, without the hub, what was meant by it.
        first = Path(hf_hub_download(repo, files[0], revision=revision or "main", etag_timeout=TIMEOUT))
        for file in files[1:]:
            hf_hub_download(repo, file, revision=first.parent.name, etag_timeout=TIMEOUT)
        return first.parent
    except CheckpointError:
        raise
    except Exception as error:  # the hub library's, the HTTP library's and the system's
        if not _is_answer(error):
            try:
                return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
            except (OSError, ValueError) as absent:
                error.add_note(f"nor was it fetched before: {absent}")
        _refuse(name, error)


def fetch_weights(name: str, folder: Path) -> None:
    """Fetch the weights of a snapshot into its folder: the shards that its index names, or model.safetensors.

    Raises CheckpointError.
    """
    from huggingface_hub import hf_hub_download

    index = folder / "model.safetensors.index.json"
    if (folder / "adapter_config.json").is_file():
        files = ["adapter_model.safetensors"]
    elif index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    try:
        for file in files:
            if not (folder / file).is_file():
                hf_hub_download(name.partition("@")[0], file, revision=folder.name, etag_timeout=TIMEOUT)
    except Exception as error:  # see `snapshot`
        _refuse(name, error)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_answer(error: BaseException) -> bool:
    """Whether the hub has answered, as against: it could not be asked, or is out of order."""
    status = _status(error)
    return status is not None and status < 500 and status != TOO_MANY_REQUESTS


def _refuse(name: str, error: Exception) -> NoReturn:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        fact, remedy = "this model is gated on the hub", f"accept its terms on its page there and {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        fact, remedy = "the hub has this model, but no such revision", "check what stands behind the @"
    elif isinstance(error, errors.EntryNotFoundError) and _is_answer(error):
        fact = "the hub's model has no safetensors weights"
        remedy = "pickled weights are not loaded; use a repository or a revision with model.safetensors"
    elif _status(error) == 401 and "Invalid" not in str(error):
        fact = "no such folder here, and on the hub no such model that is open to all"
        remedy = f"check the name; for a private model {_LOG_IN}"
    elif _status(error) in (401, 403):
        fact, remedy = f"the hub refuses access ({_status(error)}: {first_line(error)})", _LOG_IN
    elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        fact, remedy = "no such folder here, and no such model on the hub", "check the name"
    else:
        why = f"{type(error).__name__}: {first_line(error)}"
        fact = f"cannot be loaded: no such folder here, and the hub cannot be asked ({why})"
        remedy = "check the id and the network"
    raise CheckpointError(name, fact, remedy) from error
