"""Who may ask: allowed hosts, no other sites, and the token for what changes something.

The rule kept here: a request is refused unless nothing speaks against it, before any of it is read, and the refusal says
what to do. A browser always says where a request comes from; programs, which say nothing, are nobody's deputies.

- A page of another site can send requests with the user's browser. Browsers mark them, with `Sec-Fetch-Site` where the
  server is trustworthy to them (https, or this machine), and else with `Origin`.
- A page can have its own name resolve to this machine (DNS rebinding). For the browser that is the same site then; but the
  `Host` is the page's. A host that is an address cannot be rebound.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .answers import refuse

__all__ = ["ADDRESSES", "Guard", "Refusal", "Token", "allowed_names", "host_of"]

ADDRESSES = "<address>"
"""Among allowed hosts: any that is an IP address."""


class Refusal(Exception):
    """A request that is not answered as it was meant: an HTTP status, and what to do instead."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


class Token:
    """What a request that changes something must bring, as `Authorization: Bearer …`."""

    def __init__(self, token: str | None) -> None:
        if token is not None and (not isinstance(token, str) or not token.isascii() or not token.isprintable() or not token.strip() or " " in token):
            raise ValueError("the token is a text of visible ASCII characters, such as secrets.token_urlsafe() makes")
        self._token = None if token is None else token.encode()

    @property
    def required(self) -> bool:
        return self._token is not None

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises `Refusal` unless the right one is there. Takes the same time for each wrong one of a length."""
        if self._token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token):
            said = "this token is not the right one" if given else "this needs a token"
            error = ', error="invalid_token"' if given else ""
            raise Refusal(
                401, f"{said}; send it as Authorization: Bearer <token>", {"WWW-Authenticate": f'Bearer realm="tasks"{error}'}
            )


class Guard:
    """Middleware that lets through what `check_host` and `check_origin` let through. `origins=None` leaves the latter out."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, origins: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            try:
                check_host(headers, self._hosts)
                if self._origins is not None:
                    check_origin(headers, scope.get("method", "GET"), self._origins)
            except Refusal as refusal:
                await refuse(refusal.status, str(refusal), refusal.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_host(headers: Mapping[str, str], allowed: frozenset[str] | None) -> None:
    """Raises `Refusal` for a host that is not among the allowed ones. None allows every one."""
    if allowed is None:
        return
    host = host_of(headers.get("host", ""))
    if host in allowed or (ADDRESSES in allowed and _is_address(host)):
        return
    if any(name.startswith("*.") and host.endswith(name[1:]) for name in allowed):
        return
    raise Refusal(421, f"the host {host[:100]!r} is not served here; to allow it: penstock serve --allowed-host NAME, or create_app(allowed_hosts=[…])")


def check_origin(headers: Mapping[str, str], method: str, allowed: frozenset[str]) -> None:
    """Raises `Refusal` for what a page of another origin has sent, other than links to here that somebody has followed."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if origin is not None and origin.lower() in allowed:
        return
    if site is not None:
        ours = site in ("same-origin", "none")
    else:
        ours = origin is None or _netloc(origin) == headers.get("host", "").lower()
    followed = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if not ours and not followed:
        raise Refusal(403, "refused, for a page of another site has sent it; to allow that site: create_app(allowed_origins=['https://…'])")


def allowed_names(names: Iterable[str] | None) -> frozenset[str] | None:
    """Allowed hosts, normalised: None for "*" among them. Raises ValueError for one that is no host's name."""
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"allowed_hosts is a list, such as [{names!r}]")
    given = [name.strip().lower() for name in names]
    for name in given:
        if not name or "/" in name or (name not in ("*", ADDRESSES) and host_of(name) != name.strip("[]")):
            raise ValueError(f"{name!r} is no host; write its name without scheme and port, such as tasks.example.org or *.example.org")
    return None if "*" in given else frozenset(name.strip("[]") for name in given)


def allowed_origins(origins: Iterable[str]) -> frozenset[str]:
    """Allowed origins, normalised. Raises ValueError for one that is none."""
    if isinstance(origins, str):
        raise TypeError(f"allowed_origins is a list, such as [{origins!r}]")
    found: set[str] = set()
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
            raise ValueError(f"{origin!r} is no origin; write scheme and host, such as https://app.example.org")
        found.add(origin.lower())
    return frozenset(found)


def host_of(header: str) -> str:
    """The name or address in a Host header, without the port."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    if text.count(":") > 1:  # an address of IPv6 as it is
        return text
    return text.partition(":")[0].rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str:
    """Host and port, without the port that the scheme implies, as in a Host header. "null" is no host's name."""
    try:
        parts = urlsplit(origin.lower())
        implied = {"http": ":80", "https": ":443"}.get(parts.scheme, "/")
        return parts.netloc.removesuffix(implied) or "null"
    except ValueError:
        return "null"
