"""Data sets with configurations and splits: `hub:NAME[@REVISION][[:CONFIG]:SPLIT]`, where NAME is a set on the hub or a
folder, and folders that `datasets` saved.

Which files a split is made of is what `datasets` makes of the README.md and the names of the files. Of a set on the hub
it is asked with empty files of these names, in a temporary folder: the hub is asked for the list, once, then for each
file when its rows are read, which stays in the hub library's cache. All of it is of one commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import TOO_MANY_REQUESTS
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sftflow.foundation.atomic_io import write_text
from sftflow.foundation.cache import cache_folder
from sftflow.foundation.errors import DataError, first_line

HUB = "hub:"
TIMEOUT = 10.0
"""seconds that the hub has for an answer"""
_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w.-][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ_AS = ("Json", "Csv", "Parquet", "Arrow")
"""the builders of `datasets` whose files are read here"""
_AS_OURS = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
"""what a README.md may say of a configuration that changes no row here (a table's separator is seen in it)"""


class SetName(NamedTuple):
    """where: a folder, or OWNER/NAME on the hub.   The others are "" where they are not said."""

    where: str
    revision: str = ""
    config: str = ""
    split: str = ""

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.where)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        config = f":{self.config}" if self.config else ""
        return f"{HUB}{self.where}{revision}{config}:{self.split or 'train'}"


@dataclass(frozen=True)
class DataFile:
    """place: what errors call it; of a local file its path.   repo, commit, name: of a file on the hub."""

    place: str
    repo: str = ""
    commit: str = ""
    name: str = ""

    def path(self) -> Path:
        """Where it lies here; one on the hub is fetched. Raises DataError where it cannot be."""
        if not self.repo:
            return Path(self.place)
        from huggingface_hub import hf_hub_download

        with _asking(self.place):
            return Path(
                hf_hub_download(self.repo, self.name, repo_type="dataset", revision=self.commit, etag_timeout=TIMEOUT)
            )


def parse_set(name: str) -> SetName:
    """The parts of a name of a set. Raises DataError where it is none.

    >>> parse_set("hub:openai/gsm8k@main:socratic:test")
    SetName(where='openai/gsm8k', revision='main', config='socratic', split='test')
    """
    pieces = name.removeprefix(HUB).split(":")
    for n in range(len(pieces), 0, -1):
        where, rest = ":".join(pieces[:n]), pieces[n:]
        found = _ID.fullmatch(where)
        if len(rest) <= 2 and all(rest) and (os.path.isdir(where) or (found and n == 1)):
            here = os.path.isdir(where) or found is None
            where, revision = (where, "") if here or found is None else (found[1], found[2] or "")
            return SetName(where, revision, *(["", "", *rest][-2:]))
    fact = "neither the name of a set on the hub, nor a folder that is there"
    raise DataError(name, fact, "write hub:OWNER/NAME, or with more of it hub:OWNER/NAME@REVISION:CONFIG:SPLIT")


def set_name(name: str, config: str | None, split: str | None) -> str:
    """A name with what an entry says beside it. Raises DataError where the name says something else.

    >>> set_name("hub:openai/gsm8k:test", "main", None)
    'hub:openai/gsm8k:main:test'
    """
    if os.path.isfile(name.removeprefix(HUB)):
        fact = f"a file, which has no {'config' if config else 'split'} beside it"
        raise DataError(name, fact, "leave that out, or name the folder of the data set: hub:DIR")
    found = parse_set(name if name.startswith(HUB) else HUB + name)
    for key, said, given in (("config", found.config, config), ("split", found.split, split)):
        if said and given and said != given:
            raise DataError(name, f"it names the {key} {said!r}, and {key}: {given!r} another", "write one of them")
    return str(found._replace(config=config or found.config, split=split or found.split))


def pinned(name: str) -> str:
    """The name with the commit that its revision is now, of a set on the hub; any other name as it is."""
    if not name.startswith(HUB) or (found := parse_set(name)).is_folder or _COMMIT.fullmatch(found.revision):
        return name
    where = f"{found.where}@{found.revision}" if found.revision else found.where
    return name.replace(where, f"{found.where}@{_listed(found.where, found.revision).commit}", 1)


# ---- folders that `datasets` saved


def is_saved(folder: str) -> bool:
    return os.path.isfile(f"{folder}/state.json") and os.path.isfile(f"{folder}/dataset_info.json")


def saved_files(folder: str) -> list[DataFile]:
    """The files of `Dataset.save_to_disk`, in its order."""
    state = _json_of(f"{folder}/state.json")
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or not all(
        isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files
    ):
        raise DataError(f"{folder}/state.json", "no list of files in it", "save the set again, or name its files")
    return [DataFile(os.path.join(folder, file["filename"])) for file in files]


def _json_of(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, f"not JSON ({first_line(error)})", "save the set again, or name its files") from None


def is_set(folder: str) -> bool:
    """Whether a folder says itself what it is made of: `DatasetDict.save_to_disk`, or `configs:` in its README.md."""
    if os.path.isfile(f"{folder}/dataset_dict.json"):
        return True
    with contextlib.suppress(OSError), open(f"{folder}/README.md", encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(1 << 20), re.DOTALL)
        return bool(front and re.search(r"^configs:", front[1], re.MULTILINE))
    return False


# ---- configurations and splits


def files_of_set(name: str) -> list[DataFile]:
    """The files of one split (`train`, where none is named) of one configuration. Raises DataError, which lists what
    there is, where the name leaves a choice or names what is not there."""
    asked = parse_set(name)
    split = asked.split or "train"
    if asked.is_folder and is_saved(asked.where):
        if asked.config or asked.split not in ("", "train"):
            raise DataError(name, "a single set, without configurations and splits", f"write {asked.where}")
        return saved_files(asked.where)
    if asked.is_folder and os.path.isfile(f"{asked.where}/dataset_dict.json"):
        kept = _json_of(f"{asked.where}/dataset_dict.json")
        splits = kept.get("splits", []) if isinstance(kept, dict) else []
        if asked.config:
            raise DataError(name, "a set without configurations", f"write hub:{asked.where}:{split}")
        if split not in splits:
            _refuse_choice(name, "split", split, splits, asked)
        return saved_files(os.path.join(asked.where, split))
    if asked.is_folder:
        of = _splits(asked.where, asked, name)[split]
        return [DataFile(os.path.join(asked.where, os.path.relpath(path, asked.where))) for path in of]
    import datasets  # noqa: F401  (where it is missing that is said before the hub is asked)

    listed = _listed(asked.where, asked.revision)
    with tempfile.TemporaryDirectory(prefix="sftflow-set-") as folder:
        for path in listed.files:
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        Path(folder, "README.md").write_text(listed.readme, encoding="utf-8")
        names = [os.path.relpath(path, os.path.realpath(folder)) for path in _splits(folder, asked, name)[split]]
    return [DataFile(f"{HUB}{asked.where}/{file}", asked.where, listed.commit, file) for file in names]


def _splits(folder: str, asked: SetName, name: str) -> dict[str, list[str]]:
    """{split: paths} of one configuration of a folder, the asked split among them."""
    import datasets

    where, cache = os.path.realpath(folder), tempfile.mkdtemp(prefix="sftflow-set-")
    try:
        configs = [str(config) for config in datasets.get_dataset_config_names(where)]
        if asked.config and asked.config not in configs:
            _refuse_choice(name, "configuration", asked.config, configs, asked)
        builder = datasets.load_dataset_builder(where, asked.config or None, cache_dir=cache)
    except DataError:
        raise
    except Exception as error:  # of many kinds: what is wrong with the README.md, files of no kind, files not there
        if "Config name is missing" in str(error):
            _refuse_choice(name, "configuration", "", configs, asked)
        fact = f"cannot be read as a data set ({type(error).__name__}: {_without(first_line(error), where)})"
        raise DataError(name, fact, "name the files that are meant") from None
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    kinds = [of.__name__ for of in type(builder).__mro__]
    if not set(_READ_AS) & set(kinds):
        raise DataError(name, f"no set of rows of text: its files are for the builder {kinds[1]}", "name another set")
    given = _given(builder.config)
    if given:
        told = ", ".join(f"{key}: {value}" for key, value in given.items())
        raise DataError(
            name, f"its README.md wants its files read with {told}", "that is not done here: name the files"
        )
    splits = {str(key): [str(path) for path in paths] for key, paths in (builder.config.data_files or {}).items()}
    if (asked.split or "train") not in splits:
        _refuse_choice(name, "split", asked.split or "train", list(splits), asked)
    return splits


def _given(config: Any) -> dict[str, Any]:
    """What a README.md says of how the files are read."""
    plain = type(config)()
    names = (f.name for f in dataclasses.fields(config) if f.name not in _AS_OURS)
    return {key: getattr(config, key) for key in names if getattr(config, key) != getattr(plain, key, None)}


def _without(text: str, folder: str) -> str:
    return text.replace(f"{folder}/", "").replace(folder, "it")


def _refuse_choice(name: str, what: str, given: str, there: list[str], asked: SetName) -> NoReturn:
    listed = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if there[20:] else "")
    fact = f"no {what} {given!r} (there {'is' if len(there) == 1 else 'are'}: {listed or 'none'})"
    if not given:
        fact = f"it has several {what}s: {listed}"
    of = there[0] if there else "..."
    if what == "configuration":
        right = asked._replace(
            config=asked.split if asked.split in there else of, split="train" if asked.split in there else asked.split
        )
        remedy = f"write config: {right.config} beside it, or in one name {right}"
    elif asked.split in there:
        remedy = ""
    else:
        remedy = f"write {asked._replace(split=of)}"
    raise DataError(name, fact, remedy)


# ---- the hub


class Listed(NamedTuple):
    commit: str
    files: tuple[str, ...]
    readme: str


@functools.lru_cache(maxsize=64)
def _listed(repo: str, revision: str) -> Listed:
    """What a set on the hub is made of, at one commit: asked once in a process. The answer is kept, and used where the
    hub cannot be asked, or need not be, as the revision is a commit."""
    from huggingface_hub import HfApi, hf_hub_download

    folder = cache_folder("sets")
    file = folder / f"{repo}@{revision or 'main'}.json".replace("/", "--") if folder else None
    if _COMMIT.fullmatch(revision) and (found := _kept(file)):
        return found
    try:
        info = HfApi().dataset_info(repo, revision=revision or None, timeout=TIMEOUT)
        files = tuple(file.rfilename for file in info.siblings or ())
        readme = ""
        if "README.md" in files:
            path = hf_hub_download(repo, "README.md", repo_type="dataset", revision=info.sha, etag_timeout=TIMEOUT)
            readme = Path(path).read_text(encoding="utf-8", errors="replace")
    except Exception as error:  # see `_asking`
        if not _is_answer(error) and (found := _kept(file)):
            return found
        with _asking(f"{HUB}{repo}@{revision}" if revision else f"{HUB}{repo}"):
            raise
    listed = Listed(str(info.sha), files, readme)
    for kept in (file, file.with_name(f"{repo}@{info.sha}.json".replace("/", "--"))) if file else ():
        with contextlib.suppress(OSError):  # a cache that is full or read-only
            write_text(kept, json.dumps(listed))
    return listed


def _kept(file: Path | None) -> Listed | None:
    if file is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            commit, names, readme = json.loads(file.read_text(encoding="utf-8"))
            return Listed(commit, tuple(names), readme)
    return None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_answer(error: BaseException) -> bool:
    """Whether the hub has answered, as against: it could not be asked, or is out of order."""
    status = _status(error)
    return status is not None and status < 500 and status != TOO_MANY_REQUESTS


@contextlib.contextmanager
def _asking(name: str) -> Iterator[None]:
    """Around what asks the hub. Raises DataError that says what it has answered, or why it cannot be asked."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:  # the hub library's, the HTTP library's and the system's
        status = _status(error)
        log_in = "set HF_TOKEN to a token of an account that may read it, or run: hf auth login"
        if isinstance(error, errors.GatedRepoError):
            fact, remedy = "this set is gated on the hub", f"accept its terms on its page there and {log_in}"
        elif isinstance(error, errors.RevisionNotFoundError):
            fact, remedy = (
                f"the hub has this set, but no such revision{_revisions(name)}",
                "check what stands behind the @",
            )
        elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
            fact, remedy = (
                "not here, and the hub is not asked (HF_HUB_OFFLINE)",
                "unset HF_HUB_OFFLINE, or name files that are here",
            )
            if not os.environ.get("HF_HUB_OFFLINE"):
                fact, remedy = f"not here, and the hub cannot be asked ({first_line(error)})", "check the network"
        elif status == 401 and "Invalid" not in str(error):
            fact, remedy = (
                "no such folder here, and on the hub no such set that is open to all",
                f"check the name; for a private set {log_in}",
            )
        elif status in (401, 403):
            fact, remedy = f"the hub refuses access ({status}: {first_line(error)})", log_in
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            fact, remedy = "no such folder here, and no such set on the hub", "check the name"
        else:
            fact = f"cannot be read: the hub cannot be asked ({type(error).__name__}: {first_line(error)})"
            remedy = "check the name and the network"
        raise DataError(name, fact, remedy) from None


def _revisions(name: str) -> str:
    """What there is instead of a revision, where the hub says so."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        refs = HfApi().list_repo_refs(parse_set(name).where, repo_type="dataset")
        return f" (there are: {', '.join(ref.name for ref in [*refs.branches, *refs.tags][:20])})"
    return ""
