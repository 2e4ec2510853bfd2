"""What can be wrong with a request about a task."""

from __future__ import annotations

from .events import TaskKey

__all__ = ["CoordinatorClosedError", "TaskAlreadyRunningError", "TaskError", "TaskOverError", "UnknownTaskError"]


class TaskError(Exception):
    """The base of the errors about tasks."""


class UnknownTaskError(TaskError, LookupError):
    """No task of this key was ever started here, or it was over so long ago that it is forgotten."""

    def __init__(self, key: TaskKey) -> None:
        super().__init__(f"no task {key} is known here; start it first, or look at its spelling")
        self.key = key


class TaskAlreadyRunningError(TaskError):
    """A task of this key has not ended yet."""

    def __init__(self, key: TaskKey) -> None:
        super().__init__(f"task {key} is running already; cancel it, wait for its end, or give this one another id")
        self.key = key


class TaskOverError(TaskError):
    """Something was told about a run of a task that has ended, or that was given up as stuck."""

    def __init__(self, key: TaskKey) -> None:
        super().__init__(f"task {key} is over, and nothing more can be told about it; end this work")
        self.key = key


class CoordinatorClosedError(TaskError):
    """Nothing is started any more: the coordinator or backend was shut down."""
