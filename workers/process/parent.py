"""The pool of worker processes of one stage, on the run's loop.

The rules kept here:

- A worker that dies costs the item that it was at, and nothing else: what it held goes to the others. (Items that were
  finished and whose results had not left the worker yet, at most a few milliseconds' worth, are done again.)
- No item waits behind a slow one while another worker is idle: what has not begun is called back.
- Descriptors on this side never block, so that two full pipes can never wait for each other.
- Workers that die without finishing anything are replaced a bounded number of times; one that cannot even start fails
  the run with the cause.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Any

from pipeline.errors import WorkerLostError

from ..base import Handler, Outcome
from ..parcel import Parcel
from ..pooled import HOLD_LIMIT, Job, Order, Pace
from . import faults
from .handlers import pack_handler
from .link import WorkerLink, program_is_ending
from .load import Load
from .memory import Memory
from .packer import SCALARS, is_unreadable, unreadable
from .shared import SharedWords
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
_BACKOFF = 0.05
"""Seconds before the second replacement in a row; doubles up to one second."""


class ProcessExecutor:
    """The worker processes of one stage in one run."""

    def __init__(self, order: Order, start_method: str, restarts: int) -> None:
        self._order = order
        self._method = start_method
        self._restarts = restarts
        self._packed = [pack_handler(order.stage, handler) for handler in order.handlers]
        self._loads: dict[WorkerLink, Load] = {}
        self._backlog: deque[Parcel] = deque()
        self._memory = Memory()
        self._number = 0
        self._deaths = 0
        self._given = 0
        self._pace = Pace()
        self._hold = self._size = 1
        """Items that one worker may have, the one at work included; items in one parcel."""
        self._adapt()
        self._hopeless: WorkerLostError | None = None
        self._closing = False
        self._aborted = False
        self._all_gone: asyncio.Future[None] | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None

    # --- what the stage asks

    def start(self) -> None:
        for _ in range(self._order.concurrency):
            self._hire()

    @property
    def capacity(self) -> int:
        return self._order.concurrency * self._hold

    def room(self) -> int:
        if self._aborted:
            return 0
        if self._hopeless is not None:
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
        for link in self._loads:
            link.hang_up()
        if self._loads:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone  # a `teardown` may take its time; a stop cancels this wait

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        self._stop()
        for link in self._loads:
            link.send(Frame.CANCEL, self._order.runtime.reasons)
            link.hang_up()

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

    # --- workers come

    def _hire(self) -> None:
        number = self._number
        self._number += 1
        load = Load(self._order.handlers[number % len(self._order.handlers)])
        link = WorkerLink(
            self._order.runtime,
            f"{self._order.stage}:worker-{number}",
            self._method,
            (self._packed[number % len(self._packed)], self._order.stage, number),
            self._memory,
            on_frame=self._obey,
            on_end=self._ended,
        )
        self._loads[link] = load
        link.start()

    # --- parcels go

    def _hand_out(self) -> None:
        """Give the backlog to the workers, evenly, each no more than it may hold."""
        if self._hopeless is not None:
            self._fail_backlog(self._hopeless)
        ready = [(link, load) for link, load in self._loads.items() if link.ready and not load.doomed]
        # While some are still starting, nobody gets a second item that one of them could begin at once.
        hold = self._hold if len(ready) == len(self._loads) else 1
        backlog = self._backlog
        while backlog and ready:
            link, load = min(ready, key=_held)
            space = hold - load.held
            if space < min(len(backlog[0].items), self._size, hold):
                break
            parcel = backlog.popleft()
            idle = sum(not other.held for _, other in ready)
            # The last ones are shared among all that have nothing to do.
            size = min(space, -(-len(parcel.items) // max(idle - len(backlog), 1)))
            if size < len(parcel.items):
                backlog.appendleft(parcel.split(size))
            self._give(link, load, parcel)
        self._watch_clock()
        self._look_later()

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

    def _obey(self, link: WorkerLink, kind: Frame, content: Any) -> None:
        load = self._loads.get(link)
        if load is None or self._aborted:
            return
        if kind is Frame.RESULTS:
            self._results(link, load, *content)
            self._deaths = 0
            self._hand_out()
        elif kind is Frame.OUTPUTS:
            self._outputs(link, load, *content)
        elif kind is Frame.READY:
            link.is_ready(takes_blocks=content)
            self._hand_out()
        elif kind is Frame.RETURNED:
            self._called_back(load, content)
        elif kind is Frame.BROKEN:
            what, packed = content
            load.broken = True
            if what == "handler":
                what = "loading the handler"
            self._order.broke(link.packer.open_error(packed), what)
        self._order.ready()

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
        idle = any(link.ready and not load.held for link, load in self._loads.items())
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

    def _ended(self, link: WorkerLink, exit_code: int | None, error: BaseException | None) -> None:
        """A worker is gone, its last results are in, and its descriptors are closed."""
        load = self._loads.pop(link)
        if not (self._aborted or program_is_ending()):
            if load.parcels or not self._closing:
                self._bury(link, load, exit_code, error)
            self._order.ready()
        if not self._loads and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    def _bury(self, link: WorkerLink, load: Load, exit_code: int | None, error: BaseException | None) -> None:
        if load.broken:
            return  # the run is failing for that reason already
        if not link.ready and (error is not None or (exit_code or 0) >= 0):
            self._order.broke(error or faults.not_started(self._order.stage, exit_code), "starting a worker process")
            return
        self._take_back(link, load, exit_code)
        self._deaths += 1
        if self._deaths > max(self._restarts, 1) * self._order.concurrency:
            self._give_up()
        elif not self._closing:
            delay = 0.0 if self._deaths == 1 else min(_BACKOFF * 2.0 ** min(self._deaths - 2, 10), 1.0)
            asyncio.get_running_loop().call_later(delay, self._replace)
        self._hand_out()

    def _replace(self) -> None:
        if not (self._aborted or self._closing or self._hopeless is not None or program_is_ending()):
            self._hire()

    def _take_back(self, link: WorkerLink, load: Load, exit_code: int | None) -> None:
        """The item at work is lost, or has timed out; the others go back to the head of the backlog, in order."""
        left, lost = load.take_all(link.last_item - 1)
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
            cause = faults.lost(self._order.stage, exit_code)
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

    def _give_up(self) -> None:
        """Workers die faster than they finish anything: fail what is there and what comes, by the stage's policy."""
        self._hopeless = faults.hopeless(self._order.stage, self._deaths)
        for link, load in self._loads.items():
            if not load.parcels:
                link.hang_up()

    def _fail_backlog(self, error: WorkerLostError) -> None:
        if any(load.parcels or not link.ready for link, load in self._loads.items()):
            return  # somebody may still do it
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
