"""Every step of every topology is a victim: cancelled, drained, killed, raised in, timed out, in several orders.

The rule kept here: topologies that live in the loop are explored at every step; those with threads and processes by a
bounded number of samples. `EXPLORE=10` (`make explore`) takes ten times as many orders and samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import aiostream
import pytest

from pipeline import ErrorPolicy, EventTrigger, Pipeline, PipelineCancelled, PipelineFailed, TimeoutTrigger
from pipeline.testing import Fault, explore
from stages import KillSwitch, Retry, batch, filter, flat_map, map, mix_pool, pipe, stage, take, tap, work_pool

BUDGET = int(os.environ.get("EXPLORE", "1"))
ITEMS = 4

FAULTS = [fault for fault in Fault if BUDGET > 1 or fault not in (Fault.LOOK, Fault.FORCE)]
"""In the suite each step is a victim of five faults; `make explore` adds a look and a kill."""


def double(n: int) -> int:
    return n * 2


async def prompt(n: int) -> int:
    return n + 100


async def wait(n: int) -> int:
    await asyncio.sleep(1 + n % 3)
    return n


async def wait_by_turns(n: int) -> int:
    if n % 2:
        await asyncio.sleep(1)
    return n


async def pause_briefly(n: int) -> int:
    await asyncio.sleep(0)
    return n


def fail_on_two(n: int) -> int:
    if n == 2:
        raise ValueError("two")
    return n


async def fail_late_on_two(n: int) -> int:
    await asyncio.sleep(1)
    return fail_on_two(n)


def twice(n: int) -> Iterator[int]:
    yield n
    yield n + 1000


async def twice_later(n: int) -> AsyncIterator[int]:
    yield n
    await asyncio.sleep(1)
    yield n + 1000


async def clean_up(n: int) -> int:
    try:
        await asyncio.sleep(5)
    finally:
        await asyncio.sleep(0.5)
    return n


async def source() -> AsyncIterator[int]:
    for n in range(ITEMS):
        await asyncio.sleep(1)
        yield n


@mix_pool(fork_merge=list)
def branches() -> list[Callable[[int], Any]]:
    return [double, wait_by_turns, prompt]


@work_pool(num_workers=2, fork_merge=list)
async def copies(n: int) -> int:
    await asyncio.sleep(1)
    return n


def inner() -> Pipeline[Any]:
    return Pipeline(range(ITEMS)) >> map(double) >> stage(concurrency=2)(wait)


async def failing_source() -> AsyncIterator[int]:
    async for n in source():
        yield n
        fail_on_two(n)


async def no_source() -> Any:
    await asyncio.sleep(1)
    raise ConnectionError("no source")


async def prepare(state: Any) -> None:
    await asyncio.sleep(1)


def cannot_prepare(thing: Any) -> None:
    raise RuntimeError("cannot")


def enough(n: int) -> Any:
    return KillSwitch("enough") if n == 3 else n


async def prompt_zero(n: int) -> int:
    return n


def stopped_by_event() -> Any:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(2.5, event.set)
    return Pipeline(source, cancel_on=EventTrigger(event)) >> stage(wait)


LOOP: dict[str, Callable[[], Any]] = {
    "no stages": lambda: Pipeline(range(ITEMS)),
    "an async source": lambda: Pipeline(source),
    "a fused chain, plain": lambda: Pipeline(range(ITEMS)) >> map(double) >> filter(lambda n: n != 4) >> tap(abs),
    "a fused chain, async": lambda: Pipeline(range(ITEMS)) >> map(double) >> stage(prompt) >> map(abs),
    "a chain that waits": lambda: Pipeline(range(ITEMS)) >> map(double) >> stage(wait) >> stage(prompt),
    "a chain that waits twice": lambda: Pipeline(range(ITEMS)) >> stage(wait) >> map(double) >> stage(wait),
    "a chain that waits now and then": lambda: Pipeline(range(ITEMS)) >> stage(prompt) >> stage(wait_by_turns) >> map(abs),
    "a chain that only gives way": lambda: Pipeline(range(ITEMS)) >> stage(pause_briefly) >> stage(pause_briefly),
    "tight edges": lambda: Pipeline(source) >> stage(buffer=0)(wait) >> stage(buffer=1)(wait),
    "a crew": lambda: Pipeline(range(ITEMS)) >> stage(concurrency=3)(wait),
    "a crew without waits": lambda: Pipeline(range(ITEMS)) >> stage(concurrency=3)(prompt),
    "an ordered crew": lambda: Pipeline(range(ITEMS)) >> stage(concurrency=3, ordered=True)(wait),
    "crews in a row": lambda: Pipeline(range(ITEMS)) >> stage(concurrency=2)(wait) >> stage(concurrency=2, ordered=True)(wait_by_turns),
    "handlers that clean up": lambda: Pipeline(range(3)) >> stage(concurrency=2)(clean_up),
    "generators": lambda: Pipeline(range(3)) >> flat_map(twice) >> stage(concurrency=2)(wait_by_turns),
    "async generators": lambda: Pipeline(range(3)) >> stage(twice_later) >> map(double),
    "a crew of generators": lambda: Pipeline(range(3)) >> stage(concurrency=2)(twice_later),
    "fork and merge": lambda: Pipeline(range(3)) >> branches,
    "copies and merge": lambda: Pipeline(range(3)) >> copies,
    "batches": lambda: Pipeline(source) >> batch(2) >> map(list),
    "batches by time": lambda: Pipeline(source) >> batch(10, within=1.5),
    "take": lambda: Pipeline(range(20)) >> map(double) >> take(3) >> map(abs),
    "take behind a crew": lambda: Pipeline(source) >> stage(concurrency=2)(wait) >> take(2),
    "an aiostream operator": lambda: Pipeline(range(ITEMS)) >> map(double) >> aiostream.pipe.map(double) >> stage(wait_by_turns),
    "an aiostream operator that stops early": lambda: Pipeline(source) >> pipe(aiostream.pipe.take(2)),
    "an aiostream operator that waits": lambda: Pipeline(range(4)) >> aiostream.pipe.map(wait, task_limit=2),
    "nested on the left": lambda: inner() >> stage(wait_by_turns),
    "nested as source": lambda: Pipeline(inner()) >> map(double),
    "nested on the right": lambda: Pipeline(source) >> inner(),
    "retries": lambda: Pipeline(range(4)) >> stage(retry=Retry(attempts=2, wait=1.0))(fail_late_on_two),
    "timeouts": lambda: Pipeline(range(4)) >> stage(timeout=2.5, concurrency=2)(wait),
    "a stop by time": lambda: Pipeline(source, cancel_on=TimeoutTrigger(3.5)) >> stage(wait),
    "a stop by an event": stopped_by_event,
    "errors dropped": lambda: Pipeline(range(4)) >> map(fail_on_two) >> stage(fail_late_on_two),
    "errors emitted": lambda: Pipeline(range(4), on_error=ErrorPolicy.EMIT) >> map(fail_on_two) >> stage(concurrency=2)(wait) >> batch(2),
    "errors sided": lambda: Pipeline(range(4)) >> stage(error_handler=pause_briefly)(fail_late_on_two),
    "errors that stop": lambda: Pipeline(range(ITEMS), on_error=ErrorPolicy.RAISE) >> stage(prompt_zero) >> map(fail_on_two) >> stage(wait),
    "errors that stop a crew": lambda: Pipeline(range(ITEMS), on_error=ErrorPolicy.RAISE) >> stage(concurrency=2)(fail_late_on_two) >> stage(wait),
    "a source that fails": lambda: Pipeline(failing_source) >> stage(wait) >> map(double),
    "a source that fails at once": lambda: Pipeline(no_source) >> stage(wait),
    "setup and teardown": lambda: Pipeline(range(4)) >> stage(concurrency=2, setup=prepare, teardown=prepare)(wait) >> map(double),
    "a setup that fails": lambda: Pipeline(range(4)) >> stage(concurrency=2)(wait) >> stage(setup=cannot_prepare)(wait),
    "a kill switch": lambda: Pipeline(range(9)) >> stage(concurrency=2)(wait) >> map(enough) >> stage(wait),
    "a share of errors": lambda: Pipeline(range(4)) >> stage(max_failures=0.5)(fail_late_on_two) >> batch(2),
    "an error handler that fails": lambda: Pipeline(range(4)) >> map(fail_on_two, error_handler=cannot_prepare) >> stage(wait),
    "errors that pass an operator": lambda: Pipeline(range(4), on_error=ErrorPolicy.EMIT) >> map(fail_on_two) >> aiostream.pipe.map(wait),
    "errors that pass a crew": lambda: Pipeline(source, on_error=ErrorPolicy.EMIT) >> map(fail_on_two) >> stage(concurrency=2, ordered=True)(wait),
    "too many errors": lambda: Pipeline(range(ITEMS)) >> stage(max_failures=0)(fail_late_on_two) >> map(double),
}


def run_only() -> Any:
    pipeline = Pipeline(range(ITEMS)) >> map(double) >> stage(concurrency=2)(wait)
    return pipeline, pipeline.run()


def iterated() -> Any:
    return by_iteration(Pipeline(range(ITEMS)) >> map(double) >> stage(wait_by_turns))


def iterated_slowly() -> Any:
    return by_iteration(Pipeline(source) >> stage(concurrency=2)(wait), pause=3.0)


def iterated_prompt() -> Any:
    return by_iteration(Pipeline(range(ITEMS)) >> map(double) >> map(abs))


def left_early() -> Any:
    return by_iteration(Pipeline(range(20)) >> map(double) >> stage(wait_by_turns), leave=2)


def left_early_prompt() -> Any:
    return by_iteration(Pipeline(range(20)) >> map(double), leave=2)


def inner_stopped() -> Any:
    within = inner()
    return within, (Pipeline(within) >> map(double)).run()


def by_iteration(pipeline: Pipeline[Any], *, leave: int | None = None, pause: float = 0.0) -> Any:
    """A consumer that writes down what it gets."""
    outputs: list[Any] = []

    async def consume() -> None:
        with contextlib.suppress(PipelineCancelled, PipelineFailed):
            async with aclosing(pipeline.async_iter(max_buffer=2)) as items:
                async for item in items:
                    outputs.append(item)
                    if len(outputs) == leave:
                        break
                    await asyncio.sleep(pause)

    return pipeline, consume(), outputs


LOOP |= {
    "run": run_only,
    "nested, the inner one stopped": inner_stopped,
    "async_iter": iterated,
    "async_iter with a slow consumer": iterated_slowly,
    "async_iter of plain functions": iterated_prompt,
    "async_iter left early": left_early,
    "async_iter of plain functions left early": left_early_prompt,
}


LET_GO = {"handlers that clean up"}
"""A kill has no grace: what still cleans up then is named in the report, and cut short with its loop."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.abandons("task") if name in LET_GO else ()) for name in LOOP])
def test_every_step_in_the_loop(name: str) -> None:
    found = explore(LOOP[name], schedules=BUDGET, faults=FAULTS)
    assert found.exact
    assert found.injected["cancel"] > 0


def generator_source() -> Iterator[int]:
    yield from range(ITEMS)


def to_double(n: int) -> int:
    return n * 2


OTHERS: dict[str, Callable[[], Any]] = {
    "a source in a thread": lambda: Pipeline(generator_source) >> map(double),
    "threads": lambda: Pipeline(range(ITEMS)) >> stage(run_in="thread", concurrency=2)(to_double),
    "threads between loops": lambda: Pipeline(generator_source) >> stage(wait_by_turns) >> stage(run_in="thread", ordered=True, concurrency=2)(to_double) >> batch(2),
    "generators in threads": lambda: Pipeline(range(3)) >> stage(run_in="thread", concurrency=2)(twice),
    "processes": lambda: Pipeline(range(ITEMS)) >> stage(run_in="process")(to_double),
    "processes and threads": lambda: Pipeline(range(ITEMS)) >> stage(run_in="process")(to_double) >> stage(run_in="thread")(to_double) >> map(double),
}


@pytest.mark.parametrize("name", OTHERS)
def test_samples_of_steps_with_threads_and_processes(name: str) -> None:
    samples = 2 if "process" in name else 8
    found = explore(OTHERS[name], samples=samples * BUDGET)
    assert not found.exact
    assert found.injected["cancel"] > 0
