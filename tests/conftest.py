"""Proves after every test that nothing is left behind.

The rule kept here: what a test starts has ended when the test has. Tasks, threads, child processes of any depth and
file descriptors are counted before and after; the loop's exception handler and asyncio's own log must stay silent.

The fixture is the first to be set up and the last to be torn down, so the event loop of an async test is closed when it
looks. Tasks are looked at earlier, when somebody closes a loop: `asyncio.run` cancels what is left, which would hide it.

A test that leaves a thread or a task behind on purpose says so, `@pytest.mark.abandons("thread")`, and ends it itself:
a thread that waits for the fixture `release` ends when the test does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import multiprocess.forkserver
import multiprocess.resource_tracker
import psutil
import pytest
import uvloop

from pipeline import Pipeline
from stages import stage

_KINDS = ("task", "thread")
_SETTLE = 1.0
"""Seconds for what is on its last line: a thread that has said goodbye, a zombie that the fork server still reaps."""
_ABANDONED = 10.0
"""Seconds for what a test has abandoned, and ended."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        'abandons(*kinds): the test leaves a "thread" or "task" behind on purpose, and ends it itself',
    )


@pytest.fixture(scope="session", autouse=True)
def _keepers() -> None:
    """Start what the interpreter keeps, so that no test seems to: fork server, resource tracker, libuv's signal pipe."""
    uvloop.new_event_loop().close()
    assert asyncio.run((Pipeline([-1]) >> stage(run_in="process")(abs)).collect()) == [1]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event for threads that a test abandons; set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest, _keepers: None) -> Iterator[None]:
    abandoned = _declared(request.node)
    threads, children, descriptors = set(threading.enumerate()), _children(), _descriptors()
    with pytest.MonkeyPatch.context() as patch, _LoopWatch(patch) as watch:
        yield
    complaints = watch.complaints(tasks="task" not in abandoned)

    def left() -> list[str]:
        found = [f"thread {thread.name!r}" for thread in threading.enumerate() if thread not in threads]
        found += [f"process {pid}: {what}" for pid, what in _children().items() if pid not in children]
        return found + [f"descriptor {fd}: {what}" for fd, what in _descriptors().items() if fd not in descriptors]

    complaints += _settled(left, _ABANDONED if abandoned else _SETTLE)
    _kill(pid for pid in _children() if pid not in children)
    if complaints:
        pytest.fail("left behind:\n" + "\n".join(f"  {text}" for text in complaints), pytrace=False)


def _declared(node: pytest.Item) -> set[str]:
    kinds = {kind for marker in node.iter_markers("abandons") for kind in marker.args}
    assert kinds <= set(_KINDS), f"abandons() takes {_KINDS}, not {sorted(kinds)}"
    return kinds


def _settled(left: Callable[[], list[str]], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


def _children() -> dict[int, str]:
    """Every descendant but the two processes that the interpreter keeps; their children count."""
    keepers = {
        multiprocess.forkserver._forkserver._forkserver_pid,
        multiprocess.resource_tracker._resource_tracker._pid,
    }
    found: dict[int, str] = {}
    for child in psutil.Process().children(recursive=True):
        if child.pid not in keepers:
            try:
                found[child.pid] = f"{child.status()} {' '.join(child.cmdline())[:120]}"
            except psutil.NoSuchProcess:
                continue
    return found


def _kill(pids: Iterator[int]) -> None:
    for pid in list(pids):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


class _LoopWatch(logging.Handler):
    """Hears what event loops complain about, and sees the tasks that are left when one is closed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(logging.WARNING)
        self._patch = patch
        self._cut_short: dict[asyncio.Task[Any], str] = {}
        self._stranded: dict[asyncio.Task[Any], str] = {}
        self._calls: list[str] = []
        self._records: list[str] = []

    def __enter__(self) -> _LoopWatch:
        handle, close = asyncio.BaseEventLoop.default_exception_handler, asyncio.BaseEventLoop.close
        cancel_all = asyncio.runners._cancel_all_tasks

        def heard(loop: asyncio.BaseEventLoop, context: dict[str, Any]) -> None:
            self._calls.append(f"the loop's exception handler was called: {context}")
            handle(loop, context)

        def closed(loop: asyncio.BaseEventLoop) -> None:
            self._stranded |= _pending(loop)
            close(loop)

        def cancelled(loop: asyncio.AbstractEventLoop) -> None:
            _let_closers_finish(loop)
            self._cut_short |= _pending(loop)
            cancel_all(loop)

        self._patch.setattr(asyncio.BaseEventLoop, "default_exception_handler", heard)
        self._patch.setattr(asyncio.BaseEventLoop, "close", closed)
        self._patch.setattr(asyncio.runners, "_cancel_all_tasks", cancelled)
        logging.getLogger("asyncio").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("asyncio").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(f"asyncio has logged: {record.getMessage()}")

    def complaints(self, *, tasks: bool) -> list[str]:
        found = [*self._cut_short.values(), *(text for task, text in self._stranded.items() if not _ended(task))]
        return [*(found if tasks else ()), *self._calls, *self._records]


def _pending(loop: asyncio.AbstractEventLoop) -> dict[asyncio.Task[Any], str]:
    return {} if loop.is_closed() else {task: f"task {task!r}" for task in asyncio.all_tasks(loop)}


def _let_closers_finish(loop: asyncio.AbstractEventLoop) -> None:
    """Some passes for the tasks in which the loop itself closes forgotten async generators: nobody else can await them."""
    for _ in range(50):
        if not any(type(task.get_coro()).__name__ == "async_generator_athrow" for task in asyncio.all_tasks(loop)):
            return
        loop.run_until_complete(asyncio.sleep(0))


def _ended(task: asyncio.Task[Any]) -> bool:
    """Also a task whose loop is closed and whose coroutine a test has closed by hand."""
    return task.done() or getattr(task.get_coro(), "cr_frame", None) is None
