"""What a run has started: its tasks, threads and processes, each from its start to its end.

The rule kept here: nothing is started but through these registers, and everything in them leaves by its own end.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar, cast

__all__ = ["ProcessLike", "Registers"]

T = TypeVar("T")


class ProcessLike(Protocol):
    """What the runtime needs of a process: both `multiprocess` and `multiprocessing` offer it."""

    name: str

    @property
    def sentinel(self) -> int: ...
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Registers(ABC):
    """The registers of one run. Whoever owns them says what it means when something in them goes wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loop: asyncio.AbstractEventLoop | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.threads: set[threading.Thread] = set()
        self.starting: set[threading.Thread] = set()
        """Those that start a process at the moment."""
        self.processes: set[ProcessLike] = set()
        self.supervisor: asyncio.Task[Any] | None = None
        self._groups: dict[asyncio.Task[Any], int] = {}
        self._contexts: dict[asyncio.Task[Any], contextvars.Context] = {}
        self._sent_off: set[asyncio.Task[Any]] = set()
        """Cancelled by this run."""
        self._task_ends: dict[asyncio.Task[Any], Callable[[asyncio.Task[Any]], None]] = {}
        self._process_ends: dict[ProcessLike, Callable[[], None] | None] = {}
        self._host: threading.Thread | None = None
        self._pulse: asyncio.Future[None] | None = None

    @abstractmethod
    def task_cancelled(self, name: str) -> None:
        """One of its tasks was cancelled, and not by `cancel_task`."""

    @abstractmethod
    def broke(self, name: str, error: BaseException) -> None:
        """A task or thread has raised."""

    # --- they start

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

    # --- they end

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
        if task.cancelled():
            if task not in self._sent_off:
                self.task_cancelled(task.get_name())
        elif (error := task.exception()) is not None:
            self.broke(task.get_name(), error)
        self._task_ended(task)

    def _thread_main(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            self.broke(threading.current_thread().name, error)
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

    # --- waiting for them

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
    def idle(self) -> bool:
        """Whether nothing that this run has started is left."""
        return not (self._left_tasks() or self.processes or self._left_threads())

    def left(self) -> list[str]:
        """The names of what it has started and what has not ended."""
        found = [task.get_name() for task in self._left_tasks()]
        found += [thread.name for thread in self._left_threads()]
        return found + [process.name for process in self.processes]

    def _left_tasks(self) -> set[asyncio.Task[Any]]:
        return self.tasks - {self.supervisor} if self.supervisor else self.tasks

    def _left_threads(self) -> set[threading.Thread]:
        return self.threads - {self._host} if self._host else self.threads
