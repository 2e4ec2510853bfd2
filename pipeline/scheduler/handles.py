"""`TaskHandle` and `PipelineHandle`: what has been submitted, and what becomes of it.

The rule kept here: a handle's state only moves forward, and what it ended with is set before its state says so. So whoever
sees that it is done may read the rest without the lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

from .claim import Claim, Group
from .context import TaskContext, working_on
from .errors import CancelledError, TerminatedError
from .waiting import Waiter, check_timeout

if TYPE_CHECKING:
    from .alarms import Alarm
    from .scheduler import Scheduler
    from .staged import StagedPipeline
    from .turn import Turn

__all__ = ["Handle", "PipelineHandle", "State", "TaskHandle"]


class State(IntEnum):
    """How far something is. From `SUCCEEDED` on it is over."""

    QUEUED = 0
    READY = 1
    """Its resources are its own, and no thread has taken it up yet."""
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5


_QUEUED, _READY, _RUNNING = State.QUEUED, State.READY, State.RUNNING
_SUCCEEDED, _FAILED, _CANCELLED = State.SUCCEEDED, State.FAILED, State.CANCELLED


class Handle:
    """What tasks and pipelines have in common: they end, and somebody waits for that."""

    __slots__ = ("_error", "_scheduler", "_state", "_value", "_waiters", "turn")
    _what = "work"

    def __init__(self, scheduler: Scheduler, turn: Turn) -> None:
        self._scheduler = scheduler
        self.turn = turn
        self._state: State = _QUEUED
        self._value: Any = None
        self._error: BaseException | None = None
        self._waiters: list[Waiter] | None = None

    def done(self) -> bool:
        """Whether it has ended: with a result, with an exception, or cancelled."""
        return self._state >= _SUCCEEDED

    def running(self) -> bool:
        """Whether its function is being executed at this moment."""
        return self._state is _RUNNING

    def cancelled(self) -> bool:
        """Whether it was cancelled before it started."""
        return self._state is _CANCELLED

    @property
    def failed(self) -> bool:
        return self._state is _FAILED

    def result(self, timeout: float | None = None) -> Any:
        """What the function has returned; waits for it, `timeout` seconds at most (0: not at all).

        Raises what the function has raised, `CancelledError` when it never started, and `TimeoutError`.
        """
        self._wait(timeout)
        if self._state is _SUCCEEDED:
            return self._value
        try:
            raise self._end_error()
        finally:
            self = None  # the traceback would keep the handle, which keeps the exception

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the function has raised, or None; waits as `result` does.

        Raises `CancelledError` when it never started, and `TimeoutError`.
        """
        self._wait(timeout)
        if self._state is _CANCELLED:
            raise self._end_error()
        return self._error

    def _end_error(self) -> BaseException:
        if self._error is not None:
            return self._error
        return CancelledError(f"the {self._what} {self.title} was cancelled before it started")

    @property
    def title(self) -> str:
        raise NotImplementedError

    # --- waiting

    def _wait(self, timeout: float | None) -> None:
        check_timeout(timeout)
        if self._state >= _SUCCEEDED:
            return
        if timeout != 0:
            waiter = Waiter(1)
            with self.turn:
                if self._state >= _SUCCEEDED:
                    return
                self.watch(waiter)
            try:
                waiter.wait(timeout)
            finally:
                if self._state < _SUCCEEDED:
                    with self.turn:
                        self.unwatch(waiter)
        if self._state < _SUCCEEDED:
            raise TimeoutError(f"the {self._what} {self.title} has not ended within {timeout:g} s; it goes on")

    def watch(self, waiter: Waiter) -> None:
        """Tell it when this is done. While the scheduler is locked."""
        if self._waiters is None:
            self._waiters = [waiter]
        else:
            self._waiters.append(waiter)

    def unwatch(self, waiter: Waiter) -> None:
        if self._waiters is not None and waiter in self._waiters:
            self._waiters.remove(waiter)

    def _finish(self, state: State) -> None:
        """It is over. While the scheduler is locked."""
        self._state = state
        if self._waiters is not None:
            waiters, self._waiters = self._waiters, None
            for waiter in waiters:
                waiter.tell(failed=state is _FAILED)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.title}: {self._state.name.lower()}>"


class TaskHandle(Handle):
    """A task that was submitted. Made by `StagedPipeline.task(...).run()`."""

    __slots__ = ("_alarm", "_args", "_function", "_kwargs", "_timeout", "claim", "context", "label", "submission")
    _what = "task"
    kind = "task"

    def __init__(
        self,
        submission: PipelineHandle,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        label: str | None,
        timeout: float | None,
    ) -> None:
        Handle.__init__(self, submission._scheduler, submission.turn)
        self.submission = submission
        self.label = label
        self._function: Callable[..., Any] | None = function
        self._args = args
        self._kwargs = kwargs
        self._timeout = timeout
        self._alarm: Alarm | None = None
        self.claim: Claim = None  # type: ignore[assignment]  # its maker's next step
        self.context: TaskContext | None = None

    @property
    def title(self) -> str:
        name = self.label or getattr(self._function, "__name__", None) or f"task-{self.claim.key[3]}"
        return f"{self.submission.title}/{name}"

    @property
    def at_work(self) -> bool:
        return self._state is _RUNNING

    def cancel(self) -> bool:
        """Cancel it if it has not started. True when this call has done that."""
        kept = self._function, self._args, self._kwargs
        with self.turn:
            if self._state > _READY:
                return False
            self._close(_CANCELLED)
        del kept  # what goes with them may do anything, so not while the scheduler is locked
        return True

    def request_terminate(self, reason: str | None = None) -> bool:
        """Ask it to end: cancelled if it has not started, else `terminate_requested()` turns true inside it.

        A function that does not look goes on. False when it had ended already.
        """
        if self.cancel():
            return True
        context = self.context
        if context is None:
            return False
        context.request(reason)
        return True

    # --- what its crew does

    def granted(self) -> None:
        self._state = _READY
        self._scheduler.workers.put(self)

    def begin(self) -> bool:
        if self._state is not _READY:
            return False
        self._state = _RUNNING
        self.context = TaskContext(self)
        if self._alarm is not None:
            self._disarm()
        if self._timeout is not None:
            self._alarm = self._scheduler.alarms.set(self._timeout, self._timed_out)
        return True

    def perform(self) -> None:
        function, kwargs = self._function, self._kwargs
        assert function is not None
        assert self.context is not None
        token = working_on.set(self.context)
        try:
            self._value = function(*self._args, **kwargs) if kwargs else function(*self._args)
        except BaseException as error:  # whatever it is, it belongs to whoever asks for the result
            self._error = error
        finally:
            working_on.reset(token)
            self._let_go()

    def end(self) -> None:
        if isinstance(self._error, TerminatedError):
            self._scheduler.totals["terminated tasks"] += 1
        self._close(_FAILED if self._error is not None else _SUCCEEDED)

    # --- its end

    def expiry(self, seconds: float) -> Callable[[], None]:
        """To be called when it should have started."""
        return partial(self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        with self.turn:
            if self._state is _QUEUED:
                why = self._scheduler.why(self.claim)
                self._error = TimeoutError(f"the task {self.title} could not start within {seconds:g} s: {why}")
                self._close(_FAILED)

    def arm(self, alarm: Alarm) -> None:
        self._alarm = alarm

    def _timed_out(self) -> None:
        self.request_terminate(f"timed out after {self._timeout:g} s")

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _let_go(self) -> None:
        """Of what was given for the call: a handle may be kept for long."""
        if self.label is None:
            self.label = getattr(self._function, "__name__", None)
        self._function = self._kwargs = None
        self._args = ()

    def _close(self, state: State) -> None:
        if self._function is not None:
            self._let_go()
        self.context = None
        if self._alarm is not None:
            self._disarm()
        self._finish(state)
        self._scheduler.task_ended(self, state)


class PipelineHandle(Handle):
    """A pipeline that was submitted. Made by `Scheduler.run_pipeline`."""

    __slots__ = ("at", "counts", "group", "pipeline", "stage", "thread")
    _what = "pipeline"

    def __init__(self, scheduler: Scheduler, turn: Turn, pipeline: StagedPipeline, group: Group, at: float) -> None:
        super().__init__(scheduler, turn)
        self.pipeline: StagedPipeline | None = pipeline
        self.group = group
        self.stage = 0
        self.thread: int | None = None
        """The coordinator's, while `run()` is executed."""
        self.at = at
        self.counts: dict[str, int] = {}

    @property
    def title(self) -> str:
        return self.group.name

    @property
    def state(self) -> State:
        return self._state

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    def owns(self, handle: TaskHandle) -> bool:
        """Whether it is one of this pipeline's tasks."""
        return handle.submission is self

    def cancel(self) -> bool:
        """Cancel it if it has not started. True when this call has done that."""
        kept = self.pipeline
        with self.turn:
            if self._state is not _QUEUED:
                return False
            self.call_off()
        del kept  # as for tasks
        return True

    def call_off(self) -> None:
        """While the scheduler is locked: it is not to start."""
        self.pipeline = None
        self._finish(_CANCELLED)
        self._scheduler.pipeline_ended(self, _CANCELLED)

    # --- what its crew does

    def begin(self) -> bool:
        if self._state is not _QUEUED:
            return False
        self._state = _RUNNING
        self._scheduler.pipeline_began(self)
        return True

    def perform(self) -> None:
        pipeline = self.pipeline
        assert pipeline is not None
        self.thread = get_ident()
        try:
            self._value = pipeline.run()
        except BaseException as error:  # whatever it is, it belongs to whoever asks for the result
            self._error = error
        finally:
            self.thread = self.pipeline = None

    def end(self) -> None:
        state = _FAILED if self._error is not None else _SUCCEEDED
        self._finish(state)
        self._scheduler.pipeline_ended(self, state)
