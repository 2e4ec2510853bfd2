"""One run under an explorer's eyes: what it was made of, what was done to it, and how it ended.

The rule kept here: a play only looks and writes down. Whether that is how it should be is judged elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from ..cancellation.reason import CancelReason
from ..errors import PipelineCancelled, PipelineFailed
from ..lifecycle import Grace
from ..pipeline import Pipeline
from ..report import RunReport
from ..result import Err
from ..runtime import PipelineRuntime
from .clock import StuckError
from .faults import Calls, Fault
from .laws import broken_laws
from .leaks import LeakCheck
from .stepping import SteppingLoop, label

__all__ = ["CODE", "Make", "Play", "Victim"]

CODE = "explored"
"""The code of the explorer's own reasons."""

# `Any`: items of every type, and coroutines of every result.
Make = Callable[
    [], Pipeline[Any] | tuple[Pipeline[Any], Coroutine[Any, Any, Any]] | tuple[Pipeline[Any], Coroutine[Any, Any, Any], list[Any]]
]

_SETTLE = 0.5
"""Real seconds for what is on its last line."""


@dataclass(frozen=True)
class Victim:
    """A fault, the step before which it comes, and for RAISE the call of a handler within that step."""

    fault: Fault
    step: int
    call: int = 0


class Play:
    """One run. What it has written down is public; `run` writes it, once."""

    def __init__(self, make: Make, seed: int, victim: Victim | None, *, limit: float, most_steps: int) -> None:
        self.seed = seed
        self.victim = victim
        self.victim_label = ""
        self.took_effect = False
        """The fault hit a run that was still going on."""
        self.steps = 0
        self.trace: list[str] = []
        """What each step was."""
        self.calls: dict[int, int] = {}
        """Without a victim: how many calls of handlers each step has begun."""
        self.timed: list[int] = []
        """Without a victim: the steps before which a timer lay ahead."""
        self.real = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.stuck: StuckError | None = None
        self.report: RunReport | None = None
        self.outputs: list[Any] | None = None
        self._collected: list[Any] | None = None
        self.leaks: list[str] = []
        self.seen: list[str] = []
        """Laws that did not hold when the fault came."""
        self.stop_took: float | None = None
        """Seconds on the loop's clock from the fault to the end of the pipeline's run."""
        self.grace = Grace()
        self._make = make
        self._limit = limit
        self._most_steps = most_steps
        self._calls = Calls(victim.call if victim is not None else None)
        self._pipeline: Pipeline[Any] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._loop: SteppingLoop | None = None
        self._runtime: PipelineRuntime | None = None
        self._injected_at: float | None = None
        self._surveyed: list[tuple[int, Calls]] = []

    def run(self) -> None:
        """From the making of the pipeline to the closing of the loop."""
        leaks = LeakCheck(settle=_SETTLE, tasks=True)
        leaks.start()
        try:
            with asyncio.Runner(loop_factory=self._new_loop) as runner:
                runner.run(self._carry())
        except StuckError as error:
            self.stuck = error
        finally:
            self._calls.rest()
            self.leaks = leaks.stop()
        self._write_down()

    def _new_loop(self) -> SteppingLoop:
        self._loop = SteppingLoop(seed=self.seed, limit=self._limit, most_steps=self._most_steps)
        return self._loop

    async def _carry(self) -> None:
        loop = self._loop
        assert loop is not None
        scene = self._make()
        parts: tuple[Any, ...] = scene if isinstance(scene, tuple) else (scene, scene.collect())
        self._pipeline, main = parts[0], parts[1]
        self.outputs = parts[2] if len(parts) > 2 else None
        self._task = loop.create_task(main, name="the explored coroutine")
        loop.before_step = self._before_step
        try:
            await asyncio.wait((self._task,))
        finally:
            loop.before_step = None
            self._calls.rest()

    def _before_step(self, step: int, handle: asyncio.Handle) -> None:
        self._calls.rest()
        self._notice_run()
        victim = self.victim
        if victim is None:
            self._survey(step, handle)
        elif step <= victim.step:
            self.trace.append(label(handle))
            if step == victim.step:
                self.victim_label = self.trace[-1]
                self._inject(victim)

    def _notice_run(self) -> None:
        """The first run that the pipeline has, or is a part of: afterwards a part does not know of it any more."""
        if self._runtime is None and self._pipeline is not None:
            runtime = self._pipeline.runtime
            if runtime.loop is not None:
                self._runtime = runtime
                runtime.closed.add_done_callback(self._keep_outputs)

    def _survey(self, step: int, handle: asyncio.Handle) -> None:
        assert self._loop is not None
        self.trace.append(label(handle))
        if self._loop.next_timer() is not None:
            self.timed.append(step)
        self._calls = Calls()
        self._surveyed.append((step, self._calls))
        self._calls.watch(self._handlers())

    def _inject(self, victim: Victim) -> None:
        pipeline, task, loop, fault = self._pipeline, self._task, self._loop, victim.fault
        assert pipeline is not None
        assert task is not None
        assert loop is not None
        self._injected_at = loop.time()
        going = self._runtime is None or self._runtime.ended is None
        if fault is Fault.LOOK:
            self.seen = broken_laws(pipeline.snapshot())
            self.took_effect = going
        elif fault.cancels:
            handle = pipeline.cancel(CODE, code=CODE, drain=fault is Fault.DRAIN, force=fault is Fault.FORCE)
            # After the end it may still be the first cancel of a part that has never run by itself: not of this run.
            self.took_effect = bool(handle) and going
        elif fault is Fault.TASK:
            self.took_effect = task.cancel(CODE)
        elif fault is Fault.TIME:
            self.took_effect = loop.leap()
        else:
            self._calls.watch(self._handlers())
        if going and self._runtime is not None:
            self._runtime.closed.add_done_callback(partial(self._run_closed, loop))

    def _run_closed(self, loop: SteppingLoop, _: object) -> None:
        assert self._injected_at is not None
        self.stop_took = loop.time() - self._injected_at

    def _keep_outputs(self, _: object) -> None:
        """Also of a run that was stopped: `collect` keeps to itself what had been delivered by then."""
        runtime = self._runtime
        collected = getattr(runtime.assembly and runtime.assembly.sink, "items", None) if runtime is not None else None
        if isinstance(collected, list):
            self._collected = cast("list[Any]", collected)

    def _handlers(self) -> list[Callable[..., Any]]:
        """Those of the stages in the loop, as far as they have any."""
        assembly = self._runtime.assembly if self._runtime is not None else None
        seats = assembly.seats if assembly is not None else ()
        return [handler.function for seat in seats for handler in getattr(seat.stage, "handlers", ())]

    def _write_down(self) -> None:
        loop, task = self._loop, self._task
        assert loop is not None
        self.steps, self.real = loop.steps, loop.real
        assert loop.saw_tasks, "this version of asyncio does not tell whose step a callback is"
        self.calls = {step: calls.number for step, calls in self._surveyed if calls.number}
        if task is not None and task.done():
            if task.cancelled():
                self.error = asyncio.CancelledError()
            else:
                self.error = task.exception()
                self.result = None if self.error else task.result()
        self._notice_run()
        if self._runtime is not None:
            closed = self._runtime.closed
            ended = closed.result() if closed.done() else None
            self.report = ended.report if isinstance(ended, Err) else ended
            self.grace = self._runtime.grace
            if self.outputs is None:
                self.outputs = self._collected
        if self.victim is not None and self.victim.fault is Fault.RAISE:
            self.took_effect = self._calls.raised

    @property
    def reasons(self) -> tuple[CancelReason, ...] | None:
        """Why it stopped, by its report, its result or its error; None when the coroutine has kept that to itself."""
        for told in (self.report, self.result, self.error):
            if isinstance(told, (RunReport, Err, PipelineCancelled, PipelineFailed)):
                return told.reasons
        return None
