"""The page's own Markdown in a real Chromium: the right elements, nothing that could do harm, and never slow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.chromium import Chromium, Page, skip_module_without_chromium
from helpers.peer import Peer, serving

skip_module_without_chromium()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with serving() as peer:
        yield peer


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Iterator[Page]:
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        page = browser.open(peer.url)
        page.run("import('/markdown.js').then((m) => { window.draw = m.draw; })")
        yield page
        browser.listen(0.2)
        assert not page.problems
        assert all(url.startswith((peer.url, "data:,")) for url in page.requests), page.requests


def html(page: Page, text: str) -> str:
    """What the text is drawn as."""
    return str(page.run(f"(() => {{ const box = document.createElement('div'); draw(box, {json.dumps(text)});"
                        "return box.innerHTML })()"))  # fmt: skip


LINK = 'target="_blank" rel="noopener noreferrer"'


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("one\ntwo", "<p>one<br>two</p>"),
        ("one\n\ntwo", "<p>one</p><p>two</p>"),
        ("# Title #\n### Small", "<h3>Title</h3><h5>Small</h5>"),
        ("#no heading", "<p>#no heading</p>"),
        ("a **b** *c* ***d*** __e__ _f_ ~~g~~", "<p>a <strong>b</strong> <em>c</em> <em><strong>d</strong></em> "
         "<strong>e</strong> <em>f</em> <del>g</del></p>"),
        ("**bold with *italic* inside**", "<p><strong>bold with <em>italic</em> inside</strong></p>"),
        ("2*3*4 = 24, 2**3**2, snake_case_name, * alone", "<p>2*3*4 = 24, 2**3**2, snake_case_name, * alone</p>"),
        ("un**believ**able", "<p>un<strong>believ</strong>able</p>"),
        ("**not closed", "<p>**not closed</p>"),
        ("`a *b*` and ``c ` d``", "<p><code>a *b*</code> and <code>c ` d</code></p>"),
        (r"\*not\* \`this\`", "<p>*not* `this`</p>"),
        ("- a\n- b\n  - c\n- d",
         "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li><li><p>d</p></li></ul>"),
        ("3. a\n4. b\n  * c", '<ol start="3"><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ol>'),
        ("1. a\n\n   more\n\n2. b", '<ol start="1"><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>'),
        ("text\n- a", "<p>text</p><ul><li><p>a</p></li></ul>"),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("[a **b**](https://x.example/p_(1) \"t\")",
         f'<p><a href="https://x.example/p_(1)" {LINK} title="https://x.example/p_(1)">a <strong>b</strong></a></p>'),
        ("See https://x.example/a_b_c.", f'<p>See <a href="https://x.example/a_b_c" {LINK} '
         'title="https://x.example/a_b_c">https://x.example/a_b_c</a>.</p>'),
        ("<mailto:a@b.example>",
         f'<p><a href="mailto:a@b.example" {LINK} title="mailto:a@b.example">mailto:a@b.example</a></p>'),
        ("![a cat](https://x.example/cat.png)",
         '<p><span class="image">Image: a cat (https://x.example/cat.png)</span></p>'),
        ("| a | b |\n|:-:|--:|\n| 1 | 2\\|3 |\n| *x* |",
         '<div class="table" tabindex="0"><table><thead><tr><th class="center">a</th>'
         '<th class="right">b</th></tr></thead><tbody><tr><td class="center">1</td><td class="right">2|3</td></tr><tr>'
         '<td class="center"><em>x</em></td><td class="right"></td></tr></tbody></table></div>'),
        ("a | b\nno table", "<p>a | b<br>no table</p>"),
        ("<b>x</b> &amp; <!-- c -->", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp; &lt;!-- c --&gt;</p>"),
    ],
)  # fmt: skip
def test_what_is_drawn(page: Page, text: str, drawn: str) -> None:
    assert html(page, text).replace(' dir="auto"', "") == drawn


def test_code_blocks_keep_every_character(page: Page) -> None:
    code = "all:\n\tmake *it* <b>\n\n  `x`"
    for fence, info in (("```", "make"), ("~~~~", " make title"), ("```", "")):
        text = json.dumps("\n".join([fence + info, code, fence, "end"]))
        drawn = page.run(
            f"(() => {{ const box = document.createElement('div'); draw(box, {text});"
            "return [box.querySelector('code').textContent, box.querySelector('.code-head span').textContent,"
            "box.lastChild.textContent] })()"
        )
        assert drawn == [code, "make" if info else "", "end"]
    assert "<pre" in html(page, "```py\nstill being written")


def test_drawing_piece_by_piece_is_drawing_at_once(page: Page) -> None:
    text = "# T\n\nHello **you**\n\n1. a\n   - b\n2. c\n\n```py\nx = 1\n```\n\n"
    text += "| a | b |\n|---|---|\n| 1 | 2 |\n\n> end *it*"
    assert page.run(
        f"""(() => {{
            const text = {json.dumps(text)}, grown = document.createElement('div');
            for (let n = 1; n <= text.length; n++) draw(grown, text.slice(0, n));
            const first = grown.firstChild, whole = document.createElement('div');
            draw(whole, text);
            draw(grown, text + '!');
            return grown.firstChild === first && whole.innerHTML.replace('it</em>', 'it</em>!') === grown.innerHTML
        }})()"""
    )


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script><iframe src=//evil.example></iframe>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](\tjavascript:alert(1))",
    "[x](<java script:alert(1)>)",
    "[x](javascript&#58;alert(1))",
    "[x](vbscript:x) [x](data:text/html,<script>alert(1)</script>) [x](file:///etc/passwd) [x](blob:https://x/y)",
    "[x](//evil.example) [x](/v1/models) [x](relative)",
    '[x](https://evil.example" onmouseover="alert(1))',
    '[x](https://evil.example "t\\" onclick=alert(1)")',
    "![x](https://evil.example/p.png) ![x](javascript:alert(1)) ![](data:image/svg+xml,<svg onload=alert(1)>)",
    "[![x](https://evil.example/p.png)](javascript:alert(1))",
    "<https://evil.example/\"onmouseover=alert(1)> <javascript:alert(1)>",
    "```<img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <svg onload=alert(1)> | [x](javascript:alert(1)) |",
    "<style>*{display:none}</style><base href=https://evil.example><meta http-equiv=refresh content=0>",
    "<a href='javascript:alert(1)' style=position:fixed>x</a><form action=//evil.example><input onfocus=alert(1)>",
    "https://evil.example/<script>alert(1)</script> http://javascript:alert(1)",
]  # fmt: skip
ALLOWED = {"A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "H3", "H4", "H5", "H6", "HR", "LI", "OL", "P",
           "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL"}  # fmt: skip
ATTRIBUTES = {"aria-label", "class", "dir", "href", "rel", "start", "tabindex", "target", "title", "type"}


def test_hostile_text_is_only_text(page: Page) -> None:
    found: list[Any] = page.run(
        f"""(() => {{
            const box = document.createElement('div');
            document.body.append(box);
            for (const text of {json.dumps(HOSTILE)}) {{
                const one = document.createElement('div');
                draw(one, text);
                box.append(one);
            }}
            const names = (node) => [...node.attributes].map((attribute) => attribute.name);
            return [...box.querySelectorAll('*')].map((n) => [n.tagName, names(n), n.href ?? ''])
        }})()"""
    )
    assert {tag for tag, _, _ in found} <= ALLOWED
    assert {name for _, names, _ in found for name in names} <= ATTRIBUTES
    links = [href for tag, _, href in found if tag == "A"]
    assert links and all(href.startswith(("http://", "https://", "mailto:")) for href in links)
    assert page.run("document.body.lastChild.textContent.includes('<img src=x onerror=alert(1)>')")
    page.run("document.body.lastChild.remove()")


@pytest.mark.parametrize(
    "piece",
    ["[", "![", "[a](", "*a ", "a*", "**a", "a**b", "_ a_", "`", "` ``", "~~a", "> ", "- ", "  - a\n", "1. a\n",
     "|a|\n|-|\n", "|-", "https://", "https://)))", "<https://", "\\", "# #", "#" * 6 + " ", "```\n", "\t- ", "- - ",
     "*_~~`[", "***a*** ", "* a\n\n", "    ", "> - > 1. "],
)  # fmt: skip
def test_no_text_is_slow_or_deep(page: Page, piece: str) -> None:
    """A model that repeats itself must not hang the page: what looked twice at all 60,000 characters for each of them
    would take minutes."""
    text = (piece * 60_000)[:60_000]
    seconds, deepest = page.run(
        f"""(() => {{
            const box = document.createElement('div'), began = performance.now();
            draw(box, {json.dumps(text)});
            const seconds = (performance.now() - began) / 1000;
            let depth = 0;
            for (let row = [box]; row.length; depth++) row = row.flatMap((n) => [...n.children]);
            return [seconds, depth];
        }})()"""
    )
    assert seconds < 30 and deepest < 80, (seconds, deepest)
