"""The proxy that leads to a server, by the variables that most programs read. Opens no connection."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import urllib.request
from dataclasses import dataclass
from fnmatch import fnmatch
from urllib.parse import unquote, urlsplit

from catpo.core.errors import UserError

SCHEMES = ("http", "https", "socks5", "socks5h")
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Proxy:
    """A proxy that the environment names for a server."""

    variable: str
    url: str
    """Without user name and password."""
    login: tuple[str, str] | None
    advice: str
    """What to do if it does not work."""

    @staticmethod
    def of(url: str) -> Proxy | None:
        """The proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY (or as the system is set), unless NO_PROXY excepts the server.

        Raises:
            UserError: it cannot be used; names the variable, not the value, which may hold a password.
        """
        server, known = urlsplit(url), urllib.request.getproxies()
        scheme = server.scheme if known.get(server.scheme) else "all"
        if not known.get(scheme) or _is_excepted(server.hostname or "", server.port, known.get("no", "")):
            return None
        variable, value = f"{scheme.upper()}_PROXY", known[scheme]
        advice = f"Correct {variable}, or add {server.hostname} to NO_PROXY to reach it directly."
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
        except ValueError:
            host, port, parts = "", None, urlsplit("")
        if not host or parts.scheme not in SCHEMES:
            raise UserError(f"{variable} names no proxy that catpo can use: {', '.join(SCHEMES)}://HOST:PORT. {advice}")
        if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            raise UserError(f"{variable} names a SOCKS proxy, which needs a package: `pip install 'catpo[socks]'`. {advice}")
        host = f"[{host}]" if ":" in host else host
        login = (unquote(parts.username or ""), unquote(parts.password or ""))
        address = f"{parts.scheme}://{host}:{port}" if port else f"{parts.scheme}://{host}"
        return Proxy(variable, address, login if any(login) else None, advice)


def trouble_with_hub() -> str:
    """Why the environment may keep Hugging Face's hub out of reach, with what to do; empty if it does not."""
    try:
        Proxy.of(os.environ.get("HF_ENDPOINT") or HUB)
    except (UserError, ValueError) as error:  # the latter for an HF_ENDPOINT that is no address
        return str(error)
    return trouble_with_certificates()


def trouble_with_certificates() -> str:
    """Which of SSL_CERT_FILE and SSL_CERT_DIR names nothing, with what to do; empty if neither does."""
    for name, is_there in (("SSL_CERT_FILE", os.path.isfile), ("SSL_CERT_DIR", os.path.isdir)):
        if path := os.environ.get(name):  # the library reads the second only where the first is not set
            return "" if is_there(path) else f"{name} is '{path}', which is not there. Correct or unset it."
    return ""


def _is_excepted(host: str, port: int | None, entries: str) -> bool:
    """Whether NO_PROXY names a host: a domain, an address, a network such as 10.0.0.0/8, or a pattern such as *.example.com."""
    if urllib.request.proxy_bypass(f"{host}:{port}" if port else host):
        return True
    return any(fnmatch(host, entry.strip().lower()) or _is_in(host, entry.strip()) for entry in entries.split(","))


def _is_in(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
