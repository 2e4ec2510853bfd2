"""How tasks pass from the thread that submits them to the one that does them, and back.

The rule kept here: the moments in which two threads meet are made on purpose, by holding the lock, and not waited for. Only
the tests with a switch interval of a microsecond leave them to chance, and they make thousands.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import LIMIT, until
from staging import Latch, boom, nothing, run_body, submit

from pipeline.scheduler import FIRST_COMPLETED, FIRST_EXCEPTION, Scheduler, StagedPipeline


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with Scheduler(resources={"cpu": 4}, pipeline_parallelism=2, task_parallelism=4) as scheduler:
        yield scheduler


# --- threads that meet


@pytest.fixture
def hurry() -> Iterator[None]:
    """Threads change places all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("workers", [1, 4])
def test_nobody_sleeps_through_a_task_that_has_ended(hurry: None, workers: int) -> None:
    def chain(pipeline: StagedPipeline) -> int:
        return sum(pipeline.task(int, args=(1,), resources={"cpu": 1}).run().result(LIMIT) for _ in range(300))

    with Scheduler(resources={"cpu": 2}, pipeline_parallelism=3, task_parallelism=workers) as scheduler:
        handles = [submit(scheduler, chain) for _ in range(6)]
        assert [handle.result(LIMIT) for handle in handles] == [300] * 6


class Hasty(StagedPipeline):
    """Waves of tasks that fail, are cancelled, and are waited for in every way."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def run(self) -> int:
        dice = random.Random(self.seed)
        ended = 0
        for _ in range(dice.randrange(1, 4)):
            tasks = [
                self.task(
                    dice.choice([nothing, nothing, boom]),
                    resources={"cpu": dice.choice([0, 0.5, 1, 2]), "mem": dice.choice([0, 0.1])},
                    priority=dice.choice([0, 0, 1]),
                ).run()
                for _ in range(dice.randrange(1, 20))
            ]
            way = dice.randrange(4)
            if way == 0:
                dice.choice(tasks).cancel()
            elif way == 1:
                self.wait(tasks, LIMIT, FIRST_EXCEPTION)
            elif way == 2:
                self.wait(tasks, timeout=dice.choice([0, 1e-5]))
            pending = set(tasks)
            while pending:
                done, pending = self.wait(pending, LIMIT, FIRST_COMPLETED)
                assert done
            ended += len(tasks)
            self.stage_forward()
        return ended


@pytest.mark.parametrize("fairness", [None, 2])
def test_in_a_crowd_everything_ends_once_and_is_given_back(hurry: None, fairness: int | None) -> None:
    options: dict[str, Any] = {"pipeline_parallelism": 3, "task_parallelism": 3, "fairness": fairness}
    for round_ in range(12):
        with Scheduler(resources={"cpu": 2, "mem": 0.3}, **options) as scheduler:
            handles = [scheduler.run_pipeline(Hasty(20 * round_ + number)) for number in range(20)]
            ended = sum(handle.result(LIMIT) for handle in handles)
            after = scheduler.snapshot()
        assert (after.running, after.ready, after.waiting) == ((), (), 0)
        assert all(row.in_use == 0 for row in after.resources)
        assert ended == after.totals["submitted tasks"]
        assert ended == sum(after.totals.get(f"{how} tasks", 0) for how in ("succeeded", "failed", "cancelled"))


def test_tasks_that_fit_are_all_at_work_at_once_although_nobody_waits_for_them(scheduler: Scheduler) -> None:
    over = threading.Event()
    together = threading.Barrier(4, action=over.set)

    def body(pipeline: StagedPipeline) -> list[int]:
        over.clear()
        tasks = [pipeline.task(together.wait, args=(LIMIT,), resources={"cpu": 1}).run() for _ in range(4)]
        assert over.wait(LIMIT)  # on its own, and not by way of the scheduler
        return sorted(task.result(LIMIT) for task in tasks)

    for _ in range(20):
        assert submit(scheduler, body).result(LIMIT) == [0, 1, 2, 3]


# --- when the lock is taken


class Submission:
    """A pipeline that submits some tasks while the test holds the lock, and what is asked for when it is free again."""

    def __init__(self, count: int) -> None:
        self.ready, self.go, self.submitted, self.end = (threading.Event() for _ in range(4))
        self.count = count
        self.late = 0
        self.began: list[int] = []
        self.tasks: list[Any] = []

    def __call__(self, pipeline: StagedPipeline) -> None:
        pipeline.task(nothing).run().result(LIMIT)  # the crew is there
        self.ready.set()
        assert self.go.wait(LIMIT)
        self._submit(pipeline, self.count)
        self.submitted.set()
        assert self.end.wait(LIMIT)
        self._submit(pipeline, self.late)

    def _submit(self, pipeline: StagedPipeline, count: int) -> None:
        for _ in range(count):
            number = len(self.tasks)
            self.tasks.append(pipeline.task(self.began.append, args=(number,), resources={"cpu": 4}).run())

    def under_lock(self, scheduler: Scheduler) -> None:
        """Submit. Nobody has looked at it yet, although the lock is free again."""
        assert self.ready.wait(LIMIT)
        with scheduler.turn.lock:
            self.go.set()
            assert self.submitted.wait(LIMIT)  # the lock is taken, and nobody waits for it
        assert self.began == []
        assert len(scheduler.turn.left) == self.count


def test_submitting_does_not_wait_for_the_lock_and_keeps_the_order(scheduler: Scheduler) -> None:
    many = Submission(50)
    handle = submit(scheduler, many)
    many.under_lock(scheduler)
    many.late = 10
    many.end.set()
    until(lambda: handle.done() and all(task.done() for task in many.tasks))  # looks, and takes no turn
    assert many.began == list(range(60))


def test_what_was_submitted_is_in_the_next_snapshot(scheduler: Scheduler) -> None:
    few = Submission(2)
    handle = submit(scheduler, few)
    few.under_lock(scheduler)
    assert scheduler.snapshot().totals["submitted tasks"] == 3
    few.end.set()
    handle.result(LIMIT)


@pytest.mark.parametrize("which", [0, 1])
def test_a_task_can_be_cancelled_before_the_scheduler_has_taken_notice_of_it(scheduler: Scheduler, which: int) -> None:
    few = Submission(2)
    handle = submit(scheduler, few)
    few.under_lock(scheduler)
    few.tasks[which].cancel()
    few.tasks[1 - which].result(LIMIT)
    few.end.set()
    handle.result(LIMIT)
    assert few.began in ([1 - which], [0, 1])  # it may have been on its way to a worker
    assert few.tasks[which].cancelled() is (len(few.began) == 1)
    assert scheduler.snapshot().resource("cpu").free == 4


def test_a_pipeline_that_ends_right_after_submitting_still_has_its_tasks_done(scheduler: Scheduler) -> None:
    few = Submission(3)
    submit(scheduler, few)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    until(lambda: scheduler._closing)
    few.under_lock(scheduler)
    few.end.set()
    closing.join(LIMIT)
    assert scheduler.closed()
    assert few.began == [0, 1, 2]


def test_a_worker_that_finds_the_lock_taken_leaves_what_it_has_done_and_goes_on_later(scheduler: Scheduler) -> None:
    latches = [Latch(number) for number in range(4)]
    handles = [
        submit(scheduler, lambda pipeline, latch=latch: pipeline.task(latch).run().result(LIMIT)) for latch in latches[:2]
    ]
    for latch in latches[:2]:
        latch.wait_begun()
    turn = scheduler.turn
    with turn, turn.lock:
        for latch in latches[:2]:
            latch.let_go.set()
        until(lambda: len(turn.left) == 2)
        assert not any(handle.done() for handle in handles)
    assert [handle.result(LIMIT) for handle in handles] == [0, 1]
    after = submit(scheduler, lambda pipeline: [pipeline.task(nothing).run().result(LIMIT) for _ in range(9)])
    assert after.result(LIMIT) == [None] * 9


# --- whose code runs while the lock is held: nobody's


class Nosy:
    """Looks at the scheduler when it is let go of, which would wait for ever if the lock was held."""

    def __init__(self, scheduler: Scheduler, seen: list[int]) -> None:
        self.scheduler, self.seen = scheduler, seen

    def __del__(self) -> None:
        self.seen.append(self.scheduler.snapshot().task_parallelism)


def test_results_and_arguments_are_let_go_of_without_the_lock(scheduler: Scheduler) -> None:
    seen: list[int] = []

    def body(pipeline: StagedPipeline) -> None:
        for _ in range(5):
            pipeline.task(Nosy, args=(scheduler, seen)).run()  # nobody keeps the handle
            pipeline.task(nothing).run().result(LIMIT)

    submit(scheduler, body).result(LIMIT)
    until(lambda: len(seen) == 5)


def test_the_result_of_a_task_that_ended_while_the_lock_was_taken_is_let_go_of_without_it(scheduler: Scheduler) -> None:
    seen: list[int] = []
    latch = Latch()

    def work() -> Nosy:
        latch()
        return Nosy(scheduler, seen)

    submit(scheduler, lambda pipeline: pipeline.task(work).run() and None).result(LIMIT)
    latch.wait_begun()
    with scheduler.turn, scheduler.turn.lock:
        latch.let_go.set()
        until(lambda: len(scheduler.turn.left) == 1)
    until(lambda: seen == [4])


def test_the_arguments_of_a_task_that_starts_too_late_are_let_go_of_without_the_lock(scheduler: Scheduler) -> None:
    seen: list[int] = []

    def body(pipeline: StagedPipeline) -> None:
        latch = Latch()
        pipeline.task(latch, resources={"cpu": 4}).run()
        latch.wait_begun()
        late = pipeline.task(print, args=(Nosy(scheduler, seen),), resources={"cpu": 1}, start_within=0.001).run()
        assert isinstance(late.exception(LIMIT), TimeoutError)
        latch.let_go.set()

    submit(scheduler, body).result(LIMIT)
    until(lambda: seen == [4])


def test_a_handle_and_its_result_are_gone_with_the_last_who_knows_them(scheduler: Scheduler) -> None:
    class Value:
        pass

    def body(pipeline: StagedPipeline) -> tuple[Any, Any]:
        tasks = [pipeline.task(Value, resources={"cpu": 4}).run() for _ in range(3)]
        pipeline.wait(tasks)
        return weakref.ref(tasks[1]), weakref.ref(tasks[2].result())

    gc.collect()
    gc.disable()
    try:
        references = submit(scheduler, body).result(LIMIT)
        until(lambda: all(reference() is None for reference in references))
    finally:
        gc.enable()


# --- what a task may be


class Nameless:
    """Raises when it is asked for its name."""

    @property
    def __name__(self) -> str:
        raise KeyError("no name")

    def __call__(self) -> str:
        return "done"


def test_a_callable_without_a_usable_name_is_a_task_like_any_other() -> None:
    def body(pipeline: StagedPipeline) -> Any:
        task = pipeline.task(Nameless()).run()
        return task.result(LIMIT), repr(task)

    result, text = run_body(body)
    assert result == "done"
    assert "task-" in text


@pytest.mark.parametrize(
    ("fn", "options", "error", "words"),
    [
        (None, {}, TypeError, "a task is a function"),
        (3, {}, TypeError, "a task is a function"),
        (nothing, {"resources": 3}, TypeError, "resources is a mapping"),
        (nothing, {"resources": ["cpu"]}, TypeError, "resources is a mapping"),
        (nothing, {"args": 3}, TypeError, "args are the arguments"),
        (nothing, {"kwargs": 3}, TypeError, "kwargs is a mapping"),
        (nothing, {"priority": "x"}, ValueError, "whole number"),
        (nothing, {"priority": float("nan")}, ValueError, "whole number"),
        (nothing, {"priority": ""}, ValueError, "whole number"),
        (nothing, {"timeout": "1"}, ValueError, "number of seconds"),
        (nothing, {"start_within": float("inf")}, ValueError, "number of seconds"),
        (nothing, {"name": 3}, TypeError, "name is a text"),
    ],
)
def test_a_task_that_is_none_is_refused_when_it_is_described(
    fn: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    def body(pipeline: StagedPipeline) -> Any:
        with pytest.raises(error, match=words):
            pipeline.task(fn, **options)
        return pipeline.task(nothing).run().result(LIMIT)

    run_body(body)


def test_waiting_for_a_time_that_is_no_number_is_refused_in_words(scheduler: Scheduler) -> None:
    handle = submit(scheduler, lambda _: None)
    for wait in (handle.result, handle.exception, lambda timeout: scheduler.wait_pipelines([handle], timeout)):
        with pytest.raises(ValueError, match="timeout is a number of seconds"):
            wait("1")  # type: ignore[arg-type]
    handle.result(LIMIT)


def test_asking_for_a_failed_result_again_and_again_does_not_make_its_traceback_longer() -> None:
    def body(pipeline: StagedPipeline) -> list[int]:
        task, lengths = pipeline.task(boom).run(), []
        for _ in range(5):
            with pytest.raises(LookupError) as caught:
                task.result(LIMIT)
            lengths.append(len(traceback.extract_tb(caught.value.__traceback__)))
        return lengths

    assert len(set(run_body(body))) == 1
