"""How many items a lane runs at once, and which of them it times.

The rule kept here: an item never waits long behind others. Bursts grow while they are short and shrink when they are
not, from one item at first; one item in a few thousand is timed step by step, and every slow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from .desk import LAG
from .flow import Step

__all__ = ["LONG", "Tempo"]

_BURST = 2048
"""Items in one burst, at most."""
_SAMPLE = 4096
"""Items between two that are timed step by step; slow ones are all timed."""
_WATCHED = 2048
"""Items timed one by one after a burst in which somebody held the loop."""
_SHORT, LONG = 0.0002, 0.0004
"""Seconds: a burst that takes less may grow; one that takes more shrinks, and is cut short."""


class Tempo:
    """Of one lane."""

    __slots__ = ("_size", "_untimed", "_watched", "times")

    def __init__(self) -> None:
        self._size = 1
        self._untimed = 0
        """Items since the last that was timed step by step."""
        self._watched = 0
        """So many of the next items are timed one by one: somebody has held the loop."""
        self.times: list[float] = []
        """Of a timed burst: the moments before and after each step."""

    @property
    def single(self) -> bool:
        """Whether the next burst is one timed item."""
        return self._size == 1 or self._watched > 0 or self._untimed >= _SAMPLE

    @property
    def size(self) -> int:
        return self._size

    def note(self) -> None:
        """Called by a timed loop."""
        self.times.append(perf_counter())

    def restart(self) -> None:
        """Somebody has suspended: start from single items again."""
        self._size = 1

    def learn(self, steps: Sequence[Step], taken: int, seconds: float, *, failed: bool) -> None:
        """Note a burst of so many items."""
        times = self.times
        if times:
            if failed:
                times.append(perf_counter())
            weight, self._untimed = max(self._untimed, 1), 0
            self._watched = max(self._watched - 1, 0)
            for step, began, ended in zip(steps, times, times[1:], strict=False):
                step.clock(ended - began, weight)
            times.clear()
        else:
            self._untimed += taken
            if seconds > LAG:
                self._lagged(steps, seconds)
        if seconds < _SHORT:
            if taken >= self._size and self._size < _BURST:
                self._size = min(self._size * 4, _BURST)
        elif seconds > LONG and self._size > 1:
            self._size = max(1, int(taken * _SHORT / seconds))

    def learn_pulled(self, taken: int) -> None:
        """Note that a consumer has pulled so many items; how long that took is its own affair."""
        self._untimed += taken

    def _lagged(self, steps: Sequence[Step], seconds: float) -> None:
        """Somebody held the loop in the middle of a burst; the next items are timed one by one and may tell who."""
        self._watched = _WATCHED
        if len(steps) == 1:
            steps[0].desk.lagged(seconds)
        else:
            steps[-1].desk.lagged(seconds, among=[step.desk.name for step in steps])
