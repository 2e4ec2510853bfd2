"""Iterating over a pipeline: what is delivered, how far ahead it works, and what is left when the consumer leaves."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT, Gate, Program, Tracked, assert_balanced, eventually, settled, until

from pipeline import Err, ErrorPolicy, Grace, Pipeline, PipelineCancelled, PipelineError, PipelineFailed, PipelineState
from stages import SKIP, stage


class AsyncTracked:
    """An async source that knows whether it was closed."""

    def __init__(self, limit: int = 1_000_000) -> None:
        self.limit = limit
        self.pulled = 0
        self.closed = False

    async def items(self) -> AsyncIterator[int]:
        try:
            while self.pulled < self.limit:
                self.pulled += 1
                yield self.pulled - 1
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            self.closed = True


def busy(source: Any) -> Pipeline[Any]:
    """A pipeline with something to leave behind of every kind that is cheap."""
    return Pipeline(source) >> stage(concurrency=2)(abs) >> stage(run_in="thread", concurrency=2)(abs)


async def into(seen: list[Any], outputs: Any) -> None:
    """Add what comes, up to an exception; a comprehension would forget it."""
    async for item in outputs:
        seen.append(item)


def left(pipeline: Pipeline[Any]) -> None:
    """The run is over because its consumer has left, and everything is accounted for."""
    snapshot = pipeline.snapshot()
    assert snapshot.state is PipelineState.CLOSED
    assert snapshot.reasons[0].code == "iter_closed"
    assert_balanced(snapshot)


# --- to the end


async def test_async_iter_delivers_everything_in_order() -> None:
    assert [item async for item in Pipeline(range(500)) >> stage(abs)] == list(range(500))


def test_iter_delivers_everything_in_order() -> None:
    assert list((Pipeline(range(500)) >> stage(abs)).iter()) == list(range(500))


@pytest.mark.parametrize("max_buffer", [1, 2, 64])
def test_iter_delivers_everything_through_any_buffer(max_buffer: int) -> None:
    pipeline = Pipeline(Tracked(300)) >> stage(run_in="thread", concurrency=2, ordered=True)(abs)
    assert list(pipeline.iter(max_buffer)) == list(range(300))


async def test_an_iteration_counts_what_it_delivers() -> None:
    pipeline = Pipeline(range(50)) >> stage(abs)
    async for _ in pipeline:
        pass
    snapshot = pipeline.snapshot()
    assert (snapshot.pulled, snapshot.delivered) == (50, 50)
    assert_balanced(snapshot)


async def test_only_what_handlers_return_is_ever_seen() -> None:
    @stage(on_error=ErrorPolicy.DROP)
    def some(item: int) -> Any:
        if item % 5 == 4:
            raise ValueError(item)
        return SKIP if item % 2 else item

    seen = [item async for item in Pipeline(range(50)) >> stage(concurrency=3)(abs) >> some]
    assert all(type(item) is int for item in seen)
    assert sorted(seen) == [n for n in range(50) if n % 5 != 4 and not n % 2]


async def test_none_is_ordinary_data_for_an_iteration() -> None:
    assert [item async for item in Pipeline([None, 0, "", None]) >> stage(lambda item: item)] == [None, 0, "", None]


async def test_a_pipeline_without_stages_can_be_iterated() -> None:
    assert [item async for item in Pipeline(range(5))] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_a_buffer_that_cannot_hold_anything_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="max_buffer"):
        next((Pipeline([1]) >> stage(abs)).iter(size))


async def test_a_pipeline_that_is_iterated_refuses_a_second_run() -> None:
    pipeline = Pipeline(range(9)) >> stage(abs)
    outputs = pipeline.async_iter(1)
    await anext(outputs)
    with pytest.raises(PipelineError, match="running"):
        await pipeline.run()
    await outputs.aclose()


async def test_iterating_over_a_pipeline_without_a_source_raises() -> None:
    pipeline: Pipeline[Any] = Pipeline() >> stage(abs)
    with pytest.raises(PipelineError, match="source"):
        await anext(pipeline.async_iter())


# --- leaving early, async


async def test_closing_an_async_iteration_before_its_first_item_starts_nothing() -> None:
    source = Tracked()
    pipeline = busy(source)
    await pipeline.async_iter().aclose()
    assert source.pulled == 0
    assert pipeline.snapshot().state is PipelineState.NEW


@pytest.mark.parametrize("make", [Tracked, AsyncTracked], ids=["iterator", "async generator"])
@pytest.mark.parametrize("taken", [1, 2, 100])
async def test_closing_an_async_iteration_closes_the_source_before_it_returns(taken: int, make: Callable[[], Any]) -> None:
    source, before = make(), asyncio.all_tasks()
    pipeline = busy(source.items if isinstance(source, AsyncTracked) else source)
    outputs = pipeline.async_iter()
    for _ in range(taken):
        await anext(outputs)
    await outputs.aclose()
    assert source.closed if isinstance(source, AsyncTracked) else source.closed.is_set()
    left(pipeline)
    assert pipeline.runtime.threads == set()
    await eventually(lambda: asyncio.all_tasks() <= before)


async def test_an_exception_in_the_body_leaves_the_iteration_and_comes_through() -> None:
    source = Tracked()
    pipeline = busy(source)
    with pytest.raises(KeyError, match="mine"):
        async for _ in pipeline:
            raise KeyError("mine")
    await eventually(lambda: pipeline.snapshot().state is PipelineState.CLOSED)
    await eventually(lambda: len(asyncio.all_tasks()) == 1)  # the loop's own closing of the generator
    left(pipeline)
    assert source.closed.is_set()


async def test_an_exception_thrown_into_an_async_iteration_closes_it_and_comes_back() -> None:
    source = Tracked()
    pipeline = busy(source)
    outputs = pipeline.async_iter()
    await anext(outputs)
    with pytest.raises(KeyError, match="mine"):
        await outputs.athrow(KeyError("mine"))
    left(pipeline)
    assert source.closed.is_set()


async def test_an_async_iteration_that_is_forgotten_is_closed_by_the_garbage_collector() -> None:
    source = Tracked()
    pipeline = busy(source)
    outputs = pipeline.async_iter()
    await anext(outputs)
    del outputs
    gc.collect()
    await eventually(lambda: pipeline.snapshot().state is PipelineState.CLOSED)
    left(pipeline)
    assert source.closed.is_set()


async def test_cancelling_the_task_that_iterates_closes_everything() -> None:
    gate, source = Gate(), Tracked()
    pipeline = Pipeline(source) >> stage(gate.__call__)

    async def consume() -> None:
        async for _ in pipeline:
            pass

    task = asyncio.create_task(consume())
    await gate.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pipeline.snapshot().state is PipelineState.CLOSED
    assert_balanced(pipeline.snapshot())
    assert source.closed.is_set()


def test_a_loop_that_ends_in_the_middle_of_an_iteration_closes_the_source() -> None:
    source = Tracked()
    pipeline = busy(source)

    async def main() -> None:
        outputs = pipeline.async_iter()
        await anext(outputs)
        kept.append(outputs)

    kept: list[Any] = []
    with asyncio.Runner() as runner:
        runner.run(main())
        # What asyncio.run does at its end, without the cancelling of tasks that nobody has asked for.
        runner.run(runner.get_loop().shutdown_asyncgens())
    left(pipeline)
    assert source.closed.is_set()


# --- leaving early, synchronous


def test_closing_an_iteration_before_its_first_item_starts_nothing() -> None:
    source = Tracked()
    pipeline = busy(source)
    pipeline.iter().close()
    assert source.pulled == 0
    assert pipeline.snapshot().state is PipelineState.NEW


@pytest.mark.parametrize("make", [Tracked, AsyncTracked], ids=["iterator", "async generator"])
@pytest.mark.parametrize("taken", [1, 2, 100])
def test_closing_an_iteration_closes_the_source_and_ends_the_thread(taken: int, make: Callable[[], Any]) -> None:
    source, before = make(), set(threading.enumerate())
    pipeline = busy(source.items if isinstance(source, AsyncTracked) else source)
    outputs = pipeline.iter()
    for _ in range(taken):
        next(outputs)
    outputs.close()
    assert source.closed if isinstance(source, AsyncTracked) else source.closed.is_set()
    left(pipeline)
    until(lambda: set(threading.enumerate()) <= before, 0.2)


def test_an_exception_in_the_body_of_a_synchronous_iteration_comes_through() -> None:
    source = Tracked()
    pipeline = busy(source)

    def consume() -> None:
        for _ in pipeline.iter():
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        consume()
    gc.collect()  # the traceback has kept the generator until now
    left(pipeline)
    assert source.closed.is_set()


def test_an_exception_thrown_into_a_synchronous_iteration_closes_it_and_comes_back() -> None:
    source = Tracked()
    pipeline = busy(source)
    outputs = pipeline.iter()
    next(outputs)
    with pytest.raises(KeyError, match="mine"):
        outputs.throw(KeyError("mine"))
    left(pipeline)
    assert source.closed.is_set()


def test_a_synchronous_iteration_that_is_forgotten_is_closed_by_the_garbage_collector() -> None:
    source = Tracked()
    pipeline = busy(source)
    outputs = pipeline.iter()
    next(outputs)
    del outputs
    gc.collect()
    left(pipeline)
    assert source.closed.is_set()


def test_leaving_an_iteration_over_processes_leaves_none() -> None:
    pipeline = Pipeline(Tracked()) >> stage(run_in="process", concurrency=2)(abs)
    for _ in pipeline.iter():
        break
    left(pipeline)
    assert pipeline.runtime.processes == set()


@pytest.mark.abandons("task")
def test_leaving_an_iteration_whose_handler_swallows_cancellation_takes_no_longer_than_its_graces() -> None:
    released = threading.Event()

    @stage(concurrency=2)
    async def deaf(item: int) -> int:
        while item and not released.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return item

    pipeline = Pipeline(range(10), grace=Grace(abort=0.1)) >> deaf
    outputs = pipeline.iter()
    next(outputs)
    until(lambda: pipeline.snapshot().stages[0].in_flight == 2)
    outputs.close()
    left(pipeline)


# --- failures and cancels


def failing_at(number: int) -> Callable[[], Iterator[int]]:
    def source() -> Iterator[int]:
        yield from range(number)
        raise OSError("the disk is gone")

    return source


async def test_what_was_produced_before_a_failure_is_delivered_then_the_failure_is_raised() -> None:
    pipeline = Pipeline(failing_at(10)) >> stage(abs)
    seen: list[int] = []
    with pytest.raises(PipelineFailed) as caught:
        await into(seen, pipeline)
    assert seen == list(range(10))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.report is not None
    assert caught.value.report.outcome == "failed"
    assert caught.value.reasons == caught.value.report.reasons != ()
    assert_balanced(caught.value.report)


def test_synchronously_what_was_produced_before_a_failure_is_delivered_then_the_failure_is_raised() -> None:
    pipeline = Pipeline(failing_at(10)) >> stage(abs)
    seen: list[int] = []
    with pytest.raises(PipelineFailed) as caught:
        seen.extend(pipeline.iter())
    assert seen == list(range(10))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.report is not None
    assert caught.value.report.outcome == "failed"
    assert_balanced(caught.value.report)


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_what_a_stage_produced_before_it_raised_is_delivered(run_in: str) -> None:
    @stage(run_in=run_in, on_error=ErrorPolicy.RAISE, ordered=True)
    def fragile(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        return item

    seen: list[int] = []
    with pytest.raises(PipelineFailed) as caught:
        await into(seen, Pipeline(Tracked()) >> fragile)
    assert seen == list(range(7))
    assert isinstance(caught.value.__cause__, ValueError)


async def test_a_slow_consumer_still_gets_what_was_produced_before_a_failure() -> None:
    pipeline = Pipeline(failing_at(10)) >> stage(abs)
    outputs, seen = pipeline.async_iter(), []
    seen.append(await anext(outputs))
    await eventually(lambda: pipeline.snapshot().reasons)
    with pytest.raises(PipelineFailed):
        await into(seen, outputs)
    assert seen == list(range(10))


async def test_what_was_produced_before_a_cancel_is_delivered_then_the_cancel_is_raised() -> None:
    pipeline = Pipeline(Tracked()) >> stage(abs)
    outputs = pipeline.async_iter(max_buffer=8)
    seen = [await anext(outputs)]
    produced = 1 + await settled(lambda: pipeline.snapshot().undelivered)
    assert produced > 4
    pipeline.cancel("enough", code="mine")
    with pytest.raises(PipelineCancelled) as caught:
        await into(seen, outputs)
    assert seen == list(range(produced))
    assert caught.value.report is not None
    assert caught.value.report.outcome == "cancelled"
    assert caught.value.report.delivered == produced
    assert [reason.code for reason in caught.value.reasons] == ["mine"]
    assert caught.value.__cause__ is None
    assert_balanced(caught.value.report)


def test_synchronously_what_was_produced_before_a_cancel_is_delivered_then_the_cancel_is_raised() -> None:
    pipeline = Pipeline(Tracked()) >> stage(abs)
    outputs = pipeline.iter(max_buffer=8)
    seen = [next(outputs)]
    produced = 1 + asyncio.run(settled(lambda: pipeline.snapshot().undelivered))
    assert produced > 4
    pipeline.cancel("enough", code="mine")
    with pytest.raises(PipelineCancelled) as caught:
        seen.extend(outputs)
    assert seen == list(range(produced))
    assert caught.value.report is not None
    assert caught.value.report.delivered == produced
    assert [reason.code for reason in caught.value.reasons] == ["mine"]
    assert_balanced(caught.value.report)


async def test_a_drained_iteration_delivers_everything_that_was_pulled() -> None:
    pipeline = Pipeline(Tracked()) >> stage(buffer=5)(abs) >> stage(buffer=5, concurrency=2, ordered=True)(abs)
    outputs = pipeline.async_iter(max_buffer=4)
    seen = [await anext(outputs)]
    pipeline.cancel("enough", drain=True)
    with pytest.raises(PipelineCancelled) as caught:
        await into(seen, outputs)
    report = caught.value.report
    assert report is not None
    assert report.drained
    assert seen == list(range(report.pulled))
    assert_balanced(report)


def test_the_traceback_of_a_failed_iteration_shows_the_handler() -> None:
    @stage(on_error=ErrorPolicy.RAISE)
    def culprit(item: int) -> int:
        return 1 // item

    with pytest.raises(PipelineFailed) as caught:
        list((Pipeline([0]) >> culprit).iter())
    cause = caught.value.__cause__
    assert cause is not None
    assert cause.__traceback__ is not None
    names = set()
    frame = cause.__traceback__
    while frame is not None:
        names.add(frame.tb_frame.f_code.co_name)
        frame = frame.tb_next
    assert "culprit" in names


# --- how far ahead it works


@pytest.mark.parametrize("max_buffer", [1, 4, 32])
async def test_a_stalled_consumer_stalls_the_source(max_buffer: int) -> None:
    source = Tracked()
    pipeline = Pipeline(source) >> stage(buffer=3)(abs) >> stage(buffer=2, concurrency=2)(abs)
    outputs = pipeline.async_iter(max_buffer)
    await anext(outputs)
    pulled = await settled(lambda: source.pulled)
    await outputs.aclose()
    bound = (3 + 2) + (1 + 2) + 1 + max_buffer
    assert pulled <= bound + 1  # one has been taken
    assert pulled >= max_buffer


@pytest.mark.parametrize("max_buffer", [1, 4, 32])
def test_a_stalled_synchronous_consumer_stalls_the_source(max_buffer: int) -> None:
    source = Tracked()
    pipeline = Pipeline(source) >> stage(buffer=3)(abs) >> stage(buffer=2, concurrency=2)(abs)
    outputs = pipeline.iter(max_buffer)
    next(outputs)
    pulled = asyncio.run(settled(lambda: source.pulled))
    outputs.close()
    bound = (3 + 2) + (1 + 2) + 1 + max_buffer
    assert max_buffer <= pulled <= bound + 1


# --- iter() in company


async def test_iter_works_in_a_thread_whose_event_loop_is_running() -> None:
    assert list((Pipeline(range(20)) >> stage(concurrency=2, ordered=True)(abs)).iter()) == list(range(20))
    assert asyncio.get_running_loop() is asyncio.get_event_loop()


def test_iter_leaves_the_threads_own_event_loop_as_it_was() -> None:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        asyncio.set_event_loop(loop)
        try:
            assert list((Pipeline([1]) >> stage(abs)).iter()) == [1]
            assert asyncio.get_event_loop() is loop
        finally:
            asyncio.set_event_loop(None)


def test_two_iterations_at_once_do_not_disturb_each_other() -> None:
    one, two = (Pipeline(range(100)) >> stage(concurrency=2, ordered=True)(abs) for _ in range(2))
    assert list(zip(one.iter(), two.iter(), strict=True)) == [(n, n) for n in range(100)]


def test_an_iteration_may_be_continued_in_another_thread() -> None:
    outputs, rest = (Pipeline(range(100)) >> stage(abs)).iter(), []
    next(outputs)
    thread = threading.Thread(target=lambda: rest.extend(outputs))
    thread.start()
    thread.join(LIMIT)
    assert rest == list(range(1, 100))


INTERRUPTED = """
    import threading
    from pipeline import Grace, Pipeline
    from stages import stage

    def source():
        try:
            yield from range(5)
            print("blocked", flush=True)
            while not pipeline.runtime.cancel_event.is_set():
                stop.wait(0.01)
        finally:
            print("source closed", flush=True)

    stop = threading.Event()
    pipeline = Pipeline(source, grace=Grace(abort=5)) >> stage(run_in={run_in!r}, concurrency=2)(abs)
    if __name__ == "__main__":
        try:
            for item in pipeline.iter():
                print(item, flush=True)
        except KeyboardInterrupt:
            print("interrupted", pipeline.snapshot().state.name, pipeline.snapshot().reasons[0].code, threading.active_count(), flush=True)
"""


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
@pytest.mark.parametrize("group", [False, True], ids=["alone", "as a terminal does"])
def test_ctrl_c_during_iter_closes_everything_and_is_raised(tmp_path: Path, group: bool, run_in: str) -> None:
    with Program(tmp_path, INTERRUPTED.format(run_in=run_in)) as program:
        program.says("blocked")
        program.says("4")
        program.interrupt(signal.SIGINT, group=group)
        finished = program.finish()
    lines = finished.out.splitlines()
    assert lines[-1] == "interrupted CLOSED iter_closed 1"
    assert "source closed" in lines
    assert (finished.code, finished.err) == (0, "")


def test_a_second_ctrl_c_during_iter_does_not_wait_for_the_abort_grace(tmp_path: Path) -> None:
    program_text = """
        import asyncio
        from pipeline import Grace, Pipeline
        from stages import stage

        @stage
        async def slow(item):
            try:
                print("working", flush=True)
                await asyncio.sleep(60)
            finally:
                print("cleaning", flush=True)
                await asyncio.sleep(60)

        pipeline = Pipeline([1], grace=Grace(abort=30)) >> slow
        try:
            list(pipeline.iter())
        except KeyboardInterrupt:
            print("interrupted", pipeline.snapshot().state.name, flush=True)
    """
    with Program(tmp_path, program_text) as program:
        program.says("working")
        program.interrupt(signal.SIGINT)
        program.says("cleaning")
        program.interrupt(signal.SIGINT)
        finished = program.finish(15)
    assert finished.out.splitlines()[-1] == "interrupted CLOSED"
    assert finished.err == ""


# BUG: on 3.12 a worker process that ends with the program is replaced, which fails on stderr
@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
def test_a_program_that_ends_in_the_middle_of_an_iteration_exits_quietly(tmp_path: Path, run_in: str) -> None:
    program_text = f"""
        from pipeline import Pipeline
        from stages import stage

        if __name__ == "__main__":
            outputs = (Pipeline(iter(int, 1)) >> stage(run_in={run_in!r})(abs)).iter()
            print(next(outputs))
    """
    with Program(tmp_path, program_text) as program:
        finished = program.finish()
    assert (finished.code, finished.out, finished.err) == (0, "0\n", "")


class Mark:
    """Something that can be watched going away."""


@pytest.mark.parametrize("fails", [False, True])
async def test_collected_outputs_belong_to_the_caller_alone(fails: bool) -> None:
    async def last_fails(n: int) -> Mark:
        if fails and n == 9:
            raise ValueError(n)
        mark = Mark()
        marks.append(weakref.ref(mark))
        return mark

    marks: list[weakref.ref[Mark]] = []
    pipeline = Pipeline(range(10)) >> stage(on_error=ErrorPolicy.RAISE)(last_fails)
    outputs = await pipeline.collect()
    assert isinstance(outputs, Err) if fails else len(outputs) == 10
    del outputs
    gc.collect()
    kept = [mark() for mark in marks if mark() is not None]
    assert len(kept) <= fails  # a frame in the traceback of an error may have the output before it
    assert pipeline.report is not None
