"""Loop workers: up to `concurrency` coroutines that take items from one inbound edge.

The rule kept here: workers are started when there is work for one more, and reused; never a task per item. Without
`ordered` a worker settles its own item and waits for room itself: that is the backpressure.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

from pipeline.channel import EMPTY
from pipeline.pace import CrowdPacer, Pacer
from pipeline.protocols import Seat, Wires
from pipeline.result import Err
from workers.base import HandlerKind, Outcome, WorkerState, is_pending
from workers.loop import LoopPerformer, is_being_cancelled
from workers.pooled import DONE, PARTIAL_LIMIT, Job

from .control import SKIP, KillSwitch
from .desk import LAG, Desk
from .flow import Step
from .lane import Lane
from .line import Line

__all__ = ["CrewNode"]

_SAMPLE = 64
"""After this many items, one in so many is timed."""


class CrewNode:
    """One stage's loop workers in one run."""

    def __init__(self, seat: Seat, wires: Wires) -> None:
        self._seat = seat
        self._wires = wires
        self._options = seat.stage.options
        self._handlers = seat.stage.handlers
        self._desk = Desk(seat, seat.stage.rule(seat.default_policy), wires, seat.index)
        self._workers: list[asyncio.Task[None]] = []
        self._line: Line | None = None
        self._lanes: list[Lane] = []
        assert wires.runtime.loop is not None
        self._crowd = CrowdPacer(wires.runtime.loop)
        self._crowd.size = max(self._options.concurrency, self._crowd.size)
        self._room: asyncio.Event = asyncio.Event()
        if self._options.ordered and self._options.concurrency > 1:
            self._line = Line(self._desk, wires.inlet, wires.outlet, ordered=True, on_settled=self._room.set)
        # A waiting item may need as many places as there are workers, or the buffer and the item that holds the line.
        self._limit = max(self._options.concurrency, seat.stage.capacity + 1)

    async def run(self) -> None:
        line = self._line
        emitter = self._start(line.run(), "emitter") if line else None
        eager = len(self._handlers) > 1 or self._options.setup is not None
        for _ in range(self._options.concurrency if eager else 1):
            self._hire()
        done = 0
        while done < len(self._workers):  # workers hire workers
            await asyncio.wait(self._workers[done:])
            done = sum(task.done() for task in self._workers)
        if line is not None and emitter is not None:
            line.close()
            await asyncio.wait((emitter,))
        self._desk.close()

    def abort(self) -> None:
        for lane in self._lanes:
            lane.give_way()

    def _start(self, coroutine: Any, name: str) -> asyncio.Task[None]:
        return self._wires.runtime.start_task(coroutine, name=f"{self._seat.name}:{name}", group=self._seat.index)

    def _hire(self) -> None:
        number = len(self._workers)
        self._workers.append(self._start(self._work(number), f"worker-{number}"))

    # --- one worker

    async def _work(self, number: int) -> None:
        handler = self._handlers[number % len(self._handlers)]
        state = WorkerState(self._seat.name, number, self._wires.runtime)
        performer = LoopPerformer(handler, state)
        try:
            await performer.open()
        except Exception as error:
            self._desk.broke(error, "setup")
            return
        try:
            if self._line is None and performer.simple and len(self._handlers) == 1:
                await self._lane(performer).run()
            elif self._line is None:
                await self._take_items(performer)
            else:
                await self._take_in_order(performer, self._line)
        finally:
            try:
                await performer.close()
            except Exception as error:
                self._desk.broke(error, "teardown")

    def _hire_for_more(self) -> None:
        if len(self._workers) < self._options.concurrency:
            self._hire()

    # --- one call, one value: lanes

    def _lane(self, performer: LoopPerformer) -> Lane:
        lane = Lane(
            [Step(self._seat, self._desk, performer)],
            self._wires.inlet,
            self._wires.outlet,
            self._wires.runtime,
            self._suspended,
            crowd=self._crowd,
            hire=self._hire_for_lane if len(self._workers) < self._options.concurrency else None,
            waits=len(self._workers) > 1,
        )
        self._lanes.append(lane)
        return lane

    def _suspended(self, lane: Lane, at: int) -> None:
        del lane, at  # it is one of several, and this its only step
        self._hire_for_more()

    def _hire_for_lane(self) -> None:
        self._hire_for_more()
        if len(self._workers) >= self._options.concurrency:
            for lane in self._lanes:
                lane.hire = None

    async def _take_items(self, performer: LoopPerformer) -> None:
        inlet, outlet, desk = self._wires.inlet, self._wires.outlet, self._desk
        counters, plain = desk.counters, desk.plain
        watch = _Watch(performer, desk)
        pace = Pacer()
        shared = len(self._handlers) > 1
        while not outlet.closed:
            item = inlet.pop()
            if item is EMPTY:
                if not await inlet.wait_items():
                    return
                pace.restart()
                continue
            self._hire_for_more()
            if isinstance(item, Err):
                await desk.pass_on(item, outlet.put)
            elif not performer.simple:
                await self._thorough(performer, item)
            else:
                # One call, one value: the common case, without the machinery of attempts.
                began = watch.begin()
                try:
                    result = performer.call(item)
                    if watch.awaits(result):
                        result = await result
                except asyncio.CancelledError as error:
                    await self._made_up(error, item)
                except Exception as error:
                    watch.end(began)
                    await desk.failed(Err.of(error, item=item, stage=desk.name), outlet.put)
                else:
                    watch.end(began)
                    if plain.has(result) and outlet.room() > 0:
                        outlet.put_nowait(result)
                        counters.succeeded += 1
                    else:
                        await desk.settle(item, result, 1, outlet.put)
            if shared or pace.due():
                await pace.rest()

    async def _made_up(self, error: asyncio.CancelledError, item: Any) -> None:
        """A cancellation that nobody asked for is the handler's failure; any other goes on."""
        if is_being_cancelled(error):
            raise error
        await self._desk.failed(Err.of(error, item=item, stage=self._desk.name), self._wires.outlet.put)

    async def _thorough(self, performer: LoopPerformer, item: Any) -> None:
        """Retries, timeouts, generators."""
        desk, outlet = self._desk, self._wires.outlet
        ending: list[Err | KillSwitch] = []  # what the generator yielded to end itself
        pace = Pacer()

        async def send(output: Any) -> bool:
            if output is SKIP:
                return True
            if isinstance(output, (Err, KillSwitch)):
                ending.append(output)
                return False
            if pace.due():
                await pace.rest()
            return await outlet.put(output)

        outcome = await performer.perform(item, send)
        if outcome.held > LAG:
            desk.lagged(outcome.held)
        counters = desk.counters
        counters.retried += outcome.retried
        counters.latency.add(outcome.seconds)
        if ending and isinstance(ending[0], KillSwitch):
            desk.kill(ending[0])
        elif ending and isinstance(ending[0], Err):
            await desk.failed(desk.complete(ending[0], item, outcome.attempts), outlet.put)
        elif outcome.error is not None:
            err = Err.of(outcome.error, item=item, stage=desk.name, attempts=outcome.attempts)
            await desk.failed(err, outlet.put, timed_out=outcome.timed_out)
        elif not outcome.many:
            await desk.settle(item, outcome.value, outcome.attempts, outlet.put)
        elif not outlet.closed:
            counters.succeeded += 1

    async def _take_in_order(self, performer: LoopPerformer, line: Line) -> None:
        inlet, outlet = self._wires.inlet, self._wires.outlet
        watch = _Watch(performer, self._desk)
        pace = Pacer()
        while not outlet.closed:
            if self._is_full(line):
                self._room.clear()
                await self._room.wait()  # bounded by the stop, which cancels this task
                continue
            item = inlet.pop()
            if item is EMPTY:
                if not await inlet.wait_items():
                    return
                pace.restart()
                continue
            job = Job(item)
            line.add(job)
            self._hire_for_more()
            if isinstance(item, Err):
                job.passing, job.value, job.outcome = True, item, DONE
            elif performer.simple:
                await self._perform_simply(job, performer, watch)
            else:
                job.outcome = await self._perform_for(job, performer, line)
            line.news(job)
            if pace.due():
                await pace.rest()

    def _is_full(self, line: Line) -> bool:
        return line.outstanding >= self._limit or 0 < line.waiting >= self._seat.stage.capacity

    async def _perform_simply(self, job: Job, performer: LoopPerformer, watch: _Watch) -> None:
        began = watch.begin()
        try:
            result = performer.call(job.item)
            if watch.awaits(result):
                result = await result
        except asyncio.CancelledError as error:
            if is_being_cancelled(error):
                raise
            job.outcome = _failure(error)
        except Exception as error:
            job.outcome = _failure(error)
        else:
            job.value, job.outcome = result, DONE
        watch.end(began)

    async def _perform_for(self, job: Job, performer: LoopPerformer, line: Line) -> Outcome:
        left = asyncio.Event()

        async def send(output: Any) -> bool:
            job.add_output(output)
            line.news(job)
            while len(job.outputs) >= PARTIAL_LIMIT:
                left.clear()
                await left.wait()
            return job.spoiled is None and not job.booked and not self._wires.outlet.closed

        if performer.handler.kind.many:
            job.grant = lambda _: left.set()
        outcome = await performer.perform(job.item, send)
        if outcome.held > LAG:
            self._desk.lagged(outcome.held)
        if outcome.error is not None:
            outcome.trace = Err.of(outcome.error).trace
        return outcome


def _failure(error: BaseException) -> Outcome:
    return Outcome(error=error, trace=Err.of(error).trace)


class _Watch:
    """Times a sample of the calls, and names a plain function that holds the loop."""

    __slots__ = ("_count", "_desk", "_plain")

    def __init__(self, performer: LoopPerformer, desk: Desk) -> None:
        self._plain = performer.handler.kind is HandlerKind.PLAIN
        self._desk = desk
        self._count = 0

    def begin(self) -> float:
        """The time, for the calls that are timed; 0.0 for the others. Plain functions are all timed here."""
        self._count += 1
        return perf_counter() if self._plain or self._count <= _SAMPLE or not self._count % _SAMPLE else 0.0

    def end(self, began: float) -> None:
        if began:
            seconds = perf_counter() - began
            self._desk.counters.latency.add(seconds, 1 if self._plain or self._count <= _SAMPLE else _SAMPLE)
            if self._plain and seconds > LAG:
                self._desk.lagged(seconds)

    def awaits(self, result: Any) -> bool:
        """Whether the call's result is still to be awaited; if so, it does not hold the loop."""
        if not self._plain:
            return True
        if is_pending(result):
            self._plain = False
            return True
        return False
