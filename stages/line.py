"""The line in which finished items wait to leave a stage: in the input's order, or as they come.

The rule kept here: items are settled one at a time, so that outputs, policies and counts of an ordered stage follow the
input. An ordinary output leaves at once, without a task switch, when it is its turn and there is room; everything else
(an error, a full channel, a generator) is left to the one coroutine `run`. A slow item holds the line; the workers go
on behind it until the line is full.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.protocols import Inlet, Outlet
from pipeline.result import Err
from workers.base import Outcome
from workers.pooled import DONE, Job

from .control import SKIP, KillSwitch
from .desk import Desk

__all__ = ["Line", "Place"]


class Place:
    """A job that has one value and nothing else to it: what is always the same is the class's."""

    attempt, retried = 1, 0
    outputs: Any = ()
    grant: Any = None
    spoiled: Any = None
    queued = passing = booked = False
    finished = settled = False
    outcome: Outcome | None = None
    value: Any = None

    def __init__(self, item: Any) -> None:
        self.item = item


class Line:
    """Jobs that have been started and not settled yet."""

    def __init__(self, desk: Desk, inlet: Inlet, outlet: Outlet, *, ordered: bool, on_settled: Callable[[], None]) -> None:
        self._desk = desk
        self._inlet = inlet
        self._outlet = outlet
        self._ordered = ordered
        self._on_settled = on_settled
        self._jobs: deque[Job | Place] = deque()
        """In order: every job. Otherwise: those with news that `run` has to see to."""
        self._bell: asyncio.Future[None] | None = None
        self._busy = False
        """`run` is in the middle of a job, and nothing may pass it."""
        self._closing = False
        self._lent = 0
        self._known = desk.plain.known
        self._counters = desk.counters
        self._offer = outlet.offer
        self.wanted = True
        """Somebody wants to know when a job has left."""
        self.outstanding = 0
        self.waiting = 0
        """Finished jobs that wait for their turn."""

    def add(self, job: Job | Place) -> None:
        """A job begins; from now on it holds its place."""
        self.outstanding += 1
        if self._ordered:
            self._jobs.append(job)

    def news(self, job: Job | Place) -> None:
        """There are outputs of this job, or its outcome."""
        if self._desk.stopped:
            return
        if job.outcome is not None and not job.finished:
            job.finished = True  # news of its last outputs may come after that of its outcome
            self.waiting += 1
        if self._ordered:
            if not self._busy and self._jobs and job is self._jobs[0]:
                self._flush()
            self._lend()
        elif not self._busy and not self._jobs and self._leaves_at_once(job):
            self._on_settled()
        elif not job.queued:
            job.queued = True
            self._jobs.append(job)
            self._ring()

    def finished(self, place: Place) -> None:
        """The outcome is there: the same as `news`, quick for a value whose turn it is in an ordered line."""
        jobs = self._jobs
        if (
            jobs[0] is place
            and place.outcome is DONE
            and type(place.value) in self._known
            and not (self._busy or self._desk.stopped)
            and self._offer(place.value)
        ):
            jobs.popleft()
            self._counters.succeeded += 1
            self.outstanding -= 1
            if self.waiting:
                self._flush()
                self._lend()
            if self.wanted:
                self._on_settled()
            if self._closing and not self.outstanding:
                self._ring()
        else:
            self.news(place)

    def close(self) -> None:
        """No more jobs will be added: `run` returns when the last one is settled."""
        self._closing = True
        self._ring()

    # --- ordinary outputs, at once

    def _flush(self) -> None:
        """Let leave what can leave, from the head of the line."""
        jobs = self._jobs
        left = False
        while jobs and self._leaves_at_once(jobs[0]):
            jobs.popleft()
            left = True
        if jobs and (jobs[0].outputs or jobs[0].outcome is not None):
            self._ring()
        if left:
            self._on_settled()

    def _leaves_at_once(self, job: Job | Place) -> bool:
        """Settle a job that needs no wait; False if it is not such a one."""
        outcome = job.outcome
        if outcome is None or job.outputs or job.passing or job.booked or job.spoiled is not None:
            return False
        value = job.value if outcome is DONE else outcome.value
        if outcome.error is not None or outcome.many or not self._desk.plain.has(value) or not self._outlet.offer(value):
            return False
        counters = self._desk.counters
        counters.succeeded += 1
        if outcome is not DONE:
            counters.retried += outcome.retried
            counters.latency.add(outcome.seconds)
        job.settled = True
        self.outstanding -= 1
        self.waiting -= 1
        if self._closing and not self.outstanding:
            self._ring()
        return True

    def _lend(self) -> None:
        # The room of finished items is lent from the inbound edge: in all, the stage holds what it was given.
        if self._lent != self.waiting:
            self._lent = self.waiting
            self._inlet.release(self.waiting)

    # --- everything else, in turn

    async def run(self) -> None:
        """Settle what cannot leave at once, until the line is closed and empty."""
        while True:
            job = self._next()
            if job is not None:
                self._busy = True
                await self._advance(job)
                self._busy = False
                if self._desk.stopped:
                    return
                if self._ordered:
                    self._flush()
                    self._lend()
            elif self._closing and not self.outstanding:
                return
            else:
                self._bell = asyncio.get_running_loop().create_future()
                await self._bell  # bounded by the stop, which cancels this task

    def _next(self) -> Job | Place | None:
        if not self._jobs:
            return None
        job = self._jobs[0]
        if self._ordered:
            return job if job.outputs or job.outcome is not None else None
        job.queued = False
        return self._jobs.popleft()

    async def _advance(self, job: Job | Place) -> None:
        if job.outputs:
            sent = await self._send_outputs(job, job.outputs)
            if job.grant is not None and sent:
                job.grant(sent)
        outcome = job.outcome
        if outcome is None or job.outputs or job.settled:
            return
        job.settled = True
        if self._ordered:
            self._jobs.popleft()
        await self._settle(job, outcome)
        self.outstanding -= 1
        self.waiting -= 1
        self._on_settled()

    async def _send_outputs(self, job: Job | Place, outputs: deque[Any]) -> int:
        sent = 0
        while outputs:
            output = outputs.popleft()
            sent += 1
            if job.spoiled is not None or job.booked or output is SKIP:
                continue
            if isinstance(output, Err):
                job.spoiled = output
            elif isinstance(output, KillSwitch):
                job.booked = True
                self._desk.kill(output)
            elif not await self._outlet.put(output):
                return sent
        return sent

    async def _settle(self, job: Job | Place, outcome: Outcome) -> None:
        desk, emit = self._desk, self._outlet.put
        desk.counters.retried += outcome.retried
        if outcome.seconds:
            desk.counters.latency.add(outcome.seconds)
        if job.booked:
            return
        if job.passing:
            await desk.pass_on(job.value, emit)
        elif job.spoiled is not None:
            await desk.failed(desk.complete(job.spoiled, job.item, outcome.attempts), emit)
        elif outcome.error is not None:
            err = Err(outcome.error, job.item, desk.name, outcome.attempts, outcome.trace)
            await desk.failed(err, emit, lost=outcome.lost, timed_out=outcome.timed_out)
        elif outcome.many:
            desk.counters.succeeded += 1
        else:
            await desk.settle(job.item, job.value if outcome is DONE else outcome.value, outcome.attempts, emit)

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)
