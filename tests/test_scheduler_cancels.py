"""Streaming pipelines that share a scheduler, stopped in every way at random moments.

The rule kept here: a seed is a whole story, and after every one of them nothing is held, nobody waits, and every item is
accounted for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any

import psutil
import pytest
import uvloop
from helpers import LIMIT, eventually

from pipeline import Err, ErrorPolicy, Grace, Pipeline, PipelineCancelled, PipelineFailed, RunReport
from pipeline.scheduler import Scheduler
from pipeline.testing import explore
from stages import Retry, stage

HOWS = ("cancel", "drain", "force", "escalate", "task", "break", "nothing")


def _handler(random: Random, place: str) -> Callable[..., Any]:
    kind, fails, pause = random.choice(range(4)), random.random() < 0.3, random.choice((0, 0, 0.0005))

    def judge(item: int, state: Any) -> None:
        if fails and item % 5 == 0 and (item % 2 or state.attempt < 2):
            raise ValueError(item)

    def plain(item: int, state: Any) -> int:
        time.sleep(pause if place != "loop" else 0)
        judge(item, state)
        return item

    async def waiting(item: int, state: Any) -> int:
        await asyncio.sleep(pause)
        judge(item, state)
        return item

    def many(item: int, state: Any) -> Iterator[int]:
        yield item
        judge(item, state)
        yield item

    async def many_waiting(item: int, state: Any) -> AsyncIterator[int]:
        await asyncio.sleep(pause)
        yield item
        judge(item, state)
        yield item

    return (plain, waiting, many, many_waiting)[kind]


def _pipeline(random: Random, scheduler: Scheduler, places: tuple[str, ...], items: int) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = Pipeline(range(items), scheduler=scheduler, grace=Grace(abort=2, kill=5))
    for _ in range(random.randrange(1, 4)):
        place = random.choice(places)
        options: dict[str, Any] = {
            "run_in": place,
            "concurrency": random.randrange(1, 5 if place != "process" else 3),
            "ordered": random.random() < 0.4,
            "buffer": random.choice((None, 1, 4)),
            "on_error": random.choice((ErrorPolicy.DROP, ErrorPolicy.DROP, ErrorPolicy.EMIT, ErrorPolicy.RAISE)),
        }
        if random.random() < 0.3:
            options["retry"] = Retry(2, wait=random.choice((0, 0.001)))
        if random.random() < 0.2 and place == "loop":
            options["timeout"] = random.choice((0.001, 1))
        if random.random() < 0.75:
            options["resources"] = {"cpu": random.choice((0.1, 0.5, 1, 2)), "mem": random.choice((0, 0.1, 0.3))}
        pipeline = pipeline >> stage(**options)(_handler(random, place))
    return pipeline


async def _run(pipeline: Pipeline[Any], leave_after: int | None) -> RunReport | None:
    if leave_after is None:
        result = await pipeline.run()
        return result.report if isinstance(result, Err) else result
    outputs = pipeline.async_iter()
    try:
        async for _ in outputs:
            leave_after -= 1
            if leave_after < 0:
                break
    except (PipelineCancelled, PipelineFailed):
        pass
    finally:
        await outputs.aclose()
    return pipeline.report


async def _story(seed: int, places: tuple[str, ...]) -> None:
    random = Random(seed)
    scheduler = Scheduler(resources={"cpu": 2, "mem": 0.3}, fairness=random.choice((None, 1, 5)))
    pipelines = [_pipeline(random, scheduler, places, random.choice((5, 20, 40))) for _ in range(random.randrange(1, 3))]
    how = random.choice(HOWS)
    runs = [asyncio.create_task(_run(pipeline, random.randrange(20) if how == "break" else None)) for pipeline in pipelines]
    for _ in range(random.randrange(60)):
        await asyncio.sleep(0)
    if seed % 2:
        await asyncio.sleep(random.random() * 0.003)
    _stop(how, pipelines[0], runs[0])
    await _end(scheduler, runs)


async def _end(scheduler: Scheduler, runs: list[asyncio.Task[Any]]) -> None:
    done, pending = await asyncio.wait(runs, timeout=LIMIT)
    assert not pending
    for run in done:
        if not run.cancelled():
            report = run.result()
            assert report is None or report.balanced, report.explain()
    await eventually(lambda: not scheduler._shares)  # tasks of a run that was left end behind it
    snapshot = scheduler.snapshot()
    assert (snapshot.waiting, snapshot.running, snapshot.ready) == (0, (), ())
    assert all(row.free == row.capacity for row in snapshot.resources)
    scheduler.close()


def _stop(how: str, pipeline: Pipeline[Any], run: asyncio.Task[Any]) -> None:
    match how:
        case "cancel":
            pipeline.cancel("enough")
        case "drain":
            pipeline.cancel("enough", drain=True)
        case "force":
            pipeline.cancel("enough", force=True)
        case "escalate":
            for options in ({"drain": True}, {}, {"force": True}):
                pipeline.cancel("enough", **options)
        case "task":
            run.cancel()
        case _:
            pass


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_stopped_at_random_moments_everything_is_given_back(loop: Any) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        for seed in range(40):
            runner.run(_story(seed + 1000 * (loop is None), ("loop", "thread")))


def test_stopped_at_every_single_step_everything_is_given_back() -> None:
    schedulers: list[Scheduler] = []

    def make() -> Pipeline[int]:
        schedulers.append(scheduler := Scheduler(resources={"cpu": 1, "mem": 0.3}))
        first = stage(concurrency=2, resources={"cpu": 1})(_wait_for_a_second)
        second = stage(concurrency=2, ordered=True, retry=2, resources={"mem": 0.2})(_wait_for_a_second)
        return Pipeline(range(3), scheduler=scheduler) >> first >> second

    explore(make)
    assert len(schedulers) > 200
    for scheduler in schedulers:
        assert scheduler.engine.free == scheduler.engine.capacity
        assert scheduler.snapshot().waiting == 0


async def _wait_for_a_second(item: int) -> int:
    await asyncio.sleep(1)
    return item


def test_workers_that_are_killed_give_back_what_their_items_held() -> None:
    killed = 0
    with asyncio.Runner() as runner:
        for seed in range(5):
            killed += runner.run(_killed(Random(seed)))
    assert killed >= 5


async def _killed(random: Random) -> int:
    """Kill workers of a run, one after the other, then stop it; how many were killed."""
    scheduler = Scheduler(resources={"cpu": 2, "mem": 0.3})
    pipeline = _pipeline(random, scheduler, ("process",), 10**6)
    run = asyncio.create_task(_run(pipeline, None))
    killed = 0
    while killed < 3 and not run.done():
        await eventually(lambda: run.done() or scheduler.snapshot().running or pipeline.snapshot().delivered)
        workers = [worker for keeper in psutil.Process().children() for worker in keeper.children()]
        if workers:
            try:
                os.kill(random.choice(workers).pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed += 1
        await asyncio.sleep(random.random() * 0.01)
    _stop(random.choice(("cancel", "force", "task")), pipeline, run)
    await _end(scheduler, [run])
    return killed
