"""Client of an OpenAI-compatible server: a conversation in, a text out. Knows nothing of judges, benchmarks or pictures.

The key is read from OPENAI_API_KEY for each request and goes into that request's header only: no attribute holds it, and it is
redacted in whatever a server sends back.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import httpcore2

from catpo.core.errors import UserError
from catpo.models.exchange import Answer, Line, TooLong
from catpo.models.redaction import without_key

DEFAULT_URL = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed later."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever the server asks for."""


@dataclass(frozen=True)
class Reply:
    """A server's answer."""

    text: str
    model: str
    """The model as the server names it; may be more specific than the one in the request."""


class _Busy(Exception):
    """The request is worth another try."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class ChatServer:
    """A model behind an OpenAI-compatible server: OpenAI, vLLM, SGLang, `transformers serve`.

    Args:
        model: name of the model at the server.
        base_url: the server's address up to `/v1`; OPENAI_BASE_URL or OpenAI's own if empty.
        timeout: seconds that an answer may take, from looking up the server's address to the last byte.
        retries: how often a request is sent again, after 1, 2, 4, … seconds or as `Retry-After` says.
        reply_limit: bytes of the longest accepted reply, with headers and all that comes before it; and decompressed.
        sleep: waits; for tests.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        reply_limit: int = 1_000_000,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.model = model
        self.url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL)
        self.timeout, self.retries, self.reply_limit, self.sleep = timeout, retries, reply_limit, sleep
        self._line = Line(self.url)  # shared by threads

    @property
    def called(self) -> str:
        """The server, and the proxy that leads to it, for messages."""
        return f"{self.url} (through {self._line.proxy.variable})" if self._line.proxy else self.url

    def ask(self, messages: Sequence[Mapping[str, Any]], **decoding: Any) -> Reply:
        """The answer to a conversation; `decoding` is sent unchanged, e.g. temperature=0.0.

        Raises:
            UserError: the server cannot be reached, refuses, or is still busy after all retries.
        """
        body = {"model": self.model, "messages": list(messages), **decoding}
        for attempt in range(self.retries + 1):
            try:
                return self._read(self._post(body))
            except _Busy as busy:
                last = busy
                if attempt < self.retries:
                    self.sleep(min(LONGEST_WAIT, 2.0 ** min(attempt, 6) if busy.wait is None else busy.wait))
        raise UserError(
            f"{self.called} did not answer in {self.retries + 1} tries; the last time: {last}. Earlier answers are kept: "
            "give the same command again."
        )

    def _post(self, body: Mapping[str, Any]) -> bytes:
        """The body of a successful response."""
        content, headers = json.dumps(body).encode("ascii"), {"Content-Type": "application/json", **_authorization()}
        try:
            answer = self._line.post(
                f"{self.url}/chat/completions", content, headers, seconds=self.timeout, limit=self.reply_limit
            )
        except Exception as error:  # whatever a hostile server makes of HTTP
            text = str(error)  # may quote a header
            raise self._failure(error) from (error if _without_secret(text) == text else None)
        if 200 <= answer.status < 300:
            return answer.body
        raise self._refusal(answer)

    def _failure(self, error: Exception) -> Exception:
        """The error for an exchange that did not come to an end."""
        said = _shown(error) or type(error).__name__
        if isinstance(error, TooLong):
            return UserError(f"{self.called} sent more than {self.reply_limit:,} bytes as one answer. Is it a chat server?")
        if isinstance(error, httpcore2.TimeoutException):
            return _Busy(f"no complete answer within {self.timeout:g} s")
        if isinstance(error, httpcore2.ConnectError):
            advice = self._line.advice or "Start the server, or correct the URL."
            if "CERTIFICATE" in said:
                advice = "If you trust the server, name a file with its certificate in SSL_CERT_FILE."
            return UserError(f"{self.called} cannot be reached ({said}). {advice}")
        if isinstance(error, httpcore2.ProxyError) and said[:1] != "5":  # 502 and its like may pass
            return UserError(f"{self.called}: the proxy refuses ({said}). {self._line.advice}")
        if isinstance(error, zlib.error):
            return _Busy(f"its answer cannot be decompressed ({said})")
        return _Busy(f"the connection broke ({said})")

    def _read(self, content: bytes) -> Reply:
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise _Busy(f"it sent no chat completion ({_shown(content.decode('utf-8', 'replace'))})") from error
        if text is None:  # a refusal has its own field
            text = choice["message"].get("refusal") or ""
        if not isinstance(text, str):
            raise _Busy(f"it sent no text ({_shown(text)})")
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair could not be written to a file
        return Reply(_without_secret(text), _shown(answer.get("model") or self.model))

    def _refusal(self, answer: Answer) -> Exception:
        """The error for a status: worth another try, or with what the user can do."""
        status, reason = answer.status, _reason(answer.body)
        if status in RETRIED and "insufficient_quota" not in reason:
            return _Busy(f"status {status} {reason}".strip(), _seconds(answer.headers.get("retry-after")))
        said = f"(status {status}: {reason})"
        if status in (401, 403):
            key = "another key" if os.environ.get(KEY) else "the key"
            return UserError(f"{self.called}: authentication failed {said}. Set {key} in the environment variable {KEY}.")
        if status == 404:
            return UserError(f"{self.called} has no model '{self.model}' {said}. `curl {self.url}/models` lists those it has.")
        if status == 407:
            return UserError(f"{self.called}: the proxy asks for a user name and password {said}. {self._line.advice}")
        if status in (301, 302, 303, 307, 308) and "location" in answer.headers:
            return UserError(
                f"{self.called} has moved {said}. Give the new URL; redirects are not followed, to protect the key."
            )
        return UserError(f"{self.called} refuses the request {said}. Correct the options of '{self.model}'.")


def _checked_url(text: str) -> str:
    """The URL up to `/v1`.

    Raises:
        UserError: it is not a URL, or it holds a secret, which is not repeated.
    """
    text = text.strip()
    try:
        parts = urlsplit(text)
        has_secret = bool(parts.username or parts.password or parts.query)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
        server = parts.netloc.encode("idna").decode("ascii")
    except ValueError:  # UnicodeError for a host such as a..b
        has_secret, is_address = "@" in text, False
    if has_secret:
        raise UserError(f"the server's URL holds a password or a query, which would be stored. Set the key in {KEY} instead.")
    if not is_address:
        raise UserError(f"'{_shown(text)}' is not the URL of a server. Give one such as http://localhost:8000/v1.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, server, quote(path, safe="/%:@!$&'()*+,;=~"), "", ""))


def _authorization() -> dict[str, str]:
    key = os.environ.get(KEY, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY} holds characters that no key has, such as line breaks or accents. Set it again.")
    return {"Authorization": f"Bearer {key}"}


def _without_secret(text: str) -> str:
    return without_key(text, os.environ.get(KEY, "").strip())


def _shown(text: object) -> str:
    """A server's text for a message: short, on one line, without the key."""
    line = " ".join(_without_secret(str(text)).split())
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= 200 else line[:197] + "..."


def _reason(content: bytes) -> str:
    """What went wrong according to the server: code and message if it follows OpenAI's format, else its text."""
    text = content.decode("utf-8", "replace")
    try:
        error = json.loads(text)
        error = error.get("error", error)
        words = [error.get("code"), error.get("message") or error.get("detail")]
    except (ValueError, RecursionError, AttributeError):
        return _shown(text)
    return _shown(" ".join(str(word) for word in words if word) or text)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds to wait; None for a date."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
