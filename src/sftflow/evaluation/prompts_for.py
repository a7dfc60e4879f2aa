"""The prompts of a task's items, in the model's chat format or as plain text, and multiple choice by probability: which
tokens a letter is, where it stands behind the prompt, and how likely it is.

    "... Answer:" + " A"     GPT-2's tokens: ... "Answer" ":" | " A"               one token tells the letters apart
                             where a space is a token of its own: ... ":" " " | "A"      the space belongs to the prompt
    Qwen3's assistant turn:  <|im_start|>assistant \\n <think> \\n\\n </think> \\n\\n | A  <|im_end|>

What all of an item's letters begin with stands before the bar and is given to the model with the prompt: the template's
empty think block, too. What all of them end with (the end of turn) is not looked at. In between there is mostly one
token each; where there are more, a letter's probability is the product over them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, text_message
from sftflow.chat.template_options import append_eos, choose_arguments, set_thinking
from sftflow.checkpoint import Assistant
from sftflow.evaluation.options import Arm, EvalTask
from sftflow.evaluation.shots import Shots, as_text, as_turns
from sftflow.foundation.errors import FormatError, MaskError, TaskError
from sftflow.foundation.sequences import common_prefix
from sftflow.generation.engine import Engine
from sftflow.tasks import Item

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ItemPrompt:
    """What the model is given. letters: for each choice of the item, the tokens that tell it from the others; {} where
    the reply is free text."""

    ids: Ids
    letters: dict[str, Ids]


def prompts_for(assistant: Assistant, task: EvalTask, arm: Arm) -> list[ItemPrompt]:
    """What the model is given for each item. Raises TaskError where the task cannot be asked in this format."""
    if task.by_letter and arm == "chat":
        return chat_letters(assistant.renderer, task.items, task.name, task.shots)
    if task.by_letter:
        return plain_letters(assistant.plain_ids, task.items, task.name, task.shots)
    pairs = _with_shots(task.items, task.shots)
    if arm == "chat":
        ids = [chat_prompt(assistant.renderer, item, shots) for item, shots in pairs]
    else:
        ids = [assistant.plain_ids(as_text(shots, item.plain)) for item, shots in pairs]
    return [ItemPrompt(ids=prompt, letters={}) for prompt in ids]


def _with_shots(items: Sequence[Item], shots: Sequence[Shots]) -> Iterator[tuple[Item, Shots]]:
    return zip(items, shots or [()] * len(items), strict=True)


def in_mode(assistant: Assistant, task: EvalTask) -> Assistant:
    """The assistant whose chat template asks for thoughts, or for none, as the task is to be asked. Raises FormatError
    where it has no such argument."""
    if task.how.thinking is None:
        return assistant
    return replace(assistant, renderer=set_thinking(assistant.renderer, on=task.how.thinking))


def require_askable(renderer: Renderer, tasks: Sequence[EvalTask]) -> None:
    """Raises TaskError or FormatError where a task cannot be asked so in this format: before minutes are spent."""
    for task in tasks:
        on = task.how.thinking
        asked = renderer if on is None else set_thinking(renderer, on=on)
        if task.by_letter:
            chat_letters(asked, task.items[:1], task.name)


def chat_prompt(renderer: Renderer, item: Item, shots: Shots = ()) -> Ids:
    """The item's prompt ids in a chat format."""
    messages = as_turns(shots, item.messages)
    rendered = renderer.render(Conversation(messages, source=item.id), add_generation_prompt=True)
    return tuple(rendered.ids.tolist())


def chat_letters(renderer: Renderer, items: Sequence[Item], task: str, shots: Sequence[Shots] = ()) -> list[ItemPrompt]:
    """The prompt of each multiple-choice item in a chat format. Raises TaskError where a bare letter is no reply in it,
    or where the tokenizer does not tell the letters apart."""
    try:
        # The template arguments under which a letter alone is a reply: where the prompt opens a think block, those that
        # close it. A format need not end its turns to be asked this.
        renderer = choose_arguments(append_eos(renderer), [_exchange("A")])
        renderer.render(_exchange("A"))
    except (MaskError, FormatError) as error:
        fact = f"in this chat format a letter alone is no reply ({error.fact})"
        raise TaskError(task, fact, "leave this task out") from None
    replies: dict[str, Ids] = {}
    for letter in sorted({c for i in items for c in i.choices}):
        # A reply is encoded apart from its prompt, so that its tokens are the same behind every one.
        rendered = renderer.render(_exchange(letter))
        replies[letter] = tuple(rendered.ids[rendered.mask == 1].tolist())
    pairs = _with_shots(items, shots)
    return [_split(chat_prompt(renderer, item, s), {c: replies[c] for c in item.choices}, task) for item, s in pairs]


def plain_letters(
    encode: Callable[[str], Ids], items: Sequence[Item], task: str, shots: Sequence[Shots] = ()
) -> list[ItemPrompt]:
    """The same as plain text. Each letter is encoded with its whole prompt: a token may straddle the two."""
    texts = [(as_text(s, item.plain), item.choices) for item, s in _with_shots(items, shots)]
    return [_split((), {c: encode(f"{text} {c}") for c in choices}, task) for text, choices in texts]


def _exchange(letter: str) -> Conversation:
    return Conversation((text_message("user", "?"), text_message("assistant", letter)))


def _split(prompt: Ids, replies: dict[str, Ids], task: str) -> ItemPrompt:
    """Replies -> what all of them begin with joins the prompt; what all of them end with is left out.

    (7), {A: (1, 5, 2), B: (1, 6, 2)}  ->  ids (7, 1), letters {A: (5,), B: (6,)}
    """
    shared = _beginning(list(replies.values()))
    rest = {letter: ids[shared:] for letter, ids in replies.items()}
    ending = min(_beginning([ids[::-1] for ids in rest.values()]), min(len(ids) for ids in rest.values()) - 1)
    letters = {letter: ids[: len(ids) - max(0, ending)] for letter, ids in rest.items()}
    ways = list(letters.values())
    if any(a == b[: len(a)] for i, a in enumerate(ways) for j, b in enumerate(ways) if i != j):
        raise TaskError(task, "the tokenizer does not tell the choice letters apart", "use a free-text task")
    first = next(iter(replies.values()))
    return ItemPrompt(ids=(*prompt, *first[:shared]), letters=letters)


def _beginning(rows: Sequence[Ids]) -> int:
    """How many ids all rows have in common at their beginning."""
    return min(common_prefix(rows[0], row) for row in rows)


def letter_scores(engine: Engine, prompts: Sequence[ItemPrompt]) -> Iterator[tuple[int, dict[str, float]]]:
    """(number of a prompt, {letter: log-probability}), as they are known."""
    asked: list[Ids] = []  # a prompt, and behind it the tokens of a letter but the last
    options: list[list[int]] = []
    owner: list[int] = []
    for i, prompt in enumerate(prompts):
        for before, following in _branches(list(prompt.letters.values())).items():
            asked.append((*prompt.ids, *before))
            options.append(following)
            owner.append(i)
    open_ = Counter(owner)
    known: list[dict[Ids, float]] = [{} for _ in prompts]
    for k, scores in engine.choice_scores(asked, options):
        i = owner[k]
        before = asked[k][len(prompts[i].ids) :]
        known[i].update({(*before, token): score for token, score in zip(options[k], scores, strict=True)})
        open_[i] -= 1
        if not open_[i]:
            letters = prompts[i].letters.items()
            yield i, {c: sum(known[i][ids[: n + 1]] for n in range(len(ids))) for c, ids in letters}


def _branches(replies: Sequence[Ids]) -> dict[Ids, list[int]]:
    """Each beginning of a reply, with the tokens that follow it.

    >>> _branches([(5,), (6,), (7, 8)])
    {(): [5, 6, 7], (7,): [8]}
    """
    out: dict[Ids, list[int]] = {}
    for ids in replies:
        for n, token in enumerate(ids):
            following = out.setdefault(ids[:n], [])
            if token not in following:
                following.append(token)
    return out
