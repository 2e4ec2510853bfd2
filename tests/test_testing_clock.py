"""A virtual clock: waits take no time, in order; threads and processes take theirs.

The rule kept here: nothing is slow because it waits. A bound in real seconds is there only to tell milliseconds from a
grace or a timeout, which are hours, or to show that something real was waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop
from helpers import LIMIT

from pipeline import Err, Grace, Pipeline, RunReport, TimeoutTrigger, is_err
from pipeline.testing import StuckError, VirtualLoop, real_time, run_virtual
from stages import Retry, batch, stage

HOUR = 3600.0


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Every test here is over in seconds, whatever hours are in it."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT


def now() -> float:
    return asyncio.get_running_loop().time()


class TestWaits:
    def test_a_sleep_returns_at_once_and_time_has_passed(self) -> None:
        async def main() -> float:
            await asyncio.sleep(HOUR)
            return now()

        assert run_virtual(main()) == HOUR

    def test_timers_come_in_their_order(self) -> None:
        async def main() -> list[tuple[str, float]]:
            seen: list[tuple[str, float]] = []

            async def tick(name: str, seconds: float) -> None:
                for _ in range(2):
                    await asyncio.sleep(seconds)
                    seen.append((name, now()))

            async with asyncio.TaskGroup() as group:
                group.create_task(tick("slow", 3.0))
                group.create_task(tick("quick", 2.0))
            return seen

        assert run_virtual(main()) == [("quick", 2.0), ("slow", 3.0), ("quick", 4.0), ("slow", 6.0)]

    def test_what_does_not_wait_takes_no_time(self) -> None:
        async def main() -> float:
            for _ in range(100):
                await asyncio.sleep(0)
            return now()

        assert run_virtual(main()) == 0.0

    def test_a_timeout_ends_what_takes_longer_and_nothing_else(self) -> None:
        async def main() -> float:
            async with asyncio.timeout(HOUR + 1):
                await asyncio.sleep(HOUR)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await asyncio.sleep(HOUR)
            return now()

        assert run_virtual(main()) == HOUR + 1.5

    @pytest.mark.parametrize("seconds", [1e-12, 0.1, 86_400 * 30.0, 3.2e9], ids=str)
    def test_no_wait_is_too_small_or_too_long(self, seconds: float) -> None:
        async def main() -> float:
            await asyncio.sleep(seconds)
            await asyncio.sleep(1e-12)
            return now()

        assert run_virtual(main()) >= seconds

    def test_the_same_program_sees_the_same_times(self) -> None:
        async def main() -> list[float]:
            pipeline = Pipeline(range(20)) >> stage(concurrency=3)(nap) >> batch(4, within=0.2)
            times = [now() async for _ in pipeline]
            return [*times, now()]

        assert run_virtual(main()) == run_virtual(main())

    def test_a_loop_for_other_runners(self) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(asyncio.sleep(HOUR))
            assert runner.get_loop().time() == HOUR


async def nap(item: Any) -> Any:
    await asyncio.sleep(HOUR)
    return item


class TestPipelines:
    def test_concurrency_is_seen_in_the_time(self) -> None:
        async def main() -> tuple[object, float]:
            return await (Pipeline(range(10)) >> stage(concurrency=5, ordered=True)(nap)).collect(), now()

        assert run_virtual(main()) == (list(range(10)), 2 * HOUR)

    def test_a_stages_timeout(self) -> None:
        async def main() -> tuple[RunReport | Err, float]:
            return await (Pipeline([1]) >> stage(timeout=60)(nap)).run(), now()

        report, seconds = run_virtual(main())
        assert not is_err(report)
        assert (report.stages[0].timed_out, seconds) == (1, pytest.approx(60.0, abs=0.5))

    def test_a_stages_timeout_counts_the_waits_between_the_outputs_of_a_generator(self) -> None:
        async def main() -> tuple[list[int] | Err, float]:
            async def steps(item: int) -> Any:
                for n in range(3):
                    await asyncio.sleep(40.0)
                    yield item + n

            return await (Pipeline([1]) >> stage(timeout=100)(steps)).collect(), now()

        outputs, seconds = run_virtual(main())
        assert outputs == [1, 2]
        assert seconds == pytest.approx(100.0, abs=0.5)

    def test_the_waits_between_attempts(self) -> None:
        async def main() -> tuple[RunReport | Err, float]:
            def fail(item: int) -> int:
                raise ValueError(item)

            retry = Retry(attempts=4, wait=10.0, max_wait=25.0, jitter=0.0)
            return await (Pipeline([1]) >> stage(retry=retry)(fail)).run(), now()

        report, seconds = run_virtual(main())
        assert not is_err(report)
        assert (report.stages[0].retried, seconds) == (3, 10.0 + 20.0 + 25.0)

    def test_a_batch_leaves_when_its_time_is_up(self) -> None:
        async def main() -> list[tuple[list[int], float]]:
            async def source() -> Any:
                for n in range(3):
                    yield n
                await asyncio.sleep(HOUR)
                yield 3

            return [(items, now()) async for items in Pipeline(source) >> batch(100, within=5.0)]

        assert run_virtual(main()) == [([0, 1, 2], 5.0), ([3], HOUR)]

    def test_a_timeout_trigger(self) -> None:
        async def main() -> tuple[RunReport | Err, float]:
            return await (Pipeline(itertools.count(), cancel_on=TimeoutTrigger(100 * HOUR)) >> stage(nap)).run(), now()

        result, seconds = run_virtual(main())
        assert is_err(result)
        assert result.reasons[0].message == "timed out after 360000s"
        assert seconds == 100 * HOUR


class Stubborn:
    """A handler that does not listen to its cancellation, until it is released."""

    def __init__(self) -> None:
        self.released = False

    async def handler(self, item: Any) -> Any:
        while not self.released:
            try:
                await asyncio.sleep(1000 * HOUR)
            except asyncio.CancelledError:
                continue


@pytest.fixture
def stubborn() -> Stubborn:
    return Stubborn()


class TestGraces:
    def test_a_drain_of_half_an_hour_that_fails(self) -> None:
        async def main() -> tuple[RunReport | Err, float]:
            grace = Grace(drain=1800.0, abort=30.0)
            pipeline = Pipeline(range(3), grace=grace) >> stage(buffer=1)(nap)
            running = asyncio.create_task(pipeline.run())
            await asyncio.sleep(1.0)
            pipeline.cancel("enough", drain=True)
            return await running, now()

        result, seconds = run_virtual(main())
        assert is_err(result)
        assert result.report is not None
        assert not result.report.drained
        assert seconds == 1.0 + 1800.0

    @pytest.mark.abandons("task")
    def test_an_abort_that_nobody_listens_to_takes_its_grace_and_names_the_task(self, stubborn: Stubborn) -> None:
        async def main() -> tuple[RunReport | Err, float]:
            pipeline = Pipeline([1], grace=Grace(abort=30.0)) >> stage(name="stubborn")(stubborn.handler)
            running = asyncio.create_task(pipeline.run())
            await asyncio.sleep(1.0)
            pipeline.cancel("enough")
            result = await running
            stubborn.released = True
            return result, now()

        result, seconds = run_virtual(main())
        assert is_err(result)
        assert result.report is not None
        assert result.report.abandoned == ("pipeline/stubborn",)
        assert 31.0 <= seconds <= 31.5


class TestWhatStaysReal:
    def test_no_timer_is_brought_forward_while_a_thread_works(self) -> None:
        """The thread waits for real; the trigger, hours away, does not fire meanwhile."""

        def work(item: int) -> int:
            time.sleep(0.02)
            return -item

        async def main() -> tuple[object, float]:
            pipeline = Pipeline([1, 2, 3], cancel_on=TimeoutTrigger(HOUR)) >> stage(run_in="thread")(work)
            return await pipeline.collect(), now()

        outputs, seconds = run_virtual(main())
        assert outputs == [-1, -2, -3]
        assert 0.05 < seconds < LIMIT

    def test_nor_while_a_source_blocks_in_its_thread(self) -> None:
        def source() -> Iterator[int]:
            for n in range(3):
                time.sleep(0.02)
                yield n

        async def main() -> object:
            return await (Pipeline(source, cancel_on=TimeoutTrigger(HOUR)) >> stage(nap_a_second)).collect()

        assert run_virtual(main()) == [0, 1, 2]

    def test_nor_while_processes_start_work_and_end(self) -> None:
        async def main() -> tuple[object, float]:
            pipeline = Pipeline([1, 2, 3], cancel_on=TimeoutTrigger(HOUR)) >> stage(run_in="process", teardown=brief)(abs)
            return await pipeline.collect(), now()

        outputs, seconds = run_virtual(main())
        assert outputs == [1, 2, 3]
        assert seconds < LIMIT

    def test_threads_that_have_nothing_to_do_hold_nothing_up(self) -> None:
        async def main() -> tuple[object, float]:
            async def source() -> Any:
                for n in range(3):
                    await asyncio.sleep(HOUR)
                    yield -n

            return await (Pipeline(source) >> stage(run_in="thread")(abs)).collect(), now()

        outputs, seconds = run_virtual(main())
        assert outputs == [0, 1, 2]
        assert 3 * HOUR <= seconds < 3 * HOUR + LIMIT

    def test_a_timeout_fires_in_real_time_beside_threads_that_never_rest(self) -> None:
        def quick(item: int) -> int:
            time.sleep(0.0005)
            return item

        async def main() -> RunReport | Err:
            pipeline = Pipeline(itertools.count(), cancel_on=TimeoutTrigger(0.1)) >> stage(run_in="thread", concurrency=2)(quick)
            return await pipeline.run()

        result = run_virtual(main(), limit=LIMIT)
        assert is_err(result)
        assert result.reasons[0].message == "timed out after 0.1s"

    def test_a_thread_that_ignores_a_stop_has_its_real_grace(self, release: threading.Event) -> None:
        began = threading.Event()

        def stubborn(item: int) -> None:
            began.set()
            release.wait()

        async def main() -> tuple[RunReport | Err, float]:
            pipeline = Pipeline([1], grace=Grace(abort=0.05)) >> stage(run_in="thread")(stubborn)
            running = asyncio.create_task(pipeline.run())
            await asyncio.to_thread(began.wait)
            pipeline.cancel("enough")
            seconds = now()
            return await running, now() - seconds

        result, seconds = run_virtual(main())
        release.set()
        assert is_err(result)
        assert result.report is not None
        assert result.report.abandoned == ("pipeline/stubborn:worker-0",)
        assert 0.05 <= seconds < LIMIT

    def test_to_thread_is_waited_for(self) -> None:
        async def main() -> float:
            async with asyncio.timeout(HOUR):
                await asyncio.to_thread(time.sleep, 0.02)
            return now()

        assert 0.02 <= run_virtual(main()) < LIMIT

    def test_a_loop_that_is_busy_when_real_work_begins_sees_all_of_its_time(self) -> None:
        async def main() -> float:
            job = asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.02)
            busy = time.monotonic() + 0.02
            while time.monotonic() < busy:
                pass
            await job
            return now()

        assert 0.02 <= run_virtual(main()) < LIMIT

    def test_real_time_is_for_threads_that_nobody_knows_of(self) -> None:
        async def main() -> float:
            loop, heard = asyncio.get_running_loop(), asyncio.Event()
            thread = threading.Thread(target=tell, args=(loop, heard.set))
            with real_time():
                thread.start()
                async with asyncio.timeout(HOUR):
                    await heard.wait()
            thread.join()
            return now()

        assert run_virtual(main()) < LIMIT

    def test_real_time_elsewhere_says_what_it_is_for(self) -> None:
        async def main() -> None:
            with pytest.raises(RuntimeError, match=r"run_virtual\(\) runs; this loop is .*Loop, whose time is real"):
                with real_time():
                    pass

        asyncio.run(main())
        uvloop.run(main())


async def nap_a_second(item: Any) -> Any:
    await asyncio.sleep(1.0)
    return item


def brief(state: object) -> None:
    time.sleep(0.02)


def tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    time.sleep(0.02)
    loop.call_soon_threadsafe(what)


class TestStuck:
    @pytest.mark.abandons("task")
    def test_a_wait_for_nothing_is_told_with_who_waits_where(self) -> None:
        async def main() -> None:
            asyncio.current_task().set_name("the one")  # type: ignore[union-attr]
            await asyncio.Event().wait()

        with pytest.raises(StuckError, match=r"nothing has come for 0\.01 s; these tasks wait:\n  task 'the one' at .*Event\.wait"):
            run_virtual(main(), patience=0.01)

    @pytest.mark.abandons("task")
    def test_what_never_waits_is_ended_by_the_limit(self) -> None:
        async def main() -> None:
            async with asyncio.timeout(HOUR):
                while True:
                    await asyncio.sleep(0)

        with pytest.raises(StuckError, match=r"not done after 0\.05 real seconds"):
            run_virtual(main(), limit=0.05)

    def test_something_from_outside_is_waited_for(self) -> None:
        async def main() -> None:
            heard = asyncio.Event()
            thread = threading.Thread(target=tell, args=(asyncio.get_running_loop(), heard.set))
            thread.start()
            await heard.wait()
            thread.join()

        run_virtual(main())

    def test_what_main_raises_is_raised(self) -> None:
        async def main() -> None:
            raise ValueError("of main")

        with pytest.raises(ValueError, match="of main"):
            run_virtual(main())
