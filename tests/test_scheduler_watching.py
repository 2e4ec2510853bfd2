"""Snapshots with reasons, limits in time, and asking a task to end.

The rule kept here: what a snapshot says is compared with a state that is held by an event.
"""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import AsyncExitStack
from dataclasses import FrozenInstanceError
from time import monotonic
from typing import Any

import pytest
from helpers import LIMIT, eventually, until
from staging import Latch, nothing, run_body, submit

from pipeline.scheduler import (
    Scheduler,
    StagedPipeline,
    TerminatedError,
    raise_if_terminate_requested,
    terminate_requested,
)

# --- snapshots


def test_a_snapshot_says_what_runs_and_why_the_rest_waits() -> None:
    latch = Latch()
    with Scheduler(resources={"gpu": 4, "mem_gb": 10.5}, task_parallelism=4, name="farm") as scheduler:

        def body(pipeline: StagedPipeline) -> Any:
            pipeline.task(latch, resources={"gpu": 3, "mem_gb": 0.5}, name="render").run()
            latch.wait_begun()
            pipeline.stage_forward()
            pipeline.task(nothing, resources={"gpu": 2, "mem_gb": 10.5}, name="encode", priority=1).run()
            pipeline.task(nothing, resources={"mem_gb": 1}).run()
            snapshot = scheduler.snapshot()
            latch.let_go.set()
            return snapshot

        snapshot = submit(scheduler, body, name="film").result(LIMIT)
    assert [(row.label, row.capacity, row.in_use, row.free) for row in snapshot.resources] == [("gpu", 4, 3, 1), ("mem_gb", 10.5, 0.5, 10)]
    (render,) = snapshot.running
    assert (render.kind, render.name, render.pipeline, render.stage, render.needs) == ("task", "film/render", "film", 0, (("gpu", 3), ("mem_gb", 0.5)))
    encode, small = snapshot.blocked
    assert (encode.state, encode.stage, encode.priority) == ("blocked", 1, 1)
    assert encode.reason == (
        "needs 2 gpu, 1 free, held by film/render (3); needs 10.5 mem_gb, 10 free, held by film/render (0.5)"
    )
    assert [(short.label, short.needed, short.free, short.holders) for short in encode.shortages] == [
        ("gpu", 2, 1, (("film/render", 3),)),
        ("mem_gb", 10.5, 10, (("film/render", 0.5),)),
    ]
    assert small.reason == "behind film/encode, which goes first"
    assert small.shortages == ()
    assert [(row.name, row.state, row.stage) for row in snapshot.pipelines] == [("film", "running", 1)]
    assert snapshot.waiting == 2
    assert snapshot.totals["submitted tasks"] == 3


def test_a_snapshot_is_plain_and_frozen_and_says_how_the_scheduler_is() -> None:
    with Scheduler(resources={"cpu": 0.1}, pipeline_parallelism=3, task_parallelism=2) as scheduler:
        submit(scheduler, lambda pipeline: pipeline.task(nothing, resources={"cpu": 0.1}).run().result()).result(LIMIT)
        before = scheduler.snapshot()
    after = scheduler.snapshot()
    assert (before.shutdown_started, before.closed, after.shutdown_started, after.closed) == (False, False, True, True)
    assert (before.pipeline_parallelism, before.task_parallelism) == (3, 2)
    assert after.totals == {"submitted tasks": 1, "succeeded tasks": 1, "succeeded pipelines": 1}
    with pytest.raises(FrozenInstanceError):
        after.waiting = 3  # type: ignore[misc]
    assert json.loads(json.dumps(after.to_dict()))["resources"] == [{"label": "cpu", "capacity": 0.1, "in_use": 0, "free": 0.1}]


def test_a_task_that_waits_for_a_thread_says_so() -> None:
    latch = Latch()
    with Scheduler(resources={"cpu": 4}, task_parallelism=1) as scheduler:

        def body(pipeline: StagedPipeline) -> Any:
            pipeline.task(latch, resources={"cpu": 1}).run()
            latch.wait_begun()
            pipeline.task(nothing, resources={"cpu": 1}).run()
            (blocked,) = scheduler.snapshot().blocked
            latch.let_go.set()
            return blocked.reason

        assert submit(scheduler, body).result(LIMIT) == "needs a worker thread, all 1 are taken"


async def test_the_seconds_of_what_runs_begin_when_it_got_what_it_needs() -> None:
    scheduler, ended = Scheduler(resources={"cpu": 1}), asyncio.Event()

    async def use() -> None:
        async with scheduler.reserve(cpu=1):
            await ended.wait()

    before = monotonic()
    async with scheduler.reserve(cpu=1):
        second = asyncio.create_task(use())
        await eventually(lambda: scheduler.snapshot().waiting)
        waited = scheduler.snapshot().blocked[0].seconds
        assert 0 < waited < monotonic() - before
        freed = monotonic()
    (row,) = scheduler.snapshot().running
    assert row.seconds < monotonic() - freed
    ended.set()
    await second


def test_many_that_wait_are_counted_and_the_next_ones_described() -> None:
    latch = Latch()
    with Scheduler(resources={"cpu": 1}) as scheduler:

        def body(pipeline: StagedPipeline) -> Any:
            pipeline.task(latch, resources={"cpu": 1}).run()
            for number in range(50):
                pipeline.task(nothing, resources={"cpu": 1}, name=str(number)).run()
            snapshot = scheduler.snapshot(most=3)
            latch.let_go.set()
            return snapshot, scheduler.snapshot(most=0).blocked

        snapshot, none = submit(scheduler, body, name="p").result(LIMIT)
    assert snapshot.waiting == 50
    assert [row.name for row in snapshot.blocked] == ["p/0", "p/1", "p/2"]
    assert none == ()


async def test_of_many_holders_the_largest_are_named_and_the_others_counted() -> None:
    scheduler = Scheduler(resources={"cpu": 100})
    async with AsyncExitStack() as held:
        for number in range(1, 13):
            await held.enter_async_context(scheduler.reserve(cpu=number, name=str(number)))
        waiting = asyncio.create_task(held.enter_async_context(scheduler.reserve(cpu=30)))
        await eventually(lambda: scheduler.snapshot().waiting)
        (row,) = scheduler.snapshot().blocked
        waiting.cancel()
        await asyncio.wait([waiting])
    assert row.reason == "needs 30 cpu, 22 free, held by 12 (12), 11 (11), 10 (10) and 9 more"
    (short,) = row.shortages
    assert short.holders == tuple((str(number), number) for number in range(12, 2, -1))
    assert short.more == 2


def test_with_fairness_the_one_that_was_passed_over_is_shown_first() -> None:
    latch = Latch()
    with Scheduler(resources={"cpu": 1}, fairness=1, pipeline_parallelism=3) as scheduler:
        ahead, late = threading.Event(), threading.Event()

        def further(pipeline: StagedPipeline) -> None:
            pipeline.stage_forward()
            tasks = [pipeline.task(latch, resources={"cpu": 1}).run()]
            latch.wait_begun()
            assert late.wait(LIMIT)
            tasks += [pipeline.task(second if number == 0 else nothing, resources={"cpu": 1}).run() for number in range(2)]
            ahead.set()
            pipeline.wait(tasks)

        def behind(pipeline: StagedPipeline) -> None:
            latch.wait_begun()
            task = pipeline.task(nothing, resources={"cpu": 1}, name="passed over").run()
            late.set()
            task.result()

        second = Latch()
        handles = [submit(scheduler, further), submit(scheduler, behind)]
        assert ahead.wait(LIMIT)
        latch.let_go.set()
        second.wait_begun()
        assert scheduler.snapshot().blocked[0].name.endswith("/passed over")
        second.let_go.set()
        scheduler.wait_pipelines(handles)


# --- time and priority


def test_a_task_that_cannot_start_in_time_fails_and_says_what_it_lacked() -> None:
    latch = Latch()

    def body(pipeline: StagedPipeline) -> None:
        pipeline.task(latch, resources={"cpu": 4}, name="first").run()
        latch.wait_begun()
        late = pipeline.task(nothing, resources={"cpu": 1}, start_within=0.01).run()
        behind = pipeline.task(nothing, resources={"cpu": 1}, start_within=LIMIT).run()
        with pytest.raises(TimeoutError, match=r"could not start within 0.01 s: needs 1 cpu, 0 free, held by .*/first \(4\)"):
            late.result()
        assert not late.cancelled()
        latch.let_go.set()
        assert behind.result() is None

    run_body(body)


def test_a_task_that_runs_too_long_is_asked_to_end() -> None:
    def patient() -> str:
        until(terminate_requested)
        raise_if_terminate_requested()
        return "not reached"

    def body(pipeline: StagedPipeline) -> None:
        with pytest.raises(TerminatedError, match="timed out after 0.01 s"):
            pipeline.task(patient, resources={"cpu": 1}, timeout=0.01).run().result()
        assert pipeline.task(lambda: "quick", resources={"cpu": 1}, timeout=LIMIT).run().result() == "quick"

    run_body(body)


@pytest.mark.parametrize("option", ["timeout", "start_within"])
def test_limits_are_checked(option: str) -> None:
    for seconds in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=option):
            StagedPipeline().task(nothing, **{option: seconds})


def test_a_higher_priority_goes_before_later_stages_for_tasks_and_for_pipelines() -> None:
    latch, order, ready = Latch(), [], [threading.Event() for _ in range(2)]
    with Scheduler(resources={"cpu": 1}, pipeline_parallelism=3) as scheduler:
        submit(scheduler, lambda pipeline: pipeline.task(latch, resources={"cpu": 1}).run().result())
        latch.wait_begun()

        def body(pipeline: StagedPipeline, name: str, event: threading.Event) -> None:
            tasks = [pipeline.task(order.append, resources={"cpu": 1}, args=(f"{name} urgent",), priority=5).run()]
            pipeline.stage_forward()
            tasks.append(pipeline.task(order.append, resources={"cpu": 1}, args=(name,)).run())
            event.set()
            pipeline.wait(tasks)

        submit(scheduler, lambda pipeline: body(pipeline, "plain", ready[0]))
        submit(scheduler, lambda pipeline: body(pipeline, "preferred", ready[1]), priority=1)
        for event in ready:
            assert event.wait(LIMIT)
        latch.let_go.set()
    assert order == ["preferred urgent", "plain urgent", "preferred", "plain"]


# --- asking to end


def test_a_running_task_is_asked_and_one_that_has_not_started_is_cancelled() -> None:
    began = threading.Event()

    def work() -> str:
        began.set()
        until(terminate_requested)
        assert asyncio.run(_looked_at_in_a_loop())
        return "ended early"

    def body(pipeline: StagedPipeline) -> None:
        running = pipeline.task(work, resources={"cpu": 4}).run()
        waiting = pipeline.task(nothing, resources={"cpu": 4}).run()
        assert began.wait(LIMIT)
        assert waiting.request_terminate()
        assert waiting.cancelled()
        assert running.request_terminate()
        running.request_terminate()
        assert running.result() == "ended early"
        assert not running.request_terminate()
        assert not waiting.request_terminate()
        assert pipeline.task(terminate_requested, resources={"cpu": 4}).run().result() is False

    run_body(body)
    assert not terminate_requested()
    raise_if_terminate_requested()


async def _looked_at_in_a_loop() -> bool:
    return terminate_requested()


def test_a_task_that_raises_because_it_was_asked_is_counted_apart() -> None:
    with Scheduler(resources={"cpu": 1}) as scheduler:

        def work() -> None:
            until(terminate_requested)
            raise_if_terminate_requested()

        def body(pipeline: StagedPipeline) -> None:
            task = pipeline.task(work, resources={"cpu": 1}).run()
            until(task.running)
            task.request_terminate("not needed any more")
            with pytest.raises(TerminatedError, match="not needed any more"):
                task.result()

        submit(scheduler, body).result(LIMIT)
        assert scheduler.snapshot().totals["terminated tasks"] == scheduler.snapshot().totals["failed tasks"] == 1
