"""The first operators: what each gives, what each counts, and that each can be stopped at any moment."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from aiostream import pipe, stream
from helpers import LIMIT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import Err, ErrorPolicy, Grace, Pipeline, RunReport, is_err
from stages import SKIP, KillSwitch, Retry, batch, filter, flat_map, map, stage, take, tap
from stages import pipe as pipe_stage

quick = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Boom(Exception):
    """The failure that the tests inject."""


async def double_later(item: int) -> int:
    await asyncio.sleep(0)
    return item * 2


async def is_even_later(item: int) -> bool:
    await asyncio.sleep(0)
    return item % 2 == 0


async def twice_later(item: int) -> list[int]:
    await asyncio.sleep(0)
    return [item, item]


def twice(item: int) -> Iterator[int]:
    yield item
    yield item


async def twice_async(item: int) -> AsyncIterator[int]:
    yield item
    await asyncio.sleep(0)
    yield item


async def gives(*chain: Any, source: Any = (0, 1, 2, 3)) -> Any:
    """What a pipeline of these stages gives for the source."""
    pipeline: Pipeline[Any] = Pipeline(source)
    for one in chain:
        pipeline = pipeline >> one
    outputs = await pipeline.collect()
    row = pipeline.snapshot().stages[-1]
    assert (row.in_flight, row.queued) == (0, 0)
    return outputs


class TestMap:
    @pytest.mark.parametrize("fn", [lambda item: item * 2, double_later, lambda item: double_later(item)], ids=["plain", "async", "returns a coroutine"])
    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_every_item_goes_through_the_function(self, fn: Any, run_in: str) -> None:
        assert await gives(map(fn, run_in=run_in)) == [0, 2, 4, 6]

    async def test_it_takes_the_options_of_a_stage(self) -> None:
        calls: list[int] = []

        def flaky(item: int) -> int:
            calls.append(item)
            if len(calls) == 1:
                raise Boom
            return item

        pipeline = Pipeline([5]) >> map(flaky, concurrency=2, ordered=True, retry=Retry(attempts=2, wait=0), name="mine", buffer=3)
        assert await pipeline.collect() == [5]
        row = pipeline.snapshot().stage("mine")
        assert (row.retried, row.concurrency, row.capacity) == (1, 2, 3)

    async def test_it_may_take_state(self) -> None:
        def running(item: int, state: Any) -> int:
            state.update(total=state.get("total", 0) + item)
            return state.get("total")

        assert await gives(map(running)) == [0, 1, 3, 6]

    async def test_what_a_handler_may_return_it_may_return_too(self) -> None:
        answers = [SKIP, Err("bad"), 2, KillSwitch("enough")]
        pipeline = Pipeline(range(9)) >> map(lambda item: answers[item], name="map")
        result = await pipeline.run()
        assert is_err(result)
        row = pipeline.snapshot().stage("map")
        assert (row.received, row.skipped, row.dropped, row.emitted) == (4, 2, 1, 1)


class TestFilter:
    @pytest.mark.parametrize(
        "fn",
        [lambda item: item % 2 == 0, is_even_later, lambda item: is_even_later(item), lambda item, state: item % 2 == 0],
        ids=["plain", "async", "returns a coroutine", "state"],
    )
    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_items_for_which_the_function_is_true_go_on(self, fn: Any, run_in: str) -> None:
        assert await gives(filter(fn, run_in=run_in)) == [0, 2]

    async def test_a_refusal_is_a_success_that_is_skipped(self) -> None:
        report = await (Pipeline(range(100)) >> filter(lambda item: item < 10, name="f")).run()
        assert isinstance(report, RunReport)
        row = report.stage("f")
        assert (row.received, row.succeeded, row.skipped, row.emitted, row.failed) == (100, 100, 90, 10, 0)

    async def test_any_true_value_will_do(self) -> None:
        assert await gives(filter(lambda item: [1] * item)) == [1, 2, 3]

    async def test_falsy_items_can_be_kept(self) -> None:
        assert await gives(filter(lambda item: True), source=[None, 0, "", False]) == [None, 0, "", False]

    async def test_a_predicate_that_raises_fails_the_item(self) -> None:
        def breaks(item: int) -> bool:
            return 1 / item > 0

        assert await gives(filter(breaks)) == [1, 2, 3]


class TestFlatMap:
    @pytest.mark.parametrize(
        "fn",
        [
            lambda item: [item, item],
            lambda item: (item for _ in range(2)),
            twice,
            twice_async,
            twice_later,
        ],
        ids=["list", "iterator", "generator", "async generator", "coroutine"],
    )
    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_every_element_of_what_the_function_returns_goes_on(self, fn: Any, run_in: str) -> None:
        assert await gives(flat_map(fn, run_in=run_in)) == [0, 0, 1, 1, 2, 2, 3, 3]

    async def test_nothing_is_a_success_with_no_output(self) -> None:
        report = await (Pipeline(range(9)) >> flat_map(lambda item: [], name="f")).run()
        assert isinstance(report, RunReport)
        row = report.stage("f")
        assert (row.received, row.succeeded, row.emitted, row.failed) == (9, 9, 0, 0)

    @pytest.mark.parametrize("fn", [lambda item: twice_async(item), lambda item: twice_later(item)])
    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_something_to_await_from_a_plain_function_fails_the_item_with_advice(self, fn: Any, run_in: str) -> None:
        report = await (Pipeline([1]) >> flat_map(fn, run_in=run_in)).run()
        assert isinstance(report, RunReport)
        assert report.failed == 1
        assert "async function itself" in str(report.errors[0].value)

    async def test_what_cannot_be_iterated_fails_the_item(self) -> None:
        pipeline = Pipeline([1, 2]) >> flat_map(lambda item: item, on_error=ErrorPolicy.EMIT)
        outputs = await pipeline.collect()
        assert isinstance(outputs, list)
        assert [type(output.value) for output in outputs if isinstance(output, Err)] == [TypeError, TypeError]

    async def test_an_endless_iterable_is_read_no_further_than_there_is_room(self) -> None:
        pulled: list[int] = []

        def endless(item: int) -> Iterator[int]:
            for number in itertools.count():
                pulled.append(number)
                yield number

        pipeline = Pipeline([0]) >> flat_map(endless)
        got: list[int] = []
        iteration = pipeline.async_iter(4)
        async for number in iteration:
            got.append(number)
            if number == 9:
                break
        await iteration.aclose()
        assert got == list(range(10))
        assert len(pulled) <= 10 + 4 + 1

    async def test_a_generator_is_closed_when_the_pipeline_stops(self) -> None:
        closed: list[str] = []

        def endless(item: int) -> Iterator[int]:
            try:
                yield from itertools.count()
            finally:
                closed.append("plain")

        async def endless_async(item: int) -> AsyncIterator[int]:
            try:
                for number in itertools.count():
                    yield number
            finally:
                closed.append("async")

        for fn in (endless, endless_async):
            await gives(flat_map(fn), take(3), source=[0])
        assert closed == ["plain", "async"]


class TestTap:
    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    @pytest.mark.parametrize("kind", ["plain", "async", "returns a coroutine", "state"])
    async def test_the_function_sees_each_item_and_the_item_goes_on(self, kind: str, run_in: str) -> None:
        seen: list[int] = []

        async def later(item: int) -> str:
            await asyncio.sleep(0)
            seen.append(item)
            return "ignored"

        fn: dict[str, Callable[..., Any]] = {
            "plain": seen.append,
            "async": later,
            "returns a coroutine": lambda item: later(item),
            "state": lambda item, state: seen.append(item),
        }
        assert await gives(tap(fn[kind], run_in=run_in)) == [0, 1, 2, 3]
        assert seen == [0, 1, 2, 3]

    async def test_what_it_returns_is_ignored_whatever_it_is(self) -> None:
        assert await gives(tap(lambda item: [SKIP, KillSwitch("x"), Err("y"), None][item])) == [0, 1, 2, 3]

    async def test_what_it_raises_fails_the_item(self) -> None:
        assert await gives(tap(lambda item: 1 / item)) == [1, 2, 3]


class TestTake:
    @pytest.mark.parametrize("amount", [0, 1, 3, 4, 5, 100])
    @pytest.mark.parametrize("before", ["fused", "coroutine", "thread", "generator", "nothing"])
    async def test_the_first_items_go_on_and_no_more(self, amount: int, before: str) -> None:
        stages: dict[str, list[Any]] = {
            "fused": [map(lambda item: item)],
            "coroutine": [stage(concurrency=2, ordered=True)(double_later)],
            "thread": [map(lambda item: item, run_in="thread")],
            "generator": [flat_map(lambda item: [item])],
            "nothing": [],
        }
        expected = [item * (2 if before == "coroutine" else 1) for item in range(4)][:amount]
        assert await gives(*stages[before], take(amount)) == expected

    @pytest.mark.parametrize("item", [None, 0, False, "x"])
    @pytest.mark.parametrize("amount", [0, 1, 3])
    async def test_it_counts_what_a_generator_before_it_makes(self, item: Any, amount: int) -> None:
        assert await gives(flat_map(lambda _: [item] * 5), take(amount)) == [item] * amount

    async def test_take_none_pulls_nothing(self) -> None:
        touched: list[int] = []

        async def source() -> AsyncIterator[int]:
            touched.append(1)
            yield 1

        pipeline = Pipeline(source) >> take(0)
        assert await pipeline.collect() == []
        assert pipeline.snapshot().stage("take").received == 0

    @pytest.mark.parametrize("kind", ["generator", "async generator"])
    async def test_an_endless_source_is_released_and_closed(self, kind: str) -> None:
        closed: list[int] = []

        def plain() -> Iterator[int]:
            try:
                yield from itertools.count()
            finally:
                closed.append(1)

        async def later() -> AsyncIterator[int]:
            try:
                for number in itertools.count():
                    yield number
            finally:
                closed.append(1)

        pipeline = Pipeline(plain if kind == "generator" else later) >> map(lambda item: item) >> take(5)
        report = await pipeline.run()
        assert isinstance(report, RunReport)
        assert (report.outcome, report.delivered, report.reasons) == ("completed", 5, ())
        assert closed == [1]

    async def test_what_the_stages_before_it_had_taken_is_in_the_ledger(self) -> None:
        @stage(concurrency=4)
        async def slow(item: int) -> int:
            if item:
                await asyncio.Event().wait()  # until it is let go
            return item

        report = await (Pipeline(itertools.count()) >> slow >> take(1)).run()
        assert isinstance(report, RunReport)
        row = report.stage("slow")
        assert report.balanced
        assert (row.succeeded, row.received - row.cancelled) == (1, 1)
        assert report.pulled == row.received + row.discarded

    async def test_stages_behind_it_finish_what_they_have(self) -> None:
        held: list[int] = []

        @stage(buffer=10)
        async def behind(item: int) -> int:
            for _ in range(5):
                await asyncio.sleep(0)
            held.append(item)
            return item

        assert await gives(take(4), behind, source=itertools.count()) == [0, 1, 2, 3]
        assert held == [0, 1, 2, 3]

    async def test_errors_pass_and_do_not_count(self) -> None:
        def odd_fails(item: int) -> int:
            if item % 2:
                raise Boom
            return item

        outputs = await gives(map(odd_fails, on_error=ErrorPolicy.EMIT), take(2), source=range(9))
        assert [output for output in outputs if not is_err(output)] == [0, 2]
        assert len(outputs) == 3

    async def test_several_in_a_row_give_the_least(self) -> None:
        assert await gives(take(3), take(2), take(9), source=itertools.count()) == [0, 1]

    async def test_it_starts_to_count_afresh_in_every_run(self) -> None:
        pipeline = Pipeline(range(9)) >> take(2)
        assert [await pipeline.collect() for _ in range(2)] == [[0, 1]] * 2

    async def test_a_process_stage_before_it_is_let_go(self) -> None:
        assert await gives(map(lambda item: item, run_in="process", ordered=True), take(2), source=range(100)) == [0, 1]


class TestBatch:
    @pytest.mark.parametrize(("size", "expected"), [(1, [[0], [1], [2], [3]]), (3, [[0, 1, 2], [3]]), (4, [[0, 1, 2, 3]]), (9, [[0, 1, 2, 3]])])
    async def test_items_come_in_lists_and_the_last_may_be_shorter(self, size: int, expected: list[list[int]]) -> None:
        assert await gives(batch(size)) == expected
        assert await gives(batch(size, within=100)) == expected

    async def test_nothing_gives_no_batch(self) -> None:
        assert await gives(batch(3, within=100), source=[]) == []

    async def test_its_items_are_in_flight_until_the_batch_has_left(self) -> None:
        seen: list[tuple[int, int]] = []

        async def source() -> AsyncIterator[int]:
            for number in range(5):
                yield number
                for _ in range(5):
                    await asyncio.sleep(0)
                row = pipeline.snapshot().stage("batch")
                seen.append((row.in_flight, row.succeeded))

        pipeline = Pipeline(source) >> batch(3)
        await pipeline.run()
        assert seen == [(1, 0), (2, 0), (0, 3), (1, 3), (2, 3)]

    async def test_a_part_of_a_batch_leaves_in_time_when_nobody_else_comes(self) -> None:
        left = asyncio.Event()

        async def source() -> AsyncIterator[int]:
            yield 0
            yield 1
            await left.wait()  # nothing more comes until the two have left
            yield 2

        outputs: list[list[int]] = []
        async for some in Pipeline(source) >> batch(100, within=0.01):
            outputs.append(some)
            left.set()
        assert outputs == [[0, 1], [2]]

    async def test_the_time_of_a_batch_counts_from_its_first_item_and_not_from_its_last(self) -> None:
        """A steady trickle, never enough to fill a batch, must not hold its items for ever."""
        left = asyncio.Event()

        async def source() -> AsyncIterator[int]:
            for number in itertools.count():
                if left.is_set():
                    return
                yield number
                await asyncio.sleep(0.002)  # the trickle is what is tested

        async with asyncio.timeout(LIMIT):
            batches = await (Pipeline(source) >> batch(1_000_000, within=0.02) >> tap(lambda some: left.set())).collect()
        assert isinstance(batches, list)
        assert batches[0][0] == 0
        assert left.is_set()

    async def test_without_a_time_a_batch_waits_until_it_is_full(self) -> None:
        seen: list[int] = []

        async def source() -> AsyncIterator[int]:
            for number in range(3):
                yield number
                for _ in range(50):
                    await asyncio.sleep(0)
                seen.append(pipeline.snapshot().stage("batch").emitted)

        pipeline = Pipeline(source) >> batch(3)
        assert await pipeline.collect() == [[0, 1, 2]]
        assert seen == [0, 0, 1]

    @pytest.mark.parametrize("within", [None, 1000.0])
    async def test_a_drain_flushes_a_part_of_a_batch(self, within: float | None) -> None:
        async def source() -> AsyncIterator[int]:
            for number in range(3):
                yield number
            pipeline.cancel("enough", drain=True)
            await asyncio.Event().wait()  # until the drain

        pipeline = Pipeline(source) >> batch(100, within=within)
        got = []
        with pytest.raises(Exception, match="enough"):
            async for some in pipeline:
                got.append(some)
        assert got == [[0, 1, 2]]
        report = pipeline.runtime.closed.result().report  # type: ignore[union-attr]
        assert report is not None
        assert report.drained

    async def test_an_abort_cancels_a_part_of_a_batch(self) -> None:
        async def source() -> AsyncIterator[int]:
            for number in range(3):
                yield number
            while pipeline.snapshot().stage("batch").received < 3:
                await asyncio.sleep(0)
            pipeline.cancel("enough")
            await asyncio.Event().wait()  # until the stop

        pipeline = Pipeline(source) >> batch(100, within=1000)
        assert is_err(await pipeline.run())
        row = pipeline.snapshot().stage("batch")
        assert (row.received, row.cancelled, row.succeeded, row.in_flight) == (3, 3, 0, 0)

    async def test_errors_pass_at_once_and_are_in_no_batch(self) -> None:
        def odd_fails(item: int) -> int:
            if item % 2:
                raise Boom
            return item

        outputs = await gives(map(odd_fails, on_error=ErrorPolicy.EMIT), batch(2), source=range(8))
        assert [output for output in outputs if not is_err(output)] == [[0, 2], [4, 6]]
        assert len(outputs) == 6

    async def test_each_batch_is_a_list_of_its_own(self) -> None:
        outputs = await gives(batch(2))
        outputs[0].append("mine")
        assert outputs[1] == [2, 3]

    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_a_stalled_consumer_does_not_lose_a_batch_whose_time_is_up(self, run_in: str) -> None:
        pipeline = Pipeline(range(20)) >> map(lambda item: item, run_in=run_in) >> batch(3, within=0.001)
        got: list[int] = []
        async for some in pipeline.async_iter(1):
            got += some
            await asyncio.sleep(0.002)  # longer than a batch may wait
        assert got == list(range(20))


class TestAiostream:
    @pytest.mark.parametrize("wrap", [lambda operator: operator, pipe_stage], ids=["direct", "pipe()"])
    @pytest.mark.parametrize(
        ("operator", "expected"),
        [
            (pipe.map(lambda item: item * 2), [0, 2, 4, 6]),
            (pipe.map(double_later), [0, 2, 4, 6]),
            (pipe.filter(lambda item: item % 2 == 0), [0, 2]),
            (pipe.take(2), [0, 1]),
            (pipe.take(0), []),
            (pipe.skip(2), [2, 3]),
            (pipe.takelast(1), [3]),
            (pipe.enumerate(), [(0, 0), (1, 1), (2, 2), (3, 3)]),
            (pipe.accumulate(), [0, 1, 3, 6]),
            (pipe.chunks(3), [[0, 1, 2], [3]]),
            (pipe.flatmap(lambda item: stream.range(item)), [0, 0, 1, 0, 1, 2]),
            (pipe.concatmap(lambda item: stream.range(item)), [0, 0, 1, 0, 1, 2]),
            (pipe.delay(0), [0, 1, 2, 3]),
            (pipe.timeout(100), [0, 1, 2, 3]),
            (pipe.reduce(lambda left, right: left + right), [6]),
        ],
    )
    async def test_an_operator_goes_anywhere_in_a_chain(self, operator: Any, expected: list[Any], wrap: Any) -> None:
        outputs = await gives(map(lambda item: item), wrap(operator), map(lambda item: item))
        assert sorted(outputs, key=repr) == sorted(expected, key=repr)

    async def test_it_is_in_the_ledger(self) -> None:
        report = await (Pipeline(range(6)) >> pipe_stage(pipe.filter(lambda item: item % 3 == 0), name="third") >> pipe.map(str)).run()
        assert isinstance(report, RunReport)
        rows = {row.name: (row.received, row.succeeded, row.emitted) for row in report.stages}
        assert rows == {"third": (6, 6, 2), "pipe": (2, 2, 2)}

    async def test_a_function_from_stream_to_stream_of_ones_own_will_do(self) -> None:
        async def every_other(items: Any) -> AsyncIterator[Any]:
            number = 0
            async for item in items:
                number += 1
                if number % 2:
                    yield item

        assert await gives(pipe_stage(every_other)) == [0, 2]

    async def test_an_operator_that_stops_asking_releases_the_source(self) -> None:
        report = await (Pipeline(itertools.count()) >> map(lambda item: item) >> pipe.take(3)).run()
        assert isinstance(report, RunReport)
        assert (report.outcome, report.delivered, report.balanced) == ("completed", 3, True)

    async def test_an_operator_that_raises_fails_the_pipeline(self) -> None:
        def breaks(item: int) -> int:
            return 1 // (item - 2)

        pipeline = Pipeline(range(9)) >> pipe_stage(pipe.map(breaks), name="breaks")
        result = await pipeline.run()
        assert isinstance(result, Err)
        assert isinstance(result.value, ZeroDivisionError)
        assert result.stage == "breaks"
        assert result.report is not None
        assert (result.report.outcome, result.report.balanced) == ("failed", True)
        row = result.report.stage("breaks")
        assert (row.received, row.succeeded, row.raised) == (3, 2, 1)

    async def test_errors_of_earlier_stages_pass_around_it(self) -> None:
        outputs = await gives(map(lambda item: 6 // item, on_error=ErrorPolicy.EMIT), pipe.map(lambda item: item + 1))
        assert [output for output in outputs if not is_err(output)] == [7, 4, 3]
        assert [output.item for output in outputs if is_err(output)] == [0]

    async def test_it_can_be_used_in_many_runs(self) -> None:
        pipeline = Pipeline(range(9)) >> pipe.take(2)
        assert [await pipeline.collect() for _ in range(2)] == [[0, 1]] * 2


OPERATORS: dict[str, Callable[[], list[Any]]] = {
    "map": lambda: [map(lambda item: item)],
    "map later": lambda: [map(double_later, concurrency=2)],
    "filter": lambda: [filter(is_even_later)],
    "flat_map": lambda: [flat_map(twice_async, concurrency=2)],
    "flat_map in thread": lambda: [flat_map(twice, run_in="thread")],
    "batch": lambda: [batch(3)],
    "batch within": lambda: [batch(3, within=0.0005)],
    "take": lambda: [take(30)],
    "tap": lambda: [tap(double_later)],
    "pipe map": lambda: [pipe.map(double_later)],
    "pipe map at once": lambda: [pipe.map(double_later, task_limit=3)],
    "pipe flatmap": lambda: [pipe.flatmap(lambda item: stream.range(item % 3), task_limit=2)],
    "pipe chunks": lambda: [pipe.chunks(3)],
    "pipe timeout": lambda: [pipe.timeout(10)],
    "pipe merge": lambda: [pipe.merge(stream.range(30))],
    "several": lambda: [map(double_later), batch(2), flat_map(lambda some: some), take(40), pipe.map(str)],
}


@pytest.mark.parametrize("operator", OPERATORS)
class TestStoppedAtAnyMoment:
    @given(
        steps=st.integers(0, 80),
        how=st.sampled_from(["cancel", "drain", "force", "leave", "parent"]),
        source=st.sampled_from(["list", "generator", "async generator"]),
    )
    @quick
    def test_it_closes_and_the_books_balance(self, operator: str, steps: int, how: str, source: str) -> None:
        def plain() -> Iterator[int]:
            yield from range(50)

        async def later() -> AsyncIterator[int]:
            for number in range(50):
                if number % 3 == 0:
                    await asyncio.sleep(0)
                yield number

        made: Any = {"list": list(range(50)), "generator": plain, "async generator": later}[source]
        pipeline: Pipeline[Any] = Pipeline(made, grace=Grace(drain=10, abort=5))
        for one in OPERATORS[operator]():
            pipeline = pipeline >> one
        got: list[Any] = []

        async def use() -> None:
            async for item in pipeline.async_iter(3):
                got.append(item)
                if how == "leave" and len(got) > steps % 8:
                    return
                await asyncio.sleep(0)

        async def main() -> None:
            user = asyncio.create_task(use())
            for _ in range(steps + 1):
                await asyncio.sleep(0)
            if how == "parent":
                user.cancel()
            elif how != "leave":
                pipeline.cancel("enough", drain=how == "drain", force=how == "force")
            done, _ = await asyncio.wait((user,), timeout=LIMIT)
            assert done, "it hangs"
            if not user.cancelled():
                user.exception()
            # An iteration that is left by `return` is closed by the garbage collector, in a task of the loop's own.
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            if rest:
                _, late = await asyncio.wait(rest, timeout=LIMIT)
                assert not late, "it is not closed"

        asyncio.run(main())
        snapshot = pipeline.snapshot()
        assert snapshot.state.value == "closed"
        arriving = snapshot.pulled
        for row in snapshot.stages:
            assert (row.in_flight, row.queued) == (0, 0)
            assert row.received == row.processed + row.cancelled
            assert arriving == row.received + row.discarded
            arriving = row.emitted
        assert arriving == snapshot.delivered + snapshot.discarded
        result = pipeline.runtime.closed.result()
        report = result.report if isinstance(result, Err) else result
        assert report is not None
        assert report.balanced
        assert report.abandoned == ()
        if how == "drain" and report.outcome == "cancelled":
            assert snapshot.delivered == len(got)
            assert report.drained or operator in ("take", "several")


async def test_a_handler_in_a_thread_can_be_stopped_between_two_outputs() -> None:
    made = threading.Event()

    def endless(item: int) -> Iterator[int]:
        for number in itertools.count():
            if number == 100:
                made.set()
            yield number

    pipeline = Pipeline([0]) >> flat_map(endless, run_in="thread")
    got = 0
    with pytest.raises(Exception, match="enough"):
        async for _ in pipeline:
            got += 1
            if made.is_set():
                pipeline.cancel("enough")
    assert pipeline.snapshot().stages[0].cancelled == 1
    assert pipeline.snapshot().delivered == got
