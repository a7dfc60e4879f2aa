"""The task mixture: sources -> rendered examples, a ledger that accounts for every row, and held-out rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.format import ChatFormat
from sftflow.chat.prefill import drop_prefill
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.template_options import append_eos, choose_arguments
from sftflow.chat.verify import INVARIANTS, Checks, add_checks
from sftflow.data.choice import Choice, choose
from sftflow.data.decontaminate import EvalSets, overlapping
from sftflow.data.prepare import Progress, open_source, prepare_source
from sftflow.data.row_cache import prune
from sftflow.data.sources import pinned_recipe, sample_of
from sftflow.data.store import Examples, Rows, RowStore
from sftflow.data.truncate import EMPTY, TOO_LONG, UNTAUGHT
from sftflow.fingerprint import data_digest
from sftflow.foundation.atomic_io import finite, write_text
from sftflow.foundation.errors import DataError, ProofError
from sftflow.packing.pack import best_fit
from sftflow.recipe import Recipe, SourceEntry

MOST_KEYS = 12  # ignored keys that are listed; ledger.json has all
SETTLE_ROWS = 64  # rows of a source that decide the template's arguments
OVERLAPS = "overlapping with an evaluation task"


@dataclass(frozen=True)
class Prepared:
    """What another process needs to have the same mixture without rendering: the format with what was chosen for these
    rows, where each source's rows lie, and which of them overlap with an evaluation task."""

    format: ChatFormat
    directories: list[Path]
    overlapping: list[NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """examples: training sequences, repeats included, unshuffled (the loop shuffles).   held_out: for the
    validation loss.   sources: what became of each source's rows, as in the ledger.   rows: the rendered rows of each
    source, on disk.   overlapping: which of these, (rows, tasks), for `decontaminate: drop`.   choices: what became of
    each source's rows.   samples: the first of each source, for the mask view.   bad: the quarantined rows."""

    examples: Examples
    held_out: Examples
    names: list[str]
    sources: list[dict[str, Any]]
    rows: list[RowStore]
    overlapping: list[NDArray[np.bool_]]
    choices: list[Choice]
    samples: list[Rendered]
    max_length: int
    order: str
    bad: list[dict[str, Any]]
    renderer: Renderer

    def prepared(self) -> Prepared:
        return Prepared(self.renderer.format, [rows.directory for rows in self.rows], self.overlapping)

    def rows_in_use(self) -> list[Rows]:
        """Each source's rows but those that are left out."""
        return [
            rows.only(~choice.left_out) if choice.left_out.any() else rows
            for rows, choice in zip(self.rows, self.choices, strict=True)
        ]

    @cached_property
    def ledger(self) -> dict[str, Any]:
        lengths, number = self.examples.lengths, self.examples.chosen[:, 0]
        parts = [lengths[number == n] for n in range(len(self.rows))] if self.order == "listed" else [lengths]
        packed = sum(len(best_fit(part.tolist(), self.max_length)) for part in parts)
        slots = packed * self.max_length
        return {
            "sources": self.sources,
            "rows": len(self.examples),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "supervised_tokens": sum(s["supervised_tokens"] for s in self.sources),
            **self._weight(),
            **self._text(),
            "packed_rows": packed,
            "padding_share": round(1 - int(lengths.sum(dtype=np.int64)) / slots if slots else 0.0, 5),
            "validation_rows": len(self.held_out),
            "max_length": self.max_length,
            "order": self.order,
            "supervise": self.renderer.spec.supervise,
            "turns": self.renderer.spec.turns,
            "join_turns": self.renderer.spec.join_turns,
            "format": self.renderer.format.name,
            "template_arguments": self.renderer.format.kwargs,
            "append_eos": self.renderer.format.append_eos,
            "dropped_prefill": self.renderer.format.prefill or None,
            "invariants": self.invariants(),
            "bad_rows": [row["reason"] for row in self.bad[:100]],
            "data_sha256": self.digest(),
        }

    def _weight(self) -> dict[str, float]:
        """The sum of the weights of all supervised tokens, where some count in part."""
        if not any("supervised_weight" in s for s in self.sources):
            return {}
        total = sum(s.get("supervised_weight", s["supervised_tokens"]) for s in self.sources)
        return {"supervised_weight": round(total, 6)}

    def _text(self) -> dict[str, Any]:
        """What of the above is plain text, where some is; and between which tokens its documents stand."""
        parts = [s["text"] for s in self.sources if "text" in s]
        if not parts:
            return {}
        counts = {key: sum(part[key] for part in parts) for key in parts[0]}
        marks = {"opening": self.renderer.document_opening, "end": self.renderer.document_end}
        return {"text": {**counts, **{name: self.renderer.decode(ids) for name, ids in marks.items()}}}

    def invariants(self) -> Checks:
        """How many rows each invariant was checked on, and how many failed it, over all sources."""
        total: Checks = {}
        for rows in self.rows:
            add_checks(total, rows.meta["invariants"])
        return {name: total[name] for name in INVARIANTS if name in total}

    def prove(self) -> None:
        """Raises ProofError, naming the first row, where a verified row fails an invariant."""
        for name, counts in self.invariants().items():
            if counts["failed"]:
                place, _, fact = counts["first"].partition(": ")
                fact = f"{name}: {fact} ({counts['failed']:,} rows fail)"
                raise ProofError(place, fact, "remove the row, or use another format")

    def notes(self) -> list[str]:
        """What is to be said of the sources: which rows are not trained on, or not whole, and what of them is not."""
        lines = [line for rows in self.rows for line in self._losses(rows)]
        if self.renderer.spec.supervise == "all":
            lines.insert(0, "supervise: all: every token after the first is taught, but for messages of weight 0")
        if self.renderer.spec.turns == "last":
            lines.insert(0, "turns: last: only each conversation's last reply is taught")
        if self.renderer.spec.join_turns:
            lines.insert(0, "join_turns: the user's, and the assistant's, messages in a row are joined by a blank line")
        if text := self.ledger.get("text"):
            replies = self.ledger["supervised_tokens"] - text["supervised_tokens"]
            between = " and ".join(filter(None, (text["opening"], text["end"]))) or "no tokens"
            counts = f"{text['rows']:,} rows, {text['supervised_tokens']:,} supervised tokens"
            lines.append(
                f"plain text: {counts} beside {replies:,} of conversations; a document stands between {between}"
            )
        for name, source in zip(self.names, self.sources, strict=True):
            if weight := source.get("supervised_weight"):
                lines.append(
                    f"{name}: the weights of {source['supervised_tokens']:,} supervised tokens sum to {weight:,.1f}"
                )
        return [*lines, *self.ignored(), *(line for choice in self.choices for line in choice.told)]

    def _losses(self, rows: RowStore) -> list[str]:
        meta, long = rows.meta, f"longer than max_length {self.max_length:,}"
        whole = self.renderer.spec.supervise == "all"
        counts = {
            f"{long} and {{was}} dropped": meta["dropped"].get(TOO_LONG, 0),
            f"{long} and {{was}} cut": meta["cut"] - meta["cut_tokens"],
            f"{long} and {{was}} cut within a turn": meta["cut_tokens"],
            "bad and {was} skipped": meta["bad"],
            UNTAUGHT: meta["dropped"].get(UNTAUGHT, 0),
            f"{EMPTY}: left out": meta["dropped"].get(EMPTY, 0),
            f"tokens already{'' if whole else '; their masks are taken as they stand'}": meta["pretokenized"],
        }
        return [
            f"{rows.name}: {n:,} of {meta['seen']:,} rows {'is' if n == 1 else 'are'} "
            + what.format(was="was" if n == 1 else "were")
            for what, n in counts.items()
            if n
        ]

    def ignored(self) -> list[str]:
        """A line for each source whose rows have keys that nothing was made of: which, and how many rows."""
        lines = []
        for name, source in zip(self.names, self.sources, strict=True):
            keys = [f"{_shown(key)} ({n:,} row{'s' * (n != 1)})" for key, n in source["ignored"].items()]
            if len(keys) > MOST_KEYS:
                keys[MOST_KEYS:] = [f"and {len(keys) - MOST_KEYS:,} more keys"]
            if keys:
                lines.append(f"ignored: {', '.join(keys)} in {name}")
        return lines

    def digest(self) -> str:
        """One hash of every row's ids, in order, and of which are trained on."""
        return data_digest(self.rows, self.examples.chosen, self.held_out.chosen)


def _shown(key: str) -> str:
    """A key as a terminal may show it."""
    return key if len(key) <= 40 and key.isprintable() else f"{key[:40]!a}..."


def write_bad_rows(out: Path, mixture: Mixture) -> None:
    """bad_rows.jsonl: the quarantined rows; none, no file."""
    (out / "bad_rows.jsonl").unlink(missing_ok=True)
    if mixture.bad:
        text = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in mixture.bad)
        write_text(out / "bad_rows.jsonl", text)


def training_renderer(recipe: Recipe, renderer: Renderer, chosen: ChatFormat | None = None) -> Renderer:
    """The renderer that the recipe's data is rendered with: with what the recipe supervises, with the end of text
    appended and without what prompts pre-fill where it asks for that, and template arguments chosen by the first rows
    of each source.   chosen: the format that this gave in another process."""
    if chosen is not None:
        renderer = renderer.with_format(chosen)
    elif recipe.append_eos:
        renderer = append_eos(renderer)
    if chosen is None and recipe.drop_prefill:
        renderer = drop_prefill(renderer)
    renderer = renderer.supervising(recipe.supervise, turns=recipe.turns, join_turns=recipe.join_turns)
    if chosen is None and renderer.arguments() and not renderer.format.kwargs:
        sample = [c for entry in recipe.mixture for c in sample_of(entry, recipe, renderer, SETTLE_ROWS)]
        renderer = choose_arguments(renderer, sample)
    if renderer.tokenizer is not None:
        renderer.tokenizer.chat_template = renderer.format.templates  # what the checkpoint will be saved with
    return renderer


def build_mixture(
    recipe: Recipe,
    renderer: Renderer,
    progress: Progress | None = None,
    *,
    every_row: bool = False,
    prepared: Prepared | None = None,
    eval_sets: EvalSets | None = None,
) -> Mixture:
    """Render every source of the recipe. `progress(source, rows_done)` is called now and then.

    every_row: verify the invariants on all rows; else on a sample of each source.   prepared: what another process has
    made of the same recipe; then nothing is rendered.   eval_sets: rows that overlap with these are left out. Raises
    SchemaError, DataError, FormatError or MaskError at the first bad row (on_bad_row: skip quarantines them instead),
    and ProofError where a verified row fails.
    """
    recipe = pinned_recipe(recipe)
    renderer = training_renderer(recipe, renderer, prepared.format if prepared else None)
    sources: list[RowStore] = []
    for number, entry in enumerate(recipe.sources):
        if prepared is None:
            rows = prepare_source(entry, number, recipe, renderer, every_row=every_row, progress=progress)
        else:
            rows = open_source(prepared.directories[number], number, recipe)
        _require_kept(rows, recipe)
        sources.append(rows)
    if written := [rows.directory for rows in sources if rows.new]:
        prune(written[0].parent, keep=[rows.directory for rows in sources])
    found = prepared.overlapping if prepared else overlapping(sources, renderer, eval_sets) if eval_sets else []
    choices = choose(recipe, sources, found, list(eval_sets or ()))
    examples = Examples(sources, _index([choice.shown for choice in choices]))
    if not len(examples):
        lost = sum((Counter({**rows.meta["dropped"], "bad": rows.meta["bad"]}) for rows in sources), Counter[str]())
        lost += Counter({OVERLAPS: sum(int(hit.any(axis=1).sum()) for hit in found)})
        why = ", ".join(f"{n:,} are {w}" for w, n in lost.items())
        fact = f"no row is left to train on{f' ({why})' if why else ''}"
        less = "raise tokens" if recipe.tokens else "lower validation"
        otherwise = "give more rows" if lost else f"{less}, or give more rows"
        raise DataError("mixture", fact, _remedy(lost, recipe, otherwise))
    firsts = [first for rows in sources if (first := rows.meta["sample"])]
    mixture = Mixture(
        examples=examples,
        held_out=Examples(sources, _index([choice.held_out for choice in choices])),
        names=[rows.name for rows in sources],
        sources=[_ledger(*each) for each in zip(recipe.sources, sources, choices, strict=True)],
        rows=sources,
        overlapping=found,
        choices=choices,
        samples=[renderer.render(parse_row(f["row"], f["source"], plain="plain" in f), turns=True) for f in firsts],
        max_length=recipe.train.max_length,
        order=recipe.order,
        bad=[row for rows in sources for row in rows.meta["bad_rows"]],
        renderer=renderer,
    )
    if not every_row:
        mixture.prove()
    return mixture


def _remedy(lost: Mapping[str, int], recipe: Recipe, last: str) -> str:
    """What to do about rows that were lost, by their reasons.   last: what else would do."""
    cut_tokens = [] if recipe.train.overlong == "cut_tokens" else ["set train.overlong: cut_tokens"]
    long = ["raise train.max_length", *cut_tokens] if lost.get(TOO_LONG) else []
    taught = ["give their replies a weight of 1"] if lost.get(UNTAUGHT) else []
    remedies = [*long, *(["mend the bad rows"] if lost.get("bad") else []), *taught]
    return f"{', '.join(remedies)}, or {last}" if remedies else last


def _require_kept(rows: RowStore, recipe: Recipe) -> None:
    """Raises DataError where more of a source's rows are lost than the recipe says may be, of those to be taught."""
    lost = {**rows.meta["dropped"], "bad": rows.meta["bad"]}
    seen = rows.meta["seen"] - lost.pop(UNTAUGHT, 0) - lost.pop(EMPTY, 0)
    n = sum(lost.values())
    if n > recipe.max_dropped * seen:
        named = {TOO_LONG: f"{TOO_LONG} {recipe.train.max_length:,}"}
        why = " and ".join(f"{k:,} of {seen:,} rows are {named.get(w, w)}" for w, k in lost.items() if k)
        fact = f"{why} and were dropped, more than max_dropped {recipe.max_dropped:g} allows"
        raise DataError(rows.prefix, fact, _remedy(lost, recipe, "raise max_dropped"))


def _ledger(entry: SourceEntry, rows: RowStore, choice: Choice) -> dict[str, Any]:
    """A source's entry in the ledger. Its tokens count a row as often as it is shown."""
    meta, times = rows.meta, np.bincount(choice.shown, minlength=len(rows))
    return {
        "name": rows.name,
        "repeat": entry.repeat or 1,
        "rows": int(np.count_nonzero(times)),
        "tokens": int(rows.lengths @ times),
        "supervised_tokens": int(rows.supervised @ times),
        **({"supervised_weight": round(float(rows.weight_sums @ times), 6)} if len(rows.spans) else {}),
        **({"text": _text_of(rows, times)} if rows.text.any() else {}),
        "cut": meta["cut"],
        "cut_tokens": meta["cut_tokens"],
        "dropped": sum(meta["dropped"].values()) + meta["bad"],
        "bad": meta["bad"],
        "ignored": dict(sorted(meta["ignored"].items(), key=lambda item: (-item[1], item[0]))),
        "expanded": meta["expanded"],
        "pretokenized": meta["pretokenized"],
        "validation_rows": len(choice.held_out),
        "taught_elsewhere": choice.taught_elsewhere,
        "boundary_splits": meta["boundary_splits"],
        "dropped_why": {**meta["dropped"], **({"bad row": meta["bad"]} if meta["bad"] else {})},
        **choice.ledger,
    }


def _text_of(rows: RowStore, times: NDArray[np.int64]) -> dict[str, int]:
    """What of a source's rows is plain text.   times: (rows,) how often each is shown."""
    shown = times * rows.text
    return {
        "rows": int(shown.sum()),
        "tokens": int(rows.lengths @ shown),
        "supervised_tokens": int(rows.supervised @ shown),
    }


def _index(chosen: Sequence[NDArray[np.int64]]) -> NDArray[np.int32]:
    """(n, 2) of source number and row, of the rows of each source."""
    numbers = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
    return np.stack([numbers, np.concatenate(chosen)], axis=1).astype(np.int32)
