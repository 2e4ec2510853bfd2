"""`PipelineRuntime`: the owner of every task, thread and process of one run, and the one record of why it stops.

The rules kept here:

- Nothing in the library starts a task, a thread or a process except through this object, so what a run has started is
  what is registered here, and a run is closed when the registers are empty.
- A stop is a request appended to a list, which is atomic in any thread and in a signal handler. State, reason and
  outcome are read off that list; nothing is ever set back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from .cancellation.reason import CancelReason, CancelType
from .lifecycle import Grace, PipelineState, may_move
from .result import Err, describe

if TYPE_CHECKING:
    from .assembly import Assembly
    from .metrics import Ledger
    from .report import RunReport

__all__ = ["PipelineRuntime", "ProcessLike", "StopLevel", "StopRequest"]

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


class ProcessLike(Protocol):
    """What the runtime needs of a process: both `multiprocess` and `multiprocessing` offer it."""

    name: str

    @property
    def sentinel(self) -> int: ...
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class BurstUnderWay(Protocol):
    """Items being handled as one, and booked when that is over."""

    def book_midway(self) -> None:
        """Book what is done so far."""
        ...

    def give_way(self) -> None:
        """End it, for its handler has suspended."""
        ...


class PipelineRuntime:
    """One run of one pipeline: what it has started, and why it stops. Made by the run itself."""

    def __init__(self, name: str, grace: Grace) -> None:
        self.name = name
        self.grace = grace
        self.loop: asyncio.AbstractEventLoop | None = None
        self.cancel_event = asyncio.Event()
        """Set when the run is aborted; a drain leaves it clear, for the handlers are to finish."""
        self.tasks: set[asyncio.Task[Any]] = set()
        self.threads: set[threading.Thread] = set()
        self.starting: set[threading.Thread] = set()
        """Those that start a process at the moment."""
        self.processes: set[ProcessLike] = set()
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
        self._groups: dict[asyncio.Task[Any], int] = {}
        self._contexts: dict[asyncio.Task[Any], contextvars.Context] = {}
        self._sent_off: set[asyncio.Task[Any]] = set()
        """Cancelled by this run."""
        self._task_ends: dict[asyncio.Task[Any], Callable[[asyncio.Task[Any]], None]] = {}
        self._process_ends: dict[ProcessLike, Callable[[], None] | None] = {}
        self.supervisor: asyncio.Task[Any] | None = None
        self._host: threading.Thread | None = None
        self._pulse: asyncio.Future[None] | None = None
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
        return tuple(self._requests)

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        """Every reason to stop, in order; the first is primary."""
        return tuple(request.reason for request in self._requests)

    @property
    def reason(self) -> str | None:
        """The first reason as text, or None while nothing asks to stop."""
        return self._requests[0].reason.message if self._requests else None

    @property
    def level(self) -> StopLevel:
        """How hard the run is being stopped."""
        return max([self._floor, *(request.level for request in self._requests)])

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
        if request.level >= StopLevel.ABORT:
            self._cancelled = True
        before = max((r.level for r in requests[: requests.index(request)]), default=StopLevel.NONE)
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

    # --- what it has started

    def start_task(
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        name: str,
        group: int | None = None,
        supervised: bool = True,
        on_end: Callable[[asyncio.Task[Any]], None] | None = None,
    ) -> asyncio.Task[T]:
        """Start a task of this run. `group` is the index of the stage that it belongs to.

        The failure of a `supervised` task fails the run; that of another is for whoever awaits it. `on_end` is called
        when the task is done, also when it was cancelled before its first step: cheaper than a callback of its own.
        """
        assert self.loop is not None
        context = contextvars.copy_context()
        task = self.loop.create_task(coroutine, name=f"{self.name}/{name}", context=context)
        self._contexts[task] = context
        if group is not None:
            self._groups[task] = group
        if on_end is not None:
            self._task_ends[task] = on_end
        self.tasks.add(task)
        task.add_done_callback(self._supervised_ended if supervised else self._task_ended)
        return task

    def context(self) -> contextvars.Context:
        """That of the current task, which this run has started: to do something in its name while it waits."""
        return self._contexts[cast("asyncio.Task[Any]", asyncio.current_task())]

    def register_task(self, task: asyncio.Task[Any]) -> None:
        """Own a task: it is cancelled when the run is, and awaited before the run ends."""
        self.tasks.add(task)
        task.add_done_callback(self._task_ended)

    def start_thread(
        self, target: Callable[[], None], *, name: str, host: bool = False, starting: bool = False
    ) -> threading.Thread:
        """Start a thread of this run. It must end by itself when asked; it is a daemon, so it never blocks the exit.

        `host` marks the thread that carries the run's own loop, which therefore cannot end before the run; `starting`
        one that starts a process, ends in moments, and is waited for even when the run is killed.
        """
        if host:
            target = partial(self._host_main, target)
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._thread_main, target), name=f"{self.name}/{name}", daemon=True)
        self.threads.add(thread)
        self._host = thread if host else self._host
        if starting:
            self.starting.add(thread)
        try:
            thread.start()
        except BaseException:
            self.threads.discard(thread)
            self.starting.discard(thread)
            raise
        return thread

    def start_process(self, context: Any, target: Callable[..., object], arguments: tuple[Any, ...], *, name: str) -> Any:
        """Start a process of this run, from one of its threads, for it may take a while; then register it on the loop.

        `context` is one of `multiprocess`, whose types are not declared: hence `Any`. A daemon, so that it never
        outlives the program.
        """
        process = context.Process(target=target, args=arguments, name=f"{self.name}/{name}", daemon=True)
        process.start()
        return process

    def register_process(self, process: ProcessLike, *, on_end: Callable[[], None] | None = None) -> None:
        """Own a started process: it is terminated, then killed, when the run stops, and reaped when it ends."""
        assert self.loop is not None
        self.processes.add(process)
        self._process_ends[process] = on_end
        self.loop.add_reader(process.sentinel, self._process_ended, process)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> bool:
        """Run a callback on the run's loop; False, and nothing happens, when that loop is already closed."""
        loop = self.loop
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop has closed: an abandoned thread reports to nobody
            if not loop.is_closed():
                raise
            return False
        return True

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

    # --- internals: the registers

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        self._groups.pop(task, None)
        self._contexts.pop(task, None)
        self._sent_off.discard(task)
        on_end = self._task_ends.pop(task, None)
        if on_end is not None:
            on_end(task)
        self.pulse()

    def _supervised_ended(self, task: asyncio.Task[Any]) -> None:
        name = task.get_name()
        if task.cancelled():
            if task not in self._sent_off and not self.cancelled:
                self.request_stop(StopRequest(_cancelled_by_others(name), StopLevel.ABORT))
        elif (error := task.exception()) is not None and self.ended is None:
            self.fail(Err.of(error, stage=name), origin=name, code="internal_error", level=StopLevel.ABORT)
        self._task_ended(task)

    def _thread_main(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            self.fail(
                Err.of(error), origin=threading.current_thread().name, code="internal_error", level=StopLevel.ABORT
            )
        finally:
            self.call_soon_threadsafe(self._thread_ended, threading.current_thread())

    def _host_main(self, target: Callable[[], None]) -> None:
        try:
            target()
        finally:
            self.threads.discard(threading.current_thread())

    def _thread_ended(self, thread: threading.Thread) -> None:
        # The thread is past its last line of ours; what is left of it takes microseconds.
        thread.join(0.1)
        self.threads.discard(thread)
        self.starting.discard(thread)
        self.pulse()

    def _process_ended(self, process: ProcessLike) -> None:
        assert self.loop is not None
        self.loop.remove_reader(process.sentinel)
        process.join(0.1)
        self.processes.discard(process)
        on_end = self._process_ends.pop(process, None)
        if on_end is not None:
            on_end()
        self.pulse()

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
        self.cancel_event.set()
        if self.assembly is not None:
            self.assembly.abort()
        self.cancel_tasks()

    def regroup(self, task: asyncio.Task[Any], group: int) -> None:
        """A task belongs to another stage from now on."""
        if task in self._groups:
            self._groups[task] = group

    def cancel_tasks(self, upto: int | None = None) -> None:
        """Cancel the stages' tasks: all, or those of the stages with an index up to `upto`."""
        for task in list(self.tasks):
            group = self._groups.get(task)
            if task is not self.supervisor and (upto is None or (group is not None and group <= upto)):
                self.cancel_task(task)

    def cancel_task(self, task: asyncio.Task[Any]) -> None:
        """Cancel one task of this run. One that somebody else cancels stops the run."""
        self._sent_off.add(task)
        task.cancel()

    # --- internals: waiting

    def pulse(self) -> None:
        """Wake the supervisor: something has changed."""
        if self._pulse is not None and not self._pulse.done():
            self._pulse.set_result(None)

    async def wait_for(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until the condition holds, which is looked at after every change; False when time is up."""
        assert self.loop is not None
        deadline = None if seconds is None else self.loop.time() + seconds
        while not condition():
            self._pulse = pulse = self.loop.create_future()
            remaining = None if deadline is None else deadline - self.loop.time()
            if remaining is not None and remaining <= 0:
                return False
            if remaining is None:
                await pulse  # a cancellation takes the pulse with it; the next look makes a new one
            else:
                await asyncio.wait((pulse,), timeout=remaining)
        return True

    @property
    def outside(self) -> bool:
        """Whether threads or processes are at work for this run now: until they are done, time is real."""
        assembly = self.assembly
        if assembly is None or self.ended is not None:
            return False
        if (self._cancelled or assembly.done) and (self.processes or self._left_threads()):
            return True  # they have been asked to end
        return assembly.outside

    @property
    def idle(self) -> bool:
        """Whether nothing that this run has started is left."""
        return not (self._left_tasks() or self.processes or self._left_threads())

    def abandon(self) -> None:
        """Name what could not be stopped, and let it be: nothing that it does from now on is counted."""
        self.abandoned += [task.get_name() for task in self._left_tasks()]
        self.abandoned += [thread.name for thread in self._left_threads()]
        self.abandoned += [process.name for process in self.processes]

    def _left_tasks(self) -> set[asyncio.Task[Any]]:
        return self.tasks - {self.supervisor} if self.supervisor else self.tasks

    def _left_threads(self) -> set[threading.Thread]:
        return self.threads - {self._host} if self._host else self.threads


def _cancelled_by_others(name: str) -> CancelReason:
    message = (
        f"task {name!r} was cancelled, and not by its run: a handler that cancels its own task? "
        "To stop a pipeline, call its cancel() or return KillSwitch(reason)"
    )
    return CancelReason(message, CancelType.ERROR, code="task_cancelled", origin=name)
