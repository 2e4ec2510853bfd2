"""The scheduler's thread front: submitting pipelines and tasks, the order in which they start, and what comes of them.

The rule kept here: what is said to happen before something else is held there by an event, and no test measures time.
"""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any

import pytest
from helpers import LIMIT
from staging import Body, Latch, boom, nothing, run_body, submit

from pipeline.scheduler import (
    CancelledError,
    PipelineHandle,
    Scheduler,
    StagedPipeline,
    TaskHandle,
    UnknownResourceError,
    UnschedulableTaskError,
)

# --- pipelines


def test_a_pipeline_runs_on_a_thread_of_the_scheduler_and_its_handle_has_the_result() -> None:
    with Scheduler(resources={"cpu": 1}) as scheduler:
        handle = submit(scheduler, lambda _: threading.current_thread().name)
        assert isinstance(handle, PipelineHandle)
        assert handle.result(LIMIT).startswith("scheduler-coordinator")
        assert handle.exception() is None
        assert (handle.done(), handle.running(), handle.cancelled()) == (True, False, False)


def test_a_pipeline_that_raises_has_failed_with_that_very_exception() -> None:
    error = KeyError("mine")

    def fail(_: StagedPipeline) -> None:
        raise error

    with Scheduler(resources={}) as scheduler:
        handle = submit(scheduler, fail)
        assert handle.exception(LIMIT) is error
        with pytest.raises(KeyError) as caught:
            handle.result()
        assert caught.value is error
        assert not handle.cancelled()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_whatever_run_raises_ends_the_pipeline_and_not_its_thread(error: BaseException) -> None:
    def fail(_: StagedPipeline) -> None:
        raise error

    with Scheduler(resources={}) as scheduler:
        assert submit(scheduler, fail).exception(LIMIT) is error
        assert submit(scheduler, lambda _: "alive").result(LIMIT) == "alive"


def test_a_pipeline_without_run_fails_and_says_what_is_missing() -> None:
    with Scheduler(resources={}) as scheduler:
        assert "has no run()" in str(scheduler.run_pipeline(StagedPipeline()).exception(LIMIT))


def test_pipelines_start_in_the_order_of_their_submission() -> None:
    first, started = Latch(), []
    with Scheduler(resources={}, pipeline_parallelism=1) as scheduler:
        submit(scheduler, first)
        for number in range(20):
            submit(scheduler, lambda _, number=number: started.append(number))
        first.wait_begun()
        assert started == []
        first.let_go.set()
    assert started == list(range(20))


def test_as_many_pipelines_run_at_once_as_the_scheduler_allows() -> None:
    latches = [Latch() for _ in range(3)]
    with Scheduler(resources={}, pipeline_parallelism=2) as scheduler:
        handles = [submit(scheduler, latch) for latch in latches]
        for latch in latches[:2]:
            latch.wait_begun()
        assert [handle.running() for handle in handles] == [True, True, False]
        assert not handles[2].done()
        for latch in latches:
            latch.let_go.set()


def test_only_a_staged_pipeline_can_be_submitted() -> None:
    with Scheduler(resources={}) as scheduler:
        for wrong in (nothing, StagedPipeline, None):
            with pytest.raises(TypeError, match="only an instance of a StagedPipeline"):
                scheduler.run_pipeline(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error"),
    [({"name": 3}, TypeError), ({"priority": "high"}, ValueError), ({"priority": float("nan")}, ValueError), ({"priority": 0.5}, ValueError)],
)
def test_a_pipeline_that_is_submitted_with_wrong_options_is_not_submitted(options: dict[str, Any], error: type[Exception]) -> None:
    pipeline = Body(lambda _: 1)
    with Scheduler(resources={}) as scheduler:
        with pytest.raises(error, match="name is|priority is"):
            scheduler.run_pipeline(pipeline, **options)
        assert scheduler.run_pipeline(pipeline).result(LIMIT) == 1


def test_an_instance_is_submitted_once_whatever_became_of_it_and_wherever() -> None:
    pipeline = Body(lambda _: 1)
    with Scheduler(resources={}) as scheduler, Scheduler(resources={}) as other:
        scheduler.run_pipeline(pipeline).result(LIMIT)
        for again in (scheduler, other):
            with pytest.raises(RuntimeError, match="submitted before"):
                again.run_pipeline(pipeline)


def test_a_pipeline_that_is_refused_may_still_be_submitted_elsewhere() -> None:
    pipeline = Body(lambda _: 1)
    closed = Scheduler(resources={})
    closed.close()
    with pytest.raises(RuntimeError, match="shutting down"):
        closed.run_pipeline(pipeline)
    with Scheduler(resources={}) as scheduler:
        assert scheduler.run_pipeline(pipeline).result(LIMIT) == 1


def test_a_pipeline_is_cancelled_only_before_it_starts() -> None:
    latch = Latch()
    with Scheduler(resources={}) as scheduler:
        running, queued = submit(scheduler, latch), submit(scheduler, nothing)
        latch.wait_begun()
        assert not running.cancel()
        assert queued.cancel()
        assert not queued.cancel()
        assert queued.cancelled()
        assert queued.done()
        for ask in (queued.result, queued.exception):
            with pytest.raises(CancelledError):
                ask()
        latch.let_go.set()
        assert running.result(LIMIT) is None
        assert not running.cancel()
        assert not running.cancelled()


def test_asking_for_a_result_has_a_limit_and_zero_does_not_wait() -> None:
    latch = Latch("late")
    with Scheduler(resources={}) as scheduler:
        handle = submit(scheduler, latch)
        latch.wait_begun()
        for ask in (handle.result, handle.exception):
            for seconds in (0, 0.001):
                with pytest.raises(TimeoutError, match="has not ended"):
                    ask(seconds)
            for seconds in (-1, float("nan")):
                with pytest.raises(ValueError, match="timeout is a number"):
                    ask(seconds)
        latch.let_go.set()
        assert handle.result(timeout=LIMIT) == "late"
        assert handle.result(timeout=0) == "late"


# --- tasks


def test_a_task_gets_its_arguments_and_runs_on_a_worker_thread() -> None:
    def body(pipeline: StagedPipeline) -> Any:
        def work(a: int, b: int, *, c: int) -> tuple[int, str]:
            return a + b + c, threading.current_thread().name

        task = pipeline.task(work, resources={"cpu": 1}, args=(1, 2), kwargs={"c": 3}, name="sum").run()
        assert isinstance(task, TaskHandle)
        return task.result()

    total, thread = run_body(body)
    assert total == 6
    assert thread.startswith("scheduler-worker")


def test_a_task_that_raises_has_failed_with_that_very_exception() -> None:
    def body(pipeline: StagedPipeline) -> None:
        task = pipeline.task(boom, resources={"cpu": 1}).run()
        error = task.exception()
        assert isinstance(error, LookupError)
        assert (task.done(), task.running(), task.cancelled()) == (True, False, False)
        with pytest.raises(LookupError) as caught:
            task.result()
        assert caught.value is error

    run_body(body)


def test_a_task_that_exits_gives_back_what_it_held_and_keeps_its_thread_working() -> None:
    def leave() -> None:
        raise SystemExit

    def body(pipeline: StagedPipeline) -> Any:
        left = pipeline.task(leave, resources={"cpu": 4}).run()
        assert isinstance(left.exception(), SystemExit)
        return pipeline.task(lambda: "after", resources={"cpu": 4}).run().result()

    assert run_body(body, task_parallelism=1) == "after"


def test_nothing_is_submitted_before_run_and_each_run_submits_once_more() -> None:
    calls: list[int] = []

    def body(pipeline: StagedPipeline) -> None:
        builder = pipeline.task(calls.append, resources={"cpu": 1}, args=(1,))
        assert calls == []
        first, second = builder.run(), builder.run()
        assert first is not second
        pipeline.wait([first, second])

    run_body(body)
    assert calls == [1, 1]


def test_a_task_is_cancelled_only_before_it_starts() -> None:
    latch = Latch("done")

    def body(pipeline: StagedPipeline) -> None:
        running = pipeline.task(latch, resources={"cpu": 4}).run()
        waiting = pipeline.task(nothing, resources={"cpu": 4}).run()
        latch.wait_begun()
        assert (running.running(), waiting.running()) == (True, False)
        assert not running.cancel()
        assert waiting.cancel()
        assert not waiting.cancel()
        assert (waiting.done(), waiting.cancelled()) == (True, True)
        for ask in (waiting.result, waiting.exception):
            with pytest.raises(CancelledError):
                ask()
        latch.let_go.set()
        assert running.result() == "done"
        assert not running.cancel()

    run_body(body)


def test_cancelling_the_head_lets_those_behind_it_start() -> None:
    latch = Latch()

    def body(pipeline: StagedPipeline) -> Any:
        pipeline.task(latch, resources={"cpu": 1}).run()
        latch.wait_begun()
        large = pipeline.task(nothing, resources={"cpu": 4}).run()
        small = pipeline.task(lambda: "small", resources={"cpu": 1}).run()
        assert large.cancel()
        value = small.result()
        latch.let_go.set()
        return value

    assert run_body(body) == "small"


def test_a_task_needs_the_running_pipeline_and_its_own_thread() -> None:
    pipeline = Body(nothing)
    builder = pipeline.task(nothing, resources={"cpu": 1})
    for control in (builder.run, pipeline.stage_forward, lambda: pipeline.wait([])):
        with pytest.raises(RuntimeError, match="not running"):
            control()

    def body(running: StagedPipeline) -> list[type]:
        mine = running.task(nothing, resources={"cpu": 1})
        done = mine.run()

        def intrude() -> list[type]:
            raised: list[type] = []
            for control in (mine.run, running.stage_forward, lambda: running.wait([done])):
                with pytest.raises(RuntimeError, match="only from the thread") as caught:
                    control()
                raised.append(caught.type)
            return raised

        return running.task(intrude, resources={"cpu": 1}).run().result()

    over = Body(body)
    with Scheduler(resources={"cpu": 2}, task_parallelism=2) as scheduler:
        assert scheduler.run_pipeline(over).result(LIMIT) == [RuntimeError] * 3
        for control in (over.task(nothing, resources={}).run, over.stage_forward, lambda: over.wait([])):
            with pytest.raises(RuntimeError, match="not running"):
                control()


def test_a_pipeline_that_waits_for_its_turn_is_not_controlled_yet() -> None:
    latch, queued = Latch(), Body(nothing)
    with Scheduler(resources={"cpu": 1}) as scheduler:
        submit(scheduler, latch)
        handle = scheduler.run_pipeline(queued)
        with pytest.raises(RuntimeError, match="not running"):
            queued.task(nothing, resources={"cpu": 1}).run()
        assert handle.cancel()
        with pytest.raises(RuntimeError, match="not running"):
            queued.stage_forward()
        latch.let_go.set()


@pytest.mark.parametrize(
    ("resources", "error"),
    [
        ({"gpu": 1}, UnknownResourceError),
        ({"gpu": 0}, UnknownResourceError),
        ({"cpu": 5}, UnschedulableTaskError),
        ({"cpu": Decimal("4.0000000000000000001")}, UnschedulableTaskError),
        ({"cpu": "1"}, ValueError),
        ({"cpu": None}, ValueError),
        ({"cpu": True}, ValueError),
        ({"cpu": 1j}, ValueError),
        ({"cpu": -1}, ValueError),
        ({"cpu": float("nan")}, ValueError),
        ({"cpu": float("inf")}, ValueError),
        ({"cpu": Decimal("NaN")}, ValueError),
        ({1: 1}, TypeError),
    ],
)
def test_needs_that_cannot_be_met_are_refused_when_the_task_is_submitted(resources: Any, error: type[Exception]) -> None:
    def body(pipeline: StagedPipeline) -> Any:
        builder = pipeline.task(nothing, resources=resources)
        with pytest.raises(error) as caught:
            builder.run()
        assert type(caught.value) is error
        return pipeline.task(lambda: "next", resources={"cpu": 4, "mem": 8}).run().result()

    assert run_body(body) == "next"


def test_resources_can_be_left_out_where_there_are_none_or_none_are_needed() -> None:
    def body(pipeline: StagedPipeline) -> list[Any]:
        return [pipeline.task(lambda: 1).run().result(), pipeline.task(lambda: 2, resources={}).run().result()]

    assert run_body(body) == [1, 2]
    assert run_body(body, resources=None) == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"resources": {"cpu": -1}},
        {"resources": {"cpu": float("nan")}},
        {"resources": {"cpu": "four"}},
        {"pipeline_parallelism": 0},
        {"pipeline_parallelism": True},
        {"task_parallelism": 0},
        {"task_parallelism": 1.5},
        {"fairness": 0},
    ],
)
def test_a_scheduler_checks_its_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not|cannot"):
        Scheduler(**options)
