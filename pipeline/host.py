"""A run on a loop of its own, in a thread of its own: what `iter()` stands on.

The rule kept here: the thread ends in bounded time, as its loop does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from .cancellation.reason import CancelReason, CancelType
from .loops import LoopFactory, run_on
from .result import Err, describe
from .run import Run
from .runtime import StopLevel, StopRequest

__all__ = ["Host", "run_in_thread"]

_END = 1.0
"""Seconds for a thread that is on its last line."""
_LOOK = 0.1
"""Seconds between two looks at whether the interpreter is going down."""


class Host:
    """The thread that carries a run."""

    def __init__(self, run: Run, factory: LoopFactory) -> None:
        self._run = run
        self._factory = factory
        self._over = threading.Event()
        self._thread = run.runtime.start_thread(self._main, name="loop", host=True)

    def join(self, *, on_interrupt: Callable[[], object]) -> None:
        """Wait until the run is closed and the thread gone. Bounded by the run's `Grace`, for a stop was requested."""
        # Not by joining: a join that Ctrl-C interrupts takes the thread for ended (CPython before 3.13).
        while not self._over.is_set():
            try:
                self._over.wait(_LOOK)
            except KeyboardInterrupt:
                on_interrupt()
            if sys.is_finalizing():  # a generator that lives as long as the program: its thread does not run any more
                return
        self._thread.join(_END)

    def _main(self) -> None:
        try:
            run_on(self._factory, self._carry(), on_interrupt=self._stop_for)
        except BaseException as error:
            if not self._run.runtime.closed.done():  # there was not even a loop
                self._run.could_not_start(error)
            self._run.sink.abort()  # nothing will come: let the consumer go
            raise
        finally:
            self._over.set()

    def _stop_for(self, error: BaseException) -> None:
        reason = CancelReason(f"a handler raised {describe(error)}", CancelType.ERROR, code="interrupted")
        self._run.runtime.request_stop(StopRequest(reason, StopLevel.ABORT, Err.of(error)))

    async def _carry(self) -> None:
        self._run.start()
        await self._run.watch()


def run_in_thread(run: Run, factory: LoopFactory) -> Host:
    """Start a run on a new loop in a new thread."""
    return Host(run, factory)
