"""A task that was started in this process, from its start to its end.

The rule kept here: its state is read off what has happened, and its one terminal event is what ends it for everybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..cancellation.reason import CancelReason
from ..observe.logs import get_logger
from .errors import TaskError
from .events import EventType, TaskEvent, TaskKey
from .execution import Execution, TaskEnd
from .log import HistorySubscription, RunHistory, TaskLog
from .status import Subscription, TaskState, TaskStatus
from .task import TaskContext, Work, current_task

__all__ = ["RunningTask", "as_reason"]


class RunningTask:
    """The handle that `start_task` returns.

    Its asyncio `task` ends as any other: with the work's value, with its exception, or cancelled. `wait()` never raises for
    what the work did, and gives the terminal event.
    """

    def __init__(
        self,
        key: TaskKey,
        log: TaskLog,
        work: Work,
        *,
        on_end: Callable[[RunningTask], object],
        payload: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.key = key
        self.saved: Any = None
        """What the work has passed to `save()` last."""
        self._context = TaskContext(key, publish=self._publish, keep=self._keep, payload=payload)
        self._execution = Execution(work, self._context, **options)  # `Any`: they are explained and checked there
        self._history: RunHistory = log.begin()
        self._on_end = on_end
        self._created = time.time()
        self._stuck = False
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """Begin, once. Where tasks are eager the work may be over when this returns."""
        self._task = asyncio.create_task(self._attend(), name=f"task {self.key}")
        self._task.add_done_callback(self._task_done)

    @property
    def task(self) -> asyncio.Task[Any]:
        """The asyncio task that does the work. `Any`: its value."""
        assert self._task is not None
        return self._task

    # --- asking

    @property
    def over(self) -> bool:
        """Whether its terminal event has been told."""
        return self._history.terminal is not None

    @property
    def gone(self) -> asyncio.Future[None]:
        """Done when its asyncio task is, or when it was given up. Not to be awaited, but for `asyncio.wait`."""
        return self._gone

    @property
    def stuck(self) -> bool:
        """Whether it was given up, because it did not end when it was asked to."""
        return self._stuck

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        """Why it was asked to stop."""
        return self._execution.reasons

    def is_here(self) -> bool:
        """Whether this is called by the asyncio task that does the work, also while that starts eagerly."""
        current = current_task()
        if current is not self._context:  # a task that it has started
            return False
        return self._task is None or self._task is asyncio.current_task()

    def status(self) -> TaskStatus:
        """As it is at this moment."""
        newest, terminal = self._history.newest, self._history.terminal
        started, progress = newest.get(EventType.STARTED), newest.get(EventType.PROGRESS)
        began = self._history.began
        return TaskStatus(
            self.key,
            self._state(),
            seq=self._history.seq,
            created=self._created,
            started=None if began is None else began.at,
            ended=None if terminal is None else terminal.at,
            reasons=self.reasons,
            progress=None if progress is None else progress.data,
            result=None if terminal is None else terminal.data,
            about={} if started is None else started.data,
        )

    def _state(self) -> TaskState:
        if self._history.terminal is not None:
            return TaskState(self._history.terminal.type.value)
        if self.reasons or (self._task is not None and self._task.cancelling()):
            return TaskState.CANCELLING
        return TaskState.QUEUED if self._history.began is None else TaskState.RUNNING

    async def wait(self) -> TaskEvent:
        """Wait for its end, cleanup included; the terminal event. Giving up the wait changes nothing.

        Raises `TaskError` in the work itself, which would wait for ever.
        """
        if self.is_here():
            raise TaskError(f"task {self.key} cannot wait for its own end; return, and wait for it from outside")
        await asyncio.wait([self._gone])
        assert self._history.terminal is not None
        return self._history.terminal

    def subscribe(self, *, last_event_id: int | None = None, buffer: int = 256) -> Subscription:
        """The events of this run, see `TaskCoordinator.subscribe`; also when its key was started again since."""
        return HistorySubscription(self._history, last_event_id=last_event_id, buffer=buffer)

    # --- stopping

    def cancel(self, reason: str | CancelReason | None = None, *, code: str | None = None) -> bool:
        """Ask it to stop, from any thread; False when it is over. Every reason is kept, also while it cleans up."""
        if self.over:
            return False
        self._execution.cancel(as_reason(reason, code))
        return True

    def give_up(self) -> None:
        """Tell its end, though its work goes on: it does not stop. What the work tells from now on counts no more."""
        if self.over:
            return
        self._stuck = True
        self._context.close()
        end = self._execution.end_of(None)
        message = f"{end.data['message']}; the work did not stop, and was left behind"
        self._finish(replace(end, data={**end.data, "message": message, "stuck": True}))
        self._gone.set_result(None)

    # --- running

    async def _publish(self, type: EventType, data: Mapping[str, Any]) -> None:
        self._history.publish(type, data)

    async def _keep(self, state: Any) -> None:
        self.saved = state

    async def _attend(self) -> Any:
        end = await self._execution.run()
        self._finish(end)
        return end.conclude()

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        # Also reached by a task that was cancelled before its first step, whose body never ran.
        error = asyncio.CancelledError() if task.cancelled() else task.exception()  # and so it counts as retrieved
        if not self.over:
            self._finish(self._execution.end_of(error))
        if not self._gone.done():
            self._gone.set_result(None)

    def _finish(self, end: TaskEnd) -> None:
        if self.over:
            get_logger(task=str(self.key)).info("a task that was given up has ended", how=end.type.value)
            return
        self._history.publish(end.type, end.data)
        self._on_end(self)
        if end.type is EventType.ERROR:
            get_logger(task=str(self.key)).error("task failed", error=end.data["message"], exc_info=end.error)
        elif isinstance(end.error, Exception):
            get_logger(task=str(self.key)).warning(
                "task failed while it was stopping", error=end.data["error"]["message"], exc_info=end.error
            )


def as_reason(reason: str | CancelReason | None, code: str | None) -> CancelReason:
    """What somebody who cancels has said. Raises TypeError for other things than texts and reasons."""
    if isinstance(reason, CancelReason):
        return reason if code is None else replace(reason, code=code)
    if reason is not None and not isinstance(reason, str):
        raise TypeError(f"a reason is a text or a CancelReason, not {reason!r}")
    return CancelReason(reason or "cancelled by hand", code=code, origin="cancel_task")
