"""A run on a loop of its own, in a thread of its own: what `iter()` stands on.

The rule kept here: the thread ends in bounded time. `asyncio.run` would wait for ever for a task that swallows its
cancellation; a run has already named such a task as abandoned, so the loop is closed without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from .cancellation.reason import CancelReason, CancelType
from .result import Err, describe
from .run import Run
from .runtime import StopLevel, StopRequest

__all__ = ["Host", "run_in_thread"]

_TIDY = 1.0
"""Seconds for what user code left on the loop: async generators, and the default executor's threads."""

_LOOK = 0.1
"""Seconds between two looks at whether the interpreter is going down."""


class Host:
    """The thread that carries a run."""

    def __init__(self, run: Run, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
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
        self._thread.join(_TIDY)

    def _main(self) -> None:
        loop = self._factory()
        try:
            asyncio.set_event_loop(loop)
            carrier = loop.create_task(self._carry())
            while not carrier.done():
                try:
                    loop.run_until_complete(carrier)
                except BaseException as error:  # a handler's KeyboardInterrupt or SystemExit goes through the loop
                    if not carrier.done():
                        self._stop_for(error)
            loop.run_until_complete(self._tidy(loop))
        finally:
            asyncio.set_event_loop(None)
            for task in asyncio.all_tasks(loop):
                _silence(task)
            loop.close()
            self._over.set()

    def _stop_for(self, error: BaseException) -> None:
        reason = CancelReason(f"a handler raised {describe(error)}", CancelType.ERROR, code="interrupted")
        self._run.runtime.request_stop(StopRequest(reason, StopLevel.ABORT, Err.of(error)))

    async def _carry(self) -> None:
        try:
            self._run.start()
            await self._run.watch()
        except BaseException:
            self._run.sink.abort()  # nothing will come: let the consumer go
            raise

    async def _tidy(self, loop: asyncio.AbstractEventLoop) -> None:
        start = self._run.runtime.start_task
        ends = [
            start(loop.shutdown_asyncgens(), name="async generators"),
            start(loop.shutdown_default_executor(), name="default executor"),
        ]
        await asyncio.wait(ends, timeout=_TIDY)


def _silence(task: asyncio.Task[Any]) -> None:
    # An abandoned task is in the report; asyncio's complaint about it at garbage collection would be a second one.
    with contextlib.suppress(AttributeError):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def run_in_thread(run: Run, factory: Callable[[], asyncio.AbstractEventLoop]) -> Host:
    """Start a run on a new loop in a new thread."""
    return Host(run, factory)
