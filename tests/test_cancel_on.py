"""Triggers around and inside of runs: armed at the start, disarmed at the end, and everybody learns the reasons."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop
from helpers import LIMIT, Flag, Gate, Journal, Program, assert_balanced, eventually, turns
from structlog.testing import capture_logs

from pipeline import (
    CancelReason,
    CancelType,
    DeadlineTrigger,
    EndTrigger,
    Err,
    ErrorPolicy,
    EventTrigger,
    Fence,
    Grace,
    MemoryTrigger,
    Pipeline,
    PipelineCancelled,
    PipelineFailed,
    RunReport,
    SignalTrigger,
    TimeoutTrigger,
    Trigger,
    TriggerHandle,
    get_current_reasons,
)
from pipeline.cancellation import signals
from stages import stage
from workers import WorkerState

USR1 = signal.SIGUSR1


class Manual:
    """A trigger fired by hand, from any thread, which shows how often it is armed and tells who asks in which order."""

    def __init__(self, code: str = "manual", *, fired: bool = False, diary: list[str] | None = None) -> None:
        self.reason = CancelReason(f"{code} fired", CancelType.MANUAL, code)
        self.fired = fired
        self.armed: list[Callable[[CancelReason], None]] = []
        self.diary = diary if diary is not None else []

    def check(self) -> CancelReason | None:
        return self.reason if self.fired else None

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        self.diary.append(f"arm {self.reason.code}")
        self.armed.append(callback)
        return TriggerHandle(lambda: self.disarmed(callback))

    def disarmed(self, callback: Callable[[CancelReason], None]) -> None:
        self.diary.append(f"disarm {self.reason.code}")
        self.armed.remove(callback)

    def fire(self) -> None:
        for callback in tuple(self.armed):
            callback(self.reason)


class Broken(Manual):
    """A trigger that cannot be armed."""

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        raise OSError("cannot be armed")


class Stubborn(Manual):
    """A trigger that cannot be disarmed."""

    def disarmed(self, callback: Callable[[CancelReason], None]) -> None:
        super().disarmed(callback)
        raise OSError("cannot be disarmed")


def why(result: Any) -> list[str | None]:
    """The codes of the reasons of a run that did not complete."""
    assert isinstance(result, (Err, PipelineCancelled, PipelineFailed)), result
    return [reason.code for reason in result.reasons]


def account(pipeline: Pipeline[Any]) -> RunReport:
    report = pipeline.report
    assert report is not None
    assert_balanced(report)
    return report


Way = Callable[[Pipeline[Any]], Any]


async def by_run(pipeline: Pipeline[Any]) -> Any:
    return await pipeline.run()


async def by_collect(pipeline: Pipeline[Any]) -> Any:
    return await pipeline.collect()


async def by_async_iter(pipeline: Pipeline[Any]) -> Any:
    try:
        return [item async for item in pipeline]
    except (PipelineCancelled, PipelineFailed) as error:
        return error


async def by_iter(pipeline: Pipeline[Any]) -> Any:
    return await asyncio.to_thread(listed, pipeline)


def listed(pipeline: Pipeline[Any]) -> Any:
    try:
        return list(pipeline.iter())
    except (PipelineCancelled, PipelineFailed) as error:
        return error


ways = pytest.mark.parametrize("way", [by_run, by_collect, by_async_iter, by_iter])


# --- armed at the start, disarmed at the end


@ways
async def test_triggers_are_armed_at_the_start_and_disarmed_at_the_end(way: Way) -> None:
    diary: list[str] = []
    first, second = Manual("first", diary=diary), Manual("second", diary=diary)

    def work(item: int) -> int:
        diary.append("work")
        return item

    pipeline = Pipeline([1], cancel_on=[first, second]) >> stage(work)
    for _ in range(2):
        diary.clear()
        await way(pipeline)
        assert diary == ["arm first", "arm second", "work", "disarm second", "disarm first"]
    assert account(pipeline).outcome == "completed"


@ways
async def test_triggers_are_disarmed_however_the_run_ends(way: Way) -> None:
    async def fails(item: int) -> None:
        raise ValueError("boom")

    async def waits(item: int) -> None:
        trigger.fire()
        await asyncio.Event().wait()

    for handler, outcome in ((fails, "failed"), (waits, "cancelled")):
        trigger = Manual()
        pipeline = Pipeline([1], cancel_on=trigger, on_error=ErrorPolicy.RAISE) >> stage(handler)
        await way(pipeline)
        assert account(pipeline).outcome == outcome
        assert trigger.armed == []


@ways
async def test_when_the_second_cannot_be_armed_the_first_is_disarmed_and_nothing_is_started(way: Way) -> None:
    first, calls = Manual(), list[int]()
    inner = Pipeline([1])
    pipeline = Pipeline(inner, cancel_on=[first, Broken(), Manual("third")]) >> stage(calls.append)
    for _ in range(2):
        with pytest.raises(OSError, match="cannot be armed"):
            await way(pipeline)
        assert (first.armed, calls) == ([], [])
    assert isinstance(await inner.run(), RunReport)
    assert inner.runtime.reasons == ()
    assert account(inner).delivered == 1


@ways
async def test_a_trigger_that_cannot_be_disarmed_keeps_neither_the_others_nor_the_end(way: Way) -> None:
    first, last = Manual("first"), Manual("last")
    pipeline = Pipeline([1, 2], cancel_on=[first, Stubborn(), last]) >> stage(abs)
    with capture_logs() as logs:
        await asyncio.wait_for(way(pipeline), LIMIT)
    assert account(pipeline).outcome == "completed"
    assert first.armed == last.armed == []
    assert [(entry["event"], entry["error"]) for entry in logs] == [
        ("a trigger could not be disarmed", "OSError: cannot be disarmed")
    ]


@ways
async def test_a_trigger_whose_look_fails_is_an_error_and_nothing_is_started(way: Way) -> None:
    class Blind(Manual):
        def check(self) -> CancelReason | None:
            raise OSError("cannot look")

    first, calls = Manual(), list[int]()
    with pytest.raises(OSError, match="cannot look"):
        await way(Pipeline([1], cancel_on=[first, Blind()]) >> stage(calls.append))
    assert (first.armed, calls) == ([], [])


@ways
async def test_a_trigger_that_has_fired_already_stops_the_run_before_its_first_item(way: Way) -> None:
    calls, silent = list[int](), Manual("silent")
    pipeline = Pipeline([1], cancel_on=[Manual("early", fired=True), silent, TimeoutTrigger(0, code="late")]) >> stage(calls.append)
    assert why(await way(pipeline)) == ["early", "late"]
    assert (calls, silent.armed, account(pipeline).pulled) == ([], [], 0)


@ways
async def test_a_pipeline_that_a_trigger_has_stopped_needs_a_new_source_and_then_arms_again(way: Way) -> None:
    trigger = Manual(fired=True)
    pipeline = Pipeline([1], cancel_on=trigger) >> stage(abs)
    assert why(await way(pipeline)) == ["manual"]
    with suppress(PipelineCancelled):
        assert why(await way(pipeline)) == ["manual"]
    trigger.fired = False
    await way(pipeline.gen([2]))
    assert account(pipeline).outcome == "completed"
    assert trigger.diary == ["arm manual", "disarm manual"]


async def test_nothing_that_fires_after_the_end_changes_anything() -> None:
    callbacks: list[Callable[[CancelReason], None]] = []

    class Late(Manual):
        def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
            callbacks.append(callback)
            return TriggerHandle()

    trigger = Late()
    pipeline = Pipeline([1], cancel_on=trigger) >> stage(abs)
    report = await pipeline.run()
    callbacks[0](trigger.reason)
    await turns()
    assert pipeline.runtime.reasons == ()
    assert pipeline.report is report


async def test_one_trigger_serves_many_pipelines_at_once() -> None:
    trigger, gates = Manual(), [Gate(), Gate()]
    pipelines = [Pipeline([1], cancel_on=trigger) >> stage(gate.__call__) for gate in gates]
    runs = [asyncio.create_task(pipeline.run()) for pipeline in pipelines]
    for gate in gates:
        await gate.entered.wait()
    gates[0].opened.set()
    assert isinstance(await runs[0], RunReport)
    trigger.fire()
    assert why(await runs[1]) == ["manual"]


def test_an_iteration_whose_thread_cannot_be_started_leaves_the_pipeline_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pipeline = Pipeline([1], cancel_on=SignalTrigger(USR1)) >> stage(abs)
    before = signal.getsignal(USR1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="can't start"):
            list(pipeline.iter())
    assert signal.getsignal(USR1) is before
    assert list(pipeline.iter()) == [1]


def test_an_iteration_that_gets_no_loop_raises_and_leaves_the_pipeline_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise OSError("too many open files")

    trigger = Manual()
    pipeline = Pipeline([1], cancel_on=trigger) >> stage(abs)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", full)
        with pytest.raises(OSError, match="too many open files"):
            list(pipeline.iter())
    assert list(pipeline.iter()) == [1]
    assert trigger.armed == []


# --- every trigger, every way


def reasonable(kind: str) -> Trigger:
    """A trigger of each kind that fires soon, or has fired, and needs no hand."""
    match kind:
        case "timeout":
            return TimeoutTrigger(0.01, code=kind)
        case "deadline":
            return DeadlineTrigger(time.monotonic() + 0.01, code=kind)
        case "date":
            return DeadlineTrigger(datetime.now(UTC) + timedelta(seconds=0.01), code=kind)
        case "event":
            event = asyncio.Event()
            event.set()
            return EventTrigger(event, code=kind)
        case "end of a fence":
            with Fence(TimeoutTrigger(0)) as fence:
                pass
            return EndTrigger(fence, code=kind)
        case "end of a pipeline":
            other: Pipeline[int] = Pipeline([1])
            other.cancel("never")
            return EndTrigger(other, code=kind)
        case _:
            return MemoryTrigger(1 << 20, code=kind)


@ways
@pytest.mark.parametrize("kind", ["timeout", "deadline", "date", "event", "end of a fence", "end of a pipeline", "memory"])
async def test_every_trigger_stops_a_run_of_every_kind(way: Way, kind: str) -> None:
    async def work(item: int) -> None:
        await asyncio.Event().wait()

    pipeline = Pipeline([1], cancel_on=reasonable(kind)) >> stage(work)
    assert why(await asyncio.wait_for(way(pipeline), LIMIT)) == [kind]
    assert account(pipeline).outcome == "cancelled"


@ways
async def test_the_end_of_another_pipeline_stops_a_run_whatever_thread_it_ends_in(way: Way) -> None:
    gate = Gate()
    other = Pipeline([1, 2], name="other") >> stage(abs)
    pipeline = Pipeline([1], cancel_on=EndTrigger(other, code="no more")) >> stage(_never)
    run = asyncio.create_task(way(pipeline))
    await eventually(lambda: other.ending._watchers)
    assert await asyncio.to_thread(listed, other) == [1, 2]
    result = await asyncio.wait_for(run, LIMIT)
    assert why(result) == ["no more"]
    assert result.reasons[0].message == "pipeline 'other' completed"
    assert result.reasons[0].cancel_type is CancelType.PIPELINE
    assert other.ending._watchers == {}
    assert gate.began == 0


async def _never(item: int) -> None:
    await asyncio.Event().wait()


# --- everybody learns why


@ways
async def test_all_reasons_are_in_result_report_snapshot_and_log(way: Way) -> None:
    first, second = Manual("first"), Manual("second")

    async def work(item: int) -> None:
        first.fire()
        second.fire()
        await asyncio.Event().wait()

    pipeline = Pipeline([1], name="p", cancel_on=[first, second], log=True) >> stage(work)
    with capture_logs() as logs:
        result = await way(pipeline)
    codes = ["first", "second"]
    assert why(result) == [reason.code for reason in account(pipeline).reasons] == codes
    assert [reason.code for reason in pipeline.snapshot().reasons] == codes
    assert [reason["code"] for reason in json.loads(json.dumps(account(pipeline).to_dict()))["reasons"]] == codes
    assert pipeline.runtime.reason == "first fired"
    assert [entry["code"] for entry in logs if entry["event"] == "pipeline asked to stop"] == codes
    assert next(entry for entry in logs if entry["event"] == "pipeline stopped")["reasons"] == ["first fired", "second fired"]
    assert "first fired" in account(pipeline).explain()
    assert "second fired" in account(pipeline).explain()


def deep() -> list[str | None]:
    """Code far below that holds neither fence nor state."""
    return [reason.code for reason in get_current_reasons()]


async def deep_async() -> list[str | None]:
    await asyncio.sleep(0)
    return await asyncio.create_task(asyncio.to_thread(deep))


def tell(journal: Journal, state: WorkerState) -> None:
    journal.write(json.dumps([[reason.code for reason in state.reasons], deep()]))


def polls(pair: tuple[Journal, Flag], state: WorkerState) -> None:
    journal, working = pair
    working.set()
    while not state.cancelled:
        time.sleep(0.001)
    tell(journal, state)


async def is_interrupted(pair: tuple[Journal, Flag], state: WorkerState) -> None:
    journal, working = pair
    working.set()
    try:
        await asyncio.Event().wait()
    finally:
        tell(journal, state)


async def is_interrupted_and_asks_deeper(pair: tuple[Journal, Flag], state: WorkerState) -> None:
    journal, working = pair
    working.set()
    try:
        await asyncio.Event().wait()
    finally:
        journal.write(json.dumps([[reason.code for reason in state.reasons], await deep_async()]))


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize(
    ("run_in", "handler"),
    [
        ("loop", is_interrupted),
        ("loop", is_interrupted_and_asks_deeper),
        ("thread", polls),
        ("thread", is_interrupted),
        ("process", polls),
        ("process", is_interrupted),
    ],
)
async def test_the_reason_reaches_handlers_and_code_deep_below(
    tmp_path: Path, run_in: str, handler: Any, concurrency: int
) -> None:
    trigger, journal, working = Manual("why"), Journal(tmp_path / "journal"), Flag(tmp_path / "working")
    pipeline = Pipeline([(journal, working)], cancel_on=trigger) >> stage(run_in=run_in, concurrency=concurrency)(handler)
    run = asyncio.create_task(pipeline.run())
    await eventually(working.is_set)
    trigger.fire()
    assert why(await run) == ["why"]
    assert [json.loads(line) for line in journal.lines()] == [[["why"], ["why"]]]
    assert deep() == []


async def test_a_drain_tells_its_reason_to_handlers_that_go_on() -> None:
    told: list[Any] = []
    trigger = Manual("enough")
    trigger.drain = True  # type: ignore[attr-defined]

    async def work(item: int, state: WorkerState) -> int:
        trigger.fire()
        await turns()
        told.append((state.cancelled, [reason.code for reason in state.reasons], deep()))
        return item

    pipeline = Pipeline(range(100), cancel_on=trigger) >> stage(work)
    result = await pipeline.run()
    assert why(result)[0] == "enough"
    assert told[0] == (False, ["enough"], ["enough"])


# --- a fence around a run


@pytest.mark.parametrize("way", [by_run, by_collect, by_async_iter])
async def test_a_fence_around_a_run_stops_it_and_its_reasons_are_in_the_report(way: Way) -> None:
    trigger, gate = Manual("deadline"), Gate()
    pipeline = Pipeline([1, 2], name="p") >> stage(gate.__call__)
    task = asyncio.current_task()
    assert task is not None
    with Fence(trigger, Manual("silent")) as fence:
        firing = asyncio.create_task(_fire_when(gate.entered, trigger))
        await way(pipeline)
        raise AssertionError("not reached")
    await firing
    assert fence.cancelled_caught
    assert task.cancelling() == 0
    assert [reason.code for reason in account(pipeline).reasons] == ["deadline", "parent_cancelled"]
    assert account(pipeline).outcome == "cancelled"
    assert fence.explain().splitlines()[1:] == [
        "  stopped with it: pipeline 'p': cancelled, 1 taken from the source, 0 delivered"
    ]


async def _fire_when(entered: asyncio.Event, trigger: Manual) -> None:
    await entered.wait()
    trigger.fire()


async def test_fences_around_fences_around_a_run_are_all_in_its_report_innermost_first() -> None:
    shared, gate = Manual("shared"), Gate()
    pipeline = Pipeline([1]) >> stage(gate.__call__)
    with Fence(shared) as outer, Fence(Manual("early", fired=False), shared):
        firing = asyncio.create_task(_fire_when(gate.entered, shared))
        await pipeline.run()
    await firing
    assert outer.cancelled_caught
    assert [reason.code for reason in account(pipeline).reasons] == ["shared", "parent_cancelled"]


async def test_a_cancellation_from_outside_goes_through_fence_and_run() -> None:
    gate = Gate()
    pipeline = Pipeline([1]) >> stage(gate.__call__)
    fences: list[Fence] = []

    async def main() -> None:
        with Fence(TimeoutTrigger(60)) as fence:
            fences.append(fence)
            await pipeline.run()

    task = asyncio.create_task(main())
    await gate.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert task.cancelling() == 1
    assert not fences[0].cancelled
    assert [reason.code for reason in account(pipeline).reasons] == ["parent_cancelled"]


async def test_a_fence_around_a_run_that_was_stopped_already_waits_for_the_end_and_adds_its_reason() -> None:
    entered, cleaning, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work(item: int) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await go_on.wait()

    pipeline = Pipeline([1], cancel_on=(first := Manual("first"))) >> stage(work)
    late = Manual("late")

    async def fire() -> None:
        await entered.wait()
        first.fire()
        await cleaning.wait()
        late.fire()
        await turns()
        go_on.set()

    firing = asyncio.create_task(fire())
    with Fence(late) as fence:
        await pipeline.run()
    await firing
    assert fence.cancelled_caught
    assert [reason.code for reason in account(pipeline).reasons] == ["first", "late", "parent_cancelled"]


async def test_a_run_in_a_fence_that_has_fired_already_stops_at_once() -> None:
    pipeline = Pipeline(range(10)) >> stage(_never)
    with Fence(Manual("budget", fired=True)) as fence:
        await pipeline.run()
    assert fence.cancelled_caught
    assert account(pipeline).reasons[0].code == "budget"


# --- fences inside handlers


async def fenced(item: int) -> tuple[int, list[str | None]]:
    with Fence(TimeoutTrigger(0.005, code="slow")) as fence:
        if item % 2:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    return item, [reason.code for reason in fence.reasons] if fence.cancelled_caught else []


@pytest.mark.parametrize("options", [{}, {"concurrency": 3, "ordered": True}, {"retry": 2}, {"timeout": 20}], ids=str)
@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_fence_inside_a_handler_stops_its_own_body_and_no_more(run_in: str, options: dict[str, Any]) -> None:
    pipeline = Pipeline(range(6)) >> stage(abs) >> stage(run_in=run_in, **options)(fenced) >> stage(lambda pair: pair)
    assert await pipeline.collect() == [(n, ["slow"] if n % 2 else []) for n in range(6)]
    assert account(pipeline).failed == 0


async def waits_in_a_fence(pair: tuple[Journal, Flag]) -> None:
    journal, working = pair
    with Fence(TimeoutTrigger(60)) as fence:
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            journal.write(json.dumps([fence.cancelled, deep()]))
    journal.write("went on")


@pytest.mark.parametrize("options", [{}, {"concurrency": 3}], ids=str)
@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_an_abort_goes_through_a_fence_inside_a_handler(tmp_path: Path, run_in: str, options: dict[str, Any]) -> None:
    trigger, journal, working = Manual("why"), Journal(tmp_path / "journal"), Flag(tmp_path / "working")
    pipeline = Pipeline([(journal, working)], cancel_on=trigger) >> stage(run_in=run_in, **options)(waits_in_a_fence)
    run = asyncio.create_task(pipeline.run())
    await eventually(working.is_set)
    trigger.fire()
    assert why(await run) == ["why"]
    assert [json.loads(line) for line in journal.lines()] == [[False, ["why"]]]
    assert account(pipeline).stages[0].cancelled == 1


async def test_a_fence_in_a_handler_of_an_aborted_run_is_in_the_tree_of_the_fence_around_it() -> None:
    entered, trigger = asyncio.Event(), Manual("client left")

    async def work(item: int) -> None:
        with Fence(TimeoutTrigger(60)):
            entered.set()
            await asyncio.Event().wait()

    pipeline = Pipeline([1], name="p") >> stage(work)
    with Fence(trigger) as fence:
        firing = asyncio.create_task(_fire_when(entered, trigger))
        await pipeline.run()
    await firing
    lines = fence.explain().splitlines()
    assert lines[1] == "  stopped with it: pipeline 'p': cancelled, 1 taken from the source, 0 delivered"
    assert lines[2].startswith("    stopped with it: fence in task ")
    assert lines[2].endswith(": no reason of its own")


async def test_a_fence_around_a_yield_of_an_async_generator_source_leaves_the_run_alone() -> None:
    async def source() -> AsyncIterator[int]:
        for n in range(3):
            with Fence(TimeoutTrigger(0.002)):
                await asyncio.Event().wait()
            yield n

    assert await (Pipeline(source) >> stage(abs)).collect() == [0, 1, 2]


# --- pipelines inside pipelines


async def test_a_run_inside_a_handler_is_stopped_with_the_outer_one_and_knows_why() -> None:
    entered, inner_reports = asyncio.Event(), list[RunReport]()

    async def innermost(item: int) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def work(item: int) -> None:
        inner = Pipeline([1], name="inner") >> stage(innermost)
        try:
            await inner.run()
        finally:
            inner_reports.append(account(inner))

    trigger = Manual("shutdown")
    outer = Pipeline([1], cancel_on=trigger) >> stage(work)
    run = asyncio.create_task(outer.run())
    await entered.wait()
    trigger.fire()
    assert why(await run) == ["shutdown"]
    assert [reason.code for reason in inner_reports[0].reasons] == ["shutdown", "parent_cancelled"]


async def test_when_the_task_of_the_outer_run_is_cancelled_the_inner_one_tells_it_once() -> None:
    entered, inner_reports = asyncio.Event(), list[RunReport]()

    async def innermost(item: int) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def work(item: int) -> None:
        inner = Pipeline([1], name="inner") >> stage(innermost)
        try:
            await inner.run()
        finally:
            inner_reports.append(account(inner))

    run = asyncio.create_task((Pipeline([1], name="outer") >> stage(work)).run())
    await entered.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    messages = [reason.message for reason in inner_reports[0].reasons]
    assert len(messages) == len(set(messages)), messages


async def test_the_triggers_of_a_pipeline_that_is_part_of_another_are_not_armed() -> None:
    inner, outer = Manual("inner"), Manual("outer")
    pipeline = Pipeline(Pipeline([1], cancel_on=inner), cancel_on=outer) >> stage(abs)
    await pipeline.run()
    assert (inner.diary, outer.diary) == ([], ["arm outer", "disarm outer"])


async def test_a_fence_stops_two_runs_in_a_task_group_and_each_reports_it() -> None:
    gates, trigger = [Gate(), Gate()], Manual("shutdown")
    pipelines = [Pipeline([1]) >> stage(gate.__call__) for gate in gates]
    with Fence(trigger) as fence:
        async with asyncio.TaskGroup() as group:
            for pipeline in pipelines:
                group.create_task(pipeline.run())
            for gate in gates:
                await gate.entered.wait()
            trigger.fire()
            await asyncio.Event().wait()
    assert fence.cancelled_caught
    for pipeline in pipelines:
        assert [reason.code for reason in account(pipeline).reasons] == ["shutdown", "parent_cancelled"]


# --- iterations from synchronous code


def test_an_iteration_collected_as_garbage_in_another_thread_gives_its_signal_back() -> None:
    heard: list[int] = []
    before = signal.signal(USR1, lambda signum, _frame: heard.append(signum))
    items: Iterator[int] = (Pipeline(lambda: iter(range(10**9)), cancel_on=SignalTrigger(USR1)) >> stage(abs)).iter()
    assert next(items) == 0
    box: list[Any] = [items]
    del items

    def drop() -> None:
        box.clear()
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join(LIMIT)
    signal.raise_signal(USR1)
    assert heard == [USR1]
    assert signals._SignalHub._hubs == {}
    signal.signal(USR1, before)


def test_two_iterations_at_once_hear_one_signal_and_the_last_gives_it_back() -> None:
    before, trigger = signal.getsignal(USR1), SignalTrigger(USR1, code="stop")
    pipelines = [Pipeline(lambda: iter(range(10**9)), cancel_on=trigger) >> stage(abs) for _ in range(2)]
    iterations = [pipeline.iter() for pipeline in pipelines]
    for iteration in iterations:
        next(iteration)
    signal.raise_signal(USR1)
    for iteration in iterations:
        with pytest.raises(PipelineCancelled) as caught:
            list(iteration)
        assert why(caught.value) == ["stop"]
    assert signal.getsignal(USR1) is before


def test_a_signal_trigger_in_an_iteration_of_another_thread_is_an_error_that_says_what_to_do() -> None:
    errors: list[BaseException] = []

    def use() -> None:
        try:
            list((Pipeline([1], cancel_on=SignalTrigger(USR1)) >> stage(abs)).iter())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(LIMIT)
    assert "main thread" in str(errors[0])
    assert "hold()" in str(errors[0])


ITERATION = """
    import itertools, signal, time
    from pipeline import Pipeline, PipelineCancelled, SignalTrigger
    from stages import stage

    @stage(run_in={run_in!r})
    def work(item):
        time.sleep(0.005)
        return item

    def source():
        for n in itertools.count():
            yield n

    if __name__ == "__main__":
        pipeline = Pipeline(source, cancel_on={cancel_on}) >> work
        seen = 0
        try:
            for item in pipeline.iter(uvloop={uvloop}):
                seen += 1
                if seen == 3:
                    print("working", flush=True)
        except PipelineCancelled as error:
            report = error.report
            print(report.outcome, report.drained, report.balanced, report.delivered == report.pulled == seen, flush=True)
            print(error.reasons[0], flush=True)
        except KeyboardInterrupt:
            print("KeyboardInterrupt", pipeline.report.reasons[0].code, flush=True)
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
"""


@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
def test_ctrl_c_drains_an_iteration_that_asks_for_it(tmp_path: Path, run_in: str, use_uvloop: bool) -> None:
    source = ITERATION.format(run_in=run_in, uvloop=use_uvloop, cancel_on="SignalTrigger(signal.SIGINT, drain=True)")
    with Program(tmp_path, source) as program:
        program.says("working")
        program.interrupt(signal.SIGINT, group=True)
        finished = program.finish()
    assert finished.out.splitlines()[1:] == ["cancelled True True True", "received SIGINT", "True"]
    assert (finished.code, finished.err) == (0, "")


def test_ctrl_c_without_a_trigger_is_a_keyboard_interrupt_as_ever(tmp_path: Path) -> None:
    with Program(tmp_path, ITERATION.format(run_in="loop", uvloop=False, cancel_on="()")) as program:
        program.says("working")
        program.interrupt(signal.SIGINT)
        finished = program.finish()
    assert finished.out.splitlines()[1:] == ["KeyboardInterrupt iter_closed", "True"]
    assert (finished.code, finished.err) == (0, "")


BLOCKED = """
    import asyncio, signal, time
    from pipeline import Pipeline, SignalTrigger
    from stages import stage

    @stage
    def work(item, state):
        print("working", flush=True)
        while not state.cancelled:
            time.sleep(0.001)
        print(*state.reasons, flush=True)

    async def main():
        result = await (Pipeline([1, 2, 3], cancel_on=SignalTrigger(signal.SIGINT)) >> work).run()
        print(result.report.outcome, result.report.balanced, flush=True)

    asyncio.run(main())
"""


def test_a_loop_blocked_by_a_plain_handler_that_looks_at_its_state_stops_at_ctrl_c(tmp_path: Path) -> None:
    with Program(tmp_path, BLOCKED) as program:
        program.says("working")
        program.interrupt(signal.SIGINT)
        finished = program.finish()
    assert finished.out.splitlines() == ["working", "received SIGINT", "cancelled True"]
    assert (finished.code, finished.err) == (0, "")


# --- what is kept


async def test_a_fence_that_is_kept_does_not_keep_what_a_stopped_run_had_in_hand() -> None:
    class Large:
        pass

    kept: list[Any] = []
    entered, trigger = asyncio.Event(), Manual()

    async def work(item: Large) -> None:
        kept.append(weakref.ref(item))
        entered.set()
        await asyncio.Event().wait()

    async def main() -> Fence:
        pipeline = Pipeline(lambda: [Large() for _ in range(3)]) >> stage(work)
        with Fence(trigger) as fence:
            firing = asyncio.create_task(_fire_when(entered, trigger))
            await pipeline.run()
        await firing
        return fence

    fence = await main()
    await turns()
    gc.collect()
    assert kept[0]() is None
    assert "pipeline 'pipeline': cancelled, " in fence.explain()


def test_a_whole_run_with_every_trigger_works_on_uvloop() -> None:
    async def main() -> Any:
        event, other = asyncio.Event(), Pipeline([1]) >> stage(abs)
        deadline = DeadlineTrigger(asyncio.get_running_loop().time() + 60)
        triggers = [deadline, TimeoutTrigger(60), EventTrigger(event), SignalTrigger(USR1), EndTrigger(other, code="end")]
        pipeline = Pipeline([1, 2], cancel_on=triggers, grace=Grace()) >> stage(_never)
        run = asyncio.create_task(pipeline.run())
        await eventually(lambda: other.ending._watchers)
        await other.run()
        return await run

    before = signal.getsignal(USR1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert why(runner.run(main())) == ["end"]
    assert signal.getsignal(USR1) is before
    assert signals._Waker._wakers == {}
