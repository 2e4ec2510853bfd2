"""Any aiostream operator as a stage, in the ledger like the others.

The rule kept here: an operator is a black box between two streams, so the ledger takes its word from when it asks. An
item is in flight from when the operator takes it until it asks for the next one or ends. An operator that stops asking
before the end of its input ends the stages before it; what they still hold is cancelled or discarded, never lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from typing import Any, TypeVar

from .channel import EMPTY
from .metrics import Counters
from .pace import Pacer
from .policy import ErrorPolicy
from .protocols import Seat, Wires
from .result import Err

__all__ = ["StreamStage", "is_stream_operator", "stream_stage"]

In = TypeVar("In")
Out = TypeVar("Out")

_CAPACITY = 64


def is_stream_operator(candidate: Any) -> bool:
    """Whether this is what `aiostream.pipe.<operator>(...)` returns: a function from a stream to a stream."""
    return callable(candidate) and getattr(candidate, "__module__", None) == "aiostream.core"


def stream_stage(operator: Callable[[AsyncIterable[In]], AsyncIterable[Out]], *, name: str | None = None) -> StreamStage:
    """The stage for one operator."""
    return StreamStage(operator, name or "pipe")


class StreamStage:
    """A stage made of one stream operator. Runs in the loop; `Err`s of earlier stages pass around it, untouched."""

    def __init__(self, operator: Callable[[AsyncIterable[Any]], AsyncIterable[Any]], name: str) -> None:
        self._operator = operator
        self.name = name
        self.capacity = _CAPACITY
        self.width = 1
        self.fusable = False

    def check(self, default_policy: ErrorPolicy) -> None:
        """Nothing to check before a run: the operator is only built when the stream is there."""

    def open(self, seats: Sequence[Seat], wires: Wires) -> _StreamNode:
        return _StreamNode(self._operator, seats[0], wires)

    def accepts(self, item: Any, /) -> Any:
        """For the type checker only."""
        raise AssertionError("never called")


class _StreamNode:
    def __init__(
        self, operator: Callable[[AsyncIterable[Any]], AsyncIterable[Any]], seat: Seat, wires: Wires
    ) -> None:
        self._operator = operator
        self._seat = seat
        self._counters: Counters = seat.counters
        self._wires = wires
        self._open = False

    async def run(self) -> None:
        try:
            await self._forward()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed(error)
        else:
            self._close_item()

    def abort(self) -> None:
        """Nothing beyond the task's own cancellation."""

    async def _forward(self) -> None:
        from aiostream.core import streamcontext

        outlet = self._wires.outlet
        feed = self._feed()
        try:
            async with streamcontext(self._operator(feed)) as stream:
                async for output in stream:
                    if not await outlet.put(output):
                        return
        finally:
            await feed.aclose()

    async def _feed(self) -> AsyncGenerator[Any, None]:
        """The operator's input. Being asked again says that the item before is done with."""
        inlet, outlet, counters = self._wires.inlet, self._wires.outlet, self._counters
        pace = Pacer()
        while True:
            self._close_item()
            item = inlet.pop()
            if item is EMPTY:
                if not await inlet.wait_items():
                    return
                pace.restart()
            elif isinstance(item, Err):
                if not await outlet.put(item):
                    return
                counters.passed += 1
            else:
                self._open = True
                yield item
                if pace.due():
                    await pace.rest()

    def _close_item(self) -> None:
        if self._open:
            self._open = False
            self._counters.succeeded += 1

    def _failed(self, error: Exception) -> None:
        # A generator that has raised cannot go on, so there is no other policy than to stop. Errors of the user's own
        # functions inside the operator end here too.
        counters = self._counters
        if self._open:
            self._open = False
            counters.raised += 1
        err = Err.of(error, stage=self._seat.name)
        self._wires.inlet.abort()
        self._wires.runtime.fail(err, origin=self._seat.name, code="stage_error", cut=self._seat.index)
