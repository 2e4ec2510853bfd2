"""Faults of workers: threads that do not end, processes that are killed, deaf, or given what cannot be sent."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import numpy as np
from helpers import Journal, assert_balanced, eventually

from pipeline import Err, ErrorPolicy, Grace, Pipeline, RunReport, WorkerLostError
from stages import stage

from .row import Row, fault, share
from .stopping import cancelled_in_vain

let_go = threading.Event()


def sleep_long(n: int) -> int:
    let_go.wait(10)
    return n


def spin(n: int) -> int:
    until = monotonic() + 10
    while monotonic() < until and not let_go.is_set():
        pass
    return n


@fault("F5", "a thread handler sleeps 10 s, or spins", "closed within the graces, the thread named")
async def deaf_thread(row: Row) -> None:
    grace = Grace(abort=0.2, terminate=0.1, kill=0.1)
    for handler in (sleep_long, spin):
        let_go.clear()
        await cancelled_in_vain(row, Pipeline(count(), grace=grace) >> stage(name="deaf", run_in="thread")(handler))
        let_go.set()
    row.within(0.2 + 0.1 + 0.1 + 0.5)


# --- killed


def write_pid(n: Any, journal: Journal) -> None:
    journal.write(f"{os.getpid()} {n}")


class Victim:
    """A handler that says where it is at item 0, and then is at it for ever; the others are quick."""

    def __init__(self, journal: Journal, *, at: str) -> None:
        self.journal = journal
        self.at = at

    def __call__(self, n: int) -> Any:
        if n == 0:
            write_pid(self.at, self.journal)
            if self.at == "writing":
                return b"x" * 50_000_000
            while self.at == "computing":
                pass
        return n


class SlowToRead:
    """An item that a worker never finishes reading."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def __reduce__(self) -> Any:
        return (_read_for_ever, (self.journal,))


def _read_for_ever(journal: Journal) -> None:
    write_pid("reading", journal)
    while True:
        pass


async def one_killed(row: Row, journal: Journal, at: str) -> None:
    """A worker is killed at the first item; the other 200 items must come through."""
    began, spans = [0.0], list[float]()

    def side(err: Err) -> None:
        assert isinstance(err.value, WorkerLostError), err
        spans.append(monotonic() - began[0])

    victim = stage(run_in="process", concurrency=2, on_error=ErrorPolicy.SIDE, error_handler=side)(Victim(journal, at=at))
    pipeline = Pipeline([SlowToRead(journal) if at == "reading" else 0, *range(1, 201)]) >> victim
    known = len(journal.lines())
    running = asyncio.create_task(pipeline.collect())
    await eventually(lambda: len(journal.lines()) > known)
    began[0] = monotonic()
    os.kill(int(journal.lines()[-1].split()[0]), signal.SIGKILL)
    outputs = await running
    row.injected += 1
    row.seconds += spans
    assert isinstance(outputs, list)
    report = pipeline.report
    assert report is not None
    whole = [output for output in outputs if not isinstance(output, bytes)]
    assert sorted(whole) == list(range(1, 201))
    assert report.stages[0].lost == len(spans) == 201 - len(outputs)
    assert report.stages[0].lost == 1 or at == "writing"  # it may have been written when the signal came
    assert_balanced(report)


async def idle_killed(row: Row, journal: Journal) -> None:
    """A worker is killed while it has nothing to do: nothing is lost at all."""
    gate = asyncio.Event()

    async def source() -> Any:
        yield 1
        await gate.wait()
        for n in range(2, 50):
            yield n

    victim = stage(run_in="process", concurrency=2)(Reporter(journal))
    pipeline = Pipeline(source) >> victim
    known = len(journal.lines())
    running = asyncio.create_task(pipeline.collect())
    await eventually(lambda: pipeline.snapshot().delivered == 1)
    pid = int(journal.lines()[known].split()[0])
    workers = len(pipeline.runtime.processes)
    began = monotonic()
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: len(pipeline.runtime.processes) < workers or pid not in _pids(pipeline))
    row.closed(began)
    gate.set()
    outputs = await running
    assert isinstance(outputs, list)
    assert sorted(outputs) == list(range(1, 50))
    assert pipeline.report is not None
    assert pipeline.report.stages[0].lost == 0
    assert_balanced(pipeline.report)


def _pids(pipeline: Pipeline[Any]) -> set[int]:
    return {process.pid for process in pipeline.runtime.processes}  # type: ignore[attr-defined]


class Reporter:
    """A handler that tells in which process it is."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def __call__(self, n: int) -> int:
        write_pid(n, self.journal)
        return n


@fault("F6", "SIGKILL a worker while idle, reading, computing, or writing 50 MB", "noticed < 50 ms; exactly the items in work lost")
async def killed_workers(row: Row) -> None:
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder, "journal"))
        for _ in range(share(12) // 2):
            await idle_killed(row, journal)
            await one_killed(row, journal, "computing")
            await one_killed(row, journal, "reading")
        for _ in range(share(12) // 2):
            await one_killed(row, journal, "writing")
    row.within(0.05)


# --- deaf


def ignore_sigterm(_state: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def sleep_for_ever(n: int) -> int:
    while True:
        time.sleep(1)


@fault("F7", "workers ignore SIGTERM", "dead within the terminate grace + 200 ms")
async def deaf_processes(row: Row) -> None:
    grace = Grace(abort=0.1, terminate=0.3, kill=1.0)
    for _ in range(share(6)):
        deaf = stage(run_in="process", concurrency=4, setup=ignore_sigterm)(sleep_for_ever)
        pipeline = Pipeline(count(), grace=grace) >> deaf
        running = asyncio.create_task(pipeline.run())
        await eventually(lambda pipeline=pipeline: pipeline.snapshot().stages[0].in_flight >= 4)
        began = monotonic()
        result = await pipeline.cancel("now", force=True)
        row.closed(began)
        assert isinstance(result, Err)
        assert result.report is not None
        assert not result.report.abandoned
        assert_balanced(result.report)
        await running
    row.within(grace.terminate + 0.2)


# --- what cannot be sent


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not for sending")


class Poison:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> Any:
        return (_explode, ())


def _explode() -> None:
    raise ValueError("cannot be read")


def swap(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    return Unpicklable() if item == "out" else Poison() if item == "poison out" else item


async def double(item: Any) -> Any:
    await asyncio.sleep(0)
    return item * 2


@fault("F13", "unpicklable in and out, numpy, async def, lambdas and closures in process stages", "counts exact")
async def unsendable(row: Row) -> None:
    factor = 3
    items: list[Any] = ["fine", Unpicklable(), "out", Poison(), "poison out", np.arange(4), lambda: 1, "fine"]
    errors: list[Err] = []
    sided = stage(run_in="process", concurrency=2, on_error=ErrorPolicy.SIDE, error_handler=errors.append)(swap)
    report = await (Pipeline(items * 5) >> sided).run()
    assert isinstance(report, RunReport), report
    assert (report.delivered, report.stages[0].sided) == (20, 20)
    assert len(errors) == 20
    assert_balanced(report)
    row.injected += 20

    arrays = [np.arange(n) for n in range(300)]
    out = await (Pipeline(arrays) >> stage(run_in="process", ordered=True)(double)).collect()
    assert isinstance(out, list)
    assert all((got == given * 2).all() for got, given in zip(out, arrays, strict=True))
    row.injected += len(arrays)

    for handler in (lambda n: n * factor, double):
        out = await (Pipeline(range(100)) >> stage(run_in="process", concurrency=2, ordered=True)(handler)).collect()
        assert out == [handler(n) if handler is not double else n * 2 for n in range(100)]
        row.injected += 1
