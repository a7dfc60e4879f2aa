"""The block at the start of a run, and the one at its end: a word and what it is, a line each, in 80 columns."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from sftflow.foundation.atomic_io import read_log
from sftflow.recipe import Eval
from sftflow.report.figures import duration, plural
from sftflow.report.log_file import NAME
from sftflow.report.wording import kept_step
from sftflow.training.opening import Opening

GROUPS = {"rest": "norms and biases"}
LAST = 10  # steps whose mean loss is the final one


Row = tuple[str, str | Sequence[str]]


def block(rows: Iterable[Row]) -> Text:
    """Lines are folded at 80 columns, but for a list of them, which is to be copied whole.

    >>> print(block([("rows", "5"), ("next", ["sftflow chat run", "sftflow serve run"])]))
    rows        5
    next        sftflow chat run
                sftflow serve run
    """
    text = Text()
    for name, value in rows:
        if isinstance(value, str):
            value = textwrap.wrap(value, 68, break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(value):
            text.append(f"{'' if number else name:<12}", "bold").append(f"{line}\n")
    text.rstrip()
    return text


def start_block(run: Opening) -> Text:
    """What is trained on, how long, and what every `auto` became."""
    train, notes, left = run.settings, run.notes, run.steps - run.step
    held = f"; {run.held_out:,} held out" if run.held_out else ""
    at_once = train.micro_tokens or train.tokens_per_step
    micro = f", {at_once:,} at once" if at_once < train.tokens_per_step else ""
    kind = "packed rows" if train.packing else "rows"
    share = run.n_trained / run.n_parameters
    trained = "all" if share == 1 else f"{run.n_trained:,} ({share:.2%}) of"
    why = {
        key: f" ({notes[key]})" if notes.get(key, "asked for") != "asked for" else ""
        for key in ("compile", "lr", "shard")
    }
    of_all = " (supervise: all)" if notes.get("supervise") == "all" else ""
    of_all += " (turns: last)" if notes.get("turns") == "last" else ""
    of_all += f", {run.supervised_text:,} of them in plain text" if run.supervised_text else ""
    if run.supervised_weight is not None:
        of_all += f"; their weights sum to {run.supervised_weight:,.1f}"
    time = "known after the first steps; validation and evaluation come on top"
    if run.step_seconds is not None:
        expected = f"{about(left * run.step_seconds)} for {plural(left, 'more step')}, as the last ones took"
        time = f"resumed at step {run.step} of {run.steps}{f'; {expected}' if left else ''}"
    rows: list[Row] = [
        ("run", [str(run.out)]),
        ("base", [run.base or "a new one"]),
        ("rows", f"{run.rows:,}, in {run.packed_rows:,} {kind} of {train.max_length:,} tokens{held}"),
        ("tokens", f"{run.tokens:,}, of which {run.supervised_tokens:,} are supervised{of_all}"),
        ("steps", f"{run.steps:,} of {train.tokens_per_step:,} tokens{micro}; {_epochs(run.epochs)}"),
        ("rate", f"{_rates(run)}{why['lr']}; {train.schedule.kind}, warmup {train.schedule.warmup:.0%}"),
        ("trained", f"{trained} {run.n_parameters:,} parameters"),
        ("precision", f"{run.runtime.precision} on {run.runtime.device} ({run.runtime.reason})"),
        ("compiled", f"{'yes' if train.compile else 'no'}{why['compile']}"),
        ("time", time),
    ]
    if run.world > 1:
        keeps = "its rows of every matrix" if train.shard == "full" else "the whole model"
        rows.insert(-2, ("processes", f"{run.world}, each with {keeps}{why['shard']}"))
    return block(rows)


def about(seconds: float) -> str:
    """A time that is expected, no finer than it can be known.

    >>> about(2721.0), about(95.0)
    ('about 45 min', 'about 1 min 35 s')
    """
    return f"about {round(seconds / 60)} min" if 120 <= seconds < 5400 else f"about {duration(seconds)}"


def _epochs(n: float) -> str:
    """
    >>> _epochs(1.0008), _epochs(0.8421)
    ('1 epoch', '0.842 epochs')
    """
    return f"{n:.3g} epoch{'' if f'{n:.3g}' == '1' else 's'}"


def _rates(run: Opening) -> str:
    """In plain words, a group each; one for all where they are alike."""
    if len({(rate.lr, rate.optimizer) for rate in run.rates}) == 1:
        return f"{run.rates[0].lr:g}, {run.rates[0].optimizer}"
    return ", ".join(
        f"{GROUPS.get(rate.group, rate.group)} {f'{rate.lr:g} ({rate.optimizer})' if rate.lr else 'frozen'}"
        for rate in run.rates
    )


def end_block(out: Path, base: str, asked: Eval | None, kept: Mapping[str, Any], seconds: float) -> Text:
    """Which step was kept and why, the losses, where all is, and what comes next.

    base, asked: the recipe's `base` and `eval`.   kept: see `kept_step`.   seconds: of this command.
    """
    held = read_log(out / "validation.jsonl")
    rows: list[Row] = [("kept", kept_step(kept))] if kept else []
    chosen = [row["loss"] for row in held if row["step"] == kept.get("step")]
    if chosen and chosen[-1] is not None and held[0]["loss"] is not None:
        rows.append(("held out", f"loss {held[0]['loss']:.3f} before the first step, {chosen[-1]:.3f} at the kept one"))
    run, compared = shlex.quote(str(out)), (out / "compare.json").is_file()
    options = f" --tasks {shlex.quote(','.join(asked.tasks))}" if asked and asked.tasks else ""
    options += f" --limit {asked.limit}" if asked and asked.limit else ""
    options += " --allow-code" if asked and asked.allow_code else ""
    compare = [] if compared else [f"compare {shlex.quote(base)} {run}{options} --out {run}"]
    return _end(out, rows, seconds, [f"chat {run}", *compare, f"serve {run} --base {shlex.quote(base)}"])


def base_end_block(out: Path, bits_per_byte: Mapping[str, float], seconds: float) -> Text:
    """The same of a new base.   bits_per_byte: by the held-out text."""
    measured = ", ".join(f"{bits:.3f} bits per byte of {name}" for name, bits in bits_per_byte.items())
    base = shlex.quote(f"base={out.resolve()}")
    return _end(out, [("held out", measured)], seconds, [f"train RECIPE --set {base}"])


def _end(out: Path, rows: list[Row], seconds: float, commands: Sequence[str]) -> Text:
    steps = read_log(out / "metrics.jsonl")
    last = [row["loss"] for row in steps[-LAST:] if row["loss"] is not None]
    mean = f"{math.fsum(last) / max(1, len(last)):.3f} in training, the mean of the last {plural(len(last), 'step')}"
    took = duration(sum(row["seconds"] for row in steps))
    files = {"checkpoint": "checkpoint", "report": "report.html", "scores": "eval.json", "log": NAME}
    ends: list[Row] = [
        *rows,
        *([("loss", mean)] if last else []),
        ("time", f"trained for {took}; this command took {duration(seconds)}"),
        *((word, [str(out / name)]) for word, name in files.items() if (out / name).exists()),
        ("next", [f"{program()} {command}" for command in commands]),
    ]
    return block(ends)


def program() -> str:
    """How this program is called from here: by its name where that is the one on the PATH, else by its path."""
    called, found = Path(sys.argv[0]), shutil.which("sftflow")
    if called.parts[-2:] == ("sftflow", "__main__.py"):
        own = found and Path(found).parent == Path(sys.executable).parent
        return "sftflow" if own else f"{shlex.quote(sys.executable)} -m sftflow"
    if called.name != "sftflow" or (found and Path(found).resolve() == called.resolve()):
        return "sftflow"
    return shlex.quote(str(called.relative_to(Path.cwd()) if called.is_relative_to(Path.cwd()) else called))
