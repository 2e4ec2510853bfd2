"""The phases of a run's end: wait, drain, abort, kill, close.

The rule kept here: every wait is bounded by a `Grace`, but the first, which is the run itself. Whatever user code does,
the supervisor gets to the end, names what it could not stop, and freezes the report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .assembly import Assembly
from .cancellation.reason import CancelReason, CancelType
from .runtime import PipelineRuntime, StopLevel, StopRequest

__all__ = ["supervise"]

_LAST_CALL = 0.1
"""Seconds for tasks to react to the last cancellation; part of the half second that a stop may take on top."""


async def supervise(runtime: PipelineRuntime, assembly: Assembly) -> None:
    """See one run through to its end. Runs as a task of its own, and cannot be talked out of it."""
    supervisor = _Supervisor(runtime, assembly)
    await supervisor.see_through()


class _Supervisor:
    def __init__(self, runtime: PipelineRuntime, assembly: Assembly) -> None:
        self._runtime = runtime
        self._assembly = assembly

    async def see_through(self) -> None:
        runtime, grace = self._runtime, self._runtime.grace
        # The run itself: the one wait without a bound, for a stream may be endless.
        await self._wait(lambda: self._finished() or runtime.level > StopLevel.NONE, None)
        if runtime.level == StopLevel.DRAIN and not await self._wait(
            lambda: self._finished() or runtime.level > StopLevel.DRAIN, self._drain_patience()
        ):
            runtime.escalate(StopLevel.ABORT)
        if runtime.level == StopLevel.ABORT and not await self._wait(
            lambda: runtime.idle or runtime.level > StopLevel.ABORT, grace.abort
        ):
            runtime.escalate(StopLevel.KILL)
        await self._clear_away()

    def _finished(self) -> bool:
        return self._assembly.done and self._assembly.sink.drained

    def _drain_patience(self) -> float:
        """A failed stage lets what is behind it finish for as long as an abort may take; a drain has its own patience."""
        grace = self._runtime.grace
        cut = any(request.cut is not None for request in self._runtime.requests)
        return grace.abort if cut else grace.drain

    async def _clear_away(self) -> None:
        """Let go of whatever is left, gently and then for sure; after a good run there is nothing."""
        runtime, grace = self._runtime, self._runtime.grace
        if runtime.level < StopLevel.KILL and not runtime.idle:
            await self._wait(lambda: runtime.idle, _LAST_CALL)
        if runtime.idle:
            return
        runtime.cancel_tasks()
        clock = asyncio.get_running_loop().time
        patience_ends = clock() + grace.terminate
        await self._wait(lambda: not runtime.starting, grace.terminate)  # a process must be there to be told anything
        if runtime.processes:
            for process in list(runtime.processes):
                process.terminate()
            if not await self._wait(lambda: not runtime.processes, max(patience_ends - clock(), 0.0)):
                for process in list(runtime.processes):
                    process.kill()
                await self._wait(lambda: not runtime.processes, grace.kill)
        await self._wait(lambda: runtime.idle, _LAST_CALL)
        runtime.abandon()

    async def _wait(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Wait, and take a cancellation of this very task (a loop that is shut down) for a request to stop."""
        # The loop's own clock, like every other wait in it: under a virtual one a grace passes at once.
        clock = asyncio.get_running_loop().time
        deadline = None if seconds is None else clock() + seconds
        while True:
            remaining = None if deadline is None else max(0.0, deadline - clock())
            try:
                return await self._runtime.wait_for(condition, remaining)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None:
                    task.uncancel()
                level = StopLevel.KILL if self._runtime.cancelled else StopLevel.ABORT
                reason = CancelReason("the event loop is shutting down", CancelType.PARENT, code="loop_shutdown")
                self._runtime.request_stop(StopRequest(reason, level))
