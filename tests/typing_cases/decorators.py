"""The decorators read the types of input and output off the function, whatever kind it is."""

# pyright: strict, reportUnusedExpression=false, reportUnusedCoroutine=false, reportUnusedFunction=false

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Generator, Iterable, Iterator
from typing import assert_type

from pipeline import Err
from stages import SKIP, KillSwitch, Retry, Stage, stage
from stages.control import Skip
from workers import WorkerState


@stage
def plain(item: int) -> str:
    return str(item)


@stage()
def called(item: int) -> str:
    return str(item)


@stage(run_in="process", concurrency=2, retry=Retry(attempts=2), timeout=1.0, ordered=True, buffer=3, name="x")
def with_options(item: int) -> str:
    return str(item)


@stage
def with_state(item: int, state: WorkerState) -> str:
    return state.stage


@stage
async def coroutine(item: int) -> str:
    return str(item)


@stage(retry=3)
async def coroutine_with_state(item: int, state: WorkerState) -> str:
    return str(item)


@stage
def generator(item: int) -> Iterator[str]:
    yield str(item)


@stage(concurrency=2)
def generator_with_state(item: int, state: WorkerState) -> Generator[str, None, None]:
    yield str(item)


@stage
async def async_generator(item: int) -> AsyncIterator[str]:
    yield str(item)


@stage(concurrency=2)
async def async_generator_with_state(item: int, state: WorkerState) -> AsyncGenerator[str, None]:
    yield str(item)


@stage
def skipping(item: int) -> str | Skip:
    return str(item) if item else SKIP


@stage
async def skipping_later(item: int) -> str | Skip | Err | KillSwitch:
    return str(item) if item else SKIP


@stage
def skipping_generator(item: int) -> Iterator[str | Skip]:
    yield str(item)
    yield SKIP


@stage
async def skipping_async_generator(item: int) -> AsyncIterator[str | Err]:
    yield str(item)


@stage
def inferred(item: int):
    if item > 3:
        return SKIP
    if item > 2:
        return KillSwitch("why")
    return str(item)


@stage
def optional(item: int) -> str | None:
    return None


@stage
def a_list_is_one_output(item: int) -> list[str]:
    return [str(item)]


@stage
def returns_a_coroutine(item: int) -> Awaitable[str]:
    return later(item)


async def later(item: int) -> str:
    return str(item)


assert_type(plain, Stage[int, str])
assert_type(called, Stage[int, str])
assert_type(with_options, Stage[int, str])
assert_type(with_state, Stage[int, str])
assert_type(coroutine, Stage[int, str])
assert_type(coroutine_with_state, Stage[int, str])
assert_type(generator, Stage[int, str])
assert_type(generator_with_state, Stage[int, str])
assert_type(async_generator, Stage[int, str])
assert_type(async_generator_with_state, Stage[int, str])
assert_type(skipping, Stage[int, str])
assert_type(skipping_later, Stage[int, str])
assert_type(skipping_generator, Stage[int, str])
assert_type(skipping_async_generator, Stage[int, str])
assert_type(inferred, Stage[int, str])
assert_type(optional, Stage[int, str | None])
assert_type(a_list_is_one_output, Stage[int, list[str]])
assert_type(returns_a_coroutine, Stage[int, str])


def takes_any_iterable(item: Iterable[int]) -> int:
    return sum(item)


assert_type(stage(takes_any_iterable), Stage[Iterable[int], int])
