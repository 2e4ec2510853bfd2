"""A lane: one task that takes items from an inlet through a row of steps to an outlet.

The rule kept here: while nobody waits, items run in bursts (see `burst`), and everything that can be paid per burst is.
As soon as a handler really suspends, the burst is closed on the spot: what it has done is booked and handed on, what it
has not begun goes back, and whoever owns the lane is told, so that others work while this lane waits. From then on the
lane goes item by item, until its handlers seem to have stopped waiting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

from pipeline.channel import EMPTY
from pipeline.lot import Lot
from pipeline.pace import Pacer, RoundPacer, Rounds
from pipeline.protocols import Inlet, Outlet
from pipeline.result import Err
from pipeline.runtime import PipelineRuntime
from workers.base import is_pending
from workers.loop import is_being_cancelled

from .account import Account
from .burst import SIMPLE, Burst, as_raised, compile_loops
from .control import SKIP, PlainTypes
from .flow import FAILURES, Flow, Step, Unusual
from .tempo import LONG, Tempo

__all__ = ["Lane"]

_AHEAD = 32
"""Items that an iterator is read ahead of a consumer, at most."""


class Lane:
    """One worker over the steps `first` to `end` of a node."""

    def __init__(
        self,
        steps: Sequence[Step],
        inlet: Inlet,
        outlet: Outlet,
        runtime: PipelineRuntime,
        on_suspended: Callable[[Lane, int], None],
        *,
        rounds: Rounds | None = None,
        waits: bool = False,
    ) -> None:
        assert runtime.loop is not None
        self._loop = runtime.loop
        self._runtime = runtime
        self._nodes_steps = steps
        self.inlet = inlet
        self.outlet = outlet
        self._on_suspended = on_suspended
        self.hire: Callable[[], None] | None = None
        """Called for every item while handlers wait; None when nobody more is to be hired."""
        self._turn = RoundPacer(rounds or Rounds(runtime.loop))
        self.waits = waits
        """Handlers are known to suspend: item by item."""
        self._flow = Flow(steps, outlet, self._by_hand)
        self._plain = PlainTypes()
        self._left: list[bool] = []
        """Not empty: the burst under way was closed while it was suspended."""
        self._running: Burst | None = None
        self._coroutine: Any = None
        """The loop that runs, and its coroutine when it has one."""
        self._hand: int | None = None
        self._armed = False
        self._tempo = Tempo()
        self._careful = 0
        """So many of the next items go one by one: an error is among them."""
        self._resting = False
        """At a place where somebody else may run a burst."""
        self._handed: Unusual | None = None
        """Left over from such a burst."""
        self._gone: list[bool] = []
        """Not empty: what was being pulled has been closed."""
        self._cover(0, len(steps))

    def _cover(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self._flow.first, self._flow.end = first, end
        self._steps = steps = self._nodes_steps[first:end]
        kinds = tuple(step.kind for step in steps)
        self._bursts = not any(step.many for step in steps)
        self._loops = compile_loops(kinds, self.outlet.keeps)
        self._calls = [step.call for step in steps]
        self._account = Account([step.counters for step in steps], self.inlet, self.outlet)

    def narrow(self, first: int, end: int, inlet: Inlet, outlet: Outlet) -> None:
        """Cover fewer steps from now on. Not while a burst runs; while one is suspended, it has been closed before."""
        self.inlet, self.outlet = inlet, outlet
        self._flow.outlet = outlet
        self._cover(first, end)
        for step in self._steps:
            step.desk.inlet = inlet

    def take_over(self, other: Lane) -> None:
        """Begin where another lane has been: if a step has ended the stream there, it has ended it here."""
        self._flow.ended_at = other._flow.ended_at

    # --- the loop

    async def run(self) -> None:
        """Until the inlet has ended, or a step, the outlet or the run says stop."""
        try:
            await self._take_items()
        finally:
            if self._handed is not None and inspect.iscoroutine(self._handed.result):
                self._handed.result.close()  # nobody will await it

    async def _take_items(self) -> None:
        runtime, pace = self._runtime, Pacer()
        self._context = runtime.context()
        while not (self._flow.ended or runtime.cancelled):
            inlet, outlet = self.inlet, self.outlet  # not for long: the lane may be narrowed
            taken = True
            if self._handed is not None:
                unusual, self._handed = self._handed, None
                await self._flow.treat(unusual)
            elif self.waits and self.end - self.first == 1:
                taken = await self._item_by_item()
            elif (room := outlet.room()) <= 0:
                self._resting = True
                has_room = await outlet.wait_room()
                self._resting = False
                if not has_room:
                    return
                pace.restart()
                continue
            elif self._careful or not self._bursts:
                item = inlet.pop()
                self._careful = max(self._careful - 1, 0)
                taken = item is not EMPTY
                if taken:
                    await self._flow.enter(item, self.first)
            else:
                single = self._tempo.single
                if runtime.burst is not None:
                    runtime.burst.give_way()
                lot = inlet.lot(1 if single else min(room, self._tempo.size))
                taken = lot is not None
                if lot is not None and not self._has_errors(lot):
                    unusual = await self._burst(lot, self._loops.timed if single else self._loop_for(lot))
                    if unusual is not None:
                        await self._flow.treat(unusual)
            self._resting = True
            if not taken:
                more = await self.inlet.wait_items()
                if self._account.direct:
                    self.give_way()  # the end of the stream, but a consumer still has some of it
                elif not more and self._handed is None:
                    return
                pace.restart()
            elif pace.due():
                await pace.rest()
            self._resting = False

    def _has_errors(self, lot: Lot) -> bool:
        """Whether errors pass by in a lot; if so, all of it goes one by one."""
        if not lot.errors or lot.batch is None or Err not in map(type, lot.batch):
            return False
        self._careful = len(lot.batch)
        self.inlet.close_lot(lot)
        return True

    def _loop_for(self, lot: Lot) -> Burst:
        loops = self._loops
        if loops.wary is loops.fast or lot.batch is None or SIMPLE.issuperset(map(type, lot.batch)):
            return loops.fast
        return loops.wary

    # --- many items, booked as one

    async def _burst(self, lot: Lot, loop: Burst) -> Unusual | None:
        """Run the written-out loop over a lot, then book it; what it could not finish is the caller's."""
        runtime, account, first = self._runtime, self._account, self.first
        account.lot = lot
        self._running, self._coroutine = loop, None
        runtime.burst = self
        stopped: tuple[int, Any, Any] | None = None
        error: BaseException | None = None
        began = perf_counter()
        try:
            run = loop.run(
                lot.items,
                account.outputs.append,
                runtime.stop_flag,
                self._left,
                self._plain.known,
                SKIP,
                account.skipped,
                self._tempo.note,
                began + LONG,
                *self._calls,
            )
            if loop.awaits:
                self._coroutine = run
                self._arm()
                stopped = await run
            else:
                stopped = run
        except BaseException as error_or_stop:
            caught = as_raised(error_or_stop)
            place = loop.failed_step(caught)
            if place is None or not isinstance(caught, FAILURES) or (loop.awaits and is_being_cancelled(caught)):
                self._close(place[0] if place else None)
                raise  # not a step's failure
            error, stopped = caught, (*place, None)
        if account.lot is lot:
            taken = self._close(stopped[0] if stopped else None)
            self._tempo.learn(self._steps, taken, perf_counter() - began, failed=error is not None)
        else:
            # It was suspended, and closed then; the lane may cover fewer steps by now.
            self._left.clear()
            self._tempo.times.clear()
        if stopped is None:
            return None
        at, value, result = stopped
        if error is None:
            self._plain.has(result)  # if it is, the next one of its type stays in the burst
        return Unusual(first + at, value, result, error)

    def book_midway(self) -> None:
        """Somebody asks for a snapshot: book the burst so far, with one item at work in the step where it is."""
        if self._account.lot is not None:
            self._account.book_midway(self._at_work())

    def _at_work(self) -> int | None:
        assert self._running is not None
        waiting = self._coroutine
        if waiting is None:
            return self._running.step_at_work()
        return self._running.step_at_work(waiting.gi_frame if self._account.direct else waiting.cr_frame)

    def _close(self, at: int | None) -> int:
        """The burst is over, or given up where it waits; see `Account.close`."""
        if self._account.lot is None:
            return 0
        if self._runtime.burst is self:
            self._runtime.burst = None
        return self._account.close(at)

    # --- outputs made when they are asked for

    def pull(self, reach: int) -> Iterator[Any] | None:
        """Outputs in the consumer's own time, see `Pullable`; or a burst, run here and now, into the outlet."""
        runtime = self._runtime
        if not self._resting or not self._bursts or self._handed or self._careful or self._flow.ended:
            return None
        if self._tempo.single or runtime.stop_flag or not self._loops.prompt:
            return None
        if runtime.burst is not None:
            runtime.burst.give_way()
        inlet = self.inlet
        limit = min(self.outlet.room(), self._tempo.size)
        if self._loops.pulled is not None:
            limit = min(reach, _AHEAD) if inlet.reads_ahead else reach
        lot = inlet.lot(limit)
        if lot is None or self._has_errors(lot):
            return None
        loop = self._loop_for(lot)
        if self._loops.pulled is None or loop is not self._loops.fast:
            try:
                self._context.run(self._burst(lot, loop).send, None)
            except StopIteration as end:
                self._handed = end.value
            return None
        if inlet.stores:
            inlet.release(lot.limit)  # until the consumer has had them, they take up their room
        self._account.lot, self._account.direct = lot, True
        self._gone = []
        self._running = self._loops.pulled
        self._coroutine = self._loops.pulled.run(lot.items, runtime.stop_flag, self._gone, self._pull_failed, *self._calls)
        runtime.burst = self
        return self._coroutine

    def _pull_failed(self, error: BaseException) -> bool:
        assert self._loops.pulled is not None
        place = self._loops.pulled.failed_step(error)
        if place is None:
            return True  # the consumer's, or its leaving
        at, value = place
        self._end_pull(at)
        if not isinstance(error, FAILURES):
            return True
        self._handed = Unusual(self.first + at, value, None, error)
        return False

    def end_pull(self) -> None:
        """The consumer is done with what it pulled, or leaves it."""
        if self._account.direct:
            self._end_pull(None)

    def _end_pull(self, at: int | None) -> None:
        if self.inlet.stores:
            self.inlet.release(0)
        self._tempo.learn_pulled(self._close(at))
        self._account.direct = False

    # --- handlers that wait

    def _by_hand(self, at: int | None) -> None:
        """The thorough path begins or ends an await in the step at `at`."""
        self._hand = at
        if at is not None:
            self._arm()

    def _arm(self) -> None:
        """If the loop goes round before this step of the task is over, the handler has suspended."""
        if not self._armed:
            self._armed = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._armed = False
        self.give_way()

    def give_way(self, *, quiet: bool = False) -> None:
        """The handler at work has suspended, if one is: close its burst, so that nobody else is held up by it.

        `quiet`: the lane is being stopped, and nobody is to take its place.
        """
        if self._account.direct:
            self._gone.append(True)
            self._end_pull(None)
            return
        if self._account.lot is not None:
            at = self._at_work() or 0
            self._close(at)
            self._left.append(True)
            at += self.first
        elif self._hand is not None:
            at = self._hand
        else:
            return
        if not quiet:
            self.waits = True
            self._tempo.restart()
            self._on_suspended(self, at)

    async def _item_by_item(self) -> bool:
        """Take items one at a time, until there is none (False), or it is time to look around (True)."""
        step, outlet, turn, runtime = self._steps[0], self.outlet, self._turn, self._runtime
        pop, offer, call, known = self.inlet.pop, outlet.offer, step.call, self._plain.known
        counters, awaited, first, stop = step.counters, step.awaited, self.first, runtime.stop_flag
        left = turn.stride
        while True:
            if runtime.burst is not None:
                runtime.burst.give_way()
            item = pop()
            if item is EMPTY:
                return False
            if self.hire is not None:
                self.hire()
            left -= 1
            if type(item) is Err:
                await self._flow.enter(item, first)
                if left <= 0:
                    return True  # errors that only pass by wait for nothing: the caller sees to fairness
                continue
            began = perf_counter() if left <= 0 or not awaited else 0.0
            try:
                result = call(item)
                waited = awaited or is_pending(result)
                if waited:
                    result = await result
            except FAILURES as error:
                if is_being_cancelled(error):
                    raise
                await self._flow.treat(Unusual(first, item, None, error))
            else:
                if began:
                    self._clock(step, perf_counter() - began, waited, turn.stride if awaited else 1)
                if type(result) in known and offer(result):
                    counters.succeeded += 1
                else:
                    self._plain.has(result)
                    await self._flow.treat(Unusual(first, item, result, None))
                    if outlet.closed or self._flow.ended:
                        return True
            if stop:
                return True
            if left <= 0:
                if turn.due():
                    await turn.rest()
                left = turn.stride
                if turn.calm:
                    self.waits = False
                    return True

    @staticmethod
    def _clock(step: Step, seconds: float, waited: bool, weight: int) -> None:
        if waited:
            step.counters.latency.add(seconds, weight)
        else:
            step.clock(seconds, weight)
