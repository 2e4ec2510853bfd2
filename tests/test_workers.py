"""Handlers in the loop, in threads and in processes: the same promises everywhere, and what a crash costs."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import (
    LIMIT,
    Flag,
    Gate,
    Journal,
    Program,
    Tracked,
    alive,
    assert_balanced,
    eventually,
    run_program,
    settled,
    until,
)

from pipeline import Err, ErrorPolicy, Grace, Pipeline, RunReport, StageConfigError, WorkerLostError
from stages import InProcess, Retry, stage

EVERYWHERE = pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
APART = pytest.mark.parametrize("run_in", ["thread", "process"])
KINDS = pytest.mark.parametrize("kind", ["plain", "coroutine", "generator", "async generator"])


def ok(result: RunReport | Err) -> RunReport:
    """The report of a run that completed, its ledger checked."""
    assert isinstance(result, RunReport), result
    assert_balanced(result)
    return result


def stopped(result: RunReport | Err) -> RunReport:
    """The report of a run that did not complete, its ledger checked."""
    assert isinstance(result, Err), result
    assert result.report is not None
    assert_balanced(result.report)
    return result.report


def of_kind(kind: str, body: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A handler of that kind whose only output is what `body(item, state)` returns."""

    def plain(item: Any, state: Any) -> Any:
        return body(item, state)

    async def coroutine(item: Any, state: Any) -> Any:
        await asyncio.sleep(0)
        return body(item, state)

    def generator(item: Any, state: Any) -> Iterator[Any]:
        yield body(item, state)

    async def async_generator(item: Any, state: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        yield body(item, state)

    return {"plain": plain, "coroutine": coroutine, "generator": generator, "async generator": async_generator}[kind]


def pids(pipeline: Pipeline[Any]) -> list[int]:
    return [process.pid for process in pipeline.runtime.processes]  # type: ignore[attr-defined]


# --- every kind of handler, everywhere


@EVERYWHERE
@KINDS
async def test_every_kind_of_handler_works_everywhere(kind: str, run_in: str) -> None:
    handler = stage(run_in=run_in, concurrency=2, ordered=True, name="it")(of_kind(kind, lambda item, _: item * 2))
    assert await (Pipeline(range(50)) >> handler).collect() == [n * 2 for n in range(50)]


@EVERYWHERE
@pytest.mark.parametrize("kind", ["generator", "async generator"])
async def test_a_generator_may_yield_any_number_of_outputs(kind: str, run_in: str) -> None:
    def steps(item: int) -> Iterator[int]:
        yield from range(item)

    async def later_steps(item: int) -> AsyncIterator[int]:
        for output in range(item):
            yield output

    spread = stage(run_in=run_in)(steps if kind == "generator" else later_steps)
    report = ok(await (Pipeline([0, 3, 200, 1]) >> spread).run())
    assert (report.pulled, report.stages[0].succeeded, report.delivered) == (4, 4, 204)


@EVERYWHERE
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_ordered_generators_keep_the_order_of_all_outputs(run_in: str, concurrency: int) -> None:
    def three(item: int) -> Iterator[tuple[int, int]]:
        for number in range(3):
            yield item, number

    pipeline = Pipeline(range(400)) >> stage(run_in=run_in, concurrency=concurrency, ordered=True)(three)
    result = await asyncio.wait_for(pipeline.collect(), LIMIT)
    assert result == [(item, number) for item in range(400) for number in range(3)]


@EVERYWHERE
async def test_a_slow_item_holds_the_order_and_not_the_workers(run_in: str, tmp_path: Path) -> None:
    go, journal = Flag(tmp_path / "go"), Journal(tmp_path / "journal")

    async def first_waits(item: int) -> int:
        if item == 0:
            deadline = time.monotonic() + LIMIT
            while not go.is_set() and time.monotonic() < deadline:
                await asyncio.sleep(0.002)
        journal.write(item)
        return item

    pipeline = Pipeline(range(20)) >> stage(run_in=run_in, concurrency=2, ordered=True, buffer=8)(first_waits)
    run = asyncio.create_task(pipeline.collect())
    await eventually(lambda: len(journal.lines()) >= 8)
    go.set()
    assert await run == list(range(20))
    assert journal.lines()[0] != "0"


@EVERYWHERE
async def test_concurrency_is_the_number_of_items_in_work_at_once(run_in: str, tmp_path: Path) -> None:
    journal, go = Journal(tmp_path / "journal"), Flag(tmp_path / "go")

    async def meet(item: int) -> int:
        journal.write(item)
        deadline = time.monotonic() + LIMIT
        while not go.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        return item

    pipeline = Pipeline(range(30)) >> stage(run_in=run_in, concurrency=3)(meet)
    run = asyncio.create_task(pipeline.run())
    await eventually(lambda: len(journal.lines()) == 3)
    await settled(lambda: len(journal.lines()))
    assert len(journal.lines()) == 3
    go.set()
    assert ok(await run).delivered == 30


@EVERYWHERE
async def test_as_many_items_as_workers_are_all_in_work(run_in: str, tmp_path: Path) -> None:
    # The three wait for one another: none may be held behind another one while a worker is idle.
    journal = Journal(tmp_path / "journal")

    async def meet(item: int) -> int:
        journal.write(item)
        deadline = time.monotonic() + 5
        while len(journal.lines()) < 3:
            if time.monotonic() > deadline:
                raise TimeoutError("alone")
            await asyncio.sleep(0.002)
        return item

    pipeline = Pipeline([1, 2, 3]) >> stage(run_in=run_in, concurrency=3, buffer=4)(meet)
    assert ok(await pipeline.run()).failed == 0


@APART
async def test_a_finished_result_does_not_wait_for_the_item_behind_it(run_in: str, tmp_path: Path) -> None:
    go = Flag(tmp_path / "go")

    def last_waits(item: int) -> int:
        if item == 20:
            go.wait(5)  # until the consumer has seen the item before this one
        return item

    pipeline = Pipeline(range(21)) >> stage(run_in=run_in, buffer=32)(last_waits)
    seen: list[int] = []
    async for item in pipeline:
        seen.append(item)
        if item == 19:
            go.set()
    assert seen == list(range(21))


# --- setup, teardown, state


@EVERYWHERE
@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
async def test_setup_and_teardown_run_once_per_worker(run_in: str, asynchronous: bool, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def opened(state: Any) -> None:
        state.values["seen"] = 0
        journal.write(f"setup {state.worker_id}")

    def closed(state: Any) -> None:
        journal.write(f"teardown {state.worker_id}")

    async def opened_later(state: Any) -> None:
        await asyncio.sleep(0)
        opened(state)

    async def closed_later(state: Any) -> None:
        await asyncio.sleep(0)
        closed(state)

    hooks: Any = {"setup": opened_later, "teardown": closed_later} if asynchronous else {"setup": opened, "teardown": closed}

    @stage(run_in=run_in, concurrency=3, **hooks)
    async def count(item: int, state: Any) -> int:
        state.update(seen=state.get("seen") + 1)
        return state.values["seen"]

    assert ok(await (Pipeline(range(60)) >> count).run()).delivered == 60
    assert sorted(journal.lines()) == [f"{what} {n}" for what in ("setup", "teardown") for n in range(3)]


@EVERYWHERE
async def test_each_worker_has_a_state_of_its_own(run_in: str) -> None:
    @stage(run_in=run_in, concurrency=2, setup=lambda state: state.update(count=0))
    async def count(item: int, state: Any) -> tuple[str, int, int]:
        await asyncio.sleep(0)
        state.values["count"] += 1
        return state.stage, state.worker_id, state.values["count"]

    result = await (Pipeline(range(100)) >> count).collect()
    assert isinstance(result, list)
    for worker in {worker for _, worker, _ in result}:
        counts = [count for _, other, count in result if other == worker]
        assert sorted(counts) == list(range(1, len(counts) + 1))
    assert {name for name, _, _ in result} == {"count"}


@EVERYWHERE
@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
async def test_a_setup_that_raises_fails_the_run_and_leaves_nothing_open(run_in: str, asynchronous: bool) -> None:
    def broken(state: Any) -> None:
        raise ConnectionRefusedError("no database")

    async def broken_later(state: Any) -> None:
        await asyncio.sleep(0)
        raise ConnectionRefusedError("no database")

    pipeline = Pipeline(range(9)) >> stage(run_in=run_in, setup=broken_later if asynchronous else broken)(abs)
    result = await asyncio.wait_for(pipeline.run(), LIMIT)
    assert stopped(result).outcome == "failed"
    assert isinstance(result, Err)
    assert isinstance(result.value, ConnectionRefusedError)
    assert "setup" in result.reasons[0].message


@EVERYWHERE
async def test_a_setup_that_raises_a_broken_pipe_error_is_reported_as_that(run_in: str) -> None:
    def broken(state: Any) -> None:
        raise BrokenPipeError("the database hung up")

    result = await asyncio.wait_for((Pipeline(range(9)) >> stage(run_in=run_in, setup=broken)(abs)).run(), LIMIT)
    stopped(result)
    assert isinstance(result, Err)
    assert "the database hung up" in str(result.value)


@EVERYWHERE
@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
async def test_a_teardown_that_raises_fails_the_run_and_leaves_nothing_open(run_in: str, asynchronous: bool) -> None:
    def broken(state: Any) -> None:
        raise OSError("cannot flush")

    async def broken_later(state: Any) -> None:
        await asyncio.sleep(0)
        raise OSError("cannot flush")

    pipeline = Pipeline(range(9)) >> stage(run_in=run_in, teardown=broken_later if asynchronous else broken)(abs)
    result = await asyncio.wait_for(pipeline.run(), LIMIT)
    assert stopped(result).delivered == 9
    assert isinstance(result, Err)
    assert isinstance(result.value, OSError)


@EVERYWHERE
async def test_teardown_runs_after_an_abort(run_in: str, tmp_path: Path) -> None:
    closed, gate = Flag(tmp_path / "closed"), Gate()
    worker = stage(run_in=run_in, setup=lambda state: None, teardown=lambda state: closed.set())(_same)
    pipeline = Pipeline(Tracked()) >> worker >> stage(gate.__call__)
    run = asyncio.create_task(pipeline.run())
    await gate.entered.wait()
    pipeline.cancel("stop")
    stopped(await run)
    assert closed.is_set()


async def _same(item: Any) -> Any:
    return item


# --- retry and timeout


@EVERYWHERE
@KINDS
async def test_retries_work_for_every_kind_of_handler_everywhere(kind: str, run_in: str) -> None:
    def flaky(item: int, state: Any) -> tuple[int, int]:
        if state.attempt < 3 and item % 2:
            raise ConnectionError("not yet")
        return item, state.attempt

    handler = stage(run_in=run_in, retry=Retry(attempts=3, wait=0), name="it")(of_kind(kind, flaky))
    pipeline = Pipeline(range(4)) >> handler
    assert await pipeline.collect() == [(0, 1), (1, 3), (2, 1), (3, 3)]
    metrics = pipeline.snapshot().stages[0]
    assert (metrics.retried, metrics.failed) == (4, 0)


@EVERYWHERE
async def test_an_err_says_how_many_attempts_were_made(run_in: str) -> None:
    def hopeless(item: int) -> int:
        raise ConnectionError("never")

    pipeline = Pipeline([1], on_error=ErrorPolicy.EMIT) >> stage(run_in=run_in, retry=Retry(attempts=3, wait=0))(hopeless)
    result = await pipeline.collect()
    assert isinstance(result, list)
    assert [(err.attempts, err.item, err.stage, type(err.value)) for err in result] == [(3, 1, "hopeless", ConnectionError)]
    assert "hopeless" in result[0].trace


@EVERYWHERE
async def test_a_returned_err_is_final(run_in: str) -> None:
    def refuses(item: int, state: Any) -> Any:
        return Err(f"attempt {state.attempt}")

    pipeline = Pipeline([1], on_error=ErrorPolicy.EMIT) >> stage(run_in=run_in, retry=3)(refuses)
    result = await pipeline.collect()
    assert isinstance(result, list)
    assert [err.value for err in result] == ["attempt 1"]


@EVERYWHERE
async def test_outputs_of_an_attempt_that_failed_are_not_sent(run_in: str) -> None:
    def halfway(item: int, state: Any) -> Iterator[int]:
        yield 1
        if state.attempt < 2:
            raise ConnectionError("halfway")
        yield 2

    pipeline = Pipeline([0]) >> stage(run_in=run_in, retry=Retry(attempts=2, wait=0))(halfway)
    assert await pipeline.collect() == [1, 2]


@EVERYWHERE
@pytest.mark.parametrize("kind", ["coroutine", "async generator"])
async def test_an_asynchronous_handler_that_overruns_is_ended(kind: str, run_in: str) -> None:
    async def coroutine(item: int) -> int:
        await asyncio.sleep(60 if item == 1 else 0)
        return item

    async def generator(item: int) -> AsyncIterator[int]:
        yield await coroutine(item)

    handler = stage(run_in=run_in, timeout=0.2, name="it")(coroutine if kind == "coroutine" else generator)
    report = ok(await asyncio.wait_for((Pipeline(range(4)) >> handler).run(), LIMIT))
    assert (report.stages[0].timed_out, report.failed, report.delivered) == (1, 1, 3)
    assert isinstance(report.errors[0].value, TimeoutError)


@pytest.mark.abandons("thread")
async def test_a_thread_that_overruns_is_replaced_and_reported(release: threading.Event) -> None:
    def blocks(item: int) -> int:
        if item == 1:
            release.wait(LIMIT)
        return item

    pipeline = Pipeline(range(4)) >> stage(run_in="thread", timeout=0.1)(blocks)
    report = ok(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert (report.stages[0].timed_out, report.failed, report.delivered) == (1, 1, 3)
    assert any("blocks" in name for name in report.abandoned)


async def test_a_process_that_overruns_is_killed_and_replaced() -> None:
    def blocks(item: int) -> tuple[int, int]:
        if item == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        return item, os.getpid()

    pipeline = Pipeline(range(4)) >> stage(run_in="process", timeout=0.3)(blocks)
    result = await asyncio.wait_for(pipeline.collect(), LIMIT)
    assert isinstance(result, list)
    assert sorted(item for item, _ in result) == [0, 2, 3]
    assert len({pid for _, pid in result}) == 2
    assert pipeline.snapshot().stages[0].timed_out == 1


@EVERYWHERE
async def test_an_attempt_that_overran_is_tried_again(run_in: str) -> None:
    async def slow_at_first(item: int, state: Any) -> int:
        if state.attempt == 1:
            await asyncio.sleep(60)
        return state.attempt

    handler = stage(run_in=run_in, timeout=0.2, retry=Retry(attempts=2, wait=0))(slow_at_first)
    pipeline = Pipeline([1]) >> handler
    assert await asyncio.wait_for(pipeline.collect(), LIMIT) == [2]
    assert pipeline.snapshot().stages[0].retried == 1


@EVERYWHERE
async def test_the_wait_between_two_attempts_does_not_count_as_an_attempts_time(run_in: str) -> None:
    def flaky(item: int, state: Any) -> tuple[int, int]:
        if state.attempt == 1:
            raise ConnectionError("not yet")
        return state.attempt, state.worker_id

    handler = stage(run_in=run_in, timeout=0.2, retry=Retry(attempts=2, wait=0.8, jitter=0))(flaky)
    pipeline = Pipeline([1]) >> handler
    assert await asyncio.wait_for(pipeline.collect(), LIMIT) == [(2, 0)]  # the same worker: it was not given up
    assert pipeline.snapshot().stages[0].timed_out == 0


@EVERYWHERE
@pytest.mark.parametrize("kind", ["generator", "async generator"])
async def test_waiting_for_room_does_not_count_as_an_attempts_time(kind: str, run_in: str) -> None:
    def steps(item: int) -> Iterator[int]:
        yield from range(300)

    async def later_steps(item: int) -> AsyncIterator[int]:
        for output in range(300):
            yield output

    handler = stage(run_in=run_in, timeout=0.2)(steps if kind == "generator" else later_steps)
    pipeline = Pipeline([1]) >> handler
    outputs = pipeline.async_iter(max_buffer=1)
    seen = [await anext(outputs)]
    stalled = time.monotonic()
    await eventually(lambda: time.monotonic() > stalled + 0.8)  # four times the timeout
    seen += [item async for item in outputs]
    assert seen == list(range(300))
    assert pipeline.snapshot().stages[0].failed == 0


# --- backpressure of generators


@EVERYWHERE
@pytest.mark.parametrize("kind", ["generator", "async generator"])
async def test_an_endless_generator_waits_for_its_consumer(kind: str, run_in: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def endless(item: int) -> Iterator[int]:
        while True:
            journal.write(item)
            yield item

    async def later_endless(item: int) -> AsyncIterator[int]:
        for output in endless(item):
            yield output

    pipeline = Pipeline([1]) >> stage(run_in=run_in)(endless if kind == "generator" else later_endless)
    outputs = pipeline.async_iter(max_buffer=4)
    await anext(outputs)
    made = await settled(lambda: len(journal.lines()))
    await asyncio.wait_for(outputs.aclose(), LIMIT)
    assert made <= 1 + 4 + 1 + 64 + 1  # taken, buffered, in the hand, and what a worker may send ahead
    assert_balanced(pipeline.snapshot())


@EVERYWHERE
async def test_a_generator_is_closed_when_the_run_stops(run_in: str, tmp_path: Path) -> None:
    closed = Flag(tmp_path / "closed")

    def endless(item: int) -> Iterator[int]:
        try:
            while True:
                yield item
        finally:
            closed.set()

    pipeline = Pipeline([1]) >> stage(run_in=run_in)(endless)
    outputs = pipeline.async_iter(max_buffer=4)
    await anext(outputs)
    await outputs.aclose()
    assert closed.is_set()


# --- what can travel to a process


async def test_lambdas_and_closures_run_in_processes() -> None:
    factor = 7
    pipeline = Pipeline([1, 2]) >> stage(run_in="process")(lambda item: item * factor)
    assert await pipeline.collect() == [7, 14]


async def test_instances_of_a_class_defined_in_a_function_go_to_processes_and_back() -> None:
    @dataclasses.dataclass
    class Point:
        x: int

    def moved(point: Point) -> Point:
        return Point(point.x + 1)

    result = await (Pipeline([Point(1), Point(2)]) >> stage(run_in="process")(moved)).collect()
    assert isinstance(result, list)
    assert [point.x for point in result] == [2, 3]


@pytest.mark.parametrize("run_as", ["a file", "a module", "-c"])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_dataclass_of_the_main_program_keeps_its_identity_through_a_process(tmp_path: Path, run_as: str, method: str) -> None:
    source = f"""
import asyncio, dataclasses
from pipeline import Pipeline
from stages import InProcess, stage

@dataclasses.dataclass(frozen=True)
class Point:
    x: int

@stage(run_in=InProcess(start_method={method!r}))
def moved(point: Point) -> Point:
    assert isinstance(point, Point)
    return Point(point.x + 1)

if __name__ == "__main__":
    result = asyncio.run((Pipeline([Point(1), Point(2)]) >> moved).collect())
    print(result, all(isinstance(point, Point) for point in result))
"""
    interpreter = {"a file": (), "a module": ("-m", "program"), "-c": ("-c", source)}[run_as]
    finished = run_program(tmp_path, source, interpreter=interpreter)
    assert (finished.code, finished.out, finished.err) == (0, "[Point(x=2), Point(x=3)] True\n", "")


def test_a_program_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    source = """
        import asyncio
        from pipeline import Pipeline
        from stages import stage
        result = asyncio.run((Pipeline([1, 2]) >> stage(run_in="process")(abs)).collect())
        print(result)
    """
    finished = run_program(tmp_path, source)
    assert "__main__" in finished.out + finished.err
    assert finished.code == 0


@pytest.mark.parametrize("shape", [(5,), (1000, 1000), ()], ids=["vector", "8 MB", "no dimension"])
async def test_numpy_arrays_come_back_as_they_are(shape: tuple[int, ...]) -> None:
    array = np.ones(shape)
    result = await (Pipeline([array, array * 2]) >> stage(run_in="process", ordered=True)(lambda item: item + 1)).collect()
    assert isinstance(result, list)
    assert [got.dtype for got in result] == [np.dtype(float)] * 2
    np.testing.assert_array_equal(result[0], array + 1)
    np.testing.assert_array_equal(result[1], array * 2 + 1)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
async def test_both_start_methods_run_handlers_in_other_processes(method: str) -> None:
    handler = stage(run_in=InProcess(start_method=method), concurrency=2)(lambda item: (item, os.getpid()))
    result = await (Pipeline(range(20)) >> handler).collect()
    assert isinstance(result, list)
    assert sorted(item for item, _ in result) == list(range(20))
    assert os.getpid() not in {pid for _, pid in result}


class Bomb:
    """Can be pickled, and cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise ValueError("boom")


async def test_an_item_that_cannot_be_unpickled_fails_as_an_item() -> None:
    report = ok(await (Pipeline([1, Bomb(), 2]) >> stage(run_in="process")(str)).run())
    assert (report.failed, report.delivered) == (1, 2)
    assert "boom" in str(report.errors[0].value)


async def test_a_result_that_cannot_be_unpickled_fails_as_an_item() -> None:
    report = ok(await (Pipeline([1, 2, 3]) >> stage(run_in="process")(lambda item: Bomb() if item == 2 else item)).run())
    assert (report.failed, report.delivered) == (1, 2)
    assert "boom" in str(report.errors[0].value)


async def test_an_output_of_a_generator_that_cannot_be_pickled_fails_the_item() -> None:
    def steps(item: int) -> Iterator[Any]:
        yield item
        if item == 2:
            yield (n for n in ())

    report = ok(await (Pipeline([1, 2, 3]) >> stage(run_in="process")(steps)).run())
    assert (report.failed, report.stages[0].succeeded) == (1, 2)


async def test_an_exception_that_cannot_be_pickled_keeps_its_name_and_text() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")
            self.generator = (n for n in ())

    def raises(item: int) -> int:
        raise Odd(1, 2)

    report = ok(await (Pipeline([1]) >> stage(run_in="process")(raises)).run())
    assert "Odd" in repr(report.errors[0].value)
    assert "1 and 2" in str(report.errors[0].value)


async def test_an_exception_comes_back_from_a_process_with_its_type_and_traceback() -> None:
    def culprit(item: int) -> int:
        return {}["missing"]

    report = ok(await (Pipeline([1]) >> stage(run_in="process")(culprit)).run())
    assert isinstance(report.errors[0].value, KeyError)
    assert "culprit" in report.errors[0].trace


@APART
async def test_a_handler_that_raises_system_exit_fails_its_item_only(run_in: str) -> None:
    def leaves(item: int) -> int:
        if item == 2:
            raise SystemExit(3)
        return item

    report = ok(await asyncio.wait_for((Pipeline(range(5)) >> stage(run_in=run_in)(leaves)).run(), LIMIT))
    assert (report.failed, report.delivered) == (1, 4)


async def test_a_handler_that_cannot_travel_is_refused_before_anything_starts() -> None:
    stuck, source = (n for n in ()), Tracked()
    pipeline = Pipeline(source) >> stage(run_in="process")(lambda item: next(stuck))
    with pytest.raises(StageConfigError, match="process"):
        await pipeline.run()
    assert source.pulled == 0


# --- being told to stop


@APART
async def test_a_long_handler_sees_the_cancel_and_its_reasons(run_in: str, tmp_path: Path) -> None:
    begun, journal = Flag(tmp_path / "begun"), Journal(tmp_path / "journal")

    def patient(item: int, state: Any) -> None:
        assert not state.cancelled
        assert state.reasons == ()
        begun.set()
        until(lambda: state.cancelled)
        journal.write([(reason.message, reason.code) for reason in state.reasons])

    pipeline = Pipeline([1], grace=Grace(abort=10)) >> stage(run_in=run_in)(patient)
    run = asyncio.create_task(pipeline.run())
    await eventually(begun.is_set)
    pipeline.cancel("enough", code="mine")
    report = stopped(await asyncio.wait_for(run, LIMIT))
    assert journal.lines() == ["[('enough', 'mine')]"]
    assert report.abandoned == ()
    assert report.duration < 10


@APART
async def test_a_coroutine_in_a_worker_is_cancelled_at_its_await(run_in: str, tmp_path: Path) -> None:
    begun, cleaned = Flag(tmp_path / "begun"), Flag(tmp_path / "cleaned")

    async def waits(item: int) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    pipeline = Pipeline([1], grace=Grace(abort=10)) >> stage(run_in=run_in)(waits)
    run = asyncio.create_task(pipeline.run())
    await eventually(begun.is_set)
    pipeline.cancel("enough")
    assert stopped(await asyncio.wait_for(run, LIMIT)).stages[0].cancelled == 1
    assert cleaned.is_set()


@APART
async def test_a_wait_between_attempts_ends_with_the_run(run_in: str, tmp_path: Path) -> None:
    begun = Flag(tmp_path / "begun")

    def fails(item: int) -> None:
        begun.set()
        raise ConnectionError("no")

    pipeline = Pipeline([1], grace=Grace(abort=10)) >> stage(run_in=run_in, retry=Retry(attempts=2, wait=60, max_wait=60))(fails)
    run = asyncio.create_task(pipeline.run())
    await eventually(begun.is_set)
    began = time.monotonic()
    pipeline.cancel("enough")
    assert stopped(await run).abandoned == ()
    assert time.monotonic() - began < 5


# --- crashes


async def _killed(pipeline: Pipeline[Any], ready: Callable[[], Any]) -> asyncio.Task[Any]:
    """Run, kill the worker as soon as `ready` is true, and give back the task of the run."""
    run = asyncio.create_task(pipeline.collect())
    await eventually(lambda: run.done() or ready())
    assert not run.done(), run.result()
    (victim,) = pids(pipeline)
    os.kill(victim, signal.SIGKILL)
    return run


async def test_a_worker_killed_while_idle_costs_nothing_and_is_replaced(tmp_path: Path) -> None:
    first_out, go = asyncio.Event(), asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        await go.wait()
        yield 2

    pipeline = Pipeline(source) >> stage(run_in="process")(lambda item: (item, os.getpid()))
    seen: list[tuple[int, int]] = []

    async def consume() -> None:
        async for output in pipeline:
            seen.append(output)
            first_out.set()

    task = asyncio.create_task(consume())
    await first_out.wait()
    os.kill(seen[0][1], signal.SIGKILL)
    await eventually(lambda: pids(pipeline) and seen[0][1] not in pids(pipeline))
    go.set()
    await asyncio.wait_for(task, LIMIT)
    assert [item for item, _ in seen] == [1, 2]
    assert seen[0][1] != seen[1][1]
    assert pipeline.snapshot().stages[0].lost == 0
    assert_balanced(pipeline.snapshot())


async def test_a_worker_killed_while_computing_loses_exactly_its_item(tmp_path: Path) -> None:
    begun = Flag(tmp_path / "begun")

    def works(item: int) -> int:
        if item == 5 and not begun.is_set():
            begun.set()
            time.sleep(60)
        return item

    pipeline = Pipeline(range(20)) >> stage(run_in="process", buffer=8)(works)
    run = await _killed(pipeline, begun.is_set)
    result = await asyncio.wait_for(run, LIMIT)
    assert sorted(result) == [n for n in range(20) if n != 5]
    snapshot = pipeline.snapshot()
    assert (snapshot.stages[0].lost, snapshot.stages[0].failed) == (1, 1)
    assert_balanced(snapshot)


async def test_a_worker_killed_while_reading_an_item_of_50_mb_loses_nothing(tmp_path: Path) -> None:
    ready, go = Flag(tmp_path / "ready"), asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        yield b"small"
        await go.wait()
        yield bytes(50_000_000)
        yield b"last"

    def size(item: bytes) -> int:
        ready.set()
        return len(item)

    pipeline = Pipeline(source) >> stage(run_in="process", buffer=1)(size)
    run = asyncio.create_task(pipeline.collect())
    await eventually(lambda: ready.is_set() and pipeline.snapshot().stages[0].succeeded == 1)
    (victim,) = pids(pipeline)
    os.kill(victim, signal.SIGSTOP)  # so that the item fills the pipe and no more
    go.set()
    await eventually(lambda: pipeline.snapshot().stages[0].in_flight >= 1)
    os.kill(victim, signal.SIGKILL)
    assert await asyncio.wait_for(run, LIMIT) == [5, 50_000_000, 4]
    assert pipeline.snapshot().stages[0].lost == 0


async def test_a_worker_killed_while_writing_a_result_of_50_mb_loses_exactly_that_item(tmp_path: Path) -> None:
    writing = Flag(tmp_path / "writing")

    class Large:
        """Says when it is being pickled; what follows is the write."""

        def __reduce__(self) -> Any:
            first = not writing.is_set()
            writing.set()
            return (_large, (bytes(50_000_000),)) if first else (int, ())

    def makes(item: int) -> Any:
        return Large() if item == 3 else item

    pipeline = Pipeline(range(10)) >> stage(run_in="process", buffer=1)(makes)
    run = asyncio.create_task(pipeline.collect())
    while not writing.is_set() and not run.done():
        await asyncio.sleep(0)
    (victim,) = pids(pipeline)
    os.kill(victim, signal.SIGKILL)
    result = await asyncio.wait_for(run, LIMIT)
    assert isinstance(result, list)
    metrics = pipeline.snapshot().stages[0]
    assert sorted(item for item in result if isinstance(item, int)) == [n for n in range(10) if n != 3]
    assert (metrics.lost, metrics.failed, metrics.succeeded) == (1, 1, 9)
    assert_balanced(pipeline.snapshot())


def _large(data: bytes) -> bytes:
    return data


async def test_the_policy_of_the_stage_applies_to_a_lost_item() -> None:
    def fatal(item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    pipeline = Pipeline(range(3)) >> stage(run_in="process", on_error=ErrorPolicy.EMIT, ordered=True, concurrency=2)(fatal)
    result = await pipeline.collect()
    assert isinstance(result, list)
    assert [item if isinstance(item, int) else type(item.value) for item in result] == [0, WorkerLostError, 2]
    assert result[1].item == 1


async def test_a_lost_item_under_raise_fails_the_run() -> None:
    def fatal(item: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    result = await asyncio.wait_for((Pipeline([1], on_error=ErrorPolicy.RAISE) >> stage(run_in="process")(fatal)).run(), LIMIT)
    stopped(result)
    assert isinstance(result, Err)
    assert isinstance(result.value, WorkerLostError)


async def test_workers_that_always_die_end_the_stage_and_not_in_a_hang() -> None:
    def fatal(item: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    pipeline = Pipeline(range(50)) >> stage(run_in=InProcess(restarts=2), concurrency=2)(fatal)
    report = ok(await asyncio.wait_for(pipeline.run(), LIMIT))
    assert report.stages[0].lost == report.failed == 50


async def test_setup_runs_again_in_the_worker_that_replaces_a_dead_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def fatal(item: int, state: Any) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return state.values["answer"]

    def opened(state: Any) -> None:
        journal.write(os.getpid())
        state.values["answer"] = 42

    pipeline = Pipeline(range(3)) >> stage(run_in="process", setup=opened)(fatal)
    assert await pipeline.collect() == [42, 42]
    assert len(set(journal.lines())) == 2


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_end_within_half_a_second_of_their_parents_death(tmp_path: Path, method: str) -> None:
    source = f"""
        import asyncio, os, time
        from pathlib import Path
        from helpers import Journal
        from pipeline import Pipeline
        from stages import InProcess, stage

        journal = Journal(Path("journal"))

        @stage(run_in=InProcess(start_method={method!r}), concurrency=2)
        def work(item):
            journal.write(os.getpid())
            time.sleep(60)

        if __name__ == "__main__":
            asyncio.run((Pipeline(range(9)) >> work).run())
    """
    journal = tmp_path / "journal"
    with Program(tmp_path, source) as program:
        until(lambda: journal.exists() and len(journal.read_text().splitlines()) == 2)
        workers = [psutil.Process(int(pid)) for pid in journal.read_text().splitlines()]
        program.interrupt(signal.SIGKILL)
        until(lambda: not alive(workers), 5)
        program.finish(15)


# --- again and again


@APART
async def test_descriptors_and_threads_stay_flat_over_many_runs(run_in: str) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    pipeline = Pipeline(range(5)) >> stage(run_in=run_in, concurrency=2)(abs)
    counts: list[tuple[int, int]] = []
    for _ in range(8):
        ok(await pipeline.run())
        counts.append(count())
    assert max(counts) == min(counts)


@APART
async def test_descriptors_stay_flat_over_many_cancelled_runs(run_in: str) -> None:
    counts: list[int] = []
    for _ in range(5):
        gate = Gate()
        pipeline = Pipeline(Tracked()) >> stage(run_in=run_in, concurrency=2)(abs) >> stage(gate.__call__)
        run = asyncio.create_task(pipeline.run())
        await gate.entered.wait()
        pipeline.cancel("stop")
        stopped(await run)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert max(counts) == min(counts)
