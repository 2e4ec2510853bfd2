"""`max_items` and `max_memory`: workers whose time is up are replaced, and nothing is lost by it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT, Flag, Journal, assert_balanced, eventually

from pipeline import Err, ErrorPolicy, Pipeline, StageConfigError, StageMetrics, WorkerLostError
from stages import InProcess, stage
from workers.process.child import Child

MB = 2**20


async def outputs(pipeline: Pipeline[Any]) -> list[Any]:
    """What a run gives that completes in time, its ledger checked."""
    result = await asyncio.wait_for(pipeline.collect(), LIMIT)
    assert isinstance(result, list), result
    assert_balanced(pipeline.snapshot())
    return result


def of(pipeline: Pipeline[Any]) -> StageMetrics:
    return pipeline.snapshot().stages[0]


def pid_of(item: int) -> tuple[int, int]:
    return item, os.getpid()


# --- max_items


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_worker_is_replaced_after_so_many_items(concurrency: int, ordered: bool) -> None:
    pipeline = Pipeline(range(200)) >> stage(run_in="process", concurrency=concurrency, ordered=ordered, max_items=20)(pid_of)
    result = await outputs(pipeline)
    items = [item for item, _ in result]
    assert (items if ordered else sorted(items)) == list(range(200))
    assert max(Counter(pid for _, pid in result).values()) <= 20
    assert (of(pipeline).succeeded, of(pipeline).failed) == (200, 0)


async def test_every_worker_of_a_stage_alone_gets_all_that_it_may_have() -> None:
    pipeline = Pipeline(range(35)) >> stage(run_in="process", max_items=10)(pid_of)
    result = await outputs(pipeline)
    assert sorted(Counter(pid for _, pid in result).values()) == [5, 10, 10, 10]


async def test_replacing_workers_uses_up_nothing_of_the_budget() -> None:
    pipeline = Pipeline(range(12)) >> stage(run_in=InProcess(restarts=0), max_items=1, ordered=True)(pid_of)
    result = await outputs(pipeline)
    assert len({pid for _, pid in result}) == 12


async def test_a_worker_whose_time_is_up_runs_its_teardown(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    far = stage(
        run_in="process",
        max_items=5,
        setup=lambda state: journal.write(f"setup {os.getpid()}"),
        teardown=lambda state: journal.write(f"teardown {os.getpid()}"),
    )
    result = await outputs(Pipeline(range(20)) >> far(pid_of))
    workers = {str(pid) for _, pid in result}
    lines = [line.split() for line in journal.lines()]
    assert workers <= {pid for what, pid in lines if what == "setup"}
    assert {pid for what, pid in lines if what == "setup"} == {pid for what, pid in lines if what == "teardown"}


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_successor_begins_when_its_predecessor_has_finished(concurrency: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def notes(item: int) -> int:
        journal.write(1)
        journal.write(-1)
        return item

    await outputs(Pipeline(range(60)) >> stage(run_in="process", concurrency=concurrency, max_items=3)(notes))
    at_work = peak = 0
    for line in journal.lines():
        at_work += int(line)
        peak = max(peak, at_work)
    assert peak <= concurrency


async def test_generators_and_retries_count_as_one_item_each() -> None:
    def twice(item: int, state: Any) -> Iterator[tuple[int, int]]:
        if state.attempt == 1:
            raise ValueError(item)
        yield item, os.getpid()
        yield item, os.getpid()

    pipeline = Pipeline(range(12)) >> stage(run_in="process", max_items=4, retry=2, ordered=True)(twice)
    result = await outputs(pipeline)
    assert [item for item, _ in result] == [item for item in range(12) for _ in range(2)]
    assert max(Counter(pid for _, pid in result).values()) == 8


async def test_a_worker_that_dies_while_its_successor_starts_costs_its_item(tmp_path: Path) -> None:
    def dies(item: int) -> int:
        if item == 9:  # the last one that its worker may have
            os._exit(1)
        return item

    pipeline = Pipeline(range(30)) >> stage(run_in="process", max_items=10, ordered=True)(dies)
    assert await outputs(pipeline) == [item for item in range(30) if item != 9]
    assert of(pipeline).lost == 1


async def test_a_cancel_reaches_workers_that_are_being_replaced(tmp_path: Path) -> None:
    begun = Flag(tmp_path / "begun")

    def waits(item: int, state: Any) -> int:
        begun.set()
        while not state.cancelled:
            threading.Event().wait(0.002)
        return item

    pipeline = Pipeline(range(9)) >> stage(run_in="process", max_items=1)(waits)
    run = asyncio.create_task(pipeline.run())
    await eventually(begun.is_set)
    await eventually(lambda: len(pipeline.runtime.processes) == 2)
    pipeline.cancel("enough")
    result = await asyncio.wait_for(run, LIMIT)
    assert isinstance(result, Err)
    assert result.report is not None
    assert_balanced(result.report)
    assert result.report.abandoned == ()


async def test_a_drain_finishes_what_workers_that_are_being_replaced_hold() -> None:
    pipeline = Pipeline(iter(int, 1)) >> stage(run_in="process", concurrency=2, max_items=2)(abs)
    run = asyncio.create_task(pipeline.run())
    await eventually(lambda: pipeline.snapshot().delivered > 10)
    pipeline.cancel("enough", drain=True)
    result = await asyncio.wait_for(run, LIMIT)
    assert isinstance(result, Err)
    report = result.report
    assert report is not None
    assert_balanced(report)
    assert (report.drained, report.stages[0].cancelled) == (True, 0)
    assert report.delivered == report.pulled


# --- max_memory


def greedy(bytes_: int) -> int:
    return len(bytearray(bytes_))


def greedy_in_small_pieces(bytes_: int) -> int:
    pieces: list[Any] = []
    while len(pieces) * 1000 < bytes_:
        pieces.append([len(pieces)] * 125)
    return len(pieces)


def greedy_in_numpy(bytes_: int) -> int:
    import numpy as np

    return int(np.ones(bytes_, dtype="u1").size)


@pytest.mark.parametrize("handler", [greedy, greedy_in_small_pieces, greedy_in_numpy], ids=lambda handler: handler.__name__)
@pytest.mark.parametrize("retry", [None, 2], ids=["in parcels", "as jobs"])
async def test_an_item_that_needs_more_memory_than_there_may_be_fails_alone(handler: Callable[[int], int], retry: int | None) -> None:
    sizes = [1000, 2000, 10**9, 3000, 4000]
    far = stage(run_in="process", ordered=True, max_memory=256 * MB, on_error=ErrorPolicy.EMIT, retry=retry)(handler)
    pipeline = Pipeline(sizes) >> far
    result = await outputs(pipeline)
    assert isinstance(result[2].value, MemoryError)
    assert result[2].attempts == (retry or 1)
    assert not any(isinstance(output, Err) for output in (*result[:2], *result[3:]))
    assert (of(pipeline).succeeded, of(pipeline).failed, of(pipeline).lost) == (4, 1, 0)


async def test_an_item_within_the_limit_has_what_it_asks_for() -> None:
    pipeline = Pipeline([150 * MB] * 6) >> stage(run_in="process", max_memory=256 * MB)(greedy)
    assert await outputs(pipeline) == [150 * MB] * 6


@pytest.mark.parametrize("megabytes", [5, 60, 120, 180])
async def test_a_handler_that_leaks_loses_nothing_however_much_it_leaks(megabytes: int) -> None:
    kept: list[bytearray] = []

    def leaks(item: int) -> tuple[int, int]:
        kept.append(bytearray(megabytes * MB))
        return item, os.getpid()

    items = range(4 + 150 // megabytes)
    pipeline = Pipeline(items) >> stage(run_in=InProcess(restarts=0), ordered=True, max_memory=256 * MB)(leaks)
    result = await outputs(pipeline)
    assert [item for item, _ in result] == list(items)
    assert max(Counter(pid for _, pid in result).values()) <= 256 // megabytes
    assert len({pid for _, pid in result}) > 1


@pytest.mark.parametrize("last_word", ["_let_go", "cancelled"])
def test_a_worn_worker_that_was_let_go_waits_for_no_answer(last_word: str) -> None:
    child = Child.__new__(Child)  # as it is when the parent's last word has come just before it finds itself worn
    child._recalled = threading.Event()
    child._let_go = child.cancelled = False
    setattr(child, last_word, True)
    child._recalled.set()
    retiring = threading.Thread(target=child._retire, daemon=True)
    retiring.start()
    retiring.join(LIMIT)
    assert not retiring.is_alive()


async def test_memory_that_is_reserved_and_not_used_does_not_count() -> None:
    import mmap

    reserved: list[Any] = []

    def opened(state: Any) -> None:
        reserved.append(mmap.mmap(-1, 1024 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    pipeline = Pipeline([100 * MB] * 3) >> stage(run_in="process", max_memory=256 * MB, setup=opened)(greedy)
    assert await outputs(pipeline) == [100 * MB] * 3


async def test_an_item_or_a_result_too_large_for_the_limit_fails_alone() -> None:
    def makes(item: Any) -> Any:
        return [bytes([number % 256]) * 1000 for number in range(90_000)] if item == "large" else len(item)

    items = ["small", "large", [bytes([number % 256]) * 1000 for number in range(200_000)], "last"]
    far = stage(run_in="process", ordered=True, max_memory=150 * MB, on_error=ErrorPolicy.EMIT)(makes)
    pipeline = Pipeline(items) >> far
    result = await outputs(pipeline)
    assert (result[0], result[3]) == (5, 4)
    for err in result[1:3]:
        assert isinstance(err.value, MemoryError) or (isinstance(err.value, WorkerLostError) and "exceeded max_memory" in str(err.value))


async def test_a_worker_that_is_too_large_from_the_start_is_one_error() -> None:
    kept: list[bytearray] = []
    far = stage(run_in="process", concurrency=2, max_memory=64 * MB, setup=lambda state: kept.append(bytearray(80 * MB)))
    result = await asyncio.wait_for((Pipeline(range(9)) >> far(abs)).run(), LIMIT)
    assert isinstance(result, Err)
    assert "before its first item, which is more than max_memory=67,108,864" in str(result.value)


# --- declaring


@pytest.mark.parametrize("value", [512, 0, -1, True, 1.5e9, "512MB"])
def test_an_obvious_mistake_in_max_memory_is_told_with_an_example(value: Any) -> None:
    with pytest.raises(StageConfigError, match=r"bytes.*512 \* 2\*\*20"):
        stage(run_in="process", max_memory=value)(abs)


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "9"])
def test_max_items_is_a_number_of_items(value: Any) -> None:
    with pytest.raises(StageConfigError, match="max_items is the number of items"):
        stage(run_in="process", max_items=value)(abs)


@pytest.mark.parametrize("option", ["max_items", "max_memory"])
@pytest.mark.parametrize("run_in", ["loop", "thread"])
def test_only_processes_can_have_limits(run_in: str, option: str) -> None:
    options: dict[str, Any] = {option: 512 * MB}
    with pytest.raises(StageConfigError, match=f'{option} is for worker processes.*run_in="process"'):
        stage(run_in=run_in, **options)(abs)
