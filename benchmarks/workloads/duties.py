"""What a pipeline owes to the rest of its program: little memory, a loop that is served, a quick end, no delay."""

from __future__ import annotations

import asyncio
import re
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from pipeline import Pipeline, is_err
from stages import stage

from ..chains import ASYNC_CHAINS, AsyncChain, penstock_run, pipevine_run, run_pipeline
from ..handlers import ASYNC, PLAIN, async_inc, inc, through_three
from ..measure import Tally, WrongResult
from ..model import Bar, Cell, Form, Measures, Workload

__all__ = ["WORKLOADS"]


# --- memory

MANY = 2_000_000


def _plain_stages(n: int) -> Pipeline[Any]:
    return Pipeline(range(n)) >> stage(inc) >> stage(inc) >> stage(inc)


def _mixed_stages(n: int) -> Pipeline[Any]:
    return Pipeline(range(n)) >> stage(inc) >> stage(concurrency=100)(async_inc) >> stage(inc)


@dataclass(frozen=True, slots=True)
class Memory:
    """How much the process grows over so many items, after a warm-up of a tenth; the worse of two pipelines."""

    items: int

    def check(self) -> None:
        for make in (_plain_stages, _mixed_stages):
            self._run(make, 1_000)

    def measure(self) -> Measures:
        self.check()
        return {"growth_mb": max(self._growth(make) for make in (_plain_stages, _mixed_stages))}

    def _growth(self, make: Callable[[int], Pipeline[Any]]) -> float:
        self._run(make, self.items // 10)
        _forget_peak()
        before = _peak_mb()
        self._run(make, self.items)
        return _peak_mb() - before

    def _run(self, make: Callable[[int], Pipeline[Any]], n: int) -> None:
        asyncio.run(run_pipeline(make(n))).verify(Tally(n))


def _forget_peak() -> None:
    """Let the peak begin anew at what is in memory now; where that cannot be asked for, the old peak stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    """The most that this process has had in memory at once."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


# --- a ticker beside a saturated pipeline

BUSY = 0.7
"""Seconds, about, for which the pipeline is busy."""


@dataclass(frozen=True, slots=True)
class Ticker:
    """How long a wait of 1 ms really takes while a pipeline has always something to do: 99 of 100 waits are shorter."""

    chains: Sequence[Callable[[int], Awaitable[Tally]]]
    """The worst of them counts."""

    def check(self) -> None:
        for chain in self.chains:
            asyncio.run(_awaited(chain, 100))

    def measure(self) -> Measures:
        self.check()
        return {"p99_ms": max(asyncio.run(self._p99(chain)) for chain in self.chains)}

    async def _p99(self, chain: Callable[[int], Awaitable[Tally]]) -> float:
        items, spent = 500, 0.0
        while spent < BUSY / 8:
            items *= 4
            began = perf_counter()
            await chain(items)
            spent = perf_counter() - began
        waits: list[float] = []
        ticker = asyncio.create_task(_tick(waits))
        await asyncio.sleep(0.02)
        waits.clear()
        await chain(int(items * BUSY / spent))
        await asyncio.sleep(0.005)  # the wait that the end of the pipeline falls into counts: it may be the longest
        ticker.cancel()
        return sorted(waits)[int(len(waits) * 0.99)] * 1e3


async def _awaited(chain: Callable[[int], Awaitable[Tally]], n: int) -> None:
    (await chain(n)).verify(Tally(n))


async def _tick(waits: list[float]) -> None:
    while True:
        began = perf_counter()
        await asyncio.sleep(0.001)
        waits.append(perf_counter() - began)


@dataclass(frozen=True, slots=True)
class _Chained:
    chain: AsyncChain
    handlers: Sequence[Callable[[Any], Any]]

    async def __call__(self, n: int) -> Tally:
        tally = await self.chain(n, self.handlers)
        tally.verify(through_three(n))
        return tally


async def _concurrent(n: int) -> Tally:
    return await run_pipeline(Pipeline(range(n)) >> stage(concurrency=100)(async_inc))


_TICKERS: dict[str, Cell] = {
    "bare": Ticker([lambda n: _idle(n)]),
    "penstock": Ticker([_Chained(penstock_run, PLAIN), _Chained(penstock_run, ASYNC), _concurrent]),
    **{name: Ticker([_Chained(chain, PLAIN)]) for name, chain in ASYNC_CHAINS.items()},
    "pipevine": Ticker([_Chained(pipevine_run, PLAIN)]),
}


async def _idle(n: int) -> Tally:
    """Nothing beside the ticker."""
    await asyncio.sleep(n * 1e-6)
    return Tally(n)


# --- cancel


@dataclass(frozen=True, slots=True)
class Cancel:
    """From `cancel()` to closed, with so many tasks in the middle of a long wait."""

    tasks: int
    repeats: int = 5

    def check(self) -> None:
        asyncio.run(self._once(10))

    def measure(self) -> Measures:
        self.check()
        return {"ms": median(asyncio.run(self._once(self.tasks)) for _ in range(self.repeats)) * 1e3}

    async def _once(self, tasks: int) -> float:
        holding = _Holding(tasks)
        pipeline = Pipeline(range(tasks * 2)) >> stage(concurrency=tasks)(holding.hold)
        running = asyncio.create_task(pipeline.run())
        await holding.full.wait()
        began = perf_counter()
        result = await pipeline.cancel("measured")
        spent = perf_counter() - began
        await running
        if not is_err(result) or holding.left != tasks:
            raise WrongResult(f"{holding.left} of {tasks} calls had ended when the pipeline was closed")
        return spent


class _Holding:
    """Calls that wait until they are cancelled."""

    def __init__(self, size: int) -> None:
        self.full = asyncio.Event()
        self.left = 0
        self._size = size
        self._entered = 0

    async def hold(self, item: int) -> int:
        self._entered += 1
        if self._entered == self._size:
            self.full.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.left += 1
        return item


# --- a lone item


@dataclass(frozen=True, slots=True)
class Lone:
    """From putting one item to a source that waits, to having its output, through three idle stages; the worst of three kinds."""

    items: int = 200

    def check(self) -> None:
        asyncio.run(self._median("async", 3))

    def measure(self) -> Measures:
        self.check()
        return {"us": max(asyncio.run(self._median(kind, self.items)) for kind in ("sync", "async", "concurrent")) * 1e6}

    async def _median(self, kind: str, items: int) -> float:
        waiting: asyncio.Queue[int] = asyncio.Queue()
        pipeline: Pipeline[Any] = Pipeline(_from_queue(waiting, items))
        for _ in range(3):
            pipeline = pipeline >> _idle_stage(kind)
        times: list[float] = []
        outputs = aiter(pipeline)
        for x in range(items):
            following = asyncio.ensure_future(anext(outputs))
            await asyncio.sleep(0.002)  # everybody is idle again
            began = perf_counter()
            waiting.put_nowait(x)
            if await following != x + 3:
                raise WrongResult("the item that came out is not the one that went in")
            times.append(perf_counter() - began)
        if [output async for output in outputs]:
            raise WrongResult("more came out than went in")
        return median(times)


def _idle_stage(kind: str) -> Any:
    if kind == "sync":
        return stage(inc)
    return stage(async_inc) if kind == "async" else stage(concurrency=10)(async_inc)


async def _from_queue(waiting: asyncio.Queue[int], items: int) -> AsyncIterator[int]:
    for _ in range(items):
        yield await waiting.get()


WORKLOADS = [
    Workload(
        name="memory",
        title="2,000,000 items: growth of memory",
        cells={"penstock": Memory(MANY)},
        bars=(Bar(required=5.0, form=Form.LIMIT, measure="growth_mb", unit="MB"),),
        rounds=1,
        timeout=90.0,
    ),
    Workload(
        name="ticker",
        title="a 1 ms ticker beside a saturated pipeline: p99",
        cells=_TICKERS,
        bars=(Bar(required=2.0, form=Form.LIMIT, measure="p99_ms", unit="ms"),),
        rounds=3,
    ),
    Workload(
        name="cancel",
        title="`cancel()` to closed, 1,000 tasks in flight",
        cells={"penstock": Cancel(1_000)},
        bars=(Bar(required=20.0, form=Form.LIMIT, measure="ms", unit="ms"),),
    ),
    Workload(
        name="lone-item",
        title="a lone item through three idle stages",
        cells={"penstock": Lone()},
        bars=(Bar(required=200.0, form=Form.LIMIT, measure="us", unit="µs"),),
    ),
]
