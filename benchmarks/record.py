"""What every benchmark shares: its command-line words, and the one form in which its figures are written.

    arguments, record = begin(parser, "generate", small={"items": 4})
    for turn in record.turns():                             # --rounds of them
        for way in record.turned(["sftflow", "transformers"]):
            record.add(way, {"tokens_per_second": 81.0}, clients=1)
    record.skip("llama.cpp", "the package xllamacpp is not installed")
    record.facts["replies equal"] = "8 of 8"
    record.finish()

`--rounds N`, `--out DIR` (where its file goes; without it figures are only printed), `--small` (what `make bench` runs:
minutes in all), `--threads N`, `--isa avx2` (an imitation of processors that have no more than AVX2: oneDNN, MKL and
torch's own kernels are told not to use what they find; `--precision auto` is then fp32) mean the same everywhere.

What the file holds is told in figures.py, which also makes its table.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from figures import FORM, VALUES, described, file_name, slug, table, written

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "peft", "trl", "xllamacpp", "gguf", "numpy")
ISAS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
# torch.compile's cache of graphs knows nothing of ATEN_CPU_CAPABILITY. Code whose loops step by 16 numbers would be
# found again and built with vectors of 8 (half of the numbers are left out: NaN), or the other way about (it writes
# beyond the end: "double free or corruption"). What is compiled under an imitation has a folder of its own.
IMITATIONS = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"sftflow-compiled-avx2-{os.getuid()}"),
    },
}
IMITATED = "SFTFLOW_BENCHMARK_ISA"  # set in the process that runs under an imitation, and in its children


def begin(
    parser: argparse.ArgumentParser,
    benchmark: str,
    *,
    rounds: int = 3,
    small: Mapping[str, Any] | None = None,
    compared: str = "tokens_per_second",
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, Record]:
    """The arguments, with the words that all benchmarks have, and what the figures go into. Starts this process anew
    where `--isa` or `--threads` asks for an environment that it does not have: libraries read it when they are loaded.

    small: the defaults under --small.
    """
    group = parser.add_argument_group("of every benchmark")
    group.add_argument("--rounds", type=int, default=rounds)
    group.add_argument("--out", type=Path, help="a folder for the file of figures")
    group.add_argument("--small", action="store_true", help="the setting of `make bench`: a minute or two")
    group.add_argument("--threads", type=int, help="of torch and of its peers")
    group.add_argument("--isa", choices=tuple(IMITATIONS), help="imitate a processor that has no more than this")
    words = sys.argv[1:] if argv is None else argv
    if "--small" in words:
        parser.set_defaults(**{"rounds": 1, **(small or {})})
    arguments = parser.parse_args(words)
    wanted = {"OMP_NUM_THREADS": str(arguments.threads)} if arguments.threads else {}
    wanted |= {**IMITATIONS[arguments.isa], IMITATED: arguments.isa} if arguments.isa else {}
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    return arguments, Record(benchmark, arguments, words, compared)


class Record:
    """The figures of one benchmark: see the head of this file."""

    def __init__(self, benchmark: str, arguments: argparse.Namespace, words: Sequence[str], compared: str) -> None:
        self.out: Path | None = arguments.out
        self.n_rounds: int = arguments.rounds
        self.round = 0
        self.facts: dict[str, str | float] = {}
        self.versions: dict[str, str] = versions()
        self.skipped: dict[str, str] = {}
        self.rounds: list[dict[str, Any]] = []
        self._head = {
            "form": FORM,
            "benchmark": benchmark,
            "subject": subject_of(getattr(arguments, "model", None)),
            "given": given(words),
            "settings": settings_of(arguments),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "machine": machine(),
            "compared": compared,
        }

    def turns(self) -> Iterator[int]:
        for turn in range(self.n_rounds):
            self.round = turn
            yield turn

    def turned(self, ways: Sequence[str]) -> list[str]:
        """The ways in this round's order: a machine that slows down within a round slows another one each time."""
        at = self.round % max(1, len(ways))
        return [*ways[at:], *ways[:at]]

    def add(self, way: str, values: Mapping[str, float], **case: int | str) -> None:
        """One way's figures in this round. case: under what, as `clients=8`. Printed, too."""
        kept = {name: round(float(x), 6) for name, x in values.items()}
        self.rounds.append({"round": self.round, "way": way, "case": case, "values": kept})
        told = "  ".join(f"{VALUES[n].head} {VALUES[n].form.format(x)}" for n, x in kept.items())
        print(f"  {self.round}  {way:26} {' '.join(f'{k} {v}' for k, v in case.items()):12} {told}", flush=True)

    def skip(self, what: str, why: str) -> None:
        self.skipped[what] = why
        print(f"  skipped: {what}: {why}", flush=True)

    def data(self) -> dict[str, Any]:
        return {**self._head, "versions": self.versions, "skipped": self.skipped, "facts": self.facts,
                "rounds": self.rounds}  # fmt: skip

    def finish(self) -> None:
        """Prints the table, and writes the file where `--out` is given."""
        data = self.data()
        print(f"\n{described(data)}\n\n{table(data)}\n")
        for name, fact in self.facts.items():
            print(f"{name}: {fact}")
        if self.out and self.rounds:
            self.out.mkdir(parents=True, exist_ok=True)
            target = self.out / file_name(data)
            target.write_text(written(data), encoding="utf-8")
            print(f"written: {target}")


def skipped(why: str) -> int:
    """For a benchmark that cannot run here at all: says why; its exit code."""
    print(f"skipped: {why}", flush=True)
    return 0


def subject_of(model: str | Path | None) -> str:
    """'/models/SmolLM2-135M.Q4_1.gguf' -> 'smollm2-135m-q4-1'; without a model 'all'"""
    return slug(re.sub(r"\.(gguf|yaml)$", "", Path(str(model)).name)) if model else "all"


def given(words: Sequence[str]) -> str:
    """The command's words as a reader would write them: without `--out`, of a path its last part."""
    out, rest = [], iter(words)
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif not word.startswith("--out="):
            out.append(_nameless(word))
    return shlex.join(out)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command-line words as JSON, defaults included."""

    def plain(x: Any) -> Any:
        return [plain(y) for y in x] if isinstance(x, list | tuple) else _nameless(x)

    return {k: plain(v) for k, v in vars(arguments).items() if k not in ("out", "job", "side") and v is not None}


def _nameless(x: Any) -> Any:
    """A path's last part: where files lie on one machine is of no use to others. base=/models/a.gguf -> base=a.gguf"""
    if isinstance(x, Path):
        return x.name
    if not isinstance(x, str):
        return x
    key, equals, value = x.partition("=") if re.match(r"[\w.]+=[/.]", x) else ("", "", x)
    return key + equals + (Path(value).name if value.startswith(("/", ".")) else value)


def commit() -> str:
    """Of the checkout, with a + where files have been changed since; empty where git does not say."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short=9", "HEAD") + ("+" if git("status", "--porcelain", "src", "benchmarks") else "")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    out = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def machine() -> dict[str, Any]:
    """See the head of this file."""
    import torch

    info = _text("/proc/cpuinfo")
    flags = set(_field(info, "flags|Features").split())
    total = int(_field(_text("/proc/meminfo"), "MemTotal").split()[0] or 0)
    return {
        "processor": re.sub(r"\s+", " ", _field(info, "model name").replace("(R)", "")) or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(total / (1 << 20), 1),
        "isa": [x for x in ISAS if x in flags],
        "isa_used": os.environ.get(IMITATED) or torch.backends.cpu.get_cpu_capability().lower(),
        "imitated": IMITATED in os.environ,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^(?:{name})\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else ""


def precision_of(asked: str) -> str:
    """What `auto` is: fp32 under an imitation, whose processor has no bf16 products; else what the package chooses."""
    if asked == "auto" and IMITATED in os.environ:
        return "fp32"
    from sftflow.foundation.runtime import detect

    return str(detect(asked).precision)
