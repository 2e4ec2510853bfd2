"""A parcel: items that are handed to one worker at once, and what has come of them so far.

The rule kept here: a worker takes a parcel's items in order and adds their results in order, so how far it is can be
read off two lengths, from any thread, without a lock. What it has not begun can be taken away from it; that becomes a
parcel of its own, which follows in the line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .base import Outcome

__all__ = ["Parcel"]


class Parcel:
    """Items on their way through a pool. `results` holds, for each finished item, its output, or an `Outcome`."""

    __slots__ = ("by_value", "counted", "first", "follower", "items", "noted", "ordinary", "passing", "queued", "results", "seconds", "settled", "source")

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.source = iter(items)
        """What is left to begin. Taking from it is atomic."""
        self.results: list[Any] = []
        self.seconds = 0.0
        """How long a thread was at it, once it is over."""
        self.ordinary = True
        """Every result is of a type that the stage knows for an ordinary output's."""
        self.passing = False
        """Errors of an earlier stage that only keep their place in the order."""
        self.follower: Parcel | None = None
        """What was taken away from the end of this one."""
        self.counted = self.noted = self.settled = 0
        """Results that the pool has counted, that the line knows of, and that have left the stage."""
        self.queued = False
        """The line knows already that there is news."""
        self.first = 0
        """In a process: the number of its first item there."""
        self.by_value = False
        """A worker process could not read it when it was pickled by reference."""

    @classmethod
    def of_errors(cls, errors: list[Any]) -> Parcel:
        """Errors of an earlier stage, which pass."""
        parcel = cls(errors)
        parcel.results = errors
        parcel.passing, parcel.ordinary = True, False
        return parcel

    @property
    def done(self) -> int:
        """How many items are finished. A worker that was given up may have added results that nobody wants."""
        return min(len(self.results), len(self.items))

    @property
    def complete(self) -> bool:
        """Whether every item is finished."""
        return len(self.results) >= len(self.items)

    def add(self, results: Iterable[Any], *, ordinary: bool) -> None:
        """More items are finished."""
        if not ordinary:
            self.ordinary = False
        self.results.extend(results)

    def fail(self, outcome: Outcome) -> None:
        """The next item has failed."""
        self.ordinary = False
        self.results.append(outcome)

    def split(self, at: int) -> Parcel:
        """Take away the items from number `at` on, which nobody works on any more."""
        rest = Parcel(self.items[at:])
        del self.items[at:]
        rest.follower, self.follower = self.follower, rest
        rest.by_value, rest.first = self.by_value, self.first + at
        return rest

    def take_unbegun(self) -> Parcel | None:
        """Take away what the worker, in another thread, has not begun; None if it has begun everything."""
        rest = list(self.source)
        return self.split(len(self.items) - len(rest)) if rest else None
