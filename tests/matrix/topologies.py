"""The shapes of pipelines that faults are injected into. Each has an endless source, and outputs that are counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from pipeline import Pipeline
from stages import batch, mix_pool, stage

__all__ = ["TOPOLOGIES"]


async def nap(n: int) -> int:
    """Waits a little."""
    await asyncio.sleep(0.0002 * (n % 3))
    return n


def rest(n: int) -> int:
    """The same where it blocks."""
    time.sleep(0.0002 * (n % 3))
    return n


def chain() -> Pipeline[Any]:
    return Pipeline(count()) >> stage(nap) >> stage(concurrency=4, ordered=True)(nap) >> batch(3) >> stage(len)


def fan_out() -> Pipeline[Any]:
    fork = mix_pool(fork_merge=sum)(lambda: [nap, abs, nap])
    return Pipeline(count()) >> stage(concurrency=8)(nap) >> fork >> stage(nap)


def nested() -> Pipeline[Any]:
    inner = Pipeline(name="inner") >> stage(nap) >> stage(concurrency=3)(nap)
    return Pipeline(Pipeline(count(), name="source") >> stage(nap)) >> inner >> stage(nap)


def threads() -> Pipeline[Any]:
    return Pipeline(count()) >> stage(nap) >> stage(run_in="thread", concurrency=3)(rest) >> stage(nap)


def processes() -> Pipeline[Any]:
    return Pipeline(count()) >> stage(nap) >> stage(run_in="process", concurrency=2)(rest) >> stage(nap)


TOPOLOGIES: dict[str, Callable[[], Pipeline[Any]]] = {
    "chain": chain,
    "fan-out": fan_out,
    "nested": nested,
    "threads": threads,
    "processes": processes,
}
