"""Faults of stopping: cancels at any moment, from anywhere, of handlers that do not listen."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
from itertools import count
from time import monotonic
from typing import Any

import psutil
from helpers import Gate, assert_balanced, eventually

from pipeline import CancelReason, Err, Grace, Pipeline, PipelineState, RunReport
from stages import stage

from .row import Row, fault, share
from .topologies import TOPOLOGIES, nap


async def cancelled_at_random(row: Row, name: str, moments: random.Random, times: int) -> None:
    for _ in range(times):
        pipeline = TOPOLOGIES[name]()
        running = asyncio.create_task(pipeline.run())
        if moments.random() < 0.5:
            for _ in range(moments.randrange(60)):
                await asyncio.sleep(0)
        else:
            delivered = moments.randrange(40)
            await eventually(lambda pipeline=pipeline, delivered=delivered: pipeline.snapshot().delivered >= delivered)
        began = monotonic()
        result = await pipeline.cancel("at random")
        if not pipeline.runtime.began:  # before its start: the run refuses
            result = await running
        assert isinstance(result, Err), result
        assert await running is result
        row.closed(began)
        if result.report is not None:
            assert result.report.outcome == "cancelled"
            assert not result.report.abandoned
            assert_balanced(result.report)


@fault("F1", "cancel at 200 seeded random moments × 5 topologies", "closed in < 100 ms without threads and processes")
async def random_cancels(row: Row) -> None:
    moments = random.Random(20)
    for name in ("chain", "fan-out", "nested"):
        await cancelled_at_random(row, name, moments, share(200))
    row.within(0.1)
    loop_only = max(row.seconds)
    row.notes.append(f"loop only {loop_only * 1e3:.0f} ms at worst")
    await cancelled_at_random(row, "threads", moments, share(200))
    await cancelled_at_random(row, "processes", moments, share(200))


@fault("F2", "nested child cancelled, 1,000 times", "no hang, each < 100 ms")
async def nested_cancels(row: Row) -> None:
    for turn in range(share(1000)):
        child = Pipeline(name="child") >> stage(buffer=1)(nap) >> stage(buffer=1)(nap)
        pipeline = Pipeline(count()) >> stage(buffer=1)(nap) >> child >> stage(buffer=1)(nap)
        running = asyncio.create_task(pipeline.run())
        for _ in range(turn % 40):
            await asyncio.sleep(0)
        began = monotonic()
        child.cancel("the child alone")
        result = await running
        row.closed(began)
        assert isinstance(result, Err)
        assert "the child alone" in [str(reason) for reason in result.reasons] or "the child alone" in str(result)
    row.within(0.1)


@fault("F3", "sink stalled with every queue full, then cancel", "closed < 50 ms; source pulled within the bound")
async def stalled_sink(row: Row) -> None:
    buffers, max_buffer = (4, 1, 7), 3
    for _ in range(share(50)):
        pulled = 0

        async def source() -> Any:
            nonlocal pulled
            for n in count():
                pulled += 1
                yield n

        pipeline = Pipeline(source)
        for buffer in buffers:
            pipeline = pipeline >> stage(buffer=buffer, concurrency=2)(nap)
        outputs = pipeline.async_iter(max_buffer=max_buffer)
        await anext(outputs)
        before = -1
        while before != pulled:  # everything that can be pulled is
            before = pulled
            await asyncio.sleep(0.005)
        bound = sum(buffers) + 2 * len(buffers) + 1 + max_buffer + 1  # + the one that was taken
        assert pulled <= bound, f"{pulled} pulled, {bound} allowed"
        began = monotonic()
        await outputs.aclose()
        row.closed(began)
        assert pipeline.report is not None
        assert_balanced(pipeline.report)
    row.within(0.05)


async def swallow(n: int) -> int:
    """Never lets itself be cancelled, but by the end of the test."""
    while not _let_go.is_set():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            continue
    return n


_let_go = threading.Event()


@fault("F4", "a handler swallows cancellation for ever", "Err within the abort grace + 0.5 s, the task named")
async def deaf_handler(row: Row) -> None:
    grace = 0.2
    for concurrency in (1, 3):
        _let_go.clear()
        await cancelled_in_vain(
            row, Pipeline(count(), grace=Grace(abort=grace)) >> stage(name="deaf", concurrency=concurrency)(swallow)
        )
        _let_go.set()
        await eventually(lambda: len(asyncio.all_tasks()) == 1)
    row.within(grace + 0.5)


async def cancelled_in_vain(row: Row, pipeline: Pipeline[Any]) -> None:
    """Cancel a pipeline whose stage "deaf" does not end: it is named."""
    running = asyncio.create_task(pipeline.run())
    await eventually(lambda: pipeline.snapshot().stages[0].in_flight)
    began = monotonic()
    result = await pipeline.cancel("now")
    row.closed(began)
    assert isinstance(result, Err)
    assert result.report is not None
    assert any("deaf" in name for name in result.report.abandoned), result.report.abandoned
    assert_balanced(result.report)
    await running


@fault("F10", "cancel from 8 threads, a handler and a signal at once", "one outcome, all reasons kept")
async def many_cancels(row: Row) -> None:
    for _ in range(share(40)):
        barrier = threading.Barrier(9)
        pipeline: Pipeline[Any] = Pipeline(count())

        async def handler(n: int, pipeline: Pipeline[Any] = pipeline, barrier: threading.Barrier = barrier) -> int:
            if n == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
                barrier.wait(10)
                pipeline.cancel("handler")
            await asyncio.sleep(0)
            return n

        def cancel(name: str, pipeline: Pipeline[Any] = pipeline, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            pipeline.cancel(name)

        previous = signal.signal(signal.SIGUSR1, lambda *_, pipeline=pipeline: pipeline.cancel("signal"))
        crowd = [threading.Thread(target=cancel, args=(f"thread {n}",)) for n in range(8)]
        for thread in crowd:
            thread.start()
        pipeline.stage(stage(handler))
        began = monotonic()
        result = await pipeline.run()
        row.closed(began)
        for thread in crowd:
            thread.join()
        signal.signal(signal.SIGUSR1, previous)
        assert isinstance(result, Err)
        assert result.report is not None
        assert result.report.outcome == "cancelled"
        kept = {str(reason) for reason in result.reasons}
        late = {f"thread {n}" for n in range(8)} - kept  # came when everything was closed
        assert {"signal"} <= kept, kept
        assert len(kept) + len(late) >= 9, kept
        assert len(result.reasons) == len(kept)
        assert_balanced(result.report)


@fault("F11", "parent task cancelled, and again during cleanup", "CancelledError, cancelling() right")
async def cancelled_parent(row: Row) -> None:
    for name in TOPOLOGIES:
        for again in (False, True):
            pipeline = TOPOLOGIES[name]()
            counts: list[int] = []

            async def parent(pipeline: Pipeline[Any] = pipeline, counts: list[int] = counts) -> None:
                try:
                    await pipeline.run()
                finally:
                    task = asyncio.current_task()
                    assert task is not None
                    counts.append(task.cancelling())

            task = asyncio.create_task(parent())
            await eventually(lambda pipeline=pipeline: pipeline.snapshot().delivered)
            began = monotonic()
            task.cancel()
            if again:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
            row.closed(began)
            assert task.cancelled()
            assert counts == [1 + again]
            assert pipeline.snapshot().state is PipelineState.CLOSED
            assert pipeline.report is not None
            assert_balanced(pipeline.report)
    row.within(2.0)


@fault("F16", "cancel before, during and after the start", "as the contract says")
async def any_time(row: Row) -> None:
    pipeline = Pipeline(range(100)) >> stage(nap)
    assert pipeline.cancel("before")
    assert not pipeline.cancel("again")
    refused = await pipeline.run()
    assert isinstance(refused, Err)
    assert [str(reason) for reason in refused.reasons] == ["before", "again"]
    row.injected += 1

    pipeline.gen(range(100))
    running = asyncio.create_task(pipeline.run())
    assert pipeline.cancel("in the same turn as the start")
    result = await running
    assert isinstance(result, Err)
    row.injected += 1

    gate = Gate()
    pipeline = Pipeline(range(100)) >> stage(gate)
    running = asyncio.create_task(pipeline.run())
    await gate.entered.wait()
    handle = pipeline.cancel(CancelReason("during"), drain=True)
    assert handle
    assert not pipeline.cancel("no step up", drain=True)
    assert pipeline.cancel("an abort after a drain")
    result = await running
    assert isinstance(result, Err)
    assert await handle is result
    assert [str(reason) for reason in result.reasons] == ["during", "no step up", "an abort after a drain"]
    assert result.report is not None
    assert_balanced(result.report)
    row.injected += 1

    done = await (pipeline := Pipeline(range(100)) >> stage(nap)).run()
    assert isinstance(done, RunReport)
    assert not pipeline.cancel("after the end")
    assert done.outcome == "completed"
    assert pipeline.report is done
    row.injected += 1


async def now(n: int) -> int:
    await asyncio.sleep(0)
    return n


@fault("F17", "drain with 10,000 items inside", "all delivered; past the deadline it becomes an abort")
async def long_drain(row: Row) -> None:
    gate = Gate()
    pipeline = Pipeline(count()) >> stage(buffer=1)(now) >> stage(buffer=10_000, concurrency=4)(gate) >> stage(now)
    running = asyncio.create_task(pipeline.run())
    await eventually(lambda: pipeline.snapshot().stages[1].queued >= 10_000)
    began = monotonic()
    pipeline.cancel("enough", drain=True)
    gate.opened.set()
    result = await running
    row.closed(began)
    assert isinstance(result, Err)
    report = result.report
    assert report is not None
    assert report.drained
    assert report.delivered == report.pulled >= 10_000
    assert_balanced(report)

    gate = Gate()
    pipeline = Pipeline(count(), grace=Grace(drain=0.1)) >> stage(buffer=1)(now) >> stage(buffer=10_000)(gate)
    running = asyncio.create_task(pipeline.run())
    await eventually(lambda: pipeline.snapshot().stages[1].queued >= 10_000)
    began = monotonic()
    result = await pipeline.cancel("enough", drain=True)
    row.closed(began)
    assert isinstance(result, Err)
    assert result.report is not None
    assert not result.report.drained
    assert result.report.pulled == result.report.discarded + sum(s.discarded + s.cancelled for s in result.report.stages)
    assert_balanced(result.report)
    await running


@fault("F18", "1,000 run and cancel cycles", "descriptors, threads and memory flat")
async def many_runs(row: Row) -> None:
    me, before = psutil.Process(), None
    for turn in range(share(1000)):
        pipeline = TOPOLOGIES[("chain", "fan-out", "nested", "threads")[turn % 4]]()
        running = asyncio.create_task(pipeline.run())
        for _ in range(turn % 7):
            await asyncio.sleep(0)
        began = monotonic()
        pipeline.cancel("next")
        await running
        row.closed(began)
        if turn == share(1000) // 4:
            gc.collect()
            before = (me.num_fds(), threading.active_count(), me.memory_info().rss)
    gc.collect()
    assert before is not None
    after = (me.num_fds(), threading.active_count(), me.memory_info().rss)
    assert after[:2] == before[:2], f"descriptors and threads went from {before} to {after}"
    grown = after[2] - before[2]
    assert grown < 8 * 2**20, f"{grown / 2**20:.1f} MiB more"
    row.notes.append(f"{grown / 2**20:+.1f} MiB")
