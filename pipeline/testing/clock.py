"""A virtual clock: a loop whose time passes only while everybody waits, and then at once.

The rules kept here:

- `loop.time()` moves to the next timer when nothing else is ready, so `asyncio.sleep(3600)` returns at once, and what
  took no waiting took no time. Two runs of the same program see the same times.
- What is real stays real. While threads or processes work for a pipeline, while `asyncio.to_thread` has something to
  do, and inside `real_time()`, the clock runs with the computer's, and no timer is brought forward.
- Nothing waits for ever in silence: when nothing is scheduled, nobody works, and nothing comes, `StuckError` says who
  waits where.

So virtual are: `asyncio.sleep`, `asyncio.timeout`, a stage's `timeout` and the waits of `retry` in the loop,
`batch(within=)`, `TimeoutTrigger`, `DeadlineTrigger` by the loop's clock, and every phase of `Grace`. Real are:
attempts, retries and timeouts in threads and processes, the durations in reports, and triggers that follow the
computer's clock. A stream that never waits never sees time pass: a timeout cannot end it.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from .loops import describe_task

__all__ = ["StuckError", "VirtualLoop", "real_time", "run_virtual"]

T = TypeVar("T")

_PATIENCE = 5.0
"""Real seconds for something to come from outside, when nothing inside will ever happen."""
_TICK = 1e-6
"""Seconds by which a timer may be early."""
_LOOK = 0.005
"""Real seconds between two looks at whether real work is still going on: its end need not wake the loop."""


class StuckError(RuntimeError):
    """Nothing will ever happen on this loop, or it has been at work for too long."""


class RealWork(Protocol):
    """Somebody who has threads or processes: a run."""

    @property
    def ended(self) -> object:
        """None as long as it may go on."""
        ...

    @property
    def outside(self) -> bool:
        """Whether threads or processes are at work for it now."""
        ...


def run_virtual(
    main: Coroutine[Any, Any, T], *, patience: float = _PATIENCE, limit: float | None = None, debug: bool | None = None
) -> T:
    """`asyncio.run` with a virtual clock, from 0; returns what `main` returns.

    `patience`: real seconds to wait for something from outside when nothing inside will ever happen, then `StuckError`.
    `limit`: real seconds for everything, if given: for what never waits, and so never sees a timeout.
    """
    with asyncio.Runner(loop_factory=partial(VirtualLoop, patience=patience, limit=limit), debug=debug) as runner:
        return runner.run(main)


@contextmanager
def real_time() -> Generator[None, None, None]:
    """Inside, the running `VirtualLoop` does not bring timers forward: for threads that it cannot know of."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualLoop):
        raise RuntimeError(f"real_time() is for code that run_virtual() runs; this loop is {type(loop).__qualname__}, whose time is real")
    with loop.holding():
        yield


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop of `run_virtual`; a `loop_factory` for `asyncio.Runner` and test frameworks."""

    def __init__(self, *, patience: float = _PATIENCE, limit: float | None = None) -> None:
        self._clock = _Clock(self._at_work, self._stuck, patience, limit)
        self._holds = 0
        self._jobs: set[asyncio.Future[Any]] = set()
        self._runs: set[RealWork] = set()
        super().__init__(self._clock)
        # asyncio's own tolerance, a nanosecond, is less than a float can tell after three months: a timer would never come.
        self._clock_resolution = _TICK

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now

    def watch_real_work(self, run: RealWork) -> None:
        """A run on this loop says that it begins; see `PipelineRuntime.attach`."""
        self._runs.add(run)

    @contextmanager
    def holding(self) -> Generator[None, None, None]:
        """Time is real inside."""
        self._clock.real_begins()
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        self._clock.real_begins()
        job = super().run_in_executor(executor, func, *args)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def shutdown_default_executor(self, *timeout: float | None) -> None:
        # It waits, with a timeout from 3.12 on, for threads to end: real ones.
        with self.holding():
            await super().shutdown_default_executor(*timeout)

    def _at_work(self) -> bool:
        self._runs = {run for run in self._runs if run.ended is None}
        return self._holds > 0 or bool(self._jobs) or any(run.outside for run in self._runs)

    def _stuck(self, why: str) -> StuckError:
        tasks = sorted(map(describe_task, asyncio.all_tasks(self)))
        return StuckError("\n  ".join([why, *(tasks or ["there is no task"])]))


class _Clock(selectors.DefaultSelector):
    """Where a loop waits, and so where time can pass: for descriptors as usual, for timers by moving the time."""

    def __init__(
        self, at_work: Callable[[], bool], stuck: Callable[[str], StuckError], patience: float, limit: float | None
    ) -> None:
        super().__init__()
        self.now = 0.0
        self._at_work = at_work
        self._stuck = stuck
        self._patience = patience
        self._limit = limit
        self._until = None if limit is None else time.monotonic() + limit
        self._real: float | None = None
        """When real work was last seen going on, by the computer's clock."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._check_limit()
        working = self._keep_up()
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if working:
            ready = super().select(_LOOK if timeout is None else min(timeout, _LOOK))
            self._keep_up()
            return ready
        if timeout is None:
            return self._wait_outside()
        # A step that is too small for the float would stand still for ever.
        self.now = max(self.now + timeout, math.nextafter(self.now, math.inf))
        return []

    def real_begins(self) -> None:
        """Real work begins now: what the loop does until it looks at the clock again counts for it too."""
        if self._real is None:
            self._real = time.monotonic()

    def _keep_up(self) -> bool:
        """While there is real work, time is real, however busy the loop is."""
        working = self._at_work()
        real = time.monotonic() if working or self._real is not None else None
        if real is not None and self._real is not None:
            self.now += real - self._real
        self._real = real if working else None
        return working

    def _wait_outside(self) -> list[tuple[selectors.SelectorKey, int]]:
        patience = self._patience
        if self._until is not None:
            patience = min(patience, max(self._until - time.monotonic(), 0.0))
        ready = super().select(patience)
        if not ready:
            self._check_limit()
            raise self._stuck(
                f"nothing is scheduled, no thread or process is at work, and nothing has come for {self._patience:g} s; these tasks wait:"
            )
        return ready

    def _check_limit(self) -> None:
        if self._until is not None and time.monotonic() > self._until:
            self._until = None  # once: what is closed down after this error needs the loop
            raise self._stuck(f"not done after {self._limit:g} real seconds; these tasks are left:")
