"""A pool of threads that take jobs from one queue.

The rule kept here: no item waits behind a slow one while another thread is idle. Quick jobs are queued in bunches, and
a thread that takes a bunch offers it on at once, so that others take from it too; results are collected in a deque, and
the loop is woken once for many. A thread cannot be killed: one
that overruns its time is given up, its item fails, and another thread takes its place.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

from pipeline.cancellation.reason import CancelReason
from pipeline.runtime import PipelineRuntime

from .base import Outcome, WorkerState
from .performer import Performer, WorkerStopped
from .pooled import HOLD_LIMIT, PARTIAL_LIMIT, Job, Order

__all__ = ["ThreadExecutor"]

_TARGET = 0.001
"""Seconds of work that a thread holds ahead, unless `buffer` says how many items."""
_BUNCH, _BUNCH_LIMIT = 0.0001, 64
"""Seconds of work, and jobs, in one bunch."""
_CREDIT_POLL = 0.1
"""Seconds between two looks at the stop token while a generator waits for room."""


class ThreadExecutor:
    """The threads of one stage in one run. All methods on the run's loop, but for what `_Worker` says."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.bunches: queue.SimpleQueue[deque[Job] | None] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._started = 0
        self._given = 0
        self._mean = 0.0
        self._results: deque[tuple[_Worker, Job, Outcome]] = deque()
        self._woken = False
        self._closing = False
        self._aborted = False
        self._all_gone: asyncio.Future[None] | None = None
        self._clock: asyncio.TimerHandle | None = None

    # --- what the stage asks

    def start(self) -> None:
        """Threads start when there is work for one more; all at once when they have a `setup`."""
        if self.order.handlers[0].setup is not None or len(self.order.handlers) > 1:
            for _ in range(self.order.concurrency):
                self._hire()

    @property
    def capacity(self) -> int:
        return self.order.concurrency * (1 + self._hold())

    def room(self) -> int:
        return 0 if self._aborted else self.capacity - self._given

    def submit(self, jobs: Sequence[Job]) -> None:
        self._given += len(jobs)
        size = min(max(int(_BUNCH / self._mean), 1), _BUNCH_LIMIT) if self._mean else 1
        for start in range(0, len(jobs), size):
            self.bunches.put(deque(jobs[start : start + size]))
        while len(self._workers) < min(self._given, self.order.concurrency):
            self._hire()
        self._watch_clock()

    async def close(self) -> None:
        self._closing = True
        for _ in self._workers:
            self.bunches.put(None)
        if self._workers:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone  # a `teardown` may take its time; a stop cancels this wait

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        self._stop_clock()
        for worker in self._workers:
            worker.interrupt()
            self.bunches.put(None)

    def _hold(self) -> int:
        """Items that a thread may hold ahead: as `buffer` says, or about a millisecond's work."""
        if self.order.buffer is not None:
            return min(max(self.order.buffer, 1), HOLD_LIMIT)
        return min(max(int(_TARGET / self._mean), 1), HOLD_LIMIT) if self._mean else 1

    # --- threads and results

    def _hire(self) -> None:
        worker = _Worker(self, self._started)
        self._started += 1
        self._workers.add(worker)
        self.order.runtime.start_thread(worker.main, name=f"{self.order.stage}:worker-{worker.number}")

    def finished(self, worker: _Worker, job: Job, outcome: Outcome) -> None:
        """From a worker's thread: a job is done."""
        self._results.append((worker, job, outcome))
        if not self._woken:
            self._woken = True
            self.order.runtime.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self._woken = False  # before looking: what is appended from now on rings again
        results = self._results
        while results:
            worker, job, outcome = results.popleft()
            if self._aborted or worker.given_up:
                continue
            self._given -= 1
            if outcome.seconds > 0:
                self._mean = self._mean * 0.8 + outcome.seconds * 0.2 if self._mean else outcome.seconds
            job.outcome = outcome
            self.order.news(job)
        self.order.ready()

    def gone(self, worker: _Worker, error: BaseException | None, what: str) -> None:
        """On the loop: a worker's thread is about to end."""
        self._workers.discard(worker)
        if error is not None and not worker.given_up:
            self.order.broke(error, what)
        if not self._workers and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    # --- the clock of attempts

    def _watch_clock(self) -> None:
        timeout = self.order.handlers[0].timeout
        if timeout is not None and self._clock is None and not self._aborted:
            loop = asyncio.get_running_loop()
            self._clock = loop.call_later(min(timeout / 4, 0.25), self._look_at_clock, timeout)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _look_at_clock(self, timeout: float) -> None:
        self._clock = None
        now = monotonic()
        for worker in list(self._workers):
            job, began = worker.job, worker.began
            if job is not None and began and now - began > timeout:
                self._give_up(worker, job, timeout)
        if self._given and not self._closing:
            self._watch_clock()

    def _give_up(self, worker: _Worker, job: Job, timeout: float) -> None:
        """A thread overruns: leave it behind, try its item again or fail it, and hire another."""
        worker.given_up = True
        worker.interrupt()
        self._workers.discard(worker)
        error = TimeoutError(f"the attempt took more than {timeout:g} s; its thread cannot be stopped and was left behind")
        attempt = worker.state.attempt
        delay = self.order.handlers[0].retry.delay(attempt, error)
        if delay is None:
            self._given -= 1
            job.outcome = Outcome(error=error, attempts=attempt, retried=attempt - job.attempt, timed_out=True, seconds=timeout)
            self.order.news(job)
        else:
            job.retried += attempt - job.attempt + 1
            job.attempt = attempt + 1
            asyncio.get_running_loop().call_later(delay, self.bunches.put, deque((job,)))
        self._hire()
        self.order.ready()


class _Worker:
    """One thread: takes jobs, calls the handler, hands back outcomes. `main` and below run in the thread."""

    def __init__(self, executor: ThreadExecutor, number: int) -> None:
        self.number = number
        self.job: Job | None = None
        self.began = 0.0
        self.given_up = False
        self._executor = executor
        self._runtime: PipelineRuntime = executor.order.runtime
        order = executor.order
        handler = order.handlers[number % len(order.handlers)]
        self.state = WorkerState(order.stage, number, self)
        self._performer = Performer(handler, self.state, self)
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
            self._executor.order.news(job)

    # --- from the loop

    def interrupt(self) -> None:
        """Ask the thread to stop: the token turns, a running coroutine is cancelled."""
        self._stop = True
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
        bunches = self._executor.bunches
        many = self._performer.many
        bunch: deque[Job] = deque()
        while not self.cancelled:
            try:
                job = bunch.popleft()
            except IndexError:
                following = bunches.get()
                if following is None:
                    return
                bunch = following
                if len(bunch) > 1:
                    bunches.put(bunch)  # whoever is idle takes from it as well
                continue
            self.job = job
            if many:
                self._credits, self._credit = queue.SimpleQueue(), PARTIAL_LIMIT
                job.grant = self._credits.put
            outcome = self._performer.perform(job.item, job.attempt)
            outcome.retried += job.retried
            self.job, self.began = None, 0.0
            self._executor.finished(self, job, outcome)
