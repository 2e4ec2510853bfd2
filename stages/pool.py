"""A stage whose handlers run in a pool of threads or processes.

The rule kept here: this node moves items and counts; the executor decides who works on what. What the pool holds is
bounded by the executor's capacity, counted until the outputs have left downstream, so a stalled consumer stops the
pool and not the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import groupby
from typing import Any

from pipeline.protocols import Inlet, Outlet, Seat, Wires
from pipeline.result import Err
from workers.parcel import Parcel
from workers.placement import as_placement
from workers.pooled import DONE, Job, Order

from .desk import Desk
from .line import Line
from .parcels import ParcelLine

__all__ = ["PoolNode", "Singly"]

_LOT = 4096
"""Items taken from the inlet at once, at most."""


class PoolNode:
    """One pooled stage in one run."""

    def __init__(self, seat: Seat, wires: Wires) -> None:
        options = seat.stage.options
        self._seat = seat
        self._wires = wires
        self._desk = Desk(seat, seat.stage.rule(seat.default_policy), wires, seat.index)
        # One worker keeps the order anyway; as an ordered stage it also keeps the place of errors passing by.
        self._ordered: bool = options.ordered or options.concurrency == 1
        simple = all(handler.simple for handler in seat.stage.handlers)
        kind = self._jobs if not simple else _Plainly
        self._line = kind(self._desk, wires.inlet, wires.outlet, ordered=self._ordered, on_settled=self._ring)
        self._bell: asyncio.Future[None] | None = None
        """What the dispatcher waits for while there is no room."""
        self._moving = False
        self._executor = as_placement(options.run_in).executor(
            Order(
                runtime=wires.runtime,
                stage=seat.name,
                group=seat.index,
                handlers=seat.stage.handlers,
                concurrency=options.concurrency,
                buffer=options.buffer,
                simple=simple,
                known=self._desk.plain.known,
                news=self._line.news,
                told=self._line.told,
                took=seat.counters.latency.add,
                ready=self._ring,
                broke=self._desk.broke,
                max_items=options.max_items,
                max_memory=options.max_memory,
            )
        )

    @property
    def _jobs(self) -> Callable[..., Singly]:
        """What makes jobs of items that need more than one call for one value."""
        return Singly

    async def run(self) -> None:
        self._executor.start()
        emitter = self._wires.runtime.start_task(self._line.run(), name=f"{self._seat.name}:emitter", group=self._seat.index)
        await self._dispatch()
        self._line.close()
        await asyncio.wait((emitter,))
        await self._executor.close()
        self._desk.close()

    def abort(self) -> None:
        self._executor.abort()

    @property
    def outside(self) -> bool:
        return self._executor.busy

    async def _dispatch(self) -> None:
        """Wait for items while there is room, and for room (in which `_ring` moves items) while there is none."""
        inlet, outlet = self._wires.inlet, self._wires.outlet
        while not outlet.closed:
            if self._move():
                self._bell = asyncio.get_running_loop().create_future()
                await self._bell  # bounded by the stop, which cancels this task
                self._bell = None
            elif not await inlet.wait_items():
                return

    def _move(self) -> bool:
        """Hand over what there is room for; False when there is room for more than has come."""
        inlet = self._wires.inlet
        while (room := self._room()) > 0:
            lot = inlet.lot(min(room, _LOT))
            if lot is None:
                return False
            items = list(lot.items)
            may_pass = lot.batch is not None
            inlet.close_lot(lot)
            if not items:
                return False
            self._hand_over(items, may_pass)
        return True

    def _room(self) -> int:
        room = self._executor.room()
        if room <= 0:
            return 0
        line = self._line
        held = self._executor.capacity
        if self._ordered:
            capacity = max(self._seat.stage.capacity, 1)
            if line.waiting >= capacity:
                return 0
            held += capacity
        return min(room, held - line.outstanding)

    def _hand_over(self, items: list[Any], may_pass: bool) -> None:
        """Make parcels of items; errors of earlier stages among them only pass by."""
        if may_pass and any(issubclass(kind, Err) for kind in set(map(type, items))):
            for passing, group in groupby(items, _is_err):
                if passing:
                    self._line.pass_by(list(group))
                else:
                    self._submit(list(group))
        else:
            self._submit(items)

    def _submit(self, items: list[Any]) -> None:
        size = self._executor.share(len(items))
        groups = [items] if len(items) <= size else [items[start : start + size] for start in range(0, len(items), size)]
        self._executor.submit([self._line.pack(group) for group in groups])

    def _ring(self) -> None:
        """There may be room: refill at once, without a turn of the loop, and wake the dispatcher when it is to wait."""
        bell = self._bell
        if bell is None or bell.done() or self._moving:
            return
        self._moving = True
        if self._wires.outlet.closed or not self._move():
            bell.set_result(None)
        self._moving = False


def _is_err(item: Any) -> bool:
    return isinstance(item, Err)


class _Plainly(ParcelLine):
    """One call, one value: parcels of items, which leave as parcels."""

    def pack(self, items: list[Any]) -> Parcel:
        """Items begin."""
        parcel = Parcel(items)
        self.add(parcel)
        return parcel

    def pass_by(self, errors: list[Err]) -> None:
        """Errors of an earlier stage take their place in the line."""
        parcel = Parcel.of_errors(errors)
        self.add(parcel)
        self.news(parcel)

    def told(self, job: Job) -> None:
        raise AssertionError("there are no jobs here")


class Singly:
    """Everything else: parcels of jobs, which leave one by one."""

    def __init__(self, desk: Desk, inlet: Inlet, outlet: Outlet, **options: Any) -> None:
        self._line = Line(desk, inlet, outlet, **options)
        self.told = self._line.news
        self.run = self._line.run
        self.close = self._line.close

    @property
    def outstanding(self) -> int:
        return self._line.outstanding

    @property
    def waiting(self) -> int:
        return self._line.waiting

    def pack(self, items: list[Any]) -> Parcel:
        jobs = [Job(item) for item in items]
        for job in jobs:
            self._line.add(job)
        return Parcel(jobs)

    def pass_by(self, errors: list[Err]) -> None:
        for err in errors:
            job = Job(err)
            job.passing, job.value = True, err
            self._line.add(job)
            job.outcome = DONE
            self._line.news(job)

    def news(self, parcel: Parcel) -> None:
        start, parcel.settled = parcel.settled, parcel.done
        for job, outcome in zip(parcel.items[start : parcel.settled], parcel.results[start : parcel.settled], strict=True):
            job.outcome = outcome
            self._line.news(job)
