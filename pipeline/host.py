"""A run on a loop of its own, in a thread of its own: what `iter()` stands on.

The rule kept here: the thread ends in bounded time. `asyncio.run` would wait for ever for a task that swallows its
cancellation; a run has already named such a task as abandoned, so the loop is closed without it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from .run import Run

__all__ = ["Host", "run_in_thread"]

_TIDY = 1.0
"""Seconds for what user code left on the loop: async generators, and the default executor's threads."""


class Host:
    """The thread that carries a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread = run.runtime.start_thread(self._main, name="loop", host=True)

    def join(self, *, on_interrupt: Callable[[], object]) -> None:
        """Wait until the run is closed and the thread gone. Bounded by the run's `Grace`, for a stop was requested."""
        while self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt:
                on_interrupt()

    def _main(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(self._carry())
            loop.run_until_complete(self._tidy(loop))
        finally:
            asyncio.set_event_loop(None)
            for task in asyncio.all_tasks(loop):
                _silence(task)
            loop.close()

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


def run_in_thread(run: Run) -> Host:
    """Start a run on a new loop in a new thread."""
    return Host(run)
