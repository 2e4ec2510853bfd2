"""What `cancel()` returns: whether it took effect, and a way to wait for the end.

The rule kept here: nobody waits for himself. A stage that awaits the end of its own pipeline gets an error, not a hang.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from .errors import PipelineError
from .result import Err
from .runtime import PipelineRuntime

if TYPE_CHECKING:
    from .report import RunReport

__all__ = ["CancelHandle"]


class CancelHandle:
    """What `cancel()` returns: truthy when that call began or escalated the stop; awaitable for the run's result."""

    def __init__(self, took_effect: bool, closed: concurrent.futures.Future[RunReport | Err], runtime: PipelineRuntime | None) -> None:
        self._took_effect = took_effect
        self._closed = closed
        self._runtime = runtime

    def __bool__(self) -> bool:
        return self._took_effect

    def __await__(self) -> Generator[Any, Any, RunReport | Err]:
        return self._wait().__await__()

    async def _wait(self) -> RunReport | Err:
        self._refuse_inside()
        if self._closed.done():
            return self._closed.result()
        # Shielded: giving up the wait must not cancel the future that everybody else waits for.
        return await asyncio.shield(asyncio.wrap_future(self._closed))

    def result(self, timeout: float | None = None) -> RunReport | Err:
        """Wait in a thread (not on an event loop) until everything is closed; `TimeoutError` after `timeout` seconds."""
        self._refuse_inside()
        return self._closed.result(timeout)

    def _refuse_inside(self) -> None:
        runtime = self._runtime
        if runtime is None or self._closed.done():
            return
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        if (task is not None and task in runtime.tasks) or threading.current_thread() in runtime.threads:
            raise PipelineError(
                "a stage of the pipeline cannot wait for the pipeline to close: it would wait for itself. "
                "Call cancel() without awaiting it, or return KillSwitch(reason)"
            )
