"""The token inspector: true bytes, turns beside their text, and a terminal view that needs no colour."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from helpers.chromium import dom_of, needs_chromium
from helpers.outside import tokenizer_names
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.token_rows import Token, TokenRow, token_row
from sftflow.report.token_page import token_boxes, token_page, visible
from sftflow.report.token_view import Piece, TerminalRow, pieces_of_row, turns_of_row

TEXT = "Hello 🙂, naïve مرحبا 世界 👩\u200d💻!\n\n  x = 1\tend"


class Boxes(HTMLParser):
    """The token boxes of a page, (title, class, text) each, and the elements and text around them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.boxes: list[tuple[str, str, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._depth = 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "span" and "title" in found:
            self.boxes.append((str(found["title"]), str(found["class"]), ""))
            self._depth = 1
        elif self._depth and tag != "br":
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        self._depth = max(0, self._depth - 1)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._depth:
            title, kinds, text = self.boxes[-1]
            self.boxes[-1] = (title, kinds, text + data)


def hover_bytes(title: str) -> bytes:
    found = re.search(r"bytes?: ((?:[0-9a-f]{2} ?)+)", title)
    return bytes.fromhex(found[1]) if found else b""


def row(
    *tokens: tuple[str | bytes, str], turns: tuple[tuple[int, str], ...] = (), source: str = "d.jsonl:1"
) -> TokenRow:
    """A row of (text or bytes, marks) tokens; marks: s supervised, x special."""
    out = []
    for number, (what, marks) in enumerate(tokens):
        raw = what.encode() if isinstance(what, str) else what
        out.append(Token(number, raw.decode("utf-8", "backslashreplace"), raw, "s" in marks, "x" in marks))
    return TokenRow(source, tuple(out), turns)


def chat_row() -> TokenRow:
    return row(
        ("<|bos|>", "x"), ("<|user_start|>", "x"), ("Say", ""), (" hi", ""), ("\n", ""), ("<|user_end|>", "x"),
        ("<|assistant_start|>", "x"), (" hi", "s"), (b"\xf0\x9f", "s"), (b"\x99\x82", "s"), (" ", "s"),
        ("<|assistant_end|>", "sx"), turns=((1, "user"), (6, "assistant")),
    )  # fmt: skip


def printed(what: TokenRow, colour: bool = False, width: int = 80) -> str:
    file = StringIO()
    system: Any = "truecolor" if colour else None
    console = Console(file=file, width=width, color_system=system, force_terminal=colour, highlight=False)
    console.print(TerminalRow(what))
    return file.getvalue()


def rendered(tokenizer: Any, text: str, turns: tuple[tuple[int, str], ...] = ()) -> Rendered:
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    mask = (np.arange(len(ids)) % 3 > 0).astype(np.int8)
    return Rendered(ids, mask, text, "d.jsonl:7", turns=turns)


# ---- bytes


def test_boxes_of_a_split_character_concatenate_to_its_bytes(renderer: Renderer) -> None:
    data = token_row(rendered(renderer.tokenizer, TEXT), renderer.tokenizer)
    assert TokenRow.from_json(json.loads(json.dumps(data.to_json()))) == data
    page = Boxes(token_page([data]))
    assert len(page.boxes) == len(data.tokens)
    assert b"".join(hover_bytes(title) for title, _, _ in page.boxes) == TEXT.encode()
    assert b"".join(t.raw or b"" for t in data.tokens) == TEXT.encode()
    smile = [(title, kinds, text) for title, kinds, text in page.boxes if "part of 🙂" in title]
    assert len(smile) == 4 and smile[0][2] == "🙂f0" and [text for *_, text in smile[1:]] == ["9f", "99", "82"]
    assert [kinds.endswith(" c") for _, kinds, _ in smile] == [False, True, True, True]
    assert "part of U+200D" in str(page.boxes) and "part of a character" not in str(page.boxes)
    assert "\ufffd" not in page.text


@pytest.mark.parametrize("name", tokenizer_names("llama2", "llama3_1", "qwen3"))
def test_bytes_of_real_tokenizers(known_tokenizers: dict[str, Path], name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(known_tokenizers[name])
    text = TEXT + " <0x41> \U00010348 𓀀"
    data = token_row(rendered(tokenizer, text), tokenizer)
    joined = b"".join(t.raw or b"" for t in data.tokens).decode()
    assert joined == (" " + text if name.endswith("llama2") else text), "Llama 2 writes a space before every text"


@pytest.mark.parametrize("name", tokenizer_names("llama2"))
def test_llama_2_tokens_keep_their_leading_space(known_tokenizers: dict[str, Path], name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(known_tokenizers[name])
    data = token_row(rendered(tokenizer, "The cat\n\U00010348"), tokenizer)
    assert [t.text for t in data.tokens[:3]] == [" The", " cat", "\n"]
    assert [t.raw for t in data.tokens[3:]] == [b"\xf0", b"\x90", b"\x8d", b"\x88"], "byte tokens such as <0xF0>"
    page = Boxes(token_page([data]))
    assert page.boxes[1][2] == "·cat" and "4 bytes: 20 63 61 74" in page.boxes[1][0]
    bos = token_row(Rendered(np.array([1, 2]), np.zeros(2, np.int8), ""), tokenizer)
    assert [(t.text, t.special) for t in bos.tokens] == [("<s>", True), ("</s>", True)]


def test_special_tokens_and_ids_beyond_the_vocabulary(renderer: Renderer) -> None:
    special = renderer.special["<|assistant_start|>"]
    data = token_row(Rendered(np.array([special, 99_999]), np.zeros(2, np.int8), ""), renderer.tokenizer)
    assert [(t.text, t.special) for t in data.tokens] == [("<|assistant_start|>", True), ("", False)]
    assert "∅" in token_boxes(data) and printed(data)


def test_a_decoder_unknown_here_is_asked() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    data = token_row(rendered(tokenizer, "playing"), tokenizer)
    assert len(data.tokens) == 2 and data.tokens[0].text == "play" and "ing" in data.tokens[1].text


@given(st.lists(st.one_of(st.binary(max_size=6), st.text(max_size=4).map(lambda s: s.encode("utf-8", "replace")))))
def test_pieces_hold_each_tokens_bytes_and_no_others(data: list[bytes]) -> None:
    pieces = pieces_of_row([Token(0, "", raw, False) for raw in data])
    assert [b"".join(p.part or p.text.encode() for p in mine) for mine in pieces] == data


def test_pieces_name_the_character() -> None:
    strange = row((b" \xf0\x9f", ""), (b"\x99", ""), (b"\x82ok\xe2", ""), (b"\xff", ""), ("é", ""))
    assert pieces_of_row(strange.tokens) == [
        [Piece(" "), Piece("🙂", b"\xf0\x9f")],
        [Piece("🙂", b"\x99", False)],
        [Piece("🙂", b"\x82", False), Piece("ok"), Piece("", b"\xe2")],
        [Piece("", b"\xff")],
        [Piece("é")],
    ]
    titles = [title for title, _, _ in Boxes(token_boxes(strange)).boxes]
    assert titles[2] == "id 2 · 4 bytes: 82 6f 6b e2 · part of 🙂 · not UTF-8 · not supervised"


def test_2000_tokens_are_quick(renderer: Renderer) -> None:
    one = rendered(renderer.tokenizer, (TEXT + " The cat sat on the mat. ") * 60)
    one = Rendered(one.ids[:2000], one.mask[:2000], one.text)
    assert len(one.ids) == 2000
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data = token_row(one, renderer.tokenizer)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    assert len(token_page([data])) < 500_000


# ---- turns


def test_turns_cover_every_token() -> None:
    tokens = row(*[("a", "")] * 5).tokens
    assert turns_of_row(TokenRow("", tokens)) == [(None, 0, 5)]
    assert turns_of_row(TokenRow("", tokens, ((0, "user"), (3, "assistant")))) == [
        ("user", 0, 3),
        ("assistant", 3, 5),
    ]
    strange = ((1, "system"), (1, "user"), (0, "back"), (9, "beyond"))
    assert turns_of_row(TokenRow("", tokens, strange)) == [("", 0, 1), ("user", 1, 5)]
    assert turns_of_row(TokenRow("", (), ((0, "user"),))) == [(None, 0, 0)]


def test_rows_carry_the_turns(renderer: Renderer) -> None:
    data = token_row(rendered(renderer.tokenizer, "hello there", ((0, "user"), (2, "assistant"))), renderer.tokenizer)
    assert data.turns == ((0, "user"), (2, "assistant"))
    assert token_row(rendered(renderer.tokenizer, "hello"), renderer.tokenizer).turns == ()


def test_page_sets_each_turn_beside_its_role() -> None:
    html = token_page([chat_row()])
    page = Boxes(html)
    gutters = re.findall(r'<div class="who">(.*?)</div>', html)
    assert [re.sub(r"<br>|<a.*?</a>", " ", g).split("<span>")[0] for g in gutters] == [
        "<b><em>template</em></b> ", "<b>user</b> ", "<b>assistant</b> ",
    ]  # fmt: skip
    assert "5 tokens" in gutters[1] and "supervised" not in gutters[1] and "5 supervised" in gutters[2]
    assert html.count('class="tokens"') == 3 and len(page.boxes) == 12
    ids = [a["id"] for _, a in page.elements if "id" in a]
    links = [str(a["href"])[1:] for t, a in page.elements if t == "a"]
    assert ids == ["top", "r1", "r1t1", "r1t2", "r1t3"] and set(links) <= set(ids) and len(set(ids)) == len(ids)
    assert all(a.get("tabindex") == "0" for t, a in page.elements if t == "span" and "title" in a)


def test_rows_whose_turns_are_not_known_are_one_block() -> None:
    plain = row(("hi", "s"), (b"\xff", ""))
    html = token_page([plain])
    assert 'class="who"' not in html and 'class="talk"' not in html and len(Boxes(html).boxes) == 2
    assert "2 bytes: 68 69" in html and "1 byte: ff · not UTF-8" in html
    assert printed(plain).splitlines()[1:] == ["┃ hi", "  ⟨FF⟩"]


def test_many_rows_have_an_index_and_ways_on() -> None:
    rows = [replace(chat_row(), source=f"data/mine.jsonl:{i + 1}") for i in range(50)]
    rows[10] = TokenRow("data/mine.jsonl:11", refused="two user <turns> in a row")
    html = token_page(rows)
    page = Boxes(html)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    links = [str(a["href"])[1:] for t, a in page.elements if t == "a"]
    assert set(links) <= set(ids) and len(set(ids)) == len(ids) and {f"r{i + 1}" for i in range(50)} <= set(links)
    assert html.count("<li>") == 50 and "<span>mine.jsonl:50</span>" in html, "the folder that all share is left out"
    assert "two user <turns> in a row" in page.text and html.count("<b>refused</b>") == 1
    assert 'href="#r12" aria-label="next' in html.split('id="r11"')[1] and "<li>" not in token_page(rows[:1])


# ---- what must not act


def test_nothing_of_a_row_acts() -> None:
    bad = '<img src=x onerror="a()">&\u202e\u200b\x1b[31m\x00'
    tokens = [("hi", "s"), (bad, "s"), (bad, "x")]
    html = token_page([row(*tokens, turns=((0, bad), (1, "user")), source=bad), TokenRow("", refused=bad)])
    page = Boxes(html)
    assert not [tag for tag, _ in page.elements if tag in ("img", "script")]
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    assert page.boxes[1][2] == '<img·src=x·onerror="a()">&U+202EU+200BU+001B[31mU+0000'
    assert "\x1b" not in html and "\x00" not in html
    for colour in (False, True):
        shown = printed(row(*tokens, turns=((0, bad), (1, "user"))), colour)
        shown = re.sub(r"\x1b\[[\d;]*m", "", shown) if colour else shown
        assert "⟨U+202E⟩⟨U+200B⟩⟨U+001B⟩[31m⟨U+0000⟩" in shown.replace("\n", "")
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u200b\u202e]", shown)


def test_unseen_characters_are_named() -> None:
    assert visible("a\u00a0\u3164\ufe0f\U000e0041\u061c\ud800") == "".join(
        ["a", *(f"<i>{x}</i>" for x in ("U+00A0", "U+3164", "U+FE0F", "U+E0041", "U+061C", "U+D800"))]
    )
    assert visible("  \t\tx\r\n\n y\r") == "<i>··</i><i>⇥⇥</i>x<i>␍↵↵</i><br><i>·</i>y<i>␍</i>"


# ---- the terminal


def test_terminal_without_colour() -> None:
    assert printed(chat_row()).splitlines() == [
        "┃ supervised   ⟦special⟧   ↵ line end",
        "template      ⟦<|bos|>⟧",
        "1 token",
        "user          ⟦<|user_start|>⟧Say hi↵",
        "5 tokens      ⟦<|user_end|>⟧",
        "assistant     ⟦<|assistant_start|>⟧",
        "5/6 sup     ┃ ␣hi🙂 ⟦<|assistant_end|>⟧",
    ]


def test_TerminalRow_fit_80_columns_and_say_the_mask(renderer: Renderer) -> None:
    words = "The cat 世界 sat on 🙂 the mat. " + "x" * 150 + "\n    indented\n\nمرحبا\n"
    parts = [("<|bos|>", "x"), *((w, "") for w in re.findall(r"\s*\S+|\s+$", words * 3))]
    start = len(parts)
    parts += [(w, "s") for w in re.findall(r"\s*\S+|\s+$", words * 3)] + [("<|assistant_end|>", "sx")]
    lines = printed(row(*parts, turns=((0, "a-very-long-role-name"), (start, "assistant")))).splitlines()
    assert max(map(cell_len, lines)) <= 80 and "a-very-lon… " in lines[1]
    bars = [line[12:].startswith("┃ ") for line in lines[1:]]
    assert bars == sorted(bars) and any(bars) and not all(bars)
    said = "".join(line[14:] for line, bar in zip(lines[1:], bars, strict=True) if bar)
    expected = words * 3 + "⟦<|assistant_end|>⟧"
    assert re.sub(r"[↵\s]", "", said) == re.sub(r"\s", "", expected)
    narrow = printed(chat_row(), width=40).splitlines()
    assert max(map(cell_len, narrow)) <= 40


def test_terminal_signs_cannot_be_imitated() -> None:
    parts = row(("┃ ⟦<|bos|>⟧ ↵ ⟨U+200B⟩ ", ""), ("\n", ""), ("┃ me", ""), turns=((0, "user"),))
    assert printed(parts).splitlines()[1:] == [
        "user          ┃ ⟨U+27E6⟩<|bos|>⟨U+27E7⟩ ⟨U+21B5⟩ ⟨U+27E8⟩U+200B⟨U+27E9⟩ ↵",
        "3 tokens      ┃ me",
    ], "the margin's bar stands two cells further left"
    ends = printed(row((" a ", "s"), ("b ", ""), turns=((0, "user"),))).splitlines()
    assert ends[1:] == ["user        ┃ ␣a␣", "1/2 sup       b␣"]


def test_terminal_splits_a_character_only_where_the_mask_does() -> None:
    parts = row((b"\xf0\x9f", ""), (b"\x99\x82", "s"), turns=((0, "user"),))
    assert [line[12:] for line in printed(parts).splitlines()[1:]] == ["  ⟨F0 9F⟩", "┃ ⟨99 82⟩"]


def test_terminal_with_colour() -> None:
    shown = printed(chat_row(), colour=True)
    assert "⟦" not in shown and "\x1b[36m<|bos|>" in shown
    assert "\x1b[1;32m␣hi" in shown and "\x1b[1;4;32m🙂" in shown, "the next token is underlined"
    assert "\x1b[1;36m<|assistant_end|>" in shown


# ---- in a browser

PROBE = """<iframe src="page.html" style="width:%dpx;height:700px;border:0"></iframe><output></output><script>
onload = () => {
  const d = document.querySelector("iframe").contentDocument, w = d.defaultView;
  const box = d.querySelector(".tokens .t.c"), after = () => w.getComputedStyle(box, "::after").content;
  const before = after();
  box.focus();
  const [who, tokens] = d.querySelectorAll("#r1t3 > div");
  const beside = who.getBoundingClientRect().right <= tokens.getBoundingClientRect().left;
  document.querySelector("output").textContent = JSON.stringify({
    before, said: after(), beside, overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth });
};</script>"""


@needs_chromium
@pytest.mark.parametrize(("width", "beside"), [(390, False), (1280, True)])
def test_page_in_a_browser(tmp_path: Path, width: int, beside: bool) -> None:
    """A touched or focused box says its bytes without a script, and nothing scrolls sideways."""
    long = row(("w" * 400, "s"), ("\u200b" * 80, ""), turns=((0, "r" * 90),), source="p" * 300)
    (tmp_path / "page.html").write_text(token_page([chat_row(), long]), encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE % width, encoding="utf-8")
    assert json.loads(dom_of(tmp_path / "probe.html", tmp_path / "profile")) == {
        "before": "none", "said": '"id 9 · 2 bytes: 99 82 · part of 🙂 · supervised"', "beside": beside, "overflow": 0,
    }  # fmt: skip
