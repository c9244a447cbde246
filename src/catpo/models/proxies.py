"""The proxy that leads to a server, by the variables that most programs read. Opens no connection."""

from __future__ import annotations

import importlib.util
import ipaddress
import ssl
import urllib.request
from dataclasses import dataclass
from fnmatch import fnmatch
from urllib.parse import unquote, urlsplit

import httpcore2

from catpo.core.errors import UserError

SCHEMES = ("http", "https", "socks5", "socks5h")


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
            raise UserError(f"{variable} names a SOCKS proxy, for which a package is missing: `pip install socksio`. {advice}")
        host = f"[{host}]" if ":" in host else host
        login = (unquote(parts.username or ""), unquote(parts.password or ""))
        address = f"{parts.scheme}://{host}:{port}" if port else f"{parts.scheme}://{host}"
        return Proxy(variable, address, login if any(login) else None, advice)

    def used(self, context: ssl.SSLContext | None) -> httpcore2.Proxy:
        login = (self.login[0].encode(), self.login[1].encode()) if self.login else None
        return httpcore2.Proxy(self.url, auth=login, ssl_context=context if self.url.startswith("https:") else None)


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
