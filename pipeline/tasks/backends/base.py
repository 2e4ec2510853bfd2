"""What a backend is: something that is given tasks as dicts, and has an executor do them.

The rule kept here: a task is data, so that the same program can do it at once, in the background, or in another process.
Its failure is the task's: it is logged and told to those who watch it, never raised where it was submitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias
from uuid import uuid4

from ...observe.logs import get_logger
from ..events import TaskKey
from ..status import TaskHub
from ..task import finished

__all__ = ["Executor", "Submitted", "TaskBackend", "key_of"]

Executor: TypeAlias = Callable[[dict[str, Any]], Any]
"""Does the task that the dict describes: an `async def`, or a function that returns a `Pipeline` or a `StreamTask` to be
run. What an `async def` returns is run, too, if it is one of these. `Any`: else it is the value of the task."""


class TaskBackend(ABC):
    """Where submitted tasks go.

    A task is a dict. Of its entries "app", "type" and "id" make its `TaskKey`: "tasks" and "task" where they are missing,
    and a fresh id. `inflight_count` is the number of tasks that were submitted here and are not over.
    """

    def __init__(self) -> None:
        self._executor: Executor | None = None

    def set_executor(self, executor: Executor) -> None:
        """Have this do the tasks. Raises TypeError for what cannot be called."""
        if not callable(executor):
            raise TypeError(f"an executor is a function that takes the dict of a task, not {executor!r}")
        self._executor = executor

    def _executor_for(self, key: TaskKey, *, ready: bool) -> Executor | None:
        """The executor; what is not as it should be is a line in the log, and without an executor the task is dropped."""
        if not ready:
            get_logger(task=str(key)).warning("submit before initialize; call await backend.initialize() first")
        if self._executor is None:
            get_logger(task=str(key)).warning("no executor, so the task is dropped; call backend.set_executor(function) first")
        return self._executor

    @property
    def hub(self) -> TaskHub:
        """Knows the tasks that were submitted: to watch and to cancel them. Raises TypeError for a backend that has none."""
        raise TypeError(f"{type(self).__name__} cannot say what becomes of its tasks: it has no hub")

    @property
    def inflight_count(self) -> int:
        """Tasks that were submitted here and are not over; 0 for a backend that does not count them."""
        return 0

    @abstractmethod
    async def initialize(self) -> None:
        """Get ready; idempotent."""

    @abstractmethod
    async def submit(self, task: dict[str, Any]) -> TaskKey | None:
        """Have a task done; its key, or None when it was dropped because there is no executor, which a line in the log says.

        Raises TypeError for what is no dict, `TaskAlreadyRunningError` when a task of this key is not over,
        `CoordinatorClosedError` after a shutdown.
        """

    @abstractmethod
    async def shutdown(self) -> None:
        """Let what is in flight end, within a time, and let go of everything; idempotent."""


def key_of(task: Mapping[str, Any]) -> TaskKey:
    """The key of a submitted task. Raises TypeError for what is no dict, ValueError for parts that no key can have."""
    if not isinstance(task, Mapping):
        raise TypeError(f"a task is a dict, such as {{'type': 'import', 'path': …}}, not {task!r}")
    id = task.get("id")
    return TaskKey.of(task.get("app", "tasks"), task.get("type", "task"), uuid4().hex if id is None else id)


class Submitted:
    """The work of a submitted task: an executor with its dict."""

    def __init__(self, executor: Executor, task: dict[str, Any]) -> None:
        self._executor = executor
        self._task = task

    async def __call__(self) -> Any:
        return await finished(self._executor, self._executor(self._task))
