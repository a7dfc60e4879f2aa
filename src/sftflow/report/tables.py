"""Tables for the terminal that fit 80 columns: an evaluation, a comparison, ledger.json and the audit in it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sftflow.chat.schema import Conversation
from sftflow.comparison.lineage import BASE_AND_SFT
from sftflow.comparison.prompt_results import PromptReply
from sftflow.comparison.results import Comparison
from sftflow.comparison.weights import WeightChange
from sftflow.evaluation.results import Evaluation
from sftflow.generation.request import Reply
from sftflow.report.figures import one_line, plural
from sftflow.report.pages import cell, macros
from sftflow.report.wording import GROUP_NAMES, ending_faults, faults_of, model_names, shown_base

CELL = 72
"""characters of a prompt or reply in a third of 80 columns: three lines"""
COLOURS = {"better": "green", "worse": "red"}


def as_text(*drawn: RenderableType) -> str:
    """Tables (or whatever rich can print) as plain text of 80 columns, an empty line between them."""
    console = Console(file=io.StringIO(), width=80, color_system=None, highlight=False, force_jupyter=False)
    with console.capture() as captured:
        for number, one in enumerate(drawn):
            console.print(*([""] if number else []), one, sep="\n")
    return captured.get().rstrip("\n")


def as_html(*tables: Table) -> str:
    """Tables for a notebook's cell."""
    made = macros("_macros")
    drawn = (
        made.plain_table(t.columns, list(zip(*(c.cells for c in t.columns), strict=True)), t.caption) for t in tables
    )
    return cell(Markup("").join(drawn))


def _table(*columns: str, text: tuple[str, ...]) -> Table:
    """text: the columns of running text, which fold; the others hold numbers."""
    table = Table(box=None, pad_edge=False, caption_justify="left", padding=(0, 1, 0, 0))
    for name in columns:
        words = name in text
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def eval_table(evaluation: Evaluation) -> Table:
    """Each model's score in each task, and what else the task measured."""
    table = _table("model", "task", "n", "score", "std. error", "95% interval", "chance", text=("model", "task"))
    for name, model in evaluation.models.items():
        for r in model.results:
            low, high = r.interval
            scores = (f"{r.score:.3f}", f"{r.stderr:.3f}", f"{low:.3f} to {high:.3f}", f"{r.chance:.2f}")
            table.add_row(Text(name), Text(r.task), str(r.n), *scores)
            for metric, value in {**r.metrics, **r.pass_at}.items():
                table.add_row("", Text(f"  {metric}"), "", str(value) if isinstance(value, int) else f"{value:.3f}")
        for mean, score in (("centred mean", model.centred_mean), ("ChatCORE", model.chatcore)):
            if score is not None:
                table.add_row(Text(name), mean, "", f"{score:.3f}")
    told = next((r.how.told() for model in evaluation.models.values() for r in model.results), "")
    table.caption = f"asked with {told}" if told else None
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The scores, or in their place the replies side by side; then what the fixed prompts say together."""
    tables = [score_table(comparison)] if comparison.tasks else [reply_table(comparison)] if comparison.prompts else []
    return [*tables, prompt_table(comparison)] if comparison.prompt_groups else tables


def reply_table(comparison: Comparison) -> Table:
    """The fixed prompts, "…" for the turns before the last question, with the beginning of both replies."""
    names = model_names(comparison)
    plain = ", plain text" if comparison.kind == BASE_AND_SFT else ""
    table = Table(box=None, pad_edge=False, caption_justify="left", padding=(0, 2, 1, 0))
    for column in ("prompt", names.before + plain, names.after):
        table.add_column(column, ratio=1, overflow="fold")
    for p in comparison.prompts:
        history = "… " if len(p.messages) > 1 else ""
        asked = Text(history + (one_line(p.asked, CELL) or "(empty)"))
        asked.append("\n(in training)" if p.in_training else "", "yellow")
        table.add_row(asked, *(_reply(r) for r in (shown_base(comparison, p), p.sft)))
    return table


def _reply(reply: PromptReply) -> Text:
    mark = {True: "✓", False: "✗", None: ""}[reply.right]
    faults = " ".join(f"[{fault}]" for fault in faults_of(reply))
    return Text(" ").join(
        Text(part, style) for part, style in ((mark, ""), (one_line(reply.text, CELL), ""), (faults, "red")) if part
    )


def asked_table(questions: Sequence[Conversation], replies: Mapping[str, Sequence[Reply]]) -> Table:
    """What models reply to the same questions, a column a model."""
    table = Table(box=None, pad_edge=False, caption_justify="left", padding=(0, 2, 1, 0))
    for column in ("asked", *replies):
        table.add_column(column, ratio=1, overflow="fold")
    for asked, *said in zip(questions, *replies.values(), strict=True):
        several = len(asked.messages) > 1
        question = "\n".join(f"{m.role}: {m.text}" if several else m.text for m in asked.messages)
        cells = [
            Text(_with_calls(r)).append("".join(f" [{f}]" for f in ending_faults(r.finish_reason)), "red") for r in said
        ]
        table.add_row(Text(question), *cells)
    if any(part.kind == "python" for said in replies.values() for r in said for part in r.parts):
        table.caption = "⟨…⟩: what the calculator was asked, and ⟨= …⟩ what it wrote: no part of the text"
    return table


def _with_calls(reply: Reply) -> str:
    """The text of a reply, with what the calculator was asked and wrote where it happened."""
    calls = {"python": "⟨{}⟩", "python_output": "⟨= {}⟩"}
    if not any(part.kind in calls for part in reply.parts):
        return reply.text.strip()
    return " ".join(calls.get(part.kind, "{}").format(part.text.strip()) for part in reply.parts)


def weights_table(change: WeightChange) -> Table:
    """Each kind of weights, and how far it has moved."""
    table = _table("weights", "shape", "tensors", "moved by", text=("weights",))
    for m in change.moved:
        table.add_row(Text(m.name), " x ".join(map(str, m.shape)), str(m.n), f"{m.share:.1%}")
    one, other = change.classes
    classes = f"both are {one}" if one == other else f"{one} and {other}"
    shapes = "the same names and shapes"
    if not change.same_shapes:
        counts = {"added": change.added, "removed": change.removed, "of another shape": change.reshaped}
        shapes = ", ".join(f"{plural(len(names), 'tensor')} {what}" for what, names in counts.items() if names)
    table.caption = f"{classes}; {shapes}; moved by: length of the change / length of the weights before"
    return table


def prompt_table(comparison: Comparison) -> Table:
    """Healthy replies and right answers to the fixed prompts: to all, and to those in and not in the training rows."""
    names, groups = model_names(comparison), comparison.prompt_groups
    change = "gain" if comparison.trained else "diff."
    columns = ("fixed prompts", "n", names.before, names.after, change, "95% interval", "verdict")
    table = _table(*columns, text=("fixed prompts", "verdict"))
    for title, shares in (
        ("healthy replies", {name: group.healthy for name, group in groups.items()}),
        ("right answers", {name: group.right for name, group in groups.items()}),
    ):
        for name, s in shares.items():
            if s is None:
                continue
            low, high = s.ci95
            figures = (f"{s.base:.2f}", f"{s.sft:.2f}", f"{s.delta:+.2f}", f"{low:+.2f} to {high:+.2f}")
            label = title if name == "all" else f"  {GROUP_NAMES[name]}"
            table.add_row(label, str(s.n), *figures, Text(s.verdict, COLOURS.get(s.verdict, "yellow")))
    return table


def score_table(comparison: Comparison) -> Table:
    """Each task before and after, the gain and whether it can be told from chance."""
    names = model_names(comparison)
    columns = (
        "task",
        "n",
        "chance",
        names.before,
        names.after,
        "gain" if comparison.trained else "diff.",
        "95% interval",
        "verdict",
    )
    table = _table(*columns, text=("task", "verdict"))
    for name, t in comparison.tasks.items():
        low, high = t.ci95
        scores = (f"{t.chance:.2f}", f"{t.base:.2f}", f"{t.sft:.2f}", f"{t.delta:+.2f}", f"{low:+.2f} to {high:+.2f}")
        table.add_row(Text(name), str(t.n), *scores, Text(t.verdict, COLOURS.get(t.verdict, "yellow")))
    base, sft = comparison.centred_mean.base, comparison.centred_mean.sft
    if base is not None and sft is not None:
        table.add_section()
        table.add_row("centred mean", "", "", f"{base:.2f}", f"{sft:.2f}", f"{sft - base:+.2f}")
    return table


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """ledger.json: what became of each source's rows."""
    lost = ("cut", "dropped", "validation_rows")
    columns = ("source", "rows", "repeat", "tokens", "superv.", "own %", "cut", "dropped", "held")
    table = _table(*columns, text=("source",))

    def counts(s: Mapping[str, Any], repeat: str) -> list[str]:
        tokens, supervised = s["tokens"], s["supervised_tokens"]
        share = supervised / tokens if tokens else 0.0
        return [f"{s['rows']:,}", repeat, f"{tokens:,}", f"{supervised:,}", f"{share:.0%}"]

    for s in ledger["sources"]:
        repeat = f"x{s.get('passes', s['repeat']):.3g}"
        table.add_row(Text(s["name"]), *counts(s, repeat), *(str(s[key]) for key in lost))
    table.add_section()
    table.add_row("all", *counts(ledger, ""), *(str(sum(s[key] for s in ledger["sources"])) for key in lost))
    if "text" in ledger:
        table.add_row("of it plain text", *counts(ledger["text"], ""))
    table.caption = (
        "superv.: tokens that are trained on; own %: of the tokens beside them. Tokens, and the rows of all, "
        "count a repeated row as often as it is shown; the rest once. held: rows held out"
    )
    return table


def mixture_tables(ledger: Mapping[str, Any]) -> list[Table]:
    """What a mixture is made of: `ledger_table`, and where supervised tokens were shared out, what was asked for."""
    sources = [s for s in ledger["sources"] if "asked" in s]
    if not sources:
        return [ledger_table(ledger)]
    table = _table("share", "asked", "is", "superv. asked", "superv.", "passes", text=("share",))
    for s in sources:
        shares, tokens = (s["asked"]["share"], s["share"]), (s["asked"]["tokens"], s["supervised_tokens"])
        cells = (*(f"{share:.2%}" for share in shares), *(f"{n:,}" for n in tokens), f"{s['passes']:,.4g}")
        table.add_row(Text(s["name"]), *cells, end_section=s is sources[-1])
    asked = sum(s["asked"]["tokens"] for s in sources)
    table.add_row("all", "", "", f"{asked:,}", f"{ledger['supervised_tokens']:,}", "")
    table.caption = "of supervised tokens; a row is never cut to fit. passes: over a source's training rows"
    return [ledger_table(ledger), table]


def audit_tables(ledger: Mapping[str, Any]) -> list[Table]:
    """What `Audit.into` adds to a ledger: each source's lengths and repeats, control tokens in contents, overlap,
    invariants; what is there."""
    drawn = (
        ("duplicates", _lengths),
        ("control_strings", _control_strings),
        ("overlap", _overlap),
        ("invariants", _invariants),
    )
    return [draw(ledger) for key, draw in drawn if ledger.get(key)]


def _lengths(ledger: Mapping[str, Any]) -> Table:
    columns = ("length", "p5", "median", "p95", "max", "own %", "repeats", "near-repeats")
    table = _table(*columns, text=("length",))
    sources = ledger["sources"]
    for s in [*sources, {**ledger, "name": "all"}]:
        lengths = (f"{s['lengths'][key]:,}" for key in ("p5", "p50", "p95", "max"))
        repeats = (f"{s[key]['rows']:,}" for key in ("duplicates", "near_duplicates"))
        share = f"{s['supervised']['share']:.0%}"
        table.add_row(Text(s["name"]), *lengths, share, *repeats, end_section=s is sources[-1])
    table.caption = "tokens of a row; own %: trained on. Here every row counts once, however often it is repeated"
    return table


def _control_strings(ledger: Mapping[str, Any]) -> Table:
    table = _table("control token in contents", "times", "rows", "source", "first", text=("source", "first"))
    for s in ledger["sources"]:
        for token, found in s["control_strings"].items():
            counts = (Text(f"{found['times']:,}", "red"), f"{found['rows']:,}")
            table.add_row(Text(token), *counts, Text(s["name"]), Text(found["first"]))
    table.caption = "taught as text, letter by letter; take them out: the template writes its own"
    return table


def _overlap(ledger: Mapping[str, Any]) -> Table:
    columns = ("overlap with", "items", "found", "share", "not checked", "found in")
    table = _table(*columns, text=("overlap with", "found in"))
    for name, t in ledger["overlap"].items():
        where = ", ".join(f"{s['name']} {s['items']:,}" for s in t["sources"] if s["items"])
        found = Text(f"{t['contaminated']:,}", "red" if t["contaminated"] else "green")
        table.add_row(Text(name), f"{t['items']:,}", found, f"{t['share']:.1%}", f"{t['unchecked']:,}", Text(where))
    return table


def _invariants(ledger: Mapping[str, Any]) -> Table:
    columns = ("what must hold", "checked", "failed", "first failure")
    table = _table(*columns, text=("what must hold", "first failure"))
    for name, i in ledger["invariants"].items():
        colour = "red" if i["failed"] else "green" if i["checked"] else "yellow"
        failed = Text(f"{i['failed']:,}", colour)
        table.add_row(Text(name), f"{i['checked']:,}", failed, Text(i["first"] or ""))
    return table
