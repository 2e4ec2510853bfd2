"""One async stage with a hundred calls at once, for functions that wait, yield, or do neither."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from pipeline import Pipeline
from stages import stage

from ..chains import BUFFER, counted, run_pipeline
from ..handlers import Stateful, async_inc, through_one, wait_inc, yield_inc
from ..measure import Tally, Timed, drained, iterated, thorough
from ..model import BEST_PEER, Bar, Form, Workload

__all__ = ["WORKLOADS"]

CALLS = 100

Handler = Callable[[int], Awaitable[int]]
Way = Callable[[int, Handler, bool], Awaitable[Tally]]


async def _bare(n: int, handler: Handler, ordered: bool) -> Tally:
    """A hundred tasks that share one iterator: the least that can be done, and the outputs go nowhere."""
    items = iter(range(n))
    await asyncio.gather(*[_worker(items, handler) for _ in range(CALLS)])
    return Tally(n)


async def _worker(items: Any, handler: Handler) -> None:
    for x in items:
        await handler(x)


async def _penstock(n: int, handler: Handler, ordered: bool) -> Tally:
    return await run_pipeline(Pipeline(range(n)) >> stage(concurrency=CALLS, ordered=ordered)(handler))


async def _streamable(n: int, handler: Handler, ordered: bool) -> Tally:
    from streamable import stream

    return await counted_all(stream(range(n)).map(handler, concurrency=CALLS, as_completed=not ordered))


async def _pipestage(n: int, handler: Handler, ordered: bool) -> Tally:
    import pipestage

    return await counted_all(pipestage.stream(range(n)).map(handler, concurrency=CALLS, ordered=ordered))


async def _aiostream(n: int, handler: Handler, ordered: bool) -> Tally:
    from aiostream import pipe, stream

    items: Any = stream.iterate(range(n)) | pipe.map(handler, ordered=ordered, task_limit=CALLS)
    async with items.stream() as streamer:
        return await counted_all(streamer)


async def _pypeln(n: int, handler: Handler, ordered: bool) -> Tally:
    import pypeln

    items: Any = pypeln.task.map(handler, range(n), workers=CALLS, maxsize=CALLS)
    return await counted_all(items | pypeln.task.ordered if ordered else items)


async def _pipevine(n: int, handler: Handler, ordered: bool) -> Tally:
    import pipevine

    pipeline = pipevine.Pipeline(counted(n)) >> pipevine.work_pool(buffer=BUFFER, num_workers=CALLS)(Stateful(handler))
    return Tally((await pipeline.run()).processed)


def _spdl(ordered: bool, handler: Handler, n: int) -> Tally:
    from spdl.pipeline import PipelineBuilder

    order = "input" if ordered else "completion"
    builder = PipelineBuilder().add_source(range(n)).pipe(handler, concurrency=CALLS, output_order=order)
    pipeline = builder.add_sink(BUFFER).build(num_threads=1, use_thread_output_queue=True)
    with pipeline.auto_stop():
        if thorough():
            return iterated(pipeline)
        return Tally(sum(1 for _ in pipeline))


async def counted_all(items: Any) -> Tally:
    """Without order the last item says nothing, so every item is counted: nothing beside a concurrent call."""
    if thorough():
        tally = await drained(items)
        return Tally(tally.count, tally.total)
    count = 0
    async for _ in items:
        count += 1
    return Tally(count)


_WAYS: dict[str, Way] = {
    "bare": _bare,
    "penstock": _penstock,
    "streamable": _streamable,
    "pipestage": _pipestage,
    "aiostream": _aiostream,
    "pypeln": _pypeln,
    "pipevine": _pipevine,
}


def _run(way: Way, handler: Handler, ordered: bool, n: int) -> Tally:
    return asyncio.run(way(n, handler, ordered))  # type: ignore[arg-type]


def _cells(handler: Handler, *, ordered: bool = False) -> dict[str, Timed]:
    runs: dict[str, Callable[[int], Tally]] = {name: partial(_run, way, handler, ordered) for name, way in _WAYS.items()}
    runs["spdl"] = partial(_spdl, ordered, handler)
    if ordered:
        del runs["pipevine"]  # it has no ordered pool
    return {name: Timed(run=run, expected=through_one, base=200) for name, run in runs.items()}


WORKLOADS = [
    Workload(
        name="conc100-none",
        title="one async stage, concurrency 100, no wait",
        cells=_cells(async_inc),
        bars=(Bar(against=BEST_PEER, required=15.0),),
    ),
    Workload(
        name="conc100-sleep0",
        title="one async stage, concurrency 100, `sleep(0)`",
        cells=_cells(yield_inc),
        bars=(Bar(against=BEST_PEER, required=4.5),),
    ),
    Workload(
        name="conc100-ordered",
        title="one async stage, concurrency 100, ordered, `sleep(0)`",
        cells=_cells(yield_inc, ordered=True),
        bars=(Bar(against=BEST_PEER, required=3.3),),
    ),
    Workload(
        name="conc100-1ms",
        title="one async stage, concurrency 100, waits 1 ms",
        cells=_cells(wait_inc),
        bars=(
            Bar(against="bare", required=0.95),
            Bar(against=BEST_PEER, required=0.5, form=Form.COST, measure="cpu"),
        ),
    ),
]
