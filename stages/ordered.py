"""A loop worker of an ordered stage: it works on whatever comes next, and its results leave in the input's order.

The rule kept here: an item takes its place in the line when it is taken, so the order is the inlet's. A slow item holds
the line, not the workers: they go on until the line is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pipeline.channel import EMPTY
from pipeline.pace import RoundPacer, Rounds
from pipeline.protocols import Wires
from pipeline.result import Err
from workers.base import HandlerKind, Outcome, is_pending
from workers.loop import LoopPerformer, is_being_cancelled
from workers.pooled import DONE, PARTIAL_LIMIT, Job

from .desk import LAG, Desk
from .gate import Gate
from .line import Line, Place

if TYPE_CHECKING:
    from pipeline.protocols import StageLike

__all__ = ["OrderedWorker"]


class OrderedWorker:
    """One of the workers that share a line."""

    def __init__(
        self,
        performer: LoopPerformer,
        desk: Desk,
        line: Line,
        wires: Wires,
        stage: StageLike[Any, Any],
        room: asyncio.Event,
        rounds: Rounds,
        gate: Gate | None,
    ) -> None:
        self._gate = gate
        self._performer = performer
        self._plain = performer.handler.kind is HandlerKind.PLAIN
        self._desk = desk
        self._line = line
        self._wires = wires
        self._capacity = stage.capacity
        # A waiting item may need as many places as there are workers, or the buffer and the item that holds the line.
        self._limit = max(stage.width, stage.capacity + 1)
        self._room = room
        self._turn = RoundPacer(rounds)
        self.hire: Callable[[], None] | None = None
        """Called for every item; None when nobody more is to be hired."""

    async def run(self) -> None:
        """Until the inlet has ended, or the outlet is closed."""
        inlet, outlet, line, turn = self._wires.inlet, self._wires.outlet, self._line, self._turn
        call, pop, simple = self._performer.call, inlet.pop, self._performer.simple and not self._plain
        left, limit, capacity = turn.stride, self._limit, max(self._capacity, 1)
        while True:
            if line.outstanding >= limit or line.waiting >= capacity:
                self._room.clear()
                line.wanted = True
                await self._room.wait()  # bounded by the stop, which cancels this task
                line.wanted = False
                continue
            item = pop()
            if item is EMPTY:
                if not await inlet.wait_items():
                    return
                continue
            if self.hire is not None:
                self.hire()
            left -= 1
            if simple and type(item) is not Err:
                # One call, one value: the common case, without the machinery of attempts.
                place = Place(item)
                line.add(place)
                began = perf_counter() if left <= 0 else 0.0
                try:
                    place.value = await call(item)
                except (Exception, asyncio.CancelledError) as error:
                    if is_being_cancelled(error):
                        raise
                    place.outcome = _failure(error)
                else:
                    place.outcome = DONE
                if began:
                    self._desk.counters.latency.add(perf_counter() - began, turn.stride)
                line.finished(place)
            else:
                await self._thorough(item)
            if left <= 0:
                if outlet.closed:
                    return
                if turn.due():
                    await turn.rest()
                left = turn.stride

    async def _thorough(self, item: Any) -> None:
        """Errors passing by, plain functions, retries, timeouts, generators."""
        job, line = Job(item), self._line
        line.add(job)
        if isinstance(item, Err):
            job.passing, job.value, job.outcome = True, item, DONE
        elif self._performer.simple:
            await self._perform_simply(job)
        else:
            job.outcome = await self._perform_for(job)
        line.news(job)

    async def _perform_simply(self, job: Job) -> None:
        began, lag = perf_counter(), LAG
        try:
            result = self._performer.call(job.item)
            if is_pending(result):
                lag = float("inf")  # from here on it does not hold the loop
                result = await result
        except (Exception, asyncio.CancelledError) as error:
            if is_being_cancelled(error):
                raise
            job.outcome = _failure(error)
        else:
            job.value, job.outcome = result, DONE
        seconds = perf_counter() - began
        self._desk.counters.latency.add(seconds)
        if seconds > lag:
            self._desk.lagged(seconds)

    async def _perform_for(self, job: Job) -> Outcome:
        left, line = asyncio.Event(), self._line

        async def send(output: Any) -> bool:
            job.add_output(output)
            line.news(job)
            while len(job.outputs) >= PARTIAL_LIMIT:
                left.clear()
                await left.wait()
            return job.spoiled is None and not job.booked and not self._wires.outlet.closed

        if self._performer.handler.kind.many:
            job.grant = lambda _: left.set()
        if self._gate is None:
            outcome = await self._performer.perform(job.item, send)
        else:
            outcome = await self._gate.perform(self._performer, job.item, send)
        if outcome.held > LAG:
            self._desk.lagged(outcome.held)
        if outcome.error is not None:
            outcome.trace = Err.of(outcome.error).trace
        return outcome


def _failure(error: BaseException) -> Outcome:
    return Outcome(error=error, trace=Err.of(error).trace)
