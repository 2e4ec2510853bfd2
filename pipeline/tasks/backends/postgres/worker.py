"""A worker: takes jobs from the queue, and does the attempts.

The rule kept here: procrastinate decides which job is next and says when one is to be aborted; what is done with it, and
how it ends, is the attempt's. A worker that stops loses nothing: what it cannot finish goes back to the queue.
"""

from __future__ import annotations

import asyncio

import psycopg
from procrastinate import JobContext
from procrastinate.exceptions import JobAborted
from procrastinate.job_context import AbortReason

from ....observe.logs import get_logger
from ...events import TaskKey
from .attempt import Attempt, AttemptOptions
from .database import AWAY, Database, in_one_line, pass_cancellation
from .queue import Queue
from .store import Store

__all__ = ["Worker"]

_NOW = 1.0
"""Seconds that a database that is away has to come back when a worker is to stop at once."""


class Worker:
    """One worker of this process. `run()` it once; `stop()` it at any time, twice for at once."""

    def __init__(
        self, database: Database, store: Store, queue: Queue, options: AttemptOptions, *, heartbeat: float
    ) -> None:
        self._database = database
        self._store = store
        self._queue = queue
        self._options = options
        self._heartbeat = heartbeat
        self._attempts: set[Attempt] = set()
        self._stopping = asyncio.Event()
        self._now = asyncio.Event()
        self.stuck: list[TaskKey] = []
        """Tasks whose work did not stop, and was left behind."""

    @property
    def running(self) -> int:
        """Tasks that it is at."""
        return sum(attempt.claim is not None for attempt in self._attempts)

    def stop(self) -> None:
        """Take nothing more; finish what runs within the grace, and give back the rest. Again: give back all at once."""
        if self._stopping.is_set():
            self._now.set()
            self._database.hurry(_NOW)
            for attempt in self._attempts:
                attempt.give_back()
        self._stopping.set()

    def heard(self, payload: str) -> None:
        """The database calls: somebody has asked a task to stop."""
        task, _, what = payload.partition(" ")
        if what == "asked":
            for attempt in self._attempts:
                if str(attempt.task) == task:
                    attempt.look()

    def look(self) -> None:
        """Something may have been missed."""
        for attempt in self._attempts:
            attempt.look()

    async def run(self, present: asyncio.Event, *, concurrency: int, grace: float) -> None:
        """Work until it is stopped; cancelling does that, too. It begins when it is `present`, or the sweeper would take it for lost."""
        self._database.hurry(None)
        await self._until_present(present)
        beats = asyncio.create_task(self._beat(), name="heartbeat")
        cancelled: asyncio.CancelledError | None = None
        try:
            while not self._stopping.is_set():
                serving = asyncio.create_task(
                    self._queue.run(
                        concurrency=concurrency, grace=grace, heartbeat=self._heartbeat, name=self._options.worker
                    )
                )
                cancelled = await self._serve(serving, grace)
        finally:
            beats.cancel()
            await asyncio.wait([beats])
            self._database.hurry(None)
        if cancelled is not None:
            raise cancelled

    async def _until_present(self, present: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (present, self._stopping)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def perform(self, context: JobContext, task: int, run: int, attempt: int) -> None:
        """What is done with a job. To procrastinate it ends well, or as aborted; the task's own end is written already."""
        doing = Attempt(self._store, self._options, context.job, task, run, attempt)
        self._attempts.add(doing)
        if self._now.is_set():
            doing.give_back()
        running = asyncio.create_task(doing.run(), name=f"attempt {attempt} of task {task}")
        try:
            while not running.done():
                try:
                    await asyncio.wait([running])
                except asyncio.CancelledError:  # procrastinate's way to say something
                    me = asyncio.current_task()
                    assert me is not None
                    me.uncancel()
                    if context.abort_reason() is AbortReason.USER_REQUEST:
                        doing.look(aborted=True)
                    else:
                        doing.give_back()
        finally:
            self._attempts.discard(doing)
        running.result()
        if doing.stuck and doing.claim is not None:
            self.stuck.append(doing.claim.key)
        if doing.cancelled:
            raise JobAborted

    async def _serve(self, serving: asyncio.Task[None], grace: float) -> asyncio.CancelledError | None:
        """Until this run of procrastinate's worker is over. Returns the cancellation that has ended it."""
        cancelled: asyncio.CancelledError | None = None
        stopping = asyncio.create_task(self._stopping.wait())
        while not serving.done():
            try:
                await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not serving.done():
                    self._database.hurry(_NOW if self._now.is_set() else grace + self._options.cleanup + 5.0)
                    serving.cancel()
                    await asyncio.wait([serving])
            except asyncio.CancelledError as error:
                cancelled = error
                self.stop()
        stopping.cancel()
        error = None if serving.cancelled() else serving.exception()
        told = None if error is None else in_one_line(error)
        if not self._stopping.is_set():
            get_logger().error("procrastinate's worker has ended; starting it again", error=told)
            await asyncio.sleep(1.0)
        elif told is not None:
            get_logger().warning("procrastinate's worker could not end in good order", error=told)
        return cancelled

    async def _beat(self) -> None:
        """Say that we live, and find out about tasks that are no longer ours, or that were asked to stop."""
        while True:
            pass_cancellation()
            await asyncio.sleep(min(5.0, self._heartbeat / 6))
            held = {attempt.task: attempt for attempt in self._attempts if attempt.claim is not None}
            if not held:
                continue
            try:
                ours = await self._store.beat(self._options.presence, list(held))
            except (*AWAY, psycopg.Error) as error:
                get_logger().warning("no heartbeat could be written", error=in_one_line(error))
                continue
            for task, attempt in held.items():
                run, number, reasons = ours.get(task, (0, 0, 0))
                if (run, number) == (attempt.run_number, attempt.attempt):
                    if reasons > attempt.heard:
                        attempt.look()
                elif attempt in self._attempts:
                    attempt.look()  # it is another's, or it has just ended
