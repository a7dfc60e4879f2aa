"""Writing that is whole or absent (beside the target, fsynced, renamed), and one writer at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from sftflow.foundation.errors import CheckpointError
from sftflow.foundation.ranks import Ranks

if sys.platform != "win32":
    import fcntl

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_THERE = (errno.ENOTEMPTY, errno.EEXIST)
LOCK = ".lock"
CHECKSUM = "checksum"  # the key of a JSON document that holds the hash of the rest of it


def reason(error: BaseException) -> str:
    """Why a file could not be written, in the system's words; libraries written in Rust wrap those in theirs:

    "Error while serializing: I/O error: No space left on device (os error 28)"  ->  "No space left on device"
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else str(getattr(error, "strerror", None) or error)


def digest_of(parts: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 over all parts in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside(path: Path) -> Path:
    """A temporary name of this writer's own: on a shared disk, processes of several machines may have one number."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_file(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: `fill` gets it open for writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with beside.open("wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """In UTF-8; half a surrogate pair, which that has not, as JSON and YAML write it: \\ud83d."""
    write_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def finite(value: Any) -> Any:
    """The value with None in the place of every NaN and infinity, which JSON does not know.

    >>> finite({"loss": [0.5, float("nan")]})
    {'loss': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log of JSON lines; [] where there is no such file. A line that a kill or a full disk cut short is
    left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document that every reader takes: a figure that is not finite is null."""
    write_text(path, json.dumps(finite(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


# ---- records that notice when they were changed


def _checksum(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON has it, and its own hash: {"step": 4} -> {"step": 4, "checksum": "9b0c..."}"""
    plain: dict[str, Any] = json.loads(json.dumps(finite(record)))
    return {**plain, CHECKSUM: _checksum(plain)}


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, where it is missing, cut short, or not what
    was written (its checksum says so, where it has one)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(path), "this file is missing", remedy) from None
    except ValueError:
        raise CheckpointError(str(path), "damaged: not whole JSON", remedy) from None
    if not isinstance(record, dict):
        raise CheckpointError(str(path), "damaged: not a JSON object", remedy)
    if CHECKSUM in record and record[CHECKSUM] != _checksum(record):
        raise CheckpointError(
            str(path), "changed since it was saved: its checksum is not the one recorded then", remedy
        )
    return record


def check_hashes(directory: Path, recorded: dict[str, str], remedy: str, shown: str | None = None) -> None:
    """Raises CheckpointError naming the first of the recorded files that is missing or whose bytes have changed."""
    for name, expected in sorted(recorded.items()):
        path = directory / name
        place = f"{shown or directory}/{name}"
        if not path.is_file():
            raise CheckpointError(place, "this file is missing", remedy)
        if sha256_file(path) != expected:
            raise CheckpointError(place, "changed since it was saved: its sha256 is not the one recorded then", remedy)


# ---- directories


def _led_to(target: Path) -> Path:
    """Where a link leads, to another disk perhaps: what is written stands there, and the link stays."""
    return Path(os.path.realpath(target))


def require_writable(target: Path) -> None:
    """Raises OSError where `write_directory` could not put a directory at `target`."""
    target = _led_to(target)
    if target.is_mount():
        raise OSError(errno.EBUSY, "a disk is mounted there; name a folder on it", str(target))
    if target.exists() and not target.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    beside.mkdir()
    beside.rmdir()


def write_directory(target: Path, fill: Callable[[Path], None], *, replace: bool = True) -> None:
    """Create directory `target` through `fill(temporary)`: afterwards it is the new one, or the old one untouched.
    replace: False for what is named by its contents: what another process has put there meanwhile stays.

    Where `target` is a link, the directory that it leads to is replaced. A directory cannot replace another in one
    step, so the old one is first set aside under a known name (`recover_directory` puts it back after a crash between
    the two renames).
    """
    target = _led_to(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    beside.mkdir()
    try:
        fill(beside)
        umask = os.umask(0)
        os.umask(umask)
        for path in sorted(beside.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors writes 0600: nobody else could serve it
                _fsync(path)
        _fsync(beside)
        if replace:
            _replace(beside, target)
        else:
            _add(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _add(beside: Path, target: Path) -> None:
    """Put the whole directory `beside` at `target`, unless one is there."""
    try:
        beside.rename(target)
    except OSError as error:
        if error.errno not in _THERE:
            raise
    _fsync(target.parent)


def write_together(target: Path, fill: Callable[[Path], None], ranks: Ranks) -> None:
    """The same by all ranks of a run, each of which fills in its part: rank 0 makes the directory, and gives it its
    name when all have written theirs."""

    def all_fill(beside: Path) -> None:
        ranks.from_first(beside)
        fill(beside)
        ranks.barrier()

    if ranks.first:
        write_directory(target, all_fill)
    else:
        fill(ranks.from_first(target))
        ranks.barrier()


def _replace(beside: Path, target: Path) -> None:
    """Put the whole directory `beside` where `target` is."""
    old = target.with_name(f".{target.name}.old")
    for attempt in range(5):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        try:
            beside.rename(target)
            break
        except OSError as error:
            # A reader that came between the two renames has just put the old one back.
            if error.errno not in _THERE or attempt == 4:
                raise
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(target: Path) -> None:
    """Remove a directory so that a crash in the middle leaves a temporary, never half of it under its name."""
    target = _led_to(target)
    doomed = _beside(target)
    target.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_directory(folder: Path) -> None:
    """Remove all that is in a folder, but the lock that its caller holds."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def recover_directory(target: Path) -> None:
    """Undo a crash in the middle of `write_directory`."""
    target = _led_to(target)
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)


def sweep(folder: Path, *names: str) -> None:
    """Clear away what killed writers of these names left in a folder: `.NAME.PID-*.tmp`, and `.NAME.old` (put back
    where NAME is gone). names may be patterns, as `step-*`.

    Only for whoever holds the lock: nobody else may be writing these.
    """
    linked = [_led_to(folder / name) for name in names if (folder / name).is_symlink()]
    for folder, name in [*((folder, name) for name in names), *((place.parent, place.name) for place in linked)]:
        for old in folder.glob(f".{name}.old"):
            recover_directory(folder / old.name[1 : -len(".old")])
        for left in [*folder.glob(f".{name}.old"), *folder.glob(f".{name}.[0-9]*.tmp")]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


# ---- one writer at a time

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class Lock(contextlib.AbstractContextManager["Lock"]):
    """The right to write in a folder, held through the operating system: it ends with the process, however that ends.

    The file stays behind and means nothing by itself; where nothing else was written, the folder goes, too.
    On Windows, and on file systems that know no locks, nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError naming the process that holds the lock."""
        self._path = folder / LOCK
        self._file = self._acquire(folder)
        while not _same_file(self._file, self._path):  # removed by its last holder before we had locked it
            self._file.close()
            self._file = self._acquire(folder)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the name
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), str(os.getpid()).encode())

    def _acquire(self, folder: Path) -> IO[str]:
        file = _opened(self._path)
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read(20).strip() or "unknown"
            file.close()
            raise CheckpointError(
                str(folder), f"process {pid} is at work in it", "wait for it, stop it, or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        return file

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if os.listdir(self._path.parent) == [self._path.name]:
                self._path.unlink()
                self._path.parent.rmdir()
        self._file.close()


def _opened(path: Path) -> IO[str]:
    """Open a lock file. Its last holder may be removing it, and the empty folder, at this very moment: try again."""
    for attempt in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):
            if attempt == 99 or path.parent.is_file():
                raise
    raise AssertionError


def _same_file(opened: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False
