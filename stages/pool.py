"""A stage whose handlers run in a pool of threads or processes.

The rule kept here: this node moves items and counts; the executor decides who works on what. What the pool holds is
bounded by the executor's capacity, counted until the outputs have left downstream, so a stalled consumer stops the
pool and not the memory.
"""

from __future__ import annotations

import asyncio

from pipeline.channel import EMPTY
from pipeline.protocols import Seat, Wires
from pipeline.result import Err
from workers.placement import as_placement
from workers.pooled import DONE, Job, Order

from .desk import Desk
from .line import Line

__all__ = ["PoolNode"]


class PoolNode:
    """One pooled stage in one run."""

    def __init__(self, seat: Seat, wires: Wires) -> None:
        options = seat.stage.options
        self._seat = seat
        self._wires = wires
        self._desk = Desk(seat, seat.stage.rule(seat.default_policy), wires, seat.index)
        # One worker keeps the order anyway; as an ordered stage it also keeps the place of errors passing by.
        self._ordered: bool = options.ordered or options.concurrency == 1
        self._line = Line(self._desk, wires.inlet, wires.outlet, ordered=self._ordered, on_settled=self._ring)
        self._bell: asyncio.Future[None] | None = None
        self._executor = as_placement(options.run_in).executor(
            Order(
                runtime=wires.runtime,
                stage=seat.name,
                group=seat.index,
                handlers=seat.stage.handlers,
                concurrency=options.concurrency,
                buffer=options.buffer,
                news=self._line.news,
                ready=self._ring,
                broke=self._desk.broke,
            )
        )

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

    async def _dispatch(self) -> None:
        inlet, outlet = self._wires.inlet, self._wires.outlet
        while not outlet.closed:
            room = self._room()
            if room <= 0:
                self._bell = asyncio.get_running_loop().create_future()
                await self._bell  # bounded by the stop, which cancels this task
                continue
            jobs: list[Job] = []
            while room > 0 and (item := inlet.pop()) is not EMPTY:
                room -= 1
                if isinstance(item, Err):
                    self._pass(item)
                else:
                    job = Job(item)
                    self._line.add(job)
                    jobs.append(job)
            if jobs:
                self._executor.submit(jobs)
                await asyncio.sleep(0)
            elif room > 0 and not await inlet.wait_items():
                return

    def _room(self) -> int:
        line = self._line
        held = self._executor.capacity
        if self._ordered:
            capacity = max(self._seat.stage.capacity, 1)
            if line.waiting >= capacity:
                return 0
            held += capacity
        return min(self._executor.room(), held - line.outstanding)

    def _pass(self, err: Err) -> None:
        job = Job(err)
        job.passing, job.value = True, err
        self._line.add(job)
        job.outcome = DONE
        self._line.news(job)

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)
