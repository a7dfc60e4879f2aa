"""Conversations as they are: SmolTalk, or any set in a known dialect, from a file or the hub. For training only."""

from __future__ import annotations

from sftflow.chat.schema import Conversation, parse_row
from sftflow.tasks.task import Task, rows_of, sample


class SmolTalk(Task):
    """Rows of any dialect `parse_row` knows; the row itself is the training conversation."""

    name = "smoltalk"

    def conversations(self, split: str = "train") -> list[Conversation]:
        return sample(self, (parse_row(row, place) for place, row in rows_of(self, split)))
