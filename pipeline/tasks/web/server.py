"""A server that ends together with its tasks.

The rules kept here:

- The first SIGTERM or SIGINT stops accepting tasks and cancels those that run. While they clean up, clients are still
  served; each gets the terminal event of what it follows; then the streams end, and then the server.
- The second signal waits for nobody. Every wait has a bound, and what did not end in time is named.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import uvicorn

from ...cancellation.reason import CancelReason
from ...cancellation.signals import SignalTrigger
from ...observe.logs import get_logger
from ...result import describe
from ..escape import BlockedLoopExit
from ..targets import hub_of
from .sse import OpenStreams, streams_of
from .stopping import initialize, shut_down_within

__all__ = ["Served", "Service"]

_DELIVERY = 5.0
"""Seconds for clients to take what was sent to them, when all tasks have ended; no more than tasks get, and one at least."""
_LAST = 1.0
"""Seconds after a second signal."""


@dataclass(frozen=True, slots=True)
class Served:
    """An ASGI application, and the hub whose tasks end with the server. `manage`: nobody else gets the hub ready.

    `Any`: it may be of any framework.
    """

    app: Any
    hub: object
    manage: bool


class Service:
    """One server for what `make` gives. `run()` it once, in the main thread.

    `timeout` in seconds is for the cleanup of tasks after a signal.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[Served]],
        sockets: list[socket.socket],
        *,
        timeout: float,
        on_ready: Callable[[], object],
    ) -> None:
        self._make = make
        self._sockets = sockets
        self._timeout = timeout
        self._on_ready = on_ready
        self._reasons: list[CancelReason] = []
        self._codes: list[int] = []
        """Of what ends the process, in order: those that the first and the second of them give it."""
        self._signalled = asyncio.Event()
        self._hub: object | None = None
        self._server: _Server | None = None
        self._hurried: asyncio.Task[Any] | None = None

    async def run(self) -> int:
        """Serve until a signal comes; the exit code of the process."""
        with ExitStack() as stack:
            for one in self._sockets:
                stack.callback(one.close)
            for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
                stack.callback(SignalTrigger(number, code="shutdown").arm(partial(self._heard, number, code)).disarm)
            stack.callback(BlockedLoopExit(signal.SIGTERM, signal.SIGINT).arm().disarm)
            try:
                return await self._run()
            finally:
                await _cancel_the_rest()

    def interrupted(self, error: BaseException) -> None:
        """What went through the loop without ending it: a SystemExit of somebody's callback. As a signal, then."""
        self._heard(0, 1, CancelReason(describe(error), code="shutdown", origin="penstock serve"))

    async def _run(self) -> int:
        starting = asyncio.create_task(self._start(), name="start")
        await self._or_signalled(starting)
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting], timeout=self._timeout)
            await self._shut_down()
            return self._codes[0]
        if not starting.result():
            await self._shut_down()
            return 1
        server = self._server
        assert server is not None
        serving = asyncio.create_task(server.run_quietly(self._sockets), name="serve")
        listening = asyncio.create_task(server.listening.wait(), name="listening")
        await self._or_signalled(serving, listening)
        if listening.done():
            self._on_ready()
            await self._or_signalled(serving)
        elif not serving.done():  # in the middle of the application's own start
            serving.cancel()
        listening.cancel()
        ended_early = serving.done()
        stuck = await self._stop(server, serving)
        return 1 if ended_early or (stuck and len(self._codes) < 2) else self._codes[-1]

    async def _start(self) -> bool:
        """Make what is to be served, and get it ready."""
        served = await self._make()
        self._hub = served.hub
        try:
            if served.manage:
                await initialize(served.hub)
        except Exception as error:
            get_logger().error("the tasks could not be made ready", error=describe(error))
            return False
        config = uvicorn.Config(served.app, log_config=None, access_log=False, lifespan="auto", ws="none", server_header=False)
        self._server = _Server(config)
        return True

    async def _stop(self, server: _Server, serving: asyncio.Task[None]) -> list[str]:
        stuck = await self._shut_down()
        if not await self._end_server(server, serving, streams_of(hub_of(self._hub))):
            stuck.append("the server")
            get_logger().error("the server did not end")
        if self._hurried is not None:
            await asyncio.wait([self._hurried], timeout=_LAST)
        return stuck

    async def _shut_down(self) -> list[str]:
        reason = self._reasons[0] if self._reasons else CancelReason("the server has ended", origin="penstock serve")
        get_logger().info("stopping", reason=reason.message, seconds=self._timeout)
        stuck = await shut_down_within(self._hub, self._timeout, reason)
        if stuck:
            get_logger().error("stopped, but tasks were left behind", tasks=stuck)
        return stuck

    async def _end_server(self, server: _Server, serving: asyncio.Task[None], streams: OpenStreams) -> bool:
        """End the streams, with what has happened so far, and then the connections; False when something stays."""
        deadline = monotonic() + min(max(self._timeout, 1.0), _DELIVERY)
        server.should_exit = True
        streams.close()
        while not serving.done() and monotonic() < deadline and len(self._codes) < 2:
            streams.close()  # and those that have come since
            await asyncio.wait([serving], timeout=0.05)
        streams.abandon()
        for connection in tuple(server.server_state.connections):
            connection.transport.abort()  # what is left is waiting for somebody who takes nothing
        await asyncio.wait([serving], timeout=_DELIVERY)  # the application's own end
        return serving.done()

    async def _or_signalled(self, *others: asyncio.Task[Any]) -> None:
        """Wait until one of these is done, or a signal has come."""
        signalled = asyncio.create_task(self._signalled.wait(), name="signal")
        try:
            await asyncio.wait([signalled, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            signalled.cancel()

    def _heard(self, number: int, code: int, reason: CancelReason) -> None:
        self._reasons.append(reason)
        self._codes.append(128 + number if self._codes else code)
        self._signalled.set()
        if len(self._reasons) == 2:
            self._hurry(reason)

    def _hurry(self, reason: CancelReason) -> None:
        asyncio.get_running_loop().call_later(_LAST, _exit, self._codes[-1])
        if self._hub is not None:
            self._hurried = asyncio.create_task(shut_down_within(self._hub, 0.0, reason), name="hurry")


class _Server(uvicorn.Server):
    """uvicorn's, which takes no signals, says when it listens, and ends its task instead of the program."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def run_quietly(self, sockets: list[socket.socket]) -> None:
        """Serve until `should_exit`. What it ends the program for, it has logged."""
        try:
            await self.serve(sockets)
        except SystemExit as error:
            get_logger().error("the server could not start", code=error.code)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


async def _cancel_the_rest() -> None:
    """Tell what still runs on this loop that it is over, as `asyncio.run` does, and wait for a bounded time."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=_LAST)


def _exit(code: int) -> None:
    get_logger().error("ended by a second signal, in the middle of stopping")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
