"""A pool whose items wait for resources.

The rule kept here: an item is handed over when its resources are its own, alone, and while a worker is free for it. They are
given back when its handler has ended, in whatever way the pool learns of that: outputs, outcome, a timeout, a dead worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from pipeline.channel import EMPTY
from pipeline.protocols import Seat, Wires
from pipeline.result import Err
from pipeline.scheduler.reserve import Hold
from workers.parcel import Parcel
from workers.pooled import Job

from .gate import gate_for
from .pool import PoolNode, Singly

__all__ = ["GuardedPoolNode"]


class GuardedPoolNode(PoolNode):
    """One pooled stage with `resources=` in one run."""

    def __init__(self, seat: Seat, wires: Wires) -> None:
        gate = gate_for(seat, wires.runtime)
        assert gate is not None
        self._gate = gate
        self._width: int = seat.stage.options.concurrency
        self._holds: dict[Job, Hold] = {}
        super().__init__(seat, wires)

    @property
    def _jobs(self) -> Callable[..., Singly]:
        return partial(_Guarded, self._over)

    async def _dispatch(self) -> None:
        inlet, outlet = self._wires.inlet, self._wires.outlet
        while not outlet.closed:
            if len(self._holds) >= self._width or self._room() <= 0:
                self._bell = asyncio.get_running_loop().create_future()
                await self._bell  # bounded by the stop, which cancels this task
                self._bell = None
                continue
            item = inlet.pop()
            if item is EMPTY:
                if not await inlet.wait_items():
                    return
            elif isinstance(item, Err):
                self._line.pass_by([item])
            else:
                hold = await self._gate.enter()
                parcel = self._line.pack([item])
                self._holds[parcel.items[0]] = hold
                self._executor.submit([parcel])

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def _over(self, job: Job) -> None:
        """Its handler has ended."""
        hold = self._holds.pop(job, None)
        if hold is not None:
            self._gate.leave(hold)
            self._ring()


class _Guarded(Singly):
    """Jobs that hold something until there is news of them."""

    def __init__(self, over: Callable[[Job], None], *wires: Any, **options: Any) -> None:
        super().__init__(*wires, **options)
        self._over = over
        self.told = self._tell

    def _tell(self, job: Job) -> None:
        self._over(job)  # its outputs leave when it has returned
        self._line.news(job)

    def news(self, parcel: Parcel) -> None:
        for job in parcel.items[parcel.settled : parcel.done]:
            self._over(job)
        super().news(parcel)
