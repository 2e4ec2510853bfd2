"""`PipelineRuntime`: the owner of every task, thread and process of one run, and the one record of why it stops.

The rules kept here:

- Nothing in the library starts a task, a thread or a process except through this object's registers, and a run is closed
  when those are empty.
- A stop is a request appended to a list, which is atomic in any thread and in a signal handler. State, reason and
  outcome are read off that list; nothing is ever set back. The end is an entry of that list as well: what comes before it
  is told, what comes after it is answered with False, and nothing falls in between.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar

from .cancellation.reason import CancelReason, CancelType
from .lifecycle import Grace, PipelineState, may_move
from .registers import Registers
from .result import Err, describe

if TYPE_CHECKING:
    from .assembly import Assembly
    from .metrics import Ledger
    from .report import RunReport

__all__ = ["PipelineRuntime", "StopLevel", "StopRequest"]

T = TypeVar("T")

_ERROR_SAMPLE = 20
"""Errors kept per stage in a report; all are counted, this many are shown."""


class StopLevel(IntEnum):
    """How hard a request asks to stop."""

    NONE = 0
    DRAIN = 1
    ABORT = 2
    KILL = 3


_STATE = {
    StopLevel.NONE: PipelineState.RUNNING,
    StopLevel.DRAIN: PipelineState.DRAINING,
    StopLevel.ABORT: PipelineState.ABORTING,
    StopLevel.KILL: PipelineState.KILLING,
}


@dataclass(frozen=True, slots=True, eq=False)
class StopRequest:
    """One request to stop. `error` makes it a failure; `cut` is the stage index up to which to stop at once."""

    reason: CancelReason
    level: StopLevel
    error: Err | None = None
    cut: int | None = None


_OVER = StopRequest(CancelReason("the run is over", CancelType.PIPELINE), StopLevel.NONE)
"""Stands among the requests where the run ended."""


class BurstUnderWay(Protocol):
    """Items being handled as one, and booked when that is over."""

    def book_midway(self) -> None:
        """Book what is done so far."""
        ...

    def give_way(self) -> None:
        """End it, for its handler has suspended."""
        ...


class PipelineRuntime(Registers):
    """One run of one pipeline: what it has started, and why it stops. Made by the run itself."""

    def __init__(self, name: str, grace: Grace) -> None:
        super().__init__(name)
        self.grace = grace
        self.cancel_event = asyncio.Event()
        """Set when the run is aborted; a drain leaves it clear, for the handlers are to finish."""
        self.abandoned: list[str] = []
        self.errors: dict[str, list[Err]] = {}
        self.at_end: list[Callable[[], None]] = []
        """What is left to do when everything is closed, however it ended: logs to complete."""
        self.assembly: Assembly | None = None
        self.final_ledger: Ledger | None = None
        self.began = 0.0
        self.ended: float | None = None
        self.closed: concurrent.futures.Future[RunReport | Err] = concurrent.futures.Future()
        self._requests: list[StopRequest] = []
        self.stop_flag: Sequence[object] = self._requests
        """True as soon as anything asks to stop: for loops that look at it for every item."""
        self._cancelled = False
        self._floor = StopLevel.NONE
        self._aborted = False
        self._applied = 0
        self._thread = 0
        self.on_requests: Callable[[Sequence[StopRequest]], None] | None = None
        """Told of new requests to stop, on the loop."""
        self.burst: BurstUnderWay | None = None
        """Set by whoever runs one: what it has done so far is not booked yet."""

    # --- why it stops; all of this from any thread

    @property
    def requests(self) -> tuple[StopRequest, ...]:
        """Every request to stop, in order."""
        requests = tuple(self._requests)
        return requests[: requests.index(_OVER)] if _OVER in requests else requests

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        """Every reason to stop, in order; the first is primary."""
        return tuple(request.reason for request in self.requests)

    @property
    def reason(self) -> str | None:
        """The first reason as text, or None while nothing asks to stop."""
        return next((request.reason.message for request in self.requests), None)

    @property
    def level(self) -> StopLevel:
        """How hard the run is being stopped."""
        return max([self._floor, *(request.level for request in self.requests)])

    @property
    def state(self) -> PipelineState:
        """Where the run stands."""
        if self.ended is not None:
            return PipelineState.CLOSED
        if self.loop is None and not self._requests:
            return PipelineState.NEW
        return _STATE[self.level]

    @property
    def cancelled(self) -> bool:
        """Whether handlers should stop by themselves: true from an abort on, not while draining."""
        return self._cancelled

    @property
    def elapsed(self) -> float:
        """Seconds since the start, up to the end."""
        if not self.began:
            return 0.0
        return (self.ended or monotonic()) - self.began

    def request_stop(self, request: StopRequest) -> bool:
        """Record a request; True when it begins or escalates the stop. Atomic, and safe in a signal handler."""
        if self.ended is not None:
            return False
        requests = self._requests
        requests.append(request)
        earlier = requests[: requests.index(request)]
        if _OVER in earlier:  # it has just ended, in another thread
            return False
        if request.level >= StopLevel.ABORT:
            self._cancelled = True
        before = max((known.level for known in earlier), default=StopLevel.NONE)
        self._notify()
        return may_move(_STATE[max(before, self._floor)], _STATE[request.level])

    def fail(self, err: Err, *, origin: str, code: str, level: StopLevel = StopLevel.DRAIN, cut: int | None = None) -> None:
        """Stop because of an error: everything up to stage `cut` at once, what is behind it drains for a short while."""
        reason = CancelReason(f"{origin}: {describe(err.value)}", CancelType.ERROR, code=code, origin=origin)
        self.note(origin, err)
        self.request_stop(StopRequest(reason, level, err, cut))

    def note(self, origin: str, err: Err) -> None:
        """Keep a bounded sample of errors for the report."""
        sample = self.errors.setdefault(origin, [])
        if len(sample) < _ERROR_SAMPLE:
            sample.append(err)

    # --- the loop

    def catch_up(self) -> None:
        """Book what is under way in this very thread: a handler that asks for a snapshot is in it itself."""
        if self.burst is not None and threading.get_ident() == self._thread:
            self.burst.book_midway()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The run begins, on this loop and thread."""
        self.loop = loop
        self._thread = threading.get_ident()
        watch = getattr(loop, "watch_real_work", None)  # a loop with a clock of its own, see `testing.clock`
        if watch is not None:
            watch(self)

    def conclude(self) -> None:
        """The run is over: what asks to stop from here on comes too late."""
        self.ended = monotonic()
        self._requests.append(_OVER)

    @property
    def outside(self) -> bool:
        """Whether threads or processes are at work for this run now: until they are done, time is real."""
        assembly = self.assembly
        if assembly is None or self.ended is not None:
            return False
        if (self._cancelled or assembly.done) and (self.processes or self._left_threads()):
            return True  # they have been asked to end
        return assembly.outside

    # --- internals: stopping

    def _notify(self) -> None:
        if self.cancelled and self.loop is not None:
            try:
                running = asyncio.get_running_loop()
            except RuntimeError:
                running = None
            if running is self.loop:
                self.cancel_event.set()
        self.call_soon_threadsafe(self._apply)

    def _apply(self) -> None:
        """Make the latest request felt everywhere, on the loop, outside of every task."""
        if self.ended is not None or self.assembly is None:
            return
        fresh, self._applied = self._requests[self._applied :], len(self._requests)
        if self.on_requests is not None and fresh:
            self.on_requests(fresh)
        for request in fresh:
            if request.cut is not None:
                self.assembly.cut(request.cut)
        if self.burst is not None and not self.cancelled:
            self.burst.give_way()
        if self.level >= StopLevel.DRAIN:
            self.assembly.stop_source()
        if self.cancelled:
            self.abort_now()
        self.pulse()

    def escalate(self, level: StopLevel) -> None:
        """Patience is over: the supervisor's own step up. On the loop."""
        self._floor = max(self._floor, level)
        if level >= StopLevel.ABORT:
            self._cancelled = True
            self.abort_now()

    def abort_now(self) -> None:
        """Close every channel and cancel every task. On the loop, never from inside a task of this run's stages."""
        if self._aborted:
            return
        self._aborted = True
        # It may be set already, by a signal handler in the middle of somebody's `wait()`: he is woken only by a set from here.
        self.cancel_event.clear()
        self.cancel_event.set()
        if self.assembly is not None:
            self.assembly.abort()
        self.cancel_tasks()

    def abandon(self) -> None:
        """Name what could not be stopped, and let it be: nothing that it does from now on is counted."""
        self.abandoned += self.left()

    # --- of what it has started, what went wrong

    def task_cancelled(self, name: str) -> None:
        """One of its tasks was cancelled, and not by the run."""
        if not self.cancelled:
            self.request_stop(StopRequest(_cancelled_by_others(name), StopLevel.ABORT))

    def broke(self, name: str, error: BaseException) -> None:
        """A task or thread has raised what it should have handled: a fault of the library."""
        if self.ended is None:
            self.fail(Err.of(error, stage=name), origin=name, code="internal_error", level=StopLevel.ABORT)


def _cancelled_by_others(name: str) -> CancelReason:
    message = (
        f"task {name!r} was cancelled, and not by its run: a handler that cancels its own task? "
        "To stop a pipeline, call its cancel() or return KillSwitch(reason)"
    )
    return CancelReason(message, CancelType.ERROR, code="task_cancelled", origin=name)
