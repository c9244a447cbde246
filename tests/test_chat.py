"""Asking an OpenAI-compatible server: retries, refusals, limits, and a key that stays where it belongs."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catpo.core.errors import UserError
from catpo.models.openai_client import ChatServer
from catpo.models.redaction import without_key
from fake_chat import Answer, completion, serve
from test_hostile_servers import raw

HELLO = [{"role": "user", "content": "Hello"}]
CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


class Waits(list):
    """What the client would have slept."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client(chat, **options) -> tuple[ChatServer, Waits]:
    waits = Waits()
    return ChatServer("judge", base_url=chat.url, sleep=waits, **options), waits


def refused(server: ChatServer) -> str:
    with pytest.raises(UserError) as caught:
        server.ask(HELLO)
    return str(caught.value)


def test_a_conversation_is_sent_with_its_decoding_and_the_text_comes_back():
    with serve(completion("Rating: 4")) as chat:
        reply = client(chat)[0].ask(HELLO, temperature=0.0, max_tokens=7)
    assert (reply.text, reply.model) == ("Rating: 4", "judge-0613")
    assert chat.asked == [
        {"path": "/v1/chat/completions", "model": "judge", "messages": HELLO, "temperature": 0.0, "max_tokens": 7}
    ]


def test_a_busy_server_is_retried_after_growing_waits():
    with serve(Answer(429), Answer(500, b"oops"), Answer(503), completion("done")) as chat:
        server, waits = client(chat)
        assert server.ask(HELLO).text == "done"
    assert waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("0", 0.0), ("86400", 60.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0)])
def test_retry_after_is_obeyed_up_to_a_minute(asked, waited):
    with serve(Answer(429, headers={"Retry-After": asked}), completion("done")) as chat:
        server, waits = client(chat)
        server.ask(HELLO)
    assert waits == [waited]


def test_a_server_that_stays_busy_raises_with_its_last_message():
    with serve(reply=lambda _: Answer(500, b'{"error": {"message": "out of memory"}}')) as chat:
        server, waits = client(chat, retries=3)
        message = refused(server)
    assert len(waits) == 3 and len(chat.asked) == 4
    assert "4 tries" in message and "status 500 out of memory" in message and "same command again" in message


def test_a_slow_server_is_retried():
    release = threading.Event()
    with serve(Answer(hold=release), completion("done")) as chat:
        server, waits = client(chat, timeout=0.5)
        assert server.ask(HELLO).text == "done"
        release.set()
    assert waits == [1.0]


@pytest.mark.parametrize(
    "garbage",
    [b"<html>Bad gateway</html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": [1]}}]}', b"[" * 5000],
)
def test_garbage_is_retried_and_reported_if_it_persists(garbage):
    with serve(Answer(body=garbage), completion("done"), Answer(body=garbage), Answer(body=garbage)) as chat:
        server, _ = client(chat, retries=1)
        assert server.ask(HELLO).text == "done"
        assert "it sent no" in refused(server)


def test_a_huge_reply_is_not_read():
    with serve(completion("x" * 5000)) as chat:
        message = refused(client(chat, reply_limit=1000)[0])
    assert "more than 1,000 bytes" in message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(401, b'{"error": {"message": "no key"}}'), ["authentication failed", "OPENAI_API_KEY"]),
        (Answer(404, b'{"error": {"message": "no such model"}}'), ["has no model 'judge'", "/v1/models"]),
        (Answer(400, b'{"error": {"message": "temperature too high"}}'), ["temperature too high"]),
        (Answer(429, b'{"error": {"code": "insufficient_quota", "message": "pay"}}'), ["insufficient_quota"]),
        (Answer(307, headers={"Location": "http://127.0.0.1:1/"}), ["has moved"]),
    ],
)
def test_a_refusal_is_not_retried(answer, words):
    with serve(answer) as chat:
        server, waits = client(chat)
        message = refused(server)
    assert not waits and len(chat.asked) == 1
    assert all(word in message for word in words), message


def test_a_server_that_is_not_there_is_named():
    with serve() as chat:
        pass
    assert "cannot be reached" in refused(client(chat)[0])


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": None}, ""),
        ({"content": "a\ud83d"}, "a?"),  # half a surrogate pair could not be written to a file
    ],
)
def test_a_refusal_or_half_a_surrogate_pair_becomes_text(message, text):
    with serve(Answer(body=json.dumps({"choices": [{"message": message}]}).encode())) as chat:
        assert client(chat)[0].ask(HELLO).text == text


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://host/api/v3/chat/completions", "https://host/api/v3"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://bücher.example:8000/ä/v1", "http://xn--bcher-kva.example:8000/%C3%A4/v1"),
    ],
)
def test_a_url_may_lack_v1_or_name_the_endpoint(given, used):
    assert ChatServer("m", base_url=given).url == used


@pytest.mark.parametrize(
    "bad",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://host:port/v1",
        "http://a..b/v1",
        f"http://{'a' * 64}.b/v1",
        "http://a\x1bb",
        "http://\udcff/v1",
    ],
)
def test_other_addresses_are_refused(bad):
    with pytest.raises(UserError, match="is not the URL of a server"):
        ChatServer("m", base_url=bad)


@pytest.mark.parametrize(
    "bad", [f"http://me:{CANARY}@host/v1", f"http://host/v1?key={CANARY}", f"http://me:{CANARY}@host:x/v1"]
)
def test_a_secret_in_the_address_is_refused_without_repeating_it(bad):
    with pytest.raises(UserError) as caught:
        ChatServer("m", base_url=bad)
    assert CANARY not in str(caught.value) and "OPENAI_API_KEY" in str(caught.value)


def test_the_default_address_is_the_environment_s_or_openai_s(monkeypatch):
    assert ChatServer("m").url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert ChatServer("m").url == "http://127.0.0.1:9/v1"


def test_the_key_is_in_the_header_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    caplog.set_level(logging.DEBUG)
    echo = json.dumps({"error": {"message": f"bad key Bearer {CANARY}"}}).encode()
    with serve(completion(f"your key is {CANARY}"), Answer(401, echo), Answer(500, echo), Answer(body=CANARY.encode())) as chat:
        server, _ = client(chat, retries=1)
        said = [server.ask(HELLO).text]
        for _ in range(2):
            with pytest.raises(UserError) as caught:
                server.ask(HELLO)
            said += traceback.format_exception(caught.value)
    assert {headers["Authorization"] for headers in chat.headers} == {f"Bearer {CANARY}"}
    assert said[0] == "your key is [key]"
    everything = [*said, repr(vars(server)), caplog.text, json.dumps(chat.asked)]
    assert not [text for text in everything if CANARY in text]


SPELT: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": lambda text: "".join(f"\\u{ord(sign):04x}" for sign in text),
    "JSON in JSON": lambda text: json.dumps("".join(f"\\u{ord(sign):04X}" for sign in text)),
    "percent": lambda text: "".join(f"%{ord(sign):02x}" for sign in text),
    "percent twice": lambda text: "".join(f"%25{ord(sign):02X}" for sign in text),
    "HTML": lambda text: "".join(f"&#{ord(sign)};" for sign in text),
    "HTML, hexadecimal": lambda text: "".join(f"&#x{ord(sign):x};" for sign in text),
    "in part": lambda text: text.replace("-", "\\u002d").replace("a", "%61"),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of a header": lambda text: base64.b64encode(f"Bearer {text}".encode()).decode(),
    "base64 in an address": lambda text: base64.urlsafe_b64encode(f"x:{text}??>>".encode()).decode(),
    "hexadecimal": lambda text: text.encode().hex(),
    "two lines": lambda text: f"{text[:9]}\n  {text[9:]}",
    "joined by what is not shown": lambda text: "\u200b".join(text),
    "UTF-16": lambda text: "\0".join(text),
}


@pytest.mark.parametrize("way", SPELT)
@given(key=st.sampled_from([CANARY, "hf_Aa+/.~-99zZ", "ghp_" + "x" * 36]), around=st.text(max_size=20))
def test_a_key_is_redacted_however_it_is_spelt(way: str, key: str, around: str) -> None:
    spelt = SPELT[way](key)
    shown = without_key(f"{around} {spelt} {around}", key)
    assert "[key]" in shown and len(shown) < len(around) * 2 + 30
    assert without_key(around, key) == around or "[key]" in without_key(around, key)


def test_redaction_is_quick_for_any_text() -> None:
    begin = time.monotonic()
    for text in (
        "\\" * 300_000,
        "s" * 300_000,
        " \n" * 150_000,
        "%25" * 100_000,
        "&amp;" * 60_000,
        "sk-canary-0123456789abcde" * 12_000,
    ):
        assert without_key(text, CANARY) == text
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("way", SPELT)
def test_a_server_that_spells_the_key_in_its_own_way_gives_it_to_no_message_and_no_answer(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    spelt = SPELT[way](CANARY)
    error = json.dumps({"error": {"message": f"key: {spelt}"}}).encode()
    answers = [Answer(body=f"key: {spelt}".encode()), Answer(400, f"key: {spelt}".encode()), Answer(400, error)]
    with serve(completion(f"key: {spelt}", model=f"key: {spelt}"), *answers) as chat:
        server, _ = client(chat, retries=0)
        reply = server.ask(HELLO)
        said = [reply.text, reply.model, *(refused(server) for _ in answers)]
    assert all("[key]" in text and spelt not in text for text in said), said


def test_an_error_whose_cause_quotes_the_key_hides_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with raw(lambda connection, _: connection.sendall(f"HTTP/1.1 200 OK\r\n {CANARY}\r\n\r\n".encode())) as url:
        server = ChatServer("m", base_url=url, retries=0)
        with pytest.raises(UserError) as caught:
            server.ask(HELLO)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_no_key_sends_no_header_and_a_short_key_is_not_redacted(monkeypatch):
    with serve(completion("EMPTY"), completion("EMPTY")) as chat:
        server, _ = client(chat)
        server.ask(HELLO)
        monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
        assert server.ask(HELLO).text == "EMPTY"
    assert [headers.get("Authorization") for headers in chat.headers] == [None, "Bearer EMPTY"]


@pytest.mark.parametrize("key", ["sk-canary\nX-Evil: 1", "sk-cánary"])
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve() as chat:
        message = refused(client(chat)[0])
    assert "nary" not in message and not chat.asked
