"""Neighbouring loop stages with one worker each, run as one: an item goes through all of them before the next is taken.

The rule kept here: fused stages keep their own counts, policies and places to stop, as if there were a channel between
them; only the channels, the tasks and the wake-ups are saved. That is right as long as no handler waits. When one does,
the row is spread: channels appear between the stages that may wait, each gets a lane of its own, and waits overlap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.channel import Channel
from pipeline.protocols import Inlet, Outlet, Seat, Wires

from .flow import Step
from .lane import Lane

__all__ = ["ChainNode"]


class ChainNode:
    """A row of fused stages in one run."""

    def __init__(self, seats: Sequence[Seat], wires: Wires) -> None:
        self._wires = wires
        self._steps = [Step.of(seat, wires, seats[-1].index) for seat in seats]
        self._capacities = [seat.stage.capacity for seat in seats]
        self._pieces = _pieces(self._steps)
        self._whole = Lane(self._steps, wires.inlet, wires.outlet, wires.runtime, self._suspended)
        self._lend()
        self._lanes: dict[asyncio.Task[None], Lane] = {}
        self._spread = False

    def _lend(self) -> None:
        """What the edges inside could hold may wait at one of the ends instead: fewer hand-overs, the same bound."""
        inlet, outlet = self._wires.inlet, self._wires.outlet
        if len(self._pieces) > 1:
            return  # there may be edges yet
        if not outlet.keeps and inlet.stores:
            inlet.lend(sum(self._capacities[1:]))
        elif all(step.sure for step in self._steps):  # of others, somebody might count how far ahead they were called
            outlet.lend(sum(self._capacities[1 if inlet.stores else 0 :]))

    async def run(self) -> None:
        opened: list[Step] = []
        try:
            for step in self._steps:
                try:
                    await step.performer.open()
                except Exception as error:
                    step.desk.broke(error, "setup")
                    return
                opened.append(step)
            await self._run_lanes()
        finally:
            await self._close(opened)
        for step in self._steps:
            step.desk.close()

    async def _close(self, opened: Sequence[Step]) -> None:
        interrupted: asyncio.CancelledError | None = None
        for step in reversed(opened):
            try:
                await step.performer.close()
            except asyncio.CancelledError as error:
                interrupted = error  # the others are closed all the same
            except Exception as error:
                step.desk.broke(error, "teardown")
        if interrupted is not None:
            raise interrupted

    async def _run_lanes(self) -> None:
        if len(self._pieces) == 1:
            await self._whole.run()  # nothing that could be spread
            return
        self._start(self._whole)
        if any(step.many for step in self._steps):
            self._suspended(self._whole, 0)  # generators go by hand, where a wait would hold up everything
        try:
            await self._lanes_ended()
        except asyncio.CancelledError:
            await self._lanes_ended()  # cancelled like this task: no `teardown` before their handlers have cleaned up
            raise

    async def _lanes_ended(self) -> None:
        while waiting := [task for task in self._lanes if not task.done()]:
            await asyncio.wait(waiting)

    def abort(self) -> None:
        for lane in [self._whole, *self._lanes.values()]:
            lane.give_way(quiet=True)
            if lane.inlet is not self._wires.inlet:
                lane.inlet.abort()

    def cut(self, upto: int) -> None:
        """Stop the stages with an index up to `upto`, at once; what they have passed on goes on."""
        for lane in self._lanes.values():
            if self._steps[lane.end - 1].index <= upto:
                lane.give_way(quiet=True)
                lane.inlet.abort()
                lane.outlet.finish()

    def pull(self, reach: int) -> Iterator[Any] | None:
        """As `Pullable` says, as long as all stages are in one lane."""
        return self._whole.pull(reach) if len(self._pieces) == 1 else None

    def end_pull(self) -> None:
        self._whole.end_pull()

    # --- spreading

    def _suspended(self, lane: Lane, at: int) -> None:
        """A handler waits: from now on the stages that may wait have a lane each."""
        if self._spread or len(self._pieces) == 1:
            return
        self._spread = True
        wires = self._wires
        assert wires.runtime.loop is not None
        edges = [
            Channel(self._capacities[start], self._steps[start - 1].counters, self._steps[start].counters, wires.runtime.loop)
            for start, _ in self._pieces[1:]
        ]
        inlets: list[Inlet] = [wires.inlet, *edges]
        outlets: list[Outlet] = [*edges, wires.outlet]
        for (start, end), inlet, outlet in zip(self._pieces, inlets, outlets, strict=True):
            for step in self._steps[start:end]:
                step.desk.cut = self._steps[end - 1].index
            if start <= at < end:
                lane.narrow(start, end, inlet, outlet)
            else:
                other = Lane(self._steps, inlet, outlet, wires.runtime, self._suspended)
                other.narrow(start, end, inlet, outlet)
                other.take_over(lane)
                self._start(other)
        for task, placed in self._lanes.items():
            wires.runtime.regroup(task, self._steps[placed.end - 1].index)

    def _start(self, lane: Lane) -> None:
        group = self._steps[-1].index
        name = "+".join(step.desk.name for step in self._steps[lane.first : lane.end])
        task = self._wires.runtime.start_task(lane.run(), name=f"{name}:lane", group=group, on_end=self._lane_ended)
        self._lanes[task] = lane

    def _lane_ended(self, task: asyncio.Task[None]) -> None:
        lane = self._lanes[task]
        if not self._spread:
            return
        if lane.outlet is not self._wires.outlet:
            lane.outlet.finish()
        if not lane.inlet.ended:
            # It ended by itself, as `take` does: nothing before it is needed any more.
            assert self._wires.runtime.assembly is not None
            self._wires.runtime.assembly.cut(self._steps[lane.first].index - 1)
            lane.inlet.abort()


def _pieces(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """The parts that a row is spread into: each stage that may wait by itself, plain neighbours together."""
    pieces: list[tuple[int, int]] = []
    for index, step in enumerate(steps):
        waits = step.awaited and not step.sure
        if pieces and not waits and not _waits_last(steps, pieces[-1]):
            pieces[-1] = (pieces[-1][0], index + 1)
        else:
            pieces.append((index, index + 1))
    return pieces


def _waits_last(steps: Sequence[Step], piece: tuple[int, int]) -> bool:
    last = steps[piece[1] - 1]
    return last.awaited and not last.sure
