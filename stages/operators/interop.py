"""`pipe`: any aiostream operator as a stage."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable
from typing import TypeVar, cast

from pipeline.errors import StageConfigError
from pipeline.interop import StreamStage, stream_stage
from pipeline.protocols import StageLike

__all__ = ["pipe"]

In = TypeVar("In")
Out = TypeVar("Out")


def pipe(operator: Callable[[AsyncIterable[In]], AsyncIterable[Out]], *, name: str | None = None) -> StageLike[In, Out]:
    """The stage for what `aiostream.pipe.<operator>(...)` returns, or any function from an async iterable to another.

    An item counts as in flight until the operator asks for the next. What the operator raises fails the pipeline.
    """
    if not callable(operator):
        raise StageConfigError(f"pipe takes an aiostream operator, such as aiostream.pipe.take(3), not {operator!r}")
    made: StreamStage = stream_stage(operator, name=name)
    return cast("StageLike[In, Out]", made)
