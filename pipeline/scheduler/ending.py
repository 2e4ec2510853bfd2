"""`Handle`: something that was submitted and ends, with a result, an exception, or cancelled; and its `State`.

The rule kept here: a handle's state only moves forward, and what it ended with is set before its state says so. So whoever
sees that it is done may read the rest without the lock.
"""

from __future__ import annotations

from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .errors import CancelledError
from .waiting import Waiter, check_timeout

if TYPE_CHECKING:
    from .turn import Turn

__all__ = ["Handle", "State"]


class State(IntEnum):
    """How far something is. From `SUCCEEDED` on it is over."""

    QUEUED = 0
    READY = 1
    """Its resources are its own, and no thread has taken it up yet."""
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5


_RUNNING, _SUCCEEDED, _FAILED, _CANCELLED = State.RUNNING, State.SUCCEEDED, State.FAILED, State.CANCELLED


class Handle:
    """What tasks and pipelines have in common: they end, and somebody waits for that."""

    __slots__ = ("__weakref__", "_error", "_trace", "_value", "_waiters", "owner", "state")
    _what = "work"
    owner: Any
    """With whom it may be waited for: the handle of a task's pipeline, the scheduler of a pipeline."""
    state: State
    _value: Any
    _error: BaseException | None
    _trace: TracebackType | None
    """Of the error, as it was raised. Set with it."""
    _waiters: list[Waiter] | None

    def done(self) -> bool:
        """Whether it has ended: with a result, with an exception, or cancelled."""
        return self.state >= _SUCCEEDED

    def running(self) -> bool:
        """Whether its function is being executed at this moment."""
        return self.state is _RUNNING

    def cancelled(self) -> bool:
        """Whether it was cancelled before it started."""
        return self.state is _CANCELLED

    @property
    def failed(self) -> bool:
        return self.state is _FAILED

    def result(self, timeout: float | None = None) -> Any:
        """What the function has returned; waits for it, `timeout` seconds at most (0: not at all).

        Raises what the function has raised, `CancelledError` when it never started, and `TimeoutError`.
        """
        if timeout is not None or self.state < _SUCCEEDED:
            self._wait(timeout)
        if self.state is _SUCCEEDED:
            return self._value
        try:
            raise self._end_error()
        finally:
            self = None  # the traceback would keep the handle, which keeps the exception

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the function has raised, or None; waits as `result` does.

        Raises `CancelledError` when it never started, and `TimeoutError`.
        """
        if timeout is not None or self.state < _SUCCEEDED:
            self._wait(timeout)
        if self.state is _CANCELLED:
            raise self._end_error()
        return self._error

    def _end_error(self) -> BaseException:
        if self._error is not None:
            return self._error.with_traceback(self._trace)  # without what earlier calls of `result` have added
        return CancelledError(f"the {self._what} {self.title} was cancelled before it started")

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def turn(self) -> Turn:
        raise NotImplementedError

    # --- waiting

    def _wait(self, timeout: float | None) -> None:
        timeout = check_timeout(timeout)
        if self.state >= _SUCCEEDED:
            return
        if timeout != 0:
            turn, waiter = self.turn, Waiter(1)
            with turn.glance, turn.lock:
                if self.state >= _SUCCEEDED:
                    return
                self.watch(waiter)
            try:
                waiter.wait(timeout)
            finally:
                if self.state < _SUCCEEDED:
                    with turn.glance, turn.lock:
                        self.unwatch(waiter)
        if self.state < _SUCCEEDED:
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
        self.state = state
        if self._waiters is not None:
            waiters, self._waiters = self._waiters, None
            for waiter in waiters:
                if waiter.told(failed=state is _FAILED):
                    self.turn.ring(waiter.bell)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.title}: {self.state.name.lower()}>"
