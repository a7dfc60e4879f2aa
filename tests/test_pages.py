"""What all pages and a notebook's cells share: escaping, strictness, styles that stay in their cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from rich.text import Text

from helpers.chromium import dom_of, needs_chromium
from helpers.report_data import HOSTILE, Page
from sftflow.chat.token_rows import Token, TokenRow
from sftflow.evaluation.results import EvalResult, Evaluation, ModelScores
from sftflow.report import pages, tables
from sftflow.report.token_page import token_html
from sftflow.report.token_view import TerminalRow

ROW = TokenRow(HOSTILE, (Token(1, "<hi>", b"<hi>", False), Token(2, "yo", b"yo", True)), turns=((0, HOSTILE),))


def written(source: str, **values: object) -> str:
    return pages.environment().from_string(source).render(values)


def test_what_is_written_is_escaped_and_an_unknown_name_is_an_error() -> None:
    assert written("{{ a }}", a=HOSTILE) == str(pages.esc(HOSTILE))
    assert (
        written("<i title='{{ a }}'>", a="'\x07<") == "<i title='&#39;\ufffd&lt;'>" and written("{{ a }}", a=None) == ""
    )
    assert written("{{ a }}", a=Markup("<b>")) == "<b>" and written("{{ a | plural('row') }}", a=2) == "2 rows"
    for source in ("{{ missing }}", "{{ a.missing }}", "{% if missing %}{% endif %}"):
        with pytest.raises(UndefinedError):
            written(source, a={})


def test_every_template_is_sound() -> None:
    names = pages.environment().list_templates()
    assert "base.html.jinja" in names
    for name in names:
        pages.environment().get_template(name)


def test_a_cell_and_a_frame_hold_nothing_that_acts() -> None:
    cell = Page(token_html([ROW, TokenRow(HOSTILE, refused=HOSTILE)]))
    assert not {"script", "img", "link"} & {tag for tag, _ in cell.elements} and "Refused: </script>" in cell.text
    assert (cell.count("p"), Page(token_html([ROW])).count("p")) == (3, 0)  # names, where they are several
    frame = Page(pages.frame(f"<p title='a'>{pages.esc(HOSTILE)}</p>"))
    assert [tag for tag, _ in frame.elements] == ["iframe"]
    assert frame.elements[0][1]["srcdoc"] == f"<p title='a'>{pages.esc(HOSTILE)}</p>"
    assert frame.elements[0][1]["sandbox"] == "allow-scripts"


def test_tables_as_text_and_in_a_cell() -> None:
    result = EvalResult(task="<b>", arm="chat", chance=0.0, rows=(), metrics={}, provenance={})
    table = tables.eval_table(Evaluation({"[red]m": ModelScores((result,))}))
    row = tables.as_text(table).splitlines()[1]
    assert row.split()[:4] == ["[red]m", "<b>", "0", "0.000"]
    assert tables.as_text(Text("a"), Text("b")) == "a\n\nb" and "yo" in tables.as_text(TerminalRow(ROW))
    cell = Page(tables.as_html(table))
    assert cell.count("table") == 1 and "[red]m<b>0" in cell.text and not cell.count("b")


PROBE = """<span class="t" id="out">a</span><p>b</p>%s<output></output><script>
onload = () => {
  const of = (e) => getComputedStyle(document.querySelector(e));
  const style = (e) => [of(e).borderTopStyle, of(e).backgroundColor];
  document.querySelector("output").textContent = JSON.stringify({
    outside: style("#out"), body: style("body"), supervised: style(".sftflow .tokens .t.s") });
};</script>"""  # fmt: skip


@needs_chromium
def test_a_cells_style_stays_in_the_cell(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PROBE % token_html([ROW]), encoding="utf-8")
    found = json.loads(dom_of(tmp_path / "page.html", tmp_path / "profile"))
    assert found["outside"] == found["body"] == ["none", "rgba(0, 0, 0, 0)"]
    assert found["supervised"] == ["solid", "rgb(213, 227, 255)"]


THEMES = """<body %s>%s<output></output><script>
onload = () => { document.querySelector("output").textContent =
  JSON.stringify([getComputedStyle(document.querySelector(".sftflow")).color,
                  getComputedStyle(document.querySelector(".sftflow td")).textAlign]); };</script>"""
NOTEBOOK = """<style>.jp-Common:not(.jp-Markdown) td { text-align: right; }</style><div class="jp-Common">%s</div>"""


@needs_chromium
@pytest.mark.parametrize(
    ("body", "ink"),
    [("data-jp-theme-light=true", "27, 30, 35"), ("data-jp-theme-light=false", "228, 231, 235"), ("", "27, 30, 35")],
)
def test_a_cell_is_as_dark_as_the_notebook_and_its_tables_are_ours(body: str, ink: str, tmp_path: Path) -> None:
    result = EvalResult(task="t", arm="chat", chance=0.0, rows=(), metrics={}, provenance={})
    drawn = NOTEBOOK % tables.as_html(tables.eval_table(Evaluation({"m": ModelScores((result,))})))
    (tmp_path / "page.html").write_text(THEMES % (body, drawn), encoding="utf-8")
    found = json.loads(dom_of(tmp_path / "page.html", tmp_path / "profile"))
    assert found == [f"rgb({ink})", "left"]
