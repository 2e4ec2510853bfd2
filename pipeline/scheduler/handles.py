"""`TaskHandle` and `PipelineHandle`: what has been submitted, and what becomes of it.

The rule kept here: what was given for a call is let go of when the call is over, and by nobody who holds the lock: it may be
anybody's object, and do anything when it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import get_ident
from time import monotonic
from types import FunctionType
from typing import TYPE_CHECKING, Any

from pipeline.cancellation.work import working_on

from .claim import Claim, Group, Phase
from .context import TaskContext
from .ending import Handle, State
from .errors import TerminatedError

if TYPE_CHECKING:
    from .alarms import Alarm
    from .amounts import Needs
    from .scheduler import Scheduler
    from .staged import StagedPipeline, TaskBuilder
    from .turn import Turn

__all__ = ["PipelineHandle", "State", "TaskHandle"]

_QUEUED, _READY, _RUNNING = State.QUEUED, State.READY, State.RUNNING
_SUCCEEDED, _FAILED, _CANCELLED = State.SUCCEEDED, State.FAILED, State.CANCELLED
_WAITING = Phase.WAITING


class TaskHandle(Handle, Claim):
    """A task that was submitted. Made by `StagedPipeline.task(...).run()`."""

    __slots__ = ("_alarm", "_context", "_task", "at", "behind", "key", "label", "needs", "phase")
    _what = "task"
    kind = "task"
    threaded = True
    owner: PipelineHandle

    def __init__(self, submission: PipelineHandle, task: TaskBuilder, needs: Needs, number: int) -> None:
        group = submission.group
        self.owner = submission
        self.state = _QUEUED
        self._value = self._error = self._waiters = self._alarm = self._context = self.behind = None
        self._task: TaskBuilder | None = task
        self._alarm: Alarm | None
        self._context: TaskContext | None
        function = task.fn
        self.label = task.name or (function.__name__ if type(function) is FunctionType else _name_of(function))
        self.needs = needs
        self.key = (-group.priority - task.priority, -submission.stage, group.number, number)
        self.phase = _WAITING
        self.at = monotonic()

    @property
    def group(self) -> Group:
        return self.owner.group

    @property
    def title(self) -> str:
        return f"{self.owner.title}/{self.label or f'task-{self.key[3]}'}"

    @property
    def turn(self) -> Turn:
        return self.owner.owner.turn

    @property
    def at_work(self) -> bool:
        return self.state is _RUNNING

    def cancel(self) -> bool:
        """Cancel it if it has not started. True when this call has done that."""
        kept, turn = self._task, self.turn
        with turn, turn.lock:
            turn.clear()  # it may be in there, about to be submitted
            if self.state > _READY:
                return False
            self._close(_CANCELLED)
        del kept  # what goes with it may do anything, so not while the scheduler is locked
        return True

    def request_terminate(self, reason: str | None = None) -> bool:
        """Ask it to end: cancelled if it has not started, else `terminate_requested()` turns true inside it.

        A function that does not look goes on. False when it had ended already.
        """
        if self.cancel():
            return True
        context = self.context()
        if self.state is not _RUNNING:
            return False
        context.request(reason)
        return True

    # --- what a task knows of itself while it runs: most never ask

    @property
    def asked(self) -> bool:
        """Whether it is to end."""
        return self._context is not None and self._context.requested

    def context(self) -> TaskContext:
        """How it is asked to end."""
        if self._context is None:
            turn = self.turn
            with turn, turn.lock:
                if self._context is None:
                    self._context = TaskContext(self.title)
        return self._context

    # --- what its crew does

    def granted(self) -> None:
        self.state = _READY
        self.owner.owner.workers.put(self)

    def begin(self) -> bool:
        if self.state is not _READY:
            return False
        self.state = _RUNNING
        if self._alarm is not None:
            self._disarm()
        assert self._task is not None
        seconds = self._task.timeout
        if seconds is not None:
            self._alarm = self.owner.owner.alarms.set(seconds, partial(self._timed_out, seconds))
        return True

    def perform(self) -> None:
        task = self._task
        assert task is not None
        token = working_on.set(self)
        try:
            kwargs = task.kwargs
            self._value = task.fn(*task.args, **kwargs) if kwargs else task.fn(*task.args)
        except BaseException as error:  # whatever it is, it belongs to whoever asks for the result
            self._failed(error)
        finally:
            working_on.reset(token)
            self._task = None
            task = self = None  # a traceback would keep them

    def end(self) -> None:
        if self._alarm is not None:
            self._disarm()
        error = self._error
        if error is None:
            state = _SUCCEEDED
        else:
            state = _FAILED
            if isinstance(error, TerminatedError):
                self.owner.owner.totals["terminated tasks"] += 1
        if self._waiters is None:
            self.state = state
        else:
            self._finish(state)
        self.owner.owner.task_ended(self, state)

    # --- its end

    def expire_within(self, seconds: float) -> None:
        """It is to have started by then. While the scheduler is locked."""
        self._alarm = self.owner.owner.alarms.set(seconds, partial(self._expire, seconds))

    def _expire(self, seconds: float) -> None:
        kept, turn = self._task, self.turn
        with turn, turn.lock:
            if self.state is _QUEUED:
                why = self.owner.owner.why(self)
                self._failed(TimeoutError(f"the task {self.title} could not start within {seconds:g} s: {why}"))
                self._close(_FAILED)
        del kept  # as in `cancel`

    def _timed_out(self, seconds: float) -> None:
        self.request_terminate(f"timed out after {seconds:g} s")

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _failed(self, error: BaseException) -> None:
        self._error, self._trace = error, error.__traceback__

    def _close(self, state: State) -> None:
        """It ends without having run. Whoever calls this keeps what was given for the call until the lock is free."""
        self._task = None
        self._disarm()
        self._finish(state)
        self.owner.owner.task_ended(self, state)


class PipelineHandle(Handle):
    """A pipeline that was submitted. Made by `Scheduler.run_pipeline`."""

    __slots__ = ("at", "group", "pipeline", "stage", "thread")
    _what = "pipeline"
    owner: Scheduler

    def __init__(self, scheduler: Scheduler, pipeline: StagedPipeline, group: Group, at: float) -> None:
        self.owner = scheduler
        self.state = _QUEUED
        self._value = self._error = self._waiters = None
        self.pipeline: StagedPipeline | None = pipeline
        self.group = group
        self.stage = 0
        self.thread: int | None = None
        """The coordinator's, while `run()` is executed."""
        self.at = at

    @property
    def title(self) -> str:
        return self.group.name

    @property
    def turn(self) -> Turn:
        return self.owner.turn

    def cancel(self) -> bool:
        """Cancel it if it has not started. True when this call has done that."""
        kept, turn = self.pipeline, self.turn
        with turn, turn.lock:
            if self.state is not _QUEUED:
                return False
            self.call_off()
        del kept  # as for tasks
        return True

    def call_off(self) -> None:
        """While the scheduler is locked: it is not to start."""
        self.owner.pipeline_ended(self, _CANCELLED)
        self.pipeline = None
        self._finish(_CANCELLED)

    # --- what its crew does

    def begin(self) -> bool:
        if self.state is not _QUEUED or not self.owner.pipeline_begins(self):
            return False
        self.state = _RUNNING
        return True

    def perform(self) -> None:
        pipeline = self.pipeline
        assert pipeline is not None
        self.thread = get_ident()
        try:
            self._value = pipeline.run()
        except BaseException as error:  # whatever it is, it belongs to whoever asks for the result
            self._error, self._trace = error, error.__traceback__
        finally:
            self.thread = self.pipeline = None
            pipeline = self = None  # a traceback would keep them

    def end(self) -> None:
        state = _FAILED if self._error is not None else _SUCCEEDED
        self._finish(state)
        self.owner.pipeline_ended(self, state)


def _name_of(function: Callable[..., Any]) -> str | None:
    try:
        name = function.__name__
    except Exception:  # it is somebody's object, and may do anything when it is asked
        return None
    return name if isinstance(name, str) else None
