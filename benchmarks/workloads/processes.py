"""Two processes: functions that do nothing, functions that compute, and arrays in and out.

The time of a run of a quarter of the size, which starts the processes too, is taken off. It is long enough for both to be at
work.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from pipeline import Pipeline
from stages import stage

from ..chains import BUFFER, run_pipeline
from ..handlers import Stateful, brighten, inc, spin_inc, through_one
from ..measure import Tally, Timed, WrongResult, thorough
from ..model import BEST_PEER, Bar, Workload

__all__ = ["WORKLOADS"]

WORKERS = 2
CHUNK = 100
SIDE = 1 << 20
"""Bytes of an array."""

Handler = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What goes through the processes."""

    handler: Handler
    source: Callable[[int], Any]
    chunk: int
    """Items that are sent at once, for participants that want to be told. penstock is told nothing."""
    buffer: int
    """Items that wait, for participants that want to be told."""
    arrays: bool = False


Way = Callable[[Work, int], Tally]


def _arrays(n: int) -> Any:
    import numpy

    return repeat(numpy.ones(SIDE, dtype=numpy.uint8), n)


# --- the ways


def _without_ipc(work: Work, n: int) -> Tally:
    """Two processes that compute their halves and send nothing."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_half, args=(work.handler, n // WORKERS)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process ended with {process.exitcode}")
    return Tally(n)


def _half(handler: Handler, n: int) -> None:
    for x in range(n):
        handler(x)


def _penstock(work: Work, n: int) -> Tally:
    pipeline = Pipeline(work.source(n)) >> stage(run_in="process", concurrency=WORKERS)(work.handler)
    return asyncio.run(_look_at(pipeline) if work.arrays else run_pipeline(pipeline))


async def _look_at(pipeline: Pipeline[Any]) -> Tally:
    count = total = 0
    async for output in pipeline:
        count += 1
        total += corners(output)
    return Tally(count, total)


def _pool(work: Work, n: int) -> Tally:
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        return _seen(work, pool.imap(work.handler, work.source(n), chunksize=work.chunk))


def _executor(work: Work, n: int) -> Tally:
    with ProcessPoolExecutor(WORKERS) as executor:
        return _seen(work, executor.map(work.handler, work.source(n), chunksize=work.chunk))


def _streamable(work: Work, n: int) -> Tally:
    from streamable import stream

    with ProcessPoolExecutor(WORKERS) as executor:
        return _seen(work, stream(work.source(n)).map(work.handler, concurrency=executor, as_completed=True))


def _pypeln(work: Work, n: int) -> Tally:
    import pypeln

    items: Any = pypeln.process.map(work.handler, work.source(n), workers=WORKERS, maxsize=work.buffer)
    return _seen(work, items)


def _spdl(work: Work, n: int) -> Tally:
    from spdl.pipeline import PipelineBuilder
    from spdl.pipeline.defs import MAIN_PROCESS, ProcessPoolExecutorConfig

    builder = PipelineBuilder().add_source(work.source(n))
    builder = builder.to(ProcessPoolExecutorConfig(max_workers=WORKERS), buffer_size=work.chunk)
    builder = builder.pipe(work.handler).to(MAIN_PROCESS, buffer_size=work.chunk)
    pipeline = builder.add_sink(work.buffer).build(num_threads=1, use_thread_output_queue=True)
    with pipeline.auto_stop():
        return _seen(work, pipeline)


def _pipevine(work: Work, n: int) -> Tally:
    return asyncio.run(_pipevine_run(work, n))


async def _pipevine_run(work: Work, n: int) -> Tally:
    import pipevine

    pool = pipevine.work_pool(buffer=work.buffer, num_workers=WORKERS, multi_proc=True)(Stateful(work.handler))
    metrics = await (pipevine.Pipeline(_later(work.source(n))) >> pool).run()
    return Tally(metrics.processed)


async def _later(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


def _seen(work: Work, outputs: Iterable[Any]) -> Tally:
    """All outputs, looked at: arrays by their corners, numbers by their sum the first time and the count after."""
    if work.arrays:
        return _total([corners(output) for output in outputs])
    if thorough():
        return _total(list(outputs))
    return Tally(sum(1 for _ in outputs))


def _total(numbers: list[int]) -> Tally:
    return Tally(len(numbers), sum(numbers))


def corners(image: Any) -> int:
    """Its first and last bytes."""
    if image.nbytes != SIDE:
        raise WrongResult(f"an array of {image.nbytes} bytes came back, not of {SIDE}")
    return int(image[0]) + int(image[-1])


_WAYS: dict[str, Way] = {
    "bare, no IPC": _without_ipc,
    "penstock": _penstock,
    "Pool.imap": _pool,
    "Executor.map": _executor,
    "streamable": _streamable,
    "pypeln": _pypeln,
    "spdl": _spdl,
    "pipevine": _pipevine,
}


def _cells(
    work: Work, expected: Callable[[int], Tally], *, base: int, seconds: float, without: tuple[str, ...] = ()
) -> dict[str, Timed]:
    return {
        name: Timed(run=partial(way, work), expected=expected, base=base, seconds=seconds, repeats=2, steady=True, step=WORKERS * work.chunk)
        for name, way in _WAYS.items()
        if name not in without
    }


def _bright(n: int) -> Tally:
    return Tally(n, 4 * n)


WORKLOADS = [
    Workload(
        name="processes-trivial",
        title="two processes, trivial function",
        cells=_cells(Work(inc, range, chunk=CHUNK, buffer=BUFFER), through_one, base=200, seconds=0.8, without=("bare, no IPC",)),
        bars=(Bar(against="Pool.imap", required=1.5),),
        timeout=60.0,
    ),
    Workload(
        name="processes-200us",
        title="two processes, 200 µs of CPU an item",
        cells=_cells(Work(spin_inc, range, chunk=CHUNK, buffer=BUFFER), through_one, base=200, seconds=1.2),
        bars=(Bar(against="Executor.map", required=0.95), Bar(against="bare, no IPC", required=0.85)),
        timeout=60.0,
    ),
    Workload(
        name="processes-1MB",
        title="two processes, 1 MB arrays in and out",
        cells=_cells(Work(brighten, _arrays, chunk=1, buffer=4, arrays=True), _bright, base=16, seconds=0.8, without=("bare, no IPC",)),
        bars=(Bar(against=BEST_PEER, required=5.0),),
        timeout=60.0,
    ),
]
