"""The Hugging Face hub, as far as pushing a model needs it, on this machine."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def fake_hub(monkeypatch, *, takes_uploads=True, holds=None):
    """A hub on this machine; yields the paths it was asked for, with what was sent.

    `holds` is what it has of the repository already, e.g. {"private": False}; by default there is none.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(404 if holds is None else 200, {"id": "me/mine", "siblings": [], **(holds or {})})

        def do_POST(self):
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, sent))
            if "preupload" in self.path:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(sent)["files"]
                ]
                answer = {"files": files}
            elif "/commit/" in self.path:
                answer = {"commitUrl": f"{url}/me/mine/commit/1", "commitOid": "1" * 40}
            else:
                answer = {"url": f"{url}/me/mine", "name": "me/mine"}
            self.answer(200 if takes_uploads or "create" in self.path else 403, answer)

        def answer(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield asked
    server.shutdown()
