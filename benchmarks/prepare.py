"""Preparing a chat dataset, ours beside TRL's: from a JSONL file on disk to token ids, loss masks and packed rows.

    python benchmarks/prepare.py [--rows 20000] [--rounds 3] [--peer-python /tmp/trl-venv/bin/python]
    python benchmarks/prepare.py --memory [20000 200000]        # peak memory of ours instead

TRL is wanted nowhere else, so it gets an environment of its own that borrows this one's torch and transformers:

    python3 -m venv /tmp/trl-venv
    .venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \\
        > $(/tmp/trl-venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
    /tmp/trl-venv/bin/pip install --no-deps trl==1.16.0

Rows: GSM8K's training questions and answers as [user, assistant], each question with a number of its own after it, so
that no two rows are equal. Both sides use the same Qwen3 tokenizer and run in fresh processes, in alternating rounds.
Timed: the file's rows -> ids, masks, packing, loading of the file included; imports, tokenizer and model are not.

    ours   build_mixture(...).ledger, which packs (best fit over all rows) and hashes every id and mask
    TRL    load_dataset(...), then SFTTrainer's own preparation (assistant_only_loss, packing) of its constructor; a
           model of one tiny layer, which nothing trains

cold: empty caches. again: a fresh process with the caches that the cold one left. "no cache" is TRL with
datasets.disable_caching(): nothing to find again, but no fingerprints to compute either. The ratio is to whichever of
TRL's ways is fastest when cold. A round takes about two minutes at 20,000 rows.

TRL has training variants only of the templates it ships and refuses this tokenizer's own, an older Qwen3 template; so
it is given its own copy, which writes the same text for these rows. Its assistant mask has one token more a turn: the
line end after <|im_end|>, where generation has already stopped.

Memory: the peak, over our process and its children, of what cannot be given back (their shares of anonymous and shared
memory, sampled in /proc; pages of files are not counted), and what of it the process held before the call. "largest
RSS" is of any one process in its whole life, loading the tokenizer included. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import lzma
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from outside import data_path
from record import Record, begin

READY = "ready"
TEMPLATE = "$SFTFLOW_TEST_DATA/fixtures/chat_templates/llamacpp/Qwen-Qwen3-0.6B.jinja"
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """One preparation. workers: TRL's dataset_num_proc; 1 is its default, no process but its own."""

    rows_file: str
    tokenizer: str
    template: str
    max_length: int
    workers: int = 1
    caching: bool = True


@dataclass(frozen=True, kw_only=True)
class Result:
    seconds: float
    rows: int
    tokens: int
    supervised: int
    packed_rows: int
    before: int = 0
    """bytes that cannot be given back, just before the call"""
    max_rss: int = 0
    """largest resident set of any one process"""


@dataclass
class DecodeMode:
    """One line of the table."""

    name: str
    python: str
    side: str
    workers: int = 1
    caching: bool = True
    cold: list[Result] = field(default_factory=list)
    again: list[Result] = field(default_factory=list)


# ---- the two sides, each in a process of its own


def prepare_ours(job: Job) -> Result:
    from sftflow.checkpoint import open_renderer, resolve
    from sftflow.data.mixture import build_mixture
    from sftflow.recipe import parse_recipe

    recipe = parse_recipe(
        {
            "base": job.tokenizer,
            "format": job.template,
            "mixture": [{"source": job.rows_file}],
            "validation": 0,
            "train": {"max_length": job.max_length, "tokens_per_step": max(8192, job.max_length)},
        },
        "benchmark",
    )
    renderer = open_renderer(resolve(job.tokenizer), job.template)
    before = settled()
    print(READY, flush=True)
    began = time.perf_counter()
    ledger = build_mixture(recipe, renderer).ledger
    seconds = time.perf_counter() - began
    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Result(
        seconds=seconds,
        rows=ledger["rows"],
        tokens=ledger["tokens"],
        supervised=ledger["supervised_tokens"],
        packed_rows=ledger["packed_rows"],
        before=before,
        max_rss=used * 1024,
    )


def prepare_trl(job: Job) -> Result:
    import datasets
    import pyarrow.compute as pc
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]
    from trl.chat_template_utils import qwen3_chat_template  # type: ignore[import-not-found]

    datasets.disable_progress_bars()
    if not job.caching:
        datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    tokenizer.chat_template = qwen3_chat_template  # the one it knows a training variant of
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 16)
    counts = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=len(tokenizer), **sizes, **counts))
    spent: list[float] = []

    class Timed(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*arguments, **named)
            spent.append(time.perf_counter() - began)
            return prepared

    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            assistant_only_loss=True,
            packing=True,
            max_length=job.max_length,
            dataset_num_proc=job.workers if job.workers > 1 else None,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        began = time.perf_counter()
        dataset = datasets.load_dataset("json", data_files=job.rows_file, split="train")
        spent.append(time.perf_counter() - began)
        trainer = Timed(model, config, train_dataset=dataset, processing_class=tokenizer)
    packed = trainer.train_dataset.with_format("arrow")[:]
    labels = pc.list_flatten(packed["labels"])
    return Result(
        seconds=sum(spent),
        rows=len(pc.list_flatten(packed["seq_lengths"])),
        tokens=len(labels),
        supervised=pc.sum(pc.not_equal(labels, -100)).as_py(),
        packed_rows=len(packed),
    )


def run_job(python: str, side: str, job: Job, cache: Path, sampler: Sampler | None = None) -> Result:
    """Run one side in a fresh process whose caches and temporary files lie in `cache`."""
    temporary = cache / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "SFTFLOW_CACHE": str(cache / "sftflow"),
        "HF_HOME": str(cache / "hf"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary),
    }
    command = [python, str(Path(__file__).resolve()), "--side", side, "--job", json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        if sampler and process.stdout:
            while process.stdout.readline().strip() not in (READY, ""):
                pass
            sampler.watch(process.pid)
        output, _ = process.communicate()
        if process.returncode:
            errors.seek(0)
            sys.exit(f"the {side} side failed:\n{errors.read()[-4000:]}")
    return Result(**json.loads(output.splitlines()[-1]))


# ---- memory


def held_by(pids: list[int]) -> int:
    """Bytes of the processes that cannot be given back: their shares of anonymous and shared pages; 0 without /proc."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended, or this is no Linux
            continue
        total += sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def settled() -> int:
    """What this process holds, garbage and freed memory given back first: else the call would grow into it unseen."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    return held_by([os.getpid()])


def family(root: int) -> list[int]:
    """A process and all below it."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children[parent].append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found.extend(children[pid])
    return found


class Sampler(threading.Thread):
    """Watches a process and those below it from outside; `peak` is the most that they held together."""

    def __init__(self, every: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._every, self._root = every, 0

    def watch(self, root: int) -> None:
        self._root = root
        self.start()

    def run(self) -> None:
        while Path(f"/proc/{self._root}").exists():
            self.peak = max(self.peak, held_by(family(self._root)))
            time.sleep(self._every)


# ---- the rows, the tokenizer, the tables


def write_rows(source: Path, target: Path, count: int) -> None:
    pairs = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as out:
        for i in range(count):
            pair = pairs[i % len(pairs)]
            user = {"role": "user", "content": f"{pair['question']} ({i})"}
            assistant = {"role": "assistant", "content": pair["answer"]}
            out.write(json.dumps({"messages": [user, assistant]}, ensure_ascii=False) + "\n")


def unpack(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        data = file.read_bytes()
        (target / file.name.removesuffix(".xz")).write_bytes(lzma.decompress(data) if file.suffix == ".xz" else data)


@contextmanager
def fresh(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def find_peer(python: str | None) -> tuple[str, str] | None:
    """(interpreter, version of TRL there), or None."""
    if python is None and importlib.util.find_spec("trl") is None:
        return None
    command = [python or sys.executable, "-c", "from importlib.metadata import version; print(version('trl'))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return command[0], done.stdout.strip()


def measure_time(ways: list[DecodeMode], job: Job, record: Record, work: Path) -> None:
    for number in record.turns():
        for at, way in enumerate(ways):
            mine = replace(job, workers=way.workers, caching=way.caching)
            with fresh(work / f"cache-{number}-{at}") as cache:
                way.cold.append(run_job(way.python, way.side, mine, cache))
                if way.caching:
                    way.again.append(run_job(way.python, way.side, mine, cache))
            for state, made in (("cold", way.cold), ("again", way.again if way.caching else [])):
                if made:
                    values = {"rows_per_second": made[-1].rows / made[-1].seconds, "seconds": made[-1].seconds}
                    record.add(way.name, values, caches=state)


def print_times(ways: list[DecodeMode], rows: int, max_length: int) -> None:
    ours, *peers = ways
    medians = [statistics.median(r.seconds for r in way.cold) for way in ways]
    print(f"| {'way':<26} | cold rows/s | cold s | again s | ours is |")
    print(f"|{'-' * 28}|------------:|-------:|--------:|--------:|")
    for way, cold in zip(ways, medians, strict=True):
        again = f"{statistics.median(r.seconds for r in way.again):.2f}" if way.again else "-"
        ratio = f"{cold / medians[0]:.2f}x" if way is not ours else "-"
        print(f"| {way.name:<26} | {rows / cold:>11,.0f} | {cold:>6.2f} | {again:>7} | {ratio:>7} |")
    print(f"\n| {'what came out':<26} | tokens     | supervised | packed rows | filled |")
    print(f"|{'-' * 28}|-----------:|-----------:|------------:|-------:|")
    for way in (w for w in ways if w.caching):
        made = way.cold[0]
        filled = made.tokens / (made.packed_rows * max_length)
        counts = f"{made.tokens:>10,} | {made.supervised:>10,} | {made.packed_rows:>11,}"
        print(f"| {way.name:<26} | {counts} | {filled:>6.1%} |")
    for way in ways:
        if any(r.rows != rows for r in (*way.cold, *way.again)):
            print(f"\nnote: {way.name} kept {way.cold[0].rows:,} of {rows:,} rows")
    if not peers:
        return
    extra = peers[0].cold[0].supervised - ours.cold[0].supervised
    print(f"\nsupervised: TRL has {extra / rows:+.2f} tokens a row (the line end after <|im_end|>)")
    best = min(range(1, len(ways)), key=medians.__getitem__)
    by_round = [b.seconds / a.seconds for a, b in zip(ours.cold, ways[best].cold, strict=True)]
    print(
        f"ratio of rows/s, cold, to TRL's fastest ({ways[best].name.removeprefix('TRL, ')}): "
        f"{medians[best] / medians[0]:.2f} ({min(by_round):.2f} to {max(by_round):.2f} by round)"
    )


def measure_memory(job: Job, counts: list[int], source: Path, work: Path) -> None:
    print("| rows      | before MiB | peak MiB | grown MiB | largest RSS MiB | seconds |")
    print("|----------:|-----------:|---------:|----------:|----------------:|--------:|")
    for count in counts:
        write_rows(source, Path(job.rows_file), count)
        sampler = Sampler()
        with fresh(work / f"cache-{count}") as cache:
            made = run_job(sys.executable, "ours", job, cache, sampler)
        before, peak, rss = (x / MIB for x in (made.before, sampler.peak, made.max_rss))
        print(
            f"| {count:>9,} | {before:>10,.0f} | {peak:>8,.0f} | {peak - before:>9,.0f} | {rss:>15,.0f} "
            f"| {made.seconds:>7.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="TRL's process counts")
    parser.add_argument("--peer-python", help="an interpreter that has TRL (default: this one, where it has)")
    parser.add_argument("--memory", type=int, nargs="*", metavar="ROWS", help="peak memory of ours at these row counts")
    parser.add_argument("--data", type=data_path, default="$SFTFLOW_TEST_DATA/gsm8k/train.jsonl")
    parser.add_argument("--tokenizer", type=data_path, default="$SFTFLOW_TEST_DATA/fixtures/tokenizers/hf_qwen3")
    parser.add_argument("--template", type=data_path, default=TEMPLATE)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    small = {"rows": 2_000, "workers": [1]}
    arguments, record = begin(parser, "prepare", small=small, compared="rows_per_second")
    if arguments.side:
        side = prepare_ours if arguments.side == "ours" else prepare_trl
        print(json.dumps(asdict(side(Job(**json.loads(arguments.job))))))
        return
    absent = [str(p) for p in (arguments.data, arguments.tokenizer, arguments.template) if not p.exists()]
    if absent:
        print(f"skipped: not here: {', '.join(absent)} (see --data, --tokenizer and --template)")
        return
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        unpack(arguments.tokenizer, work / "tokenizer")
        job = Job(
            rows_file=str(work / "rows.jsonl"),
            tokenizer=str(work / "tokenizer"),
            template=str(arguments.template.resolve()),
            max_length=arguments.max_length,
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if arguments.memory is not None:
            if not Path("/proc/self/smaps_rollup").exists():
                print("skipped: --memory reads /proc, which is not here")
                return
            print(f"ours, Qwen3 tokenizer, max_length {job.max_length}, {cores} cores\n")
            measure_memory(job, arguments.memory or [20_000, 200_000], arguments.data, work)
            return
        write_rows(arguments.data, Path(job.rows_file), arguments.rows)
        ways = [DecodeMode("sftflow", sys.executable, "ours")]
        peer = find_peer(arguments.peer_python)
        if peer is None:
            record.skip("TRL", "not installed (see --peer-python)")
        else:
            record.versions["trl"] = peer[1]
            for workers in arguments.workers:
                name = f"TRL, {workers} process{'es' if workers > 1 else ''}"
                ways.append(DecodeMode(name, peer[0], "trl", workers))
                ways.append(DecodeMode(f"{name}, no cache", peer[0], "trl", workers, caching=False))
        measure_time(ways, job, record, work)
    print(f"{arguments.rows:,} rows, Qwen3 tokenizer, max_length {job.max_length}, {cores} cores", end="")
    print(f"{f', TRL {peer[1]}' if peer else ''}; medians of {arguments.rounds}\n")
    print_times(ways, arguments.rows, job.max_length)
    record.finish()


if __name__ == "__main__":
    main()
