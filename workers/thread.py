"""A pool of threads that take parcels from one queue.

The rule kept here: no item waits behind a slow one while another thread is idle, and no result behind a slow item. Quick
items travel in parcels, which cost one wake-up for many. While parcels are out, the loop looks at them every millisecond:
it takes what is finished, and what has not begun in a parcel that turns out to be slow goes to the other threads. A
thread cannot be killed: one that overruns its time is given up, its item fails, and another thread takes its place.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Sequence
from time import monotonic, perf_counter
from typing import Any

from pipeline.cancellation.reason import CancelReason
from pipeline.runtime import PipelineRuntime

from .base import Outcome, WorkerState
from .bell import Bell
from .parcel import Parcel
from .performer import Performer, WorkerStopped
from .pooled import HOLD_LIMIT, PARTIAL_LIMIT, Job, Order, Pace

__all__ = ["ThreadExecutor"]

_AHEAD = 0.004
"""Seconds of work that a thread holds ahead, unless `buffer` says how many items."""
_PARCEL = 0.0001
"""Seconds of work in one parcel: about what it costs to hand it over twice. Slower items go one by one."""
_LOOK = 0.001
"""Seconds between two looks at the parcels that are out."""
_CREDIT_POLL = 0.1
"""Seconds between two looks at the stop token while a generator waits for room."""


class ThreadExecutor:
    """The threads of one stage in one run. All methods on the run's loop, but for what `_Worker` says."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.queue: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._started = 0
        self._given = 0
        self._out = 0
        """Parcels that have not come back."""
        self._pace = Pace()
        self.capacity = self._size = 1
        self._adapt()
        self._back: deque[tuple[_Worker, Parcel]] = deque()
        self._bell: Bell | None = None
        self._closing = False
        self._aborted = False
        self._all_gone: asyncio.Future[None] | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None

    # --- what the stage asks

    def start(self) -> None:
        """Threads start when there is work for one more; all at once when they have a `setup`."""
        self._bell = Bell(self._collect)
        self.order.runtime.at_end.append(self._bell.close)
        if self.order.handlers[0].setup is not None or len(self.order.handlers) > 1:
            for _ in range(self.order.concurrency):
                self._hire()

    @property
    def busy(self) -> bool:
        return self._given > 0 or (bool(self._workers) and (self._closing or self._aborted))

    def room(self) -> int:
        room = self.capacity - self._given
        # Less than a parcel's worth means that every thread still has one.
        return room if room >= self._size and not self._aborted else 0

    def share(self, items: int) -> int:
        return self._size

    def submit(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            self._given += len(parcel.items)
            self._put(parcel)
        self._look_later()
        self._watch_clock()

    async def close(self) -> None:
        self._closing = True
        for _ in self._workers:
            self.queue.put(None)
        if self._workers:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone  # a `teardown` may take its time; a stop cancels this wait

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        for timer in (self._clock, self._looking):
            if timer is not None:
                timer.cancel()
        for worker in self._workers:
            worker.interrupt()
            self.queue.put(None)

    def _ahead(self) -> int:
        """Items that a thread may hold ahead: as `buffer` says, or a few milliseconds' work; one, until items are known."""
        if not self._pace.known:
            return 1
        if self.order.buffer is not None:
            return min(max(self.order.buffer, 1), HOLD_LIMIT)
        return self._pace.items_in(_AHEAD, HOLD_LIMIT)

    def _adapt(self) -> None:
        ahead = self._ahead()
        self.capacity = self.order.concurrency * (1 + ahead)
        self._size = self._pace.items_in(_PARCEL, 1 + ahead)

    # --- parcels go and come back

    def _put(self, parcel: Parcel) -> None:
        self._out += 1
        self.queue.put(parcel)
        if len(self._workers) < min(self._out, self.order.concurrency):
            self._hire()

    def _hire(self) -> None:
        worker = _Worker(self, self._started)
        self._started += 1
        self._workers.add(worker)
        self.order.runtime.start_thread(worker.main, name=f"{self.order.stage}:worker-{worker.number}")

    def came_back(self, worker: _Worker, parcel: Parcel) -> None:
        """From a worker's thread: nothing is left to do in a parcel."""
        self._back.append((worker, parcel))
        if self._bell is not None:
            self._bell.ring()

    def _collect(self) -> None:
        back = self._back
        while back:
            worker, parcel = back.popleft()
            if self._aborted or worker.given_up:
                continue
            self._out -= 1
            self._clocked(parcel)
            self._tell(parcel)
        self._look_later()
        self.order.ready()

    def _clocked(self, parcel: Parcel) -> None:
        items = len(parcel.items)
        self._pace.add(parcel.seconds, items)
        self._adapt()
        if self.order.simple and items:
            self.order.took(parcel.seconds / items, items)

    def _tell(self, parcel: Parcel) -> None:
        """Pass on what has been finished in a parcel since the last time."""
        fresh = parcel.done - parcel.counted
        if fresh:
            parcel.counted += fresh
            self._given -= fresh
            self.order.news(parcel)

    def gone(self, worker: _Worker, error: BaseException | None, what: str) -> None:
        """On the loop: a worker's thread is about to end."""
        self._workers.discard(worker)
        if error is not None and not worker.given_up:
            self.order.broke(error, what)
        if not self._workers and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    # --- parcels that take long

    def _look_later(self) -> None:
        # More items than parcels: somewhere an item is behind another one.
        if self._given > self._out and self._looking is None and not self._aborted:
            self._looking = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """See what is finished meanwhile, and give away what waits behind a slow item while somebody is idle."""
        self._looking = None
        for worker in list(self._workers):
            parcel, seen = worker.parcel, worker.seen
            worker.seen = parcel
            if parcel is not None:
                if parcel is seen:
                    self._share_out(parcel)
                self._tell(parcel)
        self._look_later()
        self.order.ready()

    def _share_out(self, parcel: Parcel) -> None:
        idle = self.order.concurrency - sum(worker.parcel is not None for worker in self._workers)
        if idle <= 0 or not self.queue.empty():
            return
        rest = parcel.take_unbegun()
        while rest is not None:
            size = -(-len(rest.items) // max(idle, 1))
            idle -= 1
            following = rest.split(size) if size < len(rest.items) else None
            self._put(rest)
            rest = following

    # --- the clock of attempts

    def _watch_clock(self) -> None:
        timeout = self.order.handlers[0].timeout
        if timeout is not None and self._clock is None and not self._aborted:
            loop = asyncio.get_running_loop()
            self._clock = loop.call_later(min(timeout / 4, 0.25), self._look_at_clock, timeout)

    def _look_at_clock(self, timeout: float) -> None:
        self._clock = None
        now = monotonic()
        for worker in list(self._workers):
            job, began = worker.job, worker.began
            if job is not None and began and now - began > self.order.handlers[0].patience:
                self._give_up(worker, job, timeout)
        if self._given and not self._closing:
            self._watch_clock()

    def _give_up(self, worker: _Worker, job: Job, timeout: float) -> None:
        """A thread overruns: leave it behind, try its item again or fail it, and hire another."""
        parcel = worker.parcel
        if parcel is None:
            return
        rest = parcel.take_unbegun()  # first: now nothing else can begin there
        stuck = parcel.split(parcel.done) if worker.job is job else None
        if rest is not None:
            self._put(rest)
        if stuck is None or not stuck.items:
            return  # it has just come to its end
        worker.given_up = True
        worker.interrupt()
        self._workers.discard(worker)
        self._out -= 1
        self._tell(parcel)
        error = TimeoutError(f"the attempt took more than {timeout:g} s; its thread cannot be stopped and was left behind")
        attempt = worker.state.attempt
        delay = self.order.handlers[0].retry.delay(attempt, error)
        if delay is None:
            stuck.fail(Outcome(error=error, attempts=attempt, retried=attempt - job.attempt, timed_out=True, seconds=timeout))
            self._tell(stuck)
        else:
            job.retried += attempt - job.attempt + 1
            job.attempt = attempt + 1
            asyncio.get_running_loop().call_later(delay, self._put, stuck)
        self._hire()
        self.order.ready()


class _Worker:
    """One thread: takes parcels, calls the handler, hands back results. `main` and below run in the thread."""

    def __init__(self, executor: ThreadExecutor, number: int) -> None:
        self.number = number
        self.parcel: Parcel | None = None
        self.seen: Parcel | None = None
        """The parcel at the loop's last look."""
        self.job: Job | None = None
        self.began = 0.0
        self.given_up = False
        self._executor = executor
        order = executor.order
        self._runtime: PipelineRuntime = order.runtime
        self.requests = order.runtime.stop_flag
        self._known = order.known if order.simple else frozenset((Outcome,))
        handler = order.handlers[number % len(order.handlers)]
        self.state = WorkerState(order.stage, number, self)
        self._performer = Performer(handler, self.state, self)
        self._call = handler.bound(self.state) if order.simple else self._perform
        self._credits: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._credit = 0
        self._stop = False

    # --- the stop token, and what the performer asks

    @property
    def cancelled(self) -> bool:
        return self._stop or self.given_up or self._runtime.cancelled

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        return self._runtime.reasons

    def attempt_begins(self, attempt: int) -> None:
        del attempt  # in `state` already
        self.began = monotonic()

    def attempt_ends(self) -> None:
        self.began = 0.0

    def out_of_memory(self) -> None:
        """Threads have no limit of their own."""

    def send(self, output: Any) -> None:
        """Hand on one output of a generator; waits while `PARTIAL_LIMIT` have not left downstream yet."""
        job = self.job
        assert job is not None
        if self._credit <= 0:
            self._wait_credit()
        if self.cancelled:
            raise WorkerStopped
        self._credit -= 1
        job.add_output(output)
        self._runtime.call_soon_threadsafe(self._tell, job)

    def _wait_credit(self) -> None:
        """Wait for room, off the attempt's clock."""
        spent, self.began = monotonic() - self.began, 0.0
        while self._credit <= 0 and not self.cancelled:
            try:
                self._credit += self._credits.get(timeout=_CREDIT_POLL)
            except queue.Empty:
                continue
        self.began = monotonic() - spent

    def _tell(self, job: Job) -> None:
        if not self.given_up and not job.settled:
            self._executor.order.told(job)

    # --- from the loop

    def interrupt(self) -> None:
        """Ask the thread to stop: the token turns, a running coroutine is cancelled, nothing more begins."""
        self._stop = True
        parcel = self.parcel
        if parcel is not None:
            parcel.take_unbegun()
        self._performer.interrupt()

    # --- the thread

    def main(self) -> None:
        error: BaseException | None = None
        what = "setup"
        try:
            self._performer.open()
            what = "worker"
            self._work()
            what = "teardown"
            self._performer.close()
        except BaseException as caught:
            error = caught
        finally:
            self._performer.dispose()
        self._runtime.call_soon_threadsafe(self._executor.gone, self, error, what)

    def _work(self) -> None:
        parcels = self._executor.queue
        while not self.cancelled:
            parcel = parcels.get()
            if parcel is None or self.cancelled:
                return
            self.parcel = parcel
            began = perf_counter()
            self._performer.run(parcel.source, self._call, self._known, self._unusual, parcel.results)
            parcel.seconds = perf_counter() - began
            self.parcel = None
            self._executor.came_back(self, parcel)
            parcel = None  # what it held is not ours any more

    def _unusual(self, result: Any) -> Any:
        """A result whose type is not known yet: await what is to be awaited; the stage will look at the rest."""
        result = self._performer.finish(result)
        parcel = self.parcel
        if parcel is not None and type(result) not in self._known:
            parcel.ordinary = False
        return result

    def _perform(self, job: Job) -> Outcome:
        """Everything that an item may need; never raises."""
        self.job = job
        if self._performer.many:
            self._credits, self._credit = queue.SimpleQueue(), PARTIAL_LIMIT
            job.grant = self._credits.put
        outcome = self._performer.perform(job.item, job.attempt)
        outcome.retried += job.retried
        self.job, self.began = None, 0.0
        return outcome
