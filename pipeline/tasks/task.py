"""What can be run as a task, and what it has in hand while it runs.

The rule kept here: work tells what it does through its `TaskContext` and knows nothing of who listens, so that the same
work runs in memory and in a worker of a database.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, TypeAlias, TypeVar

from ..cancellation.reason import CancelReason
from ..pace import Pacer
from ..pipeline import Pipeline
from .data import plain
from .errors import TaskOverError
from .events import TERMINAL, EventType, TaskKey

__all__ = ["StreamTask", "TaskContext", "Work", "check_work", "current_task", "enter_task", "leave_task"]

T = TypeVar("T")

_LOOK = 0.5
"""Seconds between two looks of a waiting thread at whether the loop that it waits for is still there."""


class TaskContext:
    """What a task knows of itself, and how it tells what it does.

    `payload` is what was submitted to a backend; `attempt` counts from 1; `saved` is what an earlier attempt, whose
    worker was lost, has passed to `save()`, and None at first.
    """

    def __init__(
        self,
        key: TaskKey,
        *,
        publish: Callable[[EventType, Mapping[str, Any]], Awaitable[object]],
        keep: Callable[[Any], Awaitable[object]] | None = None,
        attempt: int = 1,
        saved: Any = None,
        payload: Mapping[str, Any] | None = None,
    ) -> None:
        self.key = key
        self.attempt = attempt
        self.saved = saved
        self.payload: Mapping[str, Any] = {} if payload is None else payload
        self.said: dict[EventType, Mapping[str, Any]] = {}
        """Data of terminal events that the work has sent, the last one last: told in the one that ends the task."""
        self._publish = publish
        self._keep = keep
        self._reasons: Callable[[], tuple[CancelReason, ...]] = tuple
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = False
        self._pace = Pacer()

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        """Why it is asked to stop; empty while it is not. From any thread."""
        return self._reasons()

    async def send_event(self, type: EventType | str, data: Mapping[str, Any] | None = None) -> None:
        """Tell all who follow the task. From any event loop; from other threads see `send_event_threadsafe`.

        `data` is copied as JSON, see `data.py`: TypeError for what JSON does not know, ValueError above 1 MiB and for types
        of events that there are not. A terminal event is not told at once: it decides how the task ends when the work then
        returns, and its data becomes part of the event with which the task ends. Raises `TaskOverError` when the task was
        given up meanwhile.
        """
        kind = _event_type(type)
        await self._on_loop(partial(self.tell, kind, _event_data(kind, data)))

    def send_event_threadsafe(self, type: EventType | str, data: Mapping[str, Any] | None = None) -> None:
        """As `send_event`, for code in a thread, which waits until it is told.

        Raises RuntimeError in the thread of the task's own event loop, which would wait for itself, and when that loop
        has ended.
        """
        kind = _event_type(type)
        self._from_thread(partial(self.tell, kind, _event_data(kind, data)), "send_event")

    async def progress(
        self, done: float | None = None, total: float | None = None, *, message: str | None = None, **more: Any
    ) -> None:
        """Tell how far it is: `{"done": 3, "total": 10, "message": "…"}`, without what is not given, and `more`."""
        told = {"done": done, "total": total, "message": message}
        await self.send_event(EventType.PROGRESS, {k: v for k, v in told.items() if v is not None} | more)

    async def item(self, item: Any, **more: Any) -> None:
        """Tell one result, or a part of it: `{"item": …}`, and `more`."""
        await self.send_event(EventType.ITEM, {"item": item} | more)

    async def warning(self, message: str, **more: Any) -> None:
        """Tell of something that somebody should know: `{"message": …}`, and `more`."""
        await self.send_event(EventType.WARNING, {"message": message} | more)

    async def save(self, state: Any) -> None:
        """Keep `state`, JSON of at most 1 MiB, for another attempt to go on from. The newest counts.

        There is another attempt when the worker of a durable backend is lost. Tasks in memory have one only.
        """
        copy = plain(state, "the state to save")
        if self._keep is not None:
            await self._on_loop(partial(self._save, self._keep, copy))

    # --- for whoever runs it

    def bind(self, loop: asyncio.AbstractEventLoop, reasons: Callable[[], tuple[CancelReason, ...]]) -> None:
        """The work begins, on this loop; `reasons` gives why it is asked to stop."""
        self._loop, self._reasons = loop, reasons

    def close(self) -> None:
        """Nothing that the work tells from now on counts: it has ended, or was given up."""
        self._over = True

    async def tell(self, type: EventType, data: Mapping[str, Any]) -> None:
        """Publish `data`, which is plain already. On the task's own loop."""
        if self._over:
            raise TaskOverError(self.key)
        if type in TERMINAL:
            before = self.said.pop(type, {})
            self.said[type] = {**before, **data}
        else:
            await self._publish(type, data)
            if self._pace.due():  # work that only tells, and never waits, leaves the loop to those who listen
                await self._pace.rest()

    async def _save(self, keep: Callable[[Any], Awaitable[object]], state: Any) -> None:
        if self._over:
            raise TaskOverError(self.key)
        await keep(state)

    async def _on_loop(self, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        loop = self._loop
        if loop is None or loop is asyncio.get_running_loop():
            await act()
        elif loop.is_closed():
            raise TaskOverError(self.key)
        else:  # a thread with a loop of its own
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(act(), loop))

    def _from_thread(self, act: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        loop = self._loop
        if loop is None:
            raise RuntimeError(f"task {self.key} has not begun: nothing can be told about it yet")
        if _is_running_here(loop):
            raise RuntimeError(f"this is the event loop of task {self.key}, which would wait for itself: await {name}() instead")
        if loop.is_closed():
            raise TaskOverError(self.key)
        waiting = asyncio.run_coroutine_threadsafe(act(), loop)
        while True:
            try:
                return waiting.result(_LOOK)
            except concurrent.futures.CancelledError:  # the loop is ending, and ends what runs in it
                raise TaskOverError(self.key) from None
            except TimeoutError:
                if not waiting.done() and loop.is_closed():
                    raise TaskOverError(self.key) from None


class StreamTask:
    """A task as a class: a subclass has `async def process(self)`, and `self.context` while that runs.

    What `process` returns is the value of the task, unless `mark_completed` has said one. One object runs once at a time.
    It has no metaclass, so that a model of Django or SQLAlchemy, or a frozen dataclass, may be one too.
    """

    _context: TaskContext | None = None

    @property
    def context(self) -> TaskContext:
        """Raises RuntimeError while the task does not run."""
        if self._context is None:
            raise RuntimeError(f"{type(self).__qualname__} does not run: its context is there inside process()")
        return self._context

    async def process(self) -> Any:
        """The work. `Any`: its value, see `TaskContext.send_event` for what can be told of it."""
        raise NotImplementedError(f"{type(self).__qualname__} has no process: write `async def process(self)`")

    async def send_event(self, type: EventType | str, data: Mapping[str, Any] | None = None) -> None:
        """See `TaskContext.send_event`."""
        await self.context.send_event(type, data)

    async def mark_completed(self, final_value: Any = None) -> None:
        """Say how it ends, once `process` returns: completed, with this value."""
        await self.context.send_event(EventType.COMPLETED, {"value": final_value})

    async def mark_failed(self, message: str, **more: Any) -> None:
        """Say how it ends, once `process` returns: failed."""
        await self.context.send_event(EventType.ERROR, {"message": message} | more)

    def check_idle(self) -> None:
        """Raises RuntimeError while it runs."""
        if self._context is not None:
            raise RuntimeError(f"this {type(self).__qualname__} runs already as task {self._context.key}; make another one")

    def check_process(self) -> None:
        """Raises TypeError for a `process` that cannot be run."""
        name = type(self).__qualname__
        if type(self).process is StreamTask.process:
            raise TypeError(f"{name} has no process: write `async def process(self)`")
        if not _is_coroutine_function(self.process):
            raise TypeError(f"{name}.process is no coroutine function: make it `async def process(self)`, without `yield`")
        try:
            inspect.signature(self.process).bind()
        except TypeError:
            raise TypeError(
                f"{name}.process takes {inspect.signature(self.process)}; it is called without arguments, "
                "and finds the context in self.context"
            ) from None

    async def run_with(self, context: TaskContext) -> Any:
        """Run `process` with this context. Raises RuntimeError while it runs already."""
        self.check_idle()
        object.__setattr__(self, "_context", context)  # it may be a frozen dataclass
        try:
            return await self.process()
        finally:
            object.__setattr__(self, "_context", None)


Work: TypeAlias = Pipeline[Any] | StreamTask | Callable[[], Awaitable[Any]] | Callable[[TaskContext], Awaitable[Any]]
"""What can be run as a task. `Any`: the items of a pipeline, the value of a coroutine."""

_current: ContextVar[TaskContext | None] = ContextVar("penstock_task", default=None)


def current_task() -> TaskContext | None:
    """The task that this code runs in: from deep below, in its stages in the loop and in `asyncio.to_thread`. Else None."""
    return _current.get()


def enter_task(context: TaskContext) -> Token[TaskContext | None]:
    """What runs here from now on, and in tasks started from here, is this task."""
    return _current.set(context)


def leave_task(token: Token[TaskContext | None]) -> None:
    """Undo `enter_task`. In another context than that of the entry there is nothing to undo, and nothing is done."""
    with suppress(ValueError):  # a coroutine that is closed by the garbage collector
        _current.reset(token)


def check_work(work: object) -> bool:
    """Whether it is a function that takes the context. Raises TypeError for what cannot be run as a task."""
    if isinstance(work, Pipeline):
        return False
    if isinstance(work, StreamTask):
        work.check_process()
        work.check_idle()
        return False
    if inspect.iscoroutine(work):
        work.close()
        raise TypeError(f"the work is a coroutine object; pass the function itself, {work.__qualname__}, without calling it")
    if isinstance(work, type) and issubclass(work, StreamTask):
        raise TypeError(f"the work is the class {work.__qualname__}; pass an object of it: {work.__qualname__}(...)")
    if not callable(work) or isinstance(work, type):
        raise TypeError(f"a task is a Pipeline, a StreamTask or a coroutine function, not {work!r}")
    if inspect.isasyncgenfunction(work):
        raise TypeError(f"the work {work!r} is an async generator, a source and no task: make it Pipeline({work.__name__})")
    if not _is_coroutine_function(work):
        raise TypeError(
            f"the work {work!r} is a plain function, which would hold the event loop; make it `async def`, "
            "and call what waits or computes with `await asyncio.to_thread(...)`"
        )
    return _takes_context(work)


async def finished(function: object, result: Any) -> Any:
    """What a function has returned, awaited; a pipeline or `StreamTask` as it is. Raises TypeError for other things."""
    if inspect.isawaitable(result):
        return await result
    if isinstance(result, (Pipeline, StreamTask)):
        return result
    raise TypeError(f"{function!r} has returned {result!r}; make it `async def`, or return a Pipeline or a StreamTask")


def _is_coroutine_function(work: Callable[..., Any]) -> bool:
    while isinstance(work, partial):
        work = work.func
    work = inspect.unwrap(work)  # a decorator's wrapper may be a plain function
    if getattr(work, "__name__", None) == "<lambda>":
        return True  # `lambda: fetch(url)`; what it returns is looked at when it has
    return inspect.iscoroutinefunction(work) or inspect.iscoroutinefunction(getattr(work, "__call__", None))  # noqa: B004


def _takes_context(work: Callable[..., Any]) -> bool:
    signature = inspect.signature(work)
    for arguments in ((), (None,)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return bool(arguments) or any(_is_for_context(parameter) for parameter in signature.parameters.values())
    raise TypeError(f"the work {work!r} takes {signature}; it is called without arguments, or with the TaskContext alone")


def _is_for_context(parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
        return False
    return parameter.name == "context" or TaskContext.__name__ in str(parameter.annotation)


def _event_type(type: EventType | str) -> EventType:
    try:
        return EventType("started" if type == "start" else type)
    except ValueError:
        names = ", ".join(kind.value for kind in EventType)
        raise ValueError(f"there are no events {type!r}; there are {names}") from None


def _event_data(kind: EventType, data: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise TypeError(f"the data of an event is a dict, such as {{'item': …}}, not {data!r}")
    return plain(data, f"the data of this {kind.value!r} event")


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
