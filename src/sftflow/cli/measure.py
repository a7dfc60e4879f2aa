"""`eval` and `compare`: how good, and did it get better."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sftflow.cli.common import MODEL_HELP, Limit, Out, Tasks, app, quiet, split_tasks
from sftflow.errors import RecipeError

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
        from sftflow.evaluation.prompts_for import open_tasks

        identity = self.identity or identity_of(model)
        return open_tasks(self.tasks, self.limit, identity, allow_code=self.allow_code)

    def check_comparison(self) -> Any:
        """The fixed prompts, after asking the judge, where one is named, whether it is there."""
        from sftflow.comparison.judge import check_judge
        from sftflow.comparison.prompts import load_prompts

        if bool(self.judge) != bool(self.judge_model):
            raise RecipeError("--judge", "it needs --judge-model, and that needs --judge", "give both")
        prompts = load_prompts(self.prompts)
        if self.judge and self.judge_model:
            check_judge(self.judge, self.judge_model, os.environ.get(JUDGE_KEY))
        return prompts


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

    document = evaluate_models(((load_assistant(name), runs[name]) for name in models), asked.out, tell)
    watch.say("")
    Console(highlight=False).print(eval_table(document))
    watch.say(f"rows and eval.json are in {asked.out}")


def compare_two(base_name: str, sft_name: str, asked: EvalOptions, watch: Any) -> None:
    """Base versus SFT, and the verdicts."""
    from rich.console import Console

    from sftflow.checkpoint import load_assistant
    from sftflow.comparison.compare import JudgeSpec, base_format, compare_models
    from sftflow.report.tables import score_table

    runs = asked.open(sft_name)
    prompt_set = asked.check_comparison()
    sft = load_assistant(sft_name)
    base_model = load_assistant(base_name, fallback=base_format(sft))
    judge = None
    if asked.judge and asked.judge_model:
        judge = JudgeSpec(url=asked.judge, model=asked.judge_model, api_key=os.environ.get(JUDGE_KEY))
    document = compare_models(
        base_model,
        sft,
        runs,
        prompt_set,
        asked.out,
        run_directory=run_of(sft_name),
        judge=judge,
        progress=lambda what, done, total: watch.counted("compare", done, total, what),
        say=watch.say,
    ).document
    watch.say("")
    if document["tasks"]:
        Console(highlight=False).print(score_table(document))
    for line in remarks(document, sft.model.num_parameters()):
        watch.say(line)
    watch.say(f"report:        {asked.out / 'report.html'}")


def run_of(model: str) -> Path | None:
    """The run directory that a model's checkpoint lies in, where it does: RUN or RUN/checkpoint, trained by us."""
    directory = Path(model)
    run = directory.parent if directory.name == "checkpoint" else directory
    trained = (run / "checkpoint").is_dir() and (run / "recipe.yaml").is_file() and (run / "ledger.json").is_file()
    return run if trained else None


def remarks(document: dict[str, Any], n_parameters: int) -> list[str]:
    """What a reader of the table must know beside it."""
    out = []
    if document["kind"] == "continued SFT":
        out.append("the starting checkpoint was already instruction-tuned: this is continued SFT, not base versus SFT")
    forgetting = document["forgetting"]
    if forgetting["base"] and forgetting["sft"]:
        change = forgetting["sft"] / forgetting["base"] - 1
        text = f"plain text: {forgetting['base']:.3f} -> {forgetting['sft']:.3f} bits per byte ({change:+.1%}"
        out.append(text + (", it forgot some of its reading)" if change > 0.02 else ")"))
    for name, task in document["tasks"].items():
        overlap = task["contamination"] or {}
        if overlap.get("contaminated"):
            out.append(f"{name}: {overlap['contaminated']} of {overlap['items']} items share words with training rows")
    if n_parameters < 50_000_000:
        out.append(
            f"a {n_parameters / 1e6:.1f}M-parameter model knows what it was taught; other questions get weak answers"
            " (the report shows some)"
        )
    return out


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
