"""Stages one after the other, one item at a time in each, in every library's own way.

Each function builds a chain over `range(n)`, takes everything out of it, and says what it saw. Where a library has a
buffer to set, it is 64, as in penstock by default; what it leaves unbounded by default stays so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import cache, partial
from typing import Any

from pipeline import Pipeline, unwrap
from stages import Stage, stage

from .handlers import Stateful
from .measure import Tally, drained, drained_sync, iterated, thorough

__all__ = ["ASYNC_CHAINS", "SYNC_CHAINS", "in_loop", "penstock_chain"]

Handlers = Sequence[Callable[[Any], Any]]
AsyncChain = Callable[[int, Handlers], Awaitable[Tally]]
SyncChain = Callable[[int, Handlers], Tally]

BUFFER = 64


def in_loop(chain: AsyncChain, handlers: Handlers) -> Callable[[int], Tally]:
    """A chain that needs a loop, as a plain function of the number of items."""
    return partial(_run, chain, handlers)


def _run(chain: AsyncChain, handlers: Handlers, n: int) -> Tally:
    return asyncio.run(chain(n, handlers))  # type: ignore[arg-type]


# --- penstock


def penstock_chain(n: int, handlers: Handlers) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = Pipeline(range(n))
    for handler in handlers:
        pipeline = pipeline >> staged(handler)
    return pipeline


@cache
def staged(handler: Callable[[Any], Any]) -> Stage[Any, Any]:
    """The handler as a stage, made once, as the decorator does."""
    return stage(handler)


async def penstock_run(n: int, handlers: Handlers) -> Tally:
    return await run_pipeline(penstock_chain(n, handlers))


async def run_pipeline(pipeline: Pipeline[Any]) -> Tally:
    """`run()` discards the outputs and counts them; the first time they are collected instead, to be summed."""
    if thorough():
        outputs = unwrap(await pipeline.collect())
        return Tally(len(outputs), sum(outputs))
    return Tally(unwrap(await pipeline.run()).delivered)


async def penstock_for(n: int, handlers: Handlers) -> Tally:
    pipeline = penstock_chain(n, handlers)
    tally = await drained(pipeline)
    return Tally(pipeline.snapshot().delivered, tally.total, tally.last)


def penstock_iter(n: int, handlers: Handlers) -> Tally:
    pipeline = penstock_chain(n, handlers)
    tally = iterated(pipeline.iter())
    return Tally(pipeline.snapshot().delivered, tally.total, tally.last)


# --- libraries that run in a loop


async def streamable_async(n: int, handlers: Handlers) -> Tally:
    return await drained(_streamable(n, handlers))


def _streamable(n: int, handlers: Handlers) -> Any:
    from streamable import stream

    items = stream(range(n))
    for handler in handlers:
        items = items.map(handler)
    return items


async def aioitertools_chain(n: int, handlers: Handlers) -> Tally:
    import aioitertools

    items: Any = range(n)
    for handler in handlers:
        items = aioitertools.map(handler, items)
    return await drained(items)


async def pipestage_chain(n: int, handlers: Handlers) -> Tally:
    import pipestage

    items = pipestage.stream(range(n))
    for handler in handlers:
        items = items.map(handler)
    return await drained(items)


async def aiostream_chain(n: int, handlers: Handlers) -> Tally:
    from aiostream import pipe, stream

    items: Any = stream.iterate(range(n))
    for handler in handlers:
        one_by_one = {"task_limit": 1} if asyncio.iscoroutinefunction(handler) else {}
        items = items | pipe.map(handler, **one_by_one)
    async with items.stream() as streamer:
        return await drained(streamer)


async def pypeln_task(n: int, handlers: Handlers) -> Tally:
    import pypeln

    items: Any = range(n)
    for handler in handlers:
        items = pypeln.task.map(handler, items)
    return await drained(items)


async def pipevine_run(n: int, handlers: Handlers) -> Tally:
    pipeline = _pipevine(n, handlers)
    if thorough():
        return await _pipevine_outputs(pipeline)
    metrics = await pipeline.run()
    return Tally(metrics.processed)


async def pipevine_for(n: int, handlers: Handlers) -> Tally:
    return await _pipevine_outputs(_pipevine(n, handlers))


async def _pipevine_outputs(pipeline: Any) -> Tally:
    from pipevine.async_util import SENTINEL

    count = total = 0
    async for item in pipeline.async_iter():
        if item is not SENTINEL:  # its iteration ends with its own end marker
            count += 1
            total += item
    return Tally(count, total)


def _pipevine(n: int, handlers: Handlers) -> Any:
    import pipevine

    pipeline = pipevine.Pipeline(counted(n))
    for handler in handlers:
        pipeline = pipeline >> pipevine.work_pool(buffer=BUFFER)(Stateful(handler))
    return pipeline


async def counted(n: int) -> AsyncIterator[int]:
    """`range(n)` as an async generator, for a library that would otherwise ask a thread for every item."""
    for x in range(n):
        yield x


# --- synchronous iteration


def bare_loop(n: int, handlers: Handlers) -> Tally:
    first, second, third = handlers
    last = None
    for x in range(n):
        last = third(second(first(x)))
    return Tally(last=last)


def streamable_drained(n: int, handlers: Handlers) -> Tally:
    return drained_sync(_streamable(n, handlers))


def streamable_iterated(n: int, handlers: Handlers) -> Tally:
    return iterated(_streamable(n, handlers))


def pypeln_sync_drained(n: int, handlers: Handlers) -> Tally:
    return drained_sync(_pypeln_sync(n, handlers))


def pypeln_sync_iterated(n: int, handlers: Handlers) -> Tally:
    return iterated(_pypeln_sync(n, handlers))


def _pypeln_sync(n: int, handlers: Handlers) -> Any:
    import pypeln

    items: Any = range(n)
    for handler in handlers:
        items = pypeln.sync.map(handler, items)
    return items


def spdl_chain(n: int, handlers: Handlers) -> Tally:
    from spdl.pipeline import PipelineBuilder

    builder = PipelineBuilder().add_source(range(n))
    for handler in handlers:
        builder = builder.pipe(handler)
    pipeline = builder.add_sink(BUFFER).build(num_threads=len(handlers), use_thread_output_queue=True)
    with pipeline.auto_stop():
        return iterated(pipeline)


def pipevine_iter(n: int, handlers: Handlers) -> Tally:
    return iterated(_pipevine(n, handlers).iter())


async def bare_awaits(n: int, handlers: Handlers) -> Tally:
    first, second, third = handlers
    last = None
    for x in range(n):
        last = await third(await second(await first(x)))
    return Tally(last=last)


ASYNC_CHAINS: dict[str, AsyncChain] = {
    "streamable async": streamable_async,
    "aioitertools": aioitertools_chain,
    "pipestage": pipestage_chain,
    "aiostream": aiostream_chain,
    "pypeln": pypeln_task,
}
"""Libraries that are iterated with `async for`, and have no quicker way to be run to the end."""

SYNC_CHAINS: dict[str, SyncChain] = {
    "streamable": streamable_drained,
    "pypeln.sync": pypeln_sync_drained,
    "spdl": spdl_chain,
}
"""Libraries that are iterated with `for`, drained in their quickest way."""
