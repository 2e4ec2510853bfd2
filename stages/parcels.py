"""The line in which parcels wait to leave a stage: in the input's order, or as they come.

The rule kept here: what is ordinary leaves as a whole, counted once; everything else (an error, a skip, a full channel)
is settled one item at a time, in turn, by the one coroutine `run`, and nothing passes it. An item counts as succeeded
after its output has left.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.pace import Pacer
from pipeline.protocols import Inlet, Outlet
from pipeline.result import Err
from workers.base import Outcome
from workers.parcel import Parcel

from .desk import Desk

__all__ = ["ParcelLine"]


class ParcelLine:
    """Parcels that have been handed over and have not left entirely."""

    def __init__(self, desk: Desk, inlet: Inlet, outlet: Outlet, *, ordered: bool, on_settled: Callable[[], None]) -> None:
        self._desk = desk
        self._inlet = inlet
        self._outlet = outlet
        self._ordered = ordered
        self._on_settled = on_settled
        self._parcels: deque[Parcel] = deque()
        """In order: every parcel. Otherwise: those with news that `run` has to see to."""
        self._pace = Pacer()
        self._bell: asyncio.Future[None] | None = None
        self._busy = False
        """`run` is in the middle of a parcel, and nothing may pass it."""
        self._closing = False
        self._lent = 0
        self.outstanding = 0
        """Items that have not left the stage."""
        self.waiting = 0
        """Finished items that wait for their turn."""

    def add(self, parcel: Parcel) -> None:
        """A parcel is handed over; from now on it holds its place."""
        self.outstanding += len(parcel.items)
        if self._ordered:
            self._parcels.append(parcel)

    def news(self, parcel: Parcel) -> None:
        """More of this parcel is finished."""
        if self._desk.stopped:
            return
        done = parcel.done
        self.waiting += done - parcel.noted
        parcel.noted = done
        if self._ordered:
            if not self._busy:
                self._flush()
            self._lend()
        elif not self._busy and not self._parcels and self._leave(parcel):
            self._on_settled()
        elif not parcel.queued:
            parcel.queued = True
            self._parcels.append(parcel)
            self._ring()

    def close(self) -> None:
        """No more parcels will be added: `run` returns when everything has left."""
        self._closing = True
        self._ring()

    # --- what is ordinary, at once

    def _flush(self) -> None:
        """Let leave what can leave, from the head of the line."""
        before = self.outstanding
        while self._parcels:
            if not self._leave(self._parcels[0]):
                self._ring()
                break
            if not self._next_in_order():
                break
        if before != self.outstanding:
            self._on_settled()

    def _next_in_order(self) -> bool:
        """Replace a head that has left entirely by what follows it; False if it has not."""
        parcel = self._parcels[0]
        if parcel.settled < len(parcel.items):
            return False
        self._parcels.popleft()
        if parcel.follower is not None:
            self._parcels.appendleft(parcel.follower)
        return True

    def _leave(self, parcel: Parcel) -> bool:
        """Let everything leave that is finished in this parcel; False, and nothing leaves, if it must wait."""
        fresh = parcel.done - parcel.settled
        if not fresh:
            return True
        if fresh > self._outlet.room():
            return False
        results = parcel.results if fresh == len(parcel.results) else parcel.results[parcel.settled : parcel.settled + fresh]
        if not (parcel.ordinary or self._is_ordinary(parcel, results)):
            return False
        self._put(parcel, results)
        return True

    def _put(self, parcel: Parcel, results: list[Any]) -> None:
        self._outlet.put_many(results)
        self._desk.counters.succeeded += len(results)
        self._settled(parcel, len(results))

    def _is_ordinary(self, parcel: Parcel, results: list[Any]) -> bool:
        """Look at every result; what is learned about types makes the next parcel's look shorter."""
        if parcel.passing:
            return False
        kinds = set(map(type, results))
        plain = self._desk.plain
        return kinds <= plain.known or (Outcome not in kinds and all(map(plain.has, results)))

    def _settled(self, parcel: Parcel, items: int) -> None:
        """So many more items of this parcel are over and done with."""
        parcel.settled += items
        self.outstanding -= items
        self.waiting -= items
        if self._closing and not self.outstanding:
            self._ring()

    def _lend(self) -> None:
        # The room of finished items is lent from the inbound edge: in all, the stage holds what it was given.
        if self._lent != self.waiting:
            self._lent = self.waiting
            self._inlet.release(self.waiting)

    # --- everything else, in turn

    async def run(self) -> None:
        """Settle what cannot leave at once, until the line is closed and empty."""
        while not (self._closing and not self.outstanding):
            parcel = self._next()
            if parcel is None:
                self._bell = asyncio.get_running_loop().create_future()
                await self._bell  # bounded by the stop, which cancels this task
                continue
            self._busy = True
            await self._advance(parcel)
            self._busy = False
            if self._desk.stopped:
                return
            if self._ordered:
                self._flush()
                self._lend()

    def _next(self) -> Parcel | None:
        if self._ordered:
            while self._parcels and self._next_in_order():
                pass
            if not self._parcels or self._parcels[0].done == self._parcels[0].settled:
                return None
            return self._parcels[0]
        if not self._parcels:
            return None
        parcel = self._parcels.popleft()
        parcel.queued = False
        return parcel

    async def _advance(self, parcel: Parcel) -> None:
        """Settle what is finished in a parcel, item by item where it must be."""
        outlet, pace = self._outlet, self._pace
        pace.restart()
        while parcel.settled < parcel.done and not self._desk.stopped:
            at = parcel.settled
            ordinary = self._ordinary(parcel, at, min(at + max(outlet.room(), 1), parcel.done))
            if not ordinary:
                await self._settle(parcel, parcel.items[at], parcel.results[at])
                self._settled(parcel, 1)
            elif outlet.room() > 0:
                self._put(parcel, parcel.results[at : at + ordinary])
            elif not await outlet.wait_room():
                self._settled(parcel, parcel.done - at)  # nobody takes them any more: in flight, and so `cancelled`
            self._on_settled()
            if pace.due():
                await pace.rest()

    def _ordinary(self, parcel: Parcel, start: int, end: int) -> int:
        """How many results from `start` on are ordinary outputs, up to `end`."""
        if parcel.passing:
            return 0
        plain, results = self._desk.plain, parcel.results
        at = start
        while at < end and not isinstance(results[at], Outcome) and plain.has(results[at]):
            at += 1
        return at - start

    async def _settle(self, parcel: Parcel, item: Any, result: Any) -> None:
        desk, emit = self._desk, self._outlet.put
        if parcel.passing:
            await desk.pass_on(result, emit)
        elif isinstance(result, Outcome):
            assert result.error is not None
            err = Err(result.error, item, desk.name, result.attempts, result.trace)
            await desk.failed(err, emit, lost=result.lost, timed_out=result.timed_out)
        else:
            await desk.settle(item, result, 1, emit)

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)
