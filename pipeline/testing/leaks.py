"""`assert_no_leaks`: what was started inside has ended when the block has.

The rule kept here: what is left is listed in full, by name; and a failure of the block itself is never hidden by it.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any

from .census import Census
from .loops import LoopWatch, describe_task

__all__ = ["LeakCheck", "assert_no_leaks"]

_LOOK = 0.002
"""Seconds between two looks while something is still ending."""


def assert_no_leaks(*, settle: float = 1.0, tasks: bool = True) -> LeakCheck:
    """For `with` or `async with`: AssertionError when the block leaves something behind that was not there before.

    That is a task, a thread, a child process of any depth, or a file descriptor; or a call of an event loop's exception
    handler. Bar what the interpreter keeps: fork server, resource tracker, idle threads of `asyncio.to_thread`.
    `settle` is for what is on its last line: real seconds, at most. Tasks are those of the running loop, and of every
    loop that is closed inside: `with assert_no_leaks(): asyncio.run(main())` also sees tasks that `asyncio.run` had to
    cut short. `tasks=False` leaves them out. Inside a coroutine use `async with`: in a plain `with` nothing can end
    while it waits. When the block raises, what is left is a note on that exception.

    Seen through /proc; elsewhere only children that `multiprocessing` or `multiprocess` has started are known, not
    theirs and not those of `subprocess`, and a descriptor that was replaced by another is taken for the same.
    """
    return LeakCheck(settle=settle, tasks=tasks)


class LeakCheck:
    """One check. `start` and `stop` are for frameworks that have no use for a `with`."""

    def __init__(self, *, settle: float, tasks: bool) -> None:
        self._settle = settle
        self._with_tasks = tasks
        self._watch = LoopWatch()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._before: Census | None = None

    def start(self) -> None:
        """What is there now is nobody's leak."""
        self._tasks = _running_tasks()
        self._before = Census()
        self._watch.start()

    def stop(self) -> list[str]:
        """Everything that is left, in words, after waiting for it as long as `settle` says."""
        deadline = time.monotonic() + self._settle
        try:
            while (found := self._left()) and time.monotonic() < deadline:
                time.sleep(_LOOK)
        finally:
            self._watch.stop()
        return self._past() + found

    async def stop_async(self) -> list[str]:
        """The same; tasks may go on meanwhile."""
        deadline = time.monotonic() + self._settle
        try:
            while (found := self._left()) and time.monotonic() < deadline:
                # Not a timed wait: the loop's clock may be a virtual one, and what is waited for is real.
                await asyncio.sleep(0)
                time.sleep(_LOOK / 10)  # noqa: ASYNC251
        finally:
            self._watch.stop()
        return self._past() + found

    def _past(self) -> list[str]:
        """What no waiting can change."""
        return self._watch.calls + (self._watch.tasks() if self._with_tasks else [])

    def _left(self) -> list[str]:
        assert self._before is not None, "the check has not been started"
        tasks = _running_tasks() - self._tasks if self._with_tasks else ()
        return [*map(describe_task, tasks), *Census().since(self._before)]

    def __enter__(self) -> LeakCheck:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _judge(self.stop(), error)

    async def __aenter__(self) -> LeakCheck:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _judge(await self.stop_async(), error)


def _running_tasks() -> set[asyncio.Task[Any]]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return set()
    return asyncio.all_tasks()


def _judge(found: list[str], error: BaseException | None) -> None:
    if not found:
        return
    text = "left behind:\n" + "\n".join(f"  {what}" for what in found)
    if error is not None:
        error.add_note(text)
    else:
        raise AssertionError(text)
