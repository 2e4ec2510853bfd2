"""Submitted tasks, done where they are submitted.

The rule kept here: `submit` returns when the task is over. Whoever is cancelled while he waits takes the task with him.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from ...cancellation.reason import CancelReason
from ..coordinator import TaskCoordinator
from ..events import TaskKey
from ..running import RunningTask
from ..shutdown import stop_tasks
from .base import Submitted, TaskBackend, key_of

__all__ = ["SyncTaskBackend"]

_CLEANUP = 5.0
"""Seconds for what was left by those who have submitted it."""


class SyncTaskBackend(TaskBackend):
    """Does each task before `submit` returns: for tests, and for programs that have no background.

    The task is known to `coordinator` while it runs and afterwards, so others can watch and cancel it.
    """

    def __init__(self, *, coordinator: TaskCoordinator | None = None) -> None:
        super().__init__()
        self.coordinator = TaskCoordinator() if coordinator is None else coordinator
        self._inflight: set[RunningTask] = set()
        self._left: set[RunningTask] = set()
        """Those that nobody waits for any more, though they are not over."""

    @property
    def hub(self) -> TaskCoordinator:
        return self.coordinator

    @property
    def inflight_count(self) -> int:
        return len(self._inflight)

    async def initialize(self) -> None:
        """Nothing has to be opened."""

    async def submit(self, task: dict[str, Any]) -> TaskKey | None:
        """Do the task; its key, or None when it was dropped because there is no executor."""
        key = key_of(task)
        executor = self._executor_for(key, ready=True)
        if executor is None:
            return None
        running = self.coordinator.start_task(*key, Submitted(executor, dict(task)), payload=dict(task))
        self._inflight.add(running)
        running.gone.add_done_callback(partial(self._over, running))
        try:
            await running.wait()
        except asyncio.CancelledError:
            running.cancel("the code that has submitted the task was cancelled", code="parent_cancelled")
            if not running.gone.done():  # else nothing would take it out again
                self._left.add(running)
            await running.wait()
            raise
        return key

    def _over(self, running: RunningTask, _: object) -> None:
        self._inflight.discard(running)
        self._left.discard(running)

    async def shutdown(self) -> None:
        """What was submitted is over, or somebody waits for it; what nobody waits for is given 5 s, and named if it is stuck."""
        if self._left:
            reason = CancelReason("the backend is shutting down", code="shutdown", origin="SyncTaskBackend")
            await stop_tasks(list(self._left), reason, _CLEANUP)
