"""Fence: interrupt the code inside a `with` block, and know every reason why.

The rule kept here: a fence puts at most one `cancel()` into its task's counter, takes exactly that one out when it is
left, and swallows a `CancelledError` only if the counter then shows that nobody else has asked for one.

Where the abstraction leaks: the counter has no names on it. A body that takes our request out with `uncancel()` while
a stranger puts one in makes the two look alike, and the stranger's is then taken for ours; `asyncio.timeout` does so
too. A fence belongs to one task: do not `yield` inside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from .current import Stopped, pop_reasons, push_reasons, tell_who_stopped
from .ending import Ending
from .reason import CancelReason, CancelType, check_reason
from .triggers import Trigger

__all__ = ["Fence"]


class Fence:
    """Interrupts the task that enters it at its next await, when a trigger fires or `cancel()` is called.

        with Fence(TimeoutTrigger(30), EventTrigger(shutdown, code="shutdown")) as fence:
            answer = await llm.generate(prompt)
        await save(answer, stopped_by=fence.reasons)

    Leaving the block swallows the `CancelledError` that the fence caused and no other, so look at `cancelled`. It is
    true even if the body got to its end first: a body that never awaits cannot be interrupted. Whether it was cut short
    by this fence is in `cancelled_caught`.
    Raises RuntimeError when entered twice or outside a task, and whatever a trigger raises while it is armed.
    """

    def __init__(self, *triggers: Trigger) -> None:
        for trigger in triggers:
            _check_trigger(trigger)
        self._triggers = triggers
        self._silent: dict[int, Trigger] = {}  # armed, and not heard of yet
        self._reasons: list[CancelReason] = []
        self._sealed: tuple[CancelReason, ...] | None = None  # what the reasons were when the fence was left
        self._entered = False
        self._opened = ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None  # Any: the result of the task is no business of ours
        self._task_name = ""
        self._baseline = 0  # requests that were in the counter before us
        self._pending: asyncio.Handle | None = None
        self._delivered = False
        self._caught = False
        self.stopped = Stopped()
        self.ending = Ending()
        """For `EndTrigger`: the end is when the block is left."""

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        """Every reason from before the start until the block was left, in order; the first is the primary one."""
        return tuple(self._reasons) if self._sealed is None else self._sealed

    @property
    def cancelled(self) -> bool:
        return bool(self.reasons)

    @property
    def cancelled_caught(self) -> bool:
        """Whether leaving the block swallowed a cancellation: the body was cut short by this fence. False inside it."""
        return self._caught

    def cancelled_by(self, code: str) -> bool:
        """Whether one of the reasons has this code."""
        return any(reason.code == code for reason in self.reasons)

    def cancel(self, reason: str | CancelReason | None = None, *, code: str | None = None) -> None:
        """Record a reason at once and interrupt the body at its next await. Safe from any thread or signal handler.

        Before the block it holds from its start on; after it, nothing happens. Raises TypeError for other reasons.
        """
        self._reasons.append(_as_reason(reason, code))
        self._interrupt_soon()

    def explain(self) -> str:
        """The reasons as an indented tree: what fired first, what followed, and what inside the block that stopped."""
        return "\n".join(self._lines())

    def __enter__(self) -> Self:
        task = _running_task()
        if self._entered:
            raise RuntimeError("this Fence has been entered before, and serves once: make a new one for each `with`")
        self._entered = True
        self._task, self._task_name, self._baseline = task, task.get_name(), task.cancelling()
        self._loop = task.get_loop()
        with ExitStack() as opening:  # what is done here is undone when a later step fails, else by `__exit__`
            opening.callback(self._seal)
            opening.callback(pop_reasons, push_reasons(self._open_reasons, self))
            for index, trigger in enumerate(self._triggers):
                self._look_or_arm(index, trigger, opening)
            self._opened = opening.pop_all()
        if self._reasons:
            self._interrupt_soon()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            with self._opened:  # disarm all, whatever one of them raises; then seal
                self._look_once_more()
        finally:
            ours = self._rebalance()
        if not isinstance(exc, asyncio.CancelledError):
            return False
        self._caught = ours
        if not ours:
            tell_who_stopped(self._lines)
        return ours

    # --- what scopes inside ask

    @property
    def interrupting(self) -> bool:
        """Whether the cancellation of the body was requested by this fence."""
        return self._delivered

    # --- hearing and interrupting

    def _look_or_arm(self, index: int, trigger: Trigger, opening: ExitStack) -> None:
        reason = trigger.check()
        if reason is not None:
            check_reason(reason)
            self._reasons.append(reason)  # and go on: the others are to be heard all the same
            return
        self._silent[index] = trigger
        opening.callback(trigger.arm(partial(self._heard, index)).disarm)

    def _heard(self, index: int, reason: CancelReason) -> None:
        # No lock, here or in `cancel()`, which must be safe in a signal handler: appending is atomic, and once the
        # fence is sealed nobody looks at this list again, so what comes late from another thread changes nothing.
        check_reason(reason)
        self._silent.pop(index, None)
        self._reasons.append(reason)
        if _is_between_tasks(self._loop):
            self._deliver()  # at once, so that an event set in the body is in time for the body's very next await
        else:
            self._interrupt_soon()

    def _interrupt_soon(self) -> None:
        """Have a callback interrupt the task. Called from anywhere: the body itself, other tasks, threads, signals.

        A task must not be cancelled while it runs: before 3.13 the CancelledError that waits for its next await
        survives `uncancel()`. Nor is it enough that another task runs, for that may be an eager one, started by the
        body and on top of it. The callback is queued before the body's next wake-up, so it is not late.
        """
        loop = self._loop
        if loop is None or self._pending is not None:
            return  # not entered yet, and `__enter__` will ask; or left; or asked already
        with suppress(RuntimeError):  # the loop was closed under us: there is no next await to interrupt
            self._pending = loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # No task runs now, so the request is raised in the body before any more of its code runs: `__exit__` never
        # finds one that is counted and still to be raised. Once sealed, the body has left and must have its peace.
        if self._task is not None and self._sealed is None and not self._delivered:
            self._delivered = self._task.cancel(self._reasons[0].message)

    def _look_once_more(self) -> None:
        """Record what happened since the last await, of which no callback has told us yet: that is in time, too."""
        for trigger in tuple(self._silent.values()):
            reason = trigger.check()
            if reason is not None:
                check_reason(reason)
                self._reasons.append(reason)

    def _seal(self) -> None:
        self._sealed = tuple(self._reasons)
        if self._pending is not None:
            self._pending.cancel()
        message = f"a fence in task {self._task_name!r} was left"
        self.ending.tell(CancelReason(message, CancelType.FENCE, origin="Fence", causes=self._sealed))

    def _rebalance(self) -> bool:
        """Take our request out of the counter; true if there was one and no other has come in since we were entered."""
        task, self._task, self._loop, self._pending = self._task, None, None, None
        self._silent.clear()
        if task is None or not self._delivered:
            return False
        if task.cancelling() > self._baseline:  # else the body has called `uncancel()` for us
            task.uncancel()
        return task.cancelling() <= self._baseline

    def _open_reasons(self) -> tuple[CancelReason, ...]:
        # A task that was started inside may outlive us; from then on we enclose nothing.
        return tuple(self._reasons) if self._sealed is None else ()

    def _lines(self) -> Iterator[str]:
        name = f"fence in task {self._task_name!r}" if self._entered else "fence, not entered"
        if not self.reasons:
            yield f"{name}: no reason of its own"
        for nth, reason in enumerate(self.reasons):
            first, *causes = reason.lines()
            if nth == 0:
                yield f"{name}: {first}: body {'interrupted' if self._delivered else 'not interrupted'}"
            else:
                yield f"  {reason.at - self.reasons[0].at:.3f} s later: {first}"
            yield from (f"  {line}" for line in causes)
        yield from self.stopped.lines()


def _running_task() -> asyncio.Task[Any]:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    if task is None:
        raise RuntimeError(
            "a Fence interrupts the asyncio task that enters it, and here is none: use it in `async def`"
        )
    return task


def _is_between_tasks(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Are we in a callback of this loop, with every task of it suspended?"""
    try:
        return asyncio.get_running_loop() is loop and asyncio.current_task() is None
    except RuntimeError:  # another thread
        return False


def _check_trigger(trigger: object) -> None:
    if isinstance(trigger, type) or not isinstance(trigger, Trigger):
        raise TypeError(
            f"Fence takes triggers, got {trigger!r}: wrap seconds in TimeoutTrigger, an asyncio.Event in EventTrigger"
        )


def _as_reason(reason: object, code: str | None) -> CancelReason:
    if isinstance(reason, CancelReason):
        return reason if code is None else replace(reason, code=code)
    if reason is not None and not isinstance(reason, str):
        raise TypeError(f"Fence.cancel takes a text, a CancelReason or nothing, got {reason!r}")
    return CancelReason(reason or "cancelled by hand", CancelType.MANUAL, code, origin="Fence.cancel")
