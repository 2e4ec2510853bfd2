"""`penstock serve`: its options, and what it serves.

The rule kept here: what is wrong with the options or the target is said before anything starts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...loops import run_on
from ...observe.logs import get_logger
from ..targets import TargetError, hub_of, load_target, make_target
from .listen import is_loopback, listen, url_of

if TYPE_CHECKING:
    from .server import Served

__all__ = ["add_arguments", "run"]

_TOKEN = "PENSTOCK_TOKEN"
_LEAVING = 1.0
"""Seconds for threads to end by themselves, when all else has ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "target",
        help="module:attribute, for a TaskCoordinator, a backend, an ASGI application that has its hub as app.state.hub, "
        "or a function that returns one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=_port, default=8000, help="the port (8000); 0 has the system choose, and prints it")
    parser.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="a name under which it is served, besides localhost and plain addresses; *.example.org for all below one, * for any; may be repeated")
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--token-env", metavar="NAME", help=f"the environment variable with the token that cancelling needs ({_TOKEN})")
    token.add_argument("--token-file", metavar="PATH", type=Path, help="the file with that token")
    parser.add_argument("--shutdown-timeout", type=_seconds, default=10.0, metavar="SECONDS", help="for the cleanup of tasks, when it is told to stop (10)")
    parser.add_argument("--title", default="Tasks", help="the title of the page (Tasks)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit code."""
    try:
        from .server import Service
    except ImportError as error:
        raise ImportError("penstock serve needs uvicorn and Starlette: pip install 'penstock[web]'") from error
    token = token_of(args, os.environ)
    target = load_target(args.target)
    try:
        sockets = listen(args.host, args.port)
    except OSError as error:
        sys.stderr.write(f"penstock serve: {error}\n")
        return 1
    if token is None and not is_loopback(sockets) and not hasattr(target, "state"):
        get_logger().warning(f"whoever reaches this can cancel tasks; set {_TOKEN}, or --token-file", host=args.host)

    async def made() -> Served:
        return application(await make_target(target, is_done=_is_done), args, token)

    url = url_of(args.host, sockets)
    service = Service(made, sockets, timeout=args.shutdown_timeout, on_ready=lambda: _say(f"serving tasks on {url}"))
    code = run_on(asyncio.new_event_loop, service.run(), on_interrupt=service.interrupted)
    return _leave(code)


def application(target: Any, args: argparse.Namespace, token: str | None) -> Served:
    """What to serve, for a target of any kind. `Any`: there is no other word for that. Raises `TargetError` for no use."""
    from .app import create_app
    from .guard import ADDRESSES, Guard, allowed_names
    from .server import Served

    hub = _hub_of_app(target)
    if hub is not None:
        if args.token_env or args.token_file:
            raise TargetError(f"{args.target!r} is an application of your own; pass the token to its create_app(token=…)")
        if token is not None:
            get_logger().warning(f"{_TOKEN} is not used: the target is an application, whose create_app(token=…) decides")
        app = target
    else:
        try:
            hub_of(target)
        except TypeError as error:
            apps = "; an ASGI application must have its hub as app.state.hub" if callable(target) else ""
            raise TargetError(f"{args.target!r}: {error}{apps}") from None
        hub = target
        try:
            app = create_app(hub, token=token, title=args.title, manage=False)
        except ValueError as error:
            raise TargetError(str(error)) from None
    try:
        hosts = allowed_names(["localhost", "*.localhost", ADDRESSES, *_name(args.host), *args.allowed_host])
    except ValueError as error:
        raise TargetError(f"--allowed-host: {error}") from None
    return Served(Guard(app, hosts, None), hub, manage=app is not target)


def _is_done(target: Any) -> bool:
    """Whether it is something to serve, and not a function that makes it."""
    if _hub_of_app(target) is not None:
        return True
    try:
        hub_of(target)
    except TypeError:
        return False
    return True


def _hub_of_app(target: Any) -> object | None:
    return getattr(getattr(target, "state", None), "hub", None) if callable(target) else None


def token_of(args: argparse.Namespace, environment: Mapping[str, str]) -> str | None:
    """The token that cancelling needs, None for none. Raises `TargetError` when one was meant that is not there."""
    if args.token_file is not None:
        try:
            token = args.token_file.read_text().strip()
        except (OSError, ValueError) as error:
            raise TargetError(f"--token-file {args.token_file}: {error}") from None
        if not token:
            raise TargetError(f"--token-file {args.token_file}: the file is empty")
        return token
    if args.token_env is not None and not environment.get(args.token_env):
        raise TargetError(f"--token-env: the environment variable {args.token_env} is not set")
    return environment.get(args.token_env or _TOKEN) or None


def _name(host: str) -> list[str]:
    return [host] if host.strip("[]:0123456789.%abcdefABCDEF") or "." not in host + ":" else []


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _leave(code: int) -> int:
    """End the process, though it may have threads that never do."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    for thread in others:
        thread.join(_LEAVING / len(others))
    left = [thread.name for thread in others if thread.is_alive()]
    if left:
        get_logger().error("threads did not end and were left behind", threads=left)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 1)
    return code


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give a number of seconds, such as 10")
    return seconds
