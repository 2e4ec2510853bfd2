"""`BridgeSink`: the output of a run whose consumer is a synchronous iterator in another thread.

The rules kept here:

- One deque, appended to by the loop and popped by the consumer, both atomic. Each side rings the other only when that
  one has said that it waits, so a busy pair pays little for being in two threads. The consumer takes many at once.
- Ctrl-C may interrupt the consumer between any two instructions. What it has taken is therefore read off the iterator
  that it takes from, and written down as a total, which may be done again.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Iterator
from itertools import repeat, starmap
from time import perf_counter
from typing import Any, cast

from .lot import Lot, Meter
from .metrics import Counters
from .protocols import Node
from .runtime import PipelineRuntime
from .sink import length_of

__all__ = ["BridgeSink"]

_MOMENT = 0.001
"""Seconds that the loop's thread may wait by itself, and between two passes of the loop meanwhile."""


class BridgeSink:
    """A bounded buffer between the run's loop and a consumer thread."""

    keeps = True

    def __init__(self, capacity: int, *, tally: bool = False) -> None:
        self.counters = Counters("output", capacity=capacity)
        self.tallied = 0
        self._tally = tally
        self._capacity = capacity
        self._items: deque[Any] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._consumer_waits = False
        self._sender_waits = False
        self._aborted = False
        self._finished = False
        self._left = False
        self._over = False
        self._connected = False
        """Whether there is a run: one that cannot start has none."""
        self._lock = threading.Lock()
        self._room_made = asyncio.Event()
        self._alone = False
        """Nobody else needs the loop while the stages wait for room: the thread itself may wait for a moment."""
        self._sender_blocks = False
        self._room_bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._passed = 0.0
        """When the loop was last given away."""
        self._lot: tuple[Lot, int] | None = None
        """What the consumer is taking from, and how many it had received before."""
        self._held = 0
        """Room that the rest of that still takes up."""
        self._batch: list[Any] = []
        """What the consumer has taken out last, """
        self._noted: list[Any] = self._batch
        """and the same once that is on record."""

    # --- the loop's side

    def connect(self, up: Counters, runtime: PipelineRuntime) -> None:
        self._up = up
        self._runtime = runtime
        self._connected = True

    def attract(self, node: Node, *, alone: bool) -> None:
        self._alone = alone

    def lend(self, places: int) -> None:
        self._capacity += places

    @property
    def delivered(self) -> int:
        open_lot = self._lot
        return self.counters.received if open_lot is None else open_lot[1] + open_lot[0].taken

    @property
    def discarded(self) -> int:
        return self.counters.discarded

    def lose(self, number: int) -> None:
        self.counters.discarded += number

    @property
    def closed(self) -> bool:
        return self._aborted or self._finished

    @property
    def drained(self) -> bool:
        open_lot = self._lot
        return not self._items and (open_lot is None or not open_lot[0].left)

    def room(self) -> int:
        return 0 if self.closed else self._capacity - len(self._items) - self._held

    def put_nowait(self, item: Any) -> None:
        self._up.emitted += 1
        self._items.append(item)
        if self._consumer_waits:
            self._ring()

    def offer(self, item: Any) -> bool:
        if self.room() <= 0:
            return False
        self.put_nowait(item)
        return True

    def put_count(self, number: int) -> None:
        raise AssertionError("an iteration needs the items themselves")

    def put_many(self, items: list[Any]) -> None:
        self._up.emitted += len(items)
        self._items.extend(items)
        if self._consumer_waits:
            self._ring()

    async def wait_room(self) -> bool:
        """Wait until there is room; False when closed."""
        began = perf_counter()
        while self.room() <= 0:
            if self.closed:
                return False
            if self._alone and perf_counter() - self._passed < _MOMENT and self._wait_a_moment():
                continue
            self._passed = perf_counter()
            self._room_made.clear()
            self._sender_waits = True
            if self.room() > 0:  # looked at again: the consumer may have taken one in between
                await asyncio.sleep(0)
                break
            await self._room_made.wait()
        self._up.blocked += perf_counter() - began
        return not self.closed

    def _wait_a_moment(self) -> bool:
        """Handing over from thread to thread is several times quicker than through the loop; False when time is up."""
        self._sender_blocks = True
        if self.room() <= 0:
            try:
                self._room_bell.get(timeout=_MOMENT)
            except queue.Empty:
                self._sender_blocks = False
                return False
        self._sender_blocks = False
        return True

    async def put(self, item: Any) -> bool:
        while self.room() <= 0:
            if not await self.wait_room():
                return False
        self.put_nowait(item)
        return True

    def finish(self) -> None:
        self._finished = True
        self._wake_both()

    def abort(self) -> None:
        self._aborted = True
        self._wake_both()

    def leave(self) -> None:
        """The consumer takes no more. From its thread, before it asks for the stop: the run may close at any moment."""
        with self._lock:
            self._left = True
            open_lot = self._lot
            if open_lot is not None:
                self._write_down(open_lot)
                self._items.extendleft(reversed(list(open_lot[0].items)))
            elif self._batch is not self._noted:
                self._items.extendleft(reversed(self._batch))

    def discard(self) -> None:
        """What is buffered for a consumer that has left goes nowhere; it is kept until the stop is on record."""
        with self._lock:
            if not self._over:
                self._drop_rest()

    def hand_over(self) -> None:
        """The run closes. What is buffered belongs to the consumer, or to nobody when it has left."""
        with self._lock:
            self._over = True
            if self._left:
                self._drop_rest()
                return
            open_lot, self._lot = self._lot, None
            if open_lot is not None:
                lot, before = open_lot
                self.counters.received = before + lot.taken + lot.left
            self.counters.received += len(self._items)
            if self._tally:
                self.tallied += sum(map(length_of, self._items))

    def _drop_rest(self) -> None:
        self.counters.discarded += len(self._items)
        self._items.clear()

    def _wake_both(self) -> None:
        self._room_made.set()
        self._ring()

    def _ring(self) -> None:
        self._consumer_waits = False
        self._bell.put(None)

    # --- the consumer's side, in its own thread

    def take(self) -> Iterator[Any]:
        """Yield outputs until the run ends or is stopped; blocks while there is none."""
        items = self._items
        while True:
            while items:
                yield from self._next_lot()
            self._close_lot()
            self._make_room()
            if self.closed and not items:
                if self._connected:
                    self._runtime.call_soon_threadsafe(self._runtime.pulse)
                return
            self._consumer_waits = True
            if items or self.closed:  # looked at again: the loop may have passed in between
                self._consumer_waits = False
                continue
            self._bell.get()

    def _next_lot(self) -> Iterator[Any]:
        """What is there; half of it when the stages wait for room, so that they go on while the consumer is busy with it."""
        items = self._items
        with self._lock:
            self._close_lot()
            number = len(items)
            if self._sender_waits and not self._alone:
                number = (number + 1) // 2
            if self._tally:
                number = 1
            self._batch = batch = list[Any]()
            batch.extend(starmap(items.popleft, repeat((), number)))  # one call, which Ctrl-C does not come between
            outputs = iter(batch)
            if self._over:
                return outputs
            self._lot = (Lot(outputs, cast("Meter", outputs), number), self.counters.received)
            self._noted = batch
            self._held = number - 1
            if self._tally:
                self.tallied += length_of(batch[0])
        self._make_room()
        return outputs

    def _close_lot(self) -> None:
        open_lot = self._lot
        if open_lot is not None:
            self._write_down(open_lot)

    def _write_down(self, open_lot: tuple[Lot, int]) -> None:
        lot, before = open_lot
        self.counters.received = before + lot.taken
        self._lot = None
        self._held = 0

    def _make_room(self) -> None:
        if self._sender_blocks:
            self._room_bell.put(None)
        elif self._sender_waits:
            self._sender_waits = False
            self._runtime.call_soon_threadsafe(self._room_made.set)
