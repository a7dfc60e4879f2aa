"""Questions to a model behind an OpenAI-compatible endpoint: one client, several threads, bounded patience.

503, 429, no connection     asked again, after Retry-After where the server says so, at most TRIES times
401, 403, 404, a redirect   the end: no later question will do better
400, 413, 500, a time-out, no chat completion   this question has no reply (as the very first one, the end)
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sftflow.foundation.errors import SftflowError

TRIES = 6
MAX_WAIT = 60.0
"""seconds between two tries, whatever the server asks for"""
BUSY = (429, 502, 503, 504, 529)
LOST = (401, 403, 404, 405, 410)


class JudgeError(SftflowError):
    """The judge cannot be asked: its address, key or model is wrong, or it is not there."""


class NoReply(Exception):
    """This one question has no reply; the text says why."""


def endpoint(url: str) -> httpx.URL:
    """Where chat completions are asked for.

    >>> str(endpoint("http://127.0.0.1:8008")), str(endpoint("https://x.org/api/v1/"))
    ('http://127.0.0.1:8008/v1/chat/completions', 'https://x.org/api/v1/chat/completions')
    """
    try:
        found = httpx.URL(url.strip())
    except httpx.InvalidURL:
        found = httpx.URL("")
    if found.scheme not in ("http", "https") or not found.host:
        raise JudgeError("--judge", "not an http address", "write for example http://127.0.0.1:8000/v1")
    path = found.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return found.copy_with(path=path)


def url_without_secrets(url: httpx.URL) -> str:
    """The address for files and messages: user, password and query may be secrets."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


class JudgeClient:
    """Asks one model single questions at temperature 0. `ask` may be called from several threads.

    temperature: None after `probe` has found a model that takes none but its own.
    """

    def __init__(self, url: httpx.URL, model: str, api_key: str | None, timeout: float, max_tokens: int) -> None:
        self.url, self.model, self.timeout = url, model, timeout
        self.place = f"--judge {url_without_secrets(url)}"
        self.temperature: float | None = 0.0
        self._limit = {"max_tokens": max_tokens}
        self._key = (api_key or "").strip()
        if not self._key.isascii() or not all(c.isprintable() and c != " " for c in self._key):
            raise JudgeError("SFTFLOW_JUDGE_KEY", "it holds characters that no key has", "copy it again")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers["Content-Type"] = "application/json"
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=min(timeout, 15.0)))
        self._stopped = threading.Event()
        self._proven = False

    def close(self) -> None:
        self.stop()
        self._http.close()

    def stop(self) -> None:
        """Whoever waits to ask again stops waiting."""
        self._stopped.set()

    def probe(self) -> None:
        """One tiny question, so that a wrong address, key or model shows at once, and what the model does not take is
        left out. Raises JudgeError."""
        for _ in range(3):
            try:
                self._complete("Answer with the one word: ready")
                break
            except NoReply as error:
                message = str(error)
                if "max_completion_tokens" in message and "max_tokens" in self._limit:
                    self._limit = {"max_completion_tokens": self._limit["max_tokens"]}
                elif "temperature" in message and self.temperature is not None:
                    self.temperature = None
                else:
                    at_fault = message.startswith("HTTP 5")
                    remedy = (
                        "see the server's log, or try again later" if at_fault else "check the address and the server"
                    )
                    raise JudgeError(self.place, message, remedy) from None
        self._proven = True

    def ask(self, text: str) -> tuple[str | None, str | None]:
        """(the reply, None), or (None, why there is none)."""
        try:
            reply, finish = self._complete(text)
        except NoReply as error:
            return None, str(error)
        if finish == "length":
            return None, f"its reply was cut off after {max(self._limit.values()):,} tokens"
        return reply, None

    def _complete(self, text: str) -> tuple[str, str]:
        """(text, finish reason) of the completion. Raises NoReply, JudgeError."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": text}], **self._limit}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        response = self._post(json.dumps(body).encode())
        message = self._server_message(response)
        self._raise_for(response, message)
        try:
            data = response.json()
            choice = data["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise NoReply(f"the answer is no chat completion ({message})") from None
        if isinstance(content, list):  # parts
            content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
        return str(content or ""), str(choice.get("finish_reason"))

    def _raise_for(self, response: httpx.Response, message: str) -> None:
        status = response.status_code
        if status == 200:
            return
        fact = f"HTTP {status}: {message}"
        if status in (401, 403):
            raise JudgeError(
                self.place,
                f"the API key is missing or wrong ({fact})",
                "set SFTFLOW_JUDGE_KEY to the key of this server",
            )
        if status == 404 and "model" in message.lower():
            raise JudgeError(self.place, f"no model {self.model!r} there ({fact})", "check --judge-model")
        if status in LOST:
            raise JudgeError(
                self.place,
                f"no chat completions there ({fact})",
                "check the address, most often one that ends in /v1, and what runs there",
            )
        if 300 <= status < 400:
            target = response.headers.get("location", "elsewhere")
            raise JudgeError(self.place, f"it sends on to {target}", "give that address")
        if status in BUSY:
            raise JudgeError(
                self.place, f"it is too busy, also after {TRIES} tries ({fact})", "see what it says, or try again later"
            )
        raise NoReply(fact)

    def _post(self, body: bytes) -> httpx.Response:
        """The first answer that is not "busy", or the last one."""
        for tried in range(1, TRIES + 1):
            wait = min(0.5 * 2**tried, MAX_WAIT)
            try:
                response = self._http.post(self.url, content=body)
            except httpx.TimeoutException as error:
                if isinstance(error, httpx.ConnectTimeout):
                    raise JudgeError(self.place, "it does not answer", "check the address and the network") from None
                raise NoReply(f"no answer within {self.timeout:g} seconds") from None
            except (httpx.HTTPError, OSError) as error:
                if tried == TRIES or not self._proven:
                    why = str(error) or type(error).__name__
                    remedy = "check the address, and that it runs there"
                    raise JudgeError(self.place, f"cannot be reached ({why})", remedy) from None
            else:
                if response.status_code not in BUSY or tried == TRIES or "insufficient_quota" in response.text:
                    return response
                wait = min(retry_after(response.headers.get("retry-after"), wait), MAX_WAIT)
            if self._stopped.wait(wait):
                break
        raise NoReply("the judging was stopped")

    def _server_message(self, response: httpx.Response) -> str:
        """What the server says, in one line of at most 200 characters, without the key."""
        try:
            message: Any = response.json()
        except ValueError:
            message = response.text
        for key in ("error", "message", "detail"):
            if isinstance(message, dict) and message.get(key):
                message = message[key]
        text = " ".join((message if isinstance(message, str) else json.dumps(message)).split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= 200 else text[:197] + "..."


def retry_after(header: str | None, otherwise: float) -> float:
    """Seconds to wait, from seconds or a date.

    >>> retry_after("7", 1.0), retry_after("soon", 1.0), retry_after("-1", 1.0)
    (7.0, 1.0, 0.0)
    """
    with suppress(ValueError):
        return max(0.0, float(header or ""))
    with suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(header or "").timestamp() - time.time())
    return otherwise
