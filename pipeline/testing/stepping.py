"""A loop that counts its steps, acts before one of them, and may change what nobody promises about their order.

The rules kept here:

- A step is one callback that the loop runs: of a task, a timer, a descriptor, anything. Between two steps nobody is at
  work, so what happens there is what a signal handler or another thread could do.
- A seed changes only what asyncio does not promise. Callbacks are called in the order in which they were registered:
  that is documented, and is kept, also between callbacks and tasks. Which of several *tasks* that are ready goes first
  is not; so the steps of different tasks that stand next to each other in the queue may change places. So may tasks in
  a set, whose order is that of their addresses; here it follows the seed. Everything else is as it always is.
- The clock that the library measures with is the explorer's too: it ticks once for each look, by the seed, so that
  slices of time run out at the same places in every run.
"""

from __future__ import annotations

import asyncio
import heapq
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from random import Random
from types import ModuleType
from typing import Any, cast

from .clock import StuckError, VirtualLoop

__all__ = ["SteppingLoop", "Ticks", "label"]

_WINDOW = 8
"""Steps of tasks among which the next one is chosen."""
_TICKS = (1e-7, 1e-5, 2e-4, 3e-3)
"""Seconds that pass between two looks at the clock, by the seed: from nothing to several slices of the loop."""
_PACKAGES = frozenset({"pipeline", "stages", "workers"})


class SteppingLoop(VirtualLoop):
    """One run's loop. `seed` 0 keeps asyncio's own order."""

    def __init__(self, *, seed: int, limit: float, most_steps: int) -> None:
        super().__init__(patience=min(limit, 2.0), limit=limit)
        self.steps = 0
        self.real = False
        """Threads or processes have taken part: another run may take other steps."""
        self.saw_tasks = False
        self.before_step: Callable[[int, asyncio.Handle], None] | None = None
        """Called with a step's number, from 0, and its handle. None: steps are not counted now."""
        self._most_steps = most_steps
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._made = 0
        self._order = Random(seed) if seed else None
        self._salt = seed * 2 + 1
        # Private in every version so far: where the loop keeps what is to be called. Said plainly, should it move.
        if type(getattr(self, "_ready", None)) is not deque:
            self.close()
            raise AssertionError("this version of asyncio does not keep its callbacks in _ready: there is nothing to explore")
        self._ready = _Ready(self._next_step, self._order)
        self.set_task_factory(cast("Any", _make_task))

    def number(self) -> int:
        """One for each task and future: their hash, so that sets of them have the same order in every run."""
        self._made += 1
        return (self._made * 2654435761 * self._salt) % (1 << 61)

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, context=context)
        heapq.heappush(self._timers, (when, len(self._timers), timer))
        return timer

    def next_timer(self) -> float | None:
        """When the next timer is due that still lies ahead; None without one."""
        timers = self._timers
        while timers and (timers[0][2].cancelled() or timers[0][0] <= self.time()):
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def leap(self) -> bool:
        """Let the next timer be due now, whatever else is ready; False when there is none."""
        when = self.next_timer()
        if when is not None:
            self._clock.now = when
        return when is not None

    def _next_step(self, handle: asyncio.Handle) -> None:
        self.saw_tasks = self.saw_tasks or is_task_step(handle)
        if self.before_step is not None:
            step, self.steps = self.steps, self.steps + 1
            if step == self._most_steps:
                raise self._stuck(f"not done after {step} steps; these tasks are left:")
            self.before_step(step, handle)

    def _at_work(self) -> bool:
        self.real = self.real or bool(self._jobs) or any(_has_others(run) for run in self._runs)
        return super()._at_work()

    def _stuck(self, why: str) -> StuckError:
        self.before_step = None  # what is closed down after this error is nobody's step
        return super()._stuck(why)


def _has_others(run: Any) -> bool:
    return bool(run.threads or run.processes)


class _Ready(deque[asyncio.Handle]):
    """What the loop is to call, in order; looked at and chosen from when it takes the next."""

    def __init__(self, on_step: Callable[[asyncio.Handle], None], order: Random | None) -> None:
        super().__init__()
        self._on_step = on_step
        self._order = order

    def popleft(self) -> asyncio.Handle:
        handle = super().popleft() if self._order is None else self._choose(self._order)
        if not handle.cancelled():
            self._on_step(handle)
        return handle

    def _choose(self, order: Random) -> asyncio.Handle:
        tasks = 0
        for handle in self:
            if tasks == _WINDOW or not is_task_step(handle):
                break
            tasks += 1
        at = order.randrange(tasks) if tasks > 1 else 0
        self.rotate(-at)
        handle = super().popleft()
        self.rotate(at)
        return handle


def is_task_step(handle: asyncio.Handle) -> bool:
    """Whether a handle is the next step of a task; asyncio's own debug output tells it in the same way."""
    return isinstance(getattr(getattr(handle, "_callback", None), "__self__", None), asyncio.Task)


def label(handle: asyncio.Handle) -> str:
    """What a step is, in words that are the same in every run."""
    callback: Any = getattr(handle, "_callback", None)
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        task = cast("asyncio.Task[Any]", owner)
        name = task.get_name()
        # asyncio counts the tasks that nobody has named, over all loops.
        return f"a step of task {getattr(task.get_coro(), '__qualname__', '?') if name.startswith('Task-') else repr(name)}"
    return f"the callback {getattr(callback, '__qualname__', None) or type(callback).__qualname__}"


# --- tasks and futures in sets


class _Future(asyncio.Future[Any]):
    def __init__(self, *, loop: SteppingLoop) -> None:
        self._number = loop.number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    def __init__(self, coroutine: Any, *, loop: SteppingLoop, **options: Any) -> None:
        self._number = loop.number()
        super().__init__(coroutine, loop=loop, **options)

    def __hash__(self) -> int:
        return self._number


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
    return _Task(coroutine, loop=cast("SteppingLoop", loop), **options)


# --- the library's own clock


class Ticks:
    """Stands in for `time.perf_counter` in the library's modules."""

    def __init__(self) -> None:
        self._now = 0.0
        self._order: Random | None = None

    def restart(self, seed: int) -> None:
        """A new run begins."""
        self._now = 0.0
        self._order = Random(seed) if seed else None

    def __call__(self) -> float:
        self._now += _TICKS[0] if self._order is None else self._order.choice(_TICKS)
        return self._now

    def missed(self) -> bool:
        """While they are installed: whether another module has been loaded since."""
        return bool(_that_measure())

    @contextmanager
    def installed(self) -> Generator[None, None, None]:
        """Every module of the library that measures with `perf_counter` gets these ticks instead."""
        modules = _that_measure()
        try:
            for module in modules:
                setattr(module, "perf_counter", self)  # noqa: B010
            _forget_compiled()
            yield
        finally:
            for module in modules:
                setattr(module, "perf_counter", time.perf_counter)  # noqa: B010
            _forget_compiled()


def _that_measure() -> list[ModuleType]:
    """The library's modules that look at the real clock."""
    modules = [module for name, module in sys.modules.copy().items() if name.partition(".")[0] in _PACKAGES]
    return [module for module in modules if vars(module).get("perf_counter") is time.perf_counter]


def _forget_compiled() -> None:
    """Loops that were written out for a row of stages have their clock built in."""
    compiled: Any = getattr(sys.modules.get("stages.burst"), "compile_loops", None)
    if compiled is not None:
        compiled.cache_clear()
