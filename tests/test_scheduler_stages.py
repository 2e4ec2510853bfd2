"""Streaming pipelines whose stages need resources of a scheduler: in the loop, in threads, in processes.

The rule kept here: limits are judged by what the handlers themselves see, and after every run everything is free again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT, Flag, Gate, assert_balanced, eventually, turns

from pipeline import Err, ErrorPolicy, Grace, Pipeline, PipelineError, RunReport, StageConfigError
from pipeline.scheduler import Scheduler, UnknownResourceError, UnschedulableTaskError
from stages import Retry, map, stage

PLACES = ("loop", "thread", "process")


@pytest.fixture
def scheduler() -> Any:
    with Scheduler(resources={"gpu": 2, "mem": 0.3}, name="shared") as scheduler:
        yield scheduler
        snapshot = scheduler.snapshot()
        assert not snapshot.waiting
        assert not snapshot.running
        assert all(row.free == row.capacity for row in snapshot.resources)


class Peak:
    """How many handlers are at work at once; for threads and loops."""

    def __init__(self) -> None:
        self.lock, self.now, self.peak = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self.lock:
            self.now += 1
            self.peak = max(self.peak, self.now)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.now -= 1


# --- what is refused, before anything starts


async def test_resources_without_a_scheduler_are_an_error_before_the_source_is_touched(scheduler: Scheduler) -> None:
    touched: list[int] = []

    def source() -> Iterator[int]:
        touched.append(1)
        yield 1

    work = stage(resources={"gpu": 1}, name="render")(lambda item: item)
    for options, error, text in (
        ({}, StageConfigError, "'render' needs resources and its pipeline has no scheduler"),
        ({"scheduler": Scheduler(resources={"cpu": 1})}, UnknownResourceError, "'render' needs 'gpu'"),
        ({"scheduler": Scheduler(resources={"gpu": 0.5})}, UnschedulableTaskError, "needs 1 gpu, and the scheduler has 0.5"),
    ):
        pipeline = Pipeline(source, **options) >> work
        for run in (pipeline.run, pipeline.collect):
            with pytest.raises(error, match=text):
                await run()
        with pytest.raises(error, match=text):
            list(pipeline.iter())
    assert touched == []


async def test_a_scheduler_that_shuts_down_starts_no_run() -> None:
    scheduler = Scheduler(resources={"gpu": 1})
    scheduler.shutdown()
    with pytest.raises(PipelineError, match="shutting down"):
        await (Pipeline([1], scheduler=scheduler) >> stage(resources={"gpu": 1})(abs)).run()
    assert await (Pipeline([-1], scheduler=scheduler) >> stage(abs)).collect() == [1]


@pytest.mark.parametrize("resources", [{"gpu": -1}, {"gpu": "1"}, {"gpu": float("nan")}, {1: 1}, [("gpu", 1)], 3])
def test_amounts_are_checked_when_the_stage_is_declared(resources: Any) -> None:
    with pytest.raises(StageConfigError):
        stage(resources=resources)(abs)


def test_a_stage_that_needs_nothing_is_as_quick_as_ever() -> None:
    assert stage(resources={})(abs).fusable
    assert stage(abs).fusable
    assert not stage(resources={"gpu": 1})(abs).fusable


# --- limits


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("place", ["loop", "thread"])
async def test_no_more_items_are_at_work_than_there_is_for(scheduler: Scheduler, place: str, ordered: bool) -> None:
    peak, pair = Peak(), threading.Barrier(2)

    def in_thread(item: int) -> int:
        with peak:
            pair.wait(LIMIT)  # two at once: no fewer, either
            return -item

    async def in_loop(item: int) -> int:
        with peak:
            await turns(4)
            return -item

    options: dict[str, Any] = {"concurrency": 6, "resources": {"gpu": 1}, "ordered": ordered, "run_in": place}
    pipeline = Pipeline(range(40), scheduler=scheduler) >> stage(**options)(in_loop if place == "loop" else in_thread)
    result = await pipeline.collect()
    assert isinstance(result, list)
    assert sorted(result) == list(range(-39, 1))
    assert not ordered or result == [-item for item in range(40)]
    assert peak.peak == 2
    assert pipeline.report is not None
    assert_balanced(pipeline.report)


async def test_processes_are_limited_too_and_work_at_once(scheduler: Scheduler, tmp_path: Path) -> None:
    folder = str(tmp_path)

    def meet(item: int) -> int:
        mine = Path(folder, f"at-{item}")
        mine.touch()
        deadline = time.monotonic() + LIMIT
        others = 0
        while not others and time.monotonic() < deadline:  # two at once, for pairs are taken in order
            others = sum(path.name == f"at-{item ^ 1}" for path in Path(folder).iterdir())
        Path(folder, f"met-{item}").touch()
        while not Path(folder, f"met-{item ^ 1}").exists() and time.monotonic() < deadline:
            pass
        now = sum(path.name.startswith("at-") for path in Path(folder).iterdir())
        mine.unlink()
        return now

    options: dict[str, Any] = {"run_in": "process", "concurrency": 4, "resources": {"gpu": 1}}
    result = await (Pipeline(range(8), scheduler=scheduler) >> stage(**options)(meet)).collect()
    assert isinstance(result, list)
    assert len(result) == 8
    assert max(result) <= 2


@pytest.mark.parametrize("place", PLACES)
async def test_generators_retries_and_failures_come_out_as_without_a_scheduler(scheduler: Scheduler, place: str) -> None:
    def fan_out(item: int) -> Iterator[int]:
        yield from range(item)

    def odd_only(item: int, state: Any) -> int:
        if item % 2 == 0 and (item % 4 == 0 or state.attempt < 2):
            raise ValueError(item)
        return item

    def pipeline(**options: Any) -> Pipeline[Any]:
        use = {"resources": {"gpu": 1}} if options else {}
        return (
            Pipeline(range(12), **options)
            >> stage(run_in=place, concurrency=3, ordered=True, **use)(fan_out)
            >> stage(run_in=place, concurrency=2, ordered=True, retry=Retry(2, wait=0), on_error=ErrorPolicy.EMIT, **use)(odd_only)
        )

    plain = await pipeline().collect()
    guarded = await pipeline(scheduler=scheduler).collect()
    assert isinstance(plain, list)
    assert isinstance(guarded, list)
    assert [_shown(item) for item in guarded] == [_shown(item) for item in plain]
    assert any(isinstance(item, Err) for item in plain)


def _shown(item: Any) -> Any:
    return (str(item.value), item.item, item.attempts) if isinstance(item, Err) else item


@pytest.mark.parametrize("place", PLACES)
async def test_stages_that_need_all_there_is_do_not_wait_for_each_other_for_ever(scheduler: Scheduler, place: str) -> None:
    def many(item: int) -> Iterator[int]:
        for _ in range(100):  # more than the edges hold, so it would wait for the next stage while it held everything
            yield item

    pipeline = (
        Pipeline(range(4), scheduler=scheduler)
        >> stage(run_in=place, concurrency=2, resources={"gpu": 2}, buffer=1)(many)
        >> stage(run_in=place, concurrency=2, resources={"gpu": 2}, buffer=1)(abs)
        >> stage(concurrency=2, resources={"gpu": 2, "mem": 0.1}, buffer=1)(abs)
    )
    report = await asyncio.wait_for(pipeline.run(), LIMIT)
    assert isinstance(report, RunReport)
    assert report.delivered == 400


async def test_an_async_generator_holds_until_it_has_ended(scheduler: Scheduler) -> None:
    async def many(item: int) -> AsyncIterator[float]:
        for _ in range(3):
            yield scheduler.snapshot().resource("gpu").in_use

    result = await (Pipeline([1, 2], scheduler=scheduler) >> stage(resources={"gpu": 2})(many)).collect()
    assert result == [2] * 6


# --- order


async def test_across_pipelines_the_later_stage_goes_first(scheduler: Scheduler) -> None:
    order: list[str] = []

    def log(text: str) -> Any:
        async def handler(item: Any) -> Any:
            order.append(text)
            return item

        return stage(resources={"gpu": 2}, name=text)(handler)

    early = Pipeline([1], scheduler=scheduler, name="early") >> log("early, stage 0")
    late = Pipeline([1], scheduler=scheduler, name="late") >> map(abs) >> map(abs) >> map(abs) >> log("late, stage 3")
    async with scheduler.reserve(gpu=1):
        runs = [asyncio.create_task(early.run())]
        await eventually(lambda: scheduler.snapshot().waiting == 1)
        runs.append(asyncio.create_task(late.run()))
        await eventually(lambda: scheduler.snapshot().waiting == 2)
        rows = scheduler.snapshot().blocked
        assert [(row.kind, row.pipeline, row.name, row.stage) for row in rows] == [
            ("item", "late", "late/late, stage 3", 3),
            ("item", "early", "early/early, stage 0", 0),
        ]
        assert rows[0].reason == "needs 2 gpu, 1 free, held by a reservation (1)"
        assert rows[1].reason is not None
        assert rows[1].reason.endswith("behind late/late, stage 3, which goes first")
    await asyncio.gather(*runs)
    assert order == ["late, stage 3", "early, stage 0"]


async def test_work_in_progress_is_finished_before_new_work_is_begun(scheduler: Scheduler) -> None:
    begun = finished = most = 0

    async def begin(item: int) -> int:
        nonlocal begun, most
        begun += 1
        most = max(most, begun - finished)
        await turns()
        return item

    async def finish(item: int) -> int:
        nonlocal finished
        await turns()
        finished += 1
        return item

    options: dict[str, Any] = {"concurrency": 8, "resources": {"gpu": 1}}
    pipelines = [Pipeline(range(50), scheduler=scheduler) >> stage(**options)(begin) >> stage(**options)(finish) for _ in range(3)]
    for report in await asyncio.gather(*(pipeline.run() for pipeline in pipelines)):
        assert isinstance(report, RunReport)
    assert finished == 150
    assert most <= 6  # two at work, and what was on its way from stage to stage; without the order it is a hundred


async def test_a_pipeline_inside_another_keeps_its_scheduler_or_takes_that_around_it(scheduler: Scheduler) -> None:
    other = Scheduler(resources={"disk": 1})
    seen: list[tuple[float, float]] = []

    def look(item: int) -> int:
        seen.append((scheduler.snapshot().resource("gpu").in_use, other.snapshot().resource("disk").in_use))
        return item

    own = Pipeline(scheduler=other) >> stage(resources={"disk": 1})(look)
    none = Pipeline() >> stage(resources={"gpu": 2})(look)
    assert await (Pipeline([1], scheduler=scheduler) >> own >> none).collect() == [1]
    assert seen == [(0, 1), (2, 0)]
    assert await (Pipeline(Pipeline([1], scheduler=scheduler) >> none) >> own).collect() == [1]
    assert other.snapshot().resource("disk").free == 1


# --- whatever becomes of an item


@pytest.mark.parametrize("place", PLACES)
async def test_a_cancelled_run_holds_nothing_and_nobody_waits_for_it(scheduler: Scheduler, place: str, tmp_path: Path) -> None:
    began, release = Flag(tmp_path / "began"), Flag(tmp_path / "release")

    async def in_loop(item: int) -> None:
        began.set()
        await asyncio.get_running_loop().create_future()

    def elsewhere(item: int, state: Any) -> None:
        began.set()
        while not state.cancelled and not release.is_set():
            pass

    handler: Any = in_loop if place == "loop" else elsewhere
    pipeline = Pipeline(range(100), scheduler=scheduler) >> stage(run_in=place, concurrency=5, resources={"gpu": 1})(handler)
    run = asyncio.create_task(pipeline.run())
    await eventually(lambda: began.is_set() and scheduler.snapshot().waiting)
    await pipeline.cancel("enough")
    snapshot = scheduler.snapshot()
    assert (snapshot.waiting, snapshot.running) == (0, ())
    assert snapshot.resource("gpu").free == 2
    result = await run
    assert isinstance(result, Err)
    assert_balanced(result.report)


@pytest.mark.abandons("thread")
@pytest.mark.parametrize("place", PLACES)
async def test_items_that_take_too_long_give_back_what_they_held(
    scheduler: Scheduler, place: str, release: threading.Event
) -> None:
    async def in_loop(item: int) -> int:
        await asyncio.get_running_loop().create_future()
        return item

    def in_thread(item: int) -> int:
        release.wait()
        return item

    def in_process(item: int) -> int:
        while True:
            time.sleep(1)

    handler: Any = {"loop": in_loop, "thread": in_thread, "process": in_process}[place]
    options: dict[str, Any] = {"run_in": place, "timeout": 0.05, "concurrency": 2, "resources": {"gpu": 2}}
    pipeline = Pipeline(range(3), scheduler=scheduler, grace=Grace(abort=0.05, terminate=0.05, kill=0.05)) >> stage(**options)(handler)
    report = await pipeline.run()
    account = report.report if isinstance(report, Err) else report
    assert account is not None
    assert account.stages[0].timed_out == 3
    release.set()


async def test_a_killed_worker_gives_back_what_its_item_held(scheduler: Scheduler) -> None:
    def die(item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    pipeline = Pipeline(range(4), scheduler=scheduler) >> stage(run_in="process", resources={"gpu": 2})(die)
    report = await pipeline.run()
    assert isinstance(report, RunReport)
    assert (report.stages[0].lost, report.delivered) == (1, 3)


@pytest.mark.abandons("task")
async def test_a_handler_that_cannot_be_stopped_holds_nothing_after_its_run(scheduler: Scheduler) -> None:
    opened, began = asyncio.Event(), asyncio.Event()

    async def stubborn(item: int) -> None:
        began.set()
        while not opened.is_set():
            try:
                await opened.wait()
            except asyncio.CancelledError:
                continue

    pipeline = Pipeline([1], scheduler=scheduler, grace=Grace(abort=0.05, terminate=0.05, kill=0.05)) >> stage(resources={"gpu": 2})(stubborn)
    run = asyncio.create_task(pipeline.run())
    await began.wait()
    result = await pipeline.cancel()
    assert isinstance(result, Err)
    assert scheduler.snapshot().resource("gpu").free == 2
    opened.set()
    await run
    await turns(10)


async def test_an_item_that_waits_for_resources_is_in_flight_and_its_wait_is_no_work(scheduler: Scheduler) -> None:
    gate = Gate()
    pipeline = Pipeline([1], scheduler=scheduler) >> stage(resources={"gpu": 2}, timeout=LIMIT)(gate.__call__)
    async with scheduler.reserve(gpu=1):
        run = asyncio.create_task(pipeline.run())
        await eventually(lambda: scheduler.snapshot().waiting == 1)
        assert pipeline.snapshot().stages[0].in_flight == 1
        assert gate.began == 0
    await gate.entered.wait()
    assert [row.name for row in scheduler.snapshot().running] == ["pipeline/__call__"]
    gate.opened.set()
    assert isinstance(await run, RunReport)


def test_several_loops_share_one_scheduler(scheduler: Scheduler) -> None:
    peak = Peak()

    def work(item: int) -> int:
        with peak:
            return item

    def run() -> None:
        pipeline = Pipeline(range(50), scheduler=scheduler) >> stage(run_in="thread", concurrency=3, resources={"gpu": 1})(work)
        assert sorted(pipeline.iter()) == list(range(50))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert 1 <= peak.peak <= 2
