"""A complete example of a `Comparison`, and a strict reader of the page that is made of it."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from importlib import resources
from typing import Any

from sftflow.chat.token_rows import Token, TokenRow
from sftflow.comparison.judge import JudgeResult, ReplyPair, Verdict
from sftflow.comparison.prompt_results import PromptComparison, PromptReply, prompt_groups, seen_counts
from sftflow.comparison.prompts import PromptSet
from sftflow.comparison.results import (
    Both,
    Comparison,
    Cost,
    Forgetting,
    HeldOutComparison,
    ItemComparison,
    NotChecked,
    TaskComparison,
)
from sftflow.comparison.run_artifacts import RunArtifacts
from sftflow.data.audit.overlap import Overlap, OverlapExample
from sftflow.evaluation.heldout_loss import HeldOutLoss
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.reply_checks import FAULTS, ReplyChecks

HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp; \u202e\x00\ud800"
OF_OURS = {"base_arm", "seen", "verdict", "change", "finish_reason", "first", "second", "refused"}
VOID = {"meta", "br", "wbr", "input", "img", "link", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; gathers elements, ids, visible text and the script."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.script = self.style = ""
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            setattr(self, self.open[-1], getattr(self, self.open[-1]) + data)
        else:
            self.text += data

    def count(self, tag: str, **attrs: str) -> int:
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in attrs.items()) for t, a in self.elements)

    @property
    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if a.get("id")]  # type: ignore[misc]


def shipped_prompts() -> list[dict[str, Any]]:
    lines = resources.files("sftflow.comparison").joinpath("prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


CHANGES = ("improved", "regressed", "same right", "same wrong", "improved", "same wrong")


def item(i: int, change: str) -> ItemComparison:
    """One graded item; every third reply of the model after had to be cut off."""
    before = float(change in ("regressed", "same right"))
    after = float(change in ("improved", "same right"))

    def row(reply: str, score: float, finish: str) -> EvalRow:
        return EvalRow(
            id=f"item-{i}", question=f"How do you spell pear number {i}?", answer="p e a r", reply=reply, score=score,
            finish_reason=finish, n_prompt=9, n_generated=7, seconds=0.25, prompt_sha256="",
        )  # fmt: skip

    return ItemComparison(
        base=row("pear pear pear", 0.0, "length"),
        base_plain=row(" p e a", before, "stop"),
        sft=row("p e a r" if after else "p e e r", after, "length" if i % 3 == 2 else "stop"),
        change=change,
    )


def task(n: int, base: float, sft: float, half: float, verdict: str, chance: float = 0.0) -> TaskComparison:
    delta = sft - base
    return TaskComparison(
        n=n, chance=chance, base=base, base_chat=base * 0.5, base_plain=base, base_arm="plain", sft=sft, delta=delta,
        ci95=(delta - half, delta + half), base_stderr=0.01, sft_stderr=0.03,
        wilson=Both((max(0.0, base - 0.02), base + 0.03), (sft - 0.06, min(1.0, sft + 0.05))),
        p_value=1e-9 if verdict == "better" else 0.42, p_holm=6e-9 if verdict == "better" else 0.84, detectable=0.094,
        verdict=verdict, metrics=Both({"strict": base / 2}, {"strict": sft - 0.05, "flexible": sft}),
        near_ties=Both(0, 0), too_long=Both(0, 0),
        contamination=Overlap(ngram=13, items=n, contaminated=0, share=0.0, unchecked=n // 4, examples=()),
        max_new_tokens=64, tokens=Both(10, 10), items=tuple(item(i, change) for i, change in enumerate(CHANGES)),
    )  # fmt: skip


HALF = "\\xf0\\x9f"  # half a character, as `Token.text` writes it


def _raw(text: str) -> bytes:
    return b"\xf0\x9f" if text == HALF else text.encode("utf-8")


def token_row() -> TokenRow:
    pieces = [("<|bos|>", 0, 1), ("<|user_start|>", 0, 1), ("Spell", 0, 0), (" pear", 0, 0), (".\n\n", 0, 0)]
    pieces += [("<|user_end|>", 0, 1), ("<|assistant_start|>", 0, 1), ("p", 1, 0), (" e", 1, 0), (" a", 1, 0)]
    pieces += [("\tr", 1, 0), (HALF, 1, 0), ("\u200b", 1, 0), ("<|assistant_end|>", 1, 1)]
    found = (Token(100 + i, t, _raw(t), bool(s), bool(x)) for i, (t, s, x) in enumerate(pieces))
    return TokenRow(source="spelling:12", tokens=tuple(found))


def checks(stop: float, loops: float, counts: list[int], n: int = 200) -> ReplyChecks:
    """n replies of which these shares ended by themselves and repeat themselves."""
    shares = {"stop": stop, "limit": 1 - stop, "looping": loops, "role_leak": 0.03, "self_turn": 0.2}
    replies = {name: tuple(range(round(shares.get(name, 0.0) * n))) for name in ("stop", *FAULTS)}
    return ReplyChecks(
        n=n, replies=replies, distinct=(0.31, 0.62, 0.74), tool_calls={"calls": 12, "well_formed": 11, "answered": 11},
        length={"mean": 31.4, "median": 22, "p90": 64, "max": 96, "edges": [0, 4, 8, 16, 32, 64, 96], "counts": counts},
    )  # fmt: skip


def held_out(words: float, end: float) -> HeldOutLoss:
    return HeldOutLoss(
        rows=98, tokens=900, all=words * 1.02, end_of_turn=end,
        roles={"assistant": words, "user": words + 1, "system": None, "developer": None, "tool": None},
        sources={"spelling": words / 2, "mine": words + 0.3}, skipped={}, first_skipped=None,
    )  # fmt: skip


def judged(ids: list[str], wins: int = 17, losses: int = 12) -> JudgeResult:
    """A judge that leans to the reply it sees first: 71 of 100 single verdicts, and not to the longer one (13 of 25).

    The other pairs are 20 ties, in which it took the first one twice, and two of which one verdict is missing.
    """
    sides: list[tuple[Any, Any]] = [("a", "a")] * wins + [("b", "b")] * losses + [("a", "b")] * 20 + [("a", None)] * 2
    rows = []
    for i, (first, second) in enumerate(sides):
        longer = first if i < 13 else {"a": "b", "b": "a"}[first]
        lengths = {"a": 1, "b": 1} if i >= 25 else {"a": 1 + (longer == "a"), "b": 1 + (longer == "b")}
        pair = ReplyPair(id=ids[i], messages=(), a="x" * lengths["a"], b="x" * lengths["b"])
        rows.append(Verdict(pair=pair, first=first, second=second))
    return JudgeResult(model="some-judge", url="http://127.0.0.1:9/v1", temperature=0.0, rows=tuple(rows))


def run_artifacts() -> RunArtifacts:
    """A run of 600 steps on six sources."""
    steps = list(range(1, 601))
    losses = [0.4 + 3.2 * math.exp(-s / 90) + 0.15 * math.sin(s * 1.7) * math.cos(s * 0.37) for s in steps]
    names = ["spelling", "counting", "arithmetic", "identity", "concepts", "mine"]
    sources = [
        {"name": n, "rows": 4000 // (i + 1), "tokens": 180_000 // (i + 1), "supervised_tokens": 60_000 // (i * i + 1),
         "cut": i, "dropped": 2 * i, "repeat": 1 + i}
        for i, n in enumerate(names)
    ]  # fmt: skip
    return RunArtifacts(
        ledger={"sources": sources, "rows": 9800, "tokens": 441_000, "supervised_tokens": 120_500, "packed_rows": 900,
                "padding_share": 0.013,
                "checkpoint": {"step": 500, "of": 600, "validation_loss": 0.4616, "chosen_by": "validation_loss"}},
        losses=tuple(zip(steps, losses, strict=True)),
        validation=tuple(
            {"step": s, "loss": 0.45 + 3.0 * math.exp(-s / 90), "sources": {}} for s in range(100, 601, 100)
        ),
        sampled=tuple(
            {"step": s, "tasks": {"spelling": s / 600, "counting": s / 900}, "hygiene": {"stop_rate": s / 700}}
            for s in range(50, 601, 50)
        ),
        mask_example=token_row(),
        recipe="base: builtin:tiny\nmixture:\n  - {source: spelling, limit: 4000}\n",
        train_seconds=140.0,
    )  # fmt: skip


def prompt(i: int, row: dict[str, Any]) -> PromptComparison:
    """One shipped prompt: the base rambles and never stops, the SFT model answers and mostly stops."""
    ramble = f"{i} the letters of the words of the letters, and then " * (30 if i % 5 == 0 else 4)
    faults = ("leaked a control token",) if i % 9 == 5 else ()
    expects = tuple(map(tuple, row.get("expects", ())))
    return PromptComparison(
        id=row["id"], kind=row["kind"], messages=tuple(row["messages"]),
        base=PromptReply(text=ramble, finish_reason="length", faults=("looping",), right=False if expects else None),
        base_plain=PromptReply(text="" if i % 7 == 0 else ramble[:200], finish_reason="stop",
                               right=i % 7 == 1 if expects else None),
        sft=PromptReply(text=f"Reply {i}: p-e-a-r\nDone.", finish_reason="length" if i % 9 == 4 else "stop",
                        faults=faults, right=i % 3 > 0 if expects else None),
        expects=expects, seen="whole" if i % 8 == 0 else "last question" if i == 42 else "no",
    )  # fmt: skip


def tasks() -> dict[str, TaskComparison]:
    found = OverlapExample(
        item="arc-7", source="mine", place="mine.jsonl:12", words="which of these is not a planet at all"
    )
    overlap = Overlap(ngram=13, items=120, contaminated=3, share=0.025, unchecked=20, examples=(found,))
    return {
        "spelling": task(200, 0.01, 0.83, 0.05, "better"),
        "counting": task(200, 0.05, 0.61, 0.07, "better"),
        "arithmetic": task(200, 0.02, 0.44, 0.07, "better"),
        "identity": task(40, 0.0, 0.92, 0.06, "better"),
        "arc=data/arc.jsonl": replace(
            task(120, 0.26, 0.24, 0.08, "cannot tell at n=120", chance=0.25),
            near_ties=Both(11, 4),
            contamination=overlap,
        ),
        "format": replace(
            task(60, 0.1, 0.55, 0.12, "better"),
            contamination=NotChecked(not_checked="its items have no text of their own"),
        ),
    }


def demo() -> Comparison:
    """What a run of the tiny base looks like: the base rambles and never stops, the SFT model answers and stops."""
    prompts = tuple(prompt(i, row) for i, row in enumerate(shipped_prompts()))
    return Comparison(
        version="0.1.0", kind="base-versus-SFT", names=Both("builtin:tiny", "runs/demo"), tasks=tasks(),
        centred_mean=Both(0.021, 0.634), prompts=prompts,
        prompts_in_training=seen_counts([p.seen or "no" for p in prompts]), prompt_groups=prompt_groups(prompts),
        prompt_set=PromptSet(name="default", version=3, sha256="ab12" * 16, prompts=()),
        hygiene=Both(checks(0.02, 0.71, [0, 0, 1, 2, 4, 9, 180]), checks(0.93, 0.01, [4, 60, 90, 30, 9, 3, 0])),
        held_out_loss=HeldOutComparison(rows=98, base=held_out(3.1, 9.8), sft=held_out(0.42, 0.003)),
        forgetting=Forgetting(text="the package's own sample", bytes=21_450, base=1.912, sft=1.998),
        settings={"decoding": "greedy", "precision": "fp32", "tokens a task": {"spelling": 64, "arithmetic": 96}},
        fingerprints={"base": "a1" * 32, "sft": "b2" * 32, "code": "c3" * 32, "data": {"spelling": "d4" * 8}},
        judge=judged([p.id for p in prompts]), seconds=60.0, n_parameters=3_400_000,
        cost=Cost(
            replies=2475, read=153_680, generated=84_120, asking_seconds=51.0, train_seconds=140.0, of_training=0.429
        ),
        finished=datetime(2026, 11, 23, 6, 10, tzinfo=UTC), run=run_artifacts(),
    )  # fmt: skip


def with_run(comparison: Comparison, **artifacts: Any) -> Comparison:
    """The same with other artifacts of its run."""
    return replace(comparison, run=replace(comparison.run, **artifacts))


def poisoned(value: Any) -> Any:
    """Every string of the results, keys of free-form maps included, with the hostile text at its end.

    What is one of a few words of ours (an arm, an outcome, how a reply ended) stays.
    """
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, bytes):
        return value + HOSTILE.encode("utf-8", "replace")
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{k: v if k in OF_OURS else poisoned(v) for k, v in own.items()})
    if isinstance(value, list | tuple):
        return type(value)(poisoned(v) for v in value)
    if isinstance(value, dict):
        free = not value.keys() & {"role", "stop", "mean", "calls", "tokens", "step", "all"}  # else our own keys
        return {poisoned(k) if free else k: poisoned(v) for k, v in value.items()}
    return value
