"""`sf.evaluate` and `sf.compare`: how good, did it get better, and how sure."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sftflow.api.assistant import base_beside, load
from sftflow.api.shared import Drawing, ModelLike, name_of, parts_of, watching
from sftflow.checkpoint import open_renderer, resolve
from sftflow.comparison import results as comparison
from sftflow.comparison.compare import checked_prompts, compare_models
from sftflow.comparison.run_artifacts import run_of
from sftflow.evaluation import results as evaluation
from sftflow.evaluation.evaluate import evaluate_models
from sftflow.evaluation.options import EvalOptions, How, TaskLike
from sftflow.evaluation.prompts_for import require_askable
from sftflow.foundation.atomic_io import Lock, write_text
from sftflow.foundation.errors import ProofError, RecipeError, TaskError
from sftflow.foundation.ranks import Count, joined, ranks, require_shared
from sftflow.recipe import Compare
from sftflow.report.comparison_page import SECTIONS, comparison_page, section_cell
from sftflow.report.pages import frame
from sftflow.report.progress import ProgressDisplay
from sftflow.report.tables import as_html, as_text, comparison_tables, eval_table


class Evaluation(evaluation.Evaluation):
    """Scores with their intervals and rows; prints as a table."""

    def __str__(self) -> str:
        return as_text(eval_table(self))

    def _repr_html_(self) -> str:
        return as_html(eval_table(self))


class Comparison(comparison.Comparison):
    """Base versus SFT: `.tasks` with paired differences, `.prompts` side by side; prints as a table."""

    def save_html(self, path: str | Path) -> None:
        """The report: one page that loads nothing."""
        write_text(Path(path), comparison_page(self))

    def section(self, name: str) -> Drawing:
        """One section of the report for a notebook's cell: `scores`, `prompts`, `forgetting`, `held-out` and others.
        Raises RecipeError for one that there is not."""
        if name not in SECTIONS:
            raise RecipeError("section", f"there is no {name!r}", f"one of {', '.join(SECTIONS)}")
        return Drawing(section_cell(self, name))

    def __str__(self) -> str:
        return as_text(*comparison_tables(self))

    def _repr_html_(self) -> str:
        return frame(comparison_page(self))


class BarMissed(ProofError):
    """A score is below what was required.   evaluation: all scores.   missed: a line for each."""

    evaluation: Evaluation
    missed: list[str]


def evaluate(
    models: ModelLike | Sequence[ModelLike],
    tasks: Sequence[TaskLike] | TaskLike | None = None,
    *,
    limit: int | None = 200,
    allow_code: bool = False,
    shots: int = 0,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    thinking: bool | None = None,
    require: Mapping[str, float] | None = None,
    out: str | Path | None = None,
) -> Evaluation:
    """Score models on tasks, written as on the command line: `spelling`, `gsm8k=PATH`, `./tasks.py:riddles`, or a class
    of one's own; None: the generated ones.

    limit: items a task, None for all.   allow_code: run code that the model wrote, in a sandbox.
    shots: examples in front of each item.   samples: replies to each, drawn at the temperature.   max_tokens: of a
    reply, in place of the task's own.   thinking: whether the chat template is to ask for thoughts; None: as it stands.
    require: {task: lowest score}; BarMissed is raised where a model has a lower one, when all is written.
    out: where the graded rows and eval.json stay, so that a rerun goes on from them.
    Raises TaskError, CheckpointError; RunError where weights or logits are not finite.
    """
    wanted: Sequence[Any] = list(models) if isinstance(models, list | tuple) else [models]
    how = How(shots=shots, samples=samples, temperature=temperature, max_tokens=max_tokens, thinking=thinking)
    options = EvalOptions(tasks=tasks, limit=limit, allow_code=allow_code, how=how)
    with joined(), watching() as shown, _results(out) as folder:
        return evaluate_all(wanted, options, folder, shown, require or {})


def evaluate_all(
    models: Sequence[ModelLike],
    options: EvalOptions,
    folder: Path,
    shown: ProgressDisplay,
    bars: Mapping[str, float] = MappingProxyType({}),
) -> Evaluation:
    """folder: of the results, which is locked.   shown: told how far it is.   bars: see `require` of `evaluate`."""
    runs = [options.open(name_of(m)) for m in models]  # each was taught who it is by its own recipe
    if not all(runs):
        raise TaskError(
            "--tasks", "no task is named, and eval asks nothing else", "name one, as spelling or gsm8k=PATH"
        )
    _require_bars(bars, [task.name for task in runs[0]])
    for model, mine in list(zip(models, runs, strict=True))[1:]:  # the first is loaded, and checked, at once
        if isinstance(model, str | Path):
            require_askable(open_renderer(resolve(str(model)), "auto"), mine)
    total, done = sum(r.n_replies for mine in runs for r in mine), Count()

    def tell(model: str, task: str, k: int) -> None:
        shown.counted("evaluate", done.add(k), total, f"{task}: {model}")

    found = evaluate_models(((load(m), r) for m, r in zip(models, runs, strict=True)), folder, tell)
    evaluation = Evaluation(**parts_of(found))
    if missed := evaluation.missed(bars):
        raised = BarMissed("--require", "; ".join(missed))
        raised.evaluation, raised.missed = evaluation, missed
        raise raised
    return evaluation


def _require_bars(bars: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Raises TaskError where a bar is of no task that is asked, or is no share."""
    for name, bar in bars.items():
        if name not in tasks:
            near = difflib.get_close_matches(name, tasks, 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"asked are {', '.join(tasks)}"
            raise TaskError("--require", f"{name!r} is not asked", remedy)
        if isinstance(bar, bool) or not isinstance(bar, int | float) or not 0 <= bar <= 1:
            raise TaskError("--require", f"the score {bar!r} for {name} is no number in 0..1", "write for example 0.3")


def compare(
    base: ModelLike,
    sft: ModelLike,
    tasks: Sequence[TaskLike] | TaskLike | None = None,
    *,
    limit: int | None = 200,
    prompts: str = "default",
    allow_code: bool = False,
    shots: int = 0,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    thinking: bool | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    out: str | Path | None = None,
) -> Comparison:
    """Base versus SFT on the same items and the same fixed prompts, with paired differences and their intervals.

    tasks, shots, samples, temperature, max_tokens, thinking: as for `evaluate`, of the tasks; "none", or an empty list,
    asks the prompts only.   prompts: `default`, or a file with one
    prompt a line.   judge, judge_model: an OpenAI-compatible URL and a model of it, whose key is read from
    SFTFLOW_JUDGE_KEY.   out: where the rows, compare.json, eval.json and report.html stay.
    """
    how = How(shots=shots, samples=samples, temperature=temperature, max_tokens=max_tokens, thinking=thinking)
    options = EvalOptions(tasks=tasks, limit=limit, allow_code=allow_code, how=how)
    asked = Compare(prompts=str(prompts), judge=judge, judge_model=judge_model)
    with joined(), watching() as shown, _results(out) as folder:
        return compare_two(base, sft, options, asked, folder, shown)


def compare_two(
    base: ModelLike,
    sft: ModelLike,
    options: EvalOptions,
    asked: Compare,
    folder: Path,
    shown: ProgressDisplay,
) -> Comparison:
    """folder: of the results, which is locked.   shown: told how far it is."""
    runs = options.open(name_of(sft))
    prompt_set = checked_prompts(asked)
    trained = load(sft)
    found = compare_models(
        base_beside(base, trained),
        trained,
        runs,
        prompt_set,
        folder,
        run_directory=run_of(name_of(sft)),
        asked=asked,
        progress=lambda what, done, total: shown.counted("compare", done, total, what),
        say=shown.say,
    )
    result = Comparison(**parts_of(found))
    if ranks().first:
        result.save_html(folder / "report.html")
    return result


@contextmanager
def _results(out: str | Path | None) -> Iterator[Path]:
    """The folder that results go to, locked; one that is thrown away where none is named."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="sftflow-") as folder:
            yield Path(folder)
    else:
        with Lock(Path(out)) if ranks().first else nullcontext():
            require_shared(Path(out))
            yield Path(out)
