"""Admission of tasks: how many at once, in which order, with which amounts; what is kept of them; and too few threads.

The rule kept here: what is said to happen before something else is held there by an event, and no test measures time.
"""

from __future__ import annotations

import gc
import threading
import weakref
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from helpers import LIMIT
from staging import Latch, nothing, run_body, submit

from pipeline.scheduler import Scheduler, StagedPipeline

# --- admission


def test_without_task_parallelism_tasks_run_one_after_the_other() -> None:
    at_once = Tally()

    def body(pipeline: StagedPipeline) -> None:
        pipeline.wait([pipeline.task(at_once, resources={"cpu": 1}).run() for _ in range(50)])

    run_body(body, task_parallelism=None)
    assert at_once.peak == 1


def test_tasks_never_hold_more_than_there_is() -> None:
    in_use = Tally()

    def body(pipeline: StagedPipeline) -> None:
        needs = [{"cpu": 1 + number % 4, "mem": number % 3 / 2} for number in range(200)]
        pipeline.wait([pipeline.task(in_use, resources=need, args=(need["cpu"],)).run() for need in needs])

    run_body(body, task_parallelism=8)
    assert 1 < in_use.peak <= 4


class Tally:
    """A task that knows how much is in use, by all of its calls together."""

    def __init__(self) -> None:
        self.lock, self.now, self.peak = threading.Lock(), 0, 0

    def __call__(self, amount: int = 1) -> None:
        with self.lock:
            self.now += amount
            self.peak = max(self.peak, self.now)
        with self.lock:
            self.now -= amount


def test_later_stages_go_first_then_earlier_pipelines_then_earlier_submissions() -> None:
    latch, order = Latch(), []
    submitted = [threading.Event() for _ in range(2)]

    def body(pipeline: StagedPipeline, who: int) -> None:
        if who == 1:
            assert submitted[0].wait(LIMIT)
        handles = []
        for stage in range(3):
            for number in range(2):
                call = pipeline.task(order.append, resources={"cpu": 1}, args=((stage, who, number),))
                handles.append(call.run())
            pipeline.stage_forward()
        submitted[who].set()
        pipeline.wait(handles)

    with Scheduler(resources={"cpu": 1}, pipeline_parallelism=3) as scheduler:
        submit(scheduler, lambda pipeline: pipeline.task(latch, resources={"cpu": 1}).run().result())
        latch.wait_begun()
        for who in range(2):
            submit(scheduler, lambda pipeline, who=who: body(pipeline, who))
        for event in submitted:
            assert event.wait(LIMIT)
        latch.let_go.set()
    assert order == [(stage, who, number) for stage in (2, 1, 0) for who in (0, 1) for number in (0, 1)]


def test_the_stage_of_a_task_is_the_one_in_which_it_was_submitted() -> None:
    latch, order = Latch(), []

    def body(pipeline: StagedPipeline) -> None:
        pipeline.task(latch, resources={"cpu": 4}).run()
        latch.wait_begun()
        early = pipeline.task(order.append, resources={"cpu": 4}, args=("early",))
        handles = [early.run()]
        pipeline.stage_forward()
        handles += [pipeline.task(order.append, resources={"cpu": 4}, args=("late",)).run(), early.run()]
        latch.let_go.set()
        pipeline.wait(handles)

    run_body(body, task_parallelism=1)
    assert order == ["late", "early", "early"]


def test_nothing_passes_a_head_that_does_not_fit_however_small_it_is() -> None:
    latch, order = Latch(), []

    def body(pipeline: StagedPipeline) -> None:
        pipeline.task(latch, resources={"cpu": 2}).run()
        latch.wait_begun()
        large = pipeline.task(order.append, resources={"cpu": 3}, args=("large",)).run()
        small = [pipeline.task(order.append, resources=need, args=("small",)).run() for need in ({"cpu": 1}, {})]
        assert not any(handle.running() or handle.done() for handle in (large, *small))
        latch.let_go.set()
        pipeline.wait([large, *small])

    run_body(body, task_parallelism=3)
    assert order[0] == "large"


@pytest.mark.parametrize("amounts", [(0.1, 0.2, 0.3), (Decimal("0.1"), Fraction(1, 3), 0.7), (1e-9, 1, 1.000000001)])
def test_what_decimals_take_they_leave_exactly(amounts: tuple[Any, ...]) -> None:
    def body(pipeline: StagedPipeline) -> Any:
        for _ in range(7):
            pipeline.wait([pipeline.task(nothing, resources={"cpu": amount}).run() for amount in amounts])
        return pipeline.task(lambda: "full", resources={"cpu": 4}).run().result(LIMIT)

    assert run_body(body) == "full"


def test_tasks_outlive_a_pipeline_that_does_not_wait_for_them() -> None:
    latch, kept = Latch("kept"), []
    with Scheduler(resources={"cpu": 1}) as scheduler:
        submit(scheduler, lambda pipeline: kept.append(pipeline.task(latch, resources={"cpu": 1}).run())).result(LIMIT)
        latch.let_go.set()
        assert kept[0].result(LIMIT) == "kept"


# --- what is kept


def test_a_finished_task_lets_go_of_what_it_was_called_with() -> None:
    class Large:
        pass

    def body(pipeline: StagedPipeline) -> tuple[Any, Any]:
        large = Large()
        known = weakref.ref(large)
        done = pipeline.task(id, resources={}, args=(large,)).run()
        done.result()
        return known, done

    known, done = run_body(body)
    gc.collect()
    assert known() is None
    assert done.done()


def test_handles_say_what_they_are() -> None:
    def body(pipeline: StagedPipeline) -> str:
        done = pipeline.task(nothing, resources={}).run()
        done.result()
        return repr(done)

    with Scheduler(resources={"cpu": 1}) as scheduler:
        handle = submit(scheduler, body, name="film")
        assert handle.result(LIMIT) == "<TaskHandle film/nothing: succeeded>"
        assert repr(handle) == "<PipelineHandle film: succeeded>"


# --- a system without threads to spare


def test_a_thread_that_cannot_be_started_is_an_error_or_its_work_is_done_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start, allowed = threading.Thread.start, [0]

    def start_some(thread: threading.Thread) -> None:
        if "-worker-" in thread.name:
            if not allowed[0]:
                raise RuntimeError("can't start new thread")
            allowed[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)

    def body(pipeline: StagedPipeline) -> list[int]:
        with pytest.raises(RuntimeError, match="can't start"):
            pipeline.task(nothing, resources={"cpu": 1}).run()
        allowed[0] = 1
        tasks = [pipeline.task(abs, resources={"cpu": 1}, args=(-number,)).run() for number in range(20)]
        pipeline.wait(tasks)
        return [task.result() for task in tasks]

    assert run_body(body) == list(range(20))
