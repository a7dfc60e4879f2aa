"""The Python door: what the verbs of `import sftflow as sf` do, and the small objects that they return.

    load    -> Assistant     a model that renders, talks and scores            assistant.py
    read    -> Rows          conversations from a file or from memory          rows.py
    task    -> a source of the mixture                                         rows.py
    render  -> Rendering     what the model sees, token by token               rows.py
    mix     -> Mixture       what is trained on, accounted for                 mixture.py
    train   -> Run           the run directory, its losses, its assistant      run.py
    evaluate, compare -> Evaluation, Comparison, with intervals                measure.py
    ask, diff -> Replies, WeightChange, side by side                           side_by_side.py
    serve, export                                                              publish.py

What only the command line offers stands here, too: demo, pretrain, audit, prepare_part, talk, doctor.

Each object is the stage's own result in a subclass that prints as text and draws itself in a notebook. The command line
calls the same functions. Arguments have the recipe's names, and every error is the line that the command line prints,
as an exception (`SftflowError`).
"""

from __future__ import annotations

from sftflow.api.assistant import Assistant, load
from sftflow.api.doctor import doctor
from sftflow.api.measure import BarMissed, Comparison, Evaluation, compare, evaluate
from sftflow.api.mixture import Audit, Mixture, audit, mix, prepare_part
from sftflow.api.publish import ask_rows, export, serve, talk
from sftflow.api.rows import Rendering, Rows, read, render, task
from sftflow.api.run import Run, demo, pretrain, train
from sftflow.api.side_by_side import Replies, WeightChange, ask, diff

__all__ = [
    "Assistant",
    "Audit",
    "BarMissed",
    "Comparison",
    "Evaluation",
    "Mixture",
    "Rendering",
    "Replies",
    "Rows",
    "Run",
    "WeightChange",
    "ask",
    "ask_rows",
    "audit",
    "compare",
    "demo",
    "diff",
    "doctor",
    "evaluate",
    "export",
    "load",
    "mix",
    "prepare_part",
    "pretrain",
    "read",
    "render",
    "serve",
    "talk",
    "task",
    "train",
]
