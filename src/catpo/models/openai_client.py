"""Client of an OpenAI-compatible server: a conversation in, a text out. Knows nothing of judges, benchmarks or pictures.

The key is read from OPENAI_API_KEY for each request and goes into that request's header only: no attribute holds it, and it is
redacted in whatever a server sends back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2

from catpo.core.errors import UserError

DEFAULT_URL = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed later."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever the server asks for."""
SECRET_LENGTH = 12
"""A shorter key, such as the EMPTY that local servers accept, is no secret and may be a word of an answer."""


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
        timeout: seconds that a whole answer may take.
        retries: how often a request is sent again, after 1, 2, 4, … seconds or as `Retry-After` says.
        reply_limit: size in bytes of the longest accepted reply.
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
        self._client = httpx2.Client(timeout=timeout, follow_redirects=False)  # shared by threads

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
                    self.sleep(min(LONGEST_WAIT, 2.0**attempt if busy.wait is None else busy.wait))
        raise UserError(
            f"{self.url} did not answer in {self.retries + 1} tries; the last time: {last}. Earlier answers are kept: "
            "give the same command again."
        )

    def _post(self, body: Mapping[str, Any]) -> bytes:
        """The body of a successful response."""
        content, headers = json.dumps(body).encode("ascii"), {"Content-Type": "application/json", **_authorization()}
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", content=content, headers=headers) as response:
                answer = self._receive(response)
                if response.is_success:
                    return answer
        except httpx2.TimeoutException as error:
            raise _Busy(f"no answer within {self.timeout:g} s") from error
        except httpx2.ConnectError as error:
            raise UserError(f"{self.url} cannot be reached ({_shown(error)}). Start the server, or correct the URL.") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Busy(f"the connection broke ({_shown(error)})") from error
        raise self._refusal(response, answer)

    def _receive(self, response: httpx2.Response) -> bytes:
        deadline, received = time.monotonic() + self.timeout, bytearray()
        for part in response.iter_bytes():
            received += part
            if len(received) > self.reply_limit:
                raise UserError(f"{self.url} sent more than {self.reply_limit:,} bytes as one answer. Is it a chat server?")
            if time.monotonic() > deadline:
                raise _Busy(f"the answer was not complete within {self.timeout:g} s")
        return bytes(received)

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

    def _refusal(self, response: httpx2.Response, content: bytes) -> Exception:
        """The error for a status: worth another try, or with what the user can do."""
        status, reason = response.status_code, _reason(content)
        if status in RETRIED and "insufficient_quota" not in reason:
            return _Busy(f"status {status} {reason}".strip(), _seconds(response.headers.get("Retry-After")))
        said = f"(status {status}: {reason})"
        if status in (401, 403):
            key = "another key" if os.environ.get(KEY) else "the key"
            return UserError(f"{self.url}: authentication failed {said}. Set {key} in the environment variable {KEY}.")
        if status == 404:
            return UserError(f"{self.url} has no model '{self.model}' {said}. `curl {self.url}/models` lists those it has.")
        if response.is_redirect:
            return UserError(f"{self.url} has moved {said}. Give the new URL; redirects are not followed, to protect the key.")
        return UserError(f"{self.url} refuses the request {said}. Correct the options of '{self.model}'.")


def _checked_url(text: str) -> str:
    """The URL up to `/v1`.

    Raises:
        UserError: it is not a URL, or it holds a secret, which is not repeated.
    """
    try:
        parts = urlsplit(text.strip())
        has_secret = bool(parts.username or parts.password or parts.query)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_secret, is_address = "@" in text, False
    if has_secret:
        raise UserError(f"the server's URL holds a password or a query, which would be stored. Set the key in {KEY} instead.")
    if not is_address:
        raise UserError(f"'{text}' is not the URL of a server. Give one such as http://localhost:8000/v1.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _authorization() -> dict[str, str]:
    key = os.environ.get(KEY, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY} holds characters that no key has, such as line breaks or accents. Set it again.")
    return {"Authorization": f"Bearer {key}"}


def _without_secret(text: str) -> str:
    key = os.environ.get(KEY, "").strip()
    return text.replace(key, "[key]") if len(key) >= SECRET_LENGTH else text


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
