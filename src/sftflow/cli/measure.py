"""`eval` and `compare`: how good, and did it get better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sftflow.cli.common import MODEL_HELP, Limit, Out, Tasks, app, quiet, split_tasks

JUDGE_KEY = "SFTFLOW_JUDGE_KEY"
AllowCode = Annotated[bool, typer.Option("--allow-code", help="run code that the model wrote, in a sandbox")]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What models are asked, from the command line or a recipe."""

    tasks: tuple[str, ...]
    limit: int | None
    out: Path
    allow_code: bool = False
    identity: Any = None
    prompts: str = "default"
    judge: str | None = None
    judge_model: str | None = None

    @classmethod
    def of_recipe(cls, recipe: Any, out: Path) -> EvalOptions:
        measure, compare = recipe.eval, recipe.compare
        return cls(
            tasks=tuple(measure.tasks) if measure else (),
            limit=measure.limit if measure else None,
            out=out,
            allow_code=bool(measure and measure.allow_code),
            identity=recipe.identity.model_dump(),
            prompts=compare.prompts if compare else "default",
            judge=compare.judge if compare else None,
            judge_model=compare.judge_model if compare else None,
        )

    def open(self, model: str) -> Any:
        """The tasks, with their items; `model` is the one that was taught who it is."""
        from sftflow.evaluation.options import open_tasks

        identity = self.identity or identity_of(model)
        return open_tasks(self.tasks, self.limit, identity, allow_code=self.allow_code)

    def compared_with(self) -> Any:
        from sftflow.comparison.compare import CompareOptions

        return CompareOptions(prompts=self.prompts, judge=self.judge, judge_model=self.judge_model)


def identity_of(model: str) -> Any:
    """The name and maker a run was taught, for grading the identity task."""
    from sftflow.checkpoint import load_info, resolve

    location = resolve(model)
    info = {} if location.is_hub or location.gguf else load_info(location)
    return (info.get("recipe") or {}).get("identity")


def evaluate_all(models: list[str], asked: EvalOptions, watch: Any) -> None:
    """Score models, and show the scores."""
    from rich.console import Console

    from sftflow.checkpoint import load_assistant, open_renderer, resolve
    from sftflow.evaluation.evaluate import evaluate_models
    from sftflow.evaluation.prompts_for import require_askable
    from sftflow.report.tables import eval_table

    runs = {name: asked.open(name) for name in models}  # each was taught who it is by its own recipe
    for name in models[1:]:  # the first is loaded, and checked, at once
        require_askable(open_renderer(resolve(name), "auto"), runs[name])
    total = sum(len(r.items) for name in models for r in runs[name])
    done = 0

    def tell(model: str, task: str, k: int) -> None:
        nonlocal done
        done += k
        watch.counted("evaluate", done, total, f"{task}: {model}")

    evaluation = evaluate_models(((load_assistant(name), runs[name]) for name in models), asked.out, tell)
    watch.say("")
    Console(highlight=False).print(eval_table(evaluation.to_json()))
    watch.say(f"rows and eval.json are in {asked.out}")


def compare_two(base_name: str, sft_name: str, asked: EvalOptions, watch: Any) -> None:
    """Base versus SFT, and the verdicts."""
    from rich.console import Console

    from sftflow.atomic_io import write_text
    from sftflow.checkpoint import base_format, load_assistant
    from sftflow.comparison.compare import compare_models
    from sftflow.comparison.remarks import remarks
    from sftflow.comparison.run_artifacts import run_of
    from sftflow.report.comparison_page import comparison_page
    from sftflow.report.tables import score_table

    options = asked.compared_with()
    runs = asked.open(sft_name)
    prompt_set = options.check()
    sft = load_assistant(sft_name)
    comparison = compare_models(
        load_assistant(base_name, fallback=base_format(sft)),
        sft,
        runs,
        prompt_set,
        asked.out,
        run_directory=run_of(sft_name),
        options=options,
        progress=lambda what, done, total: watch.counted("compare", done, total, what),
        say=watch.say,
    )
    write_text(asked.out / "report.html", comparison_page(comparison))
    watch.say("")
    if comparison.tasks:
        Console(highlight=False).print(score_table(comparison.to_json()))
    for line in remarks(comparison):
        watch.say(line)
    watch.say(f"report:        {asked.out / 'report.html'}")


@app.command("eval")
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    out: Out,
    tasks: Tasks = None,
    limit: Limit = None,
    allow_code: AllowCode = False,
) -> None:
    """Score models on tasks; a row an item, and eval.json. A rerun goes on from finished rows."""
    quiet()
    from sftflow.atomic_io import Lock
    from sftflow.report.progress import ProgressDisplay

    asked = EvalOptions(tasks=tuple(split_tasks(tasks)), limit=limit, out=out, allow_code=allow_code)
    with ProgressDisplay() as watch, Lock(out):
        evaluate_all(models, asked, watch)


@app.command()
def compare(
    base_model: Annotated[str, typer.Argument(metavar="BASE", help=MODEL_HELP)],
    sft: Annotated[str, typer.Argument(metavar="SFT", help=MODEL_HELP)],
    out: Out,
    tasks: Tasks = None,
    prompts: Annotated[str, typer.Option(help="default, or a file with one prompt a line")] = "default",
    limit: Limit = None,
    allow_code: AllowCode = False,
    judge: Annotated[
        str | None, typer.Option(help=f"OpenAI-compatible URL of a judge; its key is read from {JUDGE_KEY}")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="the judge's model id")] = None,
) -> None:
    """Base versus SFT on the same tasks and the same fixed prompts; compare.json and report.html."""
    quiet()
    from sftflow.atomic_io import Lock
    from sftflow.report.progress import ProgressDisplay

    asked = EvalOptions(
        tasks=tuple(split_tasks(tasks)),
        limit=limit,
        out=out,
        allow_code=allow_code,
        prompts=prompts,
        judge=judge,
        judge_model=judge_model,
    )
    with ProgressDisplay() as watch, Lock(out):
        compare_two(base_model, sft, asked, watch)
