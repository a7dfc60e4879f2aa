"""A complete example of what `render_report` takes, and a strict reader of the page it makes."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from importlib import resources
from typing import Any

HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp; \u202e\x00\ud800"
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


def item(i: int, change: str) -> dict[str, Any]:
    """One graded item; every third reply of the model after had to be cut off."""
    before = float(change in ("regressed", "same right"))
    after = float(change in ("improved", "same right"))
    return {
        "id": f"item-{i}", "question": f"How do you spell pear number {i}?", "answer": "p e a r",
        "base": "pear pear pear", "base_plain": " p e a", "sft": "p e a r" if after else "p e e r",
        "base_score": 0.0, "base_plain_score": before, "sft_score": after, "base_finish": "length",
        "base_plain_finish": "stop", "sft_finish": "length" if i % 3 == 2 else "stop", "sft_tokens": 7,
        "sft_seconds": 0.25, "change": change,
    }  # fmt: skip


def task(n: int, base: float, sft: float, half: float, verdict: str, chance: float = 0.0) -> dict[str, Any]:
    delta = sft - base
    return {
        "n": n, "chance": chance, "base": base, "base_chat": base * 0.5, "base_plain": base, "base_arm": "plain",
        "sft": sft, "delta": delta, "ci95": [delta - half, delta + half], "base_stderr": 0.01, "sft_stderr": 0.03,
        "wilson": {"base": [max(0.0, base - 0.02), base + 0.03], "sft": [sft - 0.06, min(1.0, sft + 0.05)]},
        "p_value": 1e-9 if verdict == "better" else 0.42, "p_holm": 6e-9 if verdict == "better" else 0.84,
        "detectable": 0.094, "verdict": verdict, "max_new_tokens": 64, "too_long": {"base": 0, "sft": 0},
        "metrics": {"base": {"strict": base / 2}, "sft": {"strict": sft - 0.05, "flexible": sft}},
        "near_ties": {"base": 0, "sft": 0},
        "contamination": {"ngram": 13, "contaminated": 0, "share": 0.0, "unchecked": n // 4, "items": n,
                          "examples": []},
        "rows": [item(i, change) for i, change in enumerate(CHANGES)],
    }  # fmt: skip


def tokens() -> list[dict[str, Any]]:
    pieces = [("<|bos|>", 0, 1), ("<|user_start|>", 0, 1), ("Spell", 0, 0), (" pear", 0, 0), (".\n\n", 0, 0)]
    pieces += [("<|user_end|>", 0, 1), ("<|assistant_start|>", 0, 1), ("p", 1, 0), (" e", 1, 0), (" a", 1, 0)]
    pieces += [("\tr", 1, 0), ("\ufffd", 1, 0), ("\u200b", 1, 0), ("<|assistant_end|>", 1, 1)]
    return [{"text": t, "id": 100 + i, "supervised": bool(s), "special": bool(x)} for i, (t, s, x) in enumerate(pieces)]


def manners(stops: float, looping: float, counts: list[int]) -> dict[str, Any]:
    """One model's hygiene over 196 replies."""
    return {
        "n": 196, "stop_rate": stops, "limit_rate": 1 - stops, "empty_rate": 0.0, "role_leak_rate": 0.031,
        "self_turn_rate": 0.2, "looping_rate": looping, "distinct_1": 0.31, "distinct_2": 0.62, "distinct_3": 0.74,
        "invalid_utf8_rate": 0.0, "tool_calls": {"calls": 12, "well_formed": 11, "answered": 11},
        "length": {"mean": 31.4, "median": 22, "p90": 64, "max": 96, "edges": [0, 4, 8, 16, 32, 64, 96],
                   "counts": counts},
    }  # fmt: skip


def held_out(words: float, end: float) -> dict[str, Any]:
    return {
        "all": words * 1.02, "end_of_turn": end, "skipped": {},
        "roles": {"assistant": words, "user": words + 1, "system": None, "developer": None, "tool": None},
        "sources": {"spelling": words / 2, "mine": words + 0.3},
    }  # fmt: skip


def judged(ids: list[str]) -> dict[str, Any]:
    """A judge that leans to the reply it sees first."""
    kinds = [("a", "a", "a"), ("tie", "a", "b"), ("b", "b", "b"), (None, "a", None), ("a", "a", "a")]
    rows = [dict(zip(("verdict", "first_order", "second_order"), kinds[i % 5], strict=True)) for i in range(len(ids))]
    return {
        "model": "some-judge", "url": "http://127.0.0.1:9/v1", "n": 40, "wins": 20, "losses": 10, "ties": 10,
        "disagreements": 10, "parse_failures": 10, "first_share": 0.71, "length_effect": 0.52, "win_rate": 0.625,
        "ci95": [0.47, 0.76], "rows": [{"id": i} | row for i, row in zip(ids, rows, strict=True)],
    }  # fmt: skip


def demo() -> dict[str, Any]:
    """What a run of the tiny base looks like: the base rambles and never stops, the SFT model answers and stops."""
    prompts = []
    for i, p in enumerate(shipped_prompts()):
        ramble = f"{i} the letters of the words of the letters, and then " * (30 if i % 5 == 0 else 4)
        prompts.append(
            p | {"base": ramble, "base_plain": "" if i % 7 == 0 else ramble[:200], "sft": f"Reply {i}: p-e-a-r\nDone.",
                 "base_finish": "length", "base_plain_finish": "stop", "sft_finish": "length" if i % 9 == 4 else "stop",
                 "hygiene": {"base": ["looping"], "sft": ["leaked a control token"] if i % 9 == 5 else []}}
        )  # fmt: skip
    steps = list(range(1, 601))
    curve = [0.4 + 3.2 * math.exp(-s / 90) + 0.15 * math.sin(s * 1.7) * math.cos(s * 0.37) for s in steps]
    tasks = {
        "spelling": task(200, 0.01, 0.83, 0.05, "better"),
        "counting": task(200, 0.05, 0.61, 0.07, "better"),
        "arithmetic": task(200, 0.02, 0.44, 0.07, "better"),
        "identity": task(40, 0.0, 0.92, 0.06, "better"),
        "arc=data/arc.jsonl": task(120, 0.26, 0.24, 0.08, "cannot tell at n=120", chance=0.25),
        "format": task(60, 0.1, 0.55, 0.12, "better"),
    }
    found = {
        "item": "arc-7",
        "source": "mine",
        "place": "mine.jsonl:12",
        "words": "which of these is not a planet at all",
    }
    tasks["arc=data/arc.jsonl"] |= {
        "near_ties": {"base": 11, "sft": 4},
        "contamination": {"ngram": 13, "contaminated": 3, "share": 0.025, "unchecked": 20, "items": 120,
                          "examples": [found]},
    }  # fmt: skip
    tasks["format"]["contamination"] = {"not_checked": "its items have no text of their own"}
    tasks["spelling"]["rows_left_out"] = 194
    names = ["spelling", "counting", "arithmetic", "identity", "concepts", "mine"]
    sources = [
        {"name": n, "rows": 4000 // (i + 1), "tokens": 180_000 // (i + 1), "supervised_tokens": 60_000 // (i * i + 1),
         "cut": i, "dropped": 2 * i, "repeat": 1 + i}
        for i, n in enumerate(names)
    ]  # fmt: skip
    return {
        "title": "runs/demo", "kind": "base-versus-SFT", "names": {"base": "builtin:tiny", "sft": "runs/demo"},
        "parameters": 3_400_000, "tasks": tasks, "centred_mean": {"base": 0.021, "sft": 0.634}, "prompts": prompts,
        "prompt_set": {"name": "default", "version": 2, "sha256": "ab12" * 16},
        "ledger": {"sources": sources, "rows": 9800, "tokens": 441_000, "supervised_tokens": 120_500,
                   "packed_rows": 900, "padding_share": 0.013},
        "loss": {"step": steps, "loss": curve,
                 "validation": [{"step": s, "loss": 0.45 + 3.0 * math.exp(-s / 90)} for s in range(100, 601, 100)]},
        "hygiene": {"base": manners(0.02, 0.71, [0, 0, 1, 2, 4, 9, 180]),
                    "sft": manners(0.93, 0.01, [4, 60, 90, 30, 9, 3, 0])},
        "held_out_loss": {"rows": 98, "base": held_out(3.1, 9.8), "sft": held_out(0.42, 0.003)},
        "forgetting": {"text": "the package's own sample", "bytes": 21_450, "base": 1.912, "sft": 1.998},
        "curves": [
            {"step": s, "tasks": {"spelling": s / 600, "counting": s / 900}, "hygiene": {"stop_rate": s / 700}}
            for s in range(50, 601, 50)
        ],
        "judge": judged([p["id"] for p in prompts]),
        "mask_example": {"source": "spelling:12", "tokens": tokens()}, "weak": ["kv-cache"],
        "recipe_yaml": "base: builtin:tiny\nmixture:\n  - {source: spelling, limit: 4000}\n",
        "settings": {"decoding": "greedy", "precision": "fp32", "tokens a task": {"spelling": 64, "arithmetic": 96}},
        "fingerprints": {"base": "a1" * 32, "sft": "b2" * 32, "code": "c3" * 32, "data": {"spelling": "d4" * 8}},
        "generated": "2026-11-23 06:10 UTC", "version": "0.1.0", "seconds": {"train": 140.0, "compare": 60.0},
    }  # fmt: skip


def poisoned(value: Any) -> Any:
    """Every string of the data, keys of free-form maps included, with the hostile text at its end."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return {k: poisoned(v) for k, v in value.items()} if isinstance(value, dict) else value
