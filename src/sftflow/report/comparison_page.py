"""The comparison report: one self-contained HTML page, a pure function of what `compare` measured.

    data (JSON-able, see `render_report`) -> sections of `page/` -> page under a policy that lets nothing load

Model output is hostile text: every string goes through `esc`, and no data is put inside a script.
"""

from __future__ import annotations

from markupsafe import Markup

from sftflow.report.page.items import items
from sftflow.report.page.judge_and_overlap import contamination, judge
from sftflow.report.page.prompts import prompts, weak
from sftflow.report.page.reply_checks import forgetting, held_out, hygiene
from sftflow.report.page.scores import scores
from sftflow.report.page.training import ledger, loss, made, mask
from sftflow.report.page.verdict import verdict
from sftflow.report.pages import esc, render
from sftflow.report.wording import Data, words


def render_report(data: Data) -> str:
    """{"title", "kind", "names", "tasks", "prompts", "hygiene" | None, "ledger" | None, ...} -> the page as a string.

    Sections whose data is missing are left out, with their link. `tests/report_data.py` has a complete example.
    """
    say = words(data)
    built = [
        ("scores", "Scores", scores(data, say)),
        ("weak", "Weak answers", weak(data, say)),
        ("prompts", "Fixed prompts", prompts(data, say)),
        ("items", "Graded items", items(data, say)),
        ("hygiene", "Hygiene of the replies", hygiene(data, say)),
        ("forgetting", "Forgetting", forgetting(data, say)),
        ("held-out", "Held-out loss", held_out(data, say)),
        ("judge", "A judge's view", judge(data, say)),
        ("contamination", "Overlap with training", contamination(data)),
        ("ledger", "What it was trained on", ledger(data)),
        ("mask", "One training conversation", mask(data)),
        ("loss", "Loss", loss(data)),
        ("made", "How it was made", made(data)),
    ]
    kept = [(anchor, name, body) for anchor, name, body in built if body]
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in kept)
    parts = [verdict(data, say), f'<nav aria-label="Sections">{nav}</nav>']
    parts += [f'<section id="{anchor}"><h2>{name}</h2>{body}</section>' for anchor, name, body in kept]
    told = " · ".join(f"{w} {v}" for w, v in (("sftflow", data.get("version")), ("", data.get("generated"))) if v)
    parts.append(f"<footer>{esc(told)}</footer>")
    return render("comparison", name=data.get("title", "sftflow"), body=Markup("\n".join(parts)))
