"""Where the last stage's outputs go: counted and discarded, collected, or handed to an iteration.

The rule kept here: an item counts as delivered when the consumer has it. `run` and `collect` are consumers that take
at once; an iteration takes when it asks, from a bounded buffer.
"""

from __future__ import annotations

import sys
from collections.abc import Sized
from typing import Any

from .channel import EMPTY, Channel
from .metrics import Counters
from .runtime import PipelineRuntime

__all__ = ["BufferSink", "CollectingSink", "DiscardingSink"]


class DiscardingSink:
    """Takes everything at once, and keeps only the count (and the `len()`s, when asked to tally)."""

    def __init__(self, *, tally: bool = False) -> None:
        self.counters = Counters("output")
        self.tallied = 0
        self.closed = False
        self.keeps = tally
        self._tally = tally

    def connect(self, up: Counters, runtime: PipelineRuntime) -> None:
        del runtime  # nothing here ever waits
        self._up = up

    @property
    def drained(self) -> bool:
        return True

    def room(self) -> int:
        return 0 if self.closed else sys.maxsize

    def put_nowait(self, item: Any) -> None:
        self._up.emitted += 1
        self.counters.received += 1
        if self._tally:
            self.tallied += length_of(item)

    def offer(self, item: Any) -> bool:
        if self.closed:
            return False
        if self.keeps:
            self.put_nowait(item)
        else:
            self._up.emitted += 1
            self.counters.received += 1
        return True

    def put_count(self, number: int) -> None:
        self._up.emitted += number
        self.counters.received += number

    def put_many(self, items: list[Any]) -> None:
        self.put_count(len(items))
        if self._tally:
            self.tallied += sum(map(length_of, items))

    async def wait_room(self) -> bool:
        return not self.closed

    async def put(self, item: Any) -> bool:
        if self.closed:
            return False
        self.put_nowait(item)
        return True

    def finish(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def hand_over(self) -> None:
        """Nothing waits here."""


class CollectingSink(DiscardingSink):
    """Keeps every output in a list: the caller has asked for all of them."""

    def __init__(self, *, tally: bool = False) -> None:
        super().__init__(tally=tally)
        self.keeps = True
        self.items: list[Any] = []

    def put_nowait(self, item: Any) -> None:
        super().put_nowait(item)
        self.items.append(item)

    def put_many(self, items: list[Any]) -> None:
        super().put_many(items)
        self.items += items


class BufferSink:
    """A bounded buffer that an iteration on the same loop takes from."""

    keeps = True

    def __init__(self, capacity: int, *, tally: bool = False) -> None:
        self.counters = Counters("output", capacity=capacity)
        self.tallied = 0
        self._tally = tally
        self._capacity = capacity
        self._left: list[Any] = []

    def connect(self, up: Counters, runtime: PipelineRuntime) -> None:
        assert runtime.loop is not None
        self._runtime = runtime
        self._channel = Channel(self._capacity, up, self.counters, runtime.loop)
        self.room = self._channel.room
        self.put_nowait = self._channel.put_nowait
        self.offer = self._channel.offer
        self.put_many = self._channel.put_many
        self.put_count = self._channel.put_count
        self.wait_room = self._channel.wait_room
        self.put = self._channel.put

    @property
    def closed(self) -> bool:
        return self._channel.closed

    @property
    def drained(self) -> bool:
        """Whether the consumer has taken everything."""
        return not len(self._channel)

    def finish(self) -> None:
        self._channel.finish()

    def abort(self) -> None:
        # What was produced before the stop is still delivered.
        self._channel.abort(keep=True)

    def discard(self) -> None:
        """The consumer has left: what is buffered goes nowhere."""
        self._channel.abort()

    def hand_over(self) -> None:
        """The run is about to close: what the consumer has not asked for yet becomes its own."""
        while (item := self._take()) is not EMPTY:
            self._left.append(item)
        self._left.reverse()

    def pop(self) -> Any:
        """Take one output, or `EMPTY`."""
        if self._left:
            return self._left.pop()
        item = self._take()
        if item is not EMPTY and not len(self._channel):
            self._runtime.pulse()
        return item

    def _take(self) -> Any:
        item = self._channel.pop()
        if self._tally and item is not EMPTY:
            self.tallied += length_of(item)
        return item

    async def wait_items(self) -> bool:
        """Wait for an output; False when there will be none."""
        return bool(self._left) or await self._channel.wait_items()


def length_of(item: Any) -> int:
    """`len()` of an item that has one, 1 for the others."""
    return len(item) if isinstance(item, Sized) else 1
