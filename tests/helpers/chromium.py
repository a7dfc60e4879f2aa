"""A real Chromium, driven over its DevTools protocol through two pipes: no driver, no port, no dependency.

    with Chromium(profile) as browser:
        page = browser.open("http://127.0.0.1:8008/")
        page.wait("document.querySelector('#model').value")
        page.press("Enter")

Messages are JSON texts that end with a zero byte (Chromium's --remote-debugging-pipe: it reads from file descriptor 3
and writes to 4).
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NONE = "chromium: not on the PATH"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=NONE)

KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowDown": 40, "ArrowUp": 38}


def skip_module_without_chromium() -> None:
    """Skip the whole test module, as one, where there is no browser."""
    if CHROMIUM is None:
        pytest.skip(NONE, allow_module_level=True)


class Chromium:
    def __init__(self, profile: Path) -> None:
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                   "--disable-component-update", "--no-first-run", "--remote-debugging-pipe", "--hide-scrollbars",
                   f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        # Through a shell, which can put any two descriptors at 3 and 4.
        pipes = f'exec "$@" 3<&{there} 4>&{back}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", pipes, "bash", *command],
            pass_fds=(there, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._buffer = b""
        self._number = 0
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
        except (OSError, EOFError, TimeoutError):
            self._process.kill()  # it did not answer
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile go to their page."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def listen(self, seconds: float = 0.0) -> None:
        """Take in the events that have come."""
        deadline = time.monotonic() + seconds
        while b"\0" in self._buffer or select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
            self._next(time.monotonic() + 5)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            piece = os.read(self._read, 1 << 16)
            if not piece:
                raise EOFError("Chromium is gone")
            self._buffer += piece
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        page = self.pages.get(message.get("sessionId", ""))
        if page is not None and "method" in message:
            page.event(message["method"], message["params"])
        return message

    def open(self, url: str, *, width: int = 1280, height: int = 800, downloads: Path | None = None) -> Page:
        """A new tab with a storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        if downloads:
            self.call("Browser.setDownloadBehavior", behavior="allow", browserContextId=context,
                      downloadPath=str(downloads))  # fmt: skip
        self.call("Browser.grantPermissions", browserContextId=context, permissions=["clipboardReadWrite"])
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context)
        self.pages[session] = page
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.go(url)
        return page


class Page:
    """One tab. `problems`: uncaught errors, console errors, dialogs, blocked loads. `requests`: every URL asked for."""

    def __init__(self, browser: Chromium, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.bodies: list[dict[str, Any]] = []  # of the chat completions that were asked for
        self._dialogs = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def event(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            detail = params["exceptionDetails"]
            self.problems.append(str(detail.get("exception", {}).get("description") or detail["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(f"console: {params['args']}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"log: {params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")
        elif method == "Network.requestWillBeSent":
            request = params["request"]
            self.requests.append(request["url"])
            if request["url"].endswith("/v1/chat/completions") and "postData" in request:
                self.bodies.append(json.loads(request["postData"]))

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def reload(self) -> None:
        self.call("Page.reload")
        self.wait("document.readyState === 'complete'")

    def resize(self, width: int, height: int, *, scale: float = 1) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=width < 600)  # fmt: skip

    def dark(self, on: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
                           userGesture=True)  # fmt: skip
        if "exceptionDetails" in answer:
            detail = answer["exceptionDetails"]
            raise RuntimeError(detail.get("exception", {}).get("description") or detail["text"])
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 15) -> Any:
        """Wait until the expression is true; its value."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                value = self.run(f"(() => {{ const found = {script}; return found instanceof Node || found }})()")
            except RuntimeError:  # the page is between two documents
                value = None
            if value:
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {script}; problems: {self.problems}")
            time.sleep(0.02)

    def click(self, selector: str, number: int = 0) -> None:
        """A real click in the middle of the element, by its place on the screen."""
        place = self.run(
            f"(() => {{ const node = [...document.querySelectorAll({json.dumps(selector)})].at({number});"
            "node.scrollIntoView({block: 'nearest'}); const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2, box.width] })()"
        )
        assert place[2] > 0, f"{selector} is not to be seen"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str, *, shift: bool = False) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key],
                  "modifiers": 8 if shift else 0}  # fmt: skip
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def dom_of(page: Path, profile: Path) -> str:
    """What Chromium makes of a page, scripts run: the text of its first <output>."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--allow-file-access-from-files", f"--user-data-dir={profile}", "--window-size=1400,900",
               "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<output>(.+?)</output>", done.stdout)
    assert found, done.stderr[-500:]
    return found[1]
