"""What a task knows of itself while it runs: whether it was asked to end.

The rule kept here: nobody is interrupted. A task looks when it suits it, and ends by itself; whatever it calls, also in an
event loop of its own, sees the same request.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Protocol

from .errors import TerminatedError

__all__ = ["TaskContext", "raise_if_terminate_requested", "terminate_requested", "working_on"]


class Titled(Protocol):
    """Something with a name."""

    @property
    def title(self) -> str: ...


class TaskContext:
    """One running task."""

    __slots__ = ("_bell", "_owner", "_requested", "reason")

    def __init__(self, owner: Titled | None) -> None:
        self._owner = owner
        self.reason: str | None = None
        self._requested = False
        self._bell: threading.Event | None = None

    @property
    def title(self) -> str:
        return "" if self._owner is None else self._owner.title

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self, reason: str | None) -> None:
        """Ask the task to end; the first reason stays. Any thread."""
        if not self._requested:
            self.reason = reason
        self._requested = True
        if self._bell is not None:
            self._bell.set()

    def wait(self, seconds: float) -> bool:
        """In the task: until it is asked, or so many seconds have passed."""
        if self._bell is None:
            self._bell = threading.Event()
            if self._requested:  # just now, by one who has not seen the bell
                self._bell.set()
        return self._bell.wait(seconds)


working_on: ContextVar[TaskContext | None] = ContextVar("working_on", default=None)


def terminate_requested() -> bool:
    """Whether the task that calls this has been asked to end. False outside of tasks. Costs about 100 ns."""
    context = working_on.get()
    return context is not None and context.requested


def raise_if_terminate_requested() -> None:
    """End the task that calls this, with `TerminatedError`, if it has been asked to."""
    context = working_on.get()
    if context is not None and context.requested:
        raise TerminatedError(f"the task {context.title} was asked to end" + (f": {context.reason}" if context.reason else ""))
