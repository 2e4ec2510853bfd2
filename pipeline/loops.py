"""Private event loops: which kind, and how one is run and closed in bounded time.

The rule kept here: a loop of ours ends. `asyncio.run` would wait for ever for a task that swallows its cancellation, or a
call in the default executor that does not return; a run has named what it could not stop, so its loop is closed without.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any, TypeVar, cast

__all__ = ["LoopFactory", "loop_factory", "run_on"]

T = TypeVar("T")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

_TIDY = 1.0
"""Seconds for what user code left on the loop: async generators, and the default executor's threads."""


def loop_factory(*, uvloop: bool) -> LoopFactory:
    """What makes a new loop; `ImportError` says what to install when uvloop is asked for and missing."""
    if not uvloop:
        return asyncio.new_event_loop
    try:
        module = import_module("uvloop")
    except ImportError as error:
        raise ImportError("uvloop=True needs uvloop: pip install 'penstock[uvloop]'") from error
    return cast("LoopFactory", module.new_event_loop)


def run_on(factory: LoopFactory, main: Coroutine[Any, Any, T], *, on_interrupt: Callable[[BaseException], object]) -> T:
    """Run `main` to its end on a new loop, in this thread, and close the loop.

    `on_interrupt` gets what goes through the loop without ending `main`, a KeyboardInterrupt or SystemExit; it shall see
    to it that `main` ends.
    """
    try:
        loop = factory()
    except BaseException:
        main.close()
        raise
    try:
        asyncio.set_event_loop(loop)
        task = loop.create_task(main)
        while not task.done():
            try:
                loop.run_until_complete(task)
            except BaseException as error:
                if not _is_end_of(task, error):
                    on_interrupt(error)
        loop.run_until_complete(_tidy(loop))
        return task.result()
    finally:
        asyncio.set_event_loop(None)
        for task in asyncio.all_tasks(loop):
            _silence(task)
        loop.close()


def _is_end_of(task: asyncio.Task[Any], error: BaseException) -> bool:
    """Whether it is the task's own result, which the caller gets in any case; else it would be lost."""
    return task.done() and (isinstance(error, asyncio.CancelledError) if task.cancelled() else task.exception() is error)


async def _tidy(loop: asyncio.AbstractEventLoop) -> None:
    ends = [
        loop.create_task(loop.shutdown_asyncgens(), name="async generators"),
        loop.create_task(loop.shutdown_default_executor(), name="default executor"),
    ]
    await asyncio.wait(ends, timeout=_TIDY)


def _silence(task: asyncio.Task[Any]) -> None:
    # An abandoned task is in the report; asyncio's complaint about it at garbage collection would be a second one.
    with contextlib.suppress(AttributeError):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
