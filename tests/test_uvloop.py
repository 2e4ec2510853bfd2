"""The same pipelines on asyncio's loop and on uvloop: nothing but the speed may differ."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from helpers import assert_balanced

from pipeline import Err, ErrorPolicy, Pipeline, PipelineFailed, SignalTrigger
from stages import stage

pytestmark = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])

Factory = Callable[[], asyncio.AbstractEventLoop]


def run(factory: Factory, main: Any) -> Any:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def inc(item: int) -> int:
    return item + 1


async def nap(item: int) -> int:
    await asyncio.sleep(0)
    return item + 1


async def wait(item: int) -> int:
    await asyncio.sleep(0.001)
    return item + 1


ROWS: dict[str, list[Any]] = {
    "plain": [stage(inc), stage(inc)],
    "async that waits": [stage(nap), stage(wait), stage(inc)],
    "workers": [stage(concurrency=7)(nap), stage(concurrency=3, ordered=True)(wait)],
    "threads": [stage(run_in="thread", concurrency=3, ordered=True)(inc), stage(inc)],
    "processes": [stage(run_in="process", concurrency=2, ordered=True)(inc), stage(nap)],
}


@pytest.mark.parametrize("row", ROWS)
def test_every_way_to_run_gives_the_same(factory: Factory, row: str) -> None:
    def fresh() -> Pipeline[int]:
        pipeline: Pipeline[int] = Pipeline(range(60))
        for each in ROWS[row]:
            pipeline = pipeline >> each
        return pipeline

    async def iterate() -> list[int]:
        return [item async for item in fresh()]

    expected = list(range(len(ROWS[row]), 60 + len(ROWS[row])))
    report = run(factory, fresh().run())
    assert report.delivered == 60
    assert_balanced(report)
    assert sorted(run(factory, fresh().collect())) == expected
    assert sorted(run(factory, iterate())) == expected
    assert sorted(fresh().iter(uvloop=factory is uvloop.new_event_loop)) == expected


def test_a_cancel_reaches_workers_that_wait(factory: Factory) -> None:
    async def main() -> Any:
        begun = asyncio.Event()

        @stage(concurrency=50)
        async def for_ever(item: int) -> None:
            if item == 49:
                begun.set()
            await asyncio.Event().wait()

        pipeline = Pipeline(range(100)) >> for_ever
        running = asyncio.ensure_future(pipeline.run())
        await begun.wait()
        pipeline.cancel("enough")
        return await running

    result = run(factory, main())
    assert isinstance(result, Err)
    assert result.report is not None
    assert result.report.stage("for_ever").cancelled == 50
    assert_balanced(result.report)


def test_a_signal_drains(factory: Factory) -> None:
    @stage(concurrency=2)
    async def last_one(item: int) -> int:
        if item == 5:
            signal.raise_signal(signal.SIGUSR1)
        await asyncio.sleep(0)
        return item

    async def endless() -> Any:
        number = 0
        while True:
            yield number
            number += 1
            await asyncio.sleep(0)

    pipeline = Pipeline(endless, cancel_on=SignalTrigger(signal.SIGUSR1, drain=True)) >> last_one
    result = run(factory, pipeline.run())
    assert isinstance(result, Err)
    assert result.report is not None
    assert result.report.drained
    assert_balanced(result.report)


def test_a_failed_iteration_raises(factory: Factory) -> None:
    @stage(on_error=ErrorPolicy.RAISE)
    def fails(item: int) -> float:
        return 1 / (3 - item)

    seen: list[float] = []
    with pytest.raises(PipelineFailed):
        seen.extend((Pipeline(range(9)) >> fails).iter(uvloop=factory is uvloop.new_event_loop))
    assert len(seen) == 3


def test_without_uvloop_asking_for_it_says_what_to_install(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(ImportError, match=r"pip install 'penstock\[uvloop\]'"):
        next(Pipeline([1]).iter(uvloop=True))
