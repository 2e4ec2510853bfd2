"""Fairness: a busy node returns to the event loop often enough that timers, `cancel()` and other tasks are served."""

from __future__ import annotations

import asyncio
from time import perf_counter

__all__ = ["CrowdPacer", "Pacer"]

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


_CROWD_STRIDE = 8
"""Items between two looks while handlers wait. Should they stop waiting, this many run before anybody notices."""
_CALM = 4
"""Items for each worker without a pass of the loop in between, after which handlers seem not to wait any more."""


class CrowdPacer:
    """For workers whose handlers wait: each wait gives the loop away, so only what runs between two passes counts.

    Shared by the workers of a node. A worker takes one off `left` for every item, and asks `due()` when none is left.
    """

    __slots__ = ("_armed", "_began", "_loop", "_quiet", "_stride", "left", "size", "stride")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._armed = False
        self._began = 0.0
        self._quiet = 0
        """Items since the last pass of the loop."""
        self.size = 16
        """Workers, or a few more."""
        self.stride = 1
        """Items that the last look stood for."""
        self._stride = 1
        self.left = 1

    @property
    def calm(self) -> bool:
        """Whether handlers seem not to wait any more."""
        return self._quiet > _CALM * self.size

    def due(self) -> bool:
        """Whether the workers have held the loop for a slice."""
        now = perf_counter()
        self.stride = self._stride
        if not self._armed:  # the loop has gone round since the last look
            self._armed = True
            self._loop.call_soon(self._passed)
            self._began = now
            self._quiet = 0
            self._stride = min(self._stride * 2, _CROWD_STRIDE)
            self.left = self._stride
            return False
        self._quiet += self.stride
        spent = now - self._began
        self._stride = 1 if spent > _SLICE / 4 else min(self._stride * 2, _CROWD_STRIDE)
        self.left = self._stride
        return spent > _SLICE

    def _passed(self) -> None:
        self._armed = False

    async def rest(self) -> None:
        """Give the loop to everybody else."""
        for _ in range(_PASSES):
            await asyncio.sleep(0)
