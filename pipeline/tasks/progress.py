"""The snapshots of a running pipeline as `progress` events, without any code of the user's.

The rule kept here: whatever becomes of a progress event, the run goes on.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from ..metrics import PipelineSnapshot
from ..observe.logs import RateLimitedLog
from ..pipeline import Pipeline
from ..result import describe
from .data import readable
from .errors import TaskOverError
from .events import EventType
from .task import TaskContext

__all__ = ["ProgressReporter"]


class ProgressReporter:
    """Tells a snapshot at most every `interval` seconds, if something has changed; and a last one, when it is left."""

    def __init__(self, pipeline: Pipeline[Any], context: TaskContext, interval: float) -> None:
        self._pipeline = pipeline
        self._context = context
        self._interval = interval
        self._told: object = None
        self._task: asyncio.Task[None] | None = None
        self._log = RateLimitedLog(interval=10.0, task=str(context.key))

    async def __aenter__(self) -> Self:
        self._told = _counts(self._pipeline.snapshot())
        self._task = asyncio.create_task(self._report(), name=f"progress of {self._context.key}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = self._task
        assert task is not None
        task.cancel()
        interrupted: asyncio.CancelledError | None = None
        while not task.done():  # it only ever waits for our owner, who publishes in bounded time
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as again:
                interrupted = again
        if self._pipeline.runtime.ended is not None:
            await self._tell()
        self._log.flush()
        if interrupted is not None:
            raise interrupted

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._tell()

    async def _tell(self) -> None:
        snapshot = self._pipeline.snapshot()
        counts = _counts(snapshot)
        if counts == self._told:
            return
        self._told = counts
        try:
            await self._context.tell(EventType.PROGRESS, readable(snapshot))
        except TaskOverError:
            return
        except Exception as error:  # our owner's: a database that is away; the next event has the newest numbers again
            self._log.emit("warning", "progress could not be told", error=describe(error))


def _counts(snapshot: PipelineSnapshot) -> tuple[object, ...]:
    """What is new in a snapshot, other than that time has passed."""
    stages = [
        (row.received, row.processed, row.failed, row.retried, row.emitted, row.in_flight, row.queued, row.discarded)
        for row in snapshot.stages
    ]
    return snapshot.state, snapshot.reasons, snapshot.pulled, snapshot.delivered, snapshot.undelivered, tuple(stages)
