"""`TaskCoordinator`: starts tasks in this process, knows them by their keys, and lets anybody watch and cancel them.

The rule kept here: one coordinator, one event loop, one run of a key at a time. What is over is kept for those who come
late, within bounds.

Example:
    >>> from pipeline.tasks import TaskCoordinator
    >>> coordinator = TaskCoordinator()
    >>> coordinator.start_task("shop", "import", 7, pipeline, timeout=3600)
    >>> async for event in coordinator.subscribe("shop", "import", 7): ...
    >>> await coordinator.cancel_task("shop", "import", 7, "wrong file")
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from time import monotonic
from types import TracebackType
from typing import Any, Self

from ..cancellation.reason import CancelReason
from ..cancellation.signals import running_loop
from ..cancellation.triggers import Trigger
from ..observe.logs import get_logger
from .errors import CoordinatorClosedError, TaskAlreadyRunningError
from .events import TaskKey
from .execution import check_interval
from .log import HistorySubscription, TaskLog
from .running import RunningTask, as_reason
from .shutdown import ShutdownReport, SignalledShutdown, check_seconds, check_stop, stop_tasks
from .status import Subscription, TaskHub, TaskStatus
from .task import Work

__all__ = ["TaskCoordinator", "coordinator"]

_BYTES_OF_ENDED = 64 << 20
"""What the events of all tasks that are over may take together, about."""


class TaskCoordinator(TaskHub):
    """Tasks of this process. While one runs, the coordinator belongs to its event loop; no method is for other threads.

    Of tasks that are over the newest `keep` are kept, for `keep_for` seconds, and as long as all their
    events take no more than 64 MiB.
    Snapshots of pipelines become `progress` events at most every `progress_interval` seconds. As `async with` it shuts
    down when it is left.
    """

    def __init__(self, *, progress_interval: float = 0.25, keep: int = 1_000, keep_for: float = 3_600.0) -> None:
        check_interval(progress_interval)
        check_seconds("keep_for", keep_for)
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"keep is a whole number, 0 or more, not {keep!r}")
        self._interval = progress_interval
        self._keep, self._keep_for = keep, keep_for
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._logs: dict[TaskKey, TaskLog] = {}
        self._running: dict[TaskKey, RunningTask] = {}
        self._ended: dict[TaskKey, tuple[TaskStatus, float, int]] = {}
        """In the order of their ends, with the time of that and what their events take."""
        self._bytes_of_ended = 0

    # --- starting

    def start_task(
        self,
        app: object,
        name: object,
        id: object,
        work: Work,
        *,
        timeout: float | None = None,
        cancel_on: Trigger | Sequence[Trigger] = (),
        items: bool = False,
        payload: Mapping[str, Any] | None = None,
    ) -> RunningTask:
        """Start a pipeline, a `StreamTask` or a coroutine function, on the running loop, and return at once.

        `timeout` in seconds; `cancel_on`: triggers that cancel it; `items=True`: each output of a pipeline is an `item`
        event. Raises `TaskAlreadyRunningError` when a task of this key has not ended, `CoordinatorClosedError` after a
        shutdown, TypeError and ValueError for what cannot be started.
        """
        key = TaskKey.of(app, name, id)
        self._bind()
        if self._closed:
            raise CoordinatorClosedError(f"the coordinator was shut down, and does not start {key}")
        if self.is_task_running(*key):
            raise TaskAlreadyRunningError(key)
        log = self._logs.get(key) or TaskLog(key)
        running = RunningTask(
            key,
            log,
            work,
            on_end=self._task_ended,
            payload=payload,
            timeout=timeout,
            cancel_on=cancel_on,
            progress_interval=self._interval,
            items=items,
        )
        self._forget(key)
        self._logs[key] = log
        self._running[key] = running
        running.start()
        return running

    def is_task_running(self, app: object, name: object, id: object) -> bool:
        """Whether a task of this key was started and has not ended."""
        self._forget_lost()
        return TaskKey.of(app, name, id) in self._running

    # --- watching and cancelling

    async def list_tasks(self, *, limit: int = 100) -> Sequence[TaskStatus]:
        """The newest tasks, those that are not over first."""
        self._forget_old()
        running = (running.status() for running in reversed(self._running.values()))
        ended = (status for status, *_ in reversed(self._ended.values()))
        return list(islice(chain(running, ended), max(limit, 0)))

    async def get_task(self, app: object, name: object, id: object) -> TaskStatus | None:
        """The status of one task; None when it is not known."""
        key = TaskKey.of(app, name, id)
        self._forget_old()
        running = self._running.get(key)
        if running is not None:
            return running.status()
        return self._ended[key][0] if key in self._ended else None

    async def cancel_task(
        self, app: object, name: object, id: object, reason: str | CancelReason | None = None, *, code: str | None = None
    ) -> bool:
        """Ask a task to stop. True while it runs, also when it was asked before: every reason is kept, the first decides.

        False, and a line in the log, when it is unknown or over. It returns at once: the task's `cancelled` event comes
        after its cleanup.
        """
        key = TaskKey.of(app, name, id)
        given = as_reason(reason, code)
        self._forget_lost()
        running = self._running.get(key)
        if running is not None:
            return running.cancel(given)
        if key in self._ended:
            get_logger(task=str(key)).info("a task that is over cannot be cancelled", state=self._ended[key][0].state.value)
        else:
            get_logger(task=str(key)).warning("an unknown task cannot be cancelled")
        return False

    def subscribe(
        self, app: object, name: object, id: object, *, last_event_id: int | None = None, buffer: int = 256
    ) -> Subscription:
        """Its events after `last_event_id`, as far as they are kept, and then those to come, up to the terminal one.

        `last_event_id=None` begins with the current or last run. Somebody for whom more than `buffer` events wait loses
        the oldest progress among them. Nothing is kept for a subscription but its position. Raises `UnknownTaskError` at
        the first event for a task that is not known.
        """
        key = TaskKey.of(app, name, id)
        self._forget_old()
        return HistorySubscription(self._logs.get(key) or TaskLog(key), last_event_id=last_event_id, buffer=buffer)

    # --- ending

    async def shutdown(self, timeout: float = 10.0, reason: str | CancelReason | None = None) -> ShutdownReport:
        """Start nothing more, cancel everything with one reason, and wait for its cleanup for up to `timeout` seconds.

        What does not end in time is named, in the log and in the report; those who follow it get its `cancelled` event
        with `"stuck": true`. Nothing that a task does is raised here. May be called again, also while it waits: a call with
        `timeout=0` ends the waiting. The reason's code is "shutdown" unless it has one.
        """
        check_stop(self._running.values(), timeout)
        why = as_reason("the service is shutting down" if reason is None else reason, None)
        self._bind()
        self._closed = True
        return await stop_tasks(list(self._running.values()), why, timeout)

    def shutting_down_on(self, *signals: int, timeout: float = 10.0) -> SignalledShutdown:
        """For `async with`: the first of these signals shuts down, and then the block is left; the second does not wait.

            async with coordinator.shutting_down_on(signal.SIGTERM, signal.SIGINT, timeout=10):
                await server.serve()

        The code inside is cancelled when the shutdown is done, and that cancellation ends at the block. For the main thread.
        """
        return SignalledShutdown(self.shutdown, signals, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    # --- internals

    def _bind(self) -> None:
        """Belong to the running loop. What an earlier loop has left behind when it was closed is forgotten."""
        loop = running_loop()
        if loop is None:
            raise RuntimeError("tasks need a running event loop: start them in an `async def`, run by asyncio.run(main())")
        if self._loop is loop:
            return
        if self._running and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this coordinator has tasks in another event loop: make a coordinator for each loop")
        if self._loop is not None:
            self._closed = False
            self._forget_lost()
        self._loop = loop

    def _forget_lost(self) -> None:
        """Forget what a loop has left behind when it was closed: nobody will ever tell how it ended."""
        if self._running and self._loop is not None and self._loop.is_closed():
            for key in self._running:
                del self._logs[key]
            self._running.clear()

    def _task_ended(self, running: RunningTask) -> None:
        key = running.key
        if self._running.pop(key, None) is None:
            return  # of a loop that is closed
        size = self._logs[key].bytes
        self._ended[key] = (running.status(), monotonic(), size)
        self._bytes_of_ended += size
        self._forget_old()

    def _forget_old(self) -> None:
        self._forget_lost()
        oldest = monotonic() - self._keep_for
        while self._ended:
            key, (_, ended, _) = next(iter(self._ended.items()))
            if len(self._ended) <= self._keep and ended >= oldest and self._bytes_of_ended <= _BYTES_OF_ENDED:
                return
            self._forget(key)
            del self._logs[key]

    def _forget(self, key: TaskKey) -> None:
        _, _, size = self._ended.pop(key, (None, None, 0))
        self._bytes_of_ended -= size


coordinator = TaskCoordinator()
"""One for the whole program, for those who need no other."""
