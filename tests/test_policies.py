"""What becomes of a failed item: the policies, the limits, the log, and the helpers for results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from helpers import LIMIT, Gate, assert_balanced
from structlog.testing import capture_logs

import stages as operators
from pipeline import (
    Err,
    ErrorPolicy,
    Pipeline,
    PipelineError,
    PipelineFailed,
    RunReport,
    StageConfigError,
    err_as_value,
    get_err,
    is_err,
    is_ok,
    unwrap,
    unwrap_or,
)
from stages import SKIP, Retry, stage

DROP, EMIT, RAISE, SIDE = ErrorPolicy.DROP, ErrorPolicy.EMIT, ErrorPolicy.RAISE, ErrorPolicy.SIDE
KINDS = ("plain", "coroutine", "generator", "async_generator", "thread", "concurrent")


class Boom(Exception):
    """The failure that the tests inject."""


def failing(kind: str, bad: Any = (1, 3), **options: Any) -> Any:
    """A stage of that kind, named "failing", whose handler raises `Boom` for the items in `bad`."""

    def check(item: Any) -> Any:
        if item in bad:
            raise Boom(f"no {item}")
        return item

    async def coroutine(item: Any) -> Any:
        await asyncio.sleep(0)
        return check(item)

    def generator(item: Any) -> Iterator[Any]:
        yield check(item)

    async def async_generator(item: Any) -> AsyncIterator[Any]:
        yield check(item)

    handlers = {"coroutine": coroutine, "generator": generator, "async_generator": async_generator}
    if kind == "thread":
        options |= {"run_in": "thread"}
    if kind == "concurrent":
        options |= {"concurrency": 3, "ordered": True}
    return stage(name="failing", **options)(handlers.get(kind, check))


def shape(outputs: Any) -> list[Any]:
    """Outputs with each error as ("err", its item)."""
    assert isinstance(outputs, list), outputs
    return [("err", output.item) if is_err(output) else output for output in outputs]


def last_row(pipeline: Pipeline[Any]) -> Any:
    return pipeline.snapshot().stage("failing")


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKindOfHandler:
    async def test_drop_goes_on_without_the_item(self, kind: str) -> None:
        pipeline = Pipeline(range(5)) >> failing(kind, on_error=DROP)
        assert await pipeline.collect() == [0, 2, 4]
        row = last_row(pipeline)
        assert (row.failed, row.dropped, row.succeeded, row.emitted) == (2, 2, 3, 3)

    async def test_emit_sends_an_error_in_the_items_place(self, kind: str) -> None:
        pipeline = Pipeline(range(5)) >> failing(kind, on_error=EMIT)
        assert shape(await pipeline.collect()) == [0, ("err", 1), 2, ("err", 3), 4]
        row = last_row(pipeline)
        assert (row.failed, row.emitted_errors, row.succeeded, row.emitted) == (2, 2, 3, 5)

    async def test_raise_stops_the_pipeline_and_run_returns_that_error(self, kind: str) -> None:
        pipeline = Pipeline(range(500)) >> failing(kind, on_error=RAISE)
        result = await pipeline.run()
        assert isinstance(result, Err)
        assert isinstance(result.value, Boom)
        assert (result.item, result.stage) == (1, "failing")
        assert result.report is not None
        assert result.report.outcome == "failed"
        assert result.report.stage("failing").raised >= 1
        assert result.report.balanced
        assert "no 1" in str(result.reason)

    async def test_side_hands_each_error_to_the_handler_and_drops_the_item(self, kind: str) -> None:
        taken: list[Err] = []
        pipeline = Pipeline(range(5)) >> failing(kind, on_error=SIDE, error_handler=taken.append)
        assert await pipeline.collect() == [0, 2, 4]
        assert [err.item for err in taken] == [1, 3]
        assert (last_row(pipeline).sided, last_row(pipeline).emitted) == (2, 3)

    async def test_a_retried_item_counts_its_retries_and_comes_out_once(self, kind: str) -> None:
        attempts: dict[Any, int] = {}

        class Flaky(tuple[int, ...]):
            """Raises for items 1 and 3 until their third attempt."""

            def __contains__(self, item: Any) -> bool:
                attempts[item] = attempts.get(item, 0) + 1
                return item in {1, 3} and attempts[item] < 3

        pipeline = Pipeline(range(5)) >> failing(kind, Flaky(), retry=Retry(attempts=3, wait=0))
        assert await pipeline.collect() == [0, 1, 2, 3, 4]
        assert attempts == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}
        row = last_row(pipeline)
        assert (row.retried, row.failed, row.succeeded) == (4, 0, 5)

    async def test_an_item_whose_retries_are_used_up_fails_once(self, kind: str) -> None:
        pipeline = Pipeline(range(5)) >> failing(kind, on_error=EMIT, retry=Retry(attempts=3, wait=0))
        outputs = await pipeline.collect()
        assert shape(outputs) == [0, ("err", 1), 2, ("err", 3), 4]
        assert isinstance(outputs, list)
        assert [output.attempts for output in outputs if isinstance(output, Err)] == [3, 3]
        row = last_row(pipeline)
        assert (row.retried, row.failed) == (4, 2)

    async def test_the_error_says_what_where_and_how(self, kind: str) -> None:
        outputs = await (Pipeline([1]) >> failing(kind, on_error=EMIT)).collect()
        assert isinstance(outputs, list)
        err = outputs[0]
        assert isinstance(err, Err)
        assert isinstance(err.value, Boom)
        assert (err.item, err.stage, err.attempts) == (1, "failing", 1)
        assert "Traceback" in err.trace
        assert "in check" in err.trace
        assert "Boom: no 1" in err.trace
        assert (err.reason, err.reasons, err.report) == (None, (), None)


class TestReturnedErrors:
    async def test_a_returned_error_is_a_failed_item(self) -> None:
        returning = stage(name="failing", on_error=EMIT)(lambda item: Err("bad") if item == 1 else item)
        pipeline = Pipeline(range(3)) >> returning
        outputs = await pipeline.collect()
        assert shape(outputs) == [0, ("err", 1), 2]
        assert last_row(pipeline).emitted_errors == 1

    async def test_a_returned_error_is_final_and_not_retried(self) -> None:
        calls: list[int] = []

        @stage(retry=Retry(attempts=5, wait=0), name="failing")
        def returning(item: int) -> Any:
            calls.append(item)
            return Err("bad")

        pipeline = Pipeline([7]) >> returning
        assert await pipeline.collect() == []
        assert calls == [7]
        assert (last_row(pipeline).retried, last_row(pipeline).dropped) == (0, 1)

    async def test_a_returned_error_gets_the_item_and_the_stage_that_it_lacks(self) -> None:
        outputs = await (Pipeline([7]) >> stage(name="failing", on_error=EMIT)(lambda item: Err("bad"))).collect()
        assert isinstance(outputs, list)
        err = outputs[0]
        assert isinstance(err, Err)
        assert (err.value, err.item, err.stage, err.attempts) == ("bad", 7, "failing", 1)

    async def test_one_error_object_returned_for_many_items_names_each_item(self) -> None:
        same = Err("bad")
        outputs = await (Pipeline([7, 8, 9]) >> stage(on_error=EMIT)(lambda item: same)).collect()
        assert shape(outputs) == [("err", 7), ("err", 8), ("err", 9)]

    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_an_error_that_a_generator_yields_fails_its_item_after_its_outputs(self, run_in: str) -> None:
        @stage(on_error=EMIT, name="failing", run_in=run_in)
        def some(item: int) -> Iterator[Any]:
            yield item
            if item == 1:
                yield Err("bad")
            yield item

        pipeline = Pipeline(range(3)) >> some
        assert shape(await pipeline.collect()) == [0, 0, 1, ("err", 1), 2, 2]
        assert (last_row(pipeline).succeeded, last_row(pipeline).emitted_errors) == (2, 1)

    async def test_a_generator_that_fails_halfway_has_sent_what_it_made(self) -> None:
        @stage(on_error=EMIT, name="failing")
        def some(item: int) -> Iterator[Any]:
            yield item
            raise Boom(item)

        pipeline = Pipeline(range(2)) >> some
        assert shape(await pipeline.collect()) == [0, ("err", 0), 1, ("err", 1)]
        assert last_row(pipeline).emitted == 4

    async def test_a_generator_with_retries_sends_nothing_of_a_failed_attempt(self) -> None:
        attempts: list[int] = []

        @stage(retry=Retry(attempts=3, wait=0), name="failing")
        def some(item: int) -> Iterator[int]:
            attempts.append(item)
            yield item
            if len(attempts) < 3:
                raise Boom(item)

        pipeline = Pipeline([1]) >> some
        assert await pipeline.collect() == [1]
        assert last_row(pipeline).retried == 2


class TestPassingOn:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_later_stage_is_not_called_with_an_error(self, kind: str) -> None:
        pipeline = Pipeline(range(4)) >> failing("plain", on_error=EMIT) >> failing(kind, bad=()).with_options(name="later")
        outputs = await pipeline.collect()
        assert shape(outputs) == [0, ("err", 1), 2, ("err", 3)]
        row = pipeline.snapshot().stage("later")
        assert (row.received, row.succeeded, row.passed, row.failed) == (4, 2, 2, 0)

    async def test_the_very_same_error_arrives_after_any_number_of_stages(self) -> None:
        made: list[Err] = []

        @stage(on_error=EMIT)
        def returning(item: int) -> Any:
            made.append(Err("bad"))
            return made[-1]

        later = [stage(lambda item: item), operators.batch(2), operators.map(str), stage(concurrency=2)(lambda item: item)]
        pipeline: Pipeline[Any] = Pipeline([1]) >> returning
        for one in later:
            pipeline = pipeline >> one
        outputs = await pipeline.collect()
        assert isinstance(outputs, list)
        assert len(outputs) == 1
        assert outputs[0] is made[0]

    @pytest.mark.parametrize("length", [3, 300])
    async def test_an_error_among_the_sources_items_passes_like_any_other(self, length: int) -> None:
        items = [Err("old", item=n) if n % 3 == 1 else n for n in range(length)]
        pipeline = Pipeline(items) >> stage(name="later")(lambda item: item + 1)
        outputs = await pipeline.collect()
        assert shape(outputs) == [("err", n) if n % 3 == 1 else n + 1 for n in range(length)]
        assert pipeline.snapshot().stage("later").passed == length // 3

    async def test_an_object_of_a_subclass_of_err_passes_too(self) -> None:
        class MyErr(Err):
            """A user's own."""

        def maybe(item: int) -> Any:
            return MyErr("mine", item=item) if item % 2 else item

        pipeline = Pipeline(range(200)) >> stage(on_error=EMIT)(maybe) >> stage(name="later")(lambda item: item)
        assert shape(await pipeline.collect()) == [("err", n) if n % 2 else n for n in range(200)]
        assert pipeline.snapshot().stage("later").passed == 100

    async def test_skip_among_errors_stays_a_success(self) -> None:
        choose = stage(name="choose", on_error=EMIT)(lambda item: (SKIP, Err("bad"), item)[item % 3])
        pipeline = Pipeline(range(300)) >> choose
        assert len(shape(await pipeline.collect())) == 200
        row = pipeline.snapshot().stage("choose")
        assert (row.succeeded, row.skipped, row.failed) == (200, 100, 100)

    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    @pytest.mark.parametrize("concurrency", [1, 2])
    async def test_an_error_keeps_its_place_in_an_ordered_stage(self, run_in: str, concurrency: int) -> None:
        """Item 0 is still at work when the error of item 1 arrives, which must not overtake it."""
        arrived = threading.Event()

        async def waits(item: int) -> int:
            while run_in == "loop" and item == 0 and pipeline.snapshot().stage("later").received < min(concurrency, 2):
                await asyncio.sleep(0)
            return item

        def blocks(item: int) -> int:
            if item == 0:
                assert arrived.wait(10)
            return item

        async def watch() -> None:
            while pipeline.snapshot().stage("later").received < 2:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            arrived.set()

        later = stage(run_in=run_in, ordered=True, concurrency=concurrency, name="later", buffer=4)
        pipeline = Pipeline(range(4)) >> failing("plain", on_error=EMIT) >> later(blocks if run_in == "thread" else waits)
        watcher = asyncio.create_task(watch())
        assert shape(await pipeline.collect()) == [0, ("err", 1), 2, ("err", 3)]
        await watcher


class TestWhichPolicyHolds:
    async def test_drop_is_the_default(self) -> None:
        pipeline = Pipeline(range(5)) >> failing("plain")
        assert await pipeline.collect() == [0, 2, 4]

    @pytest.mark.parametrize("default", [DROP, EMIT, RAISE])
    async def test_the_pipelines_default_holds_where_a_stage_says_nothing(self, default: ErrorPolicy) -> None:
        pipeline = Pipeline(range(5), on_error=default) >> failing("plain")
        await pipeline.run()
        row = last_row(pipeline)
        assert {DROP: row.dropped, EMIT: row.emitted_errors, RAISE: row.raised}[default] == row.failed > 0

    async def test_a_stages_own_policy_overrides_the_default(self) -> None:
        first = failing("plain", bad=(1,), on_error=EMIT)
        second = failing("plain", bad=(2,)).with_options(name="second")
        pipeline = Pipeline(range(4), on_error=DROP) >> first >> second
        assert shape(await pipeline.collect()) == [0, ("err", 1), 3]

    async def test_an_error_handler_alone_means_side_whatever_the_default(self) -> None:
        taken: list[Err] = []
        pipeline = Pipeline(range(4), on_error=RAISE) >> failing("plain", error_handler=taken.append)
        assert await pipeline.collect() == [0, 2]
        assert len(taken) == 2

    async def test_a_nested_pipelines_default_holds_for_its_own_stages(self) -> None:
        inner: Pipeline[Any] = Pipeline(on_error=EMIT) >> failing("plain", bad=(1,))
        second = failing("plain", bad=(2,)).with_options(name="second")
        pipeline = Pipeline(range(4), on_error=DROP) >> inner >> second
        assert shape(await pipeline.collect()) == [0, ("err", 1), 3]

    async def test_side_as_default_needs_a_handler_at_every_stage(self) -> None:
        pipeline = Pipeline([1], on_error=SIDE) >> failing("plain")
        with pytest.raises(StageConfigError, match="error_handler"):
            await pipeline.run()


class TestSide:
    async def test_an_async_handler_is_awaited(self) -> None:
        taken: list[Any] = []

        async def keep(err: Err) -> None:
            await asyncio.sleep(0)
            taken.append(err.item)

        assert await (Pipeline(range(5)) >> failing("plain", error_handler=keep)).collect() == [0, 2, 4]
        assert taken == [1, 3]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("later", [False, True])
    async def test_a_handler_that_raises_fails_the_pipeline_with_both_exceptions_on_record(self, kind: str, later: bool) -> None:
        def breaks(err: Err) -> None:
            raise KeyError("handler")

        async def breaks_later(err: Err) -> None:
            await asyncio.sleep(0)
            raise KeyError("handler")

        pipeline = Pipeline(range(5)) >> failing(kind, bad=(1,), error_handler=breaks_later if later else breaks)
        result = await pipeline.run()
        assert isinstance(result, Err)
        assert result.report is not None
        assert result.report.outcome == "failed"
        assert isinstance(result.value, KeyError)
        assert isinstance(result.value.__cause__, Boom)
        assert {type(err.value) for err in result.report.errors} == {Boom, KeyError}
        row = result.report.stage("failing")
        assert (row.failed, row.sided, row.raised) == (1, 0, 1)
        assert result.report.balanced

    async def test_what_the_handler_returns_is_ignored(self) -> None:
        pipeline = Pipeline(range(5)) >> failing("plain", error_handler=lambda err: "instead")
        assert await pipeline.collect() == [0, 2, 4]


class TestRaise:
    async def test_an_iteration_delivers_what_was_made_and_then_raises_with_the_cause(self) -> None:
        pipeline = Pipeline(range(5)) >> failing("plain", bad=(3,), on_error=RAISE)
        got: list[Any] = []
        with pytest.raises(PipelineFailed) as caught:
            async for item in pipeline:
                got.append(item)
        assert got == [0, 1, 2]
        assert isinstance(caught.value.__cause__, Boom)
        assert caught.value.report is not None
        assert caught.value.report.delivered == 3
        assert caught.value.reasons

    async def test_collect_returns_the_error(self) -> None:
        result = await (Pipeline(range(5)) >> failing("plain", on_error=RAISE)).collect()
        assert isinstance(result, Err)
        assert isinstance(result.value, Boom)

    async def test_items_behind_the_failing_stage_are_still_delivered(self) -> None:
        held = asyncio.Event()

        @stage(buffer=10)
        async def slow(item: int) -> int:
            await held.wait()
            return item

        def last_words(item: int) -> int:
            if item == 5:
                held.set()
                raise Boom(item)
            return item

        pipeline = Pipeline(range(9)) >> stage(concurrency=1, on_error=RAISE, retry=Retry(1))(last_words) >> slow
        got: list[int] = []
        with pytest.raises(PipelineFailed):
            async for item in pipeline:
                got.append(item)
        assert got == [0, 1, 2, 3, 4]

    async def test_a_failed_pipeline_may_run_again(self) -> None:
        pipeline = Pipeline([1, 2]) >> failing("plain", bad=(1,), on_error=RAISE)
        assert is_err(await pipeline.run())
        second = await pipeline.run()
        assert isinstance(second, Err)
        assert isinstance(second.value, Boom)


class TestMaxFailures:
    async def test_as_many_failures_as_allowed_are_no_failure_of_the_run(self) -> None:
        report = await (Pipeline(range(10)) >> failing("plain", bad=range(3), max_failures=3)).run()
        assert isinstance(report, RunReport)
        assert (report.outcome, report.failed) == ("completed", 3)

    async def test_one_failure_more_fails_the_pipeline(self) -> None:
        result = await (Pipeline(range(1000)) >> failing("plain", bad=range(4), max_failures=3)).run()
        assert isinstance(result, Err)
        assert "max_failures" in str(result.value)
        assert isinstance(result.value, PipelineError)
        assert isinstance(result.value.__cause__, Boom)
        assert result.report is not None
        assert result.report.outcome == "failed"
        assert result.report.stage("failing").failed == 4

    async def test_no_failure_at_all_may_be_demanded(self) -> None:
        assert is_err(await (Pipeline(range(10)) >> failing("plain", bad=(9,), max_failures=0)).run())

    async def test_a_share_is_kept_to_over_the_whole_run(self) -> None:
        report = await (Pipeline(range(100)) >> failing("plain", bad=range(90, 100), max_failures=0.1)).run()
        assert isinstance(report, RunReport)

    async def test_a_share_that_is_passed_fails_the_pipeline(self) -> None:
        result = await (Pipeline(range(100)) >> failing("plain", bad=range(89, 100), max_failures=0.1)).run()
        assert isinstance(result, Err)
        assert "10%" in str(result.value)

    async def test_a_share_is_judged_at_the_end_of_a_short_run(self) -> None:
        assert is_err(await (Pipeline(range(3)) >> failing("plain", bad=(2,), max_failures=0.1)).run())

    async def test_errors_of_earlier_stages_do_not_count(self) -> None:
        first = failing("plain", bad=range(5), on_error=EMIT)
        second = failing("plain", bad=()).with_options(name="second", max_failures=0)
        assert isinstance(await (Pipeline(range(10)) >> first >> second).run(), RunReport)

    @pytest.mark.parametrize("policy", [DROP, EMIT, SIDE])
    async def test_the_limit_holds_under_every_policy(self, policy: ErrorPolicy) -> None:
        options: dict[str, Any] = {"error_handler": lambda err: None} if policy is SIDE else {}
        pipeline = Pipeline(range(10)) >> failing("plain", bad=range(4), on_error=policy, max_failures=2, **options)
        assert is_err(await pipeline.run())

    @pytest.mark.parametrize("limit", [-1, 1.5, -0.1, True, "3"])
    def test_a_limit_that_makes_no_sense_is_refused(self, limit: Any) -> None:
        with pytest.raises(StageConfigError, match="max_failures"):
            stage(max_failures=limit)(lambda item: item)


class TestTheLog:
    async def test_a_record_says_pipeline_stage_policy_attempts_and_what_was_suppressed(self) -> None:
        with capture_logs() as logs:
            pipeline = Pipeline(range(5), name="fussy") >> failing("plain", bad=(1,), retry=Retry(attempts=2, wait=0))
            await pipeline.run()
        (record,) = [log for log in logs if log["event"] == "item failed"]
        assert record["pipeline"] == "fussy"
        assert record["stage"] == "failing"
        assert record["policy"] == "DROP"
        assert record["attempts"] == 2
        assert record["suppressed"] == 0
        assert record["log_level"] == "warning"
        assert "Boom: no 1" in record["error"]

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_thousand_failures_are_a_few_records_that_add_up(self, kind: str) -> None:
        with capture_logs() as logs:
            await (Pipeline(range(1000)) >> failing(kind, bad=range(1000))).run()
        records = [log for log in logs if log["event"] == "item failed"]
        assert 1 <= len(records) <= 30
        assert sum(1 + record["suppressed"] for record in records) == 1000

    async def test_the_records_add_up_when_the_run_is_cancelled(self) -> None:
        pipeline = Pipeline(range(1000)) >> failing("plain", bad=range(500)) >> stage(lambda item: bool(pipeline.cancel("now")))
        with capture_logs() as logs:
            await pipeline.run()
        records = [log for log in logs if log["event"] == "item failed"]
        assert sum(1 + record["suppressed"] for record in records) == last_row(pipeline).failed >= 500

    async def test_stages_are_limited_each_for_itself(self) -> None:
        second = failing("plain", bad=(2,)).with_options(name="second")
        with capture_logs() as logs:
            await (Pipeline(range(4)) >> failing("plain", bad=(1,)) >> second).run()
        assert [log["stage"] for log in logs if log["event"] == "item failed"] == ["failing", "second"]

    async def test_a_failure_that_stops_the_pipeline_is_an_error(self) -> None:
        with capture_logs() as logs:
            await (Pipeline(range(4)) >> failing("plain", on_error=RAISE)).run()
        assert [log["log_level"] for log in logs if log["event"] == "item failed"] == ["error"]

    async def test_a_run_without_failures_logs_nothing(self) -> None:
        with capture_logs() as logs:
            await (Pipeline(range(4)) >> failing("plain", bad=())).run()
        assert logs == []


class TestTheReportOfErrors:
    async def test_the_sample_is_bounded_and_the_count_is_not(self) -> None:
        report = await (Pipeline(range(1000)) >> failing("plain", bad=range(1000))).run()
        assert isinstance(report, RunReport)
        assert report.failed == 1000
        assert 1 <= len(report.errors) <= 100
        assert all(err.stage == "failing" for err in report.errors)

    async def test_every_stage_has_a_share_of_the_sample(self) -> None:
        second = failing("plain", bad=(999,)).with_options(name="second")
        report = await (Pipeline(range(1000)) >> failing("plain", bad=range(900)) >> second).run()
        assert isinstance(report, RunReport)
        assert {err.stage for err in report.errors} == {"failing", "second"}

    async def test_explain_tells_what_was_lost_and_why(self) -> None:
        report = await (Pipeline(range(5)) >> failing("plain")).run()
        assert isinstance(report, RunReport)
        text = report.explain()
        assert "'failing'" in text
        assert "2 dropped" in text
        assert "Boom" in text


class TestResultHelpers:
    def test_is_err_and_is_ok_are_opposites(self) -> None:
        assert (is_err(Err("x")), is_ok(Err("x"))) == (True, False)
        assert (is_err(None), is_ok(None)) == (False, True)

    def test_get_err_is_the_text_of_an_error(self) -> None:
        assert get_err(Err(Boom("no"))) == "no"
        assert get_err(Err("text")) == "text"
        assert get_err(1) == ""

    def test_unwrap_gives_the_value(self) -> None:
        assert unwrap(5) == 5
        assert unwrap(None) is None

    def test_unwrap_raises_the_original_exception(self) -> None:
        error = Boom("no")
        with pytest.raises(Boom) as caught:
            unwrap(Err(error))
        assert caught.value is error

    def test_unwrap_of_a_text_raises_a_pipeline_error_with_it(self) -> None:
        with pytest.raises(PipelineError, match="only text"):
            unwrap(Err("only text"))

    def test_unwrap_or_gives_the_default_for_an_error(self) -> None:
        assert unwrap_or(Err("x"), 3) == 3
        assert unwrap_or(4, 3) == 4

    def test_err_as_value_returns_what_the_function_raises(self) -> None:
        @err_as_value
        def divide(a: int, b: int) -> float:
            return a / b

        assert divide(1, 2) == 0.5
        result = divide(1, b=0)
        assert is_err(result)
        assert isinstance(result.value, ZeroDivisionError)
        assert divide.__name__ == "divide"

    async def test_err_as_value_works_for_a_coroutine_function(self) -> None:
        @err_as_value
        async def divide(a: int, b: int) -> float:
            await asyncio.sleep(0)
            return a / b

        later: Any = divide(1, 2)
        assert await later == 0.5
        failed: Any = await divide(1, 0)  # type: ignore[misc]
        assert is_err(failed)
        assert isinstance(failed.value, ZeroDivisionError)

    async def test_a_wrapped_function_is_a_handler_whose_errors_follow_the_policy(self) -> None:
        @err_as_value
        def divide(item: int) -> float:
            return 1 / item

        pipeline = Pipeline([1, 0, 2]) >> stage(on_error=EMIT)(divide)
        assert shape(await pipeline.collect()) == [1.0, ("err", 0), 0.5]


class TestRetry:
    async def test_an_int_counts_attempts_the_first_included(self) -> None:
        calls: list[int] = []

        @stage(retry=1)
        def fails(item: int) -> int:
            calls.append(item)
            raise Boom(item)

        await (Pipeline([1]) >> fails).run()
        assert calls == [1]

    async def test_attempt_starts_at_one_for_every_item(self) -> None:
        seen: list[tuple[int, int]] = []

        @stage(retry=Retry(attempts=3, wait=0))
        def fails(item: int, state: Any) -> int:
            seen.append((item, state.attempt))
            if item == 1:
                raise Boom(item)
            return item

        await (Pipeline([1, 2]) >> fails).run()
        assert seen == [(1, 1), (1, 2), (1, 3), (2, 1)]

    async def test_only_the_named_exceptions_are_retried(self) -> None:
        calls: list[int] = []

        @stage(retry=Retry(attempts=3, wait=0, on=(OSError, Boom)), name="failing")
        def fails(item: int) -> int:
            calls.append(item)
            raise Boom(item) if item else ValueError(item)

        pipeline = Pipeline([0, 1]) >> fails
        await pipeline.run()
        assert calls == [0, 1, 1, 1]
        assert last_row(pipeline).retried == 2

    def test_waits_double_up_to_the_longest(self) -> None:
        retry = Retry(attempts=9, wait=1, max_wait=5, jitter=0)
        assert [retry.delay(attempt, Boom()) for attempt in (1, 2, 3, 4, 5)] == [1, 2, 4, 5, 5]
        assert retry.delay(9, Boom()) is None

    def test_jitter_is_a_share_of_the_wait(self) -> None:
        retry = Retry(attempts=2, wait=10, jitter=0.2)
        delays = [retry.delay(1, Boom()) or 0 for _ in range(200)]
        assert all(8 <= delay <= 12 for delay in delays)
        assert max(delays) - min(delays) > 1

    async def test_a_run_that_is_cancelled_does_not_wait_for_the_next_attempt(self) -> None:
        @stage(retry=Retry(attempts=2, wait=1000))
        def fails(item: int) -> int:
            asyncio.get_running_loop().call_soon(pipeline.cancel, "now")
            raise Boom(item)

        pipeline = Pipeline([1]) >> fails
        async with asyncio.timeout(LIMIT):
            assert is_err(await pipeline.run())
        assert pipeline.snapshot().stages[0].cancelled == 1

    @pytest.mark.parametrize("run_in", ["loop", "thread"])
    async def test_an_ordered_stage_keeps_the_order_of_items_that_are_tried_again(self, run_in: str) -> None:
        attempts: dict[int, int] = {}

        @stage(retry=Retry(attempts=3, wait=0.001), ordered=True, concurrency=4, run_in=run_in)
        def flaky(item: int) -> int:
            attempts[item] = attempts.get(item, 0) + 1
            if item % 3 == 0 and attempts[item] < 3:
                raise Boom(item)
            return item

        assert await (Pipeline(range(20)) >> flaky).collect() == list(range(20))


async def test_too_many_failures_during_a_drain_end_it_and_are_among_the_reasons() -> None:
    gate = Gate()

    async def fail(n: int) -> int:
        await gate(n)
        raise ValueError(n)

    pipeline = Pipeline(range(50)) >> stage(concurrency=4)(nap) >> stage(max_failures=3)(fail)
    running = asyncio.create_task(pipeline.run())
    await gate.entered.wait()
    pipeline.cancel("enough", drain=True)
    gate.opened.set()
    result = await running
    assert isinstance(result, Err)
    assert [reason.code for reason in result.reasons] == [None, "max_failures"]
    assert result.report is not None
    assert result.report.outcome == "cancelled"
    assert result.report.failed == 4
    assert_balanced(result.report)


async def nap(n: int) -> int:
    await asyncio.sleep(0)
    return n
