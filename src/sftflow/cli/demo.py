"""`sftflow demo`"""

from __future__ import annotations

from pathlib import Path

from sftflow.cli.common import Out, app
from sftflow.cli.train import finish, stopping


@app.command()
def demo(out: Out = Path("runs/demo")) -> None:
    """The whole flow on the shipped base: SFT, comparison, report."""
    with stopping(out):
        from sftflow import api

        finish(api.demo(out))
