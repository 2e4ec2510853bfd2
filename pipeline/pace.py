"""Fairness: a busy node returns to the event loop often enough that timers, `cancel()` and other tasks are served."""

from __future__ import annotations

import asyncio
from time import perf_counter

__all__ = ["Pacer", "RoundPacer", "Rounds"]

_SLICE = 0.001
"""Seconds of work between two returns to the loop."""
_STRIDE = 64
"""Items between two looks at the clock, at most; fewer as soon as items turn out to be slow."""
_PASSES = 3
"""Returns in a row: a timer, the future it resolves and the task that awaits it each need one pass of the loop.
Returning once per slice made a 1 ms ticker beside a saturated pipeline wait 15 ms at the 99th percentile."""


class Pacer:
    """Tells a node when its slice of the loop is over. Costs a comparison an item, and now and then the clock."""

    __slots__ = ("_left", "_looked", "_stride", "_until", "overrun")

    def __init__(self) -> None:
        self._stride = 1
        self._left = 1
        self._looked = perf_counter()
        self._until = self._looked + _SLICE
        self.overrun = 0.0
        """Seconds that the last stride of items took."""

    def due(self) -> bool:
        """Count one item; True when the slice is over."""
        self._left -= 1
        if self._left:
            return False
        now = perf_counter()
        self.overrun = spent = now - self._looked
        self._looked = now
        if spent > _SLICE / 4:
            self._stride = max(1, self._stride // 8)
        elif spent < _SLICE / 16 and self._stride < _STRIDE:
            self._stride *= 2
        self._left = self._stride
        return now >= self._until

    def restart(self) -> None:
        """A new slice begins: the caller has just been away from the loop."""
        self._looked = perf_counter()
        self._until = self._looked + _SLICE

    async def rest(self) -> None:
        """Give the loop to everybody else, then begin a new slice."""
        for _ in range(_PASSES):
            await asyncio.sleep(0)
        self.restart()


_ROUND_STRIDE = 24
"""Items between two looks while handlers wait. Should they stop waiting, this many run before anybody notices."""
_CALM = 64
"""Items in a row without a pass of the loop in between, after which a worker's handlers seem not to wait any more."""


class Rounds:
    """Counts the passes of the loop, as far as somebody looks. Shared by the workers of a node."""

    __slots__ = ("_armed", "_loop", "began", "number")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._armed = False
        self.number = 0
        self.began = 0.0

    def look(self) -> int:
        """The number of this pass."""
        if not self._armed:
            self._armed = True
            self.number += 1
            self.began = perf_counter()
            self._loop.call_soon(self._passed)
        return self.number

    def _passed(self) -> None:
        self._armed = False


class RoundPacer:
    """Fairness of a worker whose handlers wait: each wait gives the loop away, so only what runs in one pass counts."""

    __slots__ = ("_quiet", "_round", "_rounds", "stride")

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._round = -1
        self._quiet = 0
        self.stride = 1
        """Items until the next look."""

    @property
    def calm(self) -> bool:
        """Whether handlers seem not to wait any more."""
        return self._quiet > _CALM

    def due(self) -> bool:
        """Look around, after `stride` items; True when it is time to give the loop away."""
        number = self._rounds.look()
        if number != self._round:
            self._round = number
            self._quiet = 0
            self.stride = min(self.stride * 2, _ROUND_STRIDE)
            return False
        self._quiet += self.stride
        spent = perf_counter() - self._rounds.began
        self.stride = 1 if spent > _SLICE / 4 else min(self.stride * 2, _ROUND_STRIDE)
        return spent > _SLICE

    async def rest(self) -> None:
        """Give the loop to everybody else."""
        for _ in range(_PASSES):
            await asyncio.sleep(0)
