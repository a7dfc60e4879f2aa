"""`sf.mix`: sources rendered into what is trained on, every row accounted for; and its audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from sftflow import checkpoint
from sftflow.api.rows import entries_of
from sftflow.api.shared import Drawing, ModelLike, RecipeLike, eval_sets, parts_of, recipe_of, sets_to_drop, watching
from sftflow.chat.render import Renderer
from sftflow.chat.template_options import options_note
from sftflow.chat.token_rows import TokenRow, token_row
from sftflow.data import audit as data_audit
from sftflow.data import mixture as data_mixture
from sftflow.data.mixture_part import PreparedPart, build_part
from sftflow.data.parts import parse_part
from sftflow.foundation.atomic_io import write_json, write_text
from sftflow.recipe import Recipe
from sftflow.report.audit_page import audit_page
from sftflow.report.charts import source_tokens
from sftflow.report.pages import cell, frame
from sftflow.report.tables import as_text, audit_tables, mixture_tables


@dataclass(frozen=True, kw_only=True)
class Audit(data_audit.Audit):
    """What an audit found: prints as tables, draws itself as a page.

    ledger: the mixture's, with the audit's keys.   samples: a rendered row of each source.
    """

    ledger: dict[str, Any]
    samples: tuple[TokenRow, ...]
    mixture: data_mixture.Mixture

    def save_html(self, path: str | Path) -> None:
        write_text(Path(path), audit_page(self.ledger, self.samples))

    def save(self, out: str | Path) -> None:
        """ledger.json, and bad_rows.jsonl where rows were skipped."""
        write_json(Path(out) / "ledger.json", self.ledger)
        data_mixture.write_bad_rows(Path(out), self.mixture)

    def prove(self) -> None:
        """Raises ProofError, naming the first row, where an invariant fails."""
        self.mixture.prove()

    def __str__(self) -> str:
        notes = map(Text, self.mixture.notes())
        return as_text(*mixture_tables(self.ledger), *notes, *audit_tables(self.ledger))

    def _repr_html_(self) -> str:
        return frame(audit_page(self.ledger, self.samples))


@dataclass(frozen=True, kw_only=True)
class Mixture(data_mixture.Mixture):
    """The rendered mixture: `.ledger` says what became of every row. It prints as a table.   recipe: what made it."""

    recipe: Recipe

    def audit(self) -> Audit:
        """Lengths, repeats, near-repeats, overlap with the recipe's evaluation sets, and every mask checked twice."""
        return audit(self.recipe)

    def plot(self) -> Drawing:
        """Each source's tokens: how many are read only, and how many are supervised."""
        return Drawing(cell(source_tokens(self.ledger["sources"]), "charts.css"))

    def __str__(self) -> str:
        return as_text(*mixture_tables(self.ledger), *map(Text, self.notes()))

    def _repr_html_(self) -> str:
        return frame(audit_page(self.ledger, [token_row(r, self.renderer.tokenizer) for r in self.samples]))


def mix(sources: Any = (), base: ModelLike | None = None, *, recipe: RecipeLike | None = None, **keys: Any) -> Mixture:
    """Render sources into a mixture for a base: rows, files, hub data sets, tasks, or entries as a recipe has them.

    keys: the recipe's own (`format`, `validation`, `on_bad_row`, `identity`, `append_eos` ...), and those of `train`
    that decide the rows (`max_length`, `overlong`, `seed`).   recipe: one to start from.
    Raises the first bad row's error, and MaskError or ProofError where a mask cannot be proven.
    """
    made = recipe_of(recipe, base, entries_of(sources), keys)
    with watching() as shown, made.origin.named():
        dropped = sets_to_drop(made)
        built = data_mixture.build_mixture(made, renderer_of(made), shown.rendering, eval_sets=dropped)
        return Mixture(**parts_of(built), recipe=made)


def renderer_of(recipe: Recipe) -> Renderer:
    return checkpoint.open_renderer(checkpoint.resolve(recipe.base), recipe.format)


def audit(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Audit:
    """Render every row of a recipe's mixture, check every mask a second time, and measure what is in it.

    overrides: of the recipe, as `--set` has them.
    """
    made = recipe_of(recipe, None, (), {}, overrides)
    with watching() as shown, made.origin.named():
        dropped = sets_to_drop(made)
        mixture = data_mixture.build_mixture(
            made, renderer_of(made), shown.rendering, every_row=True, eval_sets=dropped
        )
        tokenizer = mixture.renderer.tokenizer
        found = data_audit.audit(
            mixture.rows_in_use(),
            lambda ids: tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True),
            eval_sets=dropped or eval_sets(made),
            control=mixture.renderer.special,
            progress=lambda done, total: shown.counted("audit", done, total),
        )
        for note in (options_note(mixture.renderer), mixture.renderer.disagreement()):
            if note:
                shown.say(note)
    samples = tuple(token_row(r, tokenizer) for r in mixture.samples)
    return Audit(**parts_of(found), ledger=found.into(mixture.ledger), samples=samples, mixture=mixture)


def prepare_part(recipe: RecipeLike, part: str, overrides: Sequence[str] = ()) -> PreparedPart:
    """Render part "I/N" of a recipe's rows into the cache, for whoever builds the mixture later, from any process.

    overrides: of the recipe, as `--set` has them.   Raises the first bad row's error, and DataError where nothing can
    be kept.
    """
    which = parse_part(part)
    made = recipe_of(recipe, None, (), {}, overrides)
    with watching() as shown, made.origin.named():
        return build_part(made, renderer_of(made), which, shown.rendering)
