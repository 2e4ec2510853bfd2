"""Who works: the worker processes of one stage, how they come, are replaced and go.

The rules kept here:

- A worker that dies is replaced, the first time at once, then after a growing pause. Workers that die one after another
  without finishing anything use up a budget; then no more are started.
- A worker that cannot even start fails the run with the cause: it would be the same for every other one.
- A worker whose time is up (`max_items`, `max_memory`) gets nothing more; its successor starts while it finishes what it
  has, and begins when it has finished. That costs no item and nothing of the budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from pipeline.observe.logs import get_logger

from ..pooled import Order
from . import faults
from .handlers import pack_handler
from .link import WorkerLink, program_is_ending
from .load import Load
from .memory import Memory
from .wire import Frame

__all__ = ["Budget", "Staff"]

_BACKOFF = 0.05
"""Seconds before the second replacement in a row; doubles up to one second."""
_STILLBORN = 3
"""Workers that may die by a signal while they start, in a row, before that is taken for their start's fault."""


class Budget:
    """How many workers may still die before no more are started; any result that comes fills it up again."""

    def __init__(self, restarts: int, workers: int) -> None:
        self._limit = restarts * workers
        self.deaths = 0
        """In a row, without a result between them."""

    def refill(self) -> None:
        """Something was finished."""
        self.deaths = 0

    def spend(self) -> float | None:
        """A worker has died: the seconds before it is replaced, or None if it is not."""
        self.deaths += 1
        if self.deaths > self._limit:
            return None
        return 0.0 if self.deaths == 1 else min(_BACKOFF * 2.0 ** min(self.deaths - 2, 10), 1.0)


class Owner(Protocol):
    """Who gives the workers something to do."""

    def obey(self, link: WorkerLink, kind: Frame, content: Any) -> None:
        """A worker has sent something."""
        ...

    def left(self, link: WorkerLink, load: Load, exit_code: int | None) -> None:
        """A worker has died: take back what it had."""
        ...

    def gone(self) -> None:
        """A worker has ended, for whatever reason, and all is said and done about it."""
        ...


class Staff:
    """The worker processes of one stage in one run."""

    def __init__(self, order: Order, owner: Owner, memory: Memory, start_method: str, restarts: int) -> None:
        self._order = order
        self._owner = owner
        self._memory = memory
        self._method = start_method
        self._packed = [pack_handler(order.stage, handler) for handler in order.handlers]
        self._number = 0
        self._stillborn = 0
        self.budget = Budget(restarts, order.concurrency)
        self.loads: dict[WorkerLink, Load] = {}
        """Every worker that has not ended, the oldest first, and what it has to do."""
        self.hopeless = False
        """No more are started."""
        self.complete = False
        """There have been as many as there should be, all ready."""
        self._closing = False
        self._aborted = False
        self._all_gone: asyncio.Future[None] | None = None

    # --- they come

    def start(self) -> None:
        """Hire as many as there should be."""
        for number in range(self._order.concurrency):
            self._hire(number % len(self._packed))

    def _hire(self, which: int) -> None:
        """One more worker, for this one of the stage's handlers."""
        order, number = self._order, self._number
        self._number += 1
        on_frame: Callable[[WorkerLink, Frame, Any], None] = self._owner.obey
        link = WorkerLink(
            order.runtime,
            order.stage,
            number,
            self._method,
            self._packed[which],
            order.max_memory,
            self._memory,
            on_frame=on_frame,
            on_end=self._ended,
        )
        self.loads[link] = Load(order.handlers[which], which)
        link.start()

    def is_ready(self, link: WorkerLink, *, takes_blocks: bool) -> None:
        """A worker is set up."""
        link.is_ready(takes_blocks=takes_blocks)
        self._stillborn = 0
        self.complete = self.complete or sum(link.ready for link in self.loads) >= self._order.concurrency

    def available(self) -> list[tuple[WorkerLink, Load]]:
        """Who may be given something: no more than may work at once."""
        staff = self.loads.items()
        finishing = sum(load.leaving and load.held > 0 for _, load in staff)
        able = [(link, load) for link, load in staff if link.ready and not (load.doomed or load.leaving)]
        return [entry for entry in able[: self._order.concurrency - finishing] if not entry[1].recalled]

    # --- they are replaced

    def replace(self, link: WorkerLink, load: Load) -> None:
        """A worker's time is up: hire its successor, and let it go when it has finished."""
        if load.leaving or self._closing or self._aborted:
            return
        load.leaving = True
        self._hire(load.which)
        self.let_go(link, load)

    def let_go(self, link: WorkerLink, load: Load) -> None:
        """Say goodbye to a worker whose time is up, once it has nothing left to do."""
        if load.leaving and not load.held:
            link.hang_up()

    def _replace_dead(self, which: int) -> None:
        if not (self._aborted or self._closing or self.hopeless or program_is_ending()):
            self._hire(which)

    # --- they go

    async def close(self) -> None:
        """Let everybody go; waits for their end, which a `teardown` may delay."""
        self._closing = True
        for link in self.loads:
            link.hang_up()
        if self.loads:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone  # a stop cancels this wait

    def abort(self) -> None:
        """Ask everybody to stop now."""
        self._aborted = True
        for link in self.loads:
            if not link.ready:
                link.output.mute()
            link.send(Frame.CANCEL, self._order.runtime.reasons)
            link.hang_up()

    def _ended(self, link: WorkerLink, exit_code: int | None, error: BaseException | None) -> None:
        """A worker is gone, its last results are in, and its descriptors are closed."""
        load = self.loads.pop(link)
        if not (self._aborted or program_is_ending()):
            if load.broken:
                pass  # the run is failing for that reason already
            elif not link.ready and (error is not None or (exit_code or 0) >= 0):
                self._broke(error or faults.not_started(self._order.stage, exit_code, link.output.last_words))
            elif load.held or not (load.leaving or self._closing):
                self._bury(link, load, exit_code)
            elif exit_code:
                self._tell_odd_end(link, exit_code)
        self._owner.gone()
        if not self.loads and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    def _bury(self, link: WorkerLink, load: Load, exit_code: int | None) -> None:
        if load.doomed:  # we have killed it; its item is finished by that
            self._owner.left(link, load, exit_code)
            self._replace_dead(load.which)
            return
        if not link.ready:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                self._broke(faults.stillborn(self._order.stage, exit_code, self._stillborn))
                return
        delay = self.budget.spend()
        self._owner.left(link, load, exit_code)
        if delay is None:
            self._give_up()
        elif not load.leaving:
            asyncio.get_running_loop().call_later(delay, self._replace_dead, load.which)

    def _broke(self, error: BaseException) -> None:
        self._order.broke(error, "starting a worker process")

    def _give_up(self) -> None:
        """They die faster than they finish anything. Those that are at work may finish."""
        self.hopeless = True
        for link, load in self.loads.items():
            load.leaving = True
            self.let_go(link, load)

    def _tell_odd_end(self, link: WorkerLink, exit_code: int) -> None:
        """Nothing is lost, but something that `teardown` was to do may be."""
        get_logger().warning(
            "a worker process did not end by itself",
            pipeline=self._order.runtime.name,
            stage=self._order.stage,
            worker=link.number,
            exit_code=exit_code,
        )
