"""The audit of a mixture as one page: what is trained on, how long it is, what repeats, what overlaps a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftflow.chat.token_rows import TokenRow
from sftflow.report.charts import row_lengths
from sftflow.report.pages import render
from sftflow.report.token_page import token_boxes


def audit_page(ledger: Mapping[str, Any], samples: Sequence[TokenRow] = ()) -> str:
    """The page of a ledger.json; what only `Audit.into` puts there is left out where it is not there.

    samples: a rendered row of each source.
    """
    sources = ledger["sources"]
    totals = {key: sum(s[key] for s in sources) for key in ("cut", "dropped", "expanded")}
    audited = [s for s in sources if "duplicates" in s]
    return render(
        "audit",
        ledger=ledger,
        all={**totals, "name": "all", "repeat": None},
        repeating=[s for s in audited if s["duplicates"]["examples"] or s["near_duplicates"]["examples"]],
        samples=samples,
        row_lengths=row_lengths,
        token_boxes=token_boxes,
    )
