"""Declaring pipelines and stages: what is accepted, what is refused and how, and what a definition keeps to itself."""

from __future__ import annotations

import ast
import asyncio
import functools
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import multiprocess
import pytest
from aiostream import pipe, stream
from structlog.testing import capture_logs

import stages as operators
from pipeline import (
    Err,
    ErrorPolicy,
    EventTrigger,
    Grace,
    Pipeline,
    PipelineError,
    PipelineState,
    RunReport,
    StageConfigError,
    is_err,
)
from stages import Retry, Stage, as_stage, mix_pool, stage, work_pool

ROOT = Path(__file__).resolve().parent.parent


def plus(number: int) -> Any:
    return stage(name=f"plus {number}")(lambda item: item + number)


def names(pipeline: Pipeline[Any]) -> list[str]:
    return [row.name for row in pipeline.snapshot().stages]


class TestJoining:
    async def test_the_arrow_leaves_the_left_side_as_it_was(self) -> None:
        left = Pipeline([1, 2]) >> plus(1)
        right = left >> plus(10)
        other = left >> plus(100)
        assert (names(left), names(right)) == (["plus 1"], ["plus 1", "plus 10"])
        assert (await left.collect(), await right.collect(), await other.collect()) == ([2, 3], [12, 13], [102, 103])

    async def test_stage_adds_to_this_pipeline_and_returns_it(self) -> None:
        pipeline = Pipeline([1, 2])
        assert pipeline.stage(plus(1)) is pipeline
        assert pipeline.stage(plus(10)).stage(plus(100)) is pipeline
        assert await pipeline.collect() == [112, 113]

    async def test_a_pipeline_on_the_right_gives_its_stages_and_loses_its_source(self) -> None:
        inner = Pipeline([5, 6]) >> plus(1) >> plus(10)
        outer = Pipeline([1]) >> inner >> plus(100)
        assert await outer.collect() == [112]
        assert await inner.collect() == [16, 17]

    async def test_a_pipeline_as_source_gives_its_outputs(self) -> None:
        inner = Pipeline([1, 2]) >> plus(1)
        outer = Pipeline(inner) >> plus(10)
        assert await outer.collect() == [12, 13]
        assert await inner.collect() == [2, 3]
        assert names(outer) == ["plus 1", "plus 10"]

    async def test_a_pipeline_without_source_can_be_a_part_of_many(self) -> None:
        part: Pipeline[Any] = Pipeline() >> plus(1) >> plus(10)
        assert await (Pipeline([1]) >> part).collect() == [12]
        assert await (Pipeline([2]) >> part >> part).collect() == [24]

    async def test_stages_join_without_a_pipeline_into_one_without_a_source(self) -> None:
        part = plus(1) >> plus(10)
        assert isinstance(part, Pipeline)
        assert await (Pipeline([1]) >> part).collect() == [12]

    async def test_nesting_goes_any_depth(self) -> None:
        part: Pipeline[Any] = Pipeline() >> plus(1)
        for _ in range(5):
            part = Pipeline() >> part >> plus(1)
        assert await (Pipeline([0]) >> part).collect() == [6]
        assert await Pipeline(Pipeline(Pipeline([1, 2]) >> plus(1)) >> plus(1)).collect() == [3, 4]

    async def test_a_pipeline_without_stages_hands_its_source_on(self) -> None:
        assert await Pipeline([1, 2]).collect() == [1, 2]

    def test_a_pipeline_cannot_be_its_own_source(self) -> None:
        pipeline = Pipeline([1])
        with pytest.raises(TypeError, match="own source"):
            pipeline.gen(pipeline)

    @pytest.mark.parametrize(
        "wrong", [lambda item: item, len, print, int, 3, "text", None, [1], object()], ids=lambda wrong: type(wrong).__name__
    )
    def test_what_is_no_stage_is_refused_with_the_advice_to_decorate(self, wrong: Any) -> None:
        pipeline = Pipeline([1])
        with pytest.raises(TypeError, match="@stage"):
            pipeline >> wrong
        with pytest.raises(TypeError, match="@stage"):
            pipeline.stage(wrong)
        assert names(pipeline) == []

    def test_the_refusal_names_the_function(self) -> None:
        def fetch(item: int) -> int:
            return item

        with pytest.raises(TypeError, match="fetch"):
            Pipeline([1]) >> fetch

    async def test_names_are_unique_in_a_chain(self) -> None:
        one = plus(1)
        pipeline = Pipeline([0]) >> one >> stage(name="plus 1-2")(lambda item: item) >> one >> one
        assert await pipeline.collect() == [3]
        assert len(set(names(pipeline))) == 4
        assert [pipeline.snapshot().stage(name).received for name in names(pipeline)] == [1, 1, 1, 1]

    async def test_one_stage_in_two_pipelines_at_once_keeps_two_ledgers(self) -> None:
        @stage(concurrency=3, setup=lambda state: state.update(seen=0))
        async def count(item: int, state: Any) -> int:
            state.update(seen=state.get("seen") + 1)
            await asyncio.sleep(0)
            return item

        first, second = Pipeline(range(10)) >> count, Pipeline(range(25)) >> count
        reports = await asyncio.gather(first.run(), second.run())
        assert [report.stage("count").received for report in reports if isinstance(report, RunReport)] == [10, 25]

    def test_a_running_pipeline_cannot_be_changed(self) -> None:
        def try_it(item: int) -> int:
            with pytest.raises(PipelineError):
                pipeline.stage(plus(1))
            with pytest.raises(PipelineError):
                pipeline.gen([1])
            return item

        pipeline = Pipeline([1]) >> stage(on_error=ErrorPolicy.RAISE)(try_it)
        assert isinstance(asyncio.run(pipeline.run()), RunReport)


class _Plain:
    """An async iterable and nothing more."""

    def __aiter__(self) -> AsyncIterator[int]:
        return numbers_async()


class _Old:
    """Iterable by `__getitem__` alone, as of old."""

    def __getitem__(self, index: int) -> int:
        if index > 2:
            raise IndexError
        return index


def numbers() -> Iterator[int]:
    yield from range(3)


async def numbers_async() -> AsyncIterator[int]:
    for number in range(3):
        await asyncio.sleep(0)
        yield number


async def numbers_later() -> list[int]:
    await asyncio.sleep(0)
    return [0, 1, 2]


GOOD_SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2],
    "tuple": lambda: (0, 1, 2),
    "range": lambda: range(3),
    "dict": lambda: {0: "a", 1: "b", 2: "c"},
    "dict values": lambda: {"a": 0, "b": 1, "c": 2}.values(),
    "generator": numbers,
    "list iterator": lambda: iter([0, 1, 2]),
    "map": lambda: map(int, "012"),
    "iterator without an end": lambda: itertools.takewhile(lambda n: n < 3, itertools.count()),
    "async generator": numbers_async,
    "async iterable": _Plain,
    "function": lambda: lambda: [0, 1, 2],
    "generator function": lambda: numbers,
    "async generator function": lambda: numbers_async,
    "coroutine function": lambda: numbers_later,
    "partial": lambda: functools.partial(range, 3),
    "bound method": lambda: {0: 0, 1: 1, 2: 2}.keys,
    "aiostream stream": lambda: stream.range(3),
    "aiostream chain": lambda: stream.range(6) | pipe.take(3),
    "pipeline": lambda: Pipeline([0, 1, 2]),
    "function that returns a pipeline": lambda: lambda: Pipeline([0, 1, 2]),
    "function that returns a stream": lambda: lambda: stream.range(3),
}


class TestSources:
    @pytest.mark.parametrize("kind", GOOD_SOURCES)
    async def test_anything_that_can_be_iterated_is_a_source(self, kind: str) -> None:
        pipeline = Pipeline(GOOD_SOURCES[kind]()) >> plus(10)
        assert await pipeline.collect() == [10, 11, 12]
        assert pipeline.snapshot().pulled == 3

    @pytest.mark.parametrize("kind", GOOD_SOURCES)
    def test_a_synchronous_caller_may_use_any_source_too(self, kind: str) -> None:
        assert list((Pipeline(GOOD_SOURCES[kind]()) >> plus(10)).iter()) == [10, 11, 12]

    @pytest.mark.parametrize(
        "wrong", [3, 2.5, object(), True, int, object, lambda a: [a], len], ids=lambda wrong: str(wrong).split(" at ")[0]
    )
    def test_what_cannot_be_a_source_is_refused_at_once(self, wrong: Any) -> None:
        with pytest.raises(TypeError):
            Pipeline(wrong)
        with pytest.raises(TypeError):
            Pipeline([1]).gen(wrong)

    def test_a_coroutine_object_is_refused_and_the_function_advised(self) -> None:
        with pytest.raises(TypeError, match="function itself"):
            Pipeline(numbers_later())  # type: ignore[arg-type]

    def test_a_stage_as_source_is_refused(self) -> None:
        with pytest.raises(TypeError, match=">>"):
            Pipeline(plus(1))

    def test_a_name_that_is_no_text_is_refused_at_once(self) -> None:
        with pytest.raises(StageConfigError, match="name must be a text, not 5"):
            Pipeline([1], name=5)  # type: ignore[arg-type]

    async def test_a_sequence_by_getitem_alone_is_a_source_or_refused_at_once(self) -> None:
        try:
            pipeline: Pipeline[Any] = Pipeline(_Old())  # type: ignore[arg-type]
        except TypeError:
            return
        assert await pipeline.collect() == [0, 1, 2]

    async def test_a_function_that_returns_nothing_iterable_fails_the_run_with_a_type_error(self) -> None:
        result = await Pipeline(lambda: 3).run()  # type: ignore[arg-type,return-value]
        assert isinstance(result, Err)
        assert isinstance(result.value, TypeError)

    async def test_a_source_that_raises_fails_the_run_with_its_exception(self) -> None:
        def fails() -> Iterator[int]:
            yield 1
            raise OSError("disk")

        pipeline = Pipeline(fails) >> plus(1)
        result = await pipeline.run()
        assert isinstance(result, Err)
        assert isinstance(result.value, OSError)
        assert result.report is not None
        assert (result.report.outcome, result.report.pulled) == ("failed", 1)

    @pytest.mark.parametrize("length", [10, 3000])
    async def test_a_list_that_grows_while_it_is_read_is_read_to_its_end(self, length: int) -> None:
        """As a crawler does that appends what it finds."""
        found = list(range(10))

        @stage
        def visit(item: int) -> int:
            if len(found) < length:
                found.append(len(found))
            return item

        pipeline = Pipeline(found) >> visit
        assert await pipeline.collect() == list(range(length))
        snapshot = pipeline.snapshot()
        assert (snapshot.pulled, snapshot.stage("visit").received, snapshot.delivered) == (length, length, length)

    @pytest.mark.parametrize("stages", [1, 2])
    @pytest.mark.parametrize("kind", [set, dict.fromkeys])
    async def test_a_collection_that_changes_while_it_is_read_fails_the_source(self, stages: int, kind: Any) -> None:
        items = kind(range(20_000))

        @stage
        def spoil(item: int) -> int:
            if item == 700:
                del_ = items.discard if kind is set else items.pop
                del_(3)
            return item

        pipeline: Pipeline[Any] = Pipeline(items) >> spoil
        if stages == 2:
            pipeline = pipeline >> plus(1)
        result = await pipeline.run()
        assert isinstance(result, Err)
        assert isinstance(result.value, RuntimeError)
        assert [reason.code for reason in result.reasons] == ["source_error"]
        assert result.report is not None
        assert result.report.balanced
        assert result.report.pulled == result.report.delivered

    async def test_a_source_is_not_touched_before_a_run(self) -> None:
        calls: list[int] = []

        def make() -> list[int]:
            calls.append(1)
            return [1]

        pipeline = Pipeline(make) >> plus(1)
        pipeline.snapshot()
        assert calls == []
        await pipeline.run()
        await pipeline.run()
        assert calls == [1, 1]

    async def test_what_a_pipeline_opens_it_closes(self) -> None:
        closed: list[str] = []

        def plain() -> Iterator[int]:
            try:
                yield from range(100)
            finally:
                closed.append("generator")

        async def later() -> AsyncIterator[int]:
            try:
                for number in range(100):
                    yield number
            finally:
                closed.append("async generator")

        for source in (plain, later):
            await (Pipeline(source) >> operators.take(2)).run()
        assert closed == ["generator", "async generator"]


class TestRunningAgain:
    async def test_a_second_run_over_a_list_gives_the_same(self) -> None:
        pipeline = Pipeline([1, 2, 3]) >> plus(1)
        assert [await pipeline.collect() for _ in range(3)] == [[2, 3, 4]] * 3
        assert pipeline.snapshot().pulled == 3

    async def test_a_second_run_over_a_set_or_a_dict_gives_the_same(self) -> None:
        for source in ({1, 2}, {1: 0, 2: 0}):
            pipeline = Pipeline(source)
            assert [await pipeline.collect() for _ in range(2)] == [[1, 2]] * 2

    @pytest.mark.parametrize("make", [numbers, numbers_async, lambda: iter([1, 2]), lambda: map(int, "12")])
    async def test_a_one_shot_iterator_is_spent_after_a_run_and_the_error_says_so(self, make: Any) -> None:
        pipeline = Pipeline(make()) >> plus(1)
        assert isinstance(await pipeline.run(), RunReport)
        for again in (await pipeline.run(), await pipeline.collect()):
            assert isinstance(again, Err)
            assert "used" in str(again.value)
            assert "gen(" in str(again.value)
        with pytest.raises(PipelineError, match="used"):
            async for _ in pipeline:
                pass
        with pytest.raises(PipelineError, match="used"):
            list(pipeline.iter())

    @pytest.mark.parametrize("items", [[1, 2], (1, 2), "ab", "generator"], ids=str)
    async def test_an_iterator_that_was_spent_elsewhere_is_never_an_empty_success(self, items: Any) -> None:
        """Of the built-in ones at least those that can tell: an exhausted one forgets what it iterated over."""
        iterator: Any = numbers() if items == "generator" else iter(items)
        assert list(iterator)
        result = await (Pipeline(iterator) >> plus(1)).run()
        assert isinstance(result, Err)

    @pytest.mark.parametrize("make", [numbers, numbers_async, lambda: iter([1, 2])])
    async def test_an_iterator_that_another_pipeline_has_spent_is_never_an_empty_success(self, make: Any) -> None:
        iterator = make()
        assert isinstance(await Pipeline(iterator).run(), RunReport)
        assert is_err(await Pipeline(iterator).run())

    async def test_an_iterator_is_spent_for_the_pipelines_made_from_one_another(self) -> None:
        base = Pipeline(iter([1, 2]))
        longer = base >> plus(1)
        assert await longer.collect() == [2, 3]
        assert is_err(await base.run())

    async def test_an_iterator_with_nothing_in_it_is_a_success_once(self) -> None:
        report = await Pipeline(iter([])).run()
        assert isinstance(report, RunReport)
        assert report.pulled == 0

    async def test_a_missing_source_is_an_error_that_says_so(self) -> None:
        pipeline: Pipeline[Any] = Pipeline() >> plus(1)
        for result in (await pipeline.run(), await pipeline.collect()):
            assert isinstance(result, Err)
            assert "source" in str(result.value)
        with pytest.raises(PipelineError, match="source"):
            async for _ in pipeline:
                pass
        with pytest.raises(PipelineError, match="source"):
            list(pipeline.iter())

    async def test_gen_gives_a_source_that_was_missing(self) -> None:
        pipeline: Pipeline[Any] = Pipeline() >> plus(1)
        assert pipeline.gen([1]) is pipeline
        assert await pipeline.collect() == [2]

    async def test_gen_replaces_the_source(self) -> None:
        pipeline = Pipeline([1]) >> plus(1)
        assert await pipeline.collect() == [2]
        assert await pipeline.gen([5, 6]).collect() == [6, 7]

    async def test_gen_replaces_a_pipeline_that_was_the_source_as_a_whole(self) -> None:
        pipeline = Pipeline(Pipeline([1]) >> plus(1)) >> plus(100)
        assert await pipeline.gen(Pipeline([1]) >> plus(10)).collect() == [111]
        assert await pipeline.gen([1]).collect() == [101]

    async def test_gen_revives_a_spent_and_a_cancelled_pipeline(self) -> None:
        pipeline = Pipeline(iter([1])) >> plus(1)
        await pipeline.run()
        assert await pipeline.gen(iter([2])).collect() == [3]
        pipeline.cancel("before the start")
        pipeline.gen([3]).cancel("before this start")
        assert is_err(await pipeline.run())
        assert await pipeline.gen([3]).collect() == [4]

    async def test_a_second_concurrent_run_is_refused_and_the_first_goes_on(self) -> None:
        refused: list[BaseException] = []

        @stage
        async def again(item: int) -> int:
            for start in (pipeline.run, pipeline.collect):
                try:
                    await start()
                except PipelineError as error:
                    refused.append(error)
            try:
                async for _ in pipeline:
                    pass
            except PipelineError as error:
                refused.append(error)
            return item

        pipeline = Pipeline([1]) >> again
        assert await pipeline.collect() == [1]
        assert [type(error) for error in refused] == [PipelineError] * 3
        assert "running already" in str(refused[0])


class _Handler:
    """A callable object; `later` makes its call a coroutine."""

    def __call__(self, item: int) -> int:
        return item + 1


class _LaterHandler:
    async def __call__(self, item: int, state: Any) -> int:
        await asyncio.sleep(0)
        state.update(seen=item)
        return state.get("seen") + 1


class _ManyHandler:
    def __call__(self, item: int) -> Iterator[int]:
        yield item
        yield item + 1

    def method(self, item: int) -> int:
        return item + 1

    async def later(self, item: int, state: Any) -> int:
        assert state.worker_id == 0
        return item + 1


def _add(by: int, item: int) -> int:
    return item + by


async def _add_later(by: int, item: int) -> int:
    return item + by


def _with_default(item: int, by: int = 1) -> int:
    return item + by


def _with_state(item: int, state: Any = None) -> int:
    assert state is not None
    return item + 1


def _any(*arguments: int) -> int:
    (item,) = arguments
    return item + 1


class TestHandlers:
    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    @pytest.mark.parametrize(
        "handler",
        [
            _Handler(),
            _LaterHandler(),
            _ManyHandler().method,
            _ManyHandler().later,
            functools.partial(_add, 1),
            functools.partial(_add_later, 1),
            functools.partial(functools.partial(_add, 1)),
            _with_default,
            _with_state,
            _any,
            lambda item: item + 1,
            (1).__add__,
        ],
        ids=lambda handler: getattr(handler, "__qualname__", type(handler).__name__),
    )
    async def test_anything_callable_with_an_item_is_a_handler(self, handler: Any, run_in: str) -> None:
        assert await (Pipeline([1, 2]) >> stage(run_in=run_in)(handler)).collect() == [2, 3]

    @pytest.mark.parametrize("handler", [_Handler(), _LaterHandler(), functools.partial(_add_later, 1), (1).__add__], ids=lambda handler: type(handler).__name__)
    async def test_most_of_them_can_go_to_a_process(self, handler: Any) -> None:
        assert await (Pipeline([1, 2]) >> stage(run_in="process")(handler)).collect() == [2, 3]

    async def test_a_callable_object_may_be_a_generator(self) -> None:
        assert await (Pipeline([1]) >> stage(_ManyHandler())).collect() == [1, 2]

    async def test_a_class_and_a_built_in_may_be_handlers(self) -> None:
        assert await (Pipeline(["1", "22"]) >> stage(len) >> stage(str) >> stage(Path)).collect() == [Path("1"), Path("2")]

    async def test_a_plain_function_that_returns_a_coroutine_is_awaited(self) -> None:
        assert await (Pipeline([1]) >> stage(lambda item: _add_later(1, item))).collect() == [2]

    @pytest.mark.parametrize(
        "handler", [lambda: 1, lambda a, b, c: 1, lambda item, *, must: 1], ids=["none", "three", "keyword"]
    )
    def test_a_function_that_cannot_take_an_item_is_refused_at_decoration(self, handler: Any) -> None:
        with pytest.raises(StageConfigError, match="item"):
            stage(handler)

    def test_the_decorated_object_can_be_called_like_the_function(self) -> None:
        @stage(concurrency=3, run_in="thread")
        def double(item: int, by: int = 2) -> int:
            return item * by

        assert double(4) == 8
        assert double(4, by=3) == 12

    async def test_a_decorated_coroutine_function_can_be_awaited(self) -> None:
        @stage
        async def double(item: int) -> int:
            return item * 2

        assert await double(4) == 8

    def test_a_stage_has_the_name_of_its_function_or_its_own(self) -> None:
        def double(item: int) -> int:
            return item

        assert stage(double).name == "double"
        assert stage(name="twice")(double).name == "twice"
        assert stage(functools.partial(_add, 1)).name == "_add"
        assert stage(_Handler()).name == "_Handler"

    def test_none_and_false_are_ordinary_data(self) -> None:
        pipeline = Pipeline([None, False, 0, "", []]) >> stage(lambda item: item) >> stage(run_in="thread")(lambda item: item)
        assert list(pipeline.iter()) == [None, False, 0, "", []]

    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_setup_and_teardown_run_once_for_each_worker(self, run_in: str) -> None:
        calls: list[tuple[str, int]] = []

        async def later(state: Any) -> None:
            await asyncio.sleep(0)
            calls.append(("teardown", state.worker_id))

        @stage(
            concurrency=3, run_in=run_in, setup=lambda state: calls.append(("setup", state.worker_id)), teardown=later, name="work"
        )
        def work(item: int, state: Any) -> str:
            return state.stage

        assert set(await (Pipeline(range(9)) >> work).collect()) == {"work"}  # type: ignore[arg-type]
        assert sorted(calls) == [(what, number) for what in ("setup", "teardown") for number in range(3)]

    async def test_state_is_fresh_in_every_run(self) -> None:
        @stage
        def count(item: int, state: Any) -> int:
            state.update(n=state.get("n", 0) + 1)
            return state.values["n"]

        pipeline = Pipeline([0, 0]) >> count
        assert [await pipeline.collect() for _ in range(2)] == [[1, 2]] * 2


class _Unpicklable:
    """Says no to every pickler."""

    def __reduce__(self) -> Any:
        raise TypeError("this stays here")


class TestRefusals:
    """Bad input gets a clear error before anything starts."""

    @pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True])
    def test_concurrency_is_a_number_from_one(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="concurrency"):
            stage(concurrency=value)
        with pytest.raises(StageConfigError, match=r"concurrency|whole number"):
            work_pool(num_workers=value)(lambda item: item)

    @pytest.mark.parametrize("value", [-1, 1.5, "2", False])
    def test_buffer_is_a_number_from_zero(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="buffer"):
            stage(buffer=value)
        with pytest.raises(StageConfigError, match="buffer"):
            operators.batch(2, buffer=value)

    @pytest.mark.parametrize("value", ["threads", "", "LOOP", 3, object(), lambda: None, threading.Thread])
    def test_run_in_is_one_of_the_places_there_are(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="run_in"):
            stage(run_in=value)

    @pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, object()])
    def test_retry_is_a_number_of_attempts_or_a_retry(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="retry"):
            stage(retry=value)

    @pytest.mark.parametrize(
        "options",
        [{"attempts": 0}, {"attempts": 1.5}, {"wait": -1}, {"wait": float("nan")}, {"max_wait": -1}, {"jitter": 2}, {"jitter": -1}, {"on": 3}, {"on": ()}],
        ids=str,
    )
    def test_a_retry_is_checked_when_it_is_made(self, options: Any) -> None:
        with pytest.raises(StageConfigError):
            Retry(**options)

    @pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "2", True])
    def test_timeout_is_a_positive_number_of_seconds(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="timeout"):
            stage(timeout=value)

    @pytest.mark.parametrize("phase", ["drain", "abort", "terminate", "kill"])
    @pytest.mark.parametrize("value", [-1, float("inf"), float("nan"), "2", None, True])
    def test_grace_is_made_of_seconds(self, phase: str, value: Any) -> None:
        with pytest.raises(StageConfigError, match=phase):
            Grace(**{phase: value})

    @pytest.mark.parametrize("policy", [ErrorPolicy.DROP, ErrorPolicy.EMIT, ErrorPolicy.RAISE])
    def test_an_error_handler_goes_with_side_only(self, policy: ErrorPolicy) -> None:
        with pytest.raises(StageConfigError, match="SIDE"):
            stage(on_error=policy, error_handler=print)
        for pool in (work_pool, mix_pool):
            with pytest.raises(StageConfigError, match="SIDE"):
                pool(error_policy=policy, error_handler=print)(lambda *_: [print])

    def test_side_needs_an_error_handler(self) -> None:
        with pytest.raises(StageConfigError, match="error_handler"):
            stage(on_error=ErrorPolicy.SIDE)

    @pytest.mark.parametrize("value", ["DROP", 1, "drop"])
    def test_a_policy_is_an_error_policy(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="ErrorPolicy"):
            stage(on_error=value)
        with pytest.raises(StageConfigError, match="ErrorPolicy"):
            Pipeline([1], on_error=value)

    @pytest.mark.parametrize("hook", ["setup", "teardown", "error_handler"])
    def test_hooks_are_functions(self, hook: str) -> None:
        with pytest.raises(StageConfigError, match=hook):
            stage(**{hook: 3})  # type: ignore[call-overload]

    def test_an_unknown_option_is_named(self) -> None:
        with pytest.raises((StageConfigError, TypeError), match="concurency"):
            stage(concurency=3)  # type: ignore[call-overload]

    @pytest.mark.parametrize("value", [3, "x", None])
    def test_a_stage_is_made_of_a_function(self, value: Any) -> None:
        with pytest.raises((StageConfigError, TypeError)):
            stage()(value)

    def test_a_stage_of_a_stage_is_refused(self) -> None:
        with pytest.raises(StageConfigError, match="already"):
            stage(stage(lambda item: item))

    @pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
    def test_a_batch_has_a_size(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="batch"):
            operators.batch(value)

    @pytest.mark.parametrize("value", [0, -1, float("nan"), "2", True])
    def test_a_batch_waits_for_a_positive_time(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="within"):
            operators.batch(2, within=value)

    @pytest.mark.parametrize("value", [-1, 1.5, "2", None, True])
    def test_take_takes_a_number(self, value: Any) -> None:
        with pytest.raises(StageConfigError, match="take"):
            operators.take(value)

    @pytest.mark.parametrize("operator", [operators.map, operators.filter, operators.flat_map, operators.tap, operators.pipe])
    @pytest.mark.parametrize("value", [3, None, "x"])
    def test_an_operator_takes_a_function(self, operator: Any, value: Any) -> None:
        with pytest.raises(StageConfigError):
            operator(value)

    @pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
    async def test_an_iteration_has_a_buffer(self, value: Any) -> None:
        pipeline = Pipeline([1])
        with pytest.raises(ValueError, match="max_buffer"):
            await anext(pipeline.async_iter(value))
        with pytest.raises(ValueError, match="max_buffer"):
            next(pipeline.iter(value))

    @pytest.mark.parametrize("value", [[3], ["x"], [None], [lambda: None]])
    def test_cancel_on_takes_triggers(self, value: Any) -> None:
        with pytest.raises(TypeError, match="trigger"):
            Pipeline([1], cancel_on=value)

    def test_a_scheduler_and_a_grace_are_checked(self) -> None:
        with pytest.raises((StageConfigError, TypeError)):
            Pipeline([1], grace=3)  # type: ignore[arg-type]
        with pytest.raises((StageConfigError, TypeError, ImportError)):
            Pipeline([1], scheduler=3)  # type: ignore[arg-type]

    def test_drain_and_force_at_once_are_refused(self) -> None:
        with pytest.raises(ValueError, match="drain"):
            Pipeline([1]).cancel(drain=True, force=True)

    @pytest.mark.parametrize("what", ["closure", "setup", "teardown", "object"])
    async def test_a_handler_that_cannot_go_to_a_process_is_refused_before_anything_starts(self, what: str) -> None:
        stays = _Unpicklable()
        touched: list[str] = []

        def source() -> list[int]:
            touched.append("source")
            return [1]

        def closure(item: int) -> Any:
            return (item, stays)

        options: dict[str, Any] = {what: lambda state: state.update(it=stays)} if what in ("setup", "teardown") else {}
        handler: Any = closure if what == "closure" else lambda item: item
        if what == "object":
            handler = functools.partial(lambda it, item: item, stays)
        trigger = _Recorder(touched)
        before = (set(threading.enumerate()), set(multiprocess.active_children()))
        first = stage(setup=lambda state: touched.append("setup"))(lambda item: item)
        pipeline = Pipeline(source, cancel_on=[trigger]) >> first >> stage(run_in="process", name="far", **options)(handler)
        with pytest.raises(StageConfigError, match=r"'far'.*cannot be sent to a worker process"):
            await pipeline.run()
        with pytest.raises(StageConfigError):
            list(pipeline.iter())
        assert touched == []
        assert (set(threading.enumerate()), set(multiprocess.active_children())) == before
        assert pipeline.snapshot().state is PipelineState.NEW

    async def test_a_refused_start_leaves_the_pipeline_usable(self) -> None:
        stays = _Unpicklable()
        pipeline = Pipeline([1]) >> stage(run_in="process")(lambda item: stays)
        for _ in range(2):
            with pytest.raises(StageConfigError):
                await pipeline.run()
        assert names(pipeline.gen([2]))


class _Recorder(EventTrigger):
    """A trigger that tells when it is armed."""

    def __init__(self, touched: list[str]) -> None:
        super().__init__(asyncio.Event())
        self._touched = touched

    def arm(self, callback: Any) -> Any:
        self._touched.append("trigger")
        return super().arm(callback)


class TestPools:
    async def test_a_work_pool_is_a_stage_with_its_workers(self) -> None:
        @work_pool(buffer=4, retries=2, num_workers=3)
        async def work(item: int) -> int:
            return item + 1

        pipeline = Pipeline(range(9)) >> work
        assert sorted(await pipeline.collect()) == list(range(1, 10))  # type: ignore[arg-type]
        row = pipeline.snapshot().stage("work")
        assert (row.concurrency, row.capacity) == (3, 4)

    async def test_retries_counts_attempts(self) -> None:
        calls: list[int] = []

        @work_pool(retries=3)
        def fails(item: int) -> int:
            calls.append(item)
            raise OSError

        await (Pipeline([1]) >> fails).run()
        assert calls == [1, 1, 1]

    async def test_a_work_pool_may_use_processes(self) -> None:
        @work_pool(multi_proc=True)
        def work(item: int) -> int:
            return item + 1

        assert await (Pipeline([1]) >> work).collect() == [2]

    async def test_a_work_pool_with_a_merge_calls_every_worker_for_every_item(self) -> None:
        @work_pool(num_workers=3, fork_merge=sum)
        def work(item: int) -> int:
            return item

        assert await (Pipeline([1, 2]) >> work).collect() == [3, 6]

    async def test_a_mix_pool_without_merge_shares_the_items_out(self) -> None:
        @mix_pool(buffer=1)
        def team() -> Any:
            return [lambda item: ("a", item), lambda item: ("b", item)]

        outputs = await (Pipeline(range(20)) >> team).collect()
        assert isinstance(outputs, list)
        assert sorted(item for _, item in outputs) == list(range(20))
        assert {who for who, _ in outputs} == {"a", "b"}

    async def test_a_mix_pool_with_merge_gives_the_outputs_in_handler_order(self) -> None:
        async def slow(item: int) -> str:
            for _ in range(item % 4):
                await asyncio.sleep(0)
            return f"slow {item}"

        @mix_pool(buffer=8, fork_merge=tuple)
        def team() -> Any:
            return [slow, lambda item: f"fast {item}", slow]

        outputs = await (Pipeline(range(30)) >> team).collect()
        assert outputs == [(f"slow {n}", f"fast {n}", f"slow {n}") for n in range(30)]

    @pytest.mark.parametrize("later", [False, True])
    async def test_a_failing_branch_fails_its_item_only_and_cohorts_stay_aligned(self, later: bool) -> None:
        async def slow(item: int) -> int:
            await asyncio.sleep(0)
            return item

        def sometimes(item: int) -> int:
            if item % 3 == 1:
                raise OSError(item)
            return item

        errors: list[Err] = []

        @mix_pool(buffer=4, fork_merge=tuple, error_handler=errors.append)
        def team() -> Any:
            return [sometimes, slow if later else (lambda item: item), sometimes]

        pipeline = Pipeline(range(30)) >> team
        assert await pipeline.collect() == [(n, n, n) for n in range(30) if n % 3 != 1]
        assert [err.item for err in errors] == list(range(1, 30, 3))
        row = pipeline.snapshot().stage("team")
        assert (row.received, row.succeeded, row.sided) == (30, 20, 10)

    async def test_a_merge_that_raises_fails_its_item_only(self) -> None:
        def merge(outputs: list[int]) -> int:
            if outputs[0] == 2:
                raise ArithmeticError
            return sum(outputs)

        @mix_pool(fork_merge=merge, error_policy=ErrorPolicy.EMIT)
        def team() -> Any:
            return [lambda item: item, lambda item: item]

        outputs = await (Pipeline([1, 2, 3]) >> team).collect()
        assert isinstance(outputs, list)
        assert [is_err(output) for output in outputs] == [False, True, False]
        assert (outputs[0], outputs[2]) == (2, 6)

    async def test_an_async_merge_is_awaited(self) -> None:
        async def merge(outputs: list[int]) -> int:
            await asyncio.sleep(0)
            return max(outputs)

        @mix_pool(fork_merge=merge)
        def team() -> Any:
            return [lambda item: item, lambda item: -item]

        assert await (Pipeline([1, -2]) >> team).collect() == [1, 2]

    async def test_branches_share_the_state_of_their_worker(self) -> None:
        @mix_pool(fork_merge=lambda outputs: outputs)
        def team() -> Any:
            def first(item: int, state: Any) -> int:
                state.update(first=item)
                return item

            return [first, lambda item, state: state.get("first") == item]

        assert await (Pipeline([1, 2]) >> team).collect() == [[1, True], [2, True]]

    async def test_a_mix_pool_in_processes_merges_too(self) -> None:
        @mix_pool(multi_proc=True, fork_merge=list)
        def team() -> Any:
            return [lambda item: item, lambda item: item * 2]

        assert await (Pipeline([1, 2, 3]) >> team).collect() == [[1, 2], [2, 4], [3, 6]]

    def test_a_mix_pool_without_handlers_is_refused(self) -> None:
        with pytest.raises(StageConfigError, match="handlers"):
            mix_pool()(list)

    def test_as_stage_makes_a_stage_and_leaves_one_as_it_is(self) -> None:
        made = as_stage(_add_later.__wrapped__ if hasattr(_add_later, "__wrapped__") else _with_default)
        assert isinstance(made, Stage)
        assert as_stage(made) is made
        with pytest.raises((StageConfigError, TypeError)):
            as_stage(3)  # type: ignore[arg-type]


# --- bounds


class Counted:
    """A source that counts what was pulled from it."""

    def __init__(self) -> None:
        self.pulled = 0

    async def later(self) -> AsyncIterator[int]:
        for number in itertools.count():
            self.pulled += 1
            yield number

    def plain(self) -> Iterator[int]:
        for number in itertools.count():
            self.pulled += 1
            yield number


async def calm(source: Counted, pipeline: Pipeline[Any]) -> None:
    """Until nothing moves any more: no pull and no count changes over many turns of the loop and of the threads."""
    last, quiet = None, 0
    while quiet < 50:
        snapshot = pipeline.snapshot()
        now = (source.pulled, [(row.received, row.processed, row.emitted) for row in snapshot.stages])
        last, quiet = now, quiet + 1 if now == last else 0
        await asyncio.to_thread(_take_turns)


def _take_turns() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.set)
    thread.start()
    thread.join()


async def _same_later(item: Any) -> Any:
    return item


def _same_many(item: Any) -> Iterator[Any]:
    yield item


TOPOLOGIES: dict[str, tuple[list[Any], int]] = {
    "no stage": ([], 64),
    "fused": ([stage(buffer=2)(lambda item: item), stage(buffer=3)(lambda item: item)], 5 + 2),
    "coroutine": ([stage(buffer=2)(_same_later)], 2 + 1),
    "coroutines": ([stage(buffer=2, concurrency=3)(_same_later), stage(buffer=0)(_same_later)], 2 + 3 + 1),
    "ordered": ([stage(buffer=2, concurrency=3, ordered=True)(_same_later)], 2 + 3),
    "ordered without a buffer": ([stage(buffer=0, concurrency=3, ordered=True)(_same_later)], 3),
    "generators": ([stage(buffer=1)(_same_many), stage(buffer=1, concurrency=2)(_same_many)], 2 + 3),
    "thread": ([stage(buffer=3, run_in="thread", concurrency=2)(lambda item: item)], 3 + 2 * (1 + 3)),
    "thread without a buffer": ([stage(buffer=0, run_in="thread", concurrency=2)(lambda item: item)], 2 * (1 + 1)),
    "ordered threads": ([stage(buffer=3, run_in="thread", concurrency=2, ordered=True)(lambda item: item)], 3 + 2 * (1 + 3)),
    "thread generators": ([stage(buffer=2, run_in="thread", concurrency=2)(_same_many)], 2 + 2 * (1 + 2)),
    "batch": ([operators.batch(5, buffer=2)], 2 + 5),
    "aiostream": ([pipe.map(lambda item: item)], 64 + 1),
    "long": (
        [stage(buffer=1)(_same_later), operators.batch(1, buffer=1), stage(buffer=1, run_in="thread")(lambda item: item)],
        3 + 1 + 1 + 2,
    ),
    "process": ([stage(buffer=2, run_in="process")(lambda item: item)], 2 + 1 + 2),
}


class TestBounds:
    @pytest.mark.parametrize("source_kind", ["later", "plain"])
    @pytest.mark.parametrize("topology", TOPOLOGIES)
    async def test_a_stalled_sink_stops_the_source_within_the_bound(self, topology: str, source_kind: str) -> None:
        chain, inside = TOPOLOGIES[topology]
        source = Counted()
        pipeline: Pipeline[Any] = Pipeline(getattr(source, source_kind))
        for one in chain:
            pipeline = pipeline >> one
        max_buffer = 2
        size = 5 if topology == "batch" else 1
        iteration = pipeline.async_iter(max_buffer)
        await anext(iteration)  # and then no more
        await calm(source, pipeline)
        assert source.pulled <= inside + 1 + max_buffer * size + size
        assert source.pulled > 1
        await iteration.aclose()

    @pytest.mark.parametrize("concurrency", [1, 3])
    @pytest.mark.parametrize("ordered", [False, True])
    async def test_no_more_items_are_in_work_than_the_concurrency_allows(self, concurrency: int, ordered: bool) -> None:
        at_work = [0, 0]

        @stage(concurrency=concurrency, ordered=ordered)
        async def work(item: int) -> int:
            at_work[0] += 1
            at_work[1] = max(at_work)
            for _ in range(item % 3 + 1):
                await asyncio.sleep(0)
            at_work[0] -= 1
            return item

        await (Pipeline(range(50)) >> work).run()
        assert at_work == [0, concurrency]

    async def test_a_slow_item_holds_the_order_and_not_the_workers(self) -> None:
        began: list[int] = []
        go_on = asyncio.Event()

        @stage(concurrency=2, ordered=True, buffer=5)
        async def work(item: int) -> int:
            began.append(item)
            if item == 0:
                await go_on.wait()
            elif item == 5:
                go_on.set()
            return item

        assert await (Pipeline(range(20)) >> work).collect() == list(range(20))
        assert began[:6] == [0, 1, 2, 3, 4, 5]


class TestWatching:
    async def test_tally_len_adds_up_lengths_and_ones(self) -> None:
        for consume in ("run", "async for"):
            pipeline = Pipeline(["abc", [1, 2], 5, None, {}], tally_len=True)
            if consume == "run":
                await pipeline.run()
            else:
                assert [item async for item in pipeline]
            result = pipeline.runtime.closed.result()
            assert isinstance(result, RunReport)
            assert result.tallied == 3 + 2 + 1 + 1 + 0

    async def test_tally_len_survives_the_arrow_and_counts_the_outputs(self) -> None:
        report = await (Pipeline([1, 2, 3], tally_len=True) >> operators.batch(2)).run()
        assert isinstance(report, RunReport)
        assert report.tallied == 3

    async def test_log_tells_starts_stops_and_reasons(self) -> None:
        with capture_logs() as logs:
            pipeline = Pipeline([1], log=True, name="loud") >> stage(lambda item: pipeline.cancel("because") and item)
            await pipeline.run()
        assert [log["pipeline"] for log in logs] == ["loud"] * len(logs)
        assert len(logs) >= 2
        assert "start" in logs[0]["event"]
        assert "because" in str(logs[-1])
        assert "cancelled" in str(logs[-1])

    async def test_without_log_nothing_is_logged(self) -> None:
        with capture_logs() as logs:
            await (Pipeline([1]) >> plus(1)).run()
        assert logs == []

    async def test_a_snapshot_before_the_start_has_the_stages_and_zeros(self) -> None:
        snapshot = (Pipeline([1]) >> plus(1) >> operators.batch(2)).snapshot()
        assert snapshot.state is PipelineState.NEW
        assert (snapshot.pulled, snapshot.delivered, snapshot.elapsed, snapshot.reasons) == (0, 0, 0, ())
        assert [row.name for row in snapshot.stages] == ["plus 1", "batch"]
        assert all(row.received == row.in_flight == row.queued == 0 for row in snapshot.stages)

    async def test_a_snapshot_during_the_run_has_the_moment(self) -> None:
        seen: list[Any] = []

        @stage(name="look")
        async def look(item: int) -> int:
            seen.append(pipeline.snapshot())
            return item

        pipeline = Pipeline(range(3)) >> look
        await pipeline.run()
        assert [snapshot.state for snapshot in seen] == [PipelineState.RUNNING] * 3
        assert [snapshot.stage("look").in_flight for snapshot in seen] == [1, 1, 1]
        assert [snapshot.stage("look").received for snapshot in seen] == [1, 2, 3]
        assert seen[2].elapsed > 0

    async def test_a_snapshot_in_a_plain_handler_counts_the_item_at_work(self) -> None:
        """Also far into a run, when items go through fused stages in bursts."""
        seen: list[tuple[int, int, int]] = []

        def look(item: int) -> int:
            if item % 500 == 499:
                row = pipeline.snapshot().stage("look")
                seen.append((item, row.received, row.in_flight))
            return item

        pipeline = Pipeline(range(2000)) >> plus(0) >> stage(name="look")(look)
        await pipeline.run()
        assert seen == [(item, item + 1, 1) for item in (499, 999, 1499, 1999)]

    async def test_a_snapshot_after_the_run_stays(self) -> None:
        pipeline = Pipeline(range(3)) >> plus(1)
        report = await pipeline.run()
        assert isinstance(report, RunReport)
        first, second = pipeline.snapshot(), pipeline.snapshot()
        assert first == second
        assert (first.state, first.pulled, first.delivered) == (PipelineState.CLOSED, 3, 3)
        assert first.stages == report.stages
        assert first.elapsed == pytest.approx(report.duration)

    async def test_stage_finds_a_row_by_name_and_says_which_there_are(self) -> None:
        pipeline = Pipeline([1]) >> plus(1) >> plus(2)
        assert pipeline.snapshot().stage("plus 2").name == "plus 2"
        with pytest.raises(KeyError, match="plus 1"):
            pipeline.snapshot().stage("plus 3")

    async def test_snapshots_and_reports_are_ready_for_json(self) -> None:
        @stage(name="bad")
        def bad(item: int) -> Any:
            if item == 1:
                raise ValueError(object())
            return object()

        pipeline: Pipeline[Any] = Pipeline([1, 2, 3], cancel_on=()) >> bad >> stage(lambda item: bool(pipeline.cancel("stop", code="c")))
        before = json.loads(json.dumps(pipeline.snapshot().to_dict()))
        result = await pipeline.run()
        assert isinstance(result, Err)
        assert result.report is not None
        after = json.loads(json.dumps(pipeline.snapshot().to_dict()))
        report = json.loads(json.dumps(result.report.to_dict()))
        assert (before["state"], after["state"]) == ("new", "closed")
        assert after["reasons"][0]["message"] == report["reasons"][0]["message"] == "stop"
        assert report["stages"][0]["name"] == after["stages"][0]["name"] == "bad"
        assert report["outcome"] == "cancelled"
        assert report["balanced"] is True
        assert report["errors"][0]["type"] == "ValueError"

    async def test_the_runtime_of_a_finished_run_holds_nothing(self) -> None:
        pipeline = Pipeline([1, 2]) >> stage(run_in="thread")(lambda item: item)
        await pipeline.run()
        runtime = pipeline.runtime
        assert (set(runtime.tasks), set(runtime.threads), set(runtime.processes)) == (set(), set(), set())
        assert (runtime.reason, runtime.reasons) == (None, ())
        assert not runtime.cancel_event.is_set()

    def test_a_pipeline_shows_what_it_is_made_of(self) -> None:
        assert "plus 1" in repr(Pipeline([1], name="mine") >> plus(1))
        assert "mine" in repr(Pipeline([1], name="mine"))


# --- imports


class TestImports:
    @pytest.mark.parametrize("package", ["pipeline", "stages", "workers"])
    def test_each_package_can_be_imported_first_and_alone(self, package: str) -> None:
        code = f"import {package}; [getattr({package}, name) for name in {package}.__all__]"
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_the_pipeline_package_does_without_the_others(self) -> None:
        code = "import pipeline, sys; print([name for name in ('stages', 'workers') if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.stdout.strip() == "[]", done.stderr

    def test_imports_run_one_way_stages_workers_pipeline(self) -> None:
        above = {"pipeline": {"stages", "workers"}, "workers": {"stages"}, "stages": set[str]()}
        upwards: list[str] = []
        for package, forbidden in above.items():
            for path in sorted((ROOT / package).rglob("*.py")):
                for node in ast.walk(ast.parse(path.read_text())):
                    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                    upwards += [f"{path}:{node.lineno} {name}" for name in modules if name.split(".")[0] in forbidden]  # type: ignore[attr-defined]
        assert upwards == []

    def test_the_contracts_names_are_there(self) -> None:
        expected = {
            "pipeline": "Pipeline PipelineRuntime PipelineState ErrorPolicy StageMetrics PipelineSnapshot RunReport Err Result "
            "is_err is_ok get_err unwrap unwrap_or err_as_value CancelReason CancelType Fence Trigger TriggerHandle "
            "TimeoutTrigger EventTrigger SignalTrigger Grace PipelineError PipelineCancelled PipelineFailed WorkerLostError "
            "StageConfigError get_current_reasons",
            "stages": "stage work_pool mix_pool as_stage Stage PathChoice KillSwitch SKIP Retry map filter flat_map batch take tap pipe",
            "workers": "WorkerState WorkerHandler",
        }
        for package, text in expected.items():
            module = __import__(package)
            assert [name for name in text.split() if not hasattr(module, name)] == []
