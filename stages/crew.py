"""Loop workers: up to `concurrency` coroutines that take items from one inbound edge.

The rule kept here: workers are started when there is work for one more, and reused; never a task per item. Without
`ordered` a worker settles its own item and waits for room itself: that is the backpressure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pipeline.channel import EMPTY
from pipeline.pace import Pacer, Rounds
from pipeline.protocols import Seat, Wires
from pipeline.result import Err
from workers.base import WorkerState
from workers.loop import LoopPerformer

from .control import SKIP, KillSwitch
from .desk import LAG, Desk
from .flow import Step
from .gate import gate_for
from .lane import Lane
from .line import Line
from .ordered import OrderedWorker

__all__ = ["CrewNode"]

class CrewNode:
    """One stage's loop workers in one run."""

    def __init__(self, seat: Seat, wires: Wires) -> None:
        self._seat = seat
        self._wires = wires
        self._options = seat.stage.options
        self._handlers = seat.stage.handlers
        self._desk = Desk(seat, seat.stage.rule(seat.default_policy), wires, seat.index)
        self._workers: list[asyncio.Task[None]] = []
        self._at_work = 0
        self._all_gone: asyncio.Future[None] | None = None
        self._line: Line | None = None
        self._crew: list[Lane | OrderedWorker] = []
        self._gate = gate_for(seat, wires.runtime)
        assert wires.runtime.loop is not None
        self._rounds = Rounds(wires.runtime.loop)
        self._room: asyncio.Event = asyncio.Event()
        """Of an ordered stage: an item has left the line."""
        if self._options.ordered and self._options.concurrency > 1:
            self._line = Line(self._desk, wires.inlet, wires.outlet, ordered=True, on_settled=self._room.set)
            self._line.wanted = False

    async def run(self) -> None:
        line = self._line
        emitter = self._start(line.run(), "emitter") if line else None
        eager = len(self._handlers) > 1 or self._options.setup is not None
        for _ in range(self._options.concurrency if eager else 1):
            self._hire()
        while self._at_work:  # workers hire workers
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone
        if line is not None and emitter is not None:
            line.close()
            await asyncio.wait((emitter,))
        self._desk.close()

    def abort(self) -> None:
        for worker in self._crew:
            if isinstance(worker, Lane):
                worker.give_way(quiet=True)

    def _start(self, coroutine: Any, name: str, on_end: Callable[[Any], None] | None = None) -> asyncio.Task[None]:
        name = f"{self._seat.name}:{name}"
        return self._wires.runtime.start_task(coroutine, name=name, group=self._seat.index, on_end=on_end)

    def _worker_ended(self, _: asyncio.Task[None]) -> None:
        self._at_work -= 1
        if not self._at_work and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    def _hire(self) -> None:
        number = len(self._workers)
        handler = self._handlers[number % len(self._handlers)]
        performer = LoopPerformer(handler, WorkerState(self._seat.name, number, self._wires.runtime))
        bare = handler.setup is None and handler.teardown is None
        work = self._worker(performer) if bare else self._work(performer)
        self._at_work += 1
        self._workers.append(self._start(work, f"worker-{number}", self._worker_ended))

    # --- one worker

    def _worker(self, performer: LoopPerformer) -> Coroutine[Any, Any, None]:
        if self._line is not None:
            return self._in_order(performer, self._line).run()
        if performer.simple and len(self._handlers) == 1:
            return self._lane(performer).run()
        return self._take_items(performer)

    async def _work(self, performer: LoopPerformer) -> None:
        """A worker with its `setup` and `teardown`."""
        try:
            await performer.open()
        except Exception as error:
            self._desk.broke(error, "setup")
            return
        try:
            await self._worker(performer)
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
            rounds=self._rounds,
            waits=bool(self._crew),
        )
        lane.hire = self._hirer()
        self._crew.append(lane)
        return lane

    def _suspended(self, lane: Lane, at: int) -> None:
        del lane, at  # it is one of several, and this its only step
        self._hire_for_more()

    def _hirer(self) -> Callable[[], None] | None:
        return self._hire_for_item if len(self._workers) < self._options.concurrency else None

    def _hire_for_item(self) -> None:
        self._hire_for_more()
        if len(self._workers) >= self._options.concurrency:
            for worker in self._crew:  # do not ask for every item any more
                worker.hire = None

    def _in_order(self, performer: LoopPerformer, line: Line) -> OrderedWorker:
        worker = OrderedWorker(
            performer, self._desk, line, self._wires, self._seat.stage, self._room, self._rounds, self._gate
        )
        worker.hire = self._hirer()
        self._crew.append(worker)
        return worker

    # --- retries, timeouts, generators, several handlers

    async def _take_items(self, performer: LoopPerformer) -> None:
        inlet, outlet = self._wires.inlet, self._wires.outlet
        pace = Pacer()
        while not outlet.closed:
            item = inlet.pop()
            if item is EMPTY:
                if not await inlet.wait_items():
                    return
                pace.restart()
                continue
            self._hire_for_more()
            if isinstance(item, Err):
                await self._desk.pass_on(item, outlet.put)
            else:
                await self._thorough(performer, item)
            if len(self._handlers) > 1 or pace.due():
                await pace.rest()

    async def _thorough(self, performer: LoopPerformer, item: Any) -> None:
        """One item with all that `perform` does for it."""
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

        if self._gate is None:
            outcome = await performer.perform(item, send)
        else:
            outcome = await self._gate.perform(performer, item, send)
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
