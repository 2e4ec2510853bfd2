"""What a backend has between `initialize` and `shutdown`: connections, and the tasks that look after the database.

The rule kept here: what is opened here is closed here, in the opposite order.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from ....observe.logs import get_logger
from .database import Database
from .listener import Listener
from .mirrors import Mirrors
from .queue import Queue
from .schema import apply_schema
from .settings import Settings
from .store import Store
from .sweeper import Sweeper

__all__ = ["Opened"]


class Opened:
    """Made by `make`, on the running loop; to be closed."""

    def __init__(self, database: Database, queue: Queue, settings: Settings) -> None:
        self.database = database
        self.queue = queue
        self.store = Store(database, queue)
        self.mirrors = Mirrors(self.store)
        self.presence = secrets.randbits(31)
        self.loop = asyncio.get_running_loop()
        self.working: set[asyncio.Task[Any]] = set()
        self.sweeper = Sweeper(database, self.store, interval=settings.sweep_interval, heartbeat=settings.heartbeat)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def make(
        cls,
        dsn: str,
        settings: Settings,
        heard: Callable[[str], None],
        look: Callable[[], None],
        revive: Callable[[], Awaitable[object]] | None,
    ) -> Opened:
        """Connect, make the tables, and begin to listen and to sweep."""
        database = Database(
            dsn, name=f"penstock {settings.name}", connect_timeout=settings.connect_timeout, max_size=settings.pool_size
        )
        await database.open()
        try:
            async with database.pool.connection() as connection:
                await apply_schema(connection)
            queue = Queue(database, settings.queue)
            await queue.open()
        except BaseException:
            await database.close()
            raise
        opened = cls(database, queue, settings)
        opened._listen(heard, look, revive)
        return opened

    def _listen(
        self, heard: Callable[[str], None], look: Callable[[], None], revive: Callable[[], Awaitable[object]] | None
    ) -> None:
        def hear(payload: str) -> None:
            self.mirrors.heard(payload)
            heard(payload)

        def connected() -> None:
            self.mirrors.look()
            look()

        self.listener = Listener(self.database, self.presence, hear, connected, revive)
        for name, run in (
            ("listener", self.listener.run),
            ("mirrors", self.mirrors.run),
            ("sweeper", self.sweeper.run),
        ):
            task = asyncio.create_task(run(), name=f"penstock {name}")
            task.add_done_callback(_tell)
            self._tasks.append(task)

    async def close(self) -> None:
        if self.working:
            await asyncio.wait(self.working)
        await self.mirrors.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self.database.close()


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        get_logger().error(f"{task.get_name()} has ended", error=repr(task.exception()))
