"""How a run stops: the states, the graces, the handle, who may cancel from where, and what is left of the items."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import LIMIT, Gate, Journal, Program, Tracked, alive, assert_balanced, eventually, run_program

from pipeline import (
    CancelReason,
    CancelType,
    Err,
    ErrorPolicy,
    EventTrigger,
    Grace,
    Pipeline,
    PipelineCancelled,
    PipelineError,
    PipelineState,
    RunReport,
    TimeoutTrigger,
)
from stages import KillSwitch, mix_pool, stage

SLACK = 3.0
"""Seconds that a stop may take beyond its graces on a busy machine; what is wrong here takes much longer, or for ever."""
"""Seconds by which a stop may outlast its graces, by contract."""


def stopped(result: RunReport | Err) -> RunReport:
    """The report of a run that did not complete, its ledger checked."""
    assert isinstance(result, Err), result
    assert result.report is not None
    assert_balanced(result.report)
    return result.report


def drained(result: RunReport | Err) -> RunReport:
    report = stopped(result)
    assert report.outcome == "cancelled"
    assert report.drained
    assert all(row.cancelled == row.discarded == 0 for row in report.stages)
    return report


class Deaf:
    """An async handler that swallows every cancellation until it is released."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.released = asyncio.Event()
        self.heard = 0
        self.tasks: list[asyncio.Task[Any]] = []

    async def __call__(self, item: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        self.entered.set()
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.heard += 1
        return item

    async def end(self) -> None:
        self.released.set()
        await asyncio.wait(self.tasks)


class Tidy:
    """An async handler that, once cancelled, cleans up until the test lets it."""

    def __init__(self) -> None:
        self.entered, self.cleaning, self.may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.clean = False

    async def __call__(self, item: Any) -> Any:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cleaning.set()
            await self.may_end.wait()
            self.clean = True


async def started(pipeline: Pipeline[Any], entered: asyncio.Event) -> asyncio.Task[RunReport | Err]:
    """Run a pipeline in a task, as far as an event of its handler."""
    run = asyncio.create_task(pipeline.run())
    waiting = asyncio.create_task(entered.wait())
    await asyncio.wait((run, waiting), return_when=asyncio.FIRST_COMPLETED)
    assert waiting.done(), f"the run has ended: {run.result()}"
    return run


def gated(gate: Callable[[Any], Any], source: Any = range(100), *, grace: Grace | None = None, **options: Any) -> Pipeline[Any]:
    return Pipeline(source, grace=grace or Grace()) >> stage(name="gate", **options)(gate.__call__)


# --- states


async def test_a_pipeline_is_new_before_its_first_run() -> None:
    assert gated(Gate()).snapshot().state is PipelineState.NEW


async def test_a_pipeline_is_running_while_it_runs_and_closed_after() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    assert pipeline.snapshot().state is PipelineState.RUNNING
    gate.opened.set()
    await run
    assert pipeline.snapshot().state is PipelineState.CLOSED


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"drain": True}, PipelineState.DRAINING),
        ({}, PipelineState.ABORTING),
        ({"force": True}, PipelineState.KILLING),
    ],
    ids=["drain", "abort", "force"],
)
async def test_the_state_tells_at_once_how_a_pipeline_stops(options: dict[str, bool], state: PipelineState) -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    pipeline.cancel("stop", **options)
    assert pipeline.snapshot().state is state
    gate.opened.set()
    stopped(await run)


async def test_escalation_goes_one_way_through_every_state() -> None:
    tidy = Tidy()
    pipeline = gated(tidy)
    run = await started(pipeline, tidy.entered)
    seen = [pipeline.snapshot().state]
    for options in ({"drain": True}, {}, {"drain": True}, {"force": True}, {}, {"drain": True}):
        pipeline.cancel("stop", **options)
        seen.append(pipeline.snapshot().state)
    tidy.may_end.set()
    stopped(await run)
    running, draining, aborting, killing = (
        PipelineState.RUNNING,
        PipelineState.DRAINING,
        PipelineState.ABORTING,
        PipelineState.KILLING,
    )
    assert seen == [running, draining, aborting, aborting, killing, killing, killing]


async def test_the_cancel_event_is_set_by_an_abort() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    assert not pipeline.runtime.cancel_event.is_set()
    pipeline.cancel("stop")
    assert pipeline.runtime.cancel_event.is_set()
    await run


async def test_the_registers_of_the_runtime_are_empty_after_a_stop() -> None:
    gate = Gate()
    pipeline = Pipeline(Tracked()) >> stage(run_in="thread")(abs) >> stage(run_in="process")(abs) >> stage(gate.__call__)
    run = await started(pipeline, gate.entered)
    runtime = pipeline.runtime
    assert runtime.tasks
    assert runtime.threads
    assert runtime.processes
    pipeline.cancel("stop")
    await run
    assert (runtime.threads, runtime.processes) == (set(), set())
    await eventually(lambda: not runtime.tasks)  # the supervisor itself takes one more turn


# --- graces


async def test_a_handler_that_cleans_up_in_time_is_waited_for() -> None:
    tidy = Tidy()
    pipeline = gated(tidy)
    run = await started(pipeline, tidy.entered)
    pipeline.cancel("stop")
    await tidy.cleaning.wait()
    assert not run.done()
    tidy.may_end.set()
    report = stopped(await run)
    assert tidy.clean
    assert report.abandoned == ()


async def test_a_handler_that_swallows_cancellation_ends_in_an_err_within_the_abort_grace() -> None:
    deaf, grace = Deaf(), Grace(abort=0.2)
    pipeline = gated(deaf, grace=grace)
    run = await started(pipeline, deaf.entered)
    began = time.monotonic()
    pipeline.cancel("stop")
    report = stopped(await run)
    took = time.monotonic() - began
    await deaf.end()
    assert grace.abort <= took < grace.abort + SLACK
    assert report.outcome == "cancelled"


async def test_a_task_that_could_not_be_stopped_is_named_with_its_stage() -> None:
    deaf = Deaf()
    pipeline = gated(deaf, grace=Grace(abort=0.05))
    run = await started(pipeline, deaf.entered)
    pipeline.cancel("stop")
    report = stopped(await run)
    await deaf.end()
    assert len(report.abandoned) == 1
    assert "gate" in report.abandoned[0]
    assert report.abandoned[0] in report.explain()


async def test_nothing_that_an_abandoned_handler_does_later_changes_the_report() -> None:
    deaf = Deaf()
    pipeline = gated(deaf, grace=Grace(abort=0.05))
    run = await started(pipeline, deaf.entered)
    pipeline.cancel("stop")
    report = stopped(await run)
    before = report.to_dict(), pipeline.snapshot().to_dict()
    await deaf.end()
    assert (report.to_dict(), pipeline.snapshot().to_dict()) == before
    assert_balanced(report)


@pytest.mark.abandons("thread")
async def test_a_thread_that_sleeps_is_named_and_not_waited_for(release: threading.Event) -> None:
    entered, loop, grace = asyncio.Event(), asyncio.get_running_loop(), Grace(abort=0.1)

    def sleepy(item: int) -> None:
        loop.call_soon_threadsafe(entered.set)
        release.wait()

    pipeline = Pipeline([1], grace=grace) >> stage(run_in="thread")(sleepy)
    run = await started(pipeline, entered)
    began = time.monotonic()
    pipeline.cancel("stop")
    report = stopped(await run)
    assert time.monotonic() - began < grace.abort + SLACK
    assert len(report.abandoned) == 1
    assert "sleepy" in report.abandoned[0]


def test_a_thread_that_sleeps_does_not_block_the_exit(tmp_path: Path) -> None:
    program = """
        import asyncio, threading
        from pipeline import Grace, Pipeline
        from stages import stage

        async def main():
            entered, loop = asyncio.Event(), asyncio.get_running_loop()

            @stage(run_in="thread")
            def sleepy(item):
                loop.call_soon_threadsafe(entered.set)
                threading.Event().wait(60)

            pipeline = Pipeline([1], grace=Grace(abort=0.1)) >> sleepy
            run = asyncio.create_task(pipeline.run())
            await entered.wait()
            pipeline.cancel("stop")
            print((await run).report.outcome)

        asyncio.run(main())
    """
    finished = run_program(tmp_path, program)
    assert (finished.code, finished.out, finished.err) == (0, "cancelled\n", "")


async def test_a_source_that_blocks_in_next_is_named_and_not_waited_for() -> None:
    blocked, end = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        blocked.set()
        end.wait(LIMIT)

    grace = Grace(abort=0.1)
    pipeline = Pipeline(source, grace=grace) >> stage(abs)
    run = asyncio.create_task(pipeline.run())
    await eventually(blocked.is_set)
    threads, began = set(pipeline.runtime.threads), time.monotonic()
    pipeline.cancel("stop")
    report = stopped(await run)
    took = time.monotonic() - began
    end.set()
    for thread in threads:
        thread.join(LIMIT)
    assert took < grace.abort + SLACK
    assert any("source" in name for name in report.abandoned)


async def test_processes_that_ignore_sigterm_are_killed_all_within_one_grace(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    @stage(run_in="process", concurrency=3, buffer=1)
    def stubborn(item: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        journal.write(os.getpid())
        while True:
            signal.pause()

    grace = Grace(abort=0.1, terminate=0.3, kill=1.0)
    pipeline = Pipeline(range(50), grace=grace) >> stubborn
    run = asyncio.create_task(pipeline.run())
    await eventually(lambda: len(journal.lines()) == 3)
    workers = [psutil.Process(process.pid) for process in pipeline.runtime.processes]
    began = time.monotonic()
    await pipeline.cancel("stop")
    took = time.monotonic() - began
    assert alive(workers) == []
    assert took < grace.abort + grace.terminate + SLACK  # killed ones are gone at once
    assert {str(worker.pid) for worker in workers} == set(journal.lines())
    stopped(await run)


async def test_force_does_not_wait_for_the_abort_grace() -> None:
    deaf = Deaf()
    pipeline = gated(deaf, grace=Grace(abort=30))
    run = await started(pipeline, deaf.entered)
    began = time.monotonic()
    await pipeline.cancel("now", force=True)
    took = time.monotonic() - began
    stopped(await run)
    await deaf.end()
    assert took < SLACK


async def test_force_after_an_abort_ends_the_abort_grace() -> None:
    tidy = Tidy()
    pipeline = gated(tidy, grace=Grace(abort=30))
    run = await started(pipeline, tidy.entered)
    pipeline.cancel("stop")
    await tidy.cleaning.wait()
    began = time.monotonic()
    assert pipeline.cancel("now", force=True)
    stopped(await run)
    assert time.monotonic() - began < SLACK


# --- the handle


async def test_the_handle_is_truthy_for_the_call_that_began_the_stop_and_falsy_for_the_next() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    assert [bool(pipeline.cancel("a")), bool(pipeline.cancel("b"))] == [True, False]
    await run


async def test_the_handle_is_truthy_for_every_escalation() -> None:
    tidy = Tidy()
    pipeline = gated(tidy)
    run = await started(pipeline, tidy.entered)
    calls: list[dict[str, bool]] = [{"drain": True}, {"drain": True}, {}, {}, {"force": True}, {"force": True}]
    assert [bool(pipeline.cancel("x", **options)) for options in calls] == [True, False, True, False, True, False]
    tidy.may_end.set()
    await run


async def test_the_handle_resolves_to_the_result_of_the_run() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    result = await pipeline.cancel("why")
    assert isinstance(result, Err)
    assert (result.value, result.reason) == ("why", "why")
    assert result is await run


async def test_the_handle_may_be_awaited_on_the_loop_of_another_thread() -> None:
    gate, results = Gate(), []
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)

    async def cancel() -> None:
        results.append(await pipeline.cancel("from afar"))

    thread = threading.Thread(target=lambda: asyncio.run(cancel()))
    thread.start()
    result = await run
    await eventually(lambda: not thread.is_alive())
    assert results == [result]


async def test_giving_up_the_wait_for_a_handle_leaves_the_others_waiting() -> None:
    tidy = Tidy()
    pipeline = gated(tidy)
    run = await started(pipeline, tidy.entered)
    handle = pipeline.cancel("stop")
    impatient, patient = asyncio.ensure_future(_await(handle)), asyncio.ensure_future(_await(handle))
    await tidy.cleaning.wait()
    impatient.cancel()
    await asyncio.wait((impatient,))
    tidy.may_end.set()
    assert await patient is await run


async def _await(handle: Any) -> Any:
    return await handle


async def test_a_handler_that_awaits_the_handle_gets_a_pipeline_error() -> None:
    caught: list[BaseException] = []

    async def handler(item: int) -> None:
        await _suicidal(caught, pipeline)

    pipeline = Pipeline([1]) >> stage(handler)
    stopped(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert isinstance(caught[0], PipelineError)


async def _suicidal(caught: list[BaseException], pipeline: Pipeline[Any]) -> None:
    try:
        await pipeline.cancel("from inside")
    except PipelineError as error:
        caught.append(error)


async def test_a_coroutine_in_a_worker_thread_that_awaits_the_handle_gets_a_pipeline_error() -> None:
    caught: list[BaseException] = []

    async def handler(item: int) -> None:
        await _suicidal(caught, pipeline)

    pipeline = Pipeline([1]) >> stage(run_in="thread")(handler)
    stopped(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert isinstance(caught[0], PipelineError)


async def test_a_branch_of_a_fork_that_awaits_the_handle_gets_a_pipeline_error() -> None:
    caught: list[BaseException] = []

    async def branch(item: int) -> None:
        await _suicidal(caught, pipeline)

    @mix_pool(fork_merge=list)
    def fork() -> list[Any]:
        return [branch, branch]

    pipeline = Pipeline([1]) >> fork
    stopped(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert isinstance(caught[0], PipelineError)


async def test_an_error_handler_that_awaits_the_handle_gets_a_pipeline_error() -> None:
    caught: list[BaseException] = []

    async def side(err: Err) -> None:
        await _suicidal(caught, pipeline)

    pipeline = Pipeline([0]) >> stage(error_handler=side)(lambda item: 1 // item)
    stopped(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert isinstance(caught[0], PipelineError)


@pytest.mark.parametrize("hook", ["setup", "teardown"])
async def test_a_hook_that_awaits_the_handle_gets_a_pipeline_error(hook: str) -> None:
    caught: list[BaseException] = []

    async def hooked(state: Any) -> None:
        await _suicidal(caught, pipeline)

    options: dict[str, Any] = {hook: hooked}
    pipeline = Pipeline([1]) >> stage(**options)(abs)
    stopped(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert isinstance(caught[0], PipelineError)


async def test_an_async_source_that_awaits_the_handle_gets_a_pipeline_error() -> None:
    caught: list[BaseException] = []

    async def source() -> AsyncIterator[int]:
        yield 1
        await _suicidal(caught, pipeline)

    pipeline = Pipeline(source) >> stage(abs)
    stopped(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert isinstance(caught[0], PipelineError)


# --- cancelled from where


async def test_cancel_from_another_thread_stops_the_run() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    thread = threading.Thread(target=pipeline.cancel, args=("from a thread",))
    thread.start()
    report = stopped(await asyncio.wait_for(run, LIMIT))
    thread.join()
    assert [reason.message for reason in report.reasons] == ["from a thread"]


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_cancel_from_inside_a_handler_stops_the_run(run_in: str) -> None:
    def handler(item: int) -> int:
        if item == 3:
            pipeline.cancel("from inside")
        return item

    pipeline = Pipeline(Tracked()) >> stage(run_in=run_in)(handler)
    assert stopped(await asyncio.wait_for(pipeline.run(), LIMIT)).reasons[0].message == "from inside"


async def test_a_handler_that_cancels_is_itself_cancelled_at_its_next_await() -> None:
    reached: list[str] = []

    async def handler(item: int) -> None:
        pipeline.cancel("from inside")
        reached.append("before")
        await asyncio.Event().wait()
        reached.append("after")

    pipeline = Pipeline([1]) >> stage(handler)
    assert stopped(await asyncio.wait_for(pipeline.run(), LIMIT)).stages[0].cancelled == 1
    assert reached == ["before"]


async def test_cancel_from_a_signal_handler_stops_the_run() -> None:
    gate = Gate()
    pipeline = gated(gate)
    before = signal.signal(signal.SIGUSR1, lambda *_: pipeline.cancel("a signal"))
    try:
        run = await started(pipeline, gate.entered)
        os.kill(os.getpid(), signal.SIGUSR1)
        report = stopped(await asyncio.wait_for(run, LIMIT))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert report.reasons[0].message == "a signal"


async def test_a_pipeline_cancelled_before_its_start_refuses_to_start() -> None:
    source = Tracked()
    pipeline = Pipeline(source) >> stage(abs)
    assert pipeline.cancel("never mind")
    result = await pipeline.run()
    assert isinstance(result, Err)
    assert isinstance(result.value, PipelineCancelled)
    assert [reason.message for reason in result.reasons] == ["never mind"]
    assert source.pulled == 0


async def test_a_second_cancel_before_the_start_only_adds_its_reason() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    assert [bool(pipeline.cancel("a")), bool(pipeline.cancel("b"))] == [True, False]
    result = await pipeline.run()
    assert [reason.message for reason in result.reasons] == ["a", "b"]


async def test_the_handle_of_a_cancel_before_the_start_can_be_awaited() -> None:
    result = await asyncio.wait_for((Pipeline([1]) >> stage(abs)).cancel("no"), LIMIT)
    assert isinstance(result, Err)
    assert result.reason == "no"


async def test_collect_on_a_cancelled_pipeline_returns_the_err() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    pipeline.cancel("no")
    result = await pipeline.collect()
    assert isinstance(result, Err)
    assert result.reason == "no"


async def test_iterating_over_a_cancelled_pipeline_raises() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    pipeline.cancel("no")
    with pytest.raises(PipelineCancelled) as caught:
        await anext(pipeline.async_iter())
    assert caught.value.reasons[0].message == "no"


def test_iterating_synchronously_over_a_cancelled_pipeline_raises() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    pipeline.cancel("no")
    with pytest.raises(PipelineCancelled):
        next(pipeline.iter())


async def test_a_pipeline_cancelled_in_its_run_refuses_the_next_start() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    await pipeline.cancel("enough")
    await run
    result = await pipeline.run()
    assert isinstance(result, Err)
    assert result.reason == "enough"
    assert "gen()" in str(result.value)


async def test_gen_makes_a_cancelled_pipeline_runnable_again() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    pipeline.cancel("no")
    assert pipeline.gen([2, 3]) is pipeline
    assert await pipeline.collect() == [2, 3]


async def test_a_failed_pipeline_runs_again_without_gen() -> None:
    broken = True

    @stage(on_error=ErrorPolicy.RAISE)
    def fragile(item: int) -> int:
        if broken:
            raise ValueError("broken")
        return item

    pipeline = Pipeline([1]) >> fragile
    assert isinstance(await pipeline.run(), Err)
    broken = False
    assert await pipeline.collect() == [1]


async def test_a_cancel_after_a_success_is_falsy_and_does_not_prevent_another_run() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    assert isinstance(await pipeline.run(), RunReport)
    assert not pipeline.cancel("late")
    assert await pipeline.collect() == [1]


async def test_a_cancel_in_the_same_turn_as_the_start_stops_the_run() -> None:
    source = Tracked()
    pipeline = Pipeline(source) >> stage(abs)
    run = asyncio.create_task(pipeline.run())
    await asyncio.sleep(0)
    assert pipeline.cancel("at once")
    assert stopped(await asyncio.wait_for(run, LIMIT)).reasons[0].message == "at once"


async def test_eight_threads_that_cancel_at_once_begin_one_stop_and_keep_all_reasons() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    barrier, handles = threading.Barrier(8), []

    def cancel(number: int) -> None:
        barrier.wait()
        handles.append(pipeline.cancel(f"thread {number}"))

    threads = [threading.Thread(target=cancel, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = stopped(await asyncio.wait_for(run, LIMIT))
    assert sum(map(bool, handles)) == 1
    assert sorted(reason.message for reason in report.reasons) == [f"thread {n}" for n in range(8)]


async def test_threads_a_handler_and_a_signal_at_once_make_one_outcome_and_keep_all_reasons() -> None:
    entered, barrier = asyncio.Event(), threading.Barrier(9)

    async def handler(item: int) -> None:
        entered.set()
        await go.wait()
        pipeline.cancel("handler")
        await asyncio.Event().wait()

    go = asyncio.Event()
    pipeline = Pipeline([1]) >> stage(handler)
    before = signal.signal(signal.SIGUSR1, lambda *_: pipeline.cancel("signal"))

    def cancel(number: int) -> None:
        barrier.wait()
        pipeline.cancel(f"thread {number}")

    threads = [threading.Thread(target=cancel, args=(number,)) for number in range(8)]
    try:
        run = await started(pipeline, entered)
        for thread in threads:
            thread.start()
        go.set()
        barrier.wait()
        os.kill(os.getpid(), signal.SIGUSR1)
        for thread in threads:
            thread.join()
        report = stopped(await asyncio.wait_for(run, LIMIT))
    finally:
        signal.signal(signal.SIGUSR1, before)
    kept = {reason.message for reason in report.reasons}
    assert report.outcome == "cancelled"
    assert {f"thread {n}" for n in range(8)} | {"signal"} <= kept


# --- reasons


async def test_reasons_are_kept_in_order_and_the_first_is_primary() -> None:
    tidy = Tidy()
    pipeline = gated(tidy)
    run = await started(pipeline, tidy.entered)
    for message in ("one", "two", "three"):
        pipeline.cancel(message)
    tidy.may_end.set()
    result = await run
    report = stopped(result)
    assert [reason.message for reason in report.reasons] == ["one", "two", "three"]
    assert isinstance(result, Err)
    assert (result.value, result.reasons) == ("one", report.reasons)
    assert (pipeline.runtime.reason, pipeline.runtime.reasons) == ("one", report.reasons)


async def test_a_reason_has_a_code_a_type_an_origin_and_a_time() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    before = time.time()
    pipeline.cancel("why", code="because")
    (reason,) = stopped(await run).reasons
    assert (reason.message, reason.code, reason.cancel_type) == ("why", "because", CancelType.MANUAL)
    assert reason.origin
    assert before <= reason.at <= time.time()


async def test_a_reason_object_is_kept_as_it_is() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    reason = CancelReason("mine", CancelType.EVENT, code="own")
    pipeline.cancel(reason)
    assert stopped(await run).reasons == (reason,)


async def test_a_code_given_beside_a_reason_object_is_not_ignored() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    pipeline.cancel(CancelReason("mine", CancelType.EVENT), code="given")
    assert stopped(await run).reasons[0].code == "given"


async def test_a_trigger_in_cancel_on_stops_the_run() -> None:
    event, gate = asyncio.Event(), Gate()
    pipeline = Pipeline(range(9), cancel_on=[EventTrigger(event, code="shutdown")]) >> stage(gate.__call__)
    run = await started(pipeline, gate.entered)
    event.set()
    assert stopped(await asyncio.wait_for(run, LIMIT)).reasons[0].code == "shutdown"


async def test_a_timeout_in_cancel_on_stops_the_run() -> None:
    pipeline = Pipeline(range(9), cancel_on=[TimeoutTrigger(0.01)]) >> stage(Gate().__call__)
    assert stopped(await asyncio.wait_for(pipeline.run(), LIMIT)).reasons[0].cancel_type is CancelType.TIMEOUT


# --- draining


async def test_a_drain_stops_the_source_and_loses_nothing() -> None:
    gate, source = Gate(), Tracked()
    pipeline = gated(gate, source, concurrency=2, buffer=5)
    run = await started(pipeline, gate.entered)
    assert pipeline.cancel("enough", drain=True)
    gate.opened.set()
    report = drained(await asyncio.wait_for(run, LIMIT))
    assert report.delivered == report.pulled == source.pulled
    assert source.closed.is_set()


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_drain_of_ten_thousand_items_delivers_every_one(run_in: str) -> None:
    gate = Gate()
    pipeline = (
        Pipeline(range(1_000_000))
        >> stage(name="first")(abs)
        >> stage(name="gate", buffer=10_000)(gate.__call__)
        >> stage(name="last", run_in=run_in)(abs)
    )
    run = await started(pipeline, gate.entered)
    await eventually(lambda: pipeline.snapshot().pulled >= 10_000)
    pipeline.cancel("enough", drain=True)
    gate.opened.set()
    report = drained(await asyncio.wait_for(run, LIMIT))
    assert report.delivered == report.pulled >= 10_000


async def test_a_drain_past_its_deadline_becomes_an_abort() -> None:
    gate, grace = Gate(), Grace(drain=0.1, abort=0.2)
    pipeline = gated(gate, grace=grace)
    run = await started(pipeline, gate.entered)
    began = time.monotonic()
    pipeline.cancel("enough", drain=True)
    report = stopped(await asyncio.wait_for(run, LIMIT))
    assert time.monotonic() - began < grace.drain + grace.abort + SLACK
    assert (report.outcome, report.drained, gate.cancelled) == ("cancelled", False, 1)


async def test_an_abort_after_a_drain_is_not_drained() -> None:
    gate = Gate()
    pipeline = gated(gate)
    run = await started(pipeline, gate.entered)
    pipeline.cancel("slowly", drain=True)
    assert pipeline.cancel("now")
    report = stopped(await run)
    assert not report.drained
    assert [reason.message for reason in report.reasons] == ["slowly", "now"]


async def test_handlers_are_not_told_to_stop_during_a_drain() -> None:
    told: list[bool] = []
    gate = Gate()

    async def handler(item: int, state: Any) -> None:
        await gate(item)
        told.append(state.cancelled)

    pipeline = Pipeline([1, 2]) >> stage(handler)
    run = await started(pipeline, gate.entered)
    pipeline.cancel("slowly", drain=True)
    gate.opened.set()
    drained(await run)
    assert set(told) == {False}


async def test_a_drain_lets_an_async_source_clean_up() -> None:
    source = _AsyncSource()
    pipeline = Pipeline(source.items) >> stage(abs)
    run = await started(pipeline, source.waiting)
    pipeline.cancel("enough", drain=True)
    await source.closing.wait()
    source.may_close.set()
    drained(await asyncio.wait_for(run, LIMIT))
    assert source.closed


async def test_a_second_drain_does_not_interrupt_the_clean_up_of_an_async_source() -> None:
    source = _AsyncSource()
    pipeline = Pipeline(source.items) >> stage(abs)
    run = await started(pipeline, source.waiting)
    pipeline.cancel("enough", drain=True)
    await source.closing.wait()
    pipeline.cancel("I said enough", drain=True)
    for _ in range(10):
        await asyncio.sleep(0)
    source.may_close.set()
    drained(await asyncio.wait_for(run, LIMIT))
    assert source.closed


async def test_a_drain_does_not_interrupt_the_closing_of_an_async_source_that_has_ended() -> None:
    closing, may_close = asyncio.Event(), asyncio.Event()

    class Source:
        closed = False

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

        async def aclose(self) -> None:
            closing.set()
            await may_close.wait()
            self.closed = True

    source = Source()
    pipeline = Pipeline(source) >> stage(abs)
    run = await started(pipeline, closing)
    pipeline.cancel("enough", drain=True)
    for _ in range(10):
        await asyncio.sleep(0)
    may_close.set()
    drained(await asyncio.wait_for(run, LIMIT))
    assert source.closed


class _AsyncSource:
    """One item, then a wait, then a clean-up that takes until the test allows its end."""

    def __init__(self) -> None:
        self.waiting, self.closing, self.may_close = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.closed = False

    async def items(self) -> AsyncIterator[int]:
        try:
            yield 1
            self.waiting.set()
            await asyncio.Event().wait()
        finally:
            self.closing.set()
            await self.may_close.wait()
            self.closed = True


# --- failing and killing


async def test_raise_stops_the_run_and_returns_that_err() -> None:
    @stage(on_error=ErrorPolicy.RAISE)
    def fragile(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    result = await asyncio.wait_for((Pipeline(Tracked()) >> fragile).run(), LIMIT)
    assert stopped(result).outcome == "failed"
    assert isinstance(result, Err)
    assert isinstance(result.value, ValueError)
    assert (result.item, result.stage, result.attempts) == (3, "fragile", 1)
    assert "three" in result.trace


async def test_the_first_of_two_raises_is_the_result() -> None:
    both = asyncio.Barrier(2)

    @stage(on_error=ErrorPolicy.RAISE, concurrency=2)
    async def fragile(item: int) -> None:
        await both.wait()
        raise ValueError(item)

    result = await asyncio.wait_for((Pipeline([1, 2]) >> fragile).run(), LIMIT)
    report = stopped(result)
    assert isinstance(result, Err)
    assert str(result.value) in report.reasons[0].message
    assert report.reasons[0].cancel_type is CancelType.ERROR


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_a_kill_switch_says_in_words_what_its_reason_is(run_in: Any) -> None:
    def handler(item: int) -> Any:
        return KillSwitch(ValueError("too hot"))  # type: ignore[arg-type]

    report = stopped(await (Pipeline([1]) >> stage(run_in=run_in)(handler)).run())
    assert [reason.message for reason in report.reasons] == ["too hot"]


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_kill_switch_cancels_the_run_with_its_reason(run_in: str) -> None:
    @stage(run_in=run_in)
    def guard(item: int) -> Any:
        return KillSwitch("too hot") if item == 3 else item

    report = stopped(await asyncio.wait_for((Pipeline(Tracked()) >> guard).run(), LIMIT))
    assert (report.outcome, report.reasons[0].message) == ("cancelled", "too hot")
    assert report.stages[0].skipped == 1


@pytest.mark.parametrize("asynchronous", [False, True], ids=["generator", "async generator"])
async def test_a_kill_switch_that_a_generator_yields_cancels_the_run(asynchronous: bool) -> None:
    def steps(item: int) -> Iterator[Any]:
        yield item
        yield KillSwitch("too hot")

    async def later_steps(item: int) -> AsyncIterator[Any]:
        for output in steps(item):
            yield output

    report = stopped(await asyncio.wait_for((Pipeline(Tracked()) >> stage(later_steps if asynchronous else steps)).run(), LIMIT))
    assert (report.outcome, report.reasons[0].message) == ("cancelled", "too hot")


# --- the awaiting task is cancelled


async def test_cancelling_the_awaiting_task_raises_after_everything_is_closed() -> None:
    tidy = Tidy()
    pipeline = gated(tidy)
    run = await started(pipeline, tidy.entered)
    run.cancel()
    await tidy.cleaning.wait()
    assert not run.done()
    tidy.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert pipeline.snapshot().state is PipelineState.CLOSED
    assert_balanced(pipeline.snapshot())
    assert pipeline.runtime.reasons[0].cancel_type is CancelType.PARENT


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("how", ["run", "collect", "async_iter"])
async def test_cancelling_the_awaiting_task_keeps_the_count_of_requests(how: str, times: int) -> None:
    deaf, counts = Deaf(), []
    pipeline = gated(deaf, grace=Grace(abort=0.1))

    async def user() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if how == "async_iter":
                async for _ in pipeline:
                    pass
            else:
                await getattr(pipeline, how)()
        except asyncio.CancelledError:
            counts.append(task.cancelling())
            raise

    task = asyncio.create_task(user())
    await deaf.entered.wait()
    for _ in range(times):
        task.cancel()
        await eventually(lambda: deaf.heard >= 1)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(task), LIMIT)
    await deaf.end()
    assert counts == [times]


async def test_a_second_cancellation_of_the_awaiting_task_kills() -> None:
    deaf = Deaf()
    pipeline = gated(deaf, grace=Grace(abort=30))
    run = await started(pipeline, deaf.entered)
    run.cancel()
    await eventually(lambda: deaf.heard == 1)
    began = time.monotonic()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    took = time.monotonic() - began
    await deaf.end()
    assert took < SLACK


async def test_asyncio_timeout_around_a_run_times_out_and_closes_it() -> None:
    pipeline = gated(Gate())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await pipeline.run()
    assert pipeline.snapshot().state is PipelineState.CLOSED


# --- nobody is left waiting


async def test_cancelling_wakes_everyone_who_waits_for_room_in_a_full_channel() -> None:
    gate, source = Gate(), Tracked()
    pipeline = Pipeline(source)
    for number in range(5):
        pipeline = pipeline >> stage(buffer=1, concurrency=2, name=f"relay-{number}")(_relay)
    pipeline = pipeline >> stage(buffer=1, name="gate")(gate.__call__)
    run = await started(pipeline, gate.entered)
    await eventually(lambda: all(row.queued == row.capacity for row in pipeline.snapshot().stages))
    began = time.monotonic()
    await pipeline.cancel("stalled")
    took = time.monotonic() - began
    report = stopped(await run)
    assert took < SLACK
    assert report.abandoned == ()
    assert source.closed.is_set()


async def _relay(item: Any) -> Any:
    return item


async def test_cancelling_wakes_everyone_who_waits_for_an_item() -> None:
    silent = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        silent.set()
        await asyncio.Event().wait()
        yield 1

    pipeline = Pipeline(source)
    for _ in range(5):
        pipeline = pipeline >> stage(concurrency=2)(_relay)
    run = await started(pipeline, silent)
    began = time.monotonic()
    await pipeline.cancel("nothing comes")
    stopped(await run)
    assert time.monotonic() - began < SLACK


async def test_a_run_whose_consumer_is_stalled_can_be_cancelled() -> None:
    pipeline = Pipeline(Tracked()) >> stage(buffer=1)(abs)
    outputs = pipeline.async_iter(max_buffer=1)
    await anext(outputs)
    result = await asyncio.wait_for(pipeline.cancel("stalled"), LIMIT)
    stopped(result)
    with pytest.raises(PipelineCancelled):
        async for _ in outputs:
            pass


# --- nesting


@pytest.mark.parametrize("place", ["source", "stage"])
async def test_cancelling_a_nested_pipeline_cancels_the_one_around_it(place: str) -> None:
    gate = Gate()
    inner = Pipeline(range(100), name="inner") >> stage(gate.__call__)
    outer = Pipeline(inner if place == "source" else range(100), name="outer")
    outer = outer >> stage(abs) if place == "source" else outer >> inner >> stage(abs)
    run = await started(outer, gate.entered)
    assert inner.cancel("from within")
    report = stopped(await asyncio.wait_for(run, LIMIT))
    assert [reason.message for reason in report.reasons] == ["from within"]


async def test_a_nested_pipeline_that_was_cancelled_before_keeps_the_outer_one_from_starting() -> None:
    inner = Pipeline(name="inner") >> stage(abs)
    inner.cancel("not this one")
    result = await (Pipeline([1]) >> inner).run()
    assert isinstance(result, Err)
    assert result.reason == "not this one"


# --- the source is closed


@pytest.mark.parametrize("options", [{}, {"drain": True}, {"force": True}], ids=["abort", "drain", "force"])
async def test_the_finally_block_of_a_generator_source_runs_on_the_thread_that_drove_it(options: dict[str, bool]) -> None:
    threads: list[int] = []
    gate = Gate()

    def source() -> Iterator[int]:
        threads.append(threading.get_ident())
        try:
            yield from iter(int, 1)
        finally:
            threads.append(threading.get_ident())

    pipeline = gated(gate, source)
    run = await started(pipeline, gate.entered)
    pipeline.cancel("stop", **options)
    gate.opened.set()
    stopped(await run)
    assert len(threads) == 2
    assert threads[0] == threads[1] != threading.get_ident()


@pytest.mark.parametrize("options", [{}, {"drain": True}, {"force": True}], ids=["abort", "drain", "force"])
async def test_the_finally_block_of_an_async_generator_source_runs(options: dict[str, bool]) -> None:
    source, gate = _AsyncSource(), Gate()
    source.may_close.set()
    pipeline = gated(gate, source.items)
    run = await started(pipeline, gate.entered)
    await source.waiting.wait()
    pipeline.cancel("stop", **options)
    gate.opened.set()
    stopped(await run)
    assert source.closed


@pytest.mark.parametrize("options", [{}, {"drain": True}, {"force": True}], ids=["abort", "drain", "force"])
async def test_an_iterator_with_a_close_method_is_closed_once(options: dict[str, bool]) -> None:
    source, gate = Tracked(), Gate()
    pipeline = gated(gate, source)
    run = await started(pipeline, gate.entered)
    pipeline.cancel("stop", **options)
    gate.opened.set()
    stopped(await run)
    assert source.closes == 1


async def test_an_async_iterator_with_an_aclose_method_is_closed() -> None:
    class Source:
        closed = False

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> int:
            await asyncio.sleep(0)
            return 1

        async def aclose(self) -> None:
            self.closed = True

    source, gate = Source(), Gate()
    pipeline = gated(gate, source)
    run = await started(pipeline, gate.entered)
    pipeline.cancel("stop")
    stopped(await run)
    assert source.closed


async def test_the_source_is_closed_when_a_stage_fails() -> None:
    source = Tracked()
    result = await (Pipeline(source, on_error=ErrorPolicy.RAISE) >> stage(lambda item: 1 // 0)).run()
    assert stopped(result).outcome == "failed"
    assert source.closed.is_set()


# BUG: when the loop closes while a worker starts, what was opened for it stays open
async def test_a_run_that_is_killed_while_its_worker_processes_start_waits_for_them() -> None:
    pipeline = Pipeline(count()) >> stage(run_in="process", concurrency=2)(abs)
    running = asyncio.create_task(pipeline.run())
    await eventually(lambda: pipeline.runtime.starting)
    result = await pipeline.cancel("at once", force=True)
    assert isinstance(result, Err)
    assert result.report is not None
    assert result.report.abandoned == ()
    await running


async def test_a_cancel_that_meets_the_start_of_a_run_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    same = stage(abs)
    pipeline = Pipeline(count()) >> same
    # As from another thread: nothing runs yet, and the start has looked already whether it may.
    monkeypatch.setattr(type(same), "check", lambda *_: pipeline.cancel("meanwhile"))
    result = await pipeline.run()
    assert isinstance(result, Err)
    assert [str(reason) for reason in result.reasons] == ["meanwhile"]


async def test_a_worker_process_that_is_still_starting_when_the_run_is_killed_is_not_left_behind() -> None:
    pipeline = Pipeline(range(10)) >> stage(run_in="process", concurrency=2)(abs)
    run = asyncio.create_task(pipeline.run())
    await eventually(lambda: pipeline.runtime.threads)  # that start the workers
    await pipeline.cancel("never mind", force=True)
    stopped(await run)


def test_a_worker_process_whose_start_outlasts_the_loop_is_not_left_behind(tmp_path: Path) -> None:
    # The fork server is cold in a new program: its start takes longer than the graces.
    program = """
        import asyncio, threading, time
        import psutil
        from pipeline import Grace, Pipeline
        from stages import stage

        me = psutil.Process()

        async def main():
            pipeline = Pipeline(range(10), grace=Grace(abort=0, terminate=0, kill=0)) >> stage(run_in="process", concurrency=2)(abs)
            run = asyncio.create_task(pipeline.run())
            while not pipeline.runtime.threads:
                await asyncio.sleep(0)
            pipeline.cancel("never mind", force=True)
            await run

        def workers():
            return [child for child in me.children(recursive=True) if child.ppid() != me.pid]  # the fork server's

        if __name__ == "__main__":
            asyncio.run(main())
            for thread in threading.enumerate():
                if thread is not threading.current_thread():
                    thread.join(20)
            deadline = time.monotonic() + 5
            while workers() and time.monotonic() < deadline:
                time.sleep(0.01)
            print(len(workers()))
    """
    finished = run_program(tmp_path, program)
    assert (finished.code, finished.out, finished.err) == (0, "0\n", "")


# --- signals to a whole program


SIGNALLED = """
    import asyncio, signal
    from pipeline import Grace, Pipeline, SignalTrigger
    from stages import stage

    async def source():
        n = 0
        try:
            while True:
                yield n
                n += 1
                await asyncio.sleep(0)
        finally:
            print("source closed", flush=True)

    @stage
    async def work(item):
        try:
            print("working", flush=True)
            await asyncio.sleep({seconds})
        except asyncio.CancelledError:
            print("cleaning", flush=True)
            await asyncio.sleep({cleaning})
            raise
        return item

    async def main():
        trigger = SignalTrigger(signal.SIGINT, signal.SIGTERM, drain={drain})
        pipeline = Pipeline(source, cancel_on=[trigger], grace=Grace(abort=30)) >> work
        report = (await pipeline.run()).report
        print(report.outcome, report.drained, report.balanced, report.reasons[0].cancel_type.name, len(report.reasons), flush=True)

    asyncio.run(main())
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_first_signal_aborts_and_finally_blocks_run(tmp_path: Path, signum: int) -> None:
    with Program(tmp_path, SIGNALLED.format(seconds=60, cleaning=0, drain=False)) as program:
        program.says("working")
        program.interrupt(signum)
        finished = program.finish(15)
    lines = finished.out.splitlines()
    assert lines[-1] == "cancelled False True SIGNAL 1"
    assert {"cleaning", "source closed"} <= set(lines)
    assert (finished.code, finished.err) == (0, "")


def test_the_first_signal_drains_when_asked_to(tmp_path: Path) -> None:
    with Program(tmp_path, SIGNALLED.format(seconds=0.02, cleaning=0, drain=True)) as program:
        program.says("working")
        program.interrupt(signal.SIGTERM)
        finished = program.finish()
    assert finished.out.splitlines()[-1] == "cancelled True True SIGNAL 1"
    assert "cleaning" not in finished.out


def test_the_second_signal_does_not_wait_for_the_abort_grace(tmp_path: Path) -> None:
    with Program(tmp_path, SIGNALLED.format(seconds=60, cleaning=20, drain=False)) as program:
        program.says("working")
        program.interrupt(signal.SIGINT)
        program.says("cleaning")
        program.interrupt(signal.SIGINT)
        finished = program.finish(15)
    assert finished.out.splitlines()[-1] == "cancelled False True SIGNAL 2"
    assert finished.err == ""
