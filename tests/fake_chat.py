"""A chat server on 127.0.0.1 that answers from a script and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    """Nothing is sent before it is set."""


def completion(text: str | None, *, model: str = "judge-0613", **choice: Any) -> Answer:
    message = {"role": "assistant", "content": text}
    body = {"model": model, "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}
    return Answer(body=json.dumps(body).encode())


@dataclass
class FakeChat:
    """The running server."""

    url: str
    reply: Callable[[dict[str, Any]], Answer] | None
    script: list[Answer] = field(default_factory=list)
    """Answers to the next requests; when used up, `reply` answers."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serve(*script: Answer, reply: Callable[[dict[str, Any]], Answer] | None = None) -> Iterator[FakeChat]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                chat.asked.append({"path": self.path, **request})
                chat.headers.append(dict(self.headers))
                answer = chat.script.pop(0) if chat.script else (chat.reply or unexpected)(request)
            if answer.hold:
                answer.hold.wait(30)
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)
            except OSError:  # the client has gone
                pass

        def log_message(self, *_: object) -> None:
            pass

    def unexpected(_: object) -> Answer:
        return Answer(418, b"the script is over")

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    chat = FakeChat(f"http://127.0.0.1:{server.server_port}/v1", reply, list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
