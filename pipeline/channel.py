"""A bounded channel between two stages.

The rule kept here: nothing is ever waited for with the door locked. Putting and taking are synchronous and either
happen or do not; what waits is only the question "is there room?" or "is there an item?". Closing is synchronous as
well, needs no room, and answers every such question at once. The end of the stream is the channel's own flag, so no
marker object travels with the items and none can be seen, counted or lost.

The channel keeps the ledger of its edge: `emitted` of the counters upstream, `received` and `discarded` of those
downstream. All methods belong to the run's event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from time import perf_counter
from typing import Any, Final, cast

from .lot import Lot, Meter
from .metrics import Counters
from .result import Err

__all__ = ["EMPTY", "Channel"]


class _Empty:
    """The type of `EMPTY`; never leaves the engine."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "EMPTY"


EMPTY: Final = _Empty()
"""What `pop` returns when there is nothing to take now. An answer, not an item: it is never stored in a channel."""

_Waiters = deque[asyncio.Future[None]]


class Channel:
    """A queue of at most `capacity` items. Capacity 0 is a rendezvous: room appears when a receiver waits.

    Items are `Any` here: the types of a chain are checked where it is declared.
    """

    keeps = True
    stores = True
    reads_ahead = False

    __slots__ = ("_errors", "_getters", "_items", "_lent", "_loop", "_putters", "aborted", "capacity", "down", "finished", "reserved", "up")

    def __init__(
        self, capacity: int, up: Counters, down: Counters, loop: asyncio.AbstractEventLoop, *, errors: bool = False
    ) -> None:
        self.capacity = capacity
        self.up = up
        self.down = down
        self._loop = loop
        self._errors = errors
        """Whether an `Err` may be among the items: stages send theirs through `put`, a source may give its own."""
        self._items: deque[Any] = deque()
        self._getters: _Waiters = deque()
        self._putters: _Waiters = deque()
        self.finished = False
        """The sender has ended the stream; what is queued is still taken."""
        self.aborted = False
        """Closed for good: nothing is accepted any more."""
        self._lent = 0
        self.reserved = 0
        """Room lent to finished items that wait for their turn in an ordered stage behind this channel."""

    def __len__(self) -> int:
        return len(self._items)

    # --- the sending end

    def room(self) -> int:
        """How many items fit now; 0 when closed."""
        if self.aborted or self.finished:
            return 0
        return (self.capacity or len(self._getters)) + self._lent - self.reserved - len(self._items)

    def lend(self, places: int) -> None:
        """Room of edges inside of the sender, in which it never leaves anything: so many items more may wait here."""
        self._lent = places

    @property
    def closed(self) -> bool:
        """Whether nothing put in will ever be accepted again."""
        return self.aborted or self.finished

    def put_nowait(self, item: Any) -> None:
        """Add one item. The caller has seen `room() > 0`."""
        self._items.append(item)
        self.up.emitted += 1
        if self._getters:
            self._wake(self._getters)

    def offer(self, item: Any) -> bool:
        """Add one item if there is room."""
        if self.aborted or self.finished:
            return False
        if (self.capacity or len(self._getters)) + self._lent - self.reserved <= len(self._items):
            return False
        self._items.append(item)
        self.up.emitted += 1
        if self._getters:
            self._wake(self._getters)
        return True

    def put_count(self, number: int) -> None:
        """A channel keeps its items; see `Outlet.keeps`."""
        raise AssertionError("a channel needs the items themselves")

    def put_many(self, items: list[Any]) -> None:
        """Add items at once. The caller has seen that much room."""
        self._items.extend(items)
        self.up.emitted += len(items)
        if self._getters:
            self._wake(self._getters)

    async def wait_room(self) -> bool:
        """Wait until there is room; False when the channel is closed. Bounded by the stop, which closes every channel."""
        if self.room() > 0:
            return True
        began = perf_counter()
        try:
            while not (self.aborted or self.finished):
                if self.room() > 0:
                    return True
                await self._wait(self._putters)
            return False
        finally:
            self.up.blocked += perf_counter() - began

    async def put(self, item: Any) -> bool:
        """Add one item when there is room; False, and the item is not taken, when the channel closes first."""
        if self.room() <= 0 and not await self.wait_room():
            return False
        self.put_nowait(item)
        if type(item) is Err:
            self._errors = True
        if self._putters and self.room() > 0:
            self._wake(self._putters)
        return True

    def finish(self) -> None:
        """End the stream: what is queued is still taken, then the receiver sees the end. Idempotent."""
        if not self.finished:
            self.finished = True
            self._wake_all()

    # --- the receiving end

    def pop(self) -> Any:
        """Take one item, or `EMPTY`."""
        items = self._items
        if not items:
            return EMPTY
        item = items.popleft()
        self.down.received += 1
        if self._getters and items:
            self._wake(self._getters)
        if self._putters:
            self._offer_room()
        return item

    def lot(self, limit: int) -> Lot | None:
        """Take up to `limit` items at once, for a synchronous loop; None when there are none. `close_lot` ends it."""
        items = self._items
        if not items:
            return None
        batch: Collection[Any]
        if len(items) <= limit:
            batch, self._items = items, deque()
        else:
            batch = [items.popleft() for _ in range(limit)]
        iterator = iter(batch)
        return Lot(iterator, cast("Meter", iterator), len(batch), batch, errors=self._errors)

    def count_lot(self, lot: Lot) -> None:
        """Count what was taken since the last look."""
        self.down.received += lot.fresh()

    def close_lot(self, lot: Lot) -> int:
        """Count what was taken, say how many, and put the rest back in front."""
        fresh, taken, left = lot.finish()
        self.down.received += fresh
        if self.aborted:
            self.down.discarded += left
        elif left:
            rest = list(lot.items)
            self._items.extendleft(reversed(rest))
            if self._getters and self._items:
                self._wake(self._getters)
        if self._putters:
            self._offer_room()
        return taken

    async def wait_items(self) -> bool:
        """Wait until there is something to take; False at the end of the stream."""
        if self._items:
            return True
        began = perf_counter()
        try:
            while not self._items:
                if self.finished or self.aborted:
                    return False
                if self._putters:  # a rendezvous: this wait is the room that a sender waits for
                    self._loop.call_soon(self._offer_room)
                await self._wait(self._getters)
            return True
        finally:
            self.down.starved += perf_counter() - began

    @property
    def ended(self) -> bool:
        """Whether there is nothing to take and never will be."""
        return not self._items and (self.finished or self.aborted)

    def release(self, reserved: int) -> None:
        """Set the room that finished items hold; see `reserved`."""
        self.reserved = reserved
        if self._putters:
            self._offer_room()

    # --- closing

    def abort(self, *, keep: bool = False) -> None:
        """Close at once: wake everybody, refuse every item from now on, and discard what is queued.

        `keep` leaves the queued items to be taken: for the output of an iteration, which delivers what was produced.
        """
        self.aborted = True
        if not keep:
            self.down.discarded += len(self._items)
            self._items.clear()
        self._wake_all()

    # --- waiting

    def _offer_room(self) -> None:
        # Resuming a sender at half capacity makes it run for a batch instead of an item. An empty queue always resumes
        # it: with room lent to an ordered stage, half may never come free.
        room = self.room()
        if room > 0 and (not self._items or room * 2 >= self.capacity + self._lent):
            self._wake(self._putters)

    async def _wait(self, waiters: _Waiters) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake(waiters)  # this wake-up was spent on a waiter that is leaving: hand it on
            elif waiter in waiters:  # a wake-up passing by may have thrown the cancelled waiter out already
                waiters.remove(waiter)
            raise

    @staticmethod
    def _wake(waiters: _Waiters) -> None:
        # Wakes one; whoever is woken wakes the next while there is something left. Waking all costs four times as much.
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        for waiters in (self._getters, self._putters):
            while waiters:
                self._wake(waiters)
