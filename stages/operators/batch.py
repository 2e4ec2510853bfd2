"""`batch`: items in lists, by number and by time.

The rule kept here: a batch is never held longer than `within` seconds after its first item, nor past the end of the
stream; and its items are in flight until the batch has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import isfinite
from typing import Any, TypeVar

from pipeline.channel import EMPTY
from pipeline.errors import StageConfigError
from pipeline.pace import Pacer
from pipeline.policy import ErrorPolicy
from pipeline.protocols import Node, Seat, Wires
from pipeline.result import Err

from ..definition import DEFAULT_CAPACITY

__all__ = ["BatchStage", "batch"]

T = TypeVar("T")


def batch(size: int, *, within: float | None = None, buffer: int | None = None, name: str | None = None) -> BatchStage:
    """Lists of `size` items; shorter ones at the end of the stream, and `within` seconds after a batch's first item.

    Without `within` a batch waits until it is full or the stream ends. Errors of earlier stages pass at once.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StageConfigError(f"batch needs a whole number of items, 1 or more, not {size!r}")
    if within is not None and (isinstance(within, bool) or not isinstance(within, (int, float)) or not isfinite(within) or within <= 0):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StageConfigError(f"within is a number of seconds, more than 0, not {within!r}")
    if buffer is not None and (isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StageConfigError(f"buffer is a number of items, 0 or more, not {buffer!r}")
    return BatchStage(size, within, DEFAULT_CAPACITY if buffer is None else buffer, name or "batch")


class BatchStage:
    """The definition of `batch(size)`: a stage from any type to lists of it."""

    fusable = False

    def __init__(self, size: int, within: float | None, capacity: int, name: str) -> None:
        self.size = size
        self.within = within
        self.capacity = capacity
        self.width = size
        self.name = name

    def check(self, default_policy: ErrorPolicy) -> None:
        pass

    def open(self, seats: Sequence[Seat], wires: Wires) -> Node:
        return _BatchNode(self.size, self.within, seats[0], wires)

    def accepts(self, item: T, /) -> list[T]:
        raise AssertionError("for the type checker only, never called")


class _BatchNode:
    def __init__(self, size: int, within: float | None, seat: Seat, wires: Wires) -> None:
        self._size = size
        self._within = within
        self._counters = seat.counters
        self._wires = wires
        self._held: list[Any] = []
        self._due: float | None = None

    async def run(self) -> None:
        inlet, outlet, loop = self._wires.inlet, self._wires.outlet, asyncio.get_running_loop()
        pace = Pacer()
        while not outlet.closed:
            if self._due is not None and loop.time() >= self._due:
                await self._flush()
            item = inlet.pop()
            if item is EMPTY:
                if not await self._wait_items():
                    break
                pace.restart()
            elif isinstance(item, Err):
                if await outlet.put(item):
                    self._counters.passed += 1
            else:
                self._hold(item, loop)
                if len(self._held) >= self._size:
                    await self._flush()
            if pace.due():
                await pace.rest()
        await self._flush()

    def abort(self) -> None:
        """Nothing beyond the task's own cancellation."""

    def _hold(self, item: Any, loop: asyncio.AbstractEventLoop) -> None:
        if not self._held and self._within is not None:
            self._due = loop.time() + self._within
        self._held.append(item)

    async def _wait_items(self) -> bool:
        """Wait for more, but not past the time of the batch in hand; False at the end of the stream."""
        if self._due is None:
            return await self._wires.inlet.wait_items()
        try:
            async with asyncio.timeout_at(self._due):
                return await self._wires.inlet.wait_items()
        except TimeoutError:
            return True

    async def _flush(self) -> None:
        held, self._held, self._due = self._held, [], None
        if held and await self._wires.outlet.put(held):
            self._counters.succeeded += len(held)
