"""Four threads: functions that do nothing, with a small and a large buffer, and functions that sleep."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

from pipeline import Pipeline
from stages import stage

from ..chains import run_pipeline
from ..handlers import inc, sleep_inc, through_one
from ..measure import Tally, Timed, iterated
from ..model import BEST_PEER, Bar, Workload

__all__ = ["WORKLOADS"]

WORKERS = 4

Way = Callable[[int, Callable[[int], int], int], Tally]


def _bare(n: int, handler: Callable[[int], int], buffer: int) -> Tally:
    """Four threads, each with its share, and no channel between them: the ideal."""
    threads = [threading.Thread(target=_share, args=(handler, range(number, n, WORKERS))) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Tally(n)


def _share(handler: Callable[[int], int], items: range) -> None:
    for x in items:
        handler(x)


def _penstock(n: int, handler: Callable[[int], int], buffer: int) -> Tally:
    threaded = stage(run_in="thread", concurrency=WORKERS, buffer=buffer)(handler)
    return asyncio.run(run_pipeline(Pipeline(range(n)) >> threaded))


def _executor(n: int, handler: Callable[[int], int], buffer: int) -> Tally:
    with ThreadPoolExecutor(WORKERS) as executor:
        return iterated(executor.map(handler, range(n)))


def _pool(n: int, handler: Callable[[int], int], buffer: int) -> Tally:
    with ThreadPool(WORKERS) as pool:
        return iterated(pool.imap(handler, range(n), chunksize=buffer // WORKERS))


def _streamable(n: int, handler: Callable[[int], int], buffer: int) -> Tally:
    from streamable import stream

    return _any_order(stream(range(n)).map(handler, concurrency=WORKERS, as_completed=True).buffer(buffer))


def _pypeln(n: int, handler: Callable[[int], int], buffer: int) -> Tally:
    import pypeln

    items: Any = pypeln.thread.map(handler, range(n), workers=WORKERS, maxsize=buffer)
    return _any_order(items)


def _spdl(n: int, handler: Callable[[int], int], buffer: int) -> Tally:
    from spdl.pipeline import PipelineBuilder

    builder = PipelineBuilder().add_source(range(n)).pipe(handler, concurrency=WORKERS).add_sink(buffer)
    pipeline = builder.build(num_threads=WORKERS, use_thread_output_queue=True)
    with pipeline.auto_stop():
        return _any_order(pipeline)


def _any_order(items: Any) -> Tally:
    count = total = 0
    for item in items:
        count += 1
        total += item
    return Tally(count, total)


_WAYS: dict[str, Way] = {
    "bare": _bare,
    "penstock": _penstock,
    "Executor.map": _executor,
    "ThreadPool.imap": _pool,
    "streamable": _streamable,
    "pypeln": _pypeln,
    "spdl": _spdl,
}


def _run(way: Way, handler: Callable[[int], int], buffer: int, n: int) -> Tally:
    return way(n, handler, buffer)


def _cells(handler: Callable[[int], int], buffer: int, seconds: float) -> dict[str, Timed]:
    # Multiples of the number of threads, and of the pool's bunches, so that nobody waits for a last one alone.
    return {
        name: Timed(run=partial(_run, way, handler, buffer), expected=through_one, base=64, seconds=seconds, repeats=2, step=16)
        for name, way in _WAYS.items()
    }


_UNBOUNDED = {
    "ThreadPool.imap": "it hands out the whole source at once, however slow the consumer is: there is no buffer to compare",
}

WORKLOADS = [
    Workload(
        name="threads-64",
        title="four threads, trivial, buffer 64",
        cells=_cells(inc, 64, 0.2),
        bars=(Bar(against=BEST_PEER, required=8.0),),
        uncounted=_UNBOUNDED,
    ),
    Workload(
        name="threads-1024",
        title="four threads, trivial, buffer 1024",
        cells=_cells(inc, 1024, 0.2),
        bars=(Bar(against=BEST_PEER, required=30.0),),
        uncounted=_UNBOUNDED,
    ),
    Workload(
        name="threads-1ms",
        title="four threads, 1 ms sleep (bare: ideal)",
        cells=_cells(sleep_inc, 64, 0.3),
        bars=(Bar(against="bare", required=0.98),),
    ),
]
