"""How tasks are stopped, all together and in bounded time, by hand or by signals.

The rule kept here: nobody waits longer than he said, and what did not stop is named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from ..cancellation.fence import Fence
from ..cancellation.reason import CancelReason
from ..cancellation.signals import SignalTrigger
from ..cancellation.triggers import TriggerHandle
from ..observe.logs import get_logger
from .errors import TaskError
from .escape import BlockedLoopExit
from .events import TaskKey
from .running import RunningTask

__all__ = ["ShutdownReport", "SignalledShutdown", "check_seconds", "check_stop", "stop_tasks"]

CODE = "shutdown"


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """What a shutdown did: the tasks that have `ended`, those that are `stuck` and were left behind, the `seconds` it took."""

    ended: tuple[TaskKey, ...]
    stuck: tuple[TaskKey, ...]
    seconds: float


async def stop_tasks(tasks: Sequence[RunningTask], reason: CancelReason, timeout: float) -> ShutdownReport:
    """Cancel these tasks, wait for them for up to `timeout` seconds, and give up those that are left. Raises nothing of theirs."""
    began = monotonic()
    reason = reason if reason.code is not None else replace(reason, code=CODE)
    for task in tasks:
        task.cancel(reason)
    if tasks:
        await asyncio.wait([task.gone for task in tasks], timeout=max(timeout, 0.0))
    for task in tasks:
        if not task.gone.done():
            task.give_up()
    stuck = tuple(task.key for task in tasks if task.stuck)
    if stuck:
        get_logger().error("tasks did not stop and were left behind", tasks=[str(key) for key in stuck], waited=timeout)
    return ShutdownReport(tuple(task.key for task in tasks if not task.stuck), stuck, monotonic() - began)


def check_stop(tasks: Iterable[RunningTask], timeout: object) -> None:
    """Raises ValueError for what is no time to wait, `TaskError` inside one of these tasks, which would wait for itself."""
    check_seconds("timeout", timeout)
    for task in tasks:
        if task.is_here():
            raise TaskError(f"task {task.key} cannot wait for the shutdown that waits for it: start that from outside")


def check_seconds(name: str, value: object) -> None:
    """Raises ValueError for what is no time to wait."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} is a number of seconds, 0 or more, not {value!r}")


class Shutdown(Protocol):
    """A coordinator's or backend's."""

    def __call__(self, timeout: float, reason: CancelReason, /) -> Awaitable[ShutdownReport]: ...


class SignalledShutdown:
    """A block whose end is a shutdown when a signal comes; `report` is what that did, None without a signal.

    While a task blocks the loop nothing can be shut down: see `BlockedLoopExit` for what a signal does then.
    """

    def __init__(self, shutdown: Shutdown, signals: Sequence[int], timeout: float) -> None:
        check_seconds("timeout", timeout)
        self.report: ShutdownReport | None = None
        self._shutdown = shutdown
        self._trigger = SignalTrigger(*signals, code=CODE)
        self._exit = BlockedLoopExit(*signals)
        self._timeout = timeout
        self._fence = Fence()
        self._handle = TriggerHandle()
        self._tasks: list[asyncio.Task[None]] = []
        self.reasons: list[CancelReason] = []
        """The signals that have come."""

    async def __aenter__(self) -> Self:
        with ExitStack() as armed:
            armed.callback(self._exit.arm().disarm)
            armed.callback(self._trigger.arm(self._signalled).disarm)
            self._fence.__enter__()
            self._handle = TriggerHandle(armed.pop_all().close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        late: asyncio.CancelledError | None = None
        while any(not task.done() for task in self._tasks):  # the block has ended by itself meanwhile
            try:
                await asyncio.wait(self._tasks)
            except asyncio.CancelledError as interrupted:  # the fence's, at the very end, or somebody else's
                late = interrupted
                for task in self._tasks:
                    task.cancel()
        self._handle.disarm()
        if late is not None:
            kind, error, trace = type(late), late, late.__traceback__
        swallowed = self._fence.__exit__(kind, error, trace)
        if late is not None and not swallowed:
            raise late
        for task in self._tasks:
            if not task.cancelled():
                task.result()  # raises what has kept it from shutting down
        return swallowed

    def _signalled(self, reason: CancelReason) -> None:
        timeout = 0.0 if self.reasons else self._timeout
        self.reasons.append(reason)
        self._tasks.append(asyncio.create_task(self._stop(reason, timeout), name="shutdown by signal"))

    async def _stop(self, reason: CancelReason, timeout: float) -> None:
        try:
            report = await self._shutdown(timeout, reason)
            if self.report is None or report.stuck:
                self.report = report
        finally:
            self._fence.cancel(reason)
