"""The chat page as it is served."""

from __future__ import annotations

from pathlib import Path

from helpers.serving import local
from sftflow.checkpoint import Assistant
from sftflow.serving import api


def test_page_is_self_contained(assistant: Assistant) -> None:
    http = local(assistant)
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "http://" not in answer.text and "https://" not in answer.text
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", " style=", " onclick="):
            assert forbidden not in answer.text


def test_page_files_are_the_only_ones_served() -> None:
    assert {p.name for p in (Path(api.__file__).parent / "page").iterdir()} == {f for f, _ in api.PAGE.values()}
