"""Neighbouring plain functions in the loop, run as one: an item goes through all of them before the next is taken.

The rule kept here: fused stages keep their own counts, policies and places to stop, as if there were a channel between
them; only the channel, its task and its wake-ups are saved. Items run in bursts (see `burst`); whatever is not an
ordinary output (an error, a skip, a coroutine) leaves the burst and is finished by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

from pipeline.channel import EMPTY
from pipeline.lot import Lot
from pipeline.metrics import Counters
from pipeline.pace import Pacer
from pipeline.protocols import Seat, Wires
from pipeline.result import Err
from workers.base import HandlerKind, WorkerState, is_pending
from workers.loop import LoopPerformer, is_being_cancelled

from .burst import compile_burst, failed_step, only_computes, step_at_work
from .control import SKIP, KillSwitch, Last, PlainTypes
from .desk import LAG, Desk

__all__ = ["ChainNode"]

_SAMPLE = 1024
"""Items between two that are timed one by one; slow ones are all timed."""
_BURST = 1024
"""Items in one burst, at most."""
_WATCHED = 2048
"""Items timed one by one after a burst in which somebody held the loop."""
_SHORT, _LONG = 0.0001, 0.00025
"""Seconds: a burst that takes less may grow, one that takes more shrinks."""


_FAILURES = (Exception, asyncio.CancelledError)
"""A plain function cannot be interrupted by a cancellation: one that it raises is made up, and its failure."""


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

    def clock(self, seconds: float, weight: int = 1) -> None:
        """Note how long a call took, for so many items; say so when it held the loop for too long."""
        self.counters.latency.add(seconds, weight)
        if seconds > LAG:
            self.desk.lagged(seconds)


class _Unusual:
    """What is left to finish by hand: step `index` was called with `item`, and this came of it; -1: not called yet."""

    __slots__ = ("error", "index", "item", "result")

    def __init__(self, index: int, item: Any, result: Any, error: BaseException | None) -> None:
        self.index = index
        self.item = item
        self.result = result
        self.error = error


class _Progress:
    """A burst under way: what came of it so far, and how much of that is in the ledger."""

    __slots__ = ("booked", "lot", "outputs", "skipped")

    def __init__(self, lot: Lot, steps: int) -> None:
        self.lot = lot
        self.outputs: list[Any] = []
        self.skipped = [0] * steps
        self.booked = [(0, 0, 0, 0)] * steps
        """For each step: items entered, left, skipped, passed on."""


class ChainNode:
    """A row of fused stages in one run."""

    def __init__(self, seats: Sequence[Seat], wires: Wires) -> None:
        self._wires = wires
        self._steps = [_Step(seat, wires, seats[-1].index) for seat in seats]
        self._bursts = not any(step.many for step in self._steps)
        self._calls = [step.call for step in self._steps]
        self._trusted = tuple(only_computes(call) for call in self._calls)
        self._loop = compile_burst(self._trusted, wires.outlet.keeps)
        self._plain = PlainTypes()
        self._size = 1
        self._untimed = 0
        """Items since the last that was timed by itself."""
        self._careful = 0
        """So many of the next items go one by one: an error is among them, or somebody has held the loop."""
        self._ended = False

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
            room = outlet.room()
            if room <= 0:
                if not await outlet.wait_room():
                    return
                pace.restart()
                continue
            if self._bursts and self._size > 1 and self._untimed < _SAMPLE and not self._careful:
                some, unusual = self._burst(min(room, self._size))
            else:
                some, unusual = self._single(inlet.pop())
            if unusual is not None:
                await self._treat(unusual)
            elif not some:
                if not await inlet.wait_items():
                    return
                pace.restart()
                continue
            if pace.due():
                await pace.rest()

    # --- one item, timed

    def _single(self, item: Any) -> tuple[bool, _Unusual | None]:
        """Take one item through all steps, with a clock; what is not plain is left to the thorough path."""
        if item is EMPTY:
            return False, None
        self._careful = max(self._careful - 1, 0)
        if not self._bursts or isinstance(item, Err):
            return True, _Unusual(-1, item, None, None)
        weight, self._untimed = max(self._untimed, 1), 0
        began = perf_counter()
        up: Counters | None = None
        value = item
        for index, step in enumerate(self._steps):
            counters = step.counters
            if up is not None:
                up.emitted += 1
                up.succeeded += 1
                counters.received += 1
            started = perf_counter()
            try:
                result, error = step.call(value), None
            except _FAILURES as caught:
                result, error = None, caught
            step.clock(perf_counter() - started, weight)
            if error is not None or not self._plain.has(result):
                return True, _Unusual(index, value, result, error)
            value, up = result, counters
        self._wires.outlet.put_nowait(value)
        assert up is not None
        up.succeeded += 1
        self._adapt(1, perf_counter() - began)
        return True, None

    # --- many items, timed as one

    def _burst(self, limit: int) -> tuple[bool, _Unusual | None]:
        """Run the written-out loop over up to `limit` items, then book them."""
        inlet, steps = self._wires.inlet, self._steps
        lot = inlet.lot(limit)
        if lot is None:
            return False, None
        if lot.batch is not None and Err in map(type, lot.batch):
            self._careful = len(lot.batch)
            inlet.close_lot(lot)
            return True, None
        progress = _Progress(lot, len(steps))
        stopped: tuple[int, Any, Any] | None = None
        error: BaseException | None = None
        runtime = self._wires.runtime
        runtime.burst = partial(self._book_midway, progress)
        began = perf_counter()
        try:
            stopped = self._loop(
                lot.items,
                progress.outputs.append,
                runtime.stop_flag,
                self._plain.known,
                SKIP,
                progress.skipped,
                *self._calls,
            )
        except _FAILURES as caught:
            place = failed_step(caught, self._trusted)
            if place is None:
                raise  # not a step's: the loop itself is at fault
            error, stopped = caught, (*place, None)
        finally:
            seconds = perf_counter() - began
            runtime.burst = None
            self._book(progress, stopped[0] if stopped else None)
            inlet.close_lot(lot)
        taken = lot.taken
        self._adapt(taken, seconds)
        self._untimed += taken
        if seconds > LAG:
            self._lagged(seconds)
        if stopped is None:
            return taken > 0, None
        index, value, result = stopped
        if error is None:
            self._plain.has(result)  # if it is, the next one of its type stays in the burst
        return True, _Unusual(index, value, result, error)

    def _lagged(self, seconds: float) -> None:
        """Somebody held the loop in the middle of a burst; the next items are timed one by one and may tell who."""
        self._careful = _WATCHED
        if len(self._steps) == 1:
            self._steps[0].desk.lagged(seconds)
        else:
            self._steps[-1].desk.lagged(seconds, among=[step.desk.name for step in self._steps])

    def _book_midway(self, progress: _Progress) -> None:
        """A handler has asked for a snapshot: book the burst so far, with the item at work in that handler's step."""
        self._book(progress, step_at_work(self._trusted))

    def _book(self, progress: _Progress, at: int | None) -> None:
        """Count what a burst has done since the last time; one item is still in step `at`, or none.

        Upstream first, so that no reading in another thread sees an item received that was not emitted.
        """
        self._wires.inlet.count_lot(progress.lot)
        last = len(self._steps) - 1
        entered = progress.lot.taken
        for index, step in enumerate(self._steps):
            counters, booked = step.counters, progress.booked[index]
            skipped = progress.skipped[index]
            left = entered - (at == index)
            if index:
                counters.received += entered - booked[0]
            counters.succeeded += left - booked[1]
            counters.skipped += skipped - booked[2]
            through = left - skipped
            if index < last:
                counters.emitted += through - booked[3]
            elif self._wires.outlet.keeps:
                self._wires.outlet.put_many(progress.outputs)
                progress.outputs.clear()
            else:
                self._wires.outlet.put_count(through - booked[3])
            progress.booked[index] = (entered, left, skipped, through)
            entered = through

    def _adapt(self, taken: int, seconds: float) -> None:
        """Bursts grow while they are short, and shrink to single, timed items when they are not."""
        if seconds < _SHORT:
            if taken >= self._size and self._size < _BURST:
                self._size *= 2
        elif seconds > _LONG and self._size > 1:
            self._size = max(1, int(self._size * _LONG / seconds))

    # --- the thorough path: errors, skips, generators

    async def _treat(self, unusual: _Unusual) -> None:
        """Finish one item that has left the fast path."""
        index, item, result = unusual.index, unusual.item, unusual.result
        if index < 0:
            await self._flow(item, 0)
            return
        desk, emit = self._steps[index].desk, self._emitter(index)
        if unusual.error is not None:
            await desk.failed(Err.of(unusual.error, item=item, stage=desk.name), emit)
            return
        if is_pending(result):
            try:
                result = await result
            except _FAILURES as error:
                if is_being_cancelled(error):
                    raise
                await desk.failed(Err.of(error, item=item, stage=desk.name), emit)
                return
        if isinstance(result, Last):
            self._ended = True
            result = result.value
        await desk.settle(item, result, 1, emit)

    async def _flow(self, value: Any, index: int) -> bool:
        """Take one item, already received by step `index`, from there on; False when nobody takes outputs any more."""
        step = self._steps[index]
        if isinstance(value, Err):
            await step.desk.pass_on(value, self._emitter(index))
        elif step.many:
            await self._flow_many(value, step, self._emitter(index))
        else:
            began = perf_counter()
            try:
                result, error = step.call(value), None
            except _FAILURES as caught:
                result, error = None, caught
            step.clock(perf_counter() - began)
            await self._treat(_Unusual(index, value, result, error))
        return not self._wires.outlet.closed and not any(other.desk.stopped for other in self._steps)

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
                if not await emit(output):
                    return  # nobody takes it any more: the item is in flight, and becomes `cancelled`
                if self._ended:
                    break
                if pace.due():
                    await pace.rest()
        except _FAILURES as error:
            if is_being_cancelled(error):
                raise
            failure = Err.of(error, item=value, stage=desk.name)
        finally:
            generator.close()
        step.clock(seconds)
        if failure is not None:
            await desk.failed(failure, emit)
        else:
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
