"""A lot: several items taken from an inlet at once, for a loop that counts nothing.

The rule kept here: how many were taken is read off the iterator itself, so it is exact wherever the loop stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

__all__ = ["Lot", "Meter"]


class Meter(Protocol):
    """An iterator that knows exactly how many items it still has, as those of the built-in collections do."""

    def __length_hint__(self) -> int: ...


class Lot:
    """Items to iterate over. What is not iterated stays where it came from; the inlet's `close_lot` sees to that."""

    __slots__ = ("_counted", "_meter", "_start", "batch", "errors", "items", "limit")

    def __init__(
        self, items: Iterator[Any], meter: Meter, limit: int, batch: Collection[Any] | None = None, *, errors: bool = False
    ) -> None:
        self.items = items
        self.limit = limit
        """How many items there are, at most."""
        self.batch = batch
        """The items as a collection; None when they are known to be plain numbers or texts."""
        self.errors = errors
        """Whether an `Err` may be among them."""
        self._meter = meter
        self._start = meter.__length_hint__()
        self._counted = 0

    @property
    def taken(self) -> int:
        """How many items have been iterated over."""
        return self._start - self._meter.__length_hint__()

    def fresh(self) -> int:
        """How many have been taken since this was last asked."""
        taken = self._start - self._meter.__length_hint__()
        fresh, self._counted = taken - self._counted, taken
        return fresh

    @property
    def left(self) -> int:
        """How many the underlying iterator still has."""
        return self._meter.__length_hint__()

    def finish(self) -> tuple[int, int, int]:
        """No more is taken: how many since last asked, how many in all, and how many the underlying iterator has left."""
        left = self._meter.__length_hint__()
        taken = self._start - left
        fresh, self._counted = taken - self._counted, taken
        return fresh, taken, left
