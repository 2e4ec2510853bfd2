"""Calls one handler, one item at a time, on a thread that may block: a worker thread, or a worker process's main one.

The rule kept here: nothing that a handler does gets past `perform` but as an `Outcome`; only a stop does.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from time import monotonic, perf_counter, sleep
from typing import Any, Protocol

from pipeline.cancellation.work import working_on
from pipeline.protocols import StopToken

from .base import Handler, HandlerKind, Outcome, WorkerState, is_pending

__all__ = ["Control", "Performer", "WorkerStopped", "pause"]

_POLL = 0.05
"""Seconds between two looks at the stop token while a retry waits."""


class WorkerStopped(BaseException):
    """The worker was told to stop while it handed on an output; never seen by handlers' `except Exception`."""


Call = Callable[[Any], Any]


class Control(StopToken, Protocol):
    """What a performer tells and asks its owner."""

    @property
    def requests(self) -> Sequence[object]:
        """Empty as long as nothing asks to stop: then `cancelled` need not be looked at."""
        ...

    def attempt_begins(self, attempt: int) -> None:
        """A clock may start for this attempt."""
        ...

    def attempt_ends(self) -> None:
        """The clock may stop: the handler is not at work."""
        ...

    def out_of_memory(self) -> None:
        """The handler has raised a `MemoryError`: a limit, if there is one, must leave room for saying so."""
        ...

    def send(self, output: Any) -> None:
        """Hand on one of many outputs; waits for room, raises `WorkerStopped` when there will be none."""
        ...


class Performer:
    """One worker's handler with its state, and an event loop of its own when the handler is asynchronous."""

    def __init__(self, handler: Handler, state: WorkerState, control: Control) -> None:
        self._handler = handler
        self._state = state
        self._control = control
        self._runner: asyncio.Runner | None = None
        self._expired = False
        self._clock: asyncio.Timeout | None = None
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    @property
    def many(self) -> bool:
        """Whether the handler sends its outputs one by one."""
        return self._handler.kind.many

    def open(self) -> None:
        """Run `setup`; whatever it raises is the caller's. For good: all of this thread's work is asked to end as one."""
        working_on.set(_Asked(self._state.stage, self._control))
        try:
            if self._handler.setup is not None:
                self.finish(self._handler.setup(self._state))
        except BaseException:
            self.dispose()
            raise

    def close(self) -> None:
        """Run `teardown`, which is asked nothing, then close the loop; whatever it raises is the caller's."""
        working_on.set(None)
        try:
            if self._handler.teardown is not None:
                self.finish(self._handler.teardown(self._state))
        finally:
            self.dispose()

    def dispose(self) -> None:
        """Close the loop, if there is one. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def perform(self, item: Any, first_attempt: int = 1) -> Outcome:
        """Call the handler until it succeeds or its retries are used up."""
        handler, state, control = self._handler, self._state, self._control
        attempt = first_attempt
        began = perf_counter()
        while True:
            state.attempt = attempt
            control.attempt_begins(attempt)
            outcome = self._attempt(item)
            control.attempt_ends()
            delay = None if outcome.error is None else handler.retry.delay(attempt, outcome.error)
            if delay is None or control.cancelled or not pause(delay, control):
                outcome.attempts = attempt
                outcome.retried = attempt - first_attempt
                outcome.seconds = perf_counter() - began
                return outcome
            del outcome  # its error holds what the handler had in hand
            attempt += 1

    def run(self, source: Iterator[Any], call: Call, known: Collection[type], unusual: Call, results: list[Any]) -> None:
        """Call `call` with one item after another and add what it returns; an exception becomes an `Outcome`.

        `unusual` makes a result of what is not of a known type. Ends with the source, or when the worker shall stop:
        then no further item begins. The loop pays for nothing else, so that quick items stay quick.
        """
        add, control = results.append, self._control
        requests = control.requests
        while not (requests and control.cancelled):
            try:
                for item in source:
                    result = call(item)
                    if type(result) not in known:
                        result = unusual(result)
                    add(result)
                    if requests and control.cancelled:
                        return
                return
            except BaseException as error:  # see `_attempt`
                attempts = 1
                if isinstance(error, MemoryError):
                    control.out_of_memory()
                    attempts = self._state.attempt  # there was no memory for `perform` to come to its end
                outcome = Outcome(error=error, trace=traceback.format_exc(), attempts=attempts)
                if error.__traceback__ is not None:
                    error.__traceback__ = error.__traceback__.tb_next  # this frame holds the results, and so the error
                add(unusual(outcome))

    def interrupt(self) -> None:
        """Cancel the coroutine that is running, if any. From any thread."""
        running = self._running
        if running is not None:
            loop, task = running
            with contextlib.suppress(RuntimeError):  # the loop has closed in the meantime: nothing to interrupt
                loop.call_soon_threadsafe(task.cancel)

    # --- one attempt

    def _attempt(self, item: Any) -> Outcome:
        self._expired = False
        try:
            if not self._handler.kind.many:
                return Outcome(self.finish(self._handler.call(item, self._state)))
            self._send_all(self._handler.call(item, self._state))
            return Outcome(many=True)
        except WorkerStopped as stop:
            return Outcome(error=stop)
        except BaseException as error:
            # BaseException: a handler's SystemExit must fail its item, not end the worker with other items in hand.
            if isinstance(error, MemoryError):
                self._control.out_of_memory()
            if self._expired and isinstance(error, TimeoutError):
                error = TimeoutError(f"the attempt took more than {self._handler.timeout:g} s")
            return Outcome(error=error, trace=traceback.format_exc(), timed_out=self._expired and isinstance(error, TimeoutError))

    def _send_all(self, outputs: Any) -> None:
        hold = self._handler.holds_back
        held: list[Any] = []
        send: Callable[[Any], None] = held.append if hold else self._control.send
        if self._handler.kind is HandlerKind.GENERATOR:
            iterator: Iterator[Any] = outputs
            with contextlib.closing(outputs):
                for output in iterator:
                    send(output)
        else:
            self._run(self._send_each(outputs, send))
        for output in held:
            self._control.send(output)

    def finish(self, result: Any) -> Any:
        """Await what is awaitable: coroutine functions, and plain functions that return a coroutine."""
        return self._run(result) if is_pending(result) else result

    def _run(self, awaitable: Awaitable[Any]) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(self._guarded(awaitable))

    async def _guarded(self, awaitable: Awaitable[Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._running = (asyncio.get_running_loop(), task)
        try:
            if self._handler.timeout is None:
                return await awaitable
            async with asyncio.timeout(self._handler.timeout) as self._clock:
                try:
                    return await awaitable
                finally:
                    self._expired = self._clock.expired()
        finally:
            self._running = self._clock = None

    async def _send_each(self, outputs: AsyncGenerator[Any, None], send: Callable[[Any], None]) -> None:
        loop = asyncio.get_running_loop()
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                began = loop.time()
                send(output)
                deadline = self._clock.when() if self._clock is not None else None
                if self._clock is not None and deadline is not None:
                    # Waiting for room is not the handler's time. The timer cannot have fired: the loop was in `send`.
                    self._clock.reschedule(deadline + loop.time() - began)


class _Asked:
    """The request to end that whatever a handler calls can see."""

    def __init__(self, stage: str, token: StopToken) -> None:
        self.title = f"the work of stage {stage}"
        self._token = token

    @property
    def asked(self) -> bool:
        return self._token.cancelled

    requested = asked

    @property
    def reason(self) -> str | None:
        return next((reason.message for reason in self._token.reasons), None)

    def context(self) -> _Asked:
        return self

    def wait(self, seconds: float) -> bool:
        return not pause(seconds, self._token)


def pause(seconds: float, token: StopToken) -> bool:
    """Sleep in a thread; False as soon as the token says stop."""
    deadline = monotonic() + seconds
    while (left := deadline - monotonic()) > 0:
        if token.cancelled:
            return False
        sleep(min(left, _POLL))
    return not token.cancelled
