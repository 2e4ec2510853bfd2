"""The one connection of a process on which the database calls.

The rule kept here: whoever listens is told of every new connection, for what was said meanwhile is lost; then it looks for
itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ....observe.logs import get_logger
from .database import Backoff, Connection, Database, in_one_line, pass_cancellation

__all__ = ["PRESENCE", "Listener"]

PRESENCE = 0x70656E73
"""The class of the advisory locks by which a process shows that it lives: its session ends with it, and so does the lock."""
_IDLE = 10.0
"""Seconds of silence after which the server is asked whether it is still there."""
_ANSWER = 10.0
"""Seconds that it has for this."""


class Listener:
    """`run()` it as a task. `heard` is called with every payload, `connected` after each connection,
    `revive` when there was none."""

    def __init__(
        self,
        database: Database,
        presence: int,
        heard: Callable[[str], None],
        connected: Callable[[], None],
        revive: Callable[[], Awaitable[object]] | None,
    ) -> None:
        self._database = database
        self._presence = presence
        self._heard = heard
        self._connected = connected
        self._revive = revive
        self.ready = asyncio.Event()
        """Whether it is connected, and present, at this moment."""

    async def run(self) -> None:
        backoff = Backoff()
        while True:
            pass_cancellation()
            try:
                connection = await self._database.connect()
                async with connection:
                    await self._prepare(connection)
                    backoff = Backoff()
                    await self._listen(connection)
            except Exception as error:  # its process counts as dead without it, so it goes on whatever it was
                get_logger().warning(
                    "not connected to the database; trying again",
                    database=self._database.place,
                    error=in_one_line(error),
                )
                await self._start_again()
            finally:
                self.ready.clear()
            await backoff.wait()

    async def _start_again(self) -> None:
        """A server of our own has nobody else to start it again after a crash."""
        if self._revive is not None:
            try:
                await self._revive()
            except (OSError, RuntimeError) as error:
                get_logger().error("the embedded server does not start", error=str(error))

    async def _prepare(self, connection: Connection) -> None:
        # Shared, because the server may still take an earlier connection of ours for alive, which holds it, too.
        await connection.execute("select pg_advisory_lock_shared(%s, %s)", (PRESENCE, self._presence))
        await connection.execute("listen penstock")
        self.ready.set()
        self._connected()

    async def _listen(self, connection: Connection) -> None:
        while True:
            pass_cancellation()
            async for notification in connection.notifies(timeout=_IDLE):
                self._heard(notification.payload)
            async with asyncio.timeout(_ANSWER):
                await connection.execute("select 1")
