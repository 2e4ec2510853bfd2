"""Neighbouring plain functions in the loop, run as one: an item goes through all of them before the next is taken.

The rule kept here: fused stages keep their own counts, policies and places to stop, as if there were a channel between
them; only the channel, its task and its wake-ups are saved.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from pipeline.channel import EMPTY
from pipeline.metrics import Counters
from pipeline.pace import Pacer
from pipeline.protocols import Seat, Wires
from pipeline.result import Err
from workers.base import HandlerKind, WorkerState
from workers.loop import LoopPerformer

from .control import SKIP, KillSwitch, Last
from .desk import LAG, Desk

__all__ = ["ChainNode"]

_SAMPLE = 64
"""So many first items are timed one by one, then one in so many."""


class _Step:
    """One fused stage: its function, counters and desk."""

    __slots__ = ("call", "counters", "desk", "many", "performer")

    def __init__(self, seat: Seat, wires: Wires, cut: int) -> None:
        handler = seat.stage.handlers[0]
        self.performer = LoopPerformer(handler, WorkerState(seat.name, 0, wires.runtime))
        self.call: Callable[[Any], Any] = self.performer.call
        self.many = handler.kind is HandlerKind.GENERATOR
        self.counters: Counters = seat.counters
        self.desk = Desk(seat, seat.stage.rule(seat.default_policy), wires, cut)


class _Unusual:
    """What the fast path leaves to the thorough one: an item whose step did not simply return an output."""

    __slots__ = ("error", "index", "item", "result")

    def __init__(self, index: int, item: Any, result: Any, error: Exception | None) -> None:
        self.index = index
        self.item = item
        self.result = result
        self.error = error


_SPECIAL = (Err, KillSwitch, Last)


class ChainNode:
    """A row of fused stages in one run."""

    def __init__(self, seats: Sequence[Seat], wires: Wires) -> None:
        self._wires = wires
        self._steps = [_Step(seat, wires, seats[-1].index) for seat in seats]
        self._one_to_one = not any(step.many for step in self._steps)
        self._ended = False
        self._count = 0
        self._timed = _SAMPLE
        """Items to time from here on, each for itself."""

    async def run(self) -> None:
        opened: list[_Step] = []
        try:
            for step in self._steps:
                try:
                    await step.performer.open()
                except Exception as error:
                    step.desk.broke(error, "setup")
                    return
                opened.append(step)
            await self._take_items()
        finally:
            for step in reversed(opened):
                try:
                    await step.performer.close()
                except Exception as error:
                    step.desk.broke(error, "teardown")
        for step in self._steps:
            step.desk.close()

    def abort(self) -> None:
        """Nothing beyond the task's own cancellation."""

    async def _take_items(self) -> None:
        inlet, outlet, runtime = self._wires.inlet, self._wires.outlet, self._wires.runtime
        pace = Pacer()
        while not self._ended and not runtime.cancelled:
            if outlet.room() <= 0:
                if not await outlet.wait_room():
                    return
                pace.restart()
            item = inlet.pop()
            if item is EMPTY:
                if not await inlet.wait_items():
                    return
                pace.restart()
                continue
            if self._one_to_one and type(item) is not Err:
                unusual = self._pass_timed(item) if self._is_timed() else self._pass(item)
                if unusual is not None:
                    await self._treat(unusual)
            else:
                await self._flow(item, 0)
            if pace.due():
                if pace.overrun > LAG:
                    self._timed = _SAMPLE  # somebody holds the loop: find out who
                await pace.rest()

    # --- the fast path: one output each, synchronous

    def _pass(self, value: Any) -> _Unusual | None:
        """Take one item through all steps; None when it has left."""
        up: Counters | None = None
        for index, step in enumerate(self._steps):
            counters = step.counters
            if up is not None:
                up.emitted += 1
                up.succeeded += 1
                counters.received += 1
            try:
                result = step.call(value)
            except Exception as error:
                return _Unusual(index, value, None, error)
            if result is SKIP or isinstance(result, _SPECIAL) or hasattr(result, "__await__"):
                return _Unusual(index, value, result, None)
            value, up = result, counters
        self._wires.outlet.put_nowait(value)
        assert up is not None
        up.succeeded += 1
        return None

    def _pass_timed(self, value: Any) -> _Unusual | None:
        """The same, with a clock around every step."""
        steps, original = self._steps, [step.call for step in self._steps]
        weight = 1 if self._timed >= 0 else _SAMPLE
        try:
            for step in steps:
                step.call = _timed(step, step.call, weight)
            return self._pass(value)
        finally:
            for step, call in zip(steps, original, strict=True):
                step.call = call

    def _is_timed(self) -> bool:
        self._count += 1
        if self._timed > 0:
            self._timed -= 1
            return True
        if self._count % _SAMPLE == 0:
            self._timed = -1  # one item that stands for many
            return True
        self._timed = 0
        return False

    # --- the thorough path: errors, skips, generators

    async def _treat(self, unusual: _Unusual) -> None:
        """Finish what the fast path has left."""
        index, item = unusual.index, unusual.item
        desk, emit = self._steps[index].desk, self._emitter(index)
        if unusual.error is not None:
            await desk.failed(Err.of(unusual.error, item=item, stage=desk.name), emit)
            return
        result = unusual.result
        if hasattr(result, "__await__"):
            try:
                result = await result
            except Exception as error:
                await desk.failed(Err.of(error, item=item, stage=desk.name), emit)
                return
        if isinstance(result, Last):
            self._ended = True
            result = result.value
        await desk.settle(item, result, 1, emit)

    async def _flow(self, value: Any, index: int) -> bool:
        """Take one item, already received by step `index`, from there on; False when nobody takes outputs any more."""
        step = self._steps[index]
        desk, emit = step.desk, self._emitter(index)
        if isinstance(value, Err):
            await desk.pass_on(value, emit)
        elif step.many:
            await self._flow_many(value, step, emit)
        else:
            began = perf_counter()
            try:
                result, error = step.call(value), None
            except Exception as caught:
                result, error = None, caught
            self._clock(step, perf_counter() - began)
            await self._treat(_Unusual(index, value, result, error))
        return not self._wires.outlet.closed

    async def _flow_many(self, value: Any, step: _Step, emit: Callable[[Any], Any]) -> None:
        """One item, any number of outputs, each going all the way before the next is made."""
        desk, pace = step.desk, Pacer()
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
                    self._ended = True
                    output = output.value
                if not await emit(output) or (self._ended and output is not None):
                    break
                if pace.due():
                    await pace.rest()
        except Exception as error:
            failure = Err.of(error, item=value, stage=desk.name)
        finally:
            generator.close()
        self._clock(step, seconds)
        if failure is not None:
            await desk.failed(failure, emit)
        elif not self._wires.runtime.cancelled:
            desk.counters.succeeded += 1

    def _emitter(self, index: int) -> Callable[[Any], Any]:
        """How step `index` hands on: into the next step, or out of the chain."""
        if index + 1 == len(self._steps):
            return self._wires.outlet.put
        up, down = self._steps[index].counters, self._steps[index + 1].counters

        async def into_next(output: Any) -> bool:
            up.emitted += 1
            down.received += 1
            return await self._flow(output, index + 1)

        return into_next

    def _clock(self, step: _Step, seconds: float) -> None:
        step.counters.latency.add(seconds)
        if seconds > LAG and not inspect.iscoroutinefunction(step.call):
            step.desk.lagged(seconds)


def _timed(step: _Step, call: Callable[[Any], Any], weight: int) -> Callable[[Any], Any]:
    def timed(value: Any) -> Any:
        began = perf_counter()
        try:
            return call(value)
        finally:
            seconds = perf_counter() - began
            step.counters.latency.add(seconds, weight)
            if seconds > LAG:
                step.desk.lagged(seconds)

    return timed
