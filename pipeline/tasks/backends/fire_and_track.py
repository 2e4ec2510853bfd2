"""Submitted tasks in the background of this process.

The rule kept here: everything that was submitted is known until it is over. A shutdown waits for it, then cancels it, and
names what it had to cancel and what it had to leave behind.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from ...cancellation.reason import CancelReason
from ...observe.logs import get_logger
from ..coordinator import TaskCoordinator
from ..errors import CoordinatorClosedError
from ..events import TaskKey
from ..running import RunningTask
from ..shutdown import check_seconds, check_stop, stop_tasks
from .base import Submitted, TaskBackend, key_of

__all__ = ["AsyncFireAndTrackBackend"]


class AsyncFireAndTrackBackend(TaskBackend):
    """Each task is done by an asyncio task of the loop on which it was submitted; `submit` returns at once.

    `coordinator` knows them, one of its own unless another is given, to whose other tasks nothing is done. A shutdown waits
    for up to `shutdown_timeout_seconds` for what is in flight, then cancels it and waits for its cleanup for up to
    `cancel_timeout_seconds`.
    """

    def __init__(
        self,
        *,
        shutdown_timeout_seconds: float = 30.0,
        cancel_timeout_seconds: float = 5.0,
        coordinator: TaskCoordinator | None = None,
    ) -> None:
        check_seconds("shutdown_timeout_seconds", shutdown_timeout_seconds)
        check_seconds("cancel_timeout_seconds", cancel_timeout_seconds)
        super().__init__()
        self.coordinator = TaskCoordinator() if coordinator is None else coordinator
        self._drain_timeout = shutdown_timeout_seconds
        self._cancel_timeout = cancel_timeout_seconds
        self._inflight: dict[TaskKey, RunningTask] = {}
        self._ready = False
        self._closed = False

    @property
    def hub(self) -> TaskCoordinator:
        return self.coordinator

    @property
    def inflight_count(self) -> int:
        return sum(not running.over for running in self._inflight.values())

    async def initialize(self) -> None:
        """Get ready, also after a shutdown."""
        self._ready, self._closed = True, False

    async def submit(self, task: dict[str, Any]) -> TaskKey | None:
        """See `TaskBackend.submit`."""
        key = key_of(task)
        if self._closed:
            raise CoordinatorClosedError(f"the backend was shut down, and does not take {key}; initialize() it again")
        executor = self._executor_for(key, ready=self._ready)
        if executor is None:
            return None
        running = self.coordinator.start_task(*key, Submitted(executor, dict(task)), payload=dict(task))
        self._inflight[key] = running
        running.gone.add_done_callback(partial(self._over, running))
        return key

    def _over(self, running: RunningTask, _: object) -> None:
        if self._inflight.get(running.key) is running:
            del self._inflight[running.key]

    async def shutdown(self) -> None:
        """Take nothing more; wait for what is in flight, then cancel it. What was cancelled or is stuck is named in the log."""
        check_stop(self._inflight.values(), self._drain_timeout)
        self._ready, self._closed = False, True
        pending = list(self._inflight.values())
        if not pending:
            return
        get_logger().info("waiting for tasks in flight", tasks=len(pending), seconds=self._drain_timeout)
        await asyncio.wait([running.gone for running in pending], timeout=self._drain_timeout)
        left = [running for running in pending if not running.gone.done()]
        if left:
            names = [str(running.key) for running in left]
            get_logger().warning("tasks were still in flight, and are cancelled", tasks=names, waited=self._drain_timeout)
            reason = CancelReason("the backend is shutting down", code="shutdown", origin="AsyncFireAndTrackBackend")
            await stop_tasks(left, reason, self._cancel_timeout)
