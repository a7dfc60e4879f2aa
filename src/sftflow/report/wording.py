"""How the comparison report says things: what the models are called, a reply's faults, the headline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sftflow.comparison.lineage import BASE_AND_SFT
from sftflow.comparison.prompt_results import PairedShare, PromptComparison, PromptReply
from sftflow.comparison.results import FORGOT, Comparison, Forgetting, NotChecked
from sftflow.report.figures import percent, plural, whole_percent

ASSISTANT_AT = 0.2
"""Better than before is not yet an assistant: below a fifth of the way from guessing to perfect we do not say "yes"."""
UNSTOPPED = "did not stop"
UNASKED = "did not fit the context"


class ModelNames(NamedTuple):
    """What the two models are called in a sentence, and at the head of a column."""

    before: str
    after: str
    Before: str
    After: str


def model_names(comparison: Comparison) -> ModelNames:
    """A start that was already instruction-tuned is no base; of two that no training connects, neither is before."""
    if not comparison.trained:
        return ModelNames("first", "second", "First", "Second")
    if comparison.continued:
        return ModelNames("before", "after", "Before", "After")
    return ModelNames("base", "SFT", "Base", "SFT")


# ---- the whole in a sentence


def headline(comparison: Comparison) -> str:
    outcomes = [t.outcome for t in comparison.tasks.values()]
    better, worse, n = outcomes.count("better"), outcomes.count("worse"), len(outcomes)
    if not n:
        return prompts_headline(comparison)
    if not comparison.trained and better + worse:
        return f"The second is better than the first on {better} of {n} tasks, and worse on {worse}."
    if worse > better:
        return f"No: it got worse on {worse} of {n} tasks."
    if not better:
        return (
            f"Cannot tell: no task {'changed' if comparison.trained else 'differs'} by more than chance would explain."
        )
    if worse:
        return f"Mixed: better on {better} of {n} tasks, worse on {worse}."
    if 2 * better <= n:
        return f"Partly: better on {better} of {n} tasks; on the rest we cannot tell."
    if comparison.continued:
        return "Yes: it got better on the tasks measured."
    level = comparison.centred_mean.sft
    if level is not None and level < ASSISTANT_AT:
        return "Partly: better than the base, but still close to guessing."
    prompts = comparison.prompts
    if 2 * sum(p.sft.finish_reason == "stop" for p in prompts) < len(prompts):
        return "Partly: better scores, but it rarely ends its replies."
    return "Yes: the base became an assistant on the tasks measured."


def prompts_headline(comparison: Comparison) -> str:
    """Of a comparison without tasks: by the fixed prompts that training has not seen, where that is known."""
    name = "not_in_training" if "not_in_training" in comparison.prompt_groups else "all"
    if name not in comparison.prompt_groups:
        return "No task was asked, and no prompt could be: nothing tells the two apart."
    which = "On the fixed prompts" if name == "all" else "On fixed prompts that are not in the training rows"
    group = comparison.prompt_groups[name]
    said = [
        f"{what} {whole_percent(s.base)} → {whole_percent(s.sft)} ({s.verdict})"
        for what, s in (("healthy replies", group.healthy), ("right answers", group.right))
        if s is not None
    ]
    return f"No task was asked. {which}: {', '.join(said)}."


def plain_text_change(forgetting: Forgetting, trained: bool = True) -> str:
    """trained: whether the one was trained from the other.

    >>> plain_text_change(Forgetting(text="t", bytes=9, base=2.0, sft=2.1))
    'it forgot: 5.0% worse on plain text'
    """
    change = forgetting.change or 0.0
    if abs(change) <= FORGOT:
        alike = "it kept its plain text" if trained else "both read plain text alike"
        return f"{alike}: {percent(change, '+')}%, within {percent(FORGOT)}%"
    figure = f"{percent(abs(change))}% {'worse' if change > 0 else 'better'} on plain text"
    if not trained:
        return f"the second is {figure} than the first"
    return f"it forgot{'' if change > 0 else ' nothing'}: {figure}"


def kept_step(kept: Mapping[str, Any]) -> str:
    """Which step a run's checkpoint is of.   kept: `checkpoint` of ledger.json.

    >>> kept_step({"step": 180, "of": 200, "validation_loss": 1.2345, "chosen_by": "validation_loss"})
    'step 180 of 200, of the lowest held-out loss (1.234)'
    """
    step = f"step {kept['step']:,} of {kept['of']:,}"
    if kept["chosen_by"] == "validation_loss" and kept["validation_loss"] is None:
        return f"{step}, whose held-out loss is not finite"
    if kept["chosen_by"] == "validation_loss":
        return f"{step}, of the lowest held-out loss ({kept['validation_loss']:.3f})"
    return f"{step}, the last{'' if kept['step'] == kept['of'] else ' that could be saved'}"


# ---- replies to the fixed prompts

GROUP_NAMES = {
    "all": "all",
    "in_training": "in the training rows",
    "only_last_question": "only the last question",
    "not_in_training": "not in the training rows",
}


def told_prompts(comparison: Comparison) -> str:
    """How many fixed prompts stand in the training rows, and what is left of the gain on the others."""
    counts, names = comparison.prompts_in_training, model_names(comparison)
    if isinstance(counts, NotChecked):
        return f"It is not known which of them stand in the training rows: {counts.not_checked}."
    text = f"{counts['in_training']} of the {plural(counts['all'], 'prompt')} stand in the training rows"
    if counts["only_last_question"]:
        text += f"; of {counts['only_last_question']} more, only the last question does"
    group = comparison.prompt_groups.get("not_in_training")
    if group is None:
        return f"{text}."
    said = [f"On the {group.healthy.n} others: healthy replies {_before_and_after(names, group.healthy)}."]
    if group.right is not None:
        graded = plural(group.right.n, "answer")
        said.append(f"Right, of the {graded} that can be checked: {_before_and_after(names, group.right)}.")
    return f"{text}. {' '.join(said)}"


def _before_and_after(names: ModelNames, share: PairedShare) -> str:
    return f"{names.before} {round(share.base * share.n)}, {names.after} {round(share.sft * share.n)} ({share.verdict})"


def shown_base(comparison: Comparison, prompt: PromptComparison) -> PromptReply:
    """The base's reply that is fair to set beside the other: one without a format of its own is asked in plain text."""
    return prompt.base_plain if comparison.kind == BASE_AND_SFT else prompt.base


def ending_faults(finish_reason: str) -> list[str]:
    """What is wrong with how a reply ended, where something is."""
    return {"length": [UNSTOPPED], "too_long": [UNASKED]}.get(finish_reason, [])


def faults_of(reply: PromptReply) -> list[str]:
    """What is wrong with the form of a reply, and whether it had to be cut off."""
    return list(dict.fromkeys([*ending_faults(reply.finish_reason), *reply.faults]))


def score_of(reply: PromptReply) -> int | None:
    """1 for the right answer, 0 for another one; None where nothing grades it."""
    return None if reply.right is None else int(reply.right)


def form_change(prompt: PromptComparison) -> str:
    """'improved' where the reply has lost a fault and gained none, 'regressed' where it has a new one, else ''."""
    before, after = set(faults_of(prompt.base)), set(faults_of(prompt.sft))
    return "regressed" if after - before else "improved" if before - after else ""
