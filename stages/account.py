"""The account of a burst: what many items that were handled as one have done, and how much of it is in the ledger.

The rule kept here: booking is by difference, so it may happen at any moment and any number of times, and a burst that
is closed in the middle is booked exactly as far as it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pipeline.lot import Lot
from pipeline.metrics import Counters
from pipeline.protocols import Inlet, Outlet

__all__ = ["Account"]


class Account:
    """Of one lane, for one burst after the other."""

    __slots__ = ("_booked", "_counters", "_inlet", "_last", "_outlet", "_pairs", "direct", "lot", "outputs", "skipped")

    def __init__(self, counters: Sequence[Counters], inlet: Inlet, outlet: Outlet) -> None:
        self._counters = counters
        self._pairs = list(pairwise(counters))
        self._last = counters[-1]
        self._inlet = inlet
        self._outlet = outlet
        self.lot: Lot | None = None
        """What the burst under way takes its items from; None when there is none."""
        self.direct = False
        """The consumer has each output already: the outlet counts them."""
        self.outputs: list[Any] = []
        self.skipped = [0] * len(counters)
        self._booked: list[tuple[int, int, int, int]] | None = None
        """For each step: items entered, left, skipped, passed on; None while nothing of this burst is booked."""

    def close(self, at: int | None) -> int:
        """The burst is over, or given up where it waits, with one item at work in step `at`, or none.

        Books it, gives back what it has not begun, and returns how many items it took.
        """
        lot, self.lot = self.lot, None
        assert lot is not None
        if at is None and self._booked is None and not any(self.skipped):
            taken = self._inlet.close_lot(lot)
            for up, down in self._pairs:  # every item went through every step: the common case
                up.succeeded += taken
                up.emitted += taken
                down.received += taken
            self._last.succeeded += taken
            self._pass_on(taken)
        else:
            self._book(lot, at)
            taken = self._inlet.close_lot(lot)
            self.skipped[:] = [0] * len(self.skipped)
            self._booked = None
        return taken

    def book_midway(self, at: int | None) -> None:
        """Book what the burst under way has done so far, with one item at work in step `at`."""
        if self.lot is not None:
            self._book(self.lot, at)

    def _book(self, lot: Lot, at: int | None) -> None:
        # Upstream first, so that no reading in another thread sees an item received that was not emitted.
        self._inlet.count_lot(lot)
        booked = self._booked or [(0, 0, 0, 0)] * len(self._counters)
        self._booked = []
        entered = lot.taken
        for index, (counters, (had_entered, had_left, had_skipped, had_passed)) in enumerate(zip(self._counters, booked, strict=True)):
            skipped = self.skipped[index]
            left = entered - (at == index)
            passed = left - skipped
            if index:
                counters.received += entered - had_entered
            counters.succeeded += left - had_left
            counters.skipped += skipped - had_skipped
            if counters is self._last:
                self._pass_on(passed - had_passed)
            else:
                counters.emitted += passed - had_passed
            self._booked.append((entered, left, skipped, passed))
            entered = passed

    def _pass_on(self, number: int) -> None:
        """Hand the outputs on; the outlet counts them as emitted."""
        if self.direct or not self._outlet.keeps:
            self._outlet.put_count(number)
        elif self.outputs:
            self._outlet.put_many(self.outputs)
            self.outputs.clear()
