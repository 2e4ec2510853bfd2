"""What does not fit is an error, on the line where it is joined."""

# pyright: strict, reportUnusedExpression=false, reportUnusedCoroutine=false, reportUnusedFunction=false

from collections.abc import AsyncIterator, Iterator

import stages as op
from pipeline import ErrorPolicy, Pipeline
from stages import SKIP, Stage, stage
from stages.control import Skip
from workers import WorkerState


@stage
def parse(text: str) -> int:
    return len(text)


@stage
async def parse_later(text: str) -> int:
    return len(text)


@stage
def parse_many(text: str) -> Iterator[int]:
    yield len(text)


@stage
async def parse_many_later(text: str, state: WorkerState) -> AsyncIterator[int]:
    yield len(text)


@stage
def maybe(item: int) -> int | Skip:
    return item if item else SKIP


def undecorated(item: int) -> int:
    return item


numbers = Pipeline([1, 2])

numbers >> parse  # expect: str
numbers >> parse_later  # expect: str
numbers >> parse_many  # expect: str
numbers >> parse_many_later  # expect: str
numbers >> maybe >> parse  # expect: str
numbers.stage(parse)  # expect: str
numbers >> undecorated  # expect: Operator
numbers >> 3  # expect: Operator
Pipeline(["a"]) >> parse >> parse  # expect: str
parse >> parse  # expect: str
numbers >> op.batch(3) >> maybe  # expect: int
wrong: Pipeline[str] = Pipeline(["a"]) >> parse  # expect: Pipeline
also_wrong: Stage[int, int] = parse  # expect: Stage
Pipeline(3)  # expect: source
stage(concurrency="3")  # expect: concurrency
stage(unknown=3)  # expect: overloads
stage(on_error="DROP")  # expect: on_error
Pipeline([1], on_error=3)  # expect: on_error
stage(on_error=ErrorPolicy.DROP)
