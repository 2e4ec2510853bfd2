"""Submitted tasks, done where they are submitted.

The rule kept here: `submit` returns when the task is over. Whoever is cancelled while he waits takes the task with him.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ..coordinator import TaskCoordinator
from ..events import TaskKey
from .base import Submitted, TaskBackend, key_of

__all__ = ["SyncTaskBackend"]


class SyncTaskBackend(TaskBackend):
    """Does each task before `submit` returns: for tests, and for programs that have no background.

    The task is known to `coordinator` while it runs and afterwards, so others can watch and cancel it.
    """

    def __init__(self, *, coordinator: TaskCoordinator | None = None) -> None:
        super().__init__()
        self.coordinator = TaskCoordinator() if coordinator is None else coordinator
        self._inflight = 0

    @property
    def hub(self) -> TaskCoordinator:
        return self.coordinator

    @property
    def inflight_count(self) -> int:
        return self._inflight

    async def initialize(self) -> None:
        """Nothing has to be opened."""

    async def submit(self, task: dict[str, Any]) -> TaskKey | None:
        """Do the task; its key, or None when it was dropped because there is no executor."""
        key = key_of(task)
        executor = self._executor_for(key, ready=True)
        if executor is None:
            return None
        running = self.coordinator.start_task(*key, Submitted(executor, dict(task)), payload=task)
        self._inflight += 1
        try:
            await running.wait()
        except asyncio.CancelledError:
            running.cancel("the code that has submitted the task was cancelled", code="parent_cancelled")
            await running.wait()
            raise
        finally:
            self._inflight -= 1
        return key

    async def shutdown(self) -> None:
        """Nothing is left to be done: what was submitted is over, or somebody still waits for it."""
