"""Pipelines as tasks: their stages, their snapshots, their items, and how their ends become the ends of tasks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Gate, Journal, eventually
from tasking import KEY, all_of, assert_well_told, everything, messages, types

from pipeline import Err, ErrorPolicy, Grace, Pipeline, PipelineFailed, RunReport, TimeoutTrigger
from pipeline.tasks import EventType, TaskCoordinator, TaskEvent, current_task
from pipeline.tasks.graph import stages_of
from pipeline.testing import explore, run_virtual
from stages import batch, map, stage


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator(progress_interval=0.005) as coordinator:
        yield coordinator


@stage(concurrency=2)
async def slow(n: int) -> int:
    await asyncio.sleep(1)
    return n


def played(pipeline: Pipeline[Any], *, interval: float = 0.25, **options: Any) -> list[TaskEvent]:
    """Run it to its end as a task, in virtual time."""

    async def main() -> list[TaskEvent]:
        async with TaskCoordinator(progress_interval=interval) as coordinator:
            coordinator.start_task(*KEY, pipeline, **options)
            return await everything(coordinator)

    return run_virtual(main())


def test_a_pipeline_tells_its_stages_its_progress_and_its_report() -> None:
    events = played(Pipeline(range(8), name="index") >> slow >> batch(3), interval=3)
    assert_well_told(events)
    assert types(events) == ["started", "progress", "progress", "completed"]
    assert events[0].data == {
        "pipeline": "index",
        "stages": [
            {"name": "slow", "concurrency": 2, "capacity": 64, "run_in": "loop"},
            {"name": "batch", "concurrency": 3, "capacity": 64, "run_in": None},
        ],
    }
    last, report = events[-2].data, events[-1].data
    assert (last["state"], last["delivered"]) == ("closed", 3)
    assert (report["outcome"], report["balanced"], report["delivered"]) == ("completed", True, 3)
    assert [row["name"] for row in report["stages"]] == [row["name"] for row in events[0].data["stages"]]
    assert json.loads(json.dumps([event.to_dict() for event in events])) == [event.to_dict() for event in events]


def test_every_way_to_run_a_stage_is_told() -> None:
    chain = Pipeline([1]) >> stage(run_in="thread", concurrency=3, buffer=5)(abs) >> stage(run_in="process", name="far")(abs) >> slow >> slow
    assert [tuple(row.values()) for row in stages_of(chain)] == [
        ("abs", 3, 5, "thread"),
        ("far", 1, 64, "process"),
        ("slow", 2, 64, "loop"),
        ("slow-2", 2, 64, "loop"),
    ]
    json.dumps(stages_of(chain))


def test_progress_comes_at_a_bounded_rate() -> None:
    events = played(Pipeline(range(100)) >> slow, interval=5)  # 50 s
    times = [event.data["elapsed"] for event in events if event.type is EventType.PROGRESS]
    assert len(times) in (10, 11)


def test_nothing_is_told_while_nothing_changes() -> None:
    @stage
    async def very_slow(n: int) -> int:
        await asyncio.sleep(999.5)
        return n

    events = played(Pipeline([1]) >> very_slow, interval=1)
    assert types(events) == ["started", "progress", "progress", "completed"]


def test_outputs_become_items() -> None:
    events = played(Pipeline(range(6)) >> slow >> batch(2) >> map(tuple), interval=1000, items=True)
    assert [event.data for event in events if event.type is EventType.ITEM] == [{"item": [n, n + 1]} for n in (0, 2, 4)]
    assert events[-1].data["delivered"] == 3


def test_outputs_that_are_no_json_are_told_as_well_as_can_be() -> None:
    class Odd:
        def __repr__(self) -> str:
            return "<odd>"

    events = played(Pipeline([Path("a/b"), {3}, Odd(), b"raw", {(1, 2): 3}, "x" * 2_000_000]), items=True, interval=1000)
    items = [event.data["item"] for event in events if event.type is EventType.ITEM]
    assert items[:4] == ["a/b", [3], "<odd>", "b'raw'"]
    assert items[4] == {"(1, 2)": 3}
    assert items[5].startswith("xxx")
    assert items[5].endswith("(2,000,000 characters)")
    assert events[-1].type is EventType.COMPLETED


async def test_a_cancel_reaches_the_pipeline_with_its_reason(coordinator: TaskCoordinator) -> None:
    gate = Gate()
    pipeline = Pipeline(range(3)) >> stage(gate)
    running = coordinator.start_task(*KEY, pipeline)
    await gate.entered.wait()
    running.cancel("wrong file", code="user")
    end = await running.wait()
    assert end.type is EventType.CANCELLED
    assert end.data["message"] == "wrong file"
    assert [reason["code"] for reason in end.data["reasons"]] == ["user"]
    assert end.data["report"]["reasons"] == end.data["reasons"]
    assert pipeline.report is not None
    assert pipeline.report.reasons == running.reasons
    assert (gate.cancelled, end.data["report"]["stages"][0]["cancelled"]) == (1, 1)
    with pytest.raises(asyncio.CancelledError):
        await running.task


async def test_a_cancel_before_the_start_leaves_the_pipeline_as_it_was(coordinator: TaskCoordinator) -> None:
    pipeline = Pipeline([1, 2]) >> map(abs)
    running = coordinator.start_task(*KEY, pipeline)
    running.cancel("too early")
    assert types(await everything(coordinator)) == ["cancelled"]
    assert await pipeline.collect() == [1, 2]


async def test_a_pipeline_that_others_cancel_was_cancelled(coordinator: TaskCoordinator) -> None:
    gate = Gate()
    pipeline = Pipeline(range(3)) >> stage(gate)
    running = coordinator.start_task(*KEY, pipeline)
    await gate.entered.wait()
    pipeline.cancel("from beside")
    end = await running.wait()
    assert (end.type, messages(end)) == (EventType.CANCELLED, ["from beside"])


def test_a_pipeline_whose_own_time_is_up_has_timed_out() -> None:
    events = played(Pipeline(range(10), cancel_on=TimeoutTrigger(2.5)) >> slow)
    assert events[-1].type is EventType.TIMED_OUT
    assert events[-1].data["report"]["delivered"] == 4


async def test_a_pipeline_that_fails_is_an_error_with_its_report(coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    @stage(on_error=ErrorPolicy.RAISE)
    def fail(n: int) -> int:
        raise LookupError(f"no {n}")

    for n, items in enumerate((False, True)):
        running = coordinator.start_task("shop", "Import", n, Pipeline([5]) >> fail, items=items)
        end = await running.wait()
        assert end.type is EventType.ERROR
        assert (end.data["message"], end.data["type"]) == ("no 5", "LookupError")
        assert "in fail" in end.data["traceback"]
        assert end.data["report"]["outcome"] == "failed"
        with pytest.raises(PipelineFailed, match="no 5") as caught:
            await running.task
        assert isinstance(caught.value.__cause__, LookupError)
    assert "task failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pipeline", "text"),
    [
        (Pipeline() >> map(abs), "the pipeline has no source"),
        (Pipeline([1]) >> stage(resources={"gpu": 1})(abs), "has no scheduler; give it one"),
    ],
)
async def test_a_pipeline_that_cannot_start_is_an_error_that_says_why(
    coordinator: TaskCoordinator, pipeline: Pipeline[Any], text: str
) -> None:
    for n, items in enumerate((False, True)):
        end = await coordinator.start_task("shop", "Import", n, pipeline, items=items).wait()
        assert end.type is EventType.ERROR
        assert text in end.data["message"]


async def test_a_pipeline_that_runs_already_is_an_error_and_goes_on(coordinator: TaskCoordinator) -> None:
    gate = Gate()
    pipeline = Pipeline(range(3)) >> stage(gate)
    first = coordinator.start_task(*KEY, pipeline)
    await gate.entered.wait()
    end = await coordinator.start_task("shop", "Import", 8, pipeline).wait()
    assert "is running already" in end.data["message"]
    gate.opened.set()
    assert (await first.wait()).data["delivered"] == 3


async def test_a_pipeline_that_was_cancelled_before_says_what_to_do(coordinator: TaskCoordinator) -> None:
    pipeline = Pipeline([1, 2]) >> map(abs)
    pipeline.cancel("long ago")
    end = await coordinator.start_task(*KEY, pipeline).wait()
    assert end.type is EventType.ERROR
    assert "set a source with gen() to run it again" in end.data["message"]
    pipeline.gen([1, 2])
    assert (await coordinator.start_task(*KEY, pipeline).wait()).type is EventType.COMPLETED


async def test_a_pipeline_can_be_started_again_and_again(coordinator: TaskCoordinator) -> None:
    pipeline = Pipeline([1, 2]) >> map(abs)
    for _ in range(3):
        running = coordinator.start_task(*KEY, pipeline)
        assert (await running.wait()).data["delivered"] == 2
        report = await running.task
        assert isinstance(report, RunReport)
        assert report.balanced


async def test_stages_in_threads_tell_their_task_what_they_do(coordinator: TaskCoordinator) -> None:
    @stage(run_in="thread", concurrency=3)
    def tell(n: int) -> int:
        task = current_task()
        assert task is not None
        task.send_event_threadsafe("warning", {"message": f"item {n}"})
        return n

    coordinator.start_task(*KEY, Pipeline(range(5)) >> tell)
    events = await everything(coordinator)
    assert sorted(event.data["message"] for event in events if event.type is EventType.WARNING) == [f"item {n}" for n in range(5)]
    assert_well_told(events)


async def test_threads_and_processes_are_stopped_with_their_task(coordinator: TaskCoordinator, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    @stage(run_in="thread")
    def in_a_thread(n: int) -> int:
        return n

    def in_a_process(n: int) -> int:
        journal.write(os.getpid())
        time.sleep(600)
        return n

    pipeline = Pipeline(range(100), grace=Grace(abort=0.05, terminate=0.2)) >> in_a_thread >> stage(run_in="process")(in_a_process)
    running = coordinator.start_task(*KEY, pipeline)
    await eventually(journal.lines)
    running.cancel("enough")
    end = await running.wait()
    assert (end.type, messages(end)) == (EventType.CANCELLED, ["enough"])
    assert end.data["report"]["balanced"]


async def test_a_worker_that_is_killed_costs_an_item_and_not_the_task(coordinator: TaskCoordinator) -> None:
    def die(n: int) -> int:
        if n == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    end = await coordinator.start_task(*KEY, Pipeline(range(6)) >> stage(run_in="process")(die)).wait()
    assert end.type is EventType.COMPLETED
    assert (end.data["stages"][0]["lost"], end.data["delivered"]) == (1, 5)


@pytest.mark.abandons("thread")
async def test_a_source_that_blocks_for_ever_is_named_in_the_report(
    coordinator: TaskCoordinator, release: threading.Event
) -> None:
    def blocking() -> Iterator[int]:
        yield 1
        release.wait()

    running = coordinator.start_task(*KEY, Pipeline(blocking, grace=Grace(abort=0.05, terminate=0.05, kill=0.05)) >> map(abs))
    await eventually(lambda: (running.status().progress or {}).get("delivered") == 1)
    running.cancel("enough")
    end = await running.wait()
    assert end.type is EventType.CANCELLED
    assert end.data["report"]["abandoned"]


# --- at every step, with every fault


def as_a_task(**options: Any) -> Any:
    def make() -> tuple[Pipeline[Any], Coroutine[Any, Any, Any]]:
        pipeline = Pipeline(range(4)) >> slow >> batch(2)
        return pipeline, follow(pipeline, **options)

    return make


async def follow(pipeline: Pipeline[Any], **options: Any) -> Any:
    async with TaskCoordinator(progress_interval=0.7) as coordinator:
        running = coordinator.start_task(*KEY, pipeline, **options)
        client = all_of(coordinator)
        try:
            await asyncio.wait([running.task])
        except asyncio.CancelledError:
            running.cancel("the client has left")
            await asyncio.wait([running.task])
            raise
        finally:
            events = await client
            assert_well_told(events)
    result = running.task.result() if not running.task.cancelled() and running.task.exception() is None else None
    if events[-1].type is EventType.COMPLETED:
        assert isinstance(result, RunReport)
        return result
    return Err("stopped", reasons=running.reasons, report=pipeline.report)


@pytest.mark.parametrize("items", [False, True])
def test_a_pipeline_that_is_a_task_ends_well_wherever_it_is_stopped(items: bool) -> None:
    exploration = explore(as_a_task(items=items), samples=8)
    assert exploration.runs > 30
