"""`Reservation`: resources for a block of asynchronous code.

The rule kept here: whoever leaves, however it leaves, holds nothing. A waiter may be cancelled at the moment in which it is
granted, by another thread at that, so what it does on its way out is the same in both cases: the claim is over.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from .claim import Claim, Group, Phase
from .waiting import check_timeout

if TYPE_CHECKING:
    from .amounts import Needs
    from .scheduler import Scheduler

__all__ = ["Hold", "Reservation"]


class Hold(Claim):
    """Waiting for resources in an event loop, and holding them."""

    __slots__ = ("_asked", "_future", "_granted", "_group", "_loop", "_scheduler", "_title", "at", "behind", "key", "kind", "needs", "phase")

    def __init__(
        self, scheduler: Scheduler, group: Group, needs: Needs, title: str, kind: str, priority: int, stage: int
    ) -> None:
        self.kind = kind
        self._group = group
        self.needs = needs
        self.key = (-priority, -stage, group.number, 0)
        self.phase = Phase.WAITING
        self.behind = None
        self._scheduler = scheduler
        self._title = title
        self._asked = False
        self._granted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[None] | None = None

    @property
    def group(self) -> Group:
        return self._group

    @property
    def title(self) -> str:
        return self._title

    @property
    def at_work(self) -> bool:
        return self._granted

    async def acquire(self, timeout: float | None = None) -> None:
        """Wait for the resources; does not go round the loop when they are free. Cancelled, it holds nothing."""
        scheduler = self._scheduler
        self._loop = loop = asyncio.get_running_loop()
        turn = scheduler.turn
        with turn, turn.lock:
            self.key = (*self.key[:3], scheduler.next_number())
            self.at = monotonic()
            self._asked = True
            scheduler.enter(self)
            if self._granted:
                return
            self._future = future = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self._too_late, future, timeout)
        try:
            await future
        except BaseException:
            self.release()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def release(self) -> None:
        """Give back what is held, or stop waiting. Any thread, any moment; once is enough."""
        if self._asked:
            self._scheduler.give_back(self)

    # --- its turn has come

    def granted(self) -> None:
        self._granted = True
        future, loop = self._future, self._loop
        if future is None or loop is None:
            return  # at once: nobody waits
        try:
            loop.call_soon_threadsafe(_wake, future)
        except RuntimeError:  # the loop is closed, and whoever waited in it is gone
            self.release()

    def _too_late(self, future: asyncio.Future[None], timeout: float) -> None:
        scheduler, turn = self._scheduler, self._scheduler.turn
        with turn, turn.lock:
            if self._granted:
                return
            why = scheduler.why(self)
        if not future.done():
            future.set_exception(TimeoutError(f"{self._title} was not possible within {timeout:g} s: {why}"))


class Reservation:
    """What `Scheduler.reserve` returns: an asynchronous context manager, for one use."""

    __slots__ = ("_hold", "_needs", "_priority", "_scheduler", "_stage", "_timeout", "_title")

    def __init__(
        self, scheduler: Scheduler, needs: Needs, title: str, priority: int, stage: int, timeout: float | None
    ) -> None:
        self._timeout = check_timeout(timeout)
        self._scheduler = scheduler
        self._needs = needs
        self._title = title
        self._priority = priority
        self._stage = stage
        self._hold: Hold | None = None

    async def __aenter__(self) -> Reservation:
        if self._hold is not None:
            raise RuntimeError("a reservation is for one `async with`; call reserve() again for the next")
        scheduler = self._scheduler
        scheduler.refuse_closed()
        group = scheduler.new_group(self._title)
        self._hold = Hold(scheduler, group, self._needs, self._title, "reservation", self._priority, self._stage)
        await self._hold.acquire(self._timeout)
        return self

    async def __aexit__(self, *_: Any) -> None:
        if self._hold is not None:
            self._hold.release()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
