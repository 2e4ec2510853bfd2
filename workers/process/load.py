"""What one worker process has to do.

The rule kept here: items have consecutive numbers in the worker, which takes them in that order. So the results, the
number of the item at work, and the number from which on it gives items back all say exactly which items are meant.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from ..base import Handler
from ..parcel import Parcel

__all__ = ["Load"]


class Load:
    """The parcels that one worker holds, the one at work first."""

    def __init__(self, handler: Handler, which: int) -> None:
        self.handler = handler
        self.which = which
        """The handler's place among the stage's."""
        self.given = 0
        """Items that it got and did not give back."""
        self.parcels: deque[Parcel] = deque()
        self.held = 0
        """Items that are not finished."""
        self.results = self.seen = 0
        """Results that have come, and that had come at the last look."""
        self.untimed = 0
        """Results whose time is not known yet."""
        self.recalled = False
        """It was asked to give back what has not begun, and has not answered."""
        self.doomed = False
        """It was killed because its item took too long."""
        self.broken = False
        """It has said why it ends."""
        self.leaving = False
        """It gets nothing more, and ends when it has finished."""
        self._next = 0

    def add(self, parcel: Parcel) -> None:
        """One more parcel; its items get their numbers."""
        parcel.first = self._next
        self._next += len(parcel.items)
        self.held += len(parcel.items)
        self.given += len(parcel.items)
        self.parcels.append(parcel)

    def finished(self, items: int) -> None:
        """So many more items of the first parcel are finished."""
        self.held -= items
        self.results += items
        if self.parcels[0].complete:
            self.parcels.popleft()

    def numbered(self, number: int) -> Any:
        """The item of this number, if it belongs to the parcel at work."""
        if not self.parcels:
            return None
        at = number - self.parcels[0].first
        items = self.parcels[0].items
        return items[at] if 0 <= at < len(items) else None

    @property
    def next(self) -> Any:
        """The item whose result comes next."""
        return self.parcels[0].items[self.parcels[0].done] if self.parcels else None

    def take_next(self) -> Parcel:
        """Take away the item whose result would come next; the others stay."""
        head = self.parcels.popleft()
        item = head.split(head.done)
        self.held -= 1
        if len(item.items) > 1:
            self.parcels.appendleft(item.split(1))
        return item

    def take_from(self, number: int) -> list[Parcel]:
        """Take away the items from this number on, the last ones first."""
        taken: list[Parcel] = []
        while self.parcels and self.parcels[-1].first >= number:
            taken.append(self.parcels.pop())
        if self.parcels and number < self.parcels[-1].first + len(self.parcels[-1].items):
            last = self.parcels[-1]
            taken.append(last.split(number - last.first))
            if last.complete:
                self.parcels.pop()
        items = sum(len(parcel.items) for parcel in taken)
        self.held -= items
        self.given -= items
        return taken

    def take_all(self, at_work: int, *, sure: bool = False) -> tuple[list[Parcel], Parcel | None]:
        """Take away everything that is not finished: what is to be done again, in order, and the item at work, if any.

        `sure`: if none was at work, the worker has died of one that it could not even begin.
        """
        again: list[Parcel] = []
        lost: Parcel | None = None
        # Or its handler has overwritten what it was not given.
        if self.parcels and (at_work >= self._next or (sure and at_work < 0)):
            at_work = self.parcels[0].first + self.parcels[0].done
        for parcel in self.parcels:
            rest = parcel.split(parcel.done) if parcel.done else parcel
            at = at_work - rest.first
            if 0 <= at < len(rest.items):
                lost = rest.split(at) if at else rest
                # Finished, but not sent: one of these may have done what the worker died of. Alone, it will be at work then.
                again += [rest, *reversed([rest.split(number) for number in range(at - 1, 0, -1)])] if at else []
                rest = lost.split(1) if len(lost.items) > 1 else None
            if rest is not None:
                again.append(rest)
        self.parcels.clear()
        self.held = 0
        return again, lost
