"""How code that blocks hears that it is to end: a scheduler's task, and a handler in a worker's thread or process.

The rule kept here: nobody is interrupted. `working_on` says whose work the running code is, also to what it calls.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

__all__ = ["Request", "Work", "working_on"]


class Request(Protocol):
    """How one piece of work is asked to end."""

    @property
    def title(self) -> str:
        """What is asked, for messages."""
        ...

    @property
    def requested(self) -> bool: ...

    @property
    def reason(self) -> str | None: ...

    def wait(self, seconds: float) -> bool:
        """Until it is asked (True), or so many seconds have passed."""
        ...


class Work(Protocol):
    """Something at work. Most is never asked to end, and has no request before somebody wants it."""

    @property
    def asked(self) -> bool: ...

    def context(self) -> Request: ...


working_on: ContextVar[Work | None] = ContextVar("working_on", default=None)
