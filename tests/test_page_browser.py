"""The chat page in a real Chromium: against `sftflow serve` with tiny models, and against a peer that says what no tiny
model would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.chromium import Chromium, Page, skip_module_without_chromium
from helpers.peer import Peer, serving
from helpers.serving import running
from sftflow.chat.data_files import read_conversations
from sftflow.chat.schema import parse_row
from sftflow.checkpoint import Assistant, open_renderer, resolve
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.serving.api import make_app

skip_module_without_chromium()
IDLE = "!document.body.classList.contains('busy')"
TEXTS = "[...document.querySelectorAll('.reply .markdown')].map((n) => n.textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def peer() -> Iterator[Peer]:
    with serving() as peer:
        yield peer


@contextmanager
def opened(browser: Chromium, url: str, *, refused: int = 0, **options: Any) -> Iterator[Page]:
    """A tab whose models are loaded. At the end: no console error but those of `refused` answers, no load from
    elsewhere."""
    page = browser.open(url, **options)
    page.wait("document.querySelector('#model').value || !document.querySelector('#notice').hidden")
    yield page
    browser.listen(0.1)
    unexpected = [p for p in page.problems if not re.search("the server responded with a status of 4|ERR_", p)]
    assert not unexpected and len(page.problems) <= refused, page.problems
    elsewhere = [u for u in page.requests if not u.startswith((url, "data:,", f"blob:{url}"))]
    assert not elsewhere, elsewhere


def send(page: Page, text: str) -> None:
    page.click("#prompt")
    page.type(text)
    page.press("Enter")


def ask(page: Page, text: str) -> None:
    """Send and wait for the whole reply."""
    before = page.run("document.querySelectorAll('.turn').length")
    send(page, text)
    page.wait(f"document.querySelectorAll('.turn').length > {before} && {IDLE}")


def kept(page: Page) -> list[dict[str, Any]]:
    """The conversations in localStorage."""
    return [json.loads(v) for v in page.run(
        "Object.keys(localStorage).filter((k) => k.startsWith('sftflow.chat.')).map((k) => localStorage[k])"
    )]  # fmt: skip


def downloaded(file: Path) -> Path:
    for _ in range(200):
        if file.exists() and file.stat().st_size:
            return file
        time.sleep(0.05)
    raise TimeoutError(f"{file.name} never came")


# ---- against sftflow serve


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> list[Path]:
    """The same random weights twice; they can go on for a million tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    out = []
    for name in ("sft", "base"):
        directory = tmp_path_factory.mktemp("models") / name
        spec = BaseSpec(params="0.1M", context=1 << 20, seed=3)
        build_model(spec, len(tokenizer), tokenizer.bos_token_id).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        out.append(directory)
    return out


@pytest.fixture(scope="module")
def served(models: list[Path]) -> Iterator[str]:
    command = [sys.executable, "-m", "sftflow", "serve", str(models[0]), "--base", str(models[1]), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = ""
        while "http://" not in line:
            line = process.stderr.readline()
            assert line, "the server ended"
        yield re.findall(r"http://\S+", line)[0] + "/"
    finally:
        process.terminate()
        process.wait(20)


def test_send_stream_regenerate_edit_stop(browser: Chromium, served: str, models: list[Path], tmp_path: Path) -> None:
    with opened(browser, served, downloads=tmp_path) as page:
        page.click("#open-settings")
        for name, value in (("temperature", "1"), ("max_tokens", "12"), ("min_p", "0.01"), ("seed", "7")):
            page.click(f"[name={name}]")
            page.type(value)
        page.click("#system")
        page.type("Be brief.")
        page.press("Escape")
        assert page.run("document.querySelector('#settings').hidden")
        ask(page, "what is a token?")
        # Two models, one seed; the weights are the same, so the replies are, too.
        first, second = page.run(TEXTS)
        assert first == second and len(first) > 0
        assert page.run("[...document.querySelectorAll('.name')].map((n) => n.textContent)") == ["sft", "base"]
        meta = page.run("document.querySelector('.meta').textContent")
        assert re.search(r"cut at the limit \(length\)12 tokens[\d.]+ tokens/sfirst after \d+ msseed \d+", meta), meta
        one, other = page.bodies
        assert one == {**other, "model": "sft"} and other["model"] == "base"
        assert set(one) == {
            "model",
            "messages",
            "stream",
            "stream_options",
            "temperature",
            "max_tokens",
            "min_p",
            "seed",
        }
        assert one["messages"] == [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is a token?"}
        ]  # fmt: skip

        # The tokens of the prompt are those of the renderer.
        page.click("[data-part=see]")
        page.wait("document.querySelector('.tokens span')")
        shown = page.run("[...document.querySelectorAll('.tokens span')].map((n) => Number(n.title.split(/[ :]+/)[1]))")
        renderer = open_renderer(resolve(str(models[0])), "auto")
        assert (
            shown
            == renderer.render(parse_row({"messages": one["messages"]}, "x"), add_generation_prompt=True).ids.tolist()
        )

        # Regenerated: another seed, another text; the first version is kept.
        page.click("[data-part=again]")
        page.wait(f"document.querySelector('[data-part=version]').textContent === '2 of 2' && {IDLE}")
        assert page.bodies[2]["seed"] != one["seed"] and page.bodies[2]["messages"] == one["messages"]
        again = page.run(TEXTS)
        assert again[0] == again[1] != first
        page.click("[data-part=older]")
        assert page.run(TEXTS) == [first, second]

        # Go on from the first version, then edit the first question: what followed stays as a version.
        ask(page, "and a word?")
        history = page.bodies[-1]["messages"]
        assert [m["role"] for m in history] == ["system", "user", "assistant", "user"] and history[2]["content"]
        page.click("[data-part=edit]")
        page.run("document.querySelector('.editor textarea').value = ''")
        page.type("what is a byte?")
        page.press("Enter")
        page.wait(f"document.querySelector('[data-part=version]').textContent === '3 of 3' && {IDLE}")
        assert page.run("document.querySelectorAll('.turn').length") == 1
        assert page.bodies[-1]["messages"][-1]["content"] == "what is a byte?" and len(page.bodies[-1]["messages"]) == 2
        page.click("[data-part=older]")
        page.click("[data-part=older]")
        assert page.run("document.querySelectorAll('.turn').length") == 2

        # Copied and exported: a row that trains, its cut replies without weight.
        page.click("[data-part=source]")
        assert page.run("document.querySelector('.plain').textContent").startswith(history[2]["content"][:3])
        page.click(".reply [data-part=copy]")
        copied = history[2]["content"].replace("\r\n", "\n").replace("\r", "\n")  # as the clipboard has line ends
        assert page.wait("navigator.clipboard.readText()").replace("\r\n", "\n") == copied
        page.click("#export summary")
        page.click("#export-json")
        file = downloaded(tmp_path / "what-is-a-token.jsonl")
        (row,) = read_conversations(file)
        assert [(m.role, m.weight) for m in row.messages] == [
            ("system", 1), ("user", 1), ("assistant", 0), ("user", 1), ("assistant", 0)
        ]  # fmt: skip
        assert row.messages[2].text == history[2]["content"]
        page.click("#export summary")
        page.click("#export-markdown")
        text = downloaded(tmp_path / "what-is-a-token.md").read_text()
        headings = ["# what is a token?", "## System", *["## You", "## sft", "## base"] * 2]
        assert [line for line in text.splitlines() if line in headings] == headings

        # Without a limit it would go on for a million tokens.
        page.click("#open-settings")
        page.click("#reset")
        page.press("Escape")
        send(page, "more")
        page.wait("[...document.querySelectorAll('.turn')].at(-1).querySelector('.markdown').textContent.length > 4")
        page.press("Escape")
        page.wait(IDLE)
        assert "stopped by you" in page.run("[...document.querySelectorAll('.meta')].at(-1).textContent")
        began = time.monotonic()
        body = {"model": "sft", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert httpx.post(f"{served}v1/chat/completions", json=body, timeout=10).status_code == 200
        assert time.monotonic() - began < 5


# ---- against a peer


HOSTILE = """<img src=x onerror=alert(1)> <script>alert(2)</script>
[click](javascript:alert(3)) ![p](https://evil.example/p.png) [fine](https://fine.example)

```html
<img src=x onerror=alert(4)>
```
"""


def test_hostile_replies_are_inert(browser: Chromium, peer: Peer) -> None:
    peer.models, peer.say = ["sft", "<img src=x onerror=alert(5)>"], HOSTILE
    with opened(browser, peer.url) as page:
        ask(page, "<img src=x onerror=alert(6)>")
        assert page.run("document.querySelectorAll('.reply').length") == 2
        assert page.run("document.querySelectorAll('#log img, #log script, #log iframe').length") == 0
        hrefs = page.run("[...document.querySelectorAll('#log a')].map((a) => [a.href, a.rel, a.target])")
        assert hrefs == [["https://fine.example/", "noopener noreferrer", "_blank"]] * 2
        text = page.run("document.querySelector('.markdown').textContent")
        assert "<img src=x onerror=alert(1)>" in text and "[click](javascript:alert(3))" in text
        page.reload()  # and once more from the store
        page.wait("document.querySelectorAll('.reply').length === 2")
        assert page.run("document.querySelectorAll('#log img, #log script').length") == 0


def test_thoughts_are_folded_and_go_along(browser: Chromium, peer: Peer) -> None:
    peer.think, peer.say = "<img src=x onerror=alert(1)> so\nit is **noon**", "Noon."
    peer.models = ["sft"]
    with opened(browser, peer.url) as page:
        ask(page, "What time is it?")
        assert page.run(TEXTS) == ["Noon."]
        box = "document.querySelector('.reply .thoughts')"
        assert page.run(f"[{box}.hidden, {box}.open, {box}.querySelector('summary').textContent]") == [
            False, False, "Thoughts",
        ]  # fmt: skip
        page.click(".reply .thoughts summary")
        assert page.run(f"{box}.open && {box}.querySelector('p').textContent") == peer.think
        assert page.run(f"{box}.querySelectorAll('img').length") == 0
        thought, peer.think = peer.think, ""
        ask(page, "And now?")
        assert page.run("[...document.querySelectorAll('.thoughts')].map((n) => n.hidden)") == [False, True]
        said = {"role": "assistant", "content": "Noon.", "reasoning_content": thought}
        assert peer.bodies[-1]["messages"][1] == said
        assert kept(page)[0]["next"][0]["replies"][0]["thoughts"] == thought


def test_a_row_has_the_system_prompt_that_its_replies_had(browser: Chromium, peer: Peer, tmp_path: Path) -> None:
    peer.models = ["sft"]

    def under(page: Page, system: str) -> None:
        page.click("#open-settings")
        page.run("document.querySelector('#system').value = ''")
        page.click("#system")
        page.type(system)
        page.press("Escape")

    def exported(page: Page) -> list[tuple[str, str, int]]:
        (tmp_path / "hi.jsonl").unlink(missing_ok=True)
        page.click("#export summary")
        page.click("#export-json")
        (row,) = read_conversations(downloaded(tmp_path / "hi.jsonl"))
        return [(m.role, m.text, m.weight) for m in row.messages if m.role != "user"]

    noted = "document.querySelector('#notice').hidden ? '' : document.querySelector('#notice').textContent"
    with opened(browser, peer.url, downloads=tmp_path) as page:
        under(page, "Be kind.")
        ask(page, "hi")
        under(page, "Be rude.")
        assert exported(page) == [("system", "Be kind.", 1), ("assistant", "Hello.", 1)]
        assert page.run(noted) == ""
        ask(page, "on")
        assert exported(page) == [("system", "Be rude.", 1), ("assistant", "Hello.", 0), ("assistant", "Hello.", 1)]
        assert "another system prompt" in page.run(noted) and "weight 0" in page.run(noted)
        page.click("#export summary")
        page.click("#export-markdown")
        parts = downloaded(tmp_path / "hi.md").read_text().strip().split("\n\n")
        assert parts == ["# hi", "## System", "Be kind.", "## You", "hi", "## sft", "Hello.",
                         "## System", "Be rude.", "## You", "on", "## sft", "Hello."]  # fmt: skip


def test_keys_alone(browser: Chromium, peer: Peer) -> None:
    peer.delay, peer.say = 0.02, "word " * 400
    with opened(browser, peer.url) as page:
        assert page.run("document.activeElement.id") == "prompt"
        page.type("one")
        page.press("Enter", shift=True)
        page.type("two")
        assert page.run("document.querySelector('#prompt').value") == "one\ntwo" and not page.bodies
        page.press("Enter")
        page.wait("document.querySelector('.markdown').textContent.length > 20")
        assert page.run("document.querySelector('#send').getAttribute('aria-label')") == "Stop"
        page.press("Escape")
        page.wait(IDLE)
        assert page.bodies[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
        assert page.run("document.querySelector('#prompt').value") == ""
        # The whole page in the order in which it is read, each stop visibly marked.
        page.run("document.querySelector('.skip').focus()")
        order = []
        for _ in range(40):
            page.press("Tab")
            order.append(page.run(
                "(() => { const n = document.activeElement; return n.id || n.dataset.part || n.parentNode.id })()"
            ))  # fmt: skip
            if order[-1] == "send":
                break
            outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or order[-1] == "prompt", order
        assert order == ["new", "open", "rename", "delete", "clear", "model", "both", "other", "export", "theme",
                         "open-settings", "copy", "edit", "copy", "source", "see", "copy", "source", "see", "again",
                         "prompt", "send"]  # fmt: skip
        peer.delay = 0
        page.run("document.querySelector('[data-part=again]').focus()")
        page.press("Enter")
        page.wait(f"document.querySelector('[data-part=version]').textContent === '2 of 2' && {IDLE}")


def test_a_listener_hears_a_reply_once(browser: Chromium, peer: Peer) -> None:
    peer.models, peer.say, peer.delay = ["sft"], "one two three four five", 0.02
    with opened(browser, peer.url) as page:
        page.run(
            "window.heard = []; new MutationObserver(() => heard.push(document.querySelector('#status').textContent))"
            ".observe(document.querySelector('#status'), {childList: true})"
        )
        ask(page, "hi")
        assert page.run("heard") == ["sft is writing", "sft wrote: one two three four five"]
        page.click("[data-part=again]")  # a reader who sees the same text again is told why
        page.wait(f"document.querySelector('[data-part=version]').textContent === '2 of 2' && {IDLE}")
        assert page.run("document.querySelector('[data-part=hint]').textContent").startswith("The same once more")
        live = "[...document.querySelectorAll('[aria-live]')].map((n) => [n.id, n.ariaLive])"
        assert page.run(live) == [["log", "off"], ["status", "polite"]]
        nameless = page.run(
            "[...document.querySelectorAll('button, input, select, textarea, summary')].filter((n) =>"
            "!(n.ariaLabel || n.textContent.trim() || n.labels?.length)).map((n) => n.outerHTML)"
        )
        assert nameless == []


def test_conversations_are_kept_renamed_and_deleted(browser: Chromium, peer: Peer) -> None:
    with opened(browser, peer.url) as page:
        ask(page, "first question")
        page.click("#new")
        ask(page, "second question")
        assert {c["next"][0]["user"] for c in kept(page)} == {"first question", "second question"}
        page.reload()
        page.wait("document.querySelector('.bubble')?.textContent === 'second question'")
        assert page.run(TEXTS) == ["Hello.", "Hello."]
        titles = "[...document.querySelectorAll('#chats [data-part=open]')].map((n) => n.textContent)"
        assert page.run(titles) == ["second question", "first question"]
        page.click("#chats [data-part=open]", 1)
        assert page.run("document.querySelector('.bubble').textContent") == "first question"
        page.run("document.querySelectorAll('#chats [data-part=rename]')[1].click()")
        page.type("Renamed")
        page.press("Enter")
        assert page.run(titles) == ["second question", "Renamed"]
        page.run("document.querySelectorAll('#chats [data-part=delete]')[1].click()")
        page.press("Escape")  # not after all
        page.wait("!document.querySelector('#confirm').open")
        assert len(kept(page)) == 2
        page.run("document.querySelectorAll('#chats [data-part=delete]')[1].click()")
        page.click("#confirm-yes")
        page.wait("document.querySelectorAll('#chats li').length === 1")
        assert [c["next"][0]["user"] for c in kept(page)] == ["second question"]
        # What others wrote under our names does not break the page.
        page.run("localStorage['sftflow.chat.x'] = '{\"id\": \"x\", \"next\": [7], \"at\": 0}';"
                 "localStorage['sftflow.chat.y'] = '{'; localStorage['sftflow.sampling'] = '[[['")  # fmt: skip
        page.reload()
        page.wait("document.querySelector('#model').value")
        assert page.run(titles) == ["second question"]
        page.click("#clear")
        page.click("#confirm-yes")
        page.wait("document.querySelectorAll('#chats li').length === 0")
        assert kept(page) == []


def test_a_full_storage_is_said(browser: Chromium, peer: Peer) -> None:
    with opened(browser, peer.url) as page:
        page.run(
            "(() => { for (let n = 2 ** 22; n >= 1; n = n >> 1) for (;;) {"
            "try { localStorage['fill' + Math.random()] = 'x'.repeat(n) } catch { break } } })()"
        )
        ask(page, "hi")
        assert "storage is full" in page.run("document.querySelector('#notice').textContent")
        assert page.run(TEXTS) == ["Hello.", "Hello."] and kept(page) == []


def test_errors_are_the_servers_words(browser: Chromium, peer: Peer) -> None:
    with opened(browser, peer.url, refused=8) as page:
        peer.error = (429, "too many requests are waiting; try again soon")
        ask(page, "hi")
        assert page.run("document.querySelector('.error').textContent") == peer.error[1]
        assert page.run("document.querySelector('[data-part=again]').textContent") == "Try again"
        peer.error = None
        peer.reason = None
        page.click("[data-part=again]")
        page.wait(f"document.querySelector('[data-part=version]').textContent === '2 of 2' && {IDLE}")
        assert page.run("document.querySelector('.error').textContent") == "The connection ended before the reply did."
        peer.reason = "stop"
        ask(page, "next")  # what was said so far is the history
        assert [m["content"] for m in page.bodies[-1]["messages"]] == ["hi", "Hello.", "next"]
        # A wrong field is shown where it is, and nothing is sent.
        n = len(page.bodies)
        page.click("#open-settings")
        page.click("[name=top_p]")
        page.type("2")
        page.press("Escape")
        send(page, "hm")
        assert page.run("document.activeElement.name") == "top_p" and len(page.bodies) == n


def test_the_api_key_stays_in_the_tab(browser: Chromium, peer: Peer) -> None:
    peer.key = "sesame"
    with opened(browser, peer.url, refused=2) as page:
        page.wait("document.activeElement.id === 'key'")
        page.type("sesame")
        page.press("Tab")
        page.wait("document.querySelector('#model').value === 'sft'")
        ask(page, "hi")
        assert page.run(TEXTS) == ["Hello.", "Hello."]
        assert page.run("!JSON.stringify(localStorage).includes('sesame')")
        page.reload()
        page.wait("document.querySelector('#model').value === 'sft'")


@pytest.mark.parametrize("kept", [True, False])
def test_below_a_path_of_a_proxy(browser: Chromium, assistant: Assistant, kept: bool) -> None:
    """Whether the proxy passes the path on as it is or takes it off, nothing is asked for above it."""
    app = make_app({"tiny": assistant}, root_path="/a/llm" if kept else "")

    async def takes_it_off(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].removeprefix("/a/llm") if scope["path"].startswith("/a/llm/") else "/none"
        await app(scope, receive, send)

    takes_it_off.state = app.state  # type: ignore[attr-defined]
    with running(app if kept else takes_it_off) as url, opened(browser, f"{url}/a/llm/") as page:
        ask(page, "hi")
        assert page.run("document.querySelector('#model').value") == "tiny" and any(page.run(TEXTS))


def test_the_page_finds_a_server_that_was_started_again(browser: Chromium) -> None:
    with serving() as first:
        first.models, first.delay, first.say = ["sft"], 0.05, "word " * 200
        port, url = first.server_port, first.url
        page = browser.open(url)
        page.wait("document.querySelector('#model').value")
    ask(page, "hi")
    assert page.run("document.querySelector('.error').textContent") == "The server does not answer."
    page.wait("document.querySelector('#notice').textContent.includes('Looking for it')")
    with serving(port) as second:
        second.models = ["new"]
        page.wait("document.querySelector('#notice').hidden && document.querySelector('#model').value === 'new'")
        page.click("[data-part=again]")
        page.wait(f"{IDLE} && document.querySelector('.markdown').textContent === 'Hello.'")


def test_a_phone_never_scrolls_sideways(browser: Chromium, peer: Peer) -> None:
    peer.say = (
        "```\n"
        + "x" * 300
        + "\n```\n\n"
        + "w" * 300
        + "\n\n| "
        + "cell | " * 30
        + "\n|"
        + "---|" * 30
        + "\n\n"
        + "- " * 20
    )
    peer.models = ["a-model-with-a-name-that-is-much-too-long-for-a-phone", "another-one-of-them-that-is-as-long"]
    with opened(browser, peer.url, width=360, height=700) as page:
        fits = "document.documentElement.scrollWidth <= 360 && document.querySelector('main').scrollWidth <= 360"
        assert page.run(fits)
        ask(page, "q" * 300)
        assert page.run(fits)
        box = "document.querySelector('#composer').getBoundingClientRect()"
        assert page.run(f"{box}.right <= 360 && {box}.bottom <= 700")
        for opening, closing in (("#open-settings", "#close-settings"), ("#open-sidebar", "#close-sidebar")):
            page.click(opening)
            assert page.run(f"{fits} && document.querySelector('#stage').inert")
            page.click(closing)
            assert page.run(f"document.activeElement === document.querySelector('{opening}')")
        page.click("[data-part=edit]")
        page.click("[data-part=see]")
        assert page.run(fits)


def test_light_dark_and_the_readers_own_choice(browser: Chromium, peer: Peer) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, peer.url) as page:
        page.dark(False)
        light = page.run(ground)
        page.dark(True)
        dark = page.run(ground)
        assert light != dark
        page.click("#theme")  # light, whatever the system says
        assert page.run(ground) == light
        page.reload()
        assert page.run(ground) == light
        page.click("#theme")
        page.dark(False)
        assert page.run(ground) == dark
        page.click("#theme")
        assert page.run(ground) == light
