"""The pool of worker processes of one stage, on the run's loop.

The rules kept here:

- A worker that dies costs the item that it was at, and nothing else: what it held goes to the others. (Items that were
  finished and whose results had not left the worker yet, at most a fraction of a millisecond's worth, are done again.)
- Descriptors on this side never block, so that two full pipes can never wait for each other.
- Workers that die without finishing anything are replaced a bounded number of times; one that cannot even start fails
  the run with the cause.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any

from pipeline.errors import WorkerLostError

from ..base import Handler, HandlerKind, Outcome
from ..pooled import HOLD_LIMIT, Job, Order
from .link import WorkerLink, program_is_ending
from .wire import Frame, SharedWords, pack, pack_handler, unpack

__all__ = ["ProcessExecutor"]

_TARGET = 0.002
"""Seconds of work in one batch; a worker holds two, unless `buffer` says how many items."""
_SLOW = 0.02
"""Seconds: items that take longer are handed over one by one. The way there and back, some 0.2 ms, is then within 1%,
and no item waits behind another while a worker is free."""
_BACKOFF = 0.05
"""Seconds before the second replacement in a row; doubles up to one second."""
_MARGIN = 0.25
"""Seconds beyond its timeout that a coroutine gets to end by itself before its process is killed."""


class ProcessExecutor:
    """The worker processes of one stage in one run."""

    def __init__(self, order: Order, start_method: str, restarts: int) -> None:
        self._order = order
        self._method = start_method
        self._restarts = restarts
        self._packed = [pack_handler(order.stage, handler) for handler in order.handlers]
        self._workers: dict[WorkerLink, _Load] = {}
        self._backlog: deque[Job] = deque()
        self._number = 0
        self._deaths = 0
        self._given = 0
        self._mean = 0.0
        self._hopeless: WorkerLostError | None = None
        self._closing = False
        self._aborted = False
        self._all_gone: asyncio.Future[None] | None = None
        self._clock: asyncio.TimerHandle | None = None

    # --- what the stage asks

    def start(self) -> None:
        for _ in range(self._order.concurrency):
            self._hire()

    @property
    def capacity(self) -> int:
        return self._order.concurrency * self._hold()

    def room(self) -> int:
        if self._aborted:
            return 0
        if self._hopeless is not None:
            return HOLD_LIMIT
        if not any(link.ready for link in self._workers):
            return 0
        return self.capacity - self._given

    def submit(self, jobs: Sequence[Job]) -> None:
        self._given += len(jobs)
        self._backlog.extend(jobs)
        self._hand_out()

    async def close(self) -> None:
        self._closing = True
        self._stop_clock()
        for link in self._workers:
            link.hang_up()
        if self._workers:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone  # a `teardown` may take its time; a stop cancels this wait

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        self._stop_clock()
        for link in self._workers:
            link.send(Frame.CANCEL, self._order.runtime.reasons)
            link.hang_up()

    def _hold(self) -> int:
        """Items that one worker may have, the one at work included."""
        if self._order.buffer is not None:
            return 1 + min(max(self._order.buffer, 1), HOLD_LIMIT)
        if not self._mean or self._mean > _SLOW:
            return 1
        return min(2 * max(int(_TARGET / self._mean), 1), HOLD_LIMIT)

    # --- workers come

    def _hire(self) -> None:
        number = self._number
        self._number += 1
        load = _Load(self._order.handlers[number % len(self._order.handlers)])
        link = WorkerLink(
            self._order.runtime,
            f"{self._order.stage}:worker-{number}",
            self._method,
            (self._packed[number % len(self._packed)], self._order.stage, number),
            on_frame=self._obey,
            on_end=self._ended,
        )
        self._workers[link] = load
        link.start()

    # --- jobs go

    def _hand_out(self) -> None:
        """Give the backlog to the workers, evenly, each no more than it may hold."""
        if self._hopeless is not None:
            self._fail_backlog(self._hopeless)
        ready = [(link, load) for link, load in self._workers.items() if link.ready and not load.doomed]
        # While some are still starting, nobody gets a second item that one of them could begin at once.
        hold = self._hold() if len(ready) == len(self._workers) else 1
        while self._backlog:
            free = sorted((item for item in ready if len(item[1].jobs) < hold), key=lambda item: len(item[1].jobs))
            if not free:
                break
            share = max(1, -(-len(self._backlog) // len(free)))
            for link, load in free:
                self._give(link, load, min(share, hold - len(load.jobs), len(self._backlog)))
        self._watch_clock()

    def _give(self, link: WorkerLink, load: _Load, count: int) -> None:
        entries: list[tuple[int, int, Any]] = []
        for _ in range(count):
            job = self._backlog.popleft()
            try:
                packed = pack(job.item, by_value=job.by_value)
            except Exception as error:  # an item's own pickling code may raise anything
                self._finish(job, Outcome(error=_unsendable(error), attempts=job.attempt))
                continue
            number = load.add(job)
            job.grant = lambda left, number=number: self._grant(link, load, number, left)
            entries.append((number, job.attempt, packed))
        if entries:
            link.send(Frame.JOBS, entries)

    def _grant(self, link: WorkerLink, load: _Load, number: int, left: int) -> None:
        if number in load.jobs and not self._aborted:
            link.send(Frame.CREDIT, left)

    # --- news comes

    def _obey(self, link: WorkerLink, kind: Frame, content: Any) -> None:
        load = self._workers.get(link)
        if load is None or self._aborted:
            return
        if kind is Frame.RESULTS:
            for number, result in content:
                self._result(load, number, result)
            self._deaths = 0
            self._hand_out()
        elif kind is Frame.OUTPUTS:
            self._outputs(load, *content)
        elif kind is Frame.READY:
            link.ready = True
            self._hand_out()
        elif kind is Frame.BROKEN:
            what, packed = content
            load.broken = True
            if what == "handler":
                what = "loading the handler"
            self._order.broke(_unpacked_error(packed), what)
        self._order.ready()

    def _result(self, load: _Load, number: int, result: Any) -> None:
        job = load.jobs.pop(number, None)
        if job is None:
            return
        kind, *content = result
        if kind is Frame.RESULTS:
            packed, attempts, retried, seconds = content
            try:
                outcome = Outcome(unpack(packed), attempts=attempts, retried=retried, seconds=seconds)
            except Exception as error:  # a result's own unpickling code may raise anything
                outcome = Outcome(error=_unreadable("result", error), attempts=attempts, retried=retried, seconds=seconds)
        elif kind is Frame.BROKEN:
            packed, trace, attempts, retried, seconds, timed_out, many = content[0]
            error = None if packed is None else _unpacked_error(packed)
            outcome = Outcome(None, error, trace, attempts, retried, seconds, timed_out, many=many)
        elif not job.by_value:
            # It could not be read: a class of the main program, perhaps. Once more, by value.
            job.by_value = True
            self._backlog.appendleft(job)
            return
        else:
            outcome = Outcome(error=_unreadable("item", RuntimeError(content[0])), attempts=job.attempt)
        if outcome.seconds > 0:
            self._mean = self._mean * 0.8 + outcome.seconds * 0.2 if self._mean else outcome.seconds
        outcome.retried += job.retried
        self._finish(job, outcome)

    def _outputs(self, load: _Load, number: int, outputs: list[Any]) -> None:
        job = load.jobs.get(number)
        if job is None:
            return
        for packed in outputs:
            try:
                job.add_output(unpack(packed))
            except Exception as error:  # see above
                job.add_output(_unreadable_output(error))
        self._order.news(job)

    def _finish(self, job: Job, outcome: Outcome) -> None:
        self._given -= 1
        job.grant = None
        job.outcome = outcome
        self._order.news(job)

    # --- workers go

    def _ended(self, link: WorkerLink, exit_code: int | None, error: BaseException | None) -> None:
        """A worker is gone, its last results are in, and its descriptors are closed."""
        load = self._workers.pop(link)
        if not (self._aborted or program_is_ending()):
            if load.jobs or not self._closing:
                self._bury(link, load, exit_code, error)
            self._order.ready()
        if not self._workers and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    def _bury(self, link: WorkerLink, load: _Load, exit_code: int | None, error: BaseException | None) -> None:
        if load.broken:
            return  # the run is failing for that reason already
        if not link.ready and (error is not None or (exit_code or 0) >= 0):
            self._order.broke(error or _start_error(self._order.stage, exit_code), "starting a worker process")
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

    def _take_back(self, link: WorkerLink, load: _Load, exit_code: int | None) -> None:
        """The item at work is lost, or has timed out; the others go back to the head of the backlog, in order."""
        at_work = link.last_item - 1
        job = load.jobs.pop(at_work, None)
        self._backlog.extendleft(reversed(load.jobs.values()))
        load.jobs.clear()
        if job is None:
            return
        attempts = max(job.attempt, link.last_attempt)
        retried = job.retried + attempts - job.attempt
        if load.doomed:
            self._overran(job, load, attempts, retried)
        else:
            cause = WorkerLostError(f"the worker process of stage {self._order.stage!r} died while it handled this item ({_death(exit_code)})")
            self._finish(job, Outcome(error=cause, attempts=attempts, retried=retried, lost=True))

    def _overran(self, job: Job, load: _Load, attempts: int, retried: int) -> None:
        handler = load.handler
        error = TimeoutError(f"the attempt took more than {handler.timeout:g} s; its worker process was killed")
        delay = handler.retry.delay(attempts, error)
        if delay is None:
            outcome = Outcome(error=error, attempts=attempts, retried=retried, timed_out=True, seconds=handler.timeout or 0.0)
            self._finish(job, outcome)
            return
        job.attempt, job.retried = attempts + 1, retried + 1
        asyncio.get_running_loop().call_later(delay, self._try_again, job)

    def _try_again(self, job: Job) -> None:
        if not self._aborted:
            self._backlog.appendleft(job)
            self._hand_out()

    def _give_up(self) -> None:
        """Workers die faster than they finish anything: fail what is there and what comes, by the stage's policy."""
        self._hopeless = WorkerLostError(
            f"{self._deaths} worker processes of stage {self._order.stage!r} died in a row without finishing an item; no more are started"
        )
        for link, load in self._workers.items():
            if not load.jobs:
                link.hang_up()

    def _fail_backlog(self, error: WorkerLostError) -> None:
        if any(load.jobs or not link.ready for link, load in self._workers.items()):
            return  # somebody may still do it
        while self._backlog:
            self._finish(self._backlog.popleft(), Outcome(error=error, attempts=0, lost=True))

    # --- the clock of attempts

    def _watch_clock(self) -> None:
        timeout = self._order.handlers[0].timeout
        if timeout is not None and self._clock is None and self._given and not (self._aborted or self._closing):
            self._clock = asyncio.get_running_loop().call_later(min(timeout / 4, 0.25), self._look_at_clock)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _look_at_clock(self) -> None:
        self._clock = None
        now = monotonic_ns()
        for link, load in self._workers.items():
            limit = _limit(load.handler)
            words = link.words
            began = words[SharedWords.BEGAN]
            if not load.doomed and words[SharedWords.ITEM] and load.jobs and began and now - began > limit * 1e9:
                load.doomed = True
                link.kill()
        self._watch_clock()


class _Load:
    """What one worker has to do."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.jobs: dict[int, Job] = {}
        """By number, in the order in which the worker takes them."""
        self.doomed = False
        """It was killed because its item took too long."""
        self.broken = False
        """It has said why it ends."""
        self._next = 0

    def add(self, job: Job) -> int:
        number = self._next
        self._next += 1
        self.jobs[number] = job
        return number


def _limit(handler: Handler) -> float:
    """Seconds after which the process is killed. A coroutine is ended by a timer in the worker, if it lets itself be."""
    timeout = handler.timeout or 0.0
    asynchronous = handler.kind in (HandlerKind.COROUTINE, HandlerKind.ASYNC_GENERATOR)
    return timeout + _MARGIN if asynchronous else timeout


def _unpacked_error(packed: Any) -> BaseException:
    try:
        return unpack(packed)
    except Exception as error:  # the worker has tried it; still, modules may differ
        return _unreadable("exception", error)


def _unsendable(error: Exception) -> TypeError:
    return TypeError(f"the item cannot be sent to a worker process: {type(error).__name__}: {error}")


def _unreadable(what: str, error: Exception) -> TypeError:
    return TypeError(f"the {what} cannot be unpickled: {type(error).__name__}: {error}")


def _unreadable_output(error: Exception) -> Any:
    from pipeline.result import Err

    return Err(_unreadable("output", error))


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}"
    return f"exit code {exit_code}"


def _start_error(stage: str, exit_code: int | None) -> WorkerLostError:
    return WorkerLostError(
        f"a worker process of stage {stage!r} ended while it started ({_death(exit_code)}). The most common cause is a main "
        'program that starts its pipeline outside of `if __name__ == "__main__":`, for a worker process imports it again; '
        "the worker's own message on stderr tells more"
    )
