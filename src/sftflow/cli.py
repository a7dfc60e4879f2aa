"""The command line: the only place that prints or exits. A stage is imported when its command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sftflow.errors import RecipeError, RunError, SftflowError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a base checkpoint to a measured, served assistant: chat format, task mixture, supervised "
    "fine-tuning, evaluation, base-versus-SFT comparison, serving.",
)

MODEL_HELP = "a checkpoint or run directory, a hub id, a .gguf file, or builtin:tiny"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Out = Annotated[Path, typer.Option("--out", help="where the results go")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="tasks: NAME or NAME=PATH, separated by commas")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="at most so many items a task")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    if debug:
        os.environ["SFTFLOW_DEBUG"] = "1"


def _split(tasks: str | None) -> list[str]:
    from sftflow.mixture.tasks import GENERATED

    return [t for t in (tasks or ",".join(GENERATED)).split(",") if t.strip()]


def _number(text: str, place: str) -> int:
    """3.4M, 20M, 4096 -> an int."""
    factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if factor != 1 else text) * factor
    except ValueError:
        value = -1.0
    if value < 1:
        raise RecipeError(place, f"{text!r} is not a positive number", "write for example 20M")
    return int(value)


def _quiet() -> None:
    """Keep the libraries' own bars and warnings out of our progress lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.logging.disable_progress_bar()


@app.command()
def demo(out: Out = Path("runs/demo")) -> None:
    """The whole flow on the shipped base: SFT, comparison, report."""
    from sftflow.files import Lock, clear_directory
    from sftflow.recipe import load_recipe

    path = Path(__file__).parent / "recipes" / "demo.yaml"
    recipe = load_recipe(path, [f"train.out={out}"])
    mark = out / ".demo"
    if out.exists() and any(out.iterdir()) and not mark.is_file():
        raise RecipeError(f"--out {out}", "it holds something else than a demo run", "name another folder")
    with Lock(out) as lock:
        clear_directory(out)
        mark.touch()  # this folder is the demo's: the next demo may replace it
        _train(recipe, resume=False, lock=lock)


@app.command()
def base(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help=".txt or .jsonl files, .xz too")],
    out: Out,
    params: Annotated[str, typer.Option(help="size: 0.1M, 1M, 3.4M or 6M")] = "3.4M",
    vocab: Annotated[int, typer.Option(min=300, help="vocabulary entries")] = 4096,
    tokens: Annotated[str, typer.Option(help="tokens to train on, for example 20M")] = "20M",
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last saved state")] = False,
    heldout: Annotated[list[Path] | None, typer.Option(help="text to measure bits per byte on")] = None,
    lr: Annotated[float, typer.Option(help="AdamW's peak rate; Muon's is four times it")] = 7e-3,
    seed: Annotated[int, typer.Option()] = 0,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model (needs a C++ compiler)")] = False,
) -> None:
    """Train a tokenizer and a tiny base model on plain text."""
    _quiet()
    from sftflow.base.run import BaseSpec, train_base
    from sftflow.console import Watch
    from sftflow.files import Lock
    from sftflow.runtime import detect

    spec = BaseSpec(params=params, vocab=vocab, tokens=_number(tokens, "--tokens"), lr=lr, seed=seed, compile=compile)
    with Watch() as watch, Lock(out):
        card = train_base(
            texts,
            out,
            spec,
            detect(),
            resume=resume,
            save_every=100,
            heldout=heldout or (),
            say=watch.say,
            progress=watch.step,
        )
        watch.say(f"{out / 'checkpoint'}: held-out bits per byte {json.dumps(card['bits_per_byte'])}")


def _first(conversations: Any, n: int) -> list[Any]:
    """The first n conversations, or those before the first bad row (which is named when its turn comes)."""
    from itertools import islice

    out: list[Any] = []
    try:
        out.extend(islice(conversations, n))
    except SftflowError:
        return out
    return out


@app.command()
def render(
    data: Annotated[str, typer.Argument(help="conversations: .jsonl, .json, .parquet or hub:NAME")],
    model: Annotated[str, typer.Option(help=f"{MODEL_HELP}; a directory with a tokenizer is enough")],
    format: Annotated[str, typer.Option(help="auto, a built-in format, or a .jinja file")] = "auto",
    index: Annotated[int | None, typer.Option(min=0, help="only this row, counted from 0")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with every token as a box")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    append_eos: Annotated[bool, typer.Option(help="put the end of text behind replies that have no end")] = False,
) -> None:
    """Show rows as the model sees them: tokens, and which of them are trained on."""
    _quiet()
    from sftflow.chat import settle as settling
    from sftflow.chat.inspect import terminal_lines, token_rows
    from sftflow.chat.schema import read_conversations
    from sftflow.checkpoint import open_renderer, resolve
    from sftflow.errors import MaskError

    renderer = open_renderer(resolve(model), format)
    if append_eos:
        renderer = settling.append_eos(renderer)
    if renderer.arguments():
        renderer = settling.settle(renderer, _first(read_conversations(data), 200))
    for note in (settling.settled(renderer), renderer.disagreement()):
        if note:
            print(note, file=sys.stderr)
    tokenizer = renderer.tokenizer
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    for number, conversation in enumerate(read_conversations(data)):
        if index is not None and number != index:
            continue
        try:
            for rendered in renderer.render_rows(conversation, turns=True):
                rows.append(token_rows(rendered, tokenizer))
        except MaskError as error:
            refused.append({"source": conversation.source, "reason": str(error)})
        if number == index:
            break
    if index is not None and not rows and not refused:
        raise RecipeError(f"--index {index}", f"{data} has not so many rows", "give a smaller number")
    if html is not None:
        from sftflow.chat.inspect_html import render_page
        from sftflow.files import write_text

        page = render_page([*rows, *({"source": r["source"], "refused": r["reason"]} for r in refused)])
        write_text(html, page)
    if as_json:
        document = {
            "rows": [
                {
                    "source": r["source"],
                    "ids": [t["id"] for t in r["tokens"]],
                    "mask": [int(t["supervised"]) for t in r["tokens"]],
                    "tokens": [t["text"] for t in r["tokens"]],
                }
                for r in rows
            ],
            "refused": refused,
        }
        print(json.dumps(document, ensure_ascii=False))
    elif html is None:
        from rich.console import Console

        console = Console(highlight=False)
        for row in rows:
            supervised = sum(t["supervised"] for t in row["tokens"])
            head = f"{row['source']}  {len(row['tokens'])} tokens, {supervised} supervised"
            console.print(head, style="bold underline", markup=False, soft_wrap=True)
            console.print(terminal_lines(row))
    for entry in refused:
        print(f"refused: {entry['reason']}", file=sys.stderr)
    if html is not None:
        print(f"wrote {html}", file=sys.stderr)
    if refused:
        raise typer.Exit(1)


@app.command()
def mix(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    out: Annotated[Path | None, typer.Option(help="write ledger.json (and bad_rows.jsonl) here")] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a page with histograms and one rendered row of each source")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the ledger on stdout")] = False,
) -> None:
    """Audit a recipe's mixture: every row rendered, proven and accounted for."""
    _quiet()
    from rich.console import Console

    from sftflow.chat.inspect import token_rows
    from sftflow.chat.settle import settled
    from sftflow.checkpoint import open_renderer, resolve
    from sftflow.console import Watch, ledger_table
    from sftflow.evals.run import open_tasks
    from sftflow.files import write_json, write_text
    from sftflow.mixture.audit import audit, audit_page, audit_tables, item_parts
    from sftflow.mixture.mix import build_mixture, write_bad_rows
    from sftflow.recipe import load_recipe

    loaded = load_recipe(recipe)
    tasks = list(loaded.eval.tasks) if loaded.eval else []
    evaluation = open_tasks(tasks, loaded.eval.limit if loaded.eval else None, loaded.identity.model_dump())
    with Watch() as watch:
        mixture = build_mixture(
            loaded, open_renderer(resolve(loaded.base), loaded.format), watch.rendering, every_row=True
        )
        tokenizer = mixture.renderer.tokenizer
        found = audit(
            mixture.rows,
            lambda ids: tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True),
            eval_sets={task.name: [item_parts(item) for item in task.items] for task in evaluation},
            special_ids=list(mixture.renderer.special.values()),
            progress=lambda source, done, total: watch.counted("audit", done, total, source),
        )
        for note in (settled(mixture.renderer), mixture.renderer.disagreement()):
            if note:
                watch.say(note)
    ledger = found.into(mixture.ledger())
    if out is not None:
        write_json(out / "ledger.json", ledger)
        write_bad_rows(out, mixture)
    if html is not None:
        samples = [token_rows(r, tokenizer) for r in mixture.samples]
        write_text(html, audit_page(ledger, samples))
    if as_json:
        print(json.dumps(ledger, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        console.print(ledger_table(ledger))
        console.print(
            f"{ledger['packed_rows']:,} packed rows of {mixture.max_length}, {ledger['padding_share']:.1%} padding, "
            f"{ledger['validation_rows']:,} rows held out"
        )
        for table in audit_tables(ledger):
            console.print()
            console.print(table)
        for row in mixture.bad[:5]:
            console.print(f"skipped: {row['reason']}", markup=False)
    mixture.prove()


def _train(recipe: Any, *, resume: bool, lock: Any = None) -> None:
    """Train, then evaluate and compare where the recipe asks for it. lock: on train.out, where it is held already."""
    from contextlib import ExitStack

    from sftflow.files import Lock
    from sftflow.train.stop import Signals, Stopped

    out = Path(recipe.train.out)
    with ExitStack() as stack:
        try:
            signals = stack.enter_context(Signals(_tell_of_waiting))
            if lock is None and (not out.exists() or out.is_dir()):
                lock = stack.enter_context(Lock(out))
            _train_and_compare(recipe, out, signals, lock, resume=resume)
        except Stopped as stopped:
            saved = any((out / "resume").glob("step-*"))
            if (out / "DONE").is_file():
                fact = "the training itself is finished; --resume goes on with what comes after it"
            elif stopped.saved:
                fact = f"the state is saved in {out / 'resume'}; --resume goes on"
            else:
                fact = f"{out / 'resume'} is as it was; --resume goes on" if saved else "nothing had been saved yet"
            print(f"stopped; {fact}", file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None


def _tell_of_waiting() -> None:
    """Called inside a signal handler, where nothing that buffers may be used."""
    os.write(2, b"\nstopping after this step, which is then saved; Ctrl-C again stops at once\n")


def _train_and_compare(recipe: Any, out: Path, signals: Any, lock: Any, *, resume: bool) -> None:
    _quiet()
    from sftflow.console import Watch, stderr
    from sftflow.train.run import run_training

    with Watch() as watch:
        run = run_training(recipe, watch, resume=resume, signals=signals, lock=lock)
        if run.already_done:
            watch.say(f"{out}: this run is finished; nothing to resume")
            wanted = "compare.json" if recipe.compare else "eval.json" if recipe.eval else None
            if wanted is None or (out / wanted).is_file():
                return
        else:
            watch.say(f"{out / 'checkpoint'}: trained in {run.seconds:.0f} s")
        if recipe.eval is None and recipe.compare is None:
            return
        tasks = list(recipe.eval.tasks) if recipe.eval else []
        limit = recipe.eval.limit if recipe.eval else None
        identity = recipe.identity.model_dump()
        if recipe.compare is None:
            _evaluate([str(out)], tasks, limit, out, watch, identity)
            return
        _compare(recipe.base, str(out), tasks, recipe.compare.prompts, limit, out, watch, identity)
        stderr().print(f"chat with it:  {_program()} chat {out}", highlight=False, soft_wrap=True)


def _program() -> str:
    """How this program is called from here: by its name where it is on the PATH, else by its path."""
    import shutil

    called = Path(sys.argv[0])
    if called.name != "sftflow" or shutil.which("sftflow"):
        return "sftflow"
    try:
        return str(called.relative_to(Path.cwd())) if called.is_absolute() else str(called)
    except ValueError:
        return str(called)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. train.steps=30")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last saved state")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="processes; this version trains in one")] = 1,
) -> None:
    """Fine-tune as the recipe says; evaluate and compare where it asks for it."""
    from sftflow.recipe import load_recipe

    if nproc != 1:
        raise RecipeError("--nproc", "this version trains in one process", "leave it out")
    _train(load_recipe(recipe, set_), resume=resume)


def _evaluate(
    models: list[str], tasks: list[str], limit: int | None, out: Path, watch: Any, identity: Any = None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from sftflow.checkpoint import load_assistant
    from sftflow.evals.run import evaluate_models, open_tasks

    runs = open_tasks(tasks, limit, identity or _identity_of(models[0]))
    total = len(models) * sum(len(r.items) for r in runs)
    done = 0

    def tell(model: str, task: str, k: int) -> None:
        nonlocal done
        done += k
        watch.counted("evaluate", done, total, f"{task}: {model}")

    document = evaluate_models([load_assistant(m) for m in models], runs, out, tell)
    watch.say("")
    table = Table(box=None, pad_edge=False)
    for name in ("model", "task", "n", "score", "std. error", "chance"):
        table.add_column(name, justify="left" if name in ("model", "task") else "right", overflow="fold")
    for model, entry in document["models"].items():
        for task, t in entry["tasks"].items():
            table.add_row(model, task, str(t["n"]), f"{t['score']:.3f}", f"{t['stderr']:.3f}", f"{t['chance']:.2f}")
        table.add_row(model, "centred mean", "", f"{entry['centred_mean']:.3f}")
    Console(highlight=False).print(table)
    watch.say(f"rows and eval.json are in {out}")


def _identity_of(model: str) -> Any:
    """The name and maker a run was taught, for grading the identity task."""
    from sftflow.checkpoint import load_info, resolve

    location = resolve(model)
    info = {} if location.is_hub or location.gguf else load_info(location)
    return (info.get("recipe") or {}).get("identity")


def _compare(
    base_name: str,
    sft_name: str,
    tasks: list[str],
    prompts: str,
    limit: int | None,
    out: Path,
    watch: Any,
    identity: Any = None,
) -> None:
    from rich.console import Console

    from sftflow.checkpoint import load_assistant
    from sftflow.compare.prompts import load_prompts
    from sftflow.compare.run import base_format, compare_models
    from sftflow.console import score_table
    from sftflow.evals.run import open_tasks

    runs = open_tasks(tasks, limit, identity or _identity_of(sft_name))
    prompt_set = load_prompts(prompts)
    sft = load_assistant(sft_name)
    base_model = load_assistant(base_name, fallback=base_format(sft))
    directory = Path(sft_name)
    run = directory if (directory / "checkpoint").is_dir() else directory.parent
    document = compare_models(
        base_model,
        sft,
        runs,
        prompt_set,
        out,
        run_directory=run if (run / "ledger.json").is_file() else None,
        progress=lambda what, done, total: watch.counted("compare", done, total, what),
    ).document
    watch.say("")
    if document["tasks"]:
        Console(highlight=False).print(score_table(document))
    if document["kind"] == "continued SFT":
        watch.say("the starting checkpoint was already instruction-tuned: this is continued SFT, not base versus SFT")
    n_parameters = sft.model.num_parameters()
    if n_parameters < 50_000_000:
        watch.say(
            f"a {n_parameters / 1e6:.1f}M-parameter model knows what it was taught; other questions get weak answers"
            " (the report shows some)"
        )
    watch.say(f"report:        {out / 'report.html'}")


@app.command("eval")
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    out: Out,
    tasks: Tasks = None,
    limit: Limit = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="run model-written code (not available yet)")
    ] = False,
) -> None:
    """Score models on tasks; a row an item, and eval.json."""
    _quiet()
    from sftflow.console import Watch

    if allow_code:
        raise RecipeError("--allow-code", "no task of this version runs code", "leave it out")
    with Watch() as watch:
        _evaluate(models, _split(tasks), limit, out, watch)


@app.command()
def compare(
    base_model: Annotated[str, typer.Argument(metavar="BASE", help=MODEL_HELP)],
    sft: Annotated[str, typer.Argument(metavar="SFT", help=MODEL_HELP)],
    out: Out,
    tasks: Tasks = None,
    prompts: Annotated[str, typer.Option(help="default, or a file with one prompt a line")] = "default",
    limit: Limit = None,
) -> None:
    """Base versus SFT on the same tasks and the same fixed prompts; compare.json and report.html."""
    _quiet()
    from sftflow.console import Watch

    with Watch() as watch:
        _compare(base_model, sft, _split(tasks), prompts, limit, out, watch)


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="ask once and print the reply")] = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
) -> None:
    """Talk to a model in the terminal."""
    _quiet()
    from sftflow.checkpoint import load_assistant
    from sftflow.serve.terminal import chat as talk

    talk(load_assistant(model), prompt=prompt, system=system)


@app.command()
def serve(
    model: Model,
    base_model: Annotated[str | None, typer.Option("--base", help="serve this one beside it")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8008,
    api_key: Annotated[str | None, typer.Option(help="ask clients for this key")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="allow another host without a key")] = False,
    allow_origin: Annotated[str | None, typer.Option(help="one web origin that may call")] = None,
) -> None:
    """An OpenAI-compatible server and a chat page."""
    _quiet()
    from sftflow.checkpoint import load_assistant
    from sftflow.compare.run import base_format
    from sftflow.console import stderr
    from sftflow.serve.api import open_socket
    from sftflow.serve.api import serve as run

    sock = open_socket(host, port, api_key=api_key, insecure=insecure)  # before minutes are spent on loading
    sft = load_assistant(model)
    assistants = {_model_id(model): sft}
    if base_model:
        name = _model_id(base_model)
        name = name if name not in assistants else f"{name}-base"
        assistants[name] = load_assistant(base_model, fallback=base_format(sft))
    run(
        assistants,
        host=host,
        port=port,
        api_key=api_key,
        allow_origin=allow_origin,
        insecure=insecure,
        sock=sock,
        say=lambda text: stderr().print(text, highlight=False, markup=False),
    )


def _model_id(name: str) -> str:
    path = Path(name.rstrip("/"))
    return path.parent.name if path.name == "checkpoint" else path.name


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="check this recipe too")] = None,
    math: Annotated[bool, typer.Option("--math", help="prove packing and loss on this machine")] = False,
) -> None:
    """Say what this machine can do, and whether a recipe would run."""
    _quiet()
    from rich.console import Console

    from sftflow.doctor import examine

    lines, good = examine(recipe, math)
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False)
    if not good:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except SftflowError as error:
        if os.environ.get("SFTFLOW_DEBUG"):
            raise
        code = _fail(error)
    except (KeyboardInterrupt, EOFError):
        code = 130
    except BrokenPipeError:
        code = 0
    except MemoryError:
        code = _fail(RunError("memory", "out of memory", "lower train.micro_tokens"))
    except OSError as error:
        if os.environ.get("SFTFLOW_DEBUG"):
            raise
        place = str(error.filename or "files")
        fact = error.strerror or str(error)
        code = _fail(RunError(place, fact, "check space and permissions"))
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None or os.environ.get("SFTFLOW_DEBUG"):
            raise
        print(f"error: usage: {' '.join(str(usage()).split())}; see sftflow --help", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)


def _fail(error: SftflowError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
