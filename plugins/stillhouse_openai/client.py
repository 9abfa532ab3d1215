"""Requests to a server: time-outs, repeated tries, a rate limit, and errors that say what to do."""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from stillhouse.api import ConfigError, DataError

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not meet."""
_LONGEST_WAIT = 60.0
_LARGEST_ANSWER = 512 * 2**20


class ServerError(DataError):
    """A server that could not be reached, refused, or gave an answer that can't be used."""


class _Passing(Exception):
    """A failure that may pass, with the seconds that the server asks to wait."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send prompts and key elsewhere."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        return None


@dataclass(frozen=True)
class Settings:
    """Where and how to ask.

    url
        Up to and with the version: ``http://localhost:8000/v1``.
    timeout
        Seconds for one answer, from the request to its last byte.
    retries
        Further tries after a failure that may pass: no connection, a time-out, too many requests, an error of the server.
    per_second
        Most requests that are begun in a second; 0: no limit.
    """

    url: str
    key: str = ""
    timeout: float = 60.0
    retries: int = 5
    per_second: float = 0.0


class Client:
    """JSON in, JSON out. Several threads may use one."""

    def __init__(self, settings: Settings) -> None:
        if not settings.url.startswith(("http://", "https://")):
            raise ConfigError(f"teacher.url: got '{settings.url}'; expected http://HOST:PORT/v1")
        self.settings = settings
        self._url = settings.url.rstrip("/")
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._lock = threading.Lock()
        self._next = 0.0
        self._jitter = random.Random()  # noqa: S311 not the run's generator, which must not be moved

    def __deepcopy__(self, memo: Any) -> Client:
        return self

    def ask(self, path: str, content: Any = None) -> dict[str, Any]:
        """GET, or POST where there is content; the answer's JSON object. Raises ServerError."""
        problem = ""
        for attempt in range(self.settings.retries + 1):
            self._wait_for_turn()
            try:
                return self._once(f"{self._url}/{path}", content)
            except _Passing as error:
                problem = str(error)
                if attempt < self.settings.retries:
                    usual = 0.25 * 2**attempt * (1 + self._jitter.random())
                    sleep(min(_LONGEST_WAIT, usual if error.wait is None else error.wait))
        raise ServerError(
            f"{self._url}/{path}: {problem}, {self.settings.retries + 1} times; expected an answer: is the server up, and "
            "teacher.timeout long enough?"
        )

    def _wait_for_turn(self) -> None:
        if not self.settings.per_second:
            return
        with self._lock:
            now = monotonic()
            turn = max(now, self._next)
            self._next = turn + 1 / self.settings.per_second
        sleep(turn - now)

    def _once(self, url: str, content: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url, data, headers)  # noqa: S310 the scheme was looked at
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as answer:
                raw = self._read(answer)
        except urllib.error.HTTPError as error:
            said = _excerpt(_quietly(error))
            if error.code in _PASSING:
                raise _Passing(
                    f"status {error.code} ({said})", _seconds(error.headers.get("Retry-After"))
                ) from None
            raise ServerError(
                f"{url}: status {error.code}: {said}; expected an answer: {_advice(error.code)}"
            ) from None
        except (
            TimeoutError,
            urllib.error.URLError,
            ConnectionError,
            http.client.HTTPException,
            OSError,
        ) as error:
            raise _Passing(_why(error, self.settings.timeout)) from None
        return _object(url, raw)

    def _read(self, answer: Any) -> bytes:
        """The body, all of it within the time-out: a server that drips would never meet that of the socket."""
        end = monotonic() + self.settings.timeout
        parts, size = [], 0
        while part := answer.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > _LARGEST_ANSWER:
                raise ServerError(
                    f"{self._url}: the answer is above {_LARGEST_ANSWER >> 20} MiB; lower teacher.k"
                )
            if monotonic() > end:
                raise TimeoutError
        missing = answer.length
        if missing:
            raise http.client.IncompleteRead(b"", missing)
        return b"".join(parts)


def _object(url: str, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise ServerError(
            f"{url}: the answer is no JSON ({_excerpt(raw)}); expected an OpenAI-compatible server: mend teacher.url"
        ) from None
    if not isinstance(found, dict):
        raise ServerError(
            f"{url}: the answer is a JSON {type(found).__name__}; expected an object: mend teacher.url"
        )
    return found


def _quietly(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(2000)
    except (OSError, http.client.HTTPException):
        return b""


def _excerpt(raw: bytes) -> str:
    """The server's own words, in a line."""
    try:
        found = json.loads(raw)
        found = found.get("error", found)
        text = str(found.get("message", found)) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError, RecursionError):
        text = raw.decode("utf-8", "replace")
    return " ".join(text.split())[:200] or "nothing said"


def _advice(status: int) -> str:
    if status in (401, 403):
        return "name the environment variable that holds the key: teacher.api_key_env"
    if status == 404:
        return "mend teacher.url or teacher.model"
    if 300 <= status < 400:
        return "give the address that it points to as teacher.url; redirects are not followed"
    return "lower teacher.k to what the server allows (vLLM: --max-logprobs), or shorten the texts"


def _why(error: BaseException, timeout: float) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(reason, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(reason, http.client.IncompleteRead | http.client.RemoteDisconnected | ConnectionError):
        return "the connection broke off"
    return str(reason) or type(reason).__name__


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
