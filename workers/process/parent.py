"""The pool of worker processes of one stage, on the run's loop.

The rules kept here:

- A worker that dies costs the item that it was at, and nothing else: what it held goes to the others. (Items that were
  finished and whose results had not left the worker yet, at most a few milliseconds' worth, are done again.)
- No item waits behind a slow one while another worker is idle: what has not begun is called back.
- Descriptors on this side never block, so that two full pipes can never wait for each other.

Who the workers are, and how they are replaced, is the business of `staff`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Any

from ..base import Handler, Outcome
from ..parcel import Parcel
from ..pooled import HOLD_LIMIT, Job, Order, Pace
from . import faults
from .link import WorkerLink
from .load import Load
from .memory import Memory
from .packer import SCALARS, is_unreadable, unreadable
from .shared import SharedWords
from .staff import Staff
from .wire import Frame

__all__ = ["ProcessExecutor"]

_TARGET = 0.005
"""Seconds of work in one parcel; a worker holds two, unless `buffer` says how many items."""
_WEIGHT = 1 << 21
"""Bytes in large buffers, brought and left by one parcel. More would not be in any cache when its turn comes."""
_SLOW = 0.02
"""Seconds: items that take longer are handed over one by one. The way there and back, some 0.2 ms, is then within 1%,
and no item waits behind another while a worker is free."""
_LOOK = 0.005
"""Seconds between two looks at whether items wait behind a slow one while a worker is idle."""


class ProcessExecutor:
    """The worker processes of one stage in one run."""

    def __init__(self, order: Order, start_method: str, restarts: int) -> None:
        self._order = order
        self._backlog: deque[Parcel] = deque()
        self._memory = Memory()
        self._staff = Staff(order, self, self._memory, start_method, restarts)
        self._loads = self._staff.loads
        self._given = 0
        self._pace = Pace()
        self._hold = self._size = 1
        """Items that one worker may have, the one at work included; items in one parcel."""
        self._adapt()
        self._closing = False
        self._aborted = False
        self._clock: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None

    # --- what the stage asks

    def start(self) -> None:
        self._staff.start()

    @property
    def capacity(self) -> int:
        return self._order.concurrency * self._hold

    @property
    def busy(self) -> bool:
        loads = self._loads
        return self._given > 0 or (bool(loads) and (self._closing or self._aborted)) or not all(link.ready for link in loads)

    def room(self) -> int:
        if self._aborted:
            return 0
        if self._staff.hopeless:
            return HOLD_LIMIT
        room = self.capacity - self._given
        # Less than a parcel's worth means that every worker still has one.
        return room if room >= self._size and any(link.ready for link in self._loads) else 0

    def share(self, items: int) -> int:
        return self._size

    def submit(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            self._given += len(parcel.items)
        self._backlog.extend(parcels)
        self._hand_out()

    async def close(self) -> None:
        self._closing = True
        self._stop()
        await self._staff.close()

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        self._stop()
        self._staff.abort()

    def _adapt(self) -> None:
        slow = not self._pace.known or self._pace.mean > _SLOW
        if self._order.buffer is not None:
            self._hold = 1 + min(max(self._order.buffer, 1), HOLD_LIMIT if self._pace.known else 1)
        else:
            self._hold = 1 if slow else min(2 * self._in_parcel(HOLD_LIMIT), HOLD_LIMIT)
        self._size = 1 if slow else self._in_parcel(max(self._hold // 2, 1))

    def _in_parcel(self, limit: int) -> int:
        weight = self._pace.weight
        return self._pace.items_in(_TARGET, limit if weight <= 0 else min(limit, max(int(_WEIGHT / weight), 1)))

    # --- parcels go

    def _hand_out(self) -> None:
        """Give the backlog to the workers, evenly, each no more than it may hold."""
        if self._staff.hopeless:
            self._fail_backlog()
        ready = self._staff.available()
        # While some are still starting, nobody gets a second item that one of them could begin at once.
        hold = self._hold if self._staff.complete else 1
        backlog = self._backlog
        while backlog and ready:
            link, load = min(ready, key=_held)
            space = hold - load.held
            if space < min(len(backlog[0].items), self._size, hold):
                break
            parcel = backlog.popleft()
            idle = sum(not other.held for _, other in ready)
            # The last ones are shared among all that have nothing to do.
            size = max(min(space, -(-len(parcel.items) // max(idle - len(backlog), 1)), self._left_of(load)), 1)
            if size < len(parcel.items):
                backlog.appendleft(parcel.split(size))
            self._give(link, load, parcel)
            if self._left_of(load) <= 0:
                self._staff.replace(link, load)
                ready = self._staff.available()
        self._watch_clock()
        self._look_later()

    def _left_of(self, load: Load) -> int:
        """How many more items a worker may have in its life."""
        return HOLD_LIMIT if self._order.max_items is None else self._order.max_items - load.given

    def _give(self, link: WorkerLink, load: Load, parcel: Parcel) -> None:
        load.add(parcel)
        if self._order.simple:
            items = parcel.items
            boxed = not SCALARS.issuperset(map(type, items))
            if boxed:
                items = [link.packer.box_item(item, by_value=parcel.by_value) for item in items]
        else:
            items, boxed = [(job.attempt, link.packer.box_item(job.item, by_value=parcel.by_value)) for job in parcel.items], True
            if load.handler.kind.many:
                for job in parcel.items:
                    job.grant = partial(self._grant, link, load, job)
        link.send(Frame.ITEMS, (parcel.first, items, boxed))

    def _grant(self, link: WorkerLink, load: Load, job: Job, left: int) -> None:
        if load.next is job and not self._aborted:
            link.send(Frame.CREDIT, left)

    # --- news comes

    def obey(self, link: WorkerLink, kind: Frame, content: Any) -> None:
        load = self._loads.get(link)
        if load is None or (self._aborted and kind is not Frame.BROKEN):  # a `teardown` that fails is heard even then
            return
        if kind is Frame.RESULTS:
            self._results(link, load, *content)
            self._staff.budget.refill()
            self._staff.let_go(link, load)
            self._hand_out()
        elif kind is Frame.OUTPUTS:
            self._outputs(link, load, *content)
        elif kind is Frame.READY:
            self._staff.is_ready(link, takes_blocks=content)
            self._hand_out()
        elif kind is Frame.RETURNED:
            self._called_back(load, content)
            self._staff.let_go(link, load)
        elif kind is Frame.WORN:
            self._worn(link, load)
        elif kind is Frame.BROKEN:
            what, packed = content
            load.broken = True
            if what == "handler":
                what = "loading the handler"
            self._order.broke(link.packer.open_error(packed), what)
        self._order.ready()

    def _worn(self, link: WorkerLink, load: Load) -> None:
        """A worker keeps too much memory: what it has not begun is for others."""
        load.recalled = True
        link.send(Frame.RECALL, None)  # it waits for this
        self._staff.replace(link, load)

    def _results(self, link: WorkerLink, load: Load, first: int, results: list[Any], boxed: bool, seconds: float) -> None:
        """More is finished of the parcel that a worker is at."""
        if not load.parcels:
            return
        self._clocked(link, load, len(results), seconds)
        start = 0
        if boxed:
            for at, result in enumerate(results):
                if is_unreadable(result):
                    self._finished(load, map(link.packer.open_outcome, results[start:at]), ordinary=False)
                    self._unreadable(load, result)
                    start = at + 1
            results = list(map(link.packer.open_outcome, results[start:]))
        self._finished(load, results, ordinary=not boxed)

    def _finished(self, load: Load, results: Iterable[Any], *, ordinary: bool) -> None:
        if load.parcels:
            parcel = load.parcels[0]
            parcel.add(results, ordinary=ordinary)
            load.finished(parcel.done - parcel.counted)
            self._tell(parcel)

    def _tell(self, parcel: Parcel) -> None:
        fresh = parcel.done - parcel.counted
        if fresh:
            if not self._order.simple:
                _complete(parcel, parcel.counted)
            parcel.counted += fresh
            self._given -= fresh
            self._order.news(parcel)

    def _clocked(self, link: WorkerLink, load: Load, items: int, seconds: float) -> None:
        load.untimed += items
        if seconds:
            self._pace.add(seconds, load.untimed, link.packer.moved)
            link.packer.moved = 0
            self._adapt()
            if self._order.simple:
                self._order.took(seconds / load.untimed, load.untimed)
            load.untimed = 0

    def _unreadable(self, load: Load, result: Any) -> None:
        """The worker could not read an item: a class of the main program, perhaps. Once more, by value."""
        item = load.take_next()
        if item.by_value:
            self._fail(item, Outcome(error=unreadable("item", result[1])))
        else:
            item.by_value = True
            self._backlog.appendleft(item)

    def _outputs(self, link: WorkerLink, load: Load, number: int, outputs: list[Any]) -> None:
        job = load.numbered(number)
        if job is None:
            return
        for boxed in outputs:
            job.add_output(link.packer.open_output(boxed))
        self._order.told(job)

    # --- items that wait behind a slow one

    def _look_later(self) -> None:
        if self._looking is None and not (self._aborted or self._closing) and any(load.held > 1 for load in self._loads.values()):
            self._looking = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Call back what has not begun from workers that make no progress, if another one has nothing to do."""
        self._looking = None
        idle = any(not load.held for _, load in self._staff.available())
        for link, load in self._loads.items():
            if idle and not self._backlog and load.held > 1 and load.results == load.seen and not load.recalled:
                load.recalled = True
                link.send(Frame.RECALL, None)
            load.seen = load.results
        self._look_later()

    def _called_back(self, load: Load, number: int | None) -> None:
        load.recalled = False
        if number is not None:
            self._backlog.extendleft(load.take_from(number))
            self._hand_out()

    # --- workers go

    def gone(self) -> None:
        if not self._aborted:
            self._hand_out()
            self._order.ready()

    def left(self, link: WorkerLink, load: Load, exit_code: int | None) -> None:
        """The item at work is lost, or has timed out; the others go back to the head of the backlog, in order."""
        left, lost = load.take_all(link.last_item - 1, sure=exit_code == faults.Exit.OUT_OF_MEMORY)
        self._backlog.extendleft(reversed(left))
        if lost is None:
            return
        attempt, attempts = 1, 1
        if not self._order.simple:
            attempt = lost.items[0].attempt
            attempts = max(attempt, link.last_attempt)
        if load.doomed:
            self._overran(lost, load.handler, attempt, attempts)
        else:
            cause = faults.lost(self._order.stage, exit_code, garbled=link.garbled, max_memory=self._order.max_memory)
            self._fail(lost, Outcome(error=cause, attempts=attempts, retried=attempts - attempt, lost=True))

    def _overran(self, lost: Parcel, handler: Handler, attempt: int, attempts: int) -> None:
        error = faults.overran(handler)
        delay = handler.retry.delay(attempts, error)
        if delay is None:
            outcome = Outcome(error=error, attempts=attempts, retried=attempts - attempt, timed_out=True, seconds=handler.timeout or 0.0)
            self._fail(lost, outcome)
            return
        job: Job = lost.items[0]
        job.attempt, job.retried = attempts + 1, job.retried + attempts - attempt + 1
        asyncio.get_running_loop().call_later(delay, self._try_again, lost)

    def _fail(self, parcel: Parcel, outcome: Outcome) -> None:
        parcel.fail(outcome)
        self._tell(parcel)

    def _try_again(self, parcel: Parcel) -> None:
        if not self._aborted:
            self._backlog.appendleft(parcel)
            self._hand_out()

    def _fail_backlog(self) -> None:
        """No worker will take these."""
        error = faults.hopeless(self._order.stage, self._staff.budget.deaths)
        while self._backlog:
            parcel = self._backlog.popleft()
            for _ in parcel.items:
                parcel.fail(Outcome(error=error, attempts=0, lost=True))
            self._tell(parcel)

    # --- the clock of attempts

    def _watch_clock(self) -> None:
        timeout = self._order.handlers[0].timeout
        if timeout is not None and self._clock is None and self._given and not (self._aborted or self._closing):
            self._clock = asyncio.get_running_loop().call_later(min(timeout / 4, 0.25), self._look_at_clock)

    def _stop(self) -> None:
        self._memory.close()
        for timer in (self._clock, self._looking):
            if timer is not None:
                timer.cancel()

    def _look_at_clock(self) -> None:
        self._clock = None
        now = monotonic_ns()
        for link, load in self._loads.items():
            began = link.words[SharedWords.BEGAN]
            overran = began and now - began > load.handler.patience * 1e9
            if overran and not load.doomed and link.words[SharedWords.ITEM] and load.parcels:
                load.doomed = True
                link.kill()
        self._watch_clock()


def _held(entry: tuple[WorkerLink, Load]) -> int:
    return entry[1].held


def _complete(parcel: Parcel, start: int) -> None:
    """Jobs are over: add to their outcomes what earlier workers did for them."""
    for job, outcome in zip(parcel.items[start : parcel.done], parcel.results[start : parcel.done], strict=True):
        outcome.retried += job.retried
        job.grant = None
