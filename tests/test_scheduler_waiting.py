"""Waiting for tasks and for pipelines: when it ends, what it returns, and what it refuses.

The rule kept here: every clause is tested for both, `StagedPipeline.wait` and `Scheduler.wait_pipelines`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import Any, Protocol

import numpy
import pytest
from helpers import LIMIT
from staging import Latch, boom, nothing, submit

from pipeline.scheduler import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, Scheduler, StagedPipeline


class Place(Protocol):
    """Where things are started and waited for."""

    def start(self, function: Callable[..., Any]) -> Any: ...
    def wait(self, handles: Any, timeout: float | None = None, return_when: str = ALL_COMPLETED) -> tuple[set[Any], set[Any]]: ...


class _Tasks:
    def __init__(self, pipeline: StagedPipeline) -> None:
        self._pipeline = pipeline
        self.wait = pipeline.wait

    def start(self, function: Callable[..., Any]) -> Any:
        return self._pipeline.task(function, resources={"cpu": 1}).run()


class _Pipelines:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.wait = scheduler.wait_pipelines

    def start(self, function: Callable[..., Any]) -> Any:
        return submit(self._scheduler, lambda _: function())


@contextmanager
def _scheduler() -> Iterator[Scheduler]:
    with Scheduler(resources={"cpu": 3}, task_parallelism=3, pipeline_parallelism=3) as scheduler:
        yield scheduler


def in_both(test: Callable[[Place], None]) -> Callable[[], None]:
    """Run a test with tasks, in a pipeline, and with pipelines."""

    def both() -> None:
        with _scheduler() as scheduler:
            submit(scheduler, lambda pipeline: test(_Tasks(pipeline))).result(LIMIT)
        with _scheduler() as scheduler:
            test(_Pipelines(scheduler))

    both.__name__ = test.__name__
    return both


@in_both
def test_all_completed_waits_for_all_and_is_the_default(place: Place) -> None:
    latches = [Latch(), Latch()]
    handles = [place.start(latch) for latch in latches]
    threading.Thread(target=_let_go_in_turn, args=(latches,)).start()
    done, pending = place.wait(handles)
    assert (done, pending) == (set(handles), set())


def _let_go_in_turn(latches: list[Latch]) -> None:
    for latch in latches:
        latch.wait_begun()
        latch.let_go.set()


@in_both
def test_first_completed_returns_when_one_has_ended_however_it_did(place: Place) -> None:
    for function in (nothing, boom):
        latch = Latch()
        slow, quick = place.start(latch), place.start(function)
        done, pending = place.wait([slow, quick], return_when=FIRST_COMPLETED)
        latch.let_go.set()
        assert (done, pending) == ({quick}, {slow})


@in_both
def test_first_completed_takes_a_cancelled_one_for_an_end(place: Place) -> None:
    latches = [Latch() for _ in range(3)]
    blockers = [place.start(latch) for latch in latches]
    queued = place.start(nothing)
    threading.Timer(0, queued.cancel).start()
    assert place.wait([blockers[0], queued], return_when=FIRST_COMPLETED)[0] == {queued}
    for latch in latches:
        latch.let_go.set()


@in_both
def test_first_exception_returns_when_one_has_failed(place: Place) -> None:
    latch = Latch()
    slow, good, bad = place.start(latch), place.start(nothing), place.start(boom)
    place.wait([good])
    done, pending = place.wait([slow, good, bad], return_when=FIRST_EXCEPTION)
    assert done == {good, bad}
    assert pending == {slow}
    latch.let_go.set()


@in_both
def test_first_exception_waits_for_all_when_none_fails_and_a_cancel_is_no_failure(place: Place) -> None:
    latches = [Latch() for _ in range(3)]
    handles = [place.start(latch) for latch in latches]
    queued = place.start(nothing)
    for latch in latches:
        latch.wait_begun()
    assert queued.cancel()
    done, pending = place.wait([*handles, queued], timeout=0.001, return_when=FIRST_EXCEPTION)
    assert (done, pending) == ({queued}, set(handles))
    for latch in latches:
        latch.let_go.set()
    assert place.wait([*handles, queued], return_when=FIRST_EXCEPTION) == ({*handles, queued}, set())


@in_both
def test_running_out_of_time_returns_what_there_is(place: Place) -> None:
    latch = Latch()
    slow, quick = place.start(latch), place.start(nothing)
    place.wait([quick])
    for seconds in (0, 0.001):
        assert place.wait([slow, quick], timeout=seconds) == ({quick}, {slow})
    latch.let_go.set()
    assert place.wait([slow, quick], timeout=float("inf")) == ({slow, quick}, set())


@in_both
def test_handles_given_twice_count_once_and_any_iterable_will_do(place: Place) -> None:
    handle = place.start(nothing)
    assert place.wait(iter([handle, handle])) == ({handle}, set())
    assert place.wait((handle, handle), return_when=FIRST_COMPLETED) == ({handle}, set())


@in_both
def test_what_they_have_raised_is_not_raised_by_waiting(place: Place) -> None:
    bad = place.start(boom)
    assert place.wait([bad]) == ({bad}, set())


@in_both
def test_nothing_to_wait_for_is_an_error(place: Place) -> None:
    with pytest.raises(ValueError, match="nothing to wait for"):
        place.wait([])


@in_both
def test_wrong_kinds_times_and_conditions_are_errors(place: Place) -> None:
    handle = place.start(nothing)
    for wrong in (None, "handle", object()):
        with pytest.raises(TypeError, match="can be waited for here"):
            place.wait([handle, wrong])
    for seconds in (-1, -0.001, float("nan")):
        with pytest.raises(ValueError, match="timeout is a number"):
            place.wait([handle], timeout=seconds)
    for condition in ("SOME_COMPLETED", None, ""):
        with pytest.raises(ValueError, match="return_when is"):
            place.wait([handle], return_when=condition)  # type: ignore[arg-type]
    place.wait([handle])


@in_both
def test_seconds_may_be_any_kind_of_number(place: Place) -> None:
    latch = Latch()
    handle = place.start(latch)
    for seconds in (Fraction(1, 1000), Decimal("0.001"), numpy.float32(0.001), numpy.int8(0)):
        assert place.wait([handle], timeout=seconds) == (set(), {handle})  # type: ignore[arg-type]
        with pytest.raises(TimeoutError, match="has not ended within"):
            handle.result(seconds)
    latch.let_go.set()
    assert handle.result(10**400) is None


@in_both
def test_somebody_who_gives_up_leaves_nothing_with_those_he_waited_for(place: Place) -> None:
    latch = Latch()
    handle = place.start(latch)
    for _ in range(3):
        place.wait([handle], timeout=0.001)
    assert handle._waiters == []
    latch.let_go.set()


def test_handles_of_another_scheduler_are_refused() -> None:
    with _scheduler() as one, _scheduler() as other:
        handle = submit(one, nothing)
        with pytest.raises(ValueError, match="another scheduler"):
            other.wait_pipelines([handle])


def test_tasks_of_another_pipeline_are_refused_and_so_are_pipelines() -> None:
    with _scheduler() as scheduler:
        foreign = submit(scheduler, lambda pipeline: pipeline.task(nothing, resources={}).run()).result(LIMIT)

        def body(pipeline: StagedPipeline) -> None:
            with pytest.raises(ValueError, match="another pipeline"):
                pipeline.wait([foreign])

        handle = submit(scheduler, body)
        handle.result(LIMIT)
        with pytest.raises(TypeError, match="only a PipelineHandle"):
            scheduler.wait_pipelines([foreign])  # type: ignore[list-item]


def test_many_threads_wait_for_the_same_task() -> None:
    latch, seen = Latch("same"), []
    with _scheduler() as scheduler:
        handle = submit(scheduler, latch)
        threads = [threading.Thread(target=lambda: seen.append(handle.result(LIMIT))) for _ in range(8)]
        for thread in threads:
            thread.start()
        latch.let_go.set()
        for thread in threads:
            thread.join(LIMIT)
    assert seen == ["same"] * 8
