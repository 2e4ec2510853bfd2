"""Where the last stage's outputs go: counted and discarded, collected, or handed to an iteration.

The rule kept here: an item counts as delivered when the consumer has it. `run` and `collect` are consumers that take
at once; an iteration takes when it asks, from a bounded buffer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sized
from time import perf_counter
from typing import Any, cast

from .channel import EMPTY, Channel
from .lot import Lot
from .metrics import Counters
from .protocols import Node, Pullable
from .runtime import PipelineRuntime

_REACH = 32, 1024
"""Outputs that a consumer takes at once: at first, and at most."""
_SLOW = 0.001
"""Seconds that it may be busy with them before it gets fewer."""

__all__ = ["BufferSink", "CollectingSink", "DiscardingSink"]


class DiscardingSink:
    """Takes everything at once, and keeps only the count (and the `len()`s, when asked to tally)."""

    def __init__(self, *, tally: bool = False) -> None:
        self.tallied = self.discarded = 0
        self.closed = False
        self.keeps = tally
        self._tally = tally

    def connect(self, up: Counters, runtime: PipelineRuntime) -> None:
        del runtime  # nothing here ever waits
        self._up = up

    def attract(self, node: Node, *, alone: bool) -> None:
        """Nothing is ever asked for."""

    def lend(self, places: int) -> None:
        """Nothing ever waits here."""

    @property
    def delivered(self) -> int:
        """Whatever is emitted is taken."""
        return self._up.emitted

    def lose(self, number: int) -> None:
        self.discarded += number

    @property
    def drained(self) -> bool:
        return True

    def room(self) -> int:
        return 0 if self.closed else sys.maxsize

    def put_nowait(self, item: Any) -> None:
        self._up.emitted += 1
        if self._tally:
            self.tallied += length_of(item)

    def offer(self, item: Any) -> bool:
        if self.closed:
            return False
        self._up.emitted += 1
        if self._tally:
            self.tallied += length_of(item)
        return True

    def put_count(self, number: int) -> None:
        self._up.emitted += number

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

    def offer(self, item: Any) -> bool:
        if self.closed:
            return False
        self.put_nowait(item)
        return True

    def put_many(self, items: list[Any]) -> None:
        super().put_many(items)
        self.items += items

    def give(self) -> list[Any]:
        """The list itself; the run, whose account stays with the pipeline, keeps nothing of it."""
        items, self.items = self.items, []
        return items


class BufferSink:
    """A bounded buffer that an iteration on the same loop takes from, many outputs at a time."""

    keeps = True

    def __init__(self, capacity: int, *, tally: bool = False) -> None:
        self.counters = Counters("output", capacity=capacity)
        self.tallied = 0
        self._tally = tally
        self._capacity = capacity
        self._lot: tuple[Lot, int] | None = None
        """What the consumer is taking from, and how many it had received before."""
        self._reach = _REACH[0]
        self._taken_at = 0.0
        self._left: list[Any] = []
        self._node: Pullable | None = None
        self._pulling = False

    def connect(self, up: Counters, runtime: PipelineRuntime) -> None:
        assert runtime.loop is not None
        self._runtime = runtime
        self._channel = channel = Channel(self._capacity, up, self.counters, runtime.loop)
        self.room, self.wait_room = channel.room, channel.wait_room
        self.put, self.offer = channel.put, channel.offer
        self.put_nowait, self.put_many = channel.put_nowait, channel.put_many
        self.lend = channel.lend

    def attract(self, node: Node, *, alone: bool) -> None:
        if hasattr(node, "pull") and not self._tally:
            self._node = cast("Pullable", node)

    def put_count(self, number: int) -> None:
        """Outputs that the consumer has pulled itself."""
        self._channel.up.emitted += number
        self.counters.received += number

    @property
    def closed(self) -> bool:
        return self._channel.closed

    @property
    def delivered(self) -> int:
        open_lot = self._lot  # read once, and written at once: another thread never sees a delivery undone
        return self.counters.received if open_lot is None else open_lot[1] + open_lot[0].taken

    @property
    def discarded(self) -> int:
        return self.counters.discarded

    def lose(self, number: int) -> None:
        self.counters.discarded += number

    @property
    def drained(self) -> bool:
        """Whether the consumer has taken everything."""
        return not len(self._channel) and (self._lot is None or not self._lot[0].left)

    def finish(self) -> None:
        self._channel.finish()

    def abort(self) -> None:
        # What was produced before the stop is still delivered.
        self._channel.abort(keep=True)

    def discard(self) -> None:
        """The consumer has left: what is buffered goes nowhere."""
        self._put_back()
        self._channel.abort()

    def hand_over(self) -> None:
        """The run is about to close: what the consumer has not asked for yet becomes its own."""
        if self._lot is not None:
            lot, before = self._lot
            self.counters.received = before + lot.taken + lot.left
            self._lot = None
        while (item := self._channel.pop()) is not EMPTY:
            self._left.append(item)
        if self._tally:
            self.tallied += sum(map(length_of, self._left))

    # --- the consumer

    def take(self) -> Iterator[Any] | None:
        """Some outputs, or None when there are none now. What is iterated of them is delivered."""
        self._put_back()
        self._adapt()
        if self._left:
            left, self._left = self._left, []
            return iter(left)
        channel = self._channel
        waiting = len(channel)
        if not waiting:
            if channel.finished:
                self._runtime.pulse()
            outputs = self._node.pull(self._reach) if self._node is not None else None
            self._pulling = outputs is not None
            waiting = len(channel)
            if outputs is not None or not waiting:
                return outputs
        if self._tally:
            item = channel.pop()
            self.tallied += length_of(item)
            return iter((item,))
        # No more than half at once, so that the stages may go on while the consumer is busy with these.
        lot = channel.lot(min(waiting if self._node is not None else (waiting + 1) // 2, self._reach))
        assert lot is not None
        self._lot = (lot, self.counters.received)
        channel.release(lot.limit - 1)
        return lot.items

    def _put_back(self) -> None:
        """The consumer asks for more, or leaves: what it has not taken is still in the buffer."""
        if self._pulling and self._node is not None:
            self._pulling = False
            self._node.end_pull()
        if self._lot is not None:
            self._channel.reserved = 0
            self._channel.close_lot(self._lot[0])
            self._lot = None

    def _adapt(self) -> None:
        """Fewer at once for a consumer that is slow, for the loop waits until it has had them."""
        now = perf_counter()
        spent, self._taken_at = now - self._taken_at, now
        if spent > _SLOW:
            self._reach = max(self._reach // 4, 1)
        elif spent < _SLOW / 4:
            self._reach = min(self._reach * 2, _REACH[1])

    async def wait_items(self) -> bool:
        """Wait for an output; False when there will be none."""
        return bool(self._left) or await self._channel.wait_items()


def length_of(item: Any) -> int:
    """`len()` of an item that has one, 1 for the others."""
    return len(item) if isinstance(item, Sized) else 1
