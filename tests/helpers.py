"""What several test files need: programs in processes of their own, signals between processes, the laws of the ledger.

The rule kept here: nothing waits without a deadline, and nothing waits for time to pass where it can wait for an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline import CancelReason

ROOT = Path(__file__).resolve().parent.parent

LIMIT = 60.0
"""Seconds after which something that should happen has not happened."""


# --- waiting


def contention() -> float:
    """How many times as long everything takes here because others are at work on this machine, too; 1.0 when nobody is."""
    began, spent = time.perf_counter(), time.thread_time()
    while (used := time.thread_time() - spent) < 0.01:
        pass
    return max((time.perf_counter() - began) / used, 1.0)


def until(condition: Callable[[], Any], seconds: float = LIMIT) -> None:
    """Poll a condition in another process or thread; `TimeoutError` when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {seconds:g} s")
        time.sleep(0.002)


async def eventually(condition: Callable[[], Any], seconds: float = LIMIT) -> None:
    """The same on an event loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {seconds:g} s")
        await asyncio.sleep(0.002)


async def settled(read: Callable[[], Any], quiet: float = 0.15) -> Any:
    """What `read` returns once it has been the same for `quiet` seconds: shows that something does not go on."""
    last, since = read(), time.monotonic()
    deadline = since + LIMIT
    while time.monotonic() - since < quiet:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still changing after {LIMIT:g} s")
        await asyncio.sleep(0.005)
        if (now := read()) != last:
            last, since = now, time.monotonic()
    return last


class Flag:
    """An event between processes: a file that is there or not. Can be pickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def set(self) -> None:
        Path(self.path).touch()

    def is_set(self) -> bool:
        return os.path.exists(self.path)

    def wait(self, seconds: float = LIMIT) -> None:
        until(self.is_set, seconds)


class Journal:
    """Lines that several processes write and one reads, each line whole. Can be pickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        path.touch()

    def write(self, text: object) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, f"{text}\n".encode())
        finally:
            os.close(descriptor)

    def lines(self) -> list[str]:
        return Path(self.path).read_text().splitlines()


# --- handlers and sources that a test can watch


class Gate:
    """An async handler that holds every item until the test opens it, and counts."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.began = self.ended = self.cancelled = 0

    async def __call__(self, item: Any) -> Any:
        self.began += 1
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        return item


class Tracked:
    """An iterator that counts what is pulled and knows when it is closed, and from which threads."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.pulled = self.closes = 0
        self.closed = threading.Event()
        self.threads: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.threads.add(threading.get_ident())
        if self.limit is not None and self.pulled >= self.limit:
            raise StopIteration
        self.pulled += 1
        return self.pulled - 1

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closes += 1
        self.closed.set()


# --- triggers


class Heard:
    """A callback that keeps what it was told, and lets a test wait for it instead of sleeping."""

    def __init__(self) -> None:
        self.reasons: list[CancelReason] = []
        self._news = asyncio.Event()

    def __call__(self, reason: CancelReason) -> None:
        self.reasons.append(reason)
        self._news.set()

    async def next(self) -> CancelReason:
        await self._news.wait()
        self._news.clear()
        return self.reasons[-1]


async def turns(count: int = 3) -> None:
    """Let everything that is ready now run, and what that makes ready."""
    for _ in range(count):
        await asyncio.sleep(0)


# --- time


class LeapingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer it moves the clock to it: runs with timeouts are exact, and take no time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits and nothing is due"
            self.now += timeout
        return ready


class LeapingLoop(asyncio.SelectorEventLoop):
    """Runs on the selector's clock and knows which of its timers are alive."""

    def __init__(self) -> None:
        self.clock = LeapingSelector()
        self.timers: list[asyncio.TimerHandle] = []
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = super().call_at(when, callback, *args, context=context)
        self.timers.append(handle)
        return handle

    def live_timers(self) -> int:
        return sum(not timer.cancelled() and timer.when() > self.clock.now for timer in self.timers)


# --- the laws of the ledger, contract §5, written down again


def assert_balanced(account: Any) -> None:
    """Check every law on a `RunReport` or a `PipelineSnapshot`; the laws of the end when it is closed."""
    state = getattr(account, "state", None)
    closed = state is None or state.name == "CLOSED"
    emitted, upstream = account.pulled, "the source"
    for row in account.stages:
        where = f"stage {row.name!r}: {row}"
        counts = (
            *(row.received, row.processed, row.succeeded, row.failed, row.passed, row.dropped, row.emitted_errors),
            *(row.sided, row.raised, row.retried, row.timed_out, row.lost, row.cancelled, row.skipped, row.emitted),
            *(row.in_flight, row.queued, row.discarded),
        )
        assert all(isinstance(count, int) and count >= 0 for count in counts), where
        assert row.received == row.processed + row.cancelled + row.in_flight, where
        assert row.processed == row.succeeded + row.failed + row.passed, where
        assert row.failed == row.dropped + row.emitted_errors + row.sided + row.raised, where
        assert row.lost + row.timed_out <= row.failed, where
        assert row.skipped <= row.succeeded, where
        assert emitted == row.received + row.queued + row.discarded, f"edge from {upstream} to {where}"
        if closed:
            assert row.in_flight == 0, where
            assert row.queued == 0, where
        emitted, upstream = row.emitted, row.name
    waiting = getattr(account, "undelivered", 0)
    assert emitted == account.delivered + waiting + account.discarded, f"edge from {upstream} to the consumer: {account}"
    if closed:
        assert waiting == 0
    if hasattr(account, "balanced"):
        assert account.balanced


# --- programs


@dataclass(frozen=True)
class Finished:
    """What became of a program. `seconds`: from the call of `finish` to its end."""

    code: int
    out: str
    err: str
    seconds: float


class Program:
    """A Python program in a process, a session and a process group of its own. Use it in `with`: nothing survives it."""

    def __init__(self, folder: Path, source: str, *args: str, interpreter: tuple[str, ...] = ()) -> None:
        self.folder = folder
        script = folder / "program.py"
        script.write_text(textwrap.dedent(source))
        self._out, self._err = folder / "stdout", folder / "stderr"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "PYTHONUNBUFFERED": "1"}
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *(interpreter or (str(script),)), *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        family = self.family()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(LIMIT)

    def family(self) -> list[psutil.Process]:
        """Every process below this one."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def out(self) -> str:
        return self._out.read_text()

    def err(self) -> str:
        return self._err.read_text()

    def says(self, line: str, seconds: float = LIMIT) -> None:
        """Wait until it has printed a line that begins so."""

        def said() -> bool:
            if self.process.poll() is not None and not any(text.startswith(line) for text in self.out().splitlines()):
                raise AssertionError(f"it ended with {self.process.returncode}:\n{self.out()}\n{self.err()}")
            return any(text.startswith(line) for text in self.out().splitlines())

        until(said, seconds)

    def interrupt(self, signum: int, *, group: bool = False) -> None:
        """Send a signal, to the process alone or, as a terminal does, to its whole group."""
        if group:
            os.killpg(self.process.pid, signum)
        else:
            os.kill(self.process.pid, signum)

    def insist(self, signum: int) -> Finished:
        """Send a signal again and again, as somebody impatient does, until it has ended."""
        ends = time.monotonic() + LIMIT
        while self.process.poll() is None and time.monotonic() < ends:
            self.interrupt(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.5)
        return self.finish(0)

    def finish(self, seconds: float = LIMIT) -> Finished:
        """Wait for its end; `TimeoutExpired` when that does not come."""
        began = time.monotonic()
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s:\n{self.out()}\n{self.err()}") from None
        return Finished(code, self.out(), self.err(), time.monotonic() - began)


def run_program(folder: Path, source: str, *args: str, seconds: float = LIMIT, interpreter: tuple[str, ...] = ()) -> Finished:
    """Run a program to its end, within a hard limit."""
    with Program(folder, source, *args, interpreter=interpreter) as program:
        return program.finish(seconds)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie that nobody has reaped yet does not."""
    left: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left
