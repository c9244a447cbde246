"""Servers behind proxies and with certificates: the usual variables work, or are refused by name with what to do."""

from __future__ import annotations

import base64
import importlib.util
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from catpo.core.errors import UserError
from catpo.core.proxies import Proxy, trouble_with_hub
from catpo.models.openai_client import ChatServer
from commands import run
from fake_chat import Answer, completion, serve
from test_hostile_servers import raw

VARIABLES = (
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "ssl_cert_file",
    "ssl_cert_dir",
    "openai_base_url",
    "hf_endpoint",
)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def ask(url: str = "http://judge.example/v1", **options: float) -> str:
    return ChatServer("m", base_url=url, retries=0, timeout=options.get("timeout", 20.0)).ask([]).text


def refused(url: str = "http://judge.example/v1", **options: float) -> str:
    with pytest.raises(UserError) as caught:
        ask(url, **options)
    return str(caught.value)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("form", ["http://{}", "{}", "http://user:pass%40word@{}/"])
def test_a_server_is_asked_through_the_proxy_of_the_environment(
    variable: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(completion("through")) as proxy:
        monkeypatch.setenv(variable, form.format(proxy.url.removeprefix("http://").removesuffix("/v1")))
        assert ask() == "through"
    assert proxy.asked[0]["path"] == "http://judge.example/v1/chat/completions"
    login = base64.b64encode(b"user:pass@word").decode()
    assert proxy.headers[0].get("Proxy-Authorization") == (f"Basic {login}" if "user" in form else None)


@pytest.mark.parametrize(
    ("excepted", "host", "is_direct"),
    [
        ("127.0.0.1", "127.0.0.1", True), ("127.0.0.0/8", "127.0.0.1", True), ("localhost,127.0.0.1", "127.0.0.1", True),
        ("*", "judge.example", True), ("other, *", "judge.example", True), (".example", "judge.example", True),
        ("example", "judge.example", True), ("*.example", "a.example", True), ("judge.example:80", "judge.example:80", True),
        ("::1", "[::1]", True), ("JUDGE.example", "judge.example", True), ("10.0.0.0/8,nonsense/9", "127.0.0.1", False),
        ("ample", "judge.example", False), ("judge.example:81", "judge.example:80", False), ("", "127.0.0.1", False),
    ],
)  # fmt: skip
def test_no_proxy_excepts_domains_addresses_networks_and_patterns(
    excepted: str, host: str, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", excepted)
    assert (Proxy.of(f"http://{host}/v1") is None) is is_direct


def test_the_scheme_s_own_variable_wins_and_others_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://secure.example")
    monkeypatch.setenv("FTP_PROXY", "http://files.example")
    assert Proxy.of("http://judge.example/v1") is None
    monkeypatch.setenv("ALL_PROXY", "http://all.example")
    found = [Proxy.of(f"{scheme}://judge.example/v1") for scheme in ("http", "https")]
    assert [(proxy.variable, proxy.url) for proxy in found if proxy] == [
        ("ALL_PROXY", "http://all.example"), ("HTTPS_PROXY", "http://secure.example")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["foo://s3cret@x", "socks4://x:1", "http://", "http://a..b:1", "http://x:port", "http://[::1", "://"]
)
def test_a_proxy_that_cannot_be_used_is_refused_by_its_variable_only(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    message = refused()
    assert "ALL_PROXY names no proxy" in message and "NO_PROXY" in message and "s3cret" not in message


def test_a_socks_proxy_without_its_package_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert "ALL_PROXY" in refused() and "pip install 'catpo[socks]'" in refused() and "NO_PROXY" in refused()
    assert "pip install 'catpo[socks]'" in trouble_with_hub()
    with serve(completion("direct")) as chat:
        assert ask(chat.url.replace("127.0.0.1", "localhost")) == "direct"


def test_what_keeps_the_hub_out_of_reach_is_said_of_a_data_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "foo://x")
    assert run("data", "check", "trl(source='nobody/nothing')") == 2
    assert "HTTPS_PROXY names no proxy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(407, b"who are you?"), "asks for a user name and password"),
        (Answer(502, b"no route"), "status 502 no route"),
        (Answer(403, b"forbidden"), "(through HTTP_PROXY): authentication failed"),
    ],
)
def test_a_refusal_of_the_proxy_names_it(answer: Answer, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(answer) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        message = refused()
    assert words in message and "through HTTP_PROXY" in message


def test_a_proxy_that_is_not_there_or_lets_nothing_through_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    message = refused("https://judge.example/v1")
    assert "(through HTTPS_PROXY) cannot be reached" in message and "add judge.example to NO_PROXY" in message
    for status, words in ((b"407 Who", "the proxy refuses (407 Who)"), (b"503 Later", "did not answer in 1 tries")):
        with raw(lambda connection, _, status=status: connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")) as url:
            monkeypatch.setenv("HTTPS_PROXY", url)
            assert words in refused("https://judge.example/v1")


def test_a_proxy_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw(lambda _, over: over.wait()) as url:
        monkeypatch.setenv("ALL_PROXY", url)
        for address in ("http://judge.example/v1", "https://judge.example/v1"):
            assert "no complete answer within 0.3 s" in refused(address, timeout=0.3)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_are_not_there_are_named_where_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "nowhere")
    assert refused("https://judge.example/v1") == f"{name} is 'nowhere', which is not there. Correct or unset it."
    with serve(completion("plain")) as chat:
        assert ask(chat.url) == "plain"
    if name == "SSL_CERT_FILE":
        Path("nowhere").write_text("no certificate")
        assert "the trusted certificates cannot be read" in refused("https://judge.example/v1")


# ---- TLS, and tunnels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost, signed by nobody, in one file with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl, which is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,DNS:judge.example", "-keyout", "key.pem", "-out", "it.pem"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder


@contextmanager
def secure(certificate: Path, *script: Answer) -> Iterator[str]:
    """A chat server behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "it.pem", certificate / "key.pem")

    def talk(connection: socket.socket, over: threading.Event) -> None:
        with context.wrap_socket(connection, server_side=True) as stream:
            asked = stream.recv(65536)
            while not asked.endswith(b"}"):
                asked += stream.recv(65536)
            for answer in script:
                stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer.body) + answer.body)
            if not script:
                while not over.wait(0.05):
                    stream.sendall(b"H")

    with raw(talk, reads=False) as url:
        yield url.replace("http://127.0.0.1", "https://localhost")


@contextmanager
def tunnel(to: str, *, socks: bool = False) -> Iterator[str]:
    """A proxy that connects to the same server whatever it is asked for, and passes bytes on until the end of the test."""
    port = int(to.rpartition(":")[2].removesuffix("/v1"))

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        try:
            while part := source.recv(65536):
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.recv(65536)
        if socks:
            connection.sendall(b"\5\0")
            connection.recv(65536)
            connection.sendall(b"\5\0\0\1\0\0\0\0\0\0")
        else:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", port)) as server:
            back = threading.Thread(target=pass_on, args=(server, connection))
            back.start()
            pass_on(connection, server)
            server.shutdown(socket.SHUT_RDWR)
            back.join()

    with raw(talk, reads=False) as url:
        yield url.removesuffix("/v1").replace("http", "socks5") if socks else url


def test_a_server_with_a_certificate_of_its_own_is_trusted_by_ssl_cert_file(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with secure(certificate, completion("secret")) as url:
        message = refused(url)
        assert "CERTIFICATE_VERIFY_FAILED" in message and "SSL_CERT_FILE" in message
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "it.pem"))
        assert ask(url) == "secret"


def test_a_tunnel_leads_to_a_server_and_the_deadline_holds_in_it(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "it.pem"))
    with secure(certificate, completion("tunnelled")) as url, tunnel(url) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        assert ask("https://judge.example/v1") == "tunnelled"
    with secure(certificate) as url, tunnel(url) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        assert "no complete answer within 0.5 s" in refused("https://judge.example/v1", timeout=0.5)


def test_a_socks_proxy_leads_to_a_server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("socksio", reason="socksio is not installed: pip install 'catpo[socks]'")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "it.pem"))
    with serve(completion("plain")) as chat, tunnel(chat.url, socks=True) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert ask() == "plain"
    with secure(certificate, completion("secret")) as url, tunnel(url, socks=True) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert ask("https://judge.example/v1") == "secret"
