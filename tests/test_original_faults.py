"""Every fault of the original that RELIABILITY.md lists, and those of its peers: none of them may occur here."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import LIMIT, Flag, Gate, Program, Tracked, alive, assert_balanced, eventually, settled, until

from pipeline import Err, ErrorPolicy, Grace, Pipeline, PipelineFailed, PipelineState, RunReport, WorkerLostError
from stages import map as mapped
from stages import mix_pool, stage, work_pool


def ok(result: RunReport | Err) -> RunReport:
    """The report of a run that completed, its ledger checked."""
    assert isinstance(result, RunReport), result
    assert result.outcome == "completed"
    assert_balanced(result)
    return result


def stopped(result: RunReport | Err) -> RunReport:
    """The report of a run that did not complete, its ledger checked."""
    assert isinstance(result, Err), result
    assert result.report is not None
    assert_balanced(result.report)
    return result.report


# --- an async handler raises


async def test_an_async_handler_that_raises_is_retried() -> None:
    attempts: list[int] = []

    @work_pool(retries=3, num_workers=2)
    async def flaky(item: int, state: Any) -> int:
        attempts.append(state.attempt)
        if state.attempt < 3:
            raise ConnectionError("not yet")
        return item

    assert await (Pipeline([7]) >> flaky).collect() == [7]
    assert attempts == [1, 2, 3]


async def test_an_async_handler_that_raises_costs_only_its_item() -> None:
    @stage(concurrency=2, buffer=4)
    async def picky(item: int) -> int:
        if item % 10 == 3:
            raise ValueError(item)
        return item

    report = ok(await (Pipeline(range(100)) >> picky).run())
    assert (report.failed, report.delivered) == (10, 90)
    assert len(report.errors) == 10


# --- fork and merge


@pytest.mark.parametrize("multi_proc", [False, True], ids=["loop", "process"])
async def test_cohorts_stay_aligned_after_one_branch_of_a_fork_failed(multi_proc: bool) -> None:
    def same(item: int) -> int:
        return item

    def picky(item: int) -> int:
        if item == 3:
            raise ValueError("the branch fails")
        return item * 10

    async def later(item: int) -> int:
        await asyncio.sleep(0)
        return item * 100

    @mix_pool(buffer=4, multi_proc=multi_proc, fork_merge=list)
    def fork() -> list[Any]:
        return [same, picky, later]

    pipeline = Pipeline(range(20)) >> fork
    assert await pipeline.collect() == [[n, n * 10, n * 100] for n in range(20) if n != 3]
    assert pipeline.snapshot().stages[0].failed == 1


async def test_a_merge_function_that_raises_fails_its_items() -> None:
    def broken(outputs: list[int]) -> int:
        raise RuntimeError("cannot merge")

    @mix_pool(fork_merge=broken)
    def fork() -> list[Any]:
        return [abs, float]

    report = ok(await (Pipeline(range(10)) >> fork).run())
    assert (report.failed, report.delivered) == (10, 0)


# --- what goes through a process stage


async def test_numpy_arrays_go_through_a_process_stage() -> None:
    arrays = [np.arange(5) * n for n in range(5)]
    doubled = await (Pipeline(arrays) >> mapped(lambda array: array * 2, run_in="process")).collect()
    assert isinstance(doubled, list)
    assert [array.tolist() for array in doubled] == [(array * 2).tolist() for array in arrays]


class Unsendable:
    """Refuses to be pickled by anybody."""

    def __reduce__(self) -> Any:
        raise TypeError("I stay here")


async def test_an_item_that_cannot_be_pickled_fails_as_an_item() -> None:
    source = [1, Unsendable(), 2, (n for n in ()), 3]
    report = ok(await (Pipeline(source) >> stage(run_in="process")(str)).run())
    assert (report.failed, report.delivered) == (2, 3)


async def test_a_result_that_cannot_be_pickled_fails_as_an_item() -> None:
    @stage(run_in="process")
    def make(item: int) -> Any:
        return (n for n in range(item)) if item == 2 else item

    report = ok(await (Pipeline(range(5)) >> make).run())
    assert (report.failed, report.delivered) == (1, 4)


async def test_an_async_handler_works_in_a_process_stage() -> None:
    @stage(run_in="process")
    async def double(item: int) -> int:
        await asyncio.sleep(0)
        return item * 2

    assert await (Pipeline(range(5)) >> double).collect() == [0, 2, 4, 6, 8]


async def test_a_run_goes_on_when_a_worker_process_is_killed() -> None:
    @stage(run_in="process", concurrency=2)
    def fatal(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    report = ok(await asyncio.wait_for((Pipeline(range(20)) >> fatal).run(), LIMIT))
    assert (report.stages[0].lost, report.failed, report.delivered) == (1, 1, 19)
    assert isinstance(report.errors[0].value, WorkerLostError)


# --- backpressure


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_stalled_sink_stalls_the_source(run_in: str) -> None:
    source, gate = Tracked(), Gate()
    first = stage(run_in=run_in, buffer=1, name="first")(abs)
    last = stage(buffer=1, name="last")(gate.__call__)
    pipeline = Pipeline(source) >> first >> last
    run = asyncio.create_task(pipeline.run())
    await gate.entered.wait()
    pulled = await settled(lambda: source.pulled)
    assert_balanced(pipeline.snapshot())
    pipeline.cancel("seen enough")
    stopped(await run)
    buffers, in_work = 1 + 1, (1 if run_in == "loop" else 2) + 1
    assert pulled <= buffers + in_work + 1


# --- what does not want to stop


async def test_a_worker_that_ignores_sigterm_is_gone_when_the_cancel_is_done(tmp_path: Path) -> None:
    begun = Flag(tmp_path / "begun")

    @stage(run_in="process")
    def stubborn(item: int) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        begun.set()
        while True:
            signal.pause()

    pipeline = Pipeline([1], grace=Grace(abort=0.1, terminate=0.2, kill=1.0)) >> stubborn
    run = asyncio.create_task(pipeline.run())
    await eventually(begun.is_set)
    workers = [psutil.Process(process.pid) for process in pipeline.runtime.processes]
    await pipeline.cancel("enough")
    assert workers
    assert alive(workers) == []
    assert stopped(await run).abandoned == ()


async def test_neither_cancel_nor_run_hangs_on_a_handler_that_swallows_cancellation() -> None:
    entered, released = asyncio.Event(), asyncio.Event()

    @stage
    async def deaf(item: int) -> int:
        entered.set()
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue
        return item

    pipeline = Pipeline([1], grace=Grace(abort=0.1)) >> deaf
    run = asyncio.create_task(pipeline.run())
    await entered.wait()
    left = set(pipeline.runtime.tasks)
    result = await asyncio.wait_for(pipeline.cancel("enough"), LIMIT)
    assert result is await asyncio.wait_for(run, LIMIT)
    stopped(result)
    released.set()
    await asyncio.wait(left)


async def test_nothing_runs_on_when_the_task_that_awaits_the_run_is_cancelled() -> None:
    gate = Gate()
    before = asyncio.all_tasks()
    run = asyncio.create_task((Pipeline(range(100)) >> stage(concurrency=4)(gate.__call__)).run())
    await eventually(lambda: gate.began == 4)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert gate.cancelled == 4
    assert asyncio.all_tasks() <= before


# --- iterations


async def test_breaking_out_of_async_iter_closes_everything() -> None:
    source, before = Tracked(), asyncio.all_tasks()
    pipeline = Pipeline(source) >> stage(concurrency=2)(abs) >> stage(run_in="thread")(abs)
    async for _ in pipeline.async_iter():
        break
    await eventually(lambda: pipeline.snapshot().state is PipelineState.CLOSED)  # the loop finalizes the generator
    assert source.closed.is_set()
    assert pipeline.runtime.reasons[0].code == "iter_closed"
    await eventually(lambda: asyncio.all_tasks() <= before)


def test_breaking_out_of_iter_closes_everything() -> None:
    source, before = Tracked(), set(threading.enumerate())
    for _ in (Pipeline(source) >> stage(concurrency=2)(abs) >> stage(run_in="thread")(abs)).iter():
        break
    assert source.closed.is_set()
    assert set(threading.enumerate()) <= before


def test_iter_over_a_source_that_raises_does_not_end_as_if_complete() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    seen: list[int] = []
    with pytest.raises(PipelineFailed) as caught:
        seen.extend((Pipeline(source) >> stage(abs)).iter())
    assert isinstance(caught.value.__cause__, OSError)
    assert seen == [1, 2]


# --- cancelling


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_cancel_accounts_for_every_item(run_in: str) -> None:
    gate, source = Gate(), Tracked()
    pipeline = Pipeline(source) >> stage(run_in=run_in, concurrency=2, buffer=5)(abs) >> stage(concurrency=3, buffer=7)(gate.__call__)
    run = asyncio.create_task(pipeline.run())
    await eventually(lambda: gate.began == 3)
    pipeline.cancel("now")
    report = stopped(await run)
    accounted = sum(row.cancelled + row.discarded + row.failed for row in report.stages) + report.delivered
    assert report.pulled == source.pulled == accounted


async def test_a_second_concurrent_cancel_resolves_when_the_shutdown_is_done_and_not_before() -> None:
    entered, cleaned = asyncio.Event(), asyncio.Event()

    @stage
    async def tidy(item: int) -> int:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            cleaned.set()
        return item

    pipeline = Pipeline([1]) >> tidy
    run = asyncio.create_task(pipeline.run())
    await entered.wait()
    first, second = pipeline.cancel("first"), pipeline.cancel("second")
    results = await asyncio.gather(second, first)
    assert cleaned.is_set()
    assert pipeline.snapshot().state is PipelineState.CLOSED
    assert results[0] is results[1] is await run


async def test_a_cancel_after_success_does_not_make_it_a_failure() -> None:
    pipeline = Pipeline([1, 2]) >> stage(abs)
    report = ok(await pipeline.run())
    assert not pipeline.cancel("too late")
    assert await pipeline.cancel("too late") is report
    assert report.outcome == "completed"
    assert pipeline.snapshot().reasons == ()


# --- definitions and runs


async def test_one_stage_in_two_pipelines_counts_for_each() -> None:
    shared = stage(concurrency=2)(abs)
    one, two = Pipeline(range(10)) >> shared, Pipeline(range(25)) >> shared
    reports = await asyncio.gather(one.run(), two.run())
    assert [ok(report).stages[0].processed for report in reports] == [10, 25]


async def test_a_second_run_over_a_list_processes_it_again() -> None:
    pipeline = Pipeline([1, 2, 3]) >> stage(abs)
    assert ok(await pipeline.run()).delivered == 3
    assert ok(await pipeline.run()).delivered == 3


async def test_cancelling_nested_pipelines_never_hangs_on_a_full_queue() -> None:
    async def one(round_: int) -> None:
        gate = Gate()
        inner = Pipeline(name="inner") >> stage(buffer=1)(abs) >> stage(buffer=1, concurrency=2)(gate.__call__)
        outer = Pipeline(range(1000)) >> stage(buffer=1, concurrency=2)(abs) >> inner >> stage(buffer=1)(float)
        run = asyncio.create_task(outer.run())
        await eventually(lambda: gate.began == 2)
        for _ in range(round_ % 7):
            await asyncio.sleep(0)
        (inner if round_ % 2 else outer).cancel("stop")
        stopped(await asyncio.wait_for(run, 5))

    for round_ in range(100):
        await one(round_)


async def test_a_fast_iterator_costs_far_less_than_one_message_between_threads_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, messages = asyncio.get_running_loop(), 0
    original = loop.call_soon_threadsafe

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal messages
        messages += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    source = Tracked(20_000)
    ok(await (Pipeline(source) >> stage(abs)).run())
    assert len(source.threads) == 1
    assert messages < 20_000 / 4


# --- the peers' faults


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_an_exception_with_small_buffers_does_not_hang(run_in: str) -> None:
    @stage(run_in=run_in, buffer=1, concurrency=2, on_error=ErrorPolicy.RAISE)
    def fails(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    pipeline = Pipeline(Tracked()) >> stage(buffer=1)(abs) >> fails >> stage(buffer=1)(float)
    result = await asyncio.wait_for(pipeline.run(), LIMIT)
    assert stopped(result).outcome == "failed"
    assert isinstance(result.value, ValueError)  # type: ignore[union-attr]


async def test_four_places_in_a_buffer_are_four_and_not_six_hundred() -> None:
    source = Tracked()
    pipeline = Pipeline(source) >> stage(buffer=4, run_in="process", concurrency=2)(abs)
    outputs = pipeline.async_iter(max_buffer=4)
    await anext(outputs)
    pulled = await settled(lambda: source.pulled)
    await outputs.aclose()
    assert pulled <= 4 + 2 * (1 + 4) + 1 + 4 + 1  # the buffer, what two workers hold, the hand, max_buffer, and the one taken


async def test_calls_in_flight_are_cancelled_when_the_consumer_leaves() -> None:
    gate = Gate()

    async def slow_but_the_first(item: int) -> int:
        return item if item == 0 else await gate(item)

    pipeline = Pipeline(range(100)) >> stage(concurrency=5)(slow_but_the_first)
    outputs = pipeline.async_iter()
    await anext(outputs)
    await eventually(lambda: gate.began == 5)
    await outputs.aclose()
    assert (gate.cancelled, gate.ended) == (5, 0)


PARENT = """
    import asyncio, os, time
    from helpers import Journal
    from pathlib import Path
    from pipeline import Pipeline
    from stages import stage

    journal = Journal(Path("journal"))

    @stage(run_in="process", concurrency=4)
    def work(item):
        journal.write(os.getpid())
        time.sleep(60)

    async def main():
        pipeline = Pipeline(range(100)) >> work
        print("started", flush=True)
        await pipeline.run()

    if __name__ == "__main__":
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            print("interrupted", flush=True)
"""


def _four_at_work(folder: Path) -> bool:
    journal = folder / "journal"
    return journal.exists() and len(journal.read_text().splitlines()) == 4


@pytest.mark.parametrize("group", [False, True], ids=["alone", "as a terminal does"])
def test_ctrl_c_ends_a_parent_of_four_workers_soon_and_leaves_no_orphan(tmp_path: Path, group: bool) -> None:
    with Program(tmp_path, PARENT) as program:
        program.says("started")
        until(lambda: _four_at_work(tmp_path))
        family = program.family()
        program.interrupt(signal.SIGINT, group=group)
        finished = program.finish(15)  # Grace: 1 s for the handlers, 0.5 s after SIGTERM
        assert len(family) >= 4
        until(lambda: not alive(family), 5)
    assert finished.out.splitlines()[-1] == "interrupted"
    assert finished.err == ""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_parent_of_four_workers_that_is_killed_leaves_no_orphan(tmp_path: Path, signum: int) -> None:
    with Program(tmp_path, PARENT) as program:
        program.says("started")
        until(lambda: _four_at_work(tmp_path))
        family = program.family()
        program.interrupt(signum)
        program.finish(15)
        assert len(family) >= 4
        until(lambda: not alive(family), 5)
        assert program.err() == ""
