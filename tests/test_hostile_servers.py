"""Judges and served models that are slow, silent, broken or endless, and an API key that must never leak."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catpo.core.errors import UserError
from catpo.data.pair_folder import write_pairs
from catpo.models.openai_client import ChatServer
from commands import run
from fake_chat import Answer, completion, serve
from report_fixtures import make_pairs

CANARY = "sk-canary-0123456789abcdef"
QUESTION = {
    "question": "What is on the mat?", "gt_answer": "A dog.", "question_type": "attribute", "image_id": "a",
    "image_src": "a.jpg", "image_content": ["dog", "mat"], "model_answer": "A cat.",
}  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def judged(url: str, *, timeout: float = 0.3, retries: int = 0, output: str = "out") -> list[Any]:
    """Answers to MMHal-Bench's first question, graded by the judge at an address."""
    folder = Path("official/mmhal")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "response_template.json").write_text(json.dumps([QUESTION]))
    Path("answers.json").write_text(json.dumps([QUESTION]))
    judge = f"openai(model='judge', base_url={url!r}, timeout={timeout}, retries={retries})"
    return ["evaluate", "--benchmarks", "mmhal", "--data", "official", "--answers", "answers.json", "--judge", judge,
            "--output", output]  # fmt: skip


@contextmanager
def raw(talk: Callable[[socket.socket, threading.Event], None], *, reads: bool = True) -> Iterator[str]:
    """A server that reads a request, unless `reads` is False, and does what `talk` does, until the end of the test."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                if reads:
                    connection.recv(65536)
                talk(connection, over)
            except OSError:  # the client has gone
                pass

    def listen() -> None:
        while not over.is_set():
            try:
                connections.append(listener.accept()[0])
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=answer, args=connections[-1:]))
            threads[-1].start()

    connections: list[socket.socket] = []
    threads = [threading.Thread(target=listen)]
    threads[0].start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        over.set()
        threads[0].join()
        for connection in connections:
            with suppress(OSError):  # it is closed
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads[1:]:
            thread.join()
        listener.close()


def never(connection: socket.socket, over: threading.Event) -> None:
    over.wait()


GZIP = HEAD + b"Content-Encoding: gzip\r\nContent-Length: 100000000\r\n\r\n\x1f\x8b\x08\x08\0\0\0\0\0\x03"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WITHOUT_END = {
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "header": (HEAD + b"X-More: ", b"x"),
    "headers": (HEAD, b"X: y\r\n"),
    "interim answers": (b"", b"HTTP/1.1 102 Processing\r\nX: " + b"y" * 300 + b"\r\n\r\n"),
    "interim headers": (b"HTTP/1.1 103 Early Hints\r\n", b"Link: </>\r\n"),
    "body": (HEAD + b"Content-Length: 100000000\r\n\r\n", b" "),
    "body of no length": (HEAD + b"\r\n", b" "),
    "file name of gzip": (GZIP, b"x"),
    "chunks": (CHUNKED, b"c8\r\n" + b" " * 200 + b"\r\n"),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "body of a refusal": (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 100000000\r\n\r\n", b" "),
}
"""What a server sends first, and then over and over."""


def drip(begin: bytes, again: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(begin)
        while not over.wait(0.02):
            connection.sendall(again)

    return talk


def flood(begin: bytes, again: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(begin)
        while not over.is_set():
            connection.sendall(again * (60_000 // len(again)))

    return talk


def half_a_body(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"choices": [')


def no_http(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


@pytest.mark.parametrize(
    ("talk", "reason"),
    [(never, "no complete answer within 0.3 s"), (half_a_body, "the connection broke"), (no_http, "the connection broke")],
)
def test_a_judge_that_does_not_answer_is_given_up_with_item_reason_and_next_step(
    talk: Callable[..., None], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with raw(talk) as url:
        assert run(*judged(url)) == 2
    message = capsys.readouterr().err
    assert "mmhal/0" in message and reason in message and "Traceback" not in message
    assert "give the same command again" in message or "Is it a chat server?" in message
    assert not Path("out/scores.json").exists() and not list(Path("out").glob("*.part"))


@pytest.mark.parametrize("part", WITHOUT_END)
def test_a_server_that_sends_any_part_of_an_answer_without_end_is_given_up_in_time(part: str) -> None:
    with raw(drip(*WITHOUT_END[part])) as url:
        server, begin = ChatServer("m", base_url=url, timeout=0.3, retries=0), time.monotonic()
        with pytest.raises(UserError, match="no complete answer within 0.3 s"):
            server.ask([])
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("part", WITHOUT_END)
def test_no_more_than_a_megabyte_is_taken_of_any_part_of_an_answer(part: str) -> None:
    tracemalloc.start()
    with raw(flood(*WITHOUT_END[part])) as url, pytest.raises(UserError, match="more than 1,000,000 bytes|connection broke"):
        ChatServer("m", base_url=url, timeout=60.0, retries=0).ask([])
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_small_answer_that_decompresses_to_a_large_one_is_given_up() -> None:
    packed = {"gzip": gzip.compress(bytes(50_000_000)), "deflate": zlib.compress(bytes(50_000_000)), "br": bytes(50_000)}
    for encoding, body in packed.items():
        with serve(Answer(200, body, {"Content-Encoding": encoding})) as chat:
            with pytest.raises(UserError, match="more than 1,000,000 bytes|no chat completion"):
                ChatServer("m", base_url=chat.url, retries=0).ask([])
            assert chat.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_an_answer_is_read_though_the_server_compresses_it_unasked(encoding: str) -> None:
    body = completion("Rating: 4").body
    packed = {"gzip": gzip.compress(body), "deflate": zlib.compress(body), "identity": body}[encoding]
    with serve(Answer(200, packed, {"Content-Encoding": encoding}), Answer(200, packed[:-3], {"Content-Encoding": encoding}),
               Answer(200, b"not packed", {"Content-Encoding": encoding})) as chat:  # fmt: skip
        server = ChatServer("m", base_url=chat.url, retries=0)
        assert server.ask([]).text == "Rating: 4"
        for _ in range(2):
            with pytest.raises(UserError, match="cannot be decompressed|no chat completion"):
                server.ask([])


def test_a_server_that_reads_nothing_or_does_not_answer_the_handshake_is_given_up_in_time() -> None:
    def reads_nothing(connection: socket.socket, over: threading.Event) -> None:
        over.wait()

    with raw(reads_nothing) as url:
        for address, text in ((url, "x" * 30_000_000), (url.replace("http:", "https:"), "x")):
            begin = time.monotonic()
            with pytest.raises(UserError, match="no complete answer within 0.5 s"):
                ChatServer("m", base_url=address, timeout=0.5, retries=0).ask([{"role": "user", "content": text}])
            assert time.monotonic() - begin < 3


def test_the_addresses_of_a_host_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that do not answer (the network reserved for tests, RFC 5737), and one that does."""
    with serve(completion("here")) as chat:
        port = int(chat.url.rsplit(":")[-1].removesuffix("/v1"))
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("192.0.2.1", "192.0.2.2", "127.0.0.1")]
        monkeypatch.setattr("catpo.models.exchange.socket.getaddrinfo", lambda *_, **__: found)
        assert ChatServer("m", base_url=f"http://many.example:{port}/v1", timeout=1.5, retries=0).ask([]).text == "here"
        assert chat.headers[0]["Host"] == f"many.example:{port}"


FRAGMENTS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0 500\r\n", b"HTTP/1.1 101 Go\r\n",
        b"HTTP/1.1 204 No\r\n", b"HTTP/2 200\r\n", b"HTTP/1.1 307 X\r\nLocation: //x\r\n",
        b"HTTP/1.1 429 Wait\r\nRetry-After: nan\r\n", b"\r\n", b"\n", b"\r\n\r\n", b"Content-Length: 5\r\n",
        b"Content-Length: 99999999999999999999\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n", b"Content-Encoding: gzip\r\n", b"Content-Encoding: x\r\n", b"Connection: close\r\n",
        b"0\r\n", b"5\r\nhello\r\n", b"ffffffffffffffffffff\r\n", gzip.compress(b"{}"), b"\x1f\x8b\x08\x08",
        completion("yes").body, b'{"choices": [{"message": null}]}', b"[" * 3000, b"\x16\x03\x01\x02\0", CANARY.encode(),
    ]
) | st.binary(max_size=20)  # fmt: skip
PLAIN = st.tuples(st.just(b"HTTP/1.1 200 OK\r\n"), st.lists(FRAGMENTS, max_size=3).map(b"".join), st.just(b"\r\n"))


@pytest.fixture(scope="module")
def says() -> Iterator[tuple[str, list[bytes]]]:
    """A server's address, and what it says to whoever asks next before it hangs up; to be changed."""
    words = [b""]
    with raw(lambda connection, _: connection.sendall(words[0])) as url:
        yield url, words


@pytest.mark.nightly
@given(head=st.just(()) | PLAIN, parts=st.lists(FRAGMENTS, max_size=8))
def test_whatever_a_server_says_is_a_reply_or_a_message_without_the_key(
    says: tuple[str, list[bytes]], head: tuple[bytes, ...], parts: list[bytes]
) -> None:
    url, says[1][0] = says[0], b"".join([*head, *parts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", CANARY)
        try:
            said = ChatServer("m", base_url=url, timeout=5.0, retries=0).ask([]).text
        except UserError as error:
            said = str(error)
            assert said.startswith(url) and said.isprintable() and len(said) < 600
    assert CANARY not in said


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(500, b"oops"), "status 500 oops"),
        (Answer(200, b"<html><script>alert(1)</script></html>"), "no chat completion"),
        (Answer(200, b'{"choices": [{"message": {"content": 7}}]}'), "no text"),
        (Answer(200, b"[" * 100_000), "no chat completion"),
        (Answer(500, b"\x1b[2J\x1b]0;pwned\x07"), "status 500"),
        (Answer(302, b"", {"Location": "http://127.0.0.1:9/"}), "has moved"),
        (Answer(400, b'{"error": {"message": "no such option"}}'), "no such option"),
    ],
)
def test_a_nonsense_answer_of_a_judge_is_reported(answer: Answer, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(answer) as chat:
        assert run(*judged(chat.url)) == 2
    message = capsys.readouterr().err
    assert "mmhal/0" in message and reason in message and "Traceback" not in message
    assert all(sign.isprintable() or sign == "\n" for sign in message) and len(message) < 2000
    assert not Path("out/scores.json").exists()


def test_a_judge_that_was_given_up_is_asked_again_by_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Answer(500), completion("Rating: 5")) as chat:
        assert run(*judged(chat.url)) == 2
        assert run(*judged(chat.url)) == 0
    assert json.loads(Path("out/scores.json").read_text())["benchmarks"]["mmhal"]["metrics"]["score"]["value"] == 5


@pytest.mark.parametrize("option", ["timeout=0", "timeout=1e30", "retries=-1", "timeout='soon'", "api_key='sk-canary-1'"])
def test_impossible_options_of_a_judge_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = judged("http://127.0.0.1:9/v1")
    command[command.index("--judge") + 1] = f"openai(model='judge', {option})"
    assert run(*command) == 2
    message = capsys.readouterr().err
    assert option.partition("=")[0] in message and "canary" not in message


def test_the_key_is_in_no_file_and_no_output_whatever_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Judge and served model, good answers and bad: everything they print and write is searched."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    assert run("score", "--pairs", "scenes", "--model", "nobody/nothing", "--output", "store") == 2
    echo = json.dumps({"error": {"message": f"bad key {CANARY}", "code": CANARY}}).encode()
    wrong = [Answer(401, echo), Answer(500, echo), Answer(400, echo), Answer(404, echo), Answer(200, CANARY.encode()),
             Answer(302, b"", {"Location": f"http://127.0.0.1:9/{CANARY}"})]  # fmt: skip
    for number, answer in enumerate(wrong):
        with serve(answer) as chat:
            assert run(*judged(chat.url, output=f"wrong-{number}")) == 2
            assert chat.headers[0]["Authorization"] == f"Bearer {CANARY}"
    with serve(completion(f"Rating: 5. Your key: {CANARY}", model=CANARY)) as chat:
        assert run(*judged(chat.url)) == 0
    served = ["evaluate", "--model", "openai:served", "--benchmarks", "scenes(count=1)", "--output", "served"]
    with serve(Answer(401, echo)) as chat:
        assert run(*served, "--base-url", chat.url) == 2
    with serve(reply=lambda _: completion(f"A dog, {CANARY}", model=CANARY)) as chat:
        assert run(*served[:-1], "again", "--base-url", chat.url) == 0
    for secret in (f"http://user:{CANARY}@127.0.0.1:9/v1", f"http://127.0.0.1:9/v1?key={CANARY}"):
        assert run(*served, "--base-url", secret) == 2
    write_pairs(tmp_path / "pairs", make_pairs(tmp_path / "drawn", 1), {})
    assert run("report", "--pairs", "pairs", "--evaluations", "out", "again", "--output", "report") == 0
    shown = capfd.readouterr()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in written} >= {"report.html", "scores.json", "answers.jsonl", "judge-replies.jsonl"}
    assert CANARY not in shown.out + shown.err
    assert not [path for path, content in written.items() if CANARY.encode() in content]
    assert "[key]" in (tmp_path / "again/answers.jsonl").read_text()
