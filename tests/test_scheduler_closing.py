"""Shutdown and close, in all their combinations: what goes on, what is refused, what is left.

The rule kept here: a scheduler is held in each of its states by an event, and looked at there.
"""

from __future__ import annotations

import threading
from itertools import product
from typing import Any

import pytest
from helpers import LIMIT, until
from staging import Latch, nothing, submit

from pipeline.scheduler import CancelledError, Scheduler, StagedPipeline


def _threads(scheduler: Scheduler) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"{scheduler.name}-")]


def test_a_scheduler_that_was_never_used_closes_and_has_no_threads() -> None:
    scheduler = Scheduler(resources={"cpu": 1}, name="unused")
    assert not scheduler.shutdown_started()
    assert not scheduler.closed()
    assert _threads(scheduler) == []
    scheduler.close()
    assert scheduler.shutdown_started()
    assert scheduler.closed()


def test_threads_start_when_there_is_work_and_are_gone_after_the_close() -> None:
    with Scheduler(resources={"cpu": 4}, pipeline_parallelism=8, task_parallelism=8, name="counted") as scheduler:
        submit(scheduler, lambda pipeline: pipeline.task(nothing, resources={"cpu": 1}).run().result()).result(LIMIT)
        assert sorted(_threads(scheduler)) == ["counted-coordinator-0", "counted-worker-0"]
    assert _threads(scheduler) == []


def test_leaving_the_block_waits_for_everything_also_after_an_error() -> None:
    latch = Latch("late")
    with pytest.raises(LookupError):
        with Scheduler(resources={}) as scheduler:
            running, queued = submit(scheduler, latch), submit(scheduler, lambda _: "queued")
            threading.Timer(0, latch.let_go.set).start()
            raise LookupError
    assert (running.result(0), queued.result(0)) == ("late", "queued")
    assert scheduler.closed()


def test_shutdown_refuses_new_pipelines_and_does_not_wait() -> None:
    latch = Latch("end")
    with Scheduler(resources={}) as scheduler:
        running, queued = submit(scheduler, latch), submit(scheduler, lambda _: "queued")
        latch.wait_begun()
        scheduler.shutdown()
        scheduler.shutdown()
        assert scheduler.shutdown_started()
        assert not scheduler.closed()
        with pytest.raises(RuntimeError, match="shutting down"):
            submit(scheduler, nothing)
        assert running.running()
        assert not queued.done()
        latch.let_go.set()
        assert (running.result(LIMIT), queued.result(LIMIT)) == ("end", "queued")
        assert not scheduler.closed()


def test_running_pipelines_submit_tasks_after_a_shutdown_and_during_a_close() -> None:
    with Scheduler(resources={"cpu": 1}) as scheduler:
        latch, during = Latch(), threading.Event()

        def body(pipeline: StagedPipeline) -> list[Any]:
            latch()
            first = pipeline.task(lambda: 1, resources={"cpu": 1}).run().result()
            assert during.wait(LIMIT)
            pipeline.stage_forward()
            return [first, pipeline.task(lambda: 2, resources={"cpu": 1}).run().result()]

        handle = submit(scheduler, body)
        latch.wait_begun()
        scheduler.shutdown()
        latch.let_go.set()
        closer = threading.Thread(target=scheduler.close)
        closer.start()
        until(lambda: scheduler._closing)
        during.set()
        assert handle.result(LIMIT) == [1, 2]
        closer.join(LIMIT)
        assert scheduler.closed()


def test_shutdown_cancels_what_is_queued_when_it_is_told_to_also_later() -> None:
    latch = Latch("end")
    with Scheduler(resources={}) as scheduler:
        running, *queued = submit(scheduler, latch), submit(scheduler, nothing), submit(scheduler, nothing)
        latch.wait_begun()
        scheduler.shutdown()
        assert not any(handle.cancelled() for handle in queued)
        scheduler.shutdown(cancel_pending_pipelines=True)
        assert all(handle.cancelled() for handle in queued)
        scheduler.shutdown()
        assert running.running()
        with pytest.raises(CancelledError):
            queued[0].result()
        latch.let_go.set()
        assert running.result(LIMIT) == "end"


def test_a_second_close_may_cancel_what_the_first_one_waits_for() -> None:
    latch = Latch()
    scheduler = Scheduler(resources={})
    running, queued = submit(scheduler, latch), submit(scheduler, nothing)
    latch.wait_begun()
    closers = [threading.Thread(target=scheduler.close, args=(cancel,)) for cancel in (False, True)]
    closers[0].start()
    until(scheduler.shutdown_started)
    assert not queued.done()
    closers[1].start()
    with pytest.raises(CancelledError):
        queued.result(LIMIT)
    assert not scheduler.closed()
    latch.let_go.set()
    for closer in closers:
        closer.join(LIMIT)
    assert scheduler.closed()
    assert running.done()


@pytest.mark.parametrize("steps", list(product(["shutdown", "close"], [False, True], ["shutdown", "close"], [False, True])))
def test_shutdown_and_close_in_any_order_end_the_same(steps: tuple[Any, ...]) -> None:
    latch = Latch()
    scheduler = Scheduler(resources={"cpu": 1})
    running, queued = submit(scheduler, latch), submit(scheduler, lambda _: "ran")
    latch.wait_begun()
    latch.let_go.set()
    for how, cancel in (steps[:2], steps[2:]):
        getattr(scheduler, how)(cancel_pending_pipelines=cancel)
    scheduler.close()
    scheduler.close(cancel_pending_pipelines=True)
    scheduler.shutdown()
    assert scheduler.closed()
    assert running.result(0) is None
    assert queued.done()
    if not steps[1] and not steps[3]:
        assert queued.result(0) == "ran"
    assert running.cancel() is queued.cancel() is False


def test_close_waits_for_tasks_that_nobody_waits_for() -> None:
    latch, kept = Latch("end"), []
    scheduler = Scheduler(resources={"cpu": 1})

    def body(pipeline: StagedPipeline) -> None:
        kept.extend(pipeline.task(function, resources={"cpu": 1}).run() for function in (latch, lambda: "queued"))

    submit(scheduler, body).result(LIMIT)
    threading.Timer(0, latch.let_go.set).start()
    scheduler.close()
    assert [task.result(0) for task in kept] == ["end", "queued"]


def test_close_is_refused_in_a_pipeline_and_in_a_task() -> None:
    def body(pipeline: StagedPipeline) -> list[str]:
        def close() -> str:
            try:
                scheduler.close()
            except RuntimeError as error:
                return str(error)
            return "closed"

        return [close(), pipeline.task(close, resources={}).run().result()]

    with Scheduler(resources={}) as scheduler:
        assert all("use shutdown()" in text for text in submit(scheduler, body).result(LIMIT))
        assert not scheduler.shutdown_started()


def test_a_shutdown_is_possible_in_a_task() -> None:
    with Scheduler(resources={}) as scheduler:
        submit(scheduler, lambda pipeline: pipeline.task(scheduler.shutdown, resources={}).run().result()).result(LIMIT)
        assert scheduler.shutdown_started()


def test_cancelling_the_last_queued_pipeline_lets_a_close_end() -> None:
    latch = Latch()
    scheduler = Scheduler(resources={})
    running, queued = submit(scheduler, latch), submit(scheduler, nothing)
    closer = threading.Thread(target=scheduler.close)
    closer.start()
    until(scheduler.shutdown_started)
    assert queued.cancel()
    latch.let_go.set()
    closer.join(LIMIT)
    assert scheduler.closed()
    assert running.done()
