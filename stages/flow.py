"""One item through a row of steps by hand: errors, skips, generators, whatever left the fast path.

The rule kept here: by hand, an item is treated as it would be between separate stages. It enters a step (`received`),
is settled there by the step's policy, and its outputs go all the way before the next one is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from pipeline.metrics import Counters
from pipeline.pace import Pacer
from pipeline.protocols import Outlet, Seat, Wires
from pipeline.result import Err
from workers.base import HandlerKind, WorkerState, is_pending
from workers.loop import LoopPerformer, is_being_cancelled

from .burst import StepKind
from .control import SKIP, KillSwitch, Last
from .desk import LAG, Desk

__all__ = ["FAILURES", "Flow", "Step", "Unusual"]

FAILURES = (Exception, asyncio.CancelledError)
"""What a handler may raise. A cancellation that nobody asked for is made up, and its failure."""


class Step:
    """One stage's part of a lane: its function, counters and desk."""

    __slots__ = ("awaited", "call", "counters", "desk", "index", "many", "performer", "sure")

    def __init__(self, seat: Seat, desk: Desk, performer: LoopPerformer) -> None:
        self.index = seat.index
        self.performer = performer
        self.call: Callable[[Any], Any] = performer.call
        self.many = performer.handler.kind is HandlerKind.GENERATOR
        self.awaited = performer.handler.kind is HandlerKind.COROUTINE
        self.sure: bool = seat.stage.computes
        """It neither waits nor returns anything but an output."""
        self.counters: Counters = seat.counters
        self.desk = desk

    @classmethod
    def of(cls, seat: Seat, wires: Wires, cut: int) -> Step:
        """The step of a stage that has one handler and one worker."""
        performer = LoopPerformer(seat.stage.handlers[0], WorkerState(seat.name, 0, wires.runtime))
        return cls(seat, Desk(seat, seat.stage.rule(seat.default_policy), wires, cut), performer)

    @property
    def kind(self) -> StepKind:
        return StepKind(self.sure, self.awaited)

    def clock(self, seconds: float, weight: int = 1) -> None:
        """Note how long a call took, for so many items; say so when a plain function held the loop for too long."""
        self.counters.latency.add(seconds, weight)
        if seconds > LAG and not self.awaited:
            self.desk.lagged(seconds)


class Unusual:
    """What is left to finish by hand: step `at` was called with `item`, and this came of it."""

    __slots__ = ("at", "error", "item", "result")

    def __init__(self, at: int, item: Any, result: Any, error: BaseException | None) -> None:
        self.at = at
        self.item = item
        self.result = result
        self.error = error


class Flow:
    """The thorough path of one lane over a node's steps. `waits` is told of an await that may suspend, and of its end."""

    def __init__(self, steps: Sequence[Step], outlet: Outlet, waits: Callable[[int | None], None]) -> None:
        self._steps = steps
        self.outlet = outlet
        self.end = len(steps)
        """Where the lane ends, and begins: it may become shorter while an item is on its way."""
        self.first = 0
        self.ended_at = -1
        """The step that has emitted its `Last`."""
        self._next: list[tuple[Any, int]] = []
        """An output on its way into the next step."""
        self._waits = waits

    @property
    def ended(self) -> bool:
        """Whether a step of this lane has emitted its `Last`."""
        return self.ended_at >= self.first

    async def treat(self, unusual: Unusual) -> None:
        """Finish one item that has left the fast path."""
        at, item, result = unusual.at, unusual.item, unusual.result
        desk, emit = self._steps[at].desk, self._emitter(at)
        if unusual.error is not None:
            await desk.failed(Err.of(unusual.error, item=item, stage=desk.name), emit)
            await self._carry_on()
            return
        if is_pending(result):
            began = perf_counter()
            self._waits(at)
            try:
                result = await result
            except FAILURES as error:
                if is_being_cancelled(error):
                    raise
                await desk.failed(Err.of(error, item=item, stage=desk.name), self._emitter(at))
                await self._carry_on()
                return
            finally:
                self._waits(None)
                desk.counters.latency.add(perf_counter() - began)
            emit = self._emitter(at)  # the lane may have become shorter in the meantime
        if isinstance(result, Last):
            self.ended_at = at
            result = result.value
        await desk.settle(item, result, 1, emit)
        await self._carry_on()

    async def enter(self, value: Any, at: int) -> None:
        """Take one item, already received by the step at `at`, from there on."""
        step = self._steps[at]
        if isinstance(value, Err):
            await step.desk.pass_on(value, self._emitter(at))
            await self._carry_on()
        elif step.many:
            await self._enter_many(value, step, at)
        else:
            began = perf_counter()
            try:
                result, error = step.call(value), None
            except FAILURES as caught:
                result, error = None, caught
            if not is_pending(result):
                step.clock(perf_counter() - began)
            await self.treat(Unusual(at, value, result, error))

    async def _carry_on(self) -> None:
        """Take what has left a step, and is booked there, through the next."""
        while self._next:
            value, at = self._next.pop()
            await self.enter(value, at)

    def _is_stopped(self, at: int) -> bool:
        """Whether nobody takes outputs of the step at `at` any more."""
        return self.outlet.closed or any(step.desk.stopped for step in self._steps[at + 1 : self.end])

    async def _enter_many(self, value: Any, step: Step, at: int) -> None:
        """One item, any number of outputs, each going all the way before the next is made."""
        desk, emit, pace = step.desk, self._emitter(at), Pacer()
        seconds, failure = 0.0, None
        generator = step.call(value)
        try:
            while True:
                began = perf_counter()
                try:
                    output = next(generator)
                except StopIteration:
                    break
                finally:
                    seconds += perf_counter() - began
                if output is SKIP:
                    continue
                if isinstance(output, KillSwitch):
                    desk.kill(output)
                    return
                if isinstance(output, Err):
                    failure = desk.complete(output, value, 1)
                    break
                if isinstance(output, Last):
                    self.ended_at = at
                    output = output.value
                sent = await emit(output)
                await self._carry_on()
                if not sent or self._is_stopped(at):
                    return  # nobody takes it any more: the item is in flight, and becomes `cancelled`
                if self.ended_at >= at:
                    break
                if pace.due():
                    await pace.rest()
        except FAILURES as error:
            if is_being_cancelled(error):
                raise
            failure = Err.of(error, item=value, stage=desk.name)
        finally:
            generator.close()
        step.clock(seconds)
        if failure is not None:
            await desk.failed(failure, emit)
            await self._carry_on()
        else:
            desk.counters.succeeded += 1

    def _emitter(self, at: int) -> Callable[[Any], Any]:
        """How the step at `at` hands on: into the next step, or out of the lane."""
        if at + 1 >= self.end:
            return self.outlet.put
        up, down = self._steps[at].counters, self._steps[at + 1].counters

        async def into_next(output: Any) -> bool:
            up.emitted += 1
            down.received += 1
            self._next.append((output, at + 1))
            return True

        return into_next
