"""Long-running work that clients can watch and cancel, and trust.

The rooms:

- `coordinator`: starts tasks in this process and knows them; `running`: one of them; `shutdown`: all of them, stopped;
  `escape`: when even that cannot be
- `task`: what can be run, and what it has in hand; `execution`: one attempt at it; `progress`, `graph`: pipelines
- `events`, `data`, `errors`, `status`: what is told; `log`: its history in memory, and those who follow it
- `backends`: tasks as dicts, that run inline, in this process, or in workers of a database
- `web`: pages and server-sent events
"""

from typing import TYPE_CHECKING, Any

from .backends import (
    AsyncFireAndTrackBackend,
    SyncTaskBackend,
    TaskBackend,
    get_default_task_backend,
    set_default_task_backend,
)
from .coordinator import TaskCoordinator
from .errors import CoordinatorClosedError, TaskAlreadyRunningError, TaskError, TaskOverError, UnknownTaskError
from .events import EventType, TaskEvent, TaskKey
from .execution import Execution, TaskEnd
from .running import RunningTask
from .shutdown import ShutdownReport
from .status import Subscription, TaskHub, TaskState, TaskStatus
from .task import StreamTask, TaskContext, current_task

if TYPE_CHECKING:
    from .backends.postgres import PostgresTaskBackend as PostgresTaskBackend
    from .web.app import create_app as create_app

__all__ = [
    "AsyncFireAndTrackBackend",
    "CoordinatorClosedError",
    "EventType",
    "Execution",
    "RunningTask",
    "ShutdownReport",
    "StreamTask",
    "Subscription",
    "SyncTaskBackend",
    "TaskAlreadyRunningError",
    "TaskBackend",
    "TaskContext",
    "TaskCoordinator",
    "TaskEnd",
    "TaskError",
    "TaskEvent",
    "TaskHub",
    "TaskKey",
    "TaskOverError",
    "TaskState",
    "TaskStatus",
    "UnknownTaskError",
    "current_task",
    "get_default_task_backend",
    "set_default_task_backend",
]


def __getattr__(name: str) -> Any:
    """What needs an extra is imported when it is asked for. `Any`: a class and a function."""
    if name == "PostgresTaskBackend":
        from .backends.postgres import PostgresTaskBackend

        return PostgresTaskBackend
    if name == "create_app":
        from .web.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
