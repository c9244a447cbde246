"""One HTTP request and its answer, under one deadline and one count of bytes, directly or through a proxy. Knows no API.

httpcore2 speaks HTTP. Its timeouts are for single reads, and it takes in interim answers (1xx), headers and trailers unseen, so
deadline and count hold in the stream beneath it, through which every byte comes.
"""

from __future__ import annotations

import socket
import ssl
import time
import zlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpcore2
import httpx2

from catpo.core.errors import UserError
from catpo.core.proxies import Proxy, trouble_with_certificates

LONGEST = 86_400.0
"""Seconds that an exchange may be given: a day."""
WRITTEN = 65_536
"""Bytes sent before the deadline is looked at again."""


class TooLong(Exception):
    """More bytes came than were allowed, or more come out of the compressed ones."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """With names in lower case."""
    body: bytes


@dataclass
class _Limits:
    """What is left of an exchange."""

    end: float
    room: int
    """Bytes."""

    def seconds(self) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the deadline has passed")
        return left

    def take(self, part: bytes) -> bytes:
        self.room -= len(part)
        if self.room < 0:
            raise TooLong
        return part


_LIMITS: ContextVar[_Limits] = ContextVar("limits")
"""Of the exchange that this thread is in: connections are kept, and serve exchanges of several threads in turn."""


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        limits = _LIMITS.get()
        return limits.take(self._stream.read(max_bytes, limits.seconds()))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), WRITTEN):
            self._stream.write(buffer[start : start + WRITTEN], _LIMITS.get().seconds())

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _LIMITS.get().seconds()))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore2.NetworkBackend):
    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.NetworkStream:
        """A connection to one of the host's addresses, each of which gets its share of the time left."""
        try:
            found = dict.fromkeys(str(address[0]) for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        for number, address in enumerate(found):
            try:
                share = _LIMITS.get().seconds() / (len(found) - number)
                return _Stream(httpcore2.SyncBackend().connect_tcp(address, port, share))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if number == len(found) - 1:
                    raise
        raise httpcore2.ConnectError(f"{host} has no address")


class Line:
    """The way to a server; its connections are kept for the next exchange, and may be used by several threads.

    Args:
        url: the server's, checked by the caller.

    Raises:
        UserError: the environment names a proxy or certificates that cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.proxy = Proxy.of(url)
        is_secure = url.startswith("https:") or (self.proxy is not None and self.proxy.url.startswith("https:"))
        context = _ssl_context() if is_secure else None
        self._pool = httpcore2.ConnectionPool(
            ssl_context=context,
            proxy=_as_library(self.proxy, context) if self.proxy else None,
            max_connections=None,
            keepalive_expiry=5.0,
            network_backend=_Backend(),
        )

    @property
    def advice(self) -> str:
        """What to do if the proxy is at fault; empty without one."""
        return self.proxy.advice if self.proxy else ""

    def post(self, url: str, content: bytes, headers: Mapping[str, str], *, seconds: float, limit: int) -> Answer:
        """The answer to a POST, however it ends, if it is complete in `seconds` and has up to `limit` bytes with all overhead.

        Raises:
            TooLong: it is longer, as it comes or decompressed.
            httpcore2.TimeoutException: it was not complete in time; its siblings for other faults of the network.
            zlib.error: it is compressed, and damaged.
        """
        token = _LIMITS.set(_Limits(time.monotonic() + seconds, limit))
        asked = [("Accept", "*/*"), ("Accept-Encoding", "identity"), ("User-Agent", "catpo"), *headers.items()]
        try:
            with self._pool.stream("POST", url, headers=asked, content=content) as response:
                body = b"".join(response.iter_stream())
        finally:
            _LIMITS.reset(token)
        got = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        return Answer(response.status, got, _decoded(body, got.get("content-encoding", ""), limit))


def _decoded(body: bytes, encoding: str, limit: int) -> bytes:
    """The body of a server that compresses although it was asked not to."""
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate") or not body:
        return body
    packed = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, as the header says
    text = packed.decompress(body, limit + 1)
    if len(text) > limit:
        raise TooLong
    if not packed.eof:
        raise zlib.error("it is cut off")
    return text


def _as_library(proxy: Proxy, context: ssl.SSLContext | None) -> httpcore2.Proxy:
    login = (proxy.login[0].encode(), proxy.login[1].encode()) if proxy.login else None
    return httpcore2.Proxy(proxy.url, auth=login, ssl_context=context if proxy.url.startswith("https:") else None)


def _ssl_context() -> ssl.SSLContext:
    """The certificates that are trusted: the system's, or those of SSL_CERT_FILE or SSL_CERT_DIR."""
    if trouble := trouble_with_certificates():
        raise UserError(trouble)
    try:
        return httpx2.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or error
        raise UserError(f"the trusted certificates cannot be read ({reason}). Correct or unset SSL_CERT_FILE.") from error
