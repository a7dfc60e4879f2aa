"""Pages: the one Jinja environment, and the base page that every page of ours extends.

A page is `templates/NAME.html.jinja`. It begins with what the base page needs, and fills the block `body`:

    {% extends "base.html.jinja" %}
    {% set title = "Mixture audit" %}
    {% set css = asset("charts.css", "audit.css") %}   optional, after the shared theme.css and page.css
    {% set script = asset("report.js") %}    optional; the page's policy lets this script run and no other
    {% block body %}<h1>{{ name }}</h1>{% endblock %}

Whatever is written with `{{ }}` is escaped. Only `Markup` passes as it is: our own style sheets and script (`asset`),
and drawings and token boxes, which escape what they are given. An unknown name is an error, never an empty string.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import inspect
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sftflow.report import figures

# Control characters (HTML forbids them, a terminal paste may obey them) and lone surrogates (not encodable as UTF-8).
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def html_text(value: object) -> str:
    """A value as text that HTML can hold, not yet escaped; None is the empty string.

    >>> html_text("bell\\x07"), html_text(None), html_text("a\\r\\nb")
    ('bell\ufffd', '', 'a\\nb')
    """
    if isinstance(value, Markup):
        return value
    text = "" if value is None else str(value).replace("\r\n", "\n").replace("\r", "\n")
    return _FORBIDDEN.sub("\ufffd", text)


def esc(value: object) -> Markup:
    """Any value as markup, for text or for an attribute's value; what is markup already stays as it is.

    >>> str(esc('<b title="x">'))
    '&lt;b title=&#34;x&#34;&gt;'
    """
    return escape(html_text(value))


def asset(*names: str) -> Markup:
    """Style sheets or scripts of this folder. A browser hashes a script after turning CRLF into LF; a checkout on
    Windows must give the same."""
    files = (resources.files("sftflow.report").joinpath(name).read_text(encoding="utf-8") for name in names)
    return Markup("".join(files).replace("\r\n", "\n"))


def script_source(script: str) -> Markup:
    """What the page's policy says of the script that may run: its hash, or none at all.

    >>> str(script_source(""))
    "'none'"
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'" if script else "'none'")


@functools.cache
def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("sftflow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=html_text,
    )
    made.globals.update(asset=asset, script_source=script_source)
    made.filters.update(inspect.getmembers(figures, inspect.isfunction))
    return made


def render(template: str, **values: Any) -> str:
    """`templates/TEMPLATE.html.jinja` with these values: a whole page."""
    return environment().get_template(f"{template}.html.jinja").render(values)


def macros(template: str) -> Any:
    """The macros of `templates/TEMPLATE.html.jinja` as functions that give Markup."""
    return environment().get_template(f"{template}.html.jinja").module


# ---- in a notebook


_DARK = re.compile(r"@media screen and \(prefers-color-scheme: dark\) \{((?:[^{}]|\{[^{}]*\})*)\}")
_BY_THEME = (
    r"@media screen and (prefers-color-scheme: dark) { body:not([data-jp-theme-light]) & {\1} }"
    r" [data-jp-theme-light=false] & {\1}"
)


def cell(body: Markup, *css: str) -> str:
    """Markup for a notebook's cell, with these style sheets of ours; they reach nothing else in the notebook. It is as
    dark as the notebook is where that says so, as JupyterLab does; else as the browser asks."""
    rules = _DARK.sub(_BY_THEME, str(asset("theme.css", "cell.css", *css)).replace(":root", "&"))
    # Twice: a notebook's own rules for tables name a class and two more things.
    return f'<style>.sftflow.sftflow {{\n{rules}}}</style><div class="sftflow">{body}</div>'


def frame(page: str) -> str:
    """A whole page for a notebook's cell, in a frame of its own, whose border says that it scrolls."""
    style = "width:100%;height:40rem;border:1px solid #8888"
    return f'<iframe srcdoc="{esc(page)}" sandbox="allow-scripts" style="{style}"></iframe>'
