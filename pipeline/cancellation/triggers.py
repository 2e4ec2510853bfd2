"""Triggers: what may ask for a stop. `check` → `arm` → `disarm` is the whole contract.

The rule kept here: a trigger is a definition. It holds no state of a run, so one object may be armed many times and
at once; all that is alive belongs to the handle that `arm` returns, and `disarm` leaves no timer, waiter, task, thread
or signal handler behind.

A trigger of one's own needs no base class and about ten lines:

    class QueueFull:
        def __init__(self, queue: WatchedQueue) -> None:
            self.queue = queue

        def check(self) -> CancelReason | None:
            return CancelReason("queue full", CancelType.EVENT) if self.queue.full() else None

        def arm(self, callback: Callable[[CancelReason], None]) -> TriggerHandle:
            subscription = self.queue.on_full(lambda: callback(CancelReason("queue full", CancelType.EVENT)))
            return TriggerHandle(subscription.cancel)
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Protocol, runtime_checkable

from .reason import CancelReason, CancelType, check_code

__all__ = ["DeadlineTrigger", "EventTrigger", "TimeoutTrigger", "Trigger", "TriggerHandle"]

_DEADLINE_LOOK = 60.0
"""Seconds between two looks at a deadline's clock."""
_EPOCH_LIKE = 1e9
"""A loop's clock counts from the start of the machine or later: this is 31 years."""


class TriggerHandle:
    """One armed trigger. `undo` is called by the first `disarm()`, and by that one only."""

    def __init__(self, undo: Callable[[], object] | None = None) -> None:
        self._undo = undo

    def disarm(self) -> None:
        """Stop watching; afterwards the callback is never called again. Idempotent. Call it where `arm` was called."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


@runtime_checkable
class Trigger(Protocol):
    """Something that may happen and is then a reason to stop. Any object with these two methods will do."""

    def check(self) -> CancelReason | None:
        """The reason, if it has happened already; cheap, and without a trace."""
        ...

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        """Watch from now on, and call `callback` once when it happens. Needs a running event loop.

        A `Fence` takes the call at any time, even inside `arm`, and from any thread, but not from inside a signal
        handler. The triggers of this module call on the loop's thread, between the steps of tasks, never in `arm`.
        """
        ...


@dataclass(frozen=True)
class TimeoutTrigger(Trigger):
    """Fires `delay` seconds after it was armed. Zero or less (a budget used up) has fired already; infinity never fires.

    Raises TypeError for a delay that is no number, ValueError for NaN.
    """

    delay: float
    code: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_delay(self.delay)
        check_code(self.code, "a TimeoutTrigger")

    def check(self) -> CancelReason | None:
        return self._reason() if self.delay <= 0 else None

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        loop = asyncio.get_running_loop()
        if self.delay == math.inf:
            return TriggerHandle()
        return TriggerHandle(loop.call_later(max(self.delay, 0.0), self._fire, callback).cancel)

    def _fire(self, callback: Callable[[CancelReason], None]) -> None:
        callback(self._reason())  # made here and not in `arm`: a reason carries the time at which it came about

    def _reason(self) -> CancelReason:
        return CancelReason(f"timed out after {self.delay:g}s", CancelType.TIMEOUT, self.code, origin="TimeoutTrigger")


@dataclass(frozen=True)
class DeadlineTrigger(Trigger):
    """Fires at a moment: the time of the loop's clock (`loop.time()`) as a number, or a `datetime` with a time zone.

    One deadline may bound many fences and runs; one that has passed has fired already. A `datetime` follows the
    computer's clock, also when that is set while the trigger is armed: it is looked at once a minute.
    Raises TypeError for anything else, a `datetime` without a time zone among it, and ValueError for NaN.
    """

    when: float | datetime
    code: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_deadline(self.when)
        check_code(self.code, "a DeadlineTrigger")

    def check(self) -> CancelReason | None:
        return self._reason() if self.left() <= 0 else None

    def left(self) -> float:
        """Seconds until then; zero or less once it has passed. Needs a running event loop, unless it is a `datetime`."""
        if isinstance(self.when, datetime):
            return (self.when - datetime.now(UTC)).total_seconds()
        return self.when - asyncio.get_running_loop().time()

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        return TriggerHandle(_DeadlineWatch(self, callback, self._reason).stop)

    def _reason(self) -> CancelReason:
        when = f"{self.when:%Y-%m-%d %H:%M:%S %Z}" if isinstance(self.when, datetime) else f"{self.when:g}s on the loop's clock"
        return CancelReason(f"the deadline has passed: {when}", CancelType.TIMEOUT, self.code, origin="DeadlineTrigger")


@dataclass(frozen=True)
class EventTrigger(Trigger):
    """Fires when an `asyncio.Event` is set; it costs one future in the event's own queue of waiters.

    Raises TypeError for anything else. A `threading.Event` can only be waited for by a thread, which nothing could
    stop if the event is never set: let the thread call `loop.call_soon_threadsafe(event.set)` on an asyncio.Event.
    """

    event: asyncio.Event
    code: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_event(self.event)
        check_code(self.code, "an EventTrigger")

    def check(self) -> CancelReason | None:
        return self._reason() if self.event.is_set() else None

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        loop = asyncio.get_running_loop()
        if self.event.is_set():
            return TriggerHandle(loop.call_soon(self._fire, callback).cancel)
        return TriggerHandle(_EventWatch(self.event, partial(self._fire, callback)).stop)

    def _fire(self, callback: Callable[[CancelReason], None]) -> None:
        callback(self._reason())

    def _reason(self) -> CancelReason:
        message = "event set" if self.code is None else f"event {self.code!r} set"
        return CancelReason(message, CancelType.EVENT, self.code, origin="EventTrigger")


class _DeadlineWatch:
    """A timer that is set anew until the moment has come: clocks are set, and `call_later` takes a day at most."""

    def __init__(
        self, trigger: DeadlineTrigger, callback: Callable[[CancelReason], None], reason: Callable[[], CancelReason]
    ) -> None:
        self._trigger = trigger
        self._callback = callback
        self._reason = reason
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle = self._loop.call_soon(self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._trigger.left()
        if left <= 0:
            self._callback(self._reason())
        elif not math.isinf(left):
            self._timer = self._loop.call_later(min(left, _DEADLINE_LOOK), self._look)


class _EventWatch:
    """Waits for an event without a task: runs `event.wait()` step by step, on callbacks of what it waits for.

    Rejected: a helper task, which would outlive a synchronous `disarm` by a turn of the loop; and a future put into
    the event's `_waiters`, which is private. Closing the coroutine lets `wait()` take its own waiter out, at once.
    """

    def __init__(self, event: asyncio.Event, fire: Callable[[], None]) -> None:
        self._steps = event.wait().__await__()
        self._fire: Callable[[], None] | None = fire
        self._advance()

    def stop(self) -> None:
        self._fire = None
        self._steps.close()

    def _advance(self, _waited: object = None) -> None:
        fire = self._fire
        if fire is None:
            return  # stopped when the future was done already, but before its callback ran
        try:
            waiter: object = next(self._steps)
        except StopIteration:
            self._fire = None
            fire()
            return
        if asyncio.isfuture(waiter):
            waiter.add_done_callback(self._advance)
        else:
            asyncio.get_running_loop().call_soon(self._advance)  # a bare yield, from an event class of one's own


def _check_delay(delay: object) -> None:
    if isinstance(delay, bool) or not isinstance(delay, (int, float)):
        raise TypeError(f"TimeoutTrigger needs a number of seconds, got {delay!r}")
    if math.isnan(delay):
        raise ValueError(f"TimeoutTrigger needs a number of seconds, math.inf for never, got {delay!r}")


def _check_deadline(when: object) -> None:
    if isinstance(when, datetime):
        if when.utcoffset() is None:
            raise TypeError(f"DeadlineTrigger needs a datetime with a time zone, such as datetime.now(UTC), got {when!r}")
        return
    if isinstance(when, bool) or not isinstance(when, (int, float)):
        raise TypeError(f"DeadlineTrigger needs a time of the loop's clock or a datetime, got {when!r}")
    if math.isnan(when):
        raise ValueError("DeadlineTrigger needs a moment, math.inf for never, got nan")
    if _EPOCH_LIKE < when < math.inf:
        raise ValueError(
            f"DeadlineTrigger takes numbers for times of loop.time(), and {when!r} looks like time.time(): "
            "make it datetime.fromtimestamp(seconds, UTC)"
        )


def _check_event(event: object) -> None:
    if isinstance(event, threading.Event):
        raise TypeError(
            "EventTrigger cannot watch a threading.Event without a thread that never ends: use an asyncio.Event, "
            "and set it from the other thread with loop.call_soon_threadsafe(event.set)"
        )
    if not isinstance(event, asyncio.Event):
        raise TypeError(f"EventTrigger needs an asyncio.Event, got {event!r}")
