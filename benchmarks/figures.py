"""The form of a benchmark's file of figures, what is wrong with one, and its table.

A file, `results/BENCHMARK.SUBJECT[.small].MACHINE.json`, holds

    form        1
    benchmark   the script's name            subject     what it ran on, usually a model's name
    given       the words of the command     settings    all of them, defaults included
    date, commit
    machine     processor, cores, memory_gib, isa (what the processor has), isa_used (what torch's kernels use),
                imitated (whether --isa held it back), threads, load (the load average when it began), accelerator
    versions    package -> version           skipped     what was not measured -> why
    compared    the value by which ways are compared; "sftflow" is the way that the others are compared with
    facts       what is of no round: name -> text or number
    rounds      raw figures, in the order in which they were measured:
                {"round": 0, "way": "sftflow", "case": {"clients": 1}, "values": {"tokens_per_second": 81.0}}

A value's name is one of VALUES. `problems` says what a file has wrong; `scripts/benchmark_tables.py` makes the tables
of the docs from these files, and tests/test_benchmarks.py holds both.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

FORM = 1
OURS = "sftflow"


class Value(NamedTuple):
    """head: of its column.   form: how a table writes it.   more: whether more is better."""

    head: str
    form: str
    more: bool = False


VALUES = {
    "tokens_per_second": Value("tokens/s", "{:,.1f}", True),
    "supervised_per_second": Value("supervised/s", "{:,.0f}", True),
    "items_per_second": Value("items/s", "{:.3f}", True),
    "rows_per_second": Value("rows/s", "{:,.0f}", True),
    "seconds": Value("s", "{:,.1f}"),
    "cpu_seconds": Value("CPU s", "{:,.1f}"),  # of the process and those it waited for
    "cpu_ms_per_token": Value("CPU ms a token", "{:.3f}"),
    "setup_seconds": Value("set-up s", "{:,.0f}"),
    "train_seconds": Value("training s", "{:,.1f}"),
    "compare_seconds": Value("comparison s", "{:,.1f}"),
    "first_step_seconds": Value("first step s", "{:,.1f}"),
    "first_text_seconds": Value("first text s", "{:.3f}"),
    "gap_p50_ms": Value("between tokens p50 ms", "{:.1f}"),
    "gap_p99_ms": Value("p99 ms", "{:.1f}"),
    "health_p50_ms": Value("/health p50 ms", "{:.1f}"),
    "health_p99_ms": Value("/health p99 ms", "{:.1f}"),
    "chat_p50_ms": Value("small chat p50 ms", "{:.0f}"),
    "chat_p99_ms": Value("small chat p99 ms", "{:.0f}"),
    "computed_share": Value("computed share", "{:.0%}"),
    "peak_share": Value("peak share", "{:.0%}", True),
    "trained_share": Value("trained", "{:.1%}"),
    "memory_mib": Value("memory MiB", "{:,.0f}"),
    "loss": Value("loss", "{:.4f}"),
    "score": Value("score", "{:.2f}", True),
    "tokens": Value("tokens", "{:,.0f}"),
}


def written(data: Mapping[str, Any]) -> str:
    """JSON with a line for each round's figures."""
    rounds = ",\n".join("  " + json.dumps(r, ensure_ascii=False) for r in data["rounds"])
    head = json.dumps({k: v for k, v in data.items() if k != "rounds"}, ensure_ascii=False, indent=1)
    return f'{head[:-2]},\n "rounds": [\n{rounds}\n ]\n}}\n'


def file_name(data: Mapping[str, Any]) -> str:
    """'generate.builtin-tiny.small.intel-xeon-processor-2-of-2-amx-bf16.json': benchmark, what it ran on, setting, and
    machine: processor, threads of its cores, instructions."""
    m = data["machine"]
    best = [x for x in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if x in m["isa"]]
    words = [m["accelerator"] or m["processor"], f"{m['threads']}-of-{m['cores']}", m["isa_used"] if m["imitated"]
             else (best or [m["isa_used"]])[0], "imitated" if m["imitated"] else ""]  # fmt: skip
    small = ["small"] if data["settings"].get("small") else []
    return ".".join([data["benchmark"], data["subject"], *small, slug(" ".join(words)), "json"])


def slug(text: str) -> str:
    """'Intel(R) Xeon(R) Processor 2' -> 'intel-xeon-processor-2'"""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


SCHEMA: dict[str, type | tuple[type, ...]] = {
    "form": int, "benchmark": str, "subject": str, "given": str, "settings": dict, "date": str, "commit": str,
    "machine": dict, "versions": dict, "skipped": dict, "compared": str, "facts": dict, "rounds": list,
}  # fmt: skip
MACHINE: dict[str, type | tuple[type, ...]] = {
    "processor": str, "cores": int, "memory_gib": (int, float), "isa": list, "isa_used": str, "imitated": bool,
    "threads": int, "load": (int, float), "accelerator": (str, type(None)),
}  # fmt: skip


def problems(data: Any) -> list[str]:
    """What of a file's contents is not as the head of this file says; empty where all is."""

    def shape(what: Mapping[str, Any], keys: Mapping[str, type | tuple[type, ...]], place: str) -> Iterator[str]:
        yield from (f"{place}{k}: missing" for k in keys if k not in what)
        yield from (f"{place}{k}: not of the form" for k in what if k not in keys)
        yield from (f"{place}{k}: {what[k]!r}" for k, t in keys.items() if k in what and not isinstance(what[k], t))

    if not isinstance(data, dict):
        return ["not an object"]
    found = list(shape(data, SCHEMA, "")) or list(shape(data["machine"], MACHINE, "machine."))
    if found:
        return found
    found += [f"form: {data['form']}"] if data["form"] != FORM else []
    found += [f"compared: {data['compared']}"] if data["compared"] not in VALUES else []
    found += [] if data["rounds"] else ["rounds: none"]
    found += [f"a path of a machine: {x}" for x in re.findall(r"[\"=](/[a-z]+/[^\" ]*)", json.dumps(data))]
    for i, r in enumerate(data["rounds"]):
        wrong = list(shape(r, {"round": int, "way": str, "case": dict, "values": dict}, f"rounds[{i}]."))
        wrong = wrong or [f"rounds[{i}].values: {n} {x!r}" for n, x in r["values"].items()
                          if n not in VALUES or not isinstance(x, int | float) or x != x]  # fmt: skip
        found += wrong
    return found


def command(data: Mapping[str, Any]) -> str:
    """The command line that measured this: its words are those of the settings that were given."""
    return f"python benchmarks/{data['benchmark']}.py {data['given']}".rstrip()


def described(data: Mapping[str, Any]) -> str:
    """One line: the machine, the versions, how often and when."""
    m, v = data["machine"], data["versions"]
    of = f"{m['processor']}, {m['cores']} cores"
    if m["imitated"]:
        has = " and ".join(n for x, n in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if x in m["isa"])
        of += f", held to {m['isa_used'].upper()} by environment variables (it has {has or 'no more'})"
    else:
        of += f", {'AMX bf16' if 'amx_bf16' in m['isa'] else m['isa_used'].upper()}"
    of = f"{m['accelerator']} ({of})" if m["accelerator"] else of
    rounds = len({r["round"] for r in data["rounds"]})
    packages = ", ".join(f"{n} {v[n]}" for n in ("torch", "transformers", "trl", "xllamacpp") if n in v)
    threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
    return (f"{of}, {threads}, {m['memory_gib']:.0f} GiB; {packages}; "
            f"{'one round' if rounds == 1 else f'medians of {rounds} rounds'}, {data['date']}.")  # fmt: skip


def ratios(data: Mapping[str, Any], way: str, case: Mapping[str, Any]) -> list[float]:
    """By round: how many times as good ours was as this way in the same case, by the value that is compared."""
    name = data["compared"]

    def by_round(of: str) -> dict[int, float]:
        return {r["round"]: r["values"][name] for r in data["rounds"]
                if r["way"] == of and r["case"] == case and name in r["values"]}  # fmt: skip

    ours, theirs = by_round(OURS), by_round(way)
    both = [(ours[i], theirs[i]) for i in sorted(ours) if i in theirs]
    return [a / b if VALUES[name].more else b / a for a, b in both if a and b]


def table(data: Mapping[str, Any]) -> str:
    """Medians over the rounds, a line for each case and way; how many times as good ours is: the median of the ratios
    by round, and their range where there are several. Won and lost are written alike."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in data["rounds"]:
        lines.setdefault((json.dumps(r["case"]), r["way"]), []).append(r)
    cases = sorted({c for c, _ in lines}, key=list(dict.fromkeys(c for c, _ in lines)).index)
    names = [n for n in VALUES if any(n in r["values"] for r in data["rounds"])]
    keys = list(dict.fromkeys(k for r in data["rounds"] for k in r["case"]))
    versus = len({w for _, w in lines}) > 1 and any(w == OURS for _, w in lines)
    head = ["way", *keys, *(VALUES[n].head for n in names), *(["sftflow is"] if versus else [])]
    out = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for case in cases:
        for way in [w for c, w in lines if c == case]:
            runs, of = lines[case, way], json.loads(case)
            cells = [f"**{way}**" if way == OURS else way, *(str(of.get(k, "")) for k in keys)]
            for n in names:
                kept = [r["values"][n] for r in runs if n in r["values"]]
                cells.append(VALUES[n].form.format(statistics.median(kept)) if kept else "")
            if versus:
                by_round = [] if way == OURS else ratios(data, way, of)
                spread = f" ({min(by_round):.2f} to {max(by_round):.2f})" if len(by_round) > 1 else ""
                cells.append(f"{statistics.median(by_round):.2f} times{spread}" if by_round else "")
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)
