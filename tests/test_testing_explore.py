"""The explorer finds what is planted in stages and in the engine itself, says where, and replays exactly that run.

The rule kept here: each planted fault shows at some steps only. An explorer that looked at the first, the last or a
random one would miss it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop
from helpers import run_program

from pipeline import Err, Grace, Pipeline, is_err
from pipeline.channel import Channel
from pipeline.run import Run
from pipeline.runtime import PipelineRuntime
from pipeline.sink import CollectingSink
from pipeline.testing import (
    ALL_FAULTS,
    Exploration,
    Fault,
    InjectedError,
    Play,
    assert_balanced,
    assert_no_leaks,
    explore,
    replay,
)
from pipeline.testing.stepping import SteppingLoop
from stages import batch, filter, map, stage


async def wait(n: int) -> int:
    await asyncio.sleep(1)
    return n


async def source() -> AsyncIterator[int]:
    for n in range(1, 5):
        await asyncio.sleep(1)
        yield n


def waiting() -> Pipeline[Any]:
    return Pipeline(range(4)) >> stage(wait) >> map(abs) >> stage(wait)


def failure(make: Callable[[], Any], **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        explore(make, **options)
    return str(caught.value)


def replayed(make: Callable[[], Any], text: str) -> str:
    """What the call that a failure recommends says."""
    fault, step, call, seed = re.search(  # type: ignore[union-attr]
        r"replay\(make, '(\w+)', (\d+)(?:, call=(\d+))?, seed=(\d+)\)", text
    ).groups()
    with pytest.raises(AssertionError) as caught:
        replay(make, fault, int(step), call=int(call or 0), seed=int(seed))
    return str(caught.value)


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|descriptor \d+", "", text)


class TestPlantedInAStage:
    @pytest.mark.abandons("task")
    def test_a_handler_that_forgets_a_task_when_it_is_cancelled(self) -> None:
        async def forgetful(n: int) -> int:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                asyncio.get_running_loop().create_task(asyncio.sleep(100), name="forgotten")
                raise
            return n

        def make() -> Pipeline[int]:
            return Pipeline(range(4)) >> map(abs) >> stage(forgetful)

        text = failure(make)
        assert "left behind: task 'forgotten' at" in text
        assert replayed(make, text) == text

    def test_a_handler_that_forgets_a_thread(self) -> None:
        over, threads = threading.Event(), []

        async def forgetful(n: int) -> int:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                threads.append(threading.Thread(target=over.wait, name="forgotten", daemon=True))
                threads[-1].start()
                raise
            return n

        text = failure(lambda: Pipeline(range(3)) >> stage(forgetful), faults=[Fault.DRAIN, Fault.CANCEL])
        over.set()
        for thread in threads:
            thread.join()
        assert "with the fault 'cancel'" in text
        assert "left behind: thread 'forgotten'" in text

    def test_a_handler_that_forgets_a_descriptor(self) -> None:
        left: list[int] = []

        async def forgetful(n: int) -> int:
            left.append(os.open(os.devnull, os.O_RDONLY))
            await asyncio.sleep(1)
            os.close(left.pop())
            return n

        def make() -> Pipeline[int]:
            return Pipeline(range(3)) >> stage(forgetful)

        text = failure(make)
        again = replayed(make, text)
        for descriptor in left:
            os.close(descriptor)
        assert "/dev/null" in text
        assert without_addresses(again) == without_addresses(text)

    @pytest.mark.abandons("task")
    def test_a_handler_that_does_not_listen_to_its_cancellation(self) -> None:
        async def stubborn(n: int) -> int:
            for _ in range(4):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(100)
            return n

        text = failure(lambda: Pipeline([1]) >> stage(stubborn), faults=[Fault.TASK])
        assert "abandoned: pipeline/stubborn" in text

    def test_an_output_that_comes_twice(self) -> None:
        def make() -> Any:
            pipeline = Pipeline(range(3)) >> stage(wait)
            outputs: list[int] = []

            async def consume() -> None:
                async for item in pipeline:
                    outputs.append(item)
                    if len(outputs) == 2 and pipeline.runtime.reasons:
                        outputs.append(item)

            return pipeline, consume(), outputs

        text = failure(make, faults=[Fault.DRAIN])
        assert "outputs that came twice, or from nowhere" in text
        assert "outputs came, and the ledger says" in text

    def test_a_consumer_that_swallows_its_cancellation(self) -> None:
        def make() -> Any:
            pipeline = waiting()

            async def consume() -> None:
                try:
                    await pipeline.run()
                except asyncio.CancelledError:
                    return

            return pipeline, consume()

        assert "the cancellation of the awaiting task was swallowed" in failure(make, faults=[Fault.TASK])

    def test_an_assertion_of_the_coroutine_itself(self) -> None:
        async def look(pipeline: Pipeline[Any]) -> None:
            result = await pipeline.run()
            at_three = is_err(result) and pipeline.snapshot().pulled == 3
            assert not at_three, "stopped at three"

        def make() -> Any:
            pipeline = Pipeline(source) >> stage(wait)
            return pipeline, look(pipeline)

        text = failure(make, faults=[Fault.LOOK, Fault.CANCEL])
        assert "with the fault 'cancel'" in text
        assert "the coroutine raised AssertionError: stopped at three" in text
        assert replayed(make, text) == text

    @pytest.mark.abandons("task")
    def test_a_wait_for_nothing(self) -> None:
        async def hang(n: int) -> int:
            await asyncio.Event().wait()
            return n

        text = failure(lambda: Pipeline(range(3)) >> stage(hang), limit=0.2)
        assert "without any fault" in text
        assert "task 'pipeline/hang' at" in text

    @pytest.mark.abandons("task")
    def test_a_run_without_an_end(self) -> None:
        async def spin(n: int) -> int:
            while True:
                await asyncio.sleep(0)

        assert "not done after" in failure(lambda: Pipeline(range(3)) >> stage(spin), limit=0.2)


class TestPlantedInTheEngine:
    def test_an_item_that_is_lost_when_a_channel_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        close = Channel.abort

        def forgetful(self: Channel, **options: Any) -> None:
            before = self.down.discarded
            close(self, **options)
            self.down.discarded = before

        monkeypatch.setattr(Channel, "abort", forgetful)
        text = failure(waiting_apart)
        assert "still queued at the end" in text
        assert replayed(waiting_apart, text) == text

    def test_an_item_that_is_lost_at_one_step_of_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only when a drain begins while exactly two items wait there."""
        pop = Channel.pop

        def forgetful(self: Channel) -> Any:
            item = pop(self)
            if runtimes and runtimes[-1].reasons and len(self) == 1:
                item = pop(self)
            return item

        runtimes: list[PipelineRuntime] = []
        start = Run.start

        def noted(self: Run) -> None:
            runtimes[:] = [self.runtime]
            start(self)

        monkeypatch.setattr(Run, "start", noted)
        monkeypatch.setattr(Channel, "pop", forgetful)
        text = failure(waiting_apart, faults=[Fault.DRAIN])
        assert "with the fault 'drain'" in text
        assert replayed(waiting_apart, text) == text

    def test_an_output_that_is_delivered_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        put = CollectingSink.put_nowait

        def again(self: CollectingSink, item: Any) -> None:
            put(self, item)
            if item == 2:
                self.items.append(item)

        monkeypatch.setattr(CollectingSink, "put_nowait", again)
        assert "5 outputs came, and the ledger says 4" in failure(waiting)

    def test_a_cancellation_that_is_turned_into_a_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        watch = Run.watch

        async def deaf(self: Run) -> Any:
            try:
                return await watch(self)
            except asyncio.CancelledError:
                return self.runtime.closed.result()

        monkeypatch.setattr(Run, "watch", deaf)
        text = failure(waiting, faults=[Fault.TASK])
        assert "swallowed" in text
        assert replayed(waiting, text) == text

    def test_a_reason_that_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stop = PipelineRuntime.request_stop

        def forgetful(self: PipelineRuntime, request: Any) -> bool:
            took = stop(self, request)
            if self.loop is not None and self.loop.time() >= 3.0:
                self._requests.clear()
                self._requests.append(request.__class__(request.reason.__class__("another", request.reason.cancel_type), request.level))
            return took

        monkeypatch.setattr(PipelineRuntime, "request_stop", forgetful)
        assert "its reason is not among the reasons" in failure(waiting, faults=[Fault.CANCEL])

    @pytest.mark.abandons("task")
    def test_a_stop_that_waits_too_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PipelineRuntime, "cancel_tasks", lambda self, upto=None: None)

        def make() -> Pipeline[int]:
            return Pipeline(range(4), grace=Grace(abort=0.1)) >> stage(wait_an_hour)

        assert "abandoned" in failure(make, faults=[Fault.CANCEL], limit=2.0)

    def test_two_ways_to_one_place_that_only_another_order_shows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Right only as long as the task that was made first also goes first."""

        async def meet(n: int) -> int:
            told = asyncio.get_running_loop().create_future()
            first = asyncio.ensure_future(tell(told))
            second = asyncio.ensure_future(hear(told))
            await asyncio.wait((first, second))
            return n + second.result()

        async def tell(told: asyncio.Future[int]) -> None:
            told.set_result(100)

        async def hear(told: asyncio.Future[int]) -> int:
            return told.result() if told.done() else 0

        def make() -> Any:
            pipeline = Pipeline(range(4)) >> stage(meet)
            return pipeline, check(pipeline)

        async def check(pipeline: Pipeline[int]) -> None:
            outputs = await pipeline.collect()
            assert is_err(outputs) or min(outputs) >= 100, outputs

        replay(make, None)
        text = failure(make, schedules=20, faults=[])
        assert "the coroutine raised AssertionError" in text
        with pytest.raises(AssertionError, match="the coroutine raised AssertionError"):
            replay(make, None, seed=int(text.rpartition("seed=")[2].rstrip(")")))


async def wait_an_hour(n: int) -> int:
    await asyncio.sleep(3600)
    return n


def waiting_apart() -> Pipeline[Any]:
    return Pipeline(range(6)) >> stage(wait) >> stage(buffer=4)(wait_long)


async def wait_long(n: int) -> int:
    await asyncio.sleep(3)
    return n


class TestWhatIsExplored:
    def test_every_step_is_a_victim_of_every_fault_that_it_can_be(self) -> None:
        found = explore(waiting)
        plain = replay(waiting, None)
        assert found.exact
        assert found.steps == plain.steps > 20
        everywhere = len(set(ALL_FAULTS) - {Fault.RAISE, Fault.TIME})
        assert found.runs == 1 + everywhere * plain.steps + sum(plain.calls.values()) + len(plain.timed)
        assert set(found.injected) == {fault.value for fault in ALL_FAULTS}
        assert f"{found.steps} steps, 1 schedules, every step" in str(found)

    def test_every_call_of_every_handler_raises_once(self) -> None:
        items = 4

        def make() -> Pipeline[int]:
            return Pipeline(range(items)) >> map(negative) >> filter(is_even) >> stage(prompt)

        assert explore(make, faults=[Fault.RAISE]).injected["raise"] == items + items + items // 2

    def test_a_raise_is_an_item_that_failed(self) -> None:
        plain = replay(waiting, None)
        step = next(iter(plain.calls))
        play = replay(waiting, Fault.RAISE, step)
        assert play.took_effect
        assert play.report is not None
        assert [type(err.value) for err in play.report.errors] == [InjectedError]
        assert play.report.failed == 1

    def test_a_leap_of_the_clock_fires_a_timeout_beside_what_is_ready(self) -> None:
        def make() -> Pipeline[int]:
            return Pipeline(range(3)) >> stage(timeout=10.0)(prompt)

        plain = replay(make, None)
        plays = [replay(make, Fault.TIME, step) for step in plain.timed]
        assert {play.report.failed for play in plays if play.report is not None} <= {0, 1, 2, 3}
        assert explore(waiting, faults=[Fault.TIME]).injected["time"] > 0

    def test_a_look_finds_the_laws_at_every_moment(self) -> None:
        found = explore(waiting, faults=[Fault.LOOK], schedules=3)
        assert found.schedules == 3
        assert found.injected["look"] > 50

    def test_the_same_seed_is_the_same_run_and_another_is_another(self) -> None:
        def trace(seed: int) -> list[str]:
            return replay(crowd, None, seed=seed).trace

        assert trace(0) == trace(0)
        assert trace(7) == trace(7)
        assert len({tuple(trace(seed)) for seed in range(6)}) > 3

    def test_also_the_first_one_in_a_program(self, tmp_path: Path) -> None:
        """The library loads parts of itself when they are needed: in the middle of a run."""
        finished = run_program(
            tmp_path,
            """
            from pipeline import Pipeline
            from pipeline.testing import replay
            from stages import map

            def trace():
                return replay(lambda: Pipeline(range(4)) >> map(double) >> map(abs), None, seed=4).trace

            def double(n):
                return n * 2

            assert trace() == trace()
            """,
        )
        assert finished.code == 0, finished.err

    def test_callbacks_keep_their_order_in_every_schedule(self) -> None:
        async def in_order() -> list[int]:
            loop, seen = asyncio.get_running_loop(), list[int]()
            for n in range(50):
                loop.call_soon(seen.append, n)
                loop.create_task(asyncio.sleep(0))
            await asyncio.sleep(1)
            return seen

        for seed in range(5):
            loop = SteppingLoop(seed=seed, limit=5.0, most_steps=1000)
            try:
                assert loop.run_until_complete(in_order()) == list(range(50))
            finally:
                loop.close()

    def test_with_threads_steps_are_samples(self) -> None:
        found = explore(lambda: Pipeline(range(4)) >> stage(run_in="thread")(abs), samples=3, faults=[Fault.CANCEL])
        assert not found.exact
        assert found.runs == 1 + 3

    def test_a_pipeline_that_is_another_one_each_time_is_told(self) -> None:
        made = iter(range(1000))
        text = failure(lambda: Pipeline(range(3)) >> stage(wait, name=f"wait-{next(made)}"))
        assert "the run is not the same each time" in text

    def test_a_batch_is_compared_by_its_items(self) -> None:
        explore(lambda: Pipeline(source) >> batch(10, within=1.5), faults=[Fault.DRAIN, Fault.TIME])

    def test_what_differs_without_an_item_is_not_compared_on_request(self) -> None:
        def make() -> Pipeline[int]:
            return Pipeline(source) >> batch(10) >> map(sum)

        assert "from nowhere" in failure(make, faults=[Fault.DRAIN])
        explore(make, faults=[Fault.DRAIN], compare=False)


def negative(n: int) -> int:
    return -n


def is_even(n: int) -> bool:
    return n % 2 == 0


async def prompt(n: int) -> int:
    return n


def crowd() -> Pipeline[Any]:
    return Pipeline(range(6)) >> stage(concurrency=4)(wait) >> stage(concurrency=3)(wait)


class TestAround:
    def test_inside_a_loop_it_says_to_be_called_from_outside(self) -> None:
        async def inside() -> None:
            explore(waiting)

        for run in (asyncio.run, uvloop.run):
            with pytest.raises(RuntimeError, match=r"cannot run inside of another \(.*Loop\): call it from a plain function"):
                run(inside())

    def test_the_librarys_clock_and_its_logs_are_as_they_were(self) -> None:
        import stages.lane

        configured = structlog.is_configured()
        explore(waiting, faults=[Fault.RAISE])
        assert stages.lane.perf_counter is time.perf_counter
        assert structlog.is_configured() is configured
        assert sys.gettrace() is None or "pydev" in repr(sys.gettrace())

    def test_failures_that_are_meant_are_not_logged(self, capfd: pytest.CaptureFixture[str]) -> None:
        explore(waiting, faults=[Fault.RAISE])
        assert capfd.readouterr() == ("", "")

    def test_results_have_names(self) -> None:
        assert isinstance(explore(waiting, faults=[]), Exploration)
        assert isinstance(replay(waiting, "look", 3), Play)
        with assert_no_leaks():
            replay(waiting, "cancel", 3)

    def test_a_loop_of_another_kind_of_asyncio_is_refused_with_the_cause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the explorer relies on is private, so it says so when it is not there."""
        monkeypatch.setattr("pipeline.testing.stepping.deque", dict)
        with pytest.raises(AssertionError, match="does not keep its callbacks in _ready"):
            replay(waiting, None)


class TestLaws:
    async def test_a_report_and_a_snapshot_are_balanced(self) -> None:
        pipeline = Pipeline(range(10)) >> map(negative) >> stage(prompt)
        report = await pipeline.run()
        assert not isinstance(report, Err)
        assert_balanced(report)
        assert_balanced(pipeline.snapshot())
        assert_balanced(Pipeline(range(3)).snapshot())

    @pytest.mark.parametrize(
        ("count", "law"),
        [
            ("received", r"received = processed \+ cancelled \+ in_flight"),
            ("succeeded", r"processed = succeeded \+ failed \+ passed"),
            ("failed", r"failed = dropped \+ emitted_errors"),
            ("lost", r"lost \+ timed_out <= failed"),
            ("skipped", r"skipped <= succeeded"),
            ("queued", r"at the end, queued = 0"),
            ("emitted", r"'negative' emitted 1\d+, of which 'prompt' received 10"),
        ],
    )
    async def test_every_law_is_asserted(self, count: str, law: str) -> None:
        report = await (Pipeline(range(10)) >> stage(negative) >> stage(prompt)).run()
        assert not isinstance(report, Err)
        row = report.stages[0]
        object.__setattr__(row, count, getattr(row, count) + 100)
        with pytest.raises(AssertionError, match=law):
            assert_balanced(report)
