"""The loop-lag watch: a plain function that holds the event loop is named, with the advice to use a thread.

These tests sleep, for that is what the function under test does to the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

import stages as operators
from pipeline import Pipeline
from stages import stage

BLOCK = 0.13
"""Seconds: a little more than the 100 ms that are allowed."""


async def warnings(pipeline: Pipeline[Any]) -> list[dict[str, Any]]:
    """What the watch says during a run."""
    with capture_logs() as logs:
        await pipeline.run()
    return [dict(log) for log in logs if "run_in=" in str(log)]


def quick(name: str) -> Any:
    return stage(name=name)(lambda item: item)


def blocking(at: Any = (0,), name: str = "sluggish", **options: Any) -> Any:
    def block(item: int) -> int:
        if item in at:
            time.sleep(BLOCK)
        return item

    return stage(name=name, **options)(block)


class TestWhoIsNamed:
    @pytest.mark.parametrize(
        "chain",
        [
            lambda: [blocking()],
            lambda: [quick("a"), blocking(), quick("b")],
            lambda: [blocking(), quick("a")],
            lambda: [quick("a"), blocking()],
            lambda: [blocking(concurrency=2)],
            lambda: [blocking(concurrency=2, ordered=True)],
            lambda: [blocking(timeout=50)],
            lambda: [blocking(retry=2)],
        ],
        ids=["alone", "middle", "first", "last", "concurrent", "ordered", "timeout", "retry"],
    )
    async def test_a_plain_function_that_blocks_is_named_and_no_other(self, chain: Any) -> None:
        pipeline: Pipeline[Any] = Pipeline(range(3), name="slow one")
        for one in chain():
            pipeline = pipeline >> one
        records = await warnings(pipeline)
        assert {record["stage"] for record in records} == {"sluggish"}
        assert records[0]["log_level"] == "warning"
        assert records[0]["pipeline"] == "slow one"
        assert 'run_in="thread"' in records[0]["advice"]
        assert records[0]["seconds"] >= 0.1

    async def test_a_generator_that_blocks_is_named(self) -> None:
        @stage
        def sluggish(item: int) -> Iterator[int]:
            yield item
            time.sleep(BLOCK)

        records = await warnings(Pipeline([1]) >> quick("a") >> sluggish >> quick("b"))
        assert {record["stage"] for record in records} == {"sluggish"}

    @pytest.mark.parametrize("options", [{"concurrency": 2}, {"retry": 2}, {"timeout": 50}], ids=str)
    async def test_a_generator_with_options_that_blocks_is_named(self, options: Any) -> None:
        @stage(**options)
        def sluggish(item: int) -> Iterator[int]:
            time.sleep(BLOCK)
            yield item

        records = await warnings(Pipeline([1]) >> quick("a") >> sluggish >> quick("b"))
        assert {record["stage"] for record in records} == {"sluggish"}

    async def test_an_operator_with_a_function_that_blocks_is_named(self) -> None:
        def sluggish(item: int) -> int:
            time.sleep(BLOCK)
            return item

        records = await warnings(Pipeline([1]) >> quick("a") >> operators.map(sluggish, name="my map"))
        assert {record["stage"] for record in records} == {"my map"}

    async def test_a_function_that_blocks_and_then_raises_is_named(self) -> None:
        @stage
        def sluggish(item: int) -> int:
            time.sleep(BLOCK)
            raise ValueError(item)

        records = await warnings(Pipeline([1]) >> quick("a") >> sluggish)
        assert {record["stage"] for record in records} == {"sluggish"}

    async def test_one_that_blocks_now_and_then_far_into_a_fast_run_is_named(self) -> None:
        """Every 997th item of a fused row that is otherwise as fast as can be."""
        at = frozenset(range(996, 5000, 997))
        records = await warnings(Pipeline(range(5000)) >> quick("a") >> blocking(at) >> quick("b"))
        assert "sluggish" in {record["stage"] for record in records}

    async def test_one_that_blocks_a_single_time_far_into_a_fast_run_is_told_of(self) -> None:
        records = await warnings(Pipeline(range(5000)) >> quick("a") >> blocking((4000,)) >> quick("b"))
        assert records
        assert all("sluggish" in (record["stage"], *record.get("among", ())) for record in records)

    async def test_one_that_blocks_a_single_time_gives_no_other_stage_a_bad_name(self) -> None:
        records = await warnings(Pipeline(range(5000)) >> quick("a") >> blocking((4000,)) >> quick("b"))
        innocent = {record["stage"] for record in records if not record.get("among")}
        assert innocent <= {"sluggish"}


class TestHowOften:
    async def test_a_function_that_always_blocks_is_not_named_every_time(self) -> None:
        records = await warnings(Pipeline(range(6)) >> blocking(range(6)))
        assert len(records) == 1

    async def test_two_that_block_are_both_named(self) -> None:
        records = await warnings(Pipeline([0]) >> blocking(name="one") >> blocking(name="two"))
        assert {record["stage"] for record in records} == {"one", "two"}


class TestWhoIsNotNamed:
    async def test_a_function_in_a_thread_may_block(self) -> None:
        assert await warnings(Pipeline(range(2)) >> blocking(run_in="thread")) == []

    async def test_a_coroutine_that_waits_does_not_block(self) -> None:
        @stage
        async def waits(item: int) -> int:
            await asyncio.sleep(BLOCK)
            return item

        assert await warnings(Pipeline(range(2)) >> waits) == []

    async def test_a_plain_function_that_returns_a_coroutine_that_waits_does_not_block(self) -> None:
        async def waits(item: int) -> int:
            await asyncio.sleep(BLOCK)
            return item

        for concurrency in (1, 2):
            assert await warnings(Pipeline(range(2)) >> stage(concurrency=concurrency)(lambda item: waits(item))) == []

    async def test_a_generator_that_waits_for_room_does_not_block(self) -> None:
        pipeline = Pipeline([0]) >> operators.flat_map(lambda item: range(20))
        with capture_logs() as logs:
            async for _ in pipeline.async_iter(1):
                await asyncio.sleep(0.01)
        assert [log for log in logs if "run_in=" in str(log)] == []

    async def test_fast_functions_are_not_named_however_many_items_there_are(self) -> None:
        assert await warnings(Pipeline(range(100_000)) >> quick("a") >> quick("b")) == []
