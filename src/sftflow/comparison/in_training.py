"""Which fixed prompts a model was trained on: looked up by their words in the rows that its run keeps."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, text_message
from sftflow.comparison.prompt_results import Seen
from sftflow.comparison.prompts import FixedPrompt
from sftflow.data.audit.rows import AuditRows
from sftflow.data.run_rows import TrainingRows
from sftflow.foundation.errors import FormatError, SftflowError
from sftflow.tasks.answers import one_writing

PROBES = ("firstquestion", "firstanswer", "secondquestion", "secondanswer")
# What computes or counts: all that stands between two digits, a minus before a number, a percent sign behind one.
_COUNTS = re.compile(r"\d(?:\W+(?=\d)|%)|-(?<!\w-)(?=\s*\d)")
_KEPT = 0xF0000  # of the private use area: punctuation that counts is put there, where it is none


class _Letters(dict[int, str | None]):
    """What becomes of a character: a letter, mark or digit stays; a symbol is a word of its own; an apostrophe and what
    cannot be seen vanish; all other punctuation parts words as a blank does."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        kind = unicodedata.category(character)
        self[code] = character if kind[0] in "LMN" else f" {character} " if kind[0] == "S" or kind == "Co" else " "
        if character == "'" or kind == "Cf":
            self[code] = None
        return self[code]


_LETTERS = _Letters()


def wording(text: str) -> str:
    """A text in which two prompts are compared: its words, without case, punctuation and white space (NFKC).

    Symbols stay (`+`, `=`, `<`, emoji), and so does what computes: a minus before a number, a percent sign behind one,
    and whatever stands between two digits.

    >>> wording("What's  KV-Cache?!") == wording("whats kv cache")
    True
    >>> wording("What is 7 - 2?") == wording("what is 7-2") != wording("What is 7 * 2?")
    True
    """
    caseless = unicodedata.normalize("NFKC", one_writing(text)).casefold()
    return " ".join(_COUNTS.sub(_kept, caseless).translate(_LETTERS).split())


def _kept(found: re.Match[str]) -> str:
    return "".join(chr(_KEPT + ord(c)) if unicodedata.category(c)[0] == "P" else c for c in found[0])


def seen_in_training(prompts: Sequence[FixedPrompt], rows: TrainingRows, renderer: Renderer) -> list[Seen]:
    """For each prompt whether it stands in a run's rows, those that were held out set aside.

    A single question does where any turn of a user has its words (`wording`), whatever comes before that turn. A prompt
    with a history or a system message does where a row begins with all of it; else "last question" says that a user
    turn has the words of its last one. A prompt without any word is found nowhere, and none in plain text, which asks
    nothing.

    Rows are read as the model reads them, as ids. In one that is not in the checkpoint's format (tokens that were made
    elsewhere) a question may stand anywhere.   renderer: of the run's checkpoint. Raises FormatError where the format
    writes nothing around a question by which it could be found.
    """
    lead, behind, prompt_end, glue = _around_a_question(renderer)
    questions: dict[int, str] = {}
    wholes: dict[int, str] = {}
    for number, prompt in enumerate(prompts):
        last = prompt.conversation.messages[-1]
        question = wording(renderer.round_trip(last.text)) if last.role == "user" else ""
        if not question:
            continue
        questions[number] = question
        if len(prompt.conversation.messages) > 1:
            try:
                ids = renderer.render(prompt.conversation, add_generation_prompt=True).ids
            except SftflowError:  # what the format cannot say, no row says
                continue
            words = wording(renderer.decode(ids.tolist())).split()
            wholes[number] = f"\n {' '.join(words[: len(words) - prompt_end])} {behind} "
    found, begun = set[int](), set[int]()
    for texts in _trained_texts(rows, renderer):
        each = [f"\n {wording(text)} " for text in texts]
        lines, foreign = "".join(each), "".join(line for line in each if f" {behind} " not in line)
        begun |= {number for number, words in wholes.items() if words in lines}
        for number in questions.keys() - found:
            question = f" {questions[number]} "
            asked = f"{question}{behind} "
            near = [text for line, text in zip(each, texts, strict=True) if asked in line] if asked in lines else []
            if f" {lead}{asked}" in lines or question in foreign or any(_follows(glue, asked, text) for text in near):
                found.add(number)
    alone = {number for number in found if len(prompts[number].conversation.messages) == 1}
    seen: list[Seen] = []
    for number in range(len(prompts)):
        whole = number in begun or number in alone
        seen.append("whole" if whole else "last question" if number in found else "no")
    return seen


def _trained_texts(rows: TrainingRows, renderer: Renderer) -> Iterator[list[str]]:
    """The texts of the rows that were trained on, control tokens among them, many at once; equal rows once."""
    backend = renderer.tokenizer.backend_tokenizer
    kept = AuditRows(rows.sources, lambda ids: backend.decode_batch(ids, skip_special_tokens=False), {})
    left_out = [held | source.text for held, source in zip(rows.held_out, rows.sources, strict=True)]
    trained = np.flatnonzero(~np.concatenate([np.zeros(0, bool), *left_out]))
    _, once = np.unique(kept.first[trained], return_index=True)
    yield from map(kept.texts, kept.chunks(trained[once]))


def _follows(glue: str, words: str, text: str) -> bool:
    """Whether a text goes on with these words somewhere behind what joins a system message to a question."""
    parts = text.split(glue) if glue else []
    return any(f" {wording(glue.join(parts[i:]))} ".startswith(words) for i in range(1, len(parts)))


def _around_a_question(renderer: Renderer) -> tuple[str, str, int, str]:
    """What the format writes around a user's text: (the words right before it, those right behind it, how many words a
    prompt has behind its last question, the text between a system message and the first question; "" where a format
    has no system messages)."""

    def text(*said: tuple[str, str], asks: bool = False) -> str:
        conversation = Conversation(tuple(text_message(*turn) for turn in said), source="probe")
        return renderer.text(conversation, add_generation_prompt=asks)

    turns = tuple(zip(("user", "assistant") * 2, PROBES, strict=True))
    whole, prompt = wording(text(*turns)).split(), wording(text(turns[0], asks=True)).split()
    try:
        first, answered, second = (whole.index(word) for word in PROBES[:3])
        behind = prompt[prompt.index(PROBES[0]) + 1 :]
    except ValueError:
        raise FormatError(renderer.format.name, "it writes its own words and what is said without a break") from None
    lead = common(whole[:first][::-1], whole[answered + 1 : second][::-1])[::-1]
    follow = common(behind, whole[first + 1 : answered])
    if not lead or not follow:
        raise FormatError(renderer.format.name, "nothing in it tells a question from the turns beside it")
    try:
        glue = text(("system", "guidance"), turns[0]).partition("guidance")[2].partition(PROBES[0])[0]
    except FormatError:
        glue = ""
    return " ".join(lead), " ".join(follow), len(behind), glue


def common(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """
    >>> common("user a", "user b")
    ['u', 's', 'e', 'r', ' ']
    """
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
