"""Outputs that are made when the consumer asks for them, or taken many at a time: exactly counted at every moment.

Whether an iteration pulls through the stages, runs a burst in the consumer's time, or takes what waits in its buffer
must not be seen from outside. Each test therefore goes through rows of several kinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import itertools
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from helpers import LIMIT, Program, assert_balanced, eventually, settled, until

from pipeline import Err, ErrorPolicy, Pipeline, PipelineCancelled, PipelineFailed, PipelineState
from pipeline.channel import Channel
from stages import SKIP, stage, take


def plain(item: Any) -> Any:
    return int(item)


async def prompt(item: Any) -> Any:
    return int(item)


async def waiting(item: Any) -> Any:
    await asyncio.sleep(0)
    return item


def one_by_one(item: Any) -> Iterator[Any]:
    yield item


ROWS: dict[str, list[Any]] = {
    "nothing": [],
    "computing": [lambda item: item + 1, lambda item: item - 1],
    "plain": [plain, plain],
    "computing, plain": [lambda item: item + 0, plain, lambda item: item + 0],
    "prompt": [plain, prompt],
    "waiting": [plain, waiting, lambda item: item],
    "generator": [lambda item: item, one_by_one],
    "two nodes": [lambda item: item, stage(concurrency=2, ordered=True)(waiting), lambda item: item],
}
FUSED = ["computing", "plain", "computing, plain", "prompt"]


def row(source: Any, kind: str, *more: Any, **options: Any) -> Pipeline[Any]:
    pipeline = Pipeline(source, **options)
    for one in [*ROWS[kind], *more]:
        pipeline = pipeline >> (one if hasattr(one, "accepts") else stage(one))
    return pipeline


def check(pipeline: Pipeline[Any], delivered: int) -> None:
    """The ledger holds, and says what the consumer has; a closed run has handed over the rest."""
    snapshot = pipeline.snapshot()
    assert_balanced(snapshot)
    if snapshot.state is not PipelineState.CLOSED:
        assert snapshot.delivered == delivered


async def pause(times: int = 1) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


# --- counts, at every item


@pytest.mark.parametrize("every", [1, 3, 1000], ids=["awaits", "awaits now and then", "never awaits"])
@pytest.mark.parametrize("max_buffer", [1, 3, 64])
@pytest.mark.parametrize("kind", ROWS)
async def test_what_the_consumer_has_is_delivered_and_nothing_else(kind: str, max_buffer: int, every: int) -> None:
    pipeline = row(range(200), kind)
    seen: list[int] = []
    async for item in pipeline.async_iter(max_buffer):
        seen.append(item)
        check(pipeline, len(seen))
        if len(seen) % every == 0:
            await pause(2)
            check(pipeline, len(seen))
    assert seen == list(range(200))
    assert pipeline.snapshot().delivered == 200


@pytest.mark.parametrize("max_buffer", [1, 3, 64])
@pytest.mark.parametrize("kind", ROWS)
def test_what_a_synchronous_consumer_has_is_delivered_and_nothing_else(kind: str, max_buffer: int) -> None:
    pipeline = row(range(200), kind)
    seen: list[int] = []
    for item in pipeline.iter(max_buffer):
        seen.append(item)
        check(pipeline, len(seen))
    assert seen == list(range(200))
    assert pipeline.snapshot().delivered == 200


@pytest.mark.parametrize("kind", ROWS)
async def test_another_thread_never_sees_a_delivery_undone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = row(range(300), kind)
    readings: list[int] = []
    close_lot = Channel.close_lot

    def read_then_close(channel: Channel, lot: Any) -> int:
        readings.append(pipeline.snapshot().delivered)
        taken = close_lot(channel, lot)
        readings.append(pipeline.snapshot().delivered)
        return taken

    monkeypatch.setattr(Channel, "close_lot", read_then_close)
    number = 0
    async for _ in pipeline.async_iter(8):
        number += 1
        readings.append(pipeline.snapshot().delivered)
        if number % 5 == 0:
            await asyncio.sleep(0)
    assert readings == sorted(readings)


@pytest.mark.parametrize("kind", ROWS)
async def test_lengths_are_tallied_as_they_are_delivered(kind: str) -> None:
    def text(item: int) -> str:
        return "x" * (item % 4)

    total = sum(n % 4 for n in range(100))
    pipeline = row(range(100), kind, text, tally_len=True)
    async for _ in pipeline.async_iter(3):
        await asyncio.sleep(0)
    assert pipeline.runtime.closed.result().tallied == total  # type: ignore[union-attr]
    for _ in pipeline.iter(3):
        pass
    assert pipeline.runtime.closed.result().tallied == total  # type: ignore[union-attr]
    with pytest.raises(PipelineCancelled) as caught:
        tallied = 0
        async for item in pipeline.async_iter(3):
            tallied += len(item)
            if item == "xx":
                pipeline.cancel("enough")
    assert caught.value.report is not None
    assert caught.value.report.tallied == tallied


@pytest.mark.parametrize("kind", FUSED)
async def test_a_consumer_that_is_busy_when_the_source_ends_still_gets_the_rest_counted(kind: str) -> None:
    asked, told = asyncio.Event(), asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 0
        await asked.wait()
        told.set()
        for n in range(1, 20):
            yield n

    pipeline = row(source, kind)
    outputs = pipeline.async_iter()
    seen = [await anext(outputs)]
    asked.set()
    await told.wait()
    async for item in outputs:
        seen.append(item)
        await pause(5)
        check(pipeline, len(seen))
    assert seen == list(range(20))
    assert pipeline.snapshot().delivered == 20
    assert_balanced(pipeline.snapshot())


# --- how far ahead


@pytest.mark.parametrize(("buffer", "max_buffer"), [(64, 1), (8, 2), (1, 1), (3, 64)])
async def test_a_consumer_that_awaits_does_not_make_the_source_run_ahead(buffer: int, max_buffer: int) -> None:
    pulled = 0
    asked, told = asyncio.Event(), asyncio.Event()

    async def source() -> AsyncIterator[int]:
        nonlocal pulled
        for n in itertools.count():
            if n == 1:
                await asked.wait()
                told.set()
            pulled += 1
            yield n

    pipeline = Pipeline(source) >> stage(buffer=buffer)(lambda item: item + 1)
    async with contextlib.aclosing(pipeline.async_iter(max_buffer)) as outputs:
        await anext(outputs)
        asked.set()
        await told.wait()
        taken, ahead = 1, 0
        for _ in range(150):
            await anext(outputs)
            taken += 1
            await pause(6)
            ahead = max(ahead, pulled - taken)
            assert_balanced(pipeline.snapshot())
    assert ahead <= buffer + 1 + 1 + max_buffer


@pytest.mark.parametrize("max_buffer", [1, 16])
@pytest.mark.parametrize("kind", ["computing", "plain", "prompt", "waiting"])
async def test_an_iterator_is_not_read_further_than_there_is_room_for(kind: str, max_buffer: int) -> None:
    source = itertools.count()
    pipeline = row(source, kind)
    stages = len(ROWS[kind])
    async with contextlib.aclosing(pipeline.async_iter(max_buffer)) as outputs:
        for taken in range(1, 3000):
            await anext(outputs)
            position = int(repr(source)[len("count(") : -1])
            assert position - taken <= stages * (64 + 1) + 1 + max_buffer
            if taken % 100 == 0:
                await pause(3)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("max_buffer", [1, 3])
async def test_no_more_outputs_wait_than_the_buffers_hold(kind: str, max_buffer: int) -> None:
    pipeline = row(range(10**6), kind)
    inner = 64 * len(ROWS[kind])
    async with contextlib.aclosing(pipeline.async_iter(max_buffer)) as outputs:
        for number in range(1, 200):
            await anext(outputs)
            if number % 3 == 0:
                await pause(4)
            assert pipeline.snapshot().undelivered <= max_buffer + inner


@pytest.mark.parametrize("kind", ROWS)
def test_no_more_outputs_wait_for_a_synchronous_consumer_than_the_buffers_hold(kind: str) -> None:
    pipeline = row(range(10**6), kind)
    inner = 64 * len(ROWS[kind])
    outputs = pipeline.iter(2)
    next(outputs)
    asyncio.run(settled(lambda: pipeline.snapshot().undelivered, 0.05))
    for _ in range(50):
        assert pipeline.snapshot().undelivered <= 2 + inner
        next(outputs)
    outputs.close()
    assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("kind", FUSED)
async def test_a_consumer_that_works_without_awaiting_lets_the_loop_go_round(kind: str) -> None:
    loop, number, before, worst = asyncio.get_running_loop(), 0, 0, 0

    def look() -> None:
        nonlocal before, worst
        worst, before = max(worst, number - before), number
        if number < 200:
            loop.call_soon(look)

    loop.call_soon(look)
    async for _ in row(range(200), kind):
        number += 1
        ready = perf_counter() + 0.001
        while perf_counter() < ready:
            pass
    assert worst <= 64


# --- leaving


LEAVING = ["aclose", "throw", "cancel", "garbage"]


@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.parametrize("kind", ROWS)
async def test_leaving_at_any_position_leaves_nothing_and_counts_what_was_had(kind: str, way: str) -> None:
    for position, awaits in ((1, False), (2, True), (64, False), (65, True), (150, False)):
        pipeline = row(range(2000), kind)
        before = asyncio.all_tasks()
        outputs = pipeline.async_iter(64)
        for _ in range(position):
            await anext(outputs)
            if awaits:
                await asyncio.sleep(0)
        check(pipeline, position)
        if way == "aclose":
            await outputs.aclose()
        elif way == "throw":
            with pytest.raises(KeyError, match="mine"):
                await outputs.athrow(KeyError("mine"))
        elif way == "cancel":
            task = asyncio.create_task(anext(outputs))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            if not task.cancel():
                position += 1
            else:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                    position += 1
            await outputs.aclose()
        else:
            async for _ in outputs:
                position += 1
                break
            del outputs
            gc.collect()
        await eventually(lambda pipeline=pipeline: pipeline.snapshot().state is PipelineState.CLOSED)
        await eventually(lambda before=before: asyncio.all_tasks() <= before)
        snapshot = pipeline.snapshot()
        assert_balanced(snapshot)
        assert snapshot.delivered == position
        assert snapshot.reasons


@pytest.mark.parametrize("kind", ROWS)
def test_leaving_a_synchronous_iteration_at_any_position_counts_what_was_had(kind: str) -> None:
    for position in (1, 2, 21, 64, 65, 66, 200, 1500):
        pipeline = row(range(2000), kind)
        outputs = pipeline.iter(64)
        for _ in range(position):
            next(outputs)
        check(pipeline, position)
        outputs.close()
        snapshot = pipeline.snapshot()
        assert_balanced(snapshot)
        assert (snapshot.delivered, snapshot.state) == (position, PipelineState.CLOSED)


# --- stops and failures


@pytest.mark.parametrize("drain", [False, True], ids=["abort", "drain"])
@pytest.mark.parametrize("awaits", [False, True], ids=["at once", "awaits"])
@pytest.mark.parametrize("kind", ROWS)
async def test_a_consumer_that_stops_the_pipeline_gets_what_was_produced(kind: str, awaits: bool, drain: bool) -> None:
    for position in (1, 2, 20, 64, 65, 150):
        pipeline = row(range(2000), kind)
        seen: list[int] = []
        with pytest.raises(PipelineCancelled) as caught:
            async for item in pipeline.async_iter(16):
                seen.append(item)
                if len(seen) == position:
                    assert pipeline.cancel("enough", drain=drain)
                check(pipeline, len(seen))
                if awaits:
                    await asyncio.sleep(0)
        report = caught.value.report
        assert report is not None
        assert seen == list(range(len(seen)))
        assert report.delivered == len(seen) >= position
        assert_balanced(report)
        if drain:
            assert report.drained
            assert seen == list(range(report.pulled))


@pytest.mark.parametrize("drain", [False, True], ids=["abort", "drain"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_synchronous_consumer_that_stops_the_pipeline_gets_what_was_produced(kind: str, drain: bool) -> None:
    for position in (1, 20, 64, 150):
        pipeline = row(range(100_000), kind)
        seen: list[int] = []
        with pytest.raises(PipelineCancelled) as caught:
            for item in pipeline.iter(16):
                seen.append(item)
                if len(seen) == position:
                    assert pipeline.cancel("enough", drain=drain)
        report = caught.value.report
        assert report is not None
        assert seen == list(range(len(seen)))
        assert report.delivered == len(seen) >= position
        assert_balanced(report)
        if drain:
            assert report.drained
            assert seen == list(range(report.pulled))


@pytest.mark.parametrize("way", ["cancel", "leave"])
async def test_a_coroutine_that_a_plain_function_returned_is_closed_when_nobody_awaits_it_any_more(way: str) -> None:
    def sometimes_later(item: int) -> Any:
        if item < 100:
            return item
        made.append(waiting(item))
        return made[-1]

    for position in range(60, 101):
        made: list[Any] = []
        pipeline = Pipeline(range(200)) >> stage(sometimes_later)
        outputs = pipeline.async_iter()
        for _ in range(position):
            await anext(outputs)
        if way == "cancel":
            pipeline.cancel("enough")
            with pytest.raises(PipelineCancelled):
                async for _ in outputs:
                    pass
        else:
            await outputs.aclose()
        states = {inspect.getcoroutinestate(coroutine) for coroutine in made}
        for coroutine in made:
            coroutine.close()
        assert states <= {inspect.CORO_CLOSED}
        assert_balanced(pipeline.snapshot())


class Fragile(int):
    """Cannot be added to when it is 13 or more."""

    def __add__(self, other: Any) -> Any:
        if self >= int(other):
            raise ValueError(int(self))
        return Fragile(int(self))


@pytest.mark.parametrize("awaits", [False, True], ids=["never awaits", "awaits"])
@pytest.mark.parametrize("max_buffer", [1, 64])
@pytest.mark.parametrize("policy", ["RAISE", "DROP", "EMIT"])
@pytest.mark.parametrize("handler", ["operator", "plain", "prompt", "waiting"])
async def test_an_item_that_fails_is_where_it_should_be(
    handler: str, policy: str, max_buffer: int, awaits: bool
) -> None:
    def fragile(item: Any) -> Any:
        if item >= failing:
            raise ValueError(int(item))
        return item

    async def fragile_prompt(item: Any) -> Any:
        return fragile(item)

    async def fragile_waiting(item: Any) -> Any:
        await asyncio.sleep(0)
        return fragile(item)

    for failing in (0, 1, 64, 130):
        functions: dict[str, Any] = {
            "operator": lambda item, failing=failing: item + failing,
            "plain": fragile,
            "prompt": fragile_prompt,
            "waiting": fragile_waiting,
        }
        if handler == "operator":
            limit = failing
            functions["operator"] = lambda item: item + limit  # noqa: B023
        items = [Fragile(n) for n in range(failing + 3)]
        failed = stage(on_error=ErrorPolicy[policy], name="fragile")(functions[handler])
        pipeline = Pipeline(items) >> stage(lambda item: item) >> failed >> stage(lambda item: item)
        seen: list[Any] = []
        ending = None
        try:
            async for item in pipeline.async_iter(max_buffer):
                seen.append(item)
                check(pipeline, len(seen))
                if awaits:
                    await asyncio.sleep(0)
        except PipelineFailed as error:
            ending = error
        assert [int(item) for item in seen if not isinstance(item, Err)] == list(range(failing))
        errors = [int(item.item) for item in seen if isinstance(item, Err)]
        assert errors == (list(range(failing, failing + 3)) if policy == "EMIT" else [])
        assert (ending is not None) == (policy == "RAISE")
        metrics = pipeline.snapshot().stage("fragile")
        assert (metrics.succeeded, metrics.failed) == (failing, 1 if policy == "RAISE" else 3)
        assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("amount", [1, 5, 64, 65, 300])
@pytest.mark.parametrize("kind", ROWS)
async def test_take_ends_an_iteration(kind: str, amount: int) -> None:
    pipeline = row(itertools.count(), kind, take(amount), lambda item: item)
    seen: list[int] = []
    async for item in pipeline:
        seen.append(item)
        check(pipeline, len(seen))
    assert seen == list(range(amount))
    assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("kind", ROWS)
async def test_skips_and_ever_new_types_among_what_is_pulled(kind: str) -> None:
    def odd(item: int) -> Any:
        if item % 3 == 1:
            return SKIP
        return type("Fresh", (int,), {})(item) if item % 3 == 2 else item

    expected = [n for n in range(500) if n % 3 != 1]
    assert [item async for item in row(range(500), kind, odd, lambda item: item)] == expected
    assert list(row(range(500), kind, odd, lambda item: item).iter()) == expected


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit(3)"])
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_an_interrupt_raised_in_a_handler_does_not_leave_a_synchronous_consumer_waiting(
    tmp_path: Path, kind: str, error: str
) -> None:
    program_text = f"""
        from pipeline import Pipeline, PipelineFailed, PipelineCancelled
        from stages import stage

        @stage
        {"async " if kind == "coroutine" else ""}def handler(item):
            if item == 3:
                raise {error}
            return item

        pipeline = Pipeline(range(6)) >> handler
        try:
            for item in pipeline.iter():
                print(item, flush=True)
        except BaseException as error:
            print("over", pipeline.snapshot().state.name, flush=True)
    """
    with Program(tmp_path, program_text) as program:
        finished = program.finish(15)
    assert finished.out.splitlines()[-1] == "over CLOSED"


# --- in company


@pytest.mark.parametrize("kind", ROWS)
async def test_two_iterations_take_turns(kind: str) -> None:
    one, two = row(range(500), kind), row(range(500), kind)
    first, second = one.async_iter(3), two.async_iter(64)
    for n in range(500):
        assert await anext(first) == n
        assert await anext(second) == n
        check(one, n + 1)
        check(two, n + 1)
    for outputs in (first, second):
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("outer", ["handler", "source", "consumer"])
async def test_a_pipeline_inside_of_a_pipeline_is_pulled_like_any_other(outer: str, kind: str) -> None:
    async def total(number: int) -> int:
        inner = row(range(number), kind)
        result, had = 0, 0
        async for item in inner.async_iter(3):
            result += item
            had += 1
            check(inner, had)
            assert_balanced(pipeline.snapshot())
        return result

    if outer == "handler":
        pipeline = row(range(25), kind, total)
        assert [item async for item in pipeline] == [sum(range(n)) for n in range(25)]
    elif outer == "source":
        inner = row(range(300), kind)
        pipeline = row(inner.async_iter, kind)
        assert [item async for item in pipeline] == list(range(300))
        assert_balanced(inner.snapshot())
    else:
        pipeline = row(range(25), kind)
        async for item in pipeline.async_iter(2):
            assert await total(item) == sum(range(item))
    assert_balanced(pipeline.snapshot())


async def test_a_consumer_in_another_task_goes_on_where_the_first_stopped() -> None:
    for kind in ROWS:
        pipeline = row(range(200), kind)
        outputs = pipeline.async_iter(4)
        seen = [await anext(outputs) for _ in range(50)]

        async def rest(outputs: Any = outputs) -> list[int]:
            return [item async for item in outputs]

        seen += await asyncio.create_task(rest())
        assert seen == list(range(200))


# --- sources


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: list(range(150)),
    "tuple": lambda: tuple(range(150)),
    "range": lambda: range(150),
    "long range": lambda: range(1 << 70, (1 << 70) + 150),
    "str": lambda: "".join(map(chr, range(40, 190))),
    "ascii": lambda: "abc" * 50,
    "bytes": lambda: bytes(range(150)),
    "bytearray": lambda: bytearray(range(150)),
    "memoryview": lambda: memoryview(bytes(range(150))),
    "dict": lambda: dict.fromkeys(range(150)),
    "keys": lambda: dict.fromkeys(range(150)).keys(),
    "values": lambda: {n: n for n in range(150)}.values(),
    "items": lambda: {n: n for n in range(150)}.items(),
    "set": lambda: set(range(150)),
    "frozenset": lambda: frozenset(range(150)),
    "deque": lambda: deque(range(150)),
    "reversed": lambda: reversed(list(range(150))),
    "empty list": list,
    "empty dict": dict,
    "empty range": lambda: range(0),
    "repeat": lambda: itertools.repeat(7, 150),
    "map": lambda: map(str, range(150)),
    "zip": lambda: zip(range(150), range(150), strict=True),
    "generator": lambda: (n for n in range(150)),
    "function": lambda: lambda: list(range(150)),
}
ITERATORS = [
    "list",
    "tuple",
    "range",
    "long range",
    "str",
    "ascii",
    "bytes",
    "bytearray",
    "dict",
    "values",
    "items",
    "set",
    "deque",
]


def same(item: Any) -> Any:
    assert item is not None
    return item


async def same_later(item: Any) -> Any:
    await asyncio.sleep(0)
    return item


@pytest.mark.parametrize(
    "name", [*SOURCES, *(f"iterator over {name}" for name in ITERATORS), "file", "async generator"]
)
async def test_every_kind_of_source_gives_what_a_for_loop_gets(name: str, tmp_path: Path) -> None:
    async def generate() -> AsyncIterator[int]:
        for n in range(150):
            yield n

    def opened() -> Any:
        if name == "file":
            return open(file)
        if name == "async generator":
            return generate()
        if name.startswith("iterator over "):
            return iter(SOURCES[name.removeprefix("iterator over ")]())
        return SOURCES[name]()

    file = tmp_path / "lines"
    file.write_text("".join(f"{n}\n" for n in range(150)))
    if name == "async generator":
        expected = list(range(150))
    elif name == "file":
        expected = [f"{n}\n" for n in range(150)]
    else:
        made = opened()
        expected = list(made() if callable(made) else made)
    rows: list[list[Any]] = [[lambda item: item], [same], [same, same_later], []]
    for functions, how in itertools.product(rows, ["run", "collect", "async for", "iter"]):
        source = opened()
        pipeline = Pipeline(source)
        for one in functions:
            pipeline = pipeline >> stage(one)
        got = expected
        if how == "run":
            await pipeline.run()
        elif how == "collect":
            got = await pipeline.collect()
        elif how == "async for":
            got = [item async for item in pipeline.async_iter(5)]
        else:
            got = await asyncio.to_thread(lambda pipeline=pipeline: list(pipeline.iter(5)))
        assert got == expected
        snapshot = pipeline.snapshot()
        assert (snapshot.pulled, snapshot.delivered) == (len(expected), len(expected))
        assert_balanced(snapshot)
        if name == "file":
            assert source.closed


@pytest.mark.parametrize("how", ["run", "async for", "iter"])
@pytest.mark.parametrize("by", [list, iter, deque], ids=["list", "iterator", "deque"])
async def test_a_list_that_grows_while_it_is_read_is_read_to_its_end(by: Any, how: str) -> None:
    items = list(range(10))
    source = items if by is list else iter(items) if by is iter else deque(items)

    def grow(item: int) -> int:
        if by is not deque and item < 3000:
            items.append(item + 10)
        return item

    pipeline = Pipeline(source) >> stage(grow) >> stage(lambda item: item)
    if how == "run":
        await pipeline.run()
    elif how == "async for":
        assert [item async for item in pipeline] == sorted(items)
    else:
        assert await asyncio.to_thread(lambda: list(pipeline.iter())) == sorted(items)
    assert pipeline.snapshot().delivered == len(items) == (10 if by is deque else 3010)


@pytest.mark.parametrize("how", ["run", "async for", "iter"])
async def test_a_list_that_shrinks_while_it_is_read_ends_the_run_in_balance(how: str) -> None:
    items = list(range(3000))

    def shrink(item: int) -> int:
        if item % 2:
            items.pop()
        return item

    pipeline = Pipeline(items) >> stage(shrink) >> stage(lambda item: item)
    if how == "run":
        await pipeline.run()
        seen = list(range(pipeline.snapshot().delivered))
    elif how == "async for":
        seen = [item async for item in pipeline]
    else:
        seen = await asyncio.to_thread(lambda: list(pipeline.iter()))
    assert seen == list(range(len(seen)))
    assert 2000 <= len(seen) < 3000
    assert pipeline.snapshot().delivered == len(seen)
    assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("how", ["run", "async for", "iter"])
@pytest.mark.parametrize("name", ["dict", "set", "deque"])
async def test_a_collection_that_changes_while_it_is_read_fails_the_run_once(name: str, how: str) -> None:
    source = SOURCES[name]()

    def change(item: int) -> int:
        if item == 30:
            {
                "dict": lambda: source.setdefault(1000, 1),
                "set": lambda: source.add(1000),
                "deque": lambda: source.append(1000),
            }[name]()
        return item

    pipeline = Pipeline(source) >> stage(change)
    if how == "run":
        await pipeline.run()
    elif how == "async for":
        with pytest.raises(PipelineFailed):
            async for _ in pipeline:
                pass
    else:
        with pytest.raises(PipelineFailed):
            await asyncio.to_thread(lambda: list(pipeline.iter()))
    snapshot = pipeline.snapshot()
    assert [reason.code for reason in snapshot.reasons] == ["source_error"]
    assert snapshot.delivered == snapshot.pulled >= 31
    assert_balanced(snapshot)


# --- from other threads


@pytest.mark.parametrize("kind", ROWS)
def test_the_ledger_holds_in_another_thread_while_outputs_are_taken(kind: str) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    pipeline = row(range(10**7), kind)
    over, wrong = threading.Event(), list[str]()
    looked = threading.Event()

    def watch() -> None:
        while not over.is_set():
            try:
                assert_balanced(pipeline.snapshot())
            except AssertionError as error:
                wrong.append(str(error)[:300])
            looked.set()

    async def main() -> None:
        async with contextlib.aclosing(pipeline.async_iter(16)) as outputs:
            number = 0
            async for _ in outputs:
                number += 1
                if number % 7 == 0:
                    await asyncio.sleep(0)
                if number == 3000:
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        until(looked.is_set, LIMIT)
        asyncio.run(main())
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    assert pipeline.snapshot().delivered == 3000
