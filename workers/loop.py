"""Calls one handler in the run's own loop.

The rule kept here: a cancellation that the run caused passes through; one that a handler makes up is its failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from time import perf_counter
from typing import Any

from .base import Handler, HandlerKind, Outcome, WorkerState, is_pending

__all__ = ["LoopPerformer", "Send", "is_being_cancelled"]

Send = Callable[[Any], Awaitable[bool]]
"""Hands on one of many outputs; False ends the generator."""


class LoopPerformer:
    """One loop worker's handler with its state."""

    def __init__(self, handler: Handler, state: WorkerState) -> None:
        self.handler = handler
        self.state = state
        self.call = handler.bound(state)
        self.simple = handler.simple
        """One call, one value: nothing that `perform` would add."""

    async def open(self) -> None:
        """Run `setup`; whatever it raises is the caller's."""
        await self._hook(self.handler.setup)

    async def close(self) -> None:
        """Run `teardown`; whatever it raises is the caller's."""
        await self._hook(self.handler.teardown)

    async def _hook(self, hook: Callable[[WorkerState], Any] | None) -> None:
        if hook is not None:
            result = hook(self.state)
            if inspect.isawaitable(result):
                await result

    async def perform(self, item: Any, send: Send) -> Outcome:
        """Call the handler until it succeeds or its retries are used up. `seconds` is the handler's own time."""
        handler, state = self.handler, self.state
        attempt, seconds, held = 1, 0.0, 0.0
        while True:
            state.attempt = attempt
            outcome = await self._attempt(item, send)
            seconds += outcome.seconds
            held = max(held, outcome.held)
            delay = None if outcome.error is None else handler.retry.delay(attempt, outcome.error)
            if delay is None:
                outcome.attempts, outcome.retried, outcome.seconds, outcome.held = attempt, attempt - 1, seconds, held
                return outcome
            await asyncio.sleep(delay)
            attempt += 1

    async def _attempt(self, item: Any, send: Send) -> Outcome:
        clock = _Clock(self.handler.timeout)
        outcome = Outcome(many=self.handler.kind.many)
        try:
            if outcome.many:
                await self._send_all(item, send, clock)
            else:
                with clock.running():
                    result = self.call(item)
                clock.note_held()
                with clock.running():
                    outcome.value = await clock.bounded(result) if is_pending(result) else result
        except asyncio.CancelledError as error:
            if is_being_cancelled(error):
                raise
            outcome.error = error
        except Exception as error:
            outcome.error, outcome.timed_out = error, clock.expired
        outcome.seconds = clock.seconds
        outcome.held = clock.held
        if outcome.error is None and clock.overrun and not outcome.many:
            # A plain function cannot be interrupted; that it came back too late is still too late.
            outcome.error, outcome.timed_out = clock.error(), True
        return outcome

    async def _send_all(self, item: Any, send: Send, clock: _Clock) -> None:
        held: list[Any] | None = [] if self.handler.holds_back else None
        async with contextlib.aclosing(self._steps(item, clock)) as outputs:
            async for output in outputs:
                if held is not None:
                    held.append(output)
                elif not await send(output):
                    return
        for output in held or ():
            if not await send(output):
                return

    async def _steps(self, item: Any, clock: _Clock) -> AsyncGenerator[Any, None]:
        """A generator's outputs, the clock running only while the generator does."""
        generator = self.call(item)
        if self.handler.kind is HandlerKind.GENERATOR:
            with contextlib.closing(generator):
                while True:
                    with clock.running():
                        try:
                            output = next(generator)
                        except StopIteration:
                            return
                    clock.note_held()
                    if clock.overrun:
                        raise clock.error()
                    yield output
        else:
            iterator: AsyncIterator[Any] = generator
            async with contextlib.aclosing(generator):
                while True:
                    with clock.running():
                        try:
                            output = await clock.bounded(anext(iterator))
                        except StopAsyncIteration:
                            return
                    yield output


def is_being_cancelled(error: BaseException) -> bool:
    """Whether this is a cancellation of the current task, which must go on; one that nobody asked for is a failure."""
    if not isinstance(error, asyncio.CancelledError):
        return False
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class _Clock:
    """Counts the time of one attempt, and ends an await that takes more than what is left of it."""

    __slots__ = ("_ahead", "_began", "_limit", "expired", "held", "seconds")

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._began = 0.0
        self._ahead = 0.0
        """Seconds that the loop's clock, if it is a virtual one, has gained on ours."""
        self.seconds = 0.0
        self.held = 0.0
        self.expired = False

    def note_held(self) -> None:
        """What ran last ran without giving the loop away."""
        self.held = max(self.held, perf_counter() - self._began)

    @contextlib.contextmanager
    def running(self) -> Any:
        self._began = began = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - began

    @property
    def overrun(self) -> bool:
        return self._limit is not None and self.seconds > self._limit

    def error(self) -> TimeoutError:
        self.expired = True
        return TimeoutError(f"the attempt took more than {self._limit:g} s")

    async def bounded(self, value: Awaitable[Any]) -> Any:
        """Await, within the limit."""
        if self._limit is None:
            return await value
        scope = asyncio.timeout(max(0.0, self._limit - self.seconds - self._ahead))
        time = asyncio.get_running_loop().time
        lead = time() - perf_counter()
        try:
            async with scope:
                return await value
        except TimeoutError:
            if scope.expired():
                raise self.error() from None
            raise
        finally:
            self._ahead += time() - perf_counter() - lead


