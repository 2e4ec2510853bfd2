"""The sockets of a server, bound before anything else starts, so that a port that is taken is known at once."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["is_loopback", "listen", "url_of"]


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets for every address of the host, all on one port; port 0 has the system choose. Raises OSError, in words."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"the host {host!r} has no address: {error.strerror or error}") from None
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((entry[0], str(entry[4][0])) for entry in found):
            sockets.append(_bound(family, address, sockets[0].getsockname()[1] if sockets else port))
    except OSError as error:
        for one in sockets:
            one.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --port") from None
    return sockets


def is_loopback(sockets: list[socket.socket]) -> bool:
    """Whether only this machine can connect."""
    return all(ipaddress.ip_address(str(one.getsockname()[0]).partition("%")[0]).is_loopback for one in sockets)


def url_of(host: str, sockets: list[socket.socket]) -> str:
    """What to open in a browser."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{sockets[0].getsockname()[1]}"


def _bound(family: int, address: str, port: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind((address, port))
        one.listen(2048)
        one.setblocking(False)
    except OSError:
        one.close()
        raise
    return one
