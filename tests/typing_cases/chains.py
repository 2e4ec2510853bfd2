"""A right chain has the type of what comes out of it."""

# pyright: strict, reportUnusedExpression=false, reportUnusedCoroutine=false, reportUnusedFunction=false

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

from aiostream import stream

from pipeline import Err, Pipeline, RunReport
from stages import Stage, batch, stage, take


@stage
async def parse(text: str) -> int:
    return len(text)


@stage(concurrency=3)
def half(number: int) -> float:
    return number / 2


def numbers() -> Iterator[int]:
    yield 1


async def later() -> AsyncIterator[int]:
    yield 1


assert_type(Pipeline(["a"]), Pipeline[str])
assert_type(Pipeline(numbers()), Pipeline[int])
assert_type(Pipeline(numbers), Pipeline[int])
assert_type(Pipeline(later()), Pipeline[int])
assert_type(Pipeline(later), Pipeline[int])
assert_type(Pipeline(lambda: [1, 2]), Pipeline[int])
assert_type(Pipeline(stream.range(3)), Pipeline[int])
assert_type(Pipeline(Pipeline(["a"])), Pipeline[str])
assert_type(Pipeline(["a"]) >> parse, Pipeline[int])
assert_type(Pipeline(["a"]) >> parse >> half, Pipeline[float])
assert_type(Pipeline(["a"]).stage(parse).stage(half), Pipeline[float])
assert_type(Pipeline(["a"]) >> parse >> batch(3), Pipeline[list[int]])
assert_type(Pipeline(["a"]) >> parse >> take(3), Pipeline[int])
assert_type(Pipeline(["a"]) >> take(3) >> parse >> batch(2, within=1.0) >> take(1), Pipeline[list[int]])
assert_type(parse, Stage[str, int])
assert_type(parse >> half, Pipeline[float])
assert_type(Pipeline(["a"]) >> (parse >> half), Pipeline[float])


async def consume() -> None:
    pipeline = Pipeline(["a"]) >> parse
    assert_type(await pipeline.run(), RunReport | Err)
    assert_type(await pipeline.collect(), list[int] | Err)
    async for number in pipeline:
        assert_type(number, int)
    async for number in pipeline.async_iter(max_buffer=3):
        assert_type(number, int)
    for number in pipeline.iter():
        assert_type(number, int)
    handle = pipeline.cancel("why")
    if handle:
        assert_type(await handle, RunReport | Err)


def untyped(item: Any) -> Any:
    return item


assert_type(Pipeline([1]) >> stage(untyped), Pipeline[Any])
