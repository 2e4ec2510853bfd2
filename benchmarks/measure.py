"""How a cell is timed: the time of a run, without what every run costs once.

The rule kept here: one method for everybody. A first run counts and sums all outputs. Then a run of a few items is
timed, then a larger one, and the difference belongs to the difference of items; so the start of loops, threads and
processes is left out for all in the same way (for processes the smaller run is a quarter of the larger one). The size of the larger run follows from the participant's own speed.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

from .model import Measures

__all__ = ["Tally", "Timed", "WrongResult", "drained", "drained_sync", "iterated", "thorough"]


TRIES = 4
"""Sizes that are tried, each twice the one before, when the machine is too restless to tell a run from its start."""


class WrongResult(Exception):
    """A participant's outputs are not what they should be."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What is known of a run's outputs; None for what was not looked at."""

    count: int | None = None
    total: Any = None
    last: Any = None

    def verify(self, expected: Tally) -> None:
        for what in ("count", "total", "last"):
            found, right = getattr(self, what), getattr(expected, what)
            if found is not None and right is not None and found != right:
                raise WrongResult(f"its outputs are wrong: {what} {found!r}, not {right!r}")


_looking = False


def thorough() -> bool:
    """Whether this run is the first one, in which every output is counted and summed, and time does not matter."""
    return _looking


async def drained(items: AsyncIterable[Any]) -> Tally:
    """Take everything from an async iterable; an empty loop body when it is timed."""
    if _looking:
        return _full([item async for item in items])
    last = None
    async for last in items:  # noqa: B007 - it is used: what it was at the end tells whether all came
        pass
    return Tally(last=last)


def iterated(items: Iterable[Any]) -> Tally:
    """Take everything with a `for` loop."""
    if _looking:
        return _full(list(items))
    last = None
    for last in items:  # noqa: B007 - see above
        pass
    return Tally(last=last)


def drained_sync(items: Iterable[Any]) -> Tally:
    """Take everything in the quickest way there is, without a loop in Python."""
    if _looking:
        return _full(list(items))
    tail = deque(items, maxlen=1)
    return Tally(last=tail[0] if tail else None)


def _full(outputs: list[Any]) -> Tally:
    return Tally(len(outputs), sum(outputs), outputs[-1] if outputs else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A cell that moves any number of items through a participant."""

    run: Callable[[int], Tally]
    expected: Callable[[int], Tally]
    base: int = 32
    """Items of the run whose time is taken off."""
    seconds: float = 0.1
    """About how long one repetition should take."""
    repeats: int = 4
    step: int = 1
    """Sizes are multiples of it."""
    steady: bool = False
    """Take off the time of a quarter of the items, not of a few: for workers that take a while to start, one after the
    other. In a run of a few items the first is done before the last has begun, which is not what a start costs."""

    def check(self) -> None:
        global _looking
        _looking = True
        try:
            self._checked(self.base)
        finally:
            _looking = False

    def measure(self) -> Measures:
        self.check()
        fixed = min(self._timed(self.base)[0] for _ in range(2))
        size = self._enough(fixed)
        for _ in range(TRIES):
            base = self._rounded(size / 4) if self.steady else self.base
            # The quickest repetition: whatever else the machine does can only make one slower. Medians come later,
            # over the rounds.
            wall, cpu = min(self._repeated(size))
            base_wall, base_cpu = min(self._repeated(base)) if self.steady else min(self._timed(base) for _ in range(2))
            if wall - base_wall > self.seconds / 8:
                extra = size - base
                return {"seconds": (wall - base_wall) / extra, "cpu": (cpu - base_cpu) / extra, "items": float(size), "fixed": fixed}
            size *= 2
        raise RuntimeError(f"the time of {size // 2} items could not be told from the time of a start")

    def _checked(self, size: int) -> None:
        self.run(size).verify(self.expected(size))

    def _timed(self, size: int) -> tuple[float, float]:
        gc.collect()
        wall, cpu = perf_counter(), process_time()
        tally = self.run(size)
        wall, cpu = perf_counter() - wall, process_time() - cpu
        tally.verify(self.expected(size))
        return wall, cpu

    def _repeated(self, size: int) -> Iterator[tuple[float, float]]:
        """Several times, but twice only where a few items take long: what is that slow needs no precision."""
        spent = 0.0
        for number in range(self.repeats):
            if number >= 2 and spent > 2 * self.repeats * self.seconds:
                return
            wall, cpu = self._timed(size)
            spent += wall
            yield wall, cpu

    def _enough(self, fixed: float) -> int:
        """How many items take about `seconds`: four times more until the time can be told from chance."""
        size = self.base
        while True:
            size *= 4
            spent = self._timed(size)[0] - fixed
            if spent > self.seconds / 4:
                return self._rounded(max(self.base + (size - self.base) * self.seconds / spent, self.base * 4))

    def _rounded(self, size: float) -> int:
        return -(-int(size) // self.step) * self.step
