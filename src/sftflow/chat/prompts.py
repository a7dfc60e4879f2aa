"""The template's prompts for the turns of one row, each rendered once."""

from __future__ import annotations

from collections.abc import Collection

from sftflow.chat.beginnings import Beginnings
from sftflow.chat.proof.prover import UNASKED, Proof, Prover
from sftflow.chat.template import Row, Template
from sftflow.foundation.errors import FormatError, MaskError


class Prompts:
    """What the template writes for the first n messages of a row and the reply that follows them.

    Weights do not matter to a template, so all conversations that the row begins with share them.
    """

    def __init__(self, template: Template, row: Row) -> None:
        self._template, self.row = template, row
        self._beginnings = Beginnings(template, row.messages, row.tools)
        self._known: dict[int, str | FormatError] = {}

    def before(self, turn: int) -> str:
        """The prompt for turn number `turn`. Raises FormatError where the template gives none."""
        if turn not in self._known:
            row = self.row
            place = f"{row.source}.messages[{turn}]" if turn < len(row.messages) else row.source
            try:
                self._known[turn] = self._beginnings.text(turn, True, place)
            except FormatError as error:
                self._known[turn] = error
        found = self._known[turn]
        if isinstance(found, FormatError):
            raise found
        return found

    def proof_behind_block(self, row: Row, text: str, prover: Prover) -> Proof | None:
        """The proof of a row whose last reply stands behind all of its prompt, though that ends with an opened and
        closed block (of no thoughts) which the template writes before no reply; None where it is not so, and the row
        is proven in the usual way, or refused."""
        try:
            prompt = self.before(len(row.messages) - 1)
            return None if text.startswith(prompt) else prover.behind(prover.prove(row, text), prompt)
        except (FormatError, MaskError):
            return None

    def reply_starts(self, row: Row, text: str, supervised: Collection[int]) -> dict[int, int]:
        """For each assistant turn of the row, the character at which its reply begins. A turn whose prompt is not a
        prefix of the text is left out where nothing is supervised there, and refused where it is."""
        name, starts = self._template.format.name, {}
        for turn, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            place = f"{row.source}.messages[{turn}]"
            prompt, fact, refused = None, "", ""
            try:
                prompt = self.before(turn)
            except FormatError as error:
                fact, refused = f"the format gives no prompt for this reply ({error.fact})", error.remedy
            if prompt is not None and text.startswith(prompt):
                starts[turn] = len(prompt)
            elif turn in supervised and turn == 0:
                raise MaskError(place, *UNASKED)
            elif turn in supervised:
                other = f"the {name} format's prompt for this reply is not a prefix of the training text"
                remedy = "the template rewrites history or pre-fills the reply; use another format or drop_prefill"
                raise MaskError(place, fact or other, refused if fact else remedy)
        return starts
