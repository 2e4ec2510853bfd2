"""What work knows of itself while it runs: whether it was asked to end.

The rule kept here: nobody is interrupted. A task looks when it suits it, and ends by itself; whatever it calls, also in an
event loop of its own, sees the same request. So does a handler in a thread or a process, whose request is its run's end.
"""

from __future__ import annotations

import threading

from pipeline.cancellation.work import working_on

from .errors import TerminatedError

__all__ = ["TaskContext", "raise_if_terminate_requested", "terminate_requested"]


class TaskContext:
    """How one running task is asked to end, and hears of it."""

    __slots__ = ("_bell", "_requested", "reason", "title")

    def __init__(self, title: str) -> None:
        self.title = title
        self.reason: str | None = None
        self._requested = False
        self._bell: threading.Event | None = None

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


def terminate_requested() -> bool:
    """Whether the work that calls this has been asked to end: a task, or a stage's handler in a thread or a process, whose
    run is aborted or whose attempt has used up its timeout. False elsewhere. Costs about 100 ns.
    """
    work = working_on.get()
    return work is not None and work.asked


def raise_if_terminate_requested() -> None:
    """End the work that calls this, with `TerminatedError`, if it has been asked to."""
    work = working_on.get()
    if work is not None and work.asked:
        context = work.context()
        raise TerminatedError(f"{context.title} was asked to end" + (f": {context.reason}" if context.reason else ""))
