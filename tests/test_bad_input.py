"""Sources and handlers that do what they should not: each has one defined outcome, and says what happened.

The rule kept here: whatever user code does, the run ends, its ledger balances, and the cause is among the reasons or errors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import Program, assert_balanced, eventually, run_program

from pipeline import Err, Pipeline, PipelineError, RunReport, WorkerLostError
from stages import mix_pool, stage, take


async def nap(item: Any) -> Any:
    await asyncio.sleep(0)
    return item


def account(pipeline: Pipeline[Any]) -> RunReport:
    """The report of the last run, its ledger checked."""
    report = pipeline.report
    assert report is not None
    assert_balanced(report)
    return report


# --- sources


def raises_when_called() -> Iterator[int]:
    raise ValueError("planted")


class RaisesInIter:
    def __iter__(self) -> Iterator[int]:
        raise ValueError("planted")


class RaisesInAiter:
    def __aiter__(self) -> AsyncIterator[int]:
        raise ValueError("planted")


class RaisesInNext:
    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        raise ValueError("planted")


class NoIterator(list[int]):
    def __iter__(self) -> Any:
        return 5


def raises_at_its_end() -> Iterator[int]:
    try:
        yield 1
    finally:
        raise ValueError("planted")


def raises_stop_iteration() -> Iterator[int]:
    yield 1
    raise StopIteration("planted")


@pytest.mark.parametrize(
    ("source", "pulled", "says"),
    [
        (raises_when_called, 0, "ValueError: planted"),
        (RaisesInIter(), 0, "ValueError: planted"),
        (RaisesInAiter(), 0, "ValueError: planted"),
        (RaisesInNext(), 0, "ValueError: planted"),
        (NoIterator([1]), 0, "TypeError: iter() returned non-iterator of type 'int'"),
        (raises_at_its_end, 1, "ValueError: planted"),
        (raises_stop_iteration, 1, "RuntimeError: generator raised StopIteration"),
    ],
)
async def test_a_source_that_raises_fails_the_run_after_what_it_gave(source: Any, pulled: int, says: str) -> None:
    pipeline = Pipeline(source) >> stage(nap)
    result = await pipeline.run()
    assert isinstance(result, Err)
    assert [str(reason) for reason in result.reasons] == [f"source: {says}"]
    report = account(pipeline)
    assert (report.outcome, report.pulled, report.delivered) == ("failed", pulled, pulled)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
async def test_a_source_that_raises_an_exit_in_its_thread_fails_the_run(error: BaseException) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise error

    pipeline = Pipeline(source) >> stage(nap)
    result = await pipeline.run()
    assert isinstance(result, Err)
    assert type(error).__name__ in str(result.reasons[0])
    assert account(pipeline).outcome == "failed"


def closes_badly() -> Iterator[int]:
    try:
        yield from count()
    finally:
        raise ValueError("planted")


async def closes_badly_async() -> AsyncIterator[int]:
    try:
        for n in count():
            await asyncio.sleep(0)
            yield n
    finally:
        raise ValueError("planted")


class RaisesInClose:
    def __init__(self) -> None:
        self._numbers = count()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self._numbers)

    def close(self) -> None:
        raise ValueError("planted")


@pytest.mark.parametrize("source", [closes_badly, closes_badly_async, RaisesInClose])
async def test_a_source_that_raises_when_it_is_closed_is_heard(source: Callable[[], Any]) -> None:
    pipeline = Pipeline(source) >> stage(nap) >> take(2)
    result = await pipeline.run()
    assert isinstance(result, Err)
    assert [str(reason) for reason in result.reasons] == ["source: ValueError: planted"]
    assert account(pipeline).delivered == 2


@pytest.mark.parametrize("source", [closes_badly, closes_badly_async, RaisesInClose])
async def test_a_source_that_raises_when_a_cancel_closes_it_adds_its_reason(source: Callable[[], Any]) -> None:
    pipeline = Pipeline(source) >> stage(nap)
    running = asyncio.create_task(pipeline.run())
    await eventually(lambda: pipeline.snapshot().delivered)
    await pipeline.cancel("enough")
    result = await running
    assert isinstance(result, Err)
    assert [str(reason) for reason in result.reasons] == ["enough", "source: ValueError: planted"]
    assert account(pipeline).outcome == "cancelled"


class YieldsItself:
    def __init__(self) -> None:
        self.left = 3

    def __iter__(self) -> YieldsItself:
        return self

    def __next__(self) -> YieldsItself:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self


async def test_a_source_that_yields_itself_yields_items_like_any_other() -> None:
    source = YieldsItself()
    assert await (Pipeline(source) >> stage(nap)).collect() == [source] * 3


async def test_a_list_that_contains_itself_goes_through_a_process() -> None:
    knot: list[Any] = [1]
    knot.append(knot)
    (out,) = await (Pipeline([knot]) >> stage(run_in="process")(same)).collect()
    assert out[0] == 1
    assert out[1] is out


def same(item: Any) -> Any:
    return item


# --- handlers


async def plus_one(n: int) -> int:
    await asyncio.sleep(0)
    return n + 1


def forgets_to_await(n: int) -> Any:
    return plus_one(n)


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_plain_handler_that_returns_a_coroutine_has_it_awaited(run_in: str) -> None:
    assert await (Pipeline(range(5)) >> stage(run_in=run_in, ordered=True)(forgets_to_await)).collect() == [1, 2, 3, 4, 5]


async def test_branches_of_a_fork_share_their_item_and_the_next_item_is_another() -> None:
    def spoils(item: list[int]) -> int:
        item.append(99)
        return len(item)

    def looks(item: list[int]) -> int:
        return len(item)

    fork = mix_pool(fork_merge=tuple)(lambda: [spoils, looks])
    items = [[n] for n in range(4)]
    assert await (Pipeline(items) >> fork).collect() == [(2, 2)] * 4  # no copies are made in the loop


async def test_a_process_handler_that_changes_its_item_changes_a_copy() -> None:
    def spoils(item: list[int]) -> list[int]:
        item.append(99)
        return item

    items = [[n] for n in range(4)]
    assert await (Pipeline(items) >> stage(run_in="process")(spoils)).collect() == [[n, 99] for n in range(4)]
    assert items == [[n] for n in range(4)]


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_handler_that_cancels_its_own_task_stops_the_run_and_is_named(concurrency: int) -> None:
    async def cancels_itself(n: int) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return n

    pipeline = Pipeline(range(50)) >> stage(nap) >> stage(concurrency=concurrency)(cancels_itself) >> stage(nap)
    result = await pipeline.run()
    assert isinstance(result, Err)
    assert result.reasons[0].code == "task_cancelled"
    assert "cancels_itself" in str(result.reasons[0])
    assert account(pipeline).outcome == "cancelled"


async def test_a_handler_that_makes_up_a_cancellation_fails_its_item() -> None:
    async def makes_it_up(n: int) -> int:
        raise asyncio.CancelledError("made up")

    pipeline = Pipeline(range(5)) >> stage(makes_it_up)
    assert isinstance(await pipeline.run(), RunReport)
    assert account(pipeline).failed == 5


async def test_a_handler_may_run_another_pipeline() -> None:
    async def sums(n: int) -> int:
        outputs = await (Pipeline(range(n)) >> stage(nap)).collect()
        assert isinstance(outputs, list)
        return sum(outputs)

    assert await (Pipeline(range(5)) >> stage(sums)).collect() == [0, 0, 1, 3, 6]


def total(n: int) -> int:
    return sum((Pipeline(range(n)) >> stage(nap)).iter())


def total_of_processes(n: int) -> int:
    return sum((Pipeline(range(n)) >> stage(run_in="process")(same)).iter())


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_plain_handler_may_iterate_over_another_pipeline(run_in: str) -> None:
    assert await (Pipeline(range(5)) >> stage(run_in=run_in, ordered=True)(total)).collect() == [0, 0, 1, 3, 6]


async def test_a_handler_in_a_process_may_run_a_pipeline_with_processes() -> None:
    assert await (Pipeline(range(4)) >> stage(run_in="process", ordered=True)(total_of_processes)).collect() == [0, 0, 1, 3]


async def test_a_handler_that_runs_its_own_pipeline_fails_its_item() -> None:
    pipeline = Pipeline(range(3))

    async def again(n: int) -> Any:
        return await pipeline.run()

    pipeline.stage(stage(again))
    assert isinstance(await pipeline.run(), RunReport)
    report = account(pipeline)
    assert report.failed == 3
    assert isinstance(report.errors[0].value, PipelineError)
    assert "running already" in str(report.errors[0].value)


async def test_os_exit_in_a_process_handler_costs_its_item() -> None:
    def leaves(n: int) -> int:
        if n == 2:
            os._exit(7)
        return n

    pipeline = Pipeline(range(6)) >> stage(run_in="process", ordered=True)(leaves)
    assert await pipeline.collect() == [0, 1, 3, 4, 5]
    report = account(pipeline)
    assert report.stages[0].lost == 1
    assert isinstance(report.errors[0].value, WorkerLostError)
    assert "exit code 7" in str(report.errors[0].value)


def test_os_exit_in_a_loop_handler_ends_the_program_and_its_workers(tmp_path: Path) -> None:
    with Program(
        tmp_path,
        """
        import asyncio, os
        from pipeline import Pipeline
        from stages import stage

        def leaves(n):
            print("leaving", flush=True)
            os._exit(7)

        def same(n):
            return n

        if __name__ == "__main__":
            asyncio.run((Pipeline(range(5)) >> stage(run_in="process")(same) >> stage(leaves)).run())
        """,
    ) as program:
        finished = program.finish()
        assert finished.code == 7
        assert finished.err == ""
        assert program.family() == []


def test_a_handler_that_stops_the_loop_of_iter_fails_the_run(tmp_path: Path) -> None:
    finished = run_program(
        tmp_path,
        """
        import asyncio
        from pipeline import Pipeline, PipelineFailed
        from stages import stage

        async def stops(n):
            if n == 3:
                asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
            return n

        try:
            print(list((Pipeline(range(10)) >> stage(stops)).iter()))
        except PipelineFailed as error:
            print(error, error.report.balanced)
        """,
    )
    assert finished.code == 0, finished.err
    assert "Event loop stopped before Future completed" in finished.out
    assert finished.out.rstrip().endswith("True")
