"""What event loops complain about, and the tasks that are left when one is closed.

The rule kept here: as long as somebody watches, every loop of the standard library is seen, whoever makes it; when
nobody does any more, asyncio is as it was. A loop of another kind is seen while it is the running one.
"""

from __future__ import annotations

import asyncio
import asyncio.runners
import threading
from collections.abc import Callable
from typing import Any, cast

from .census import place

__all__ = ["LoopWatch", "describe_task", "pending_tasks"]

_CLOSERS = 50
"""Passes of a loop for the tasks in which it closes forgotten async generators."""

_CancelAll = Callable[[asyncio.AbstractEventLoop], None]


class LoopWatch:
    """Sees loops from `start` to `stop`. Any number may watch at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        """What the loops' exception handlers were called with."""
        self._cut_short: dict[asyncio.Task[Any], str] = {}
        self._stranded: dict[asyncio.Task[Any], str] = {}
        self._foreign: tuple[asyncio.AbstractEventLoop, Any] | None = None

    def start(self) -> None:
        with _lock:
            _watches.append(self)
            if len(_watches) == 1:
                _patch()
        self._watch_foreign()

    def stop(self) -> None:
        with _lock:
            _watches.remove(self)
            if not _watches:
                _restore()
        if self._foreign is not None:
            loop, handler = self._foreign
            loop.set_exception_handler(handler)

    def tasks(self) -> list[str]:
        """Tasks that were cut short when a loop was shut down, and those that were still there when it was closed."""
        return [*self._cut_short.values(), *(text for task, text in self._stranded.items() if not _ended(task))]

    def cuts_short(self, loop: asyncio.AbstractEventLoop) -> None:
        """`asyncio.run` is about to cancel what is left."""
        self._cut_short |= pending_tasks(loop)

    def closes(self, loop: asyncio.AbstractEventLoop) -> None:
        """A loop is about to be closed."""
        self._stranded |= pending_tasks(loop)

    def hears(self, context: dict[str, Any]) -> None:
        """A loop's exception handler is about to be called."""
        what = ", ".join(f"{key}={value!r}" for key, value in context.items() if key != "message")
        self.calls.append(f"the loop's exception handler was called: {context.get('message')} ({what})")

    def _watch_foreign(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if not isinstance(loop, asyncio.BaseEventLoop):
            self._foreign = (loop, loop.get_exception_handler())
            loop.set_exception_handler(self._foreign_complains)

    def _foreign_complains(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.hears(context)
        assert self._foreign is not None
        handler = self._foreign[1]
        if handler is not None:
            handler(loop, context)
        else:
            loop.default_exception_handler(context)


def pending_tasks(loop: asyncio.AbstractEventLoop) -> dict[asyncio.Task[Any], str]:
    """The tasks of a loop that are not done, in words."""
    return {} if loop.is_closed() else {task: describe_task(task) for task in asyncio.all_tasks(loop)}


def describe_task(task: asyncio.Task[Any]) -> str:
    """A task's name, and where it waits: the innermost frame that can be seen."""
    frame, coroutine = None, cast("Any", task.get_coro())
    while coroutine is not None:
        frame = _first(coroutine, "cr_frame", "ag_frame", "gi_frame") or frame
        coroutine = _first(coroutine, "cr_await", "ag_await", "gi_yieldfrom")
    return f"task {task.get_name()!r} at {place(frame)}"


def _first(thing: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(thing, name, None)) is not None), None)


def _ended(task: asyncio.Task[Any]) -> bool:
    """Also a task whose loop is closed and whose coroutine somebody has closed by hand."""
    return task.done() or getattr(task.get_coro(), "cr_frame", None) is None


# --- asyncio, patched while somebody watches

_lock = threading.Lock()
_watches: list[LoopWatch] = []
_call_handler = asyncio.BaseEventLoop.call_exception_handler
_close = asyncio.BaseEventLoop.close
# Private: how `asyncio.run` cancels what is left. Without it, only tasks that survive that are seen.
_cancel_all: _CancelAll | None = getattr(asyncio.runners, "_cancel_all_tasks", None)


def _patch() -> None:
    asyncio.BaseEventLoop.call_exception_handler = _heard
    asyncio.BaseEventLoop.close = _closed
    if _cancel_all is not None:
        setattr(asyncio.runners, "_cancel_all_tasks", _cancelled)  # noqa: B010


def _restore() -> None:
    asyncio.BaseEventLoop.call_exception_handler = _call_handler
    asyncio.BaseEventLoop.close = _close
    if _cancel_all is not None:
        setattr(asyncio.runners, "_cancel_all_tasks", _cancel_all)  # noqa: B010


def _heard(self: asyncio.BaseEventLoop, context: dict[str, Any]) -> None:
    for watch in _watches.copy():  # other threads come and go
        watch.hears(context)
    _call_handler(self, context)


def _closed(self: asyncio.BaseEventLoop) -> None:
    for watch in _watches.copy():  # other threads come and go
        watch.closes(self)
    _close(self)


def _cancelled(loop: asyncio.AbstractEventLoop) -> None:
    _let_closers_finish(loop)
    for watch in _watches.copy():  # other threads come and go
        watch.cuts_short(loop)
    assert _cancel_all is not None
    _cancel_all(loop)


def _let_closers_finish(loop: asyncio.AbstractEventLoop) -> None:
    """Some passes for the tasks in which the loop itself closes forgotten async generators: nobody else can await them."""
    for _ in range(_CLOSERS):
        if not any(type(task.get_coro()).__name__ == "async_generator_athrow" for task in asyncio.all_tasks(loop)):
            return
        loop.run_until_complete(asyncio.sleep(0))
