"""What a view of tasks needs: their status, and somebody to ask for it.

The rule kept here: views (the web application, the command line, a test) know a `TaskHub` and nothing behind it, so
they are the same for tasks in this process and for tasks in a database.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, Self

from ..cancellation.reason import CancelReason
from .events import TaskEvent, TaskKey

__all__ = ["Subscription", "TaskHub", "TaskState", "TaskStatus"]


class TaskState(StrEnum):
    """Where a task is. The last four are final, and named as the event that ends it."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    """It was asked to stop, and is cleaning up."""
    ERROR = "error"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    COMPLETED = "completed"

    @property
    def over(self) -> bool:
        return self not in (TaskState.QUEUED, TaskState.RUNNING, TaskState.CANCELLING)


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """One task at one moment. Times are in seconds since the epoch, None for what has not happened.

    `attempt` counts from 1; above 1, an earlier worker was lost. `seq` is that of its newest event. `progress` is the data
    of the newest progress event, for a pipeline its snapshot. `result` is the data of the terminal event.
    """

    task: TaskKey
    state: TaskState
    attempt: int = 1
    seq: int = 0
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    reasons: tuple[CancelReason, ...] = ()
    progress: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The data of the newest `started` event: for a pipeline its stages, as a graph."""
    worker: str | None = None
    """Who does it, when that is another process."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "app": self.task.app,
            "name": self.task.name,
            "id": self.task.id,
            "state": self.state.value,
            "attempt": self.attempt,
            "seq": self.seq,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
            "reasons": [reason.to_dict() for reason in self.reasons],
            "progress": None if self.progress is None else dict(self.progress),
            "result": None if self.result is None else dict(self.result),
            "about": dict(self.about),
            "worker": self.worker,
        }


class Subscription(AbstractAsyncContextManager["Subscription"], Protocol):
    """The events of one task for one subscriber, in order, up to and with the terminal one.

    To be used in `async for`, inside `async with` when it may be left early. Leaving costs the task nothing.
    """

    dropped: int
    """Events left out so far, because the subscriber was too slow or came too late."""

    def __aiter__(self) -> AsyncIterator[TaskEvent]:
        return self

    async def __anext__(self) -> TaskEvent: ...

    async def aclose(self) -> None:
        """No more events; whoever waits for one is told that there is none. Idempotent."""
        ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class TaskHub(Protocol):
    """Knows tasks: the coordinator of this process, or a backend whose tasks run elsewhere."""

    async def list_tasks(self, *, limit: int = 100) -> Sequence[TaskStatus]:
        """The newest tasks, those that are not over first."""
        ...

    async def get_task(self, app: object, name: object, id: object) -> TaskStatus | None:
        """The status of one task; None when it is not known."""
        ...

    async def cancel_task(
        self, app: object, name: object, id: object, reason: str | CancelReason | None = None, *, code: str | None = None
    ) -> bool:
        """Ask a task to stop. True if it was waiting or running, False (and a line in the log) when it is unknown or over."""
        ...

    def subscribe(
        self, app: object, name: object, id: object, *, last_event_id: int | None = None, buffer: int = 256
    ) -> Subscription:
        """Its events after `last_event_id`, what is still known of them, and then those to come.

        `last_event_id=None` begins with the task's current run. Raises `UnknownTaskError` at the first event for a task that
        is not known.
        """
        ...
