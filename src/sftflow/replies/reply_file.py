"""The replies to a file's rows on disk, as they come, in its order: the same command goes on from what is there.

replies.jsonl              a row a reply, appended whole; what a kill cut off is cut away by the next run
replies.jsonl.meta.json    what decides the replies: weights, chat format, rows, system message, how tokens are drawn
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from sftflow.chat.files.names import Places, is_pattern
from sftflow.evaluation.evaluate import weights_of
from sftflow.evaluation.journal import telling_full_disk
from sftflow.fingerprint import format_fingerprint
from sftflow.foundation.atomic_io import finite, write_json
from sftflow.foundation.errors import DataError
from sftflow.replies.asking import RowSource, Survey, digest_of_rows, replies, survey
from sftflow.replies.questions import Asker

if sys.platform != "win32":
    import fcntl

MADE_BY = "sftflow chat --input"
ANOTHER_KIND = (".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst")
Progress = Callable[[int, int, int, float], None]
"""told how many rows are done, of how many, how many of them were done before, and the tokens a second"""


@dataclass
class ReplyCount:
    """rows: that are asked.   ended: how many replies ended how ("stop", "length", "tool_calls").   new: those that
    were not there before.   near_ties: replies at one of whose tokens rounding may have chosen.   seconds, tokens: of
    the new ones.   skipped, first_skipped: see `Survey`."""

    out: Path
    rows: int
    skipped: int = 0
    first_skipped: str | None = None
    ended: Counter[str] = field(default_factory=Counter)
    near_ties: int = 0
    new: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        self.ended[row["finish_reason"]] += 1
        self.near_ties += "near_ties" in row

    def __str__(self) -> str:
        """What there is, in one line."""
        n, cut = self.ended.total(), self.ended["length"]
        said = [f"{n:,} of {self.rows:,} rows are answered in {self.out}{'' if self.new else ' already'}"]
        said += [f"{cut:,} cut at their longest (weight 0)"] if cut else []
        said += [f"{self.near_ties:,} with a near-tie"] if self.near_ties else []
        if self.new:
            said.append(f"{self.new / self.seconds:,.1f} rows and {self.tokens / self.seconds:,.0f} tokens a second")
        if self.skipped:
            said.append(f"{self.skipped:,} left out (the first: {self.first_skipped})")
        return "; ".join(said)


def write_replies(
    source: RowSource,
    asker: Asker,
    out: Path,
    *,
    skip: bool = False,
    overwrite: bool = False,
    looked: Callable[[int], None] = lambda n: None,
    progress: Progress = lambda done, rows, before, rate: None,
) -> ReplyCount:
    """Ask every row, and write the replies, from where an earlier call was stopped.

    skip, looked: see `survey`.   overwrite: begin anew, whatever `out` is.
    Raises what is wrong with a row, before anything is written; DataError where `out` is not of these settings;
    RunError where the disk is full, or the model's logits are not finite.
    """
    meta, settings = out.with_name(f"{out.name}.meta.json"), _settings(asker, skip)
    begun = None if overwrite else _begun(out, meta)
    if begun is None:
        known = survey(source, asker, skip=skip, looked=looked)
        settings["rows"] = known.digest
    else:
        _require_same(out, begun["settings"], settings)
        settings["rows"] = digest_of_rows(source, lambda number, _: looked(number))
        _require_same(out, begun["settings"], settings)
        known = Survey(**{**begun["survey"], "shared": tuple(begun["survey"]["shared"])})
        source = replace(source, places=Places([(n, file) for n, file in begun["files"]], fixed=True))  # by these names
    with telling_full_disk(out), _locked(out) as file:
        if begun is None:
            if file.seek(0, os.SEEK_END) and not overwrite:
                raise DataError(str(out), "another process has begun it", "wait for it, or name another --out")
            file.truncate(0)  # before the settings: no row that is there may be taken for one of theirs
            named = {"model": asker.assistant.name, "input": source.name, "files": source.places.files}
            write_json(meta, {"made_by": MADE_BY, **named, "settings": settings, "survey": asdict(known)})
        count = ReplyCount(out, known.rows, known.skipped, known.first_skipped)
        behind = _go_on(file, out, source, count)
        before, began = count.ended.total(), time.perf_counter()
        progress(before, known.rows, before, 0.0)
        if before < known.rows:
            for question, reply in replies(source, asker, known, skip=skip, behind=behind):
                row = asker.row(question, reply)
                _append(file, row)
                count.add(row)
                count.new, count.tokens = count.new + 1, count.tokens + len(reply.ids)
                count.seconds = time.perf_counter() - began
                progress(before + count.new, known.rows, before, count.tokens / count.seconds)
        os.fsync(file.fileno())
    if (n := count.ended.total()) != known.rows:
        fact = f"{n:,} replies for {known.rows:,} rows: lines of it have been removed"
        raise DataError(str(out), fact, "give --overwrite, or name another --out")
    return count


def require_output(out: Path, source: str) -> None:
    """Raises DataError where replies cannot be written there, or a reader would take them for something else."""
    if out.is_dir() or (out.exists() and not out.is_file()):
        raise DataError(str(out), "not a file", "name a file, as replies.jsonl")
    inside = Path(source).is_dir() and Path(source).resolve() in out.resolve().parents
    if inside or (is_pattern(source) and out.absolute().match(os.path.abspath(source))):
        raise DataError(str(out), "--out would be read as a part of --input", "name a file elsewhere")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise DataError(str(out), "--out is --input itself", "name another file")
    if out.suffix.lower() in ANOTHER_KIND:
        raise DataError(str(out), f"JSON lines are written, not {out.suffix}", "name it replies.jsonl")


def _settings(asker: Asker, skip: bool) -> dict[str, Any]:
    """What decides the replies, but for the rows: with all of it the same, they come out the same (near-ties aside)."""
    assistant = asker.assistant
    return {
        "model": weights_of(assistant),
        "format": format_fingerprint(assistant.tokenizer, assistant.renderer.format),
        "system": asker.system,
        "on_bad_row": "skip" if skip else "stop",
        "seed": asker.seed,
        **{key: value for key, value in {**assistant.sampling, **asker.sampling}.items() if value is not None},
    }


def _begun(out: Path, meta: Path) -> dict[str, Any] | None:
    """What an earlier call wrote of itself; None where there is none. Raises DataError where the files are others'."""
    if not meta.exists():
        if out.exists() and out.stat().st_size:
            fact = "it is there already, and not of this command"
            raise DataError(str(out), fact, "name another --out, or give --overwrite")
        return None
    try:
        found: dict[str, Any] = json.loads(meta.read_bytes())
        Survey(**found["survey"])
        if found["made_by"] != MADE_BY or not found.keys() >= {"files", "settings"}:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise DataError(str(meta), "not what this command wrote", "move it away, or give --overwrite") from None
    return found if out.exists() else None


def _require_same(out: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError naming what is not as it was when `out` was begun."""
    said = {"model": "another model", "format": "another chat format", "rows": "other rows in --input"}
    differ = [key for key in now if then.get(key) != json.loads(json.dumps(now[key], default=str))]
    if differ:
        words = (said.get(key) or f"{key} {json.dumps(then.get(key), ensure_ascii=False)}" for key in differ)
        fact = f"it was begun with {', '.join(words)}"
        raise DataError(str(out), fact, "undo that, name another --out, or give --overwrite")


@contextmanager
def _locked(out: Path) -> Iterator[IO[bytes]]:
    """The file, open to be read and appended to by this process alone. Raises DataError where another has it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+b", buffering=0) as file:
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(str(out), "another process is writing it", "wait for it, or name another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield file


def _go_on(file: IO[bytes], out: Path, source: RowSource, count: ReplyCount) -> int:
    """Count the rows that are there, and cut away a last one that is not whole; the number of the last row that has a
    reply, 0 where none has. Raises DataError where they are not what this command wrote."""
    end = last = 0
    before = {file: n for n, file in source.places.files}
    with out.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                name, _, n = row["source"].rpartition(":")
                place = before[name] + int(n)
                if place <= last:
                    raise ValueError
                count.add(row)
            except (ValueError, KeyError, TypeError, AttributeError):
                fact, remedy = "not the row that was written there", "undo that, or give --overwrite"
                raise DataError(f"{out}:{number}", fact, remedy) from None
            end, last = end + len(line), place
    file.truncate(end)
    return last


def _append(file: IO[bytes], row: Mapping[str, Any]) -> None:
    """A row at the file's end: whole, or not at all where the disk is full."""
    line = json.dumps(finite(dict(row)), ensure_ascii=False, allow_nan=False, default=str) + "\n"
    end = os.fstat(file.fileno()).st_size
    rest = memoryview(line.encode("utf-8", "backslashreplace"))
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:
        os.ftruncate(file.fileno(), end)
        raise
