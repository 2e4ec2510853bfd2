"""`penstock worker`: does the tasks that were submitted to a backend, until it is told to stop.

The rule kept here: SIGTERM and Ctrl-C stop it in good order, and lose nothing: what runs may end within the grace, and what
is left goes back to the queue. A second signal gives everything back at once; a third ends the process as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from typing import Any

from ....loops import run_on
from ....observe.logs import get_logger
from ...targets import TargetError, load_target, make_target
from .backend import PostgresTaskBackend

__all__ = ["add_arguments", "run"]

_LEAVING = 1.0
"""Seconds for threads to end, when all else has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be said on the command line."""
    parser.add_argument("target", help="a PostgresTaskBackend, or a function that makes one, as module:attribute")
    parser.add_argument("--concurrency", type=_at_least_one, default=1, metavar="N", help="tasks at once (default: 1)")
    parser.add_argument(
        "--grace",
        type=_not_negative,
        default=5.0,
        metavar="SECONDS",
        help="how long tasks may go on after a signal before they are given back to the queue (default: 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Work until a signal comes; the exit code, see `pipeline.cli`."""
    target = load_target(args.target)
    # Not asyncio.run(), which would wait for work that does not stop.
    return _leave(run_on(asyncio.new_event_loop, _run(target, args), on_interrupt=lambda _: os._exit(130)))


async def _run(target: Any, args: argparse.Namespace) -> int:
    backend = await make_target(target, is_done=lambda value: isinstance(value, PostgresTaskBackend))
    backend = backend if isinstance(backend, PostgresTaskBackend) else getattr(backend, "hub", backend)
    if not isinstance(backend, PostgresTaskBackend):
        raise TargetError(f"{args.target!r} is {backend!r}; a worker needs a PostgresTaskBackend")
    if not backend.has_executor:
        raise TargetError(
            f"{args.target!r} has nothing to do tasks with; call its set_executor(function) in that module"
        )
    received: list[signal.Signals] = []
    try:
        await backend.initialize()
    except (ConnectionError, RuntimeError) as error:
        sys.stderr.write(f"penstock worker: {error}\n")
        return 1
    async with backend:
        loop = asyncio.get_running_loop()

        def heard(signum: signal.Signals) -> None:
            received.append(signum)
            get_logger().info("worker stops", signal=signum.name, again=len(received) > 1)
            backend.stop()
            if len(received) > 1:
                loop.remove_signal_handler(signum)  # the next one ends the process

        with contextlib.ExitStack() as handlers:
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, heard, signum)
                handlers.callback(loop.remove_signal_handler, signum)
            get_logger().info("worker begins", worker=backend.settings.name, queue=backend.settings.queue)
            stuck = await backend.work(concurrency=args.concurrency, grace=args.grace)
    if stuck:
        get_logger().error("tasks did not stop and were left behind", tasks=[str(key) for key in stuck])
        return 1
    return 130 if received and received[0] is signal.SIGINT else 0


def _leave(code: int) -> int:
    """End the process, though work that was left behind may have threads that never end."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    for thread in others:
        thread.join(_LEAVING / len(others))
    if any(thread.is_alive() for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 1)
    return code


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0 on")
    return number
