"""What the fixed prompts found, as values: each with its replies, and what all of them say together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sftflow.evaluation.options import Arm
from sftflow.evaluation.statistics import paired_interval, task_p_value, verdict
from sftflow.generation.request import Reply

Seen = Literal["whole", "last question", "no"]
"""what of a prompt stands in the training rows (`in_training`)"""


@dataclass(frozen=True, kw_only=True)
class PromptReply:
    """A reply to a fixed prompt.

    finish_reason: 'stop', 'length', or 'error' where the model could not be asked; then `text` says why and `reply` is
    None.   faults: what the reply checks have against its form, in words.   right: whether it gives the answer that the
    prompt expects; None where it expects none.
    """

    text: str
    finish_reason: str
    reply: Reply | None = None
    faults: tuple[str, ...] = ()
    right: bool | None = None

    @property
    def healthy(self) -> bool:
        """It ended by itself, and the reply checks have nothing against its form."""
        return self.finish_reason == "stop" and not self.faults


@dataclass(frozen=True, kw_only=True)
class PromptComparison:
    """One fixed prompt and its three replies.

    messages: [{"role", "content"}, ...]   expects: the answer, as `FixedPrompt` has it.   seen: what of it stands in
    the rows that the SFT model was trained on; None where that is not known.
    """

    id: str
    kind: str
    messages: Sequence[Mapping[str, str]]
    base: PromptReply
    base_plain: PromptReply
    sft: PromptReply
    expects: Sequence[Sequence[str]] = ()
    seen: Seen | None = None

    @property
    def asked(self) -> str:
        """What the user said last."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), self.id)

    @property
    def in_training(self) -> bool | None:
        """Whether it stands in the training rows: a single question anywhere, a conversation from its beginning on."""
        return None if self.seen is None else self.seen == "whole"

    @property
    def last_question_in_training(self) -> bool | None:
        return None if self.seen is None else self.seen != "no"

    @property
    def asked_of_both(self) -> bool:
        return "error" not in (self.base.finish_reason, self.base_plain.finish_reason, self.sft.finish_reason)

    def to_json(self) -> dict[str, Any]:
        replies = {"base": self.base, "base_plain": self.base_plain, "sft": self.sft}
        graded = {"expects": self.expects, "right": {key: reply.right for key, reply in replies.items()}}
        return {
            "id": self.id,
            "kind": self.kind,
            "messages": self.messages,
            "in_training": self.in_training,
            "last_question_in_training": self.last_question_in_training,
            **{key: reply.text for key, reply in replies.items()},
            **{f"{key}_finish": reply.finish_reason for key, reply in replies.items()},
            "hygiene": {"base": self.base.faults, "sft": self.sft.faults},
            **(graded if self.expects else {}),
        }


# ---- of all prompts together


@dataclass(frozen=True, kw_only=True)
class PairedShare:
    """A share of n prompts before and after.   base_arm: how the base was asked.   ci95, verdict: as for tasks; nothing
    is adjusted for the number of groups."""

    n: int
    base: float
    base_arm: Arm
    sft: float
    delta: float
    ci95: tuple[float, float]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """Some of the fixed prompts: those that both models could be asked.

    healthy: replies without a fault of form, in the chat format.   right: right answers to those that expect one, the
    base in its better arm over all prompts.
    """

    healthy: PairedShare
    right: PairedShare | None


GROUPS: Mapping[str, Seen | None] = {
    "all": None,
    "in_training": "whole",
    "only_last_question": "last question",
    "not_in_training": "no",
}


def seen_counts(seen: Sequence[Seen]) -> dict[str, int]:
    """
    >>> seen_counts(["no", "whole", "no"])
    {'all': 3, 'in_training': 1, 'only_last_question': 0, 'not_in_training': 2}
    """
    return {name: len(seen) if one is None else seen.count(one) for name, one in GROUPS.items()}


def prompt_groups(prompts: Sequence[PromptComparison]) -> dict[str, PromptGroup]:
    """All fixed prompts, and those that do and do not stand in the training rows where that is known; a group without
    prompts is left out."""
    asked = [p for p in prompts if p.asked_of_both]
    expecting = [p for p in asked if p.expects]
    plain = sum(bool(p.base_plain.right) for p in expecting) > sum(bool(p.base.right) for p in expecting)
    groups = {}
    for name, seen in GROUPS.items():
        some = [p for p in asked if seen is None or p.seen == seen]
        graded = [p for p in some if p.expects]
        if some:
            groups[name] = PromptGroup(
                healthy=_share([p.base for p in some], [p.sft for p in some], "chat", lambda r: r.healthy),
                right=_share(
                    [p.base_plain if plain else p.base for p in graded],
                    [p.sft for p in graded],
                    "plain" if plain else "chat",
                    lambda r: bool(r.right),
                )
                if graded
                else None,
            )
    return groups


def _share(
    before: Sequence[PromptReply], after: Sequence[PromptReply], arm: Arm, holds: Callable[[PromptReply], bool]
) -> PairedShare:
    base, sft = [float(holds(r)) for r in before], [float(holds(r)) for r in after]
    n = len(base)
    interval = paired_interval(base, sft)
    return PairedShare(
        n=n,
        base=sum(base) / n,
        base_arm=arm,
        sft=sum(sft) / n,
        delta=(sum(sft) - sum(base)) / n,
        ci95=interval,
        verdict=verdict(interval, n, task_p_value(base, sft)),
    )
