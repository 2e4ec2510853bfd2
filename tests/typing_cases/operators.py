"""The operators carry types through."""

# pyright: strict, reportUnusedExpression=false, reportUnusedCoroutine=false, reportUnusedFunction=false

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

from aiostream import pipe

import stages as op
from pipeline import Pipeline

start = Pipeline([1, 2])


async def text_later(item: int) -> str:
    return str(item)


async def is_odd_later(item: int) -> bool:
    return item % 2 == 1


def words(item: int) -> Iterator[str]:
    yield str(item)


async def words_later(item: int) -> AsyncIterator[str]:
    yield str(item)


async def list_later(item: int) -> list[str]:
    return [str(item)]


def see(item: int) -> None:
    print(item)


async def see_later(item: int) -> None:
    print(item)


assert_type(start >> op.map(str), Pipeline[str])
assert_type(start >> op.map(text_later, concurrency=3), Pipeline[str])
assert_type(start >> op.filter(is_odd_later), Pipeline[int])
assert_type(start >> op.flat_map(words), Pipeline[str])
assert_type(start >> op.flat_map(words_later), Pipeline[str])
assert_type(start >> op.flat_map(list_later), Pipeline[str])
assert_type(start >> op.tap(see), Pipeline[int])
assert_type(start >> op.tap(see_later), Pipeline[int])
assert_type(start >> op.batch(3), Pipeline[list[int]])
assert_type(start >> op.batch(3) >> op.batch(2, within=1), Pipeline[list[list[int]]])
assert_type(start >> op.take(3), Pipeline[int])
assert_type(start >> op.map(str) >> op.take(3) >> op.batch(2), Pipeline[list[str]])
assert_type(start >> op.pipe(pipe.take(2)), Pipeline[int])


def is_big(item: int) -> bool:
    return item > 3


assert_type(start >> op.filter(is_big), Pipeline[int])
