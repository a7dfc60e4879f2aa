"""What a template writes for the first n messages of a row, for many n, without a rendering for each of them.

Most templates go through the messages once, from the first to the last. Such a template, given the first n messages,
does the same as given all of them up to the moment when it asks for message n; then it writes what it ends with. That
moment is found by watching one rendering of all messages, and the ending is known from another n at which the template
had the same state: the values in its namespaces are all that it can carry on.

    watched    B U hi /U │ A yo /A │ U more /U │          a bar where the next message is asked for
    n = 1      B U hi /U + A                              the ending is rendered once, A behind a user's message
    n = 3      B U hi /U A yo /A U more /U + A            the same state, so the same ending

A template that looks ahead (`loop.last`, `messages[-1]`, a first loop over all messages) has seen more than n messages
at that moment; then the first n are rendered for themselves, as they are in short rows.
"""

from __future__ import annotations

from typing import Any

from sftflow.chat.content_parts import Messages
from sftflow.chat.template import Template
from sftflow.chat.watch import State, Watched

MANY = 32  # messages, from which watching is worth while


class Beginnings:
    """The template's texts for the first n messages of one row."""

    def __init__(self, template: Template, messages: Messages, tools: Any) -> None:
        self._template, self._messages, self._tools = template, messages, tools
        self._watched: dict[bool, Watched] = {}
        self._endings: dict[tuple[bool, State], str | None] = {}

    def text(self, n: int, add_generation_prompt: bool, place: str) -> str:
        """As `Template.text` of the first n messages. Raises FormatError as that does."""
        watched = self._watch(add_generation_prompt)
        if n not in watched.at:
            return self._template.text(self._messages[:n], self._tools, add_generation_prompt, place)
        at, state = watched.at[n]
        key, beginning = (add_generation_prompt, state), watched.text[:at]
        if self._endings.get(key) is not None:
            return f"{beginning}{self._endings[key]}"
        text = self._template.text(self._messages[:n], self._tools, add_generation_prompt, place)
        if key not in self._endings:
            alone = self._template.watched(self._messages[:n], self._tools, add_generation_prompt)
            known = alone and alone.is_whole and alone.text == text and text.startswith(beginning)
            self._endings[key] = text[at:] if known else None
        return text

    def _watch(self, add_generation_prompt: bool) -> Watched:
        if add_generation_prompt not in self._watched:
            found = None
            if len(self._messages) >= MANY:
                found = self._template.watched(self._messages, self._tools, add_generation_prompt)
            self._watched[add_generation_prompt] = found or Watched("", {}, False)
        return self._watched[add_generation_prompt]
