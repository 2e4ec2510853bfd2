"""Items go to threads and processes many at once, and nobody can tell but by the speed: nothing waits, nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT, Flag, Journal, assert_balanced

from pipeline import Err, ErrorPolicy, Grace, Pipeline, RunReport
from stages import SKIP, KillSwitch, stage
from workers.bell import Bell
from workers.parcel import Parcel
from workers.pooled import HOLD_LIMIT, Pace

APART = pytest.mark.parametrize("run_in", ["thread", "process"])
ORDERED = pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])

MANY = 4000
"""Enough quick items for parcels of hundreds."""


async def everything(pipeline: Pipeline[Any]) -> list[Any]:
    result = await asyncio.wait_for(pipeline.collect(), LIMIT)
    assert isinstance(result, list), result
    assert_balanced(pipeline.snapshot())
    return result


# --- nothing waits


@APART
@ORDERED
async def test_what_is_behind_a_slow_item_goes_to_an_idle_worker(run_in: str, ordered: bool, tmp_path: Path) -> None:
    overtaken = Flag(tmp_path / "overtaken")

    def waits_to_be_overtaken(item: int) -> int:
        if item == 2000:
            overtaken.wait()
        elif item == MANY - 1:
            overtaken.set()
        return item

    works = stage(run_in=run_in, concurrency=2, ordered=ordered, buffer=HOLD_LIMIT)(waits_to_be_overtaken)
    pipeline = Pipeline(range(MANY)) >> works
    assert sorted(await everything(pipeline)) == list(range(MANY))
    assert pipeline.snapshot().stages[0].failed == 0


@APART
@ORDERED
async def test_a_finished_result_does_not_wait_for_a_slow_item_in_its_parcel(run_in: str, ordered: bool, tmp_path: Path) -> None:
    go = Flag(tmp_path / "go")

    def waits(item: int) -> int:
        if item == 2000:
            go.wait()  # until everything before it has arrived
        return item

    seen: list[int] = []
    async for item in Pipeline(range(MANY)) >> stage(run_in=run_in, ordered=ordered)(waits):
        seen.append(item)
        if len(seen) == 2000:
            go.set()
    assert seen == list(range(MANY))


@APART
async def test_a_lone_item_leaves_before_there_is_a_second_one(run_in: str) -> None:
    arrived = asyncio.Event()

    async def one_by_one() -> AsyncIterator[int]:
        for item in range(200):
            yield item
            await asyncio.wait_for(arrived.wait(), LIMIT)
            arrived.clear()

    seen: list[int] = []
    async for item in Pipeline(one_by_one) >> stage(run_in=run_in, concurrency=2)(abs):
        seen.append(item)
        arrived.set()
    assert seen == list(range(200))


@pytest.mark.parametrize("mean", [1e-7, 1e-4, 1.0])
def test_a_parcel_holds_one_item_until_anything_is_known(mean: float) -> None:
    pace = Pace()
    assert pace.items_in(0.001, 2048) == 1
    pace.add(mean * 10, 10)
    assert pace.items_in(0.001, 2048) == min(max(int(0.001 / mean), 1), 2048)


# --- everything is counted


def _of_all_kinds(item: int) -> Any:
    match item % 50:
        case 7:
            raise ValueError(item)
        case 11:
            return SKIP
        case 13:
            return Err(f"no {item}")
        case 17:
            return None
        case 19:
            return [item]
        case 23:
            raise SystemExit(item)
    return item


def _shape(output: Any) -> Any:
    return (output.item, repr(output.value), output.stage, output.attempts) if isinstance(output, Err) else output


@APART
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_outcomes_of_all_kinds_come_in_order_and_as_in_the_loop(run_in: str, concurrency: int) -> None:
    works = stage(run_in=run_in, concurrency=concurrency, ordered=True, on_error=ErrorPolicy.EMIT, name="it")(_of_all_kinds)
    pipeline = Pipeline(range(MANY)) >> works
    outputs = [_shape(output) for output in await everything(pipeline)]
    expected: list[Any] = []
    for item in range(MANY):
        try:
            output = _of_all_kinds(item)
        except BaseException as error:
            output = Err(error, item, "it", 1)
        if isinstance(output, Err):
            output.item, output.stage, output.attempts = item, "it", 1
        if output is not SKIP:
            expected.append(_shape(output))
    assert outputs == expected
    metrics = pipeline.snapshot().stages[0]
    share = MANY // 50
    assert (metrics.failed, metrics.skipped, metrics.succeeded) == (3 * share, share, MANY - 3 * share)


@APART
@ORDERED
async def test_errors_of_earlier_stages_pass_between_the_parcels(run_in: str, ordered: bool) -> None:
    def refuses(item: int) -> int:
        if item % 7 == 0:
            raise ValueError(item)
        return item

    pipeline = Pipeline(range(500), on_error=ErrorPolicy.EMIT) >> stage(refuses) >> stage(run_in=run_in, ordered=ordered, concurrency=2)(abs)
    outputs = [output.item if isinstance(output, Err) else output for output in await everything(pipeline)]
    assert (outputs if ordered else sorted(outputs)) == list(range(500))
    assert pipeline.snapshot().stages[1].passed == len(range(0, 500, 7))


@APART
async def test_a_parcel_leaves_as_far_as_there_is_room(run_in: str) -> None:
    async def slowly(item: int) -> int:
        await asyncio.sleep(0)
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in=run_in, buffer=512, ordered=True)(abs) >> stage(buffer=3)(slowly)
    assert await everything(pipeline) == list(range(MANY))


@APART
async def test_a_worker_never_holds_more_than_the_limit_whatever_the_buffer(run_in: str) -> None:
    pulled = 0

    def source() -> Any:
        nonlocal pulled
        for item in range(50_000):
            pulled += 1
            yield item

    outputs = (Pipeline(source) >> stage(run_in=run_in, concurrency=2, buffer=5000)(abs)).async_iter(max_buffer=1)
    await anext(outputs)
    last = -1
    while last != pulled:
        last = pulled
        await asyncio.sleep(0.1)
    await outputs.aclose()
    assert HOLD_LIMIT < pulled <= 5000 + 2 * (1 + HOLD_LIMIT) + 1 + 1 + 1


@APART
async def test_a_plain_function_may_return_coroutines_now_and_then(run_in: str) -> None:
    async def later(item: int) -> int:
        await asyncio.sleep(0)
        return -item

    def sometimes(item: int) -> Any:
        return later(item) if item % 100 == 50 else item

    outputs = await everything(Pipeline(range(2000)) >> stage(run_in=run_in, ordered=True)(sometimes))
    assert outputs == [-item if item % 100 == 50 else item for item in range(2000)]


# --- what goes through a process is a copy


async def test_a_result_that_the_handler_changes_later_stays_as_it_was() -> None:
    def count(item: int, state: Any) -> list[int]:
        state.values.setdefault("seen", []).append(item)
        return state.values["seen"]

    outputs = await everything(Pipeline(range(300)) >> stage(run_in="process")(count))
    assert [len(output) for output in outputs] == list(range(1, 301))


async def test_items_share_nothing_with_each_other_in_a_worker() -> None:
    common: list[int] = []

    def extend(item: list[list[int]]) -> int:
        item[0].append(1)
        return len(item[0])

    outputs = await everything(Pipeline([[common] for _ in range(500)]) >> stage(run_in="process")(extend))
    assert outputs == [1] * 500


async def test_other_tasks_run_while_parcels_full_of_failures_are_settled() -> None:
    def fails(item: int) -> int:
        raise ValueError(item)

    pipeline = Pipeline(range(MANY)) >> stage(run_in="thread", buffer=HOLD_LIMIT)(fails)
    run = asyncio.create_task(pipeline.run())
    seen: set[int] = set()
    while not run.done():
        await asyncio.sleep(0)
        seen.add(pipeline.snapshot().stages[0].failed)
    assert len(seen) > 4  # they were settled in several turns of the loop


# --- stopping in the middle


async def test_after_a_cancel_no_further_item_of_a_parcel_begins() -> None:
    begun: list[int] = []

    def cancels(item: int) -> int:
        begun.append(item)
        if item == 2000:
            pipeline.cancel("enough")
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in="thread", buffer=HOLD_LIMIT)(cancels)
    result = await asyncio.wait_for(pipeline.run(), LIMIT)
    assert isinstance(result, Err)
    assert begun == list(range(2001))
    assert_balanced(result.report)


@APART
@ORDERED
async def test_a_kill_switch_in_a_parcel_stops_the_run_where_it_is(run_in: str, ordered: bool) -> None:
    def kills(item: int) -> Any:
        return KillSwitch("enough") if item == 2000 else item

    pipeline = Pipeline(range(MANY)) >> stage(run_in=run_in, ordered=ordered)(kills)
    seen: list[int] = []
    with pytest.raises(Exception, match="enough"):
        async for item in pipeline:
            seen.append(item)
    assert seen == list(range(2000))
    snapshot = pipeline.snapshot()
    assert (snapshot.stages[0].skipped, snapshot.stages[0].succeeded) == (1, 2001)
    assert_balanced(snapshot)


@APART
async def test_a_raise_in_a_parcel_delivers_what_was_before_it_and_nothing_after(run_in: str) -> None:
    def fails(item: int) -> int:
        if item == 2000:
            raise ValueError("here")
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in=run_in, on_error=ErrorPolicy.RAISE, ordered=True)(fails)
    seen: list[int] = []
    with pytest.raises(Exception, match="here"):
        async for item in pipeline:
            seen.append(item)
    assert seen == list(range(2000))
    assert_balanced(pipeline.snapshot())


async def test_a_drain_finishes_the_parcels_that_are_out() -> None:
    held = threading.Event()

    def waits(item: int) -> int:
        if item == 1000:
            pipeline.cancel("enough", drain=True)
            held.set()
        return item

    pipeline = Pipeline(iter(range(10**9))) >> stage(run_in="thread", buffer=256)(waits)
    result = await asyncio.wait_for(pipeline.run(), LIMIT)
    assert isinstance(result, Err)
    assert result.report is not None
    assert result.report.drained
    assert result.report.delivered == result.report.pulled
    assert_balanced(result.report)


# --- crashes in the middle


@ORDERED
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_worker_that_dies_in_a_parcel_costs_exactly_one_item(ordered: bool, concurrency: int, tmp_path: Path) -> None:
    died = Flag(tmp_path / "died")

    def dies_once(item: int) -> int:
        if item == 2000 and not died.is_set():
            died.set()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in="process", ordered=ordered, concurrency=concurrency)(dies_once)
    outputs = await everything(pipeline)
    expected = [item for item in range(MANY) if item != 2000]
    assert (outputs if ordered else sorted(outputs)) == expected
    metrics = pipeline.snapshot().stages[0]
    assert (metrics.lost, metrics.failed, metrics.succeeded) == (1, 1, MANY - 1)


async def test_every_death_costs_one_item_and_the_others_are_done_once_for_the_ledger(tmp_path: Path) -> None:
    def dies(item: int) -> int:
        if item % 1000 == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in="process", ordered=True, concurrency=2, on_error=ErrorPolicy.EMIT)(dies)
    outputs = [output.item if isinstance(output, Err) else output for output in await everything(pipeline)]
    assert outputs == list(range(MANY))
    assert pipeline.snapshot().stages[0].lost == 4


async def test_an_item_that_kills_its_reader_is_the_one_that_is_lost(tmp_path: Path) -> None:
    items = [[n] if n != 300 else _Deadly() for n in range(600)]
    pipeline = Pipeline(items) >> stage(run_in="process", ordered=True)(len)
    assert await everything(pipeline) == [1] * 599
    assert pipeline.snapshot().stages[0].lost == 1


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


async def test_items_that_cannot_be_read_or_sent_fail_alone_in_the_middle_of_a_parcel() -> None:
    class Unread:
        def __reduce__(self) -> Any:
            return _explode, ()

    class Unsent:
        def __reduce__(self) -> Any:
            raise RuntimeError("stays here")

    special: dict[int, Any] = {250: Unread(), 251: Unsent(), 260: Unread(), 499: Unsent()}
    items = [special.get(n, (n,)) for n in range(500)]
    pipeline = Pipeline(items) >> stage(run_in="process", ordered=True, on_error=ErrorPolicy.EMIT)(lambda item: item[0])
    outputs = await everything(pipeline)
    assert [n for n, output in enumerate(outputs) if isinstance(output, Err)] == list(special)
    assert [output for output in outputs if not isinstance(output, Err)] == [n for n in range(500) if n not in special]
    assert ["boom" in str(outputs[n].value) for n in special] == [True, False, True, False]
    assert ["stays here" in str(outputs[n].value) for n in special] == [False, True, False, True]


def _explode() -> None:
    raise ValueError("boom")


async def test_a_worker_killed_while_others_wait_for_its_parcel_gives_them_the_rest(tmp_path: Path) -> None:
    begun, journal = Flag(tmp_path / "begun"), Journal(tmp_path / "journal")

    def stops_once(item: int) -> int:
        if item == 2000 and not begun.is_set():
            journal.write(os.getpid())
            begun.set()
            signal.pause()
        return item

    pipeline = Pipeline(range(MANY), grace=Grace(abort=5)) >> stage(run_in="process", concurrency=2, ordered=True)(stops_once)
    run = asyncio.create_task(everything(pipeline))
    while not begun.is_set():
        await asyncio.sleep(0.002)
    os.kill(int(journal.lines()[0]), signal.SIGKILL)
    assert await run == [item for item in range(MANY) if item != 2000]
    assert pipeline.snapshot().stages[0].lost == 1


# --- the bell


@pytest.mark.parametrize("events", [True, False], ids=["event descriptor", "pipe"])
async def test_a_bell_that_is_rung_often_is_heard_once_and_then_again(events: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not events:
        monkeypatch.delattr(os, "eventfd")
    heard = 0
    listening = asyncio.Event()

    def listen() -> None:
        nonlocal heard
        heard += 1
        listening.set()

    bell = Bell(listen)
    for turn in range(1, 4):
        thread = threading.Thread(target=lambda: [bell.ring() for _ in range(100)])
        thread.start()
        thread.join()
        await asyncio.wait_for(listening.wait(), LIMIT)
        listening.clear()
        await asyncio.sleep(0)
        assert heard == turn
    bell.close()
    bell.close()
    bell.ring()
    await asyncio.sleep(0)
    assert heard == 3


# --- the parcel itself


def test_what_is_taken_away_from_a_parcel_follows_it() -> None:
    parcel = Parcel(list(range(10)))
    assert next(parcel.source) == 0
    late = parcel.split(8)
    early = parcel.split(4)
    assert [parcel.items, early.items, late.items] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert parcel.follower is early
    assert early.follower is late


def test_a_worker_keeps_what_it_has_begun() -> None:
    parcel = Parcel(list(range(10)))
    assert [next(parcel.source) for _ in range(3)] == [0, 1, 2]
    rest = parcel.take_unbegun()
    assert rest is not None
    assert (parcel.items, rest.items) == ([0, 1, 2], list(range(3, 10)))
    assert next(parcel.source, None) is None
    assert parcel.take_unbegun() is None


def test_results_of_a_worker_that_was_given_up_do_not_count() -> None:
    parcel = Parcel([1, 2, 3])
    parcel.results.append(1)
    rest = parcel.split(1)
    parcel.results.append(2)  # the thread has come back after all
    assert (parcel.done, parcel.complete, rest.done) == (1, True, 0)


async def test_many_runs_of_parcels_leave_reports_that_balance() -> None:
    pipeline = Pipeline(range(1000)) >> stage(run_in="thread", concurrency=3)(abs) >> stage(run_in="thread", concurrency=2, ordered=True)(abs)
    for _ in range(20):
        report = await pipeline.run()
        assert isinstance(report, RunReport)
        assert_balanced(report)
        assert report.delivered == 1000
