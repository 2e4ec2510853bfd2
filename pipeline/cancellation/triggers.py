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
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, ClassVar, Protocol, runtime_checkable

from .reason import CancelReason, CancelType

__all__ = ["EventTrigger", "SignalTrigger", "TimeoutTrigger", "Trigger", "TriggerHandle"]


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
    """Fires `delay` seconds after it was armed. Zero has fired already; infinity never fires.

    Raises TypeError or ValueError for a delay that is no number, negative or NaN.
    """

    delay: float
    code: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_delay(self.delay)

    def check(self) -> CancelReason | None:
        return self._reason() if self.delay == 0 else None

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        loop = asyncio.get_running_loop()
        if math.isinf(self.delay):
            return TriggerHandle()
        return TriggerHandle(loop.call_later(self.delay, self._fire, callback).cancel)

    def _fire(self, callback: Callable[[CancelReason], None]) -> None:
        callback(self._reason())  # made here and not in `arm`: a reason carries the time at which it came about

    def _reason(self) -> CancelReason:
        return CancelReason(f"timed out after {self.delay:g}s", CancelType.TIMEOUT, self.code, origin="TimeoutTrigger")


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


class SignalTrigger(Trigger):
    """Calls back at EVERY arrival of one of the signals, so that a listener can escalate: first, second, third.

    It can be armed in the main thread only (RuntimeError elsewhere). While it is armed it takes the place of the
    handlers set by `signal.signal`, Ctrl-C's KeyboardInterrupt included; the last `disarm` puts them back. A handler
    that the program gave to `loop.add_signal_handler` keeps being called beside it.

    `drain` is for a pipeline's `cancel_on`: the first signal then drains instead of aborting.
    """

    def __init__(self, *signals: int, code: str | None = None, drain: bool = False) -> None:
        if not signals:
            raise ValueError("SignalTrigger needs at least one signal, for example SignalTrigger(signal.SIGTERM)")
        for signum in signals:
            _check_signal(signum)
        self.signals = tuple(dict.fromkeys(signals))
        self.code = code
        self.drain = drain

    def __repr__(self) -> str:
        names = ", ".join(_signal_name(signum) for signum in self.signals)
        return f"SignalTrigger({names}, code={self.code!r}, drain={self.drain})"

    def check(self) -> CancelReason | None:
        return None  # a signal is a moment and not a state: there is none to be found in the past

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "SignalTrigger can only be armed in the main thread, where Python delivers signals: "
                "arm it there, or set an asyncio.Event from there and use EventTrigger here"
            )
        listener = partial(self._arrived, callback, count(1))
        loop = asyncio.get_running_loop()
        with ExitStack() as arming:  # when the second signal cannot be had, the first is given back
            for signum in self.signals:
                arming.callback(_SignalHub.add(loop, signum, listener))
            return TriggerHandle(arming.pop_all().close)

    def _arrived(self, callback: Callable[[CancelReason], None], arrivals: Iterator[int], signum: int) -> None:
        nth = next(arrivals)
        message = f"received {_signal_name(signum)}" + (f" (signal number {nth} since armed)" if nth > 1 else "")
        callback(CancelReason(message, CancelType.SIGNAL, self.code, origin="SignalTrigger"))


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


class _SignalHub:
    """All that listens to one signal on one loop: the first listener installs a handler, the last restores.

    Only ever touched in the main thread, so it takes no lock. Signals that arrive faster than the kernel or the
    interpreter hands them out may count as one; that is so for every handler in Python.
    """

    _hubs: ClassVar[dict[tuple[asyncio.AbstractEventLoop, int], _SignalHub]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop, signum: int) -> None:
        self._loop = loop
        self._signum = signum
        self._listeners: dict[object, Callable[[int], None]] = {}
        self._previous = signal.getsignal(signum)
        self._on_loop = not _belongs_to_a_loop(self._previous) and self._add_to_loop()
        if not self._on_loop:
            signal.signal(signum, self._on_signal)
        self._installed = signal.getsignal(signum)

    @classmethod
    def add(cls, loop: asyncio.AbstractEventLoop, signum: int, listener: Callable[[int], None]) -> Callable[[], None]:
        """Call `listener` at every arrival; the function returned ends that."""
        hub = cls._hubs.get((loop, signum))
        if hub is None:
            hub = cls._hubs[loop, signum] = cls(loop, signum)
        key = object()
        hub._listeners[key] = listener
        return partial(hub._remove, key)

    def _remove(self, key: object) -> None:
        del self._listeners[key]
        if not self._listeners:
            del self._hubs[self._loop, self._signum]
            self._restore()

    def _add_to_loop(self) -> bool:
        """The better way: the loop is woken by a file descriptor, so no arrival waits for the next turn."""
        try:
            self._loop.add_signal_handler(self._signum, self._dispatch)
        except RuntimeError:  # NotImplementedError among them: this loop cannot
            return False
        return True

    def _on_signal(self, _signum: int, _frame: object) -> None:
        # We may be anywhere in the main thread, in the middle of the loop's own code too: only ever hand over.
        with suppress(RuntimeError):  # the loop was closed while armed, so there is nobody to tell
            self._loop.call_soon_threadsafe(self._dispatch)

    def _dispatch(self) -> None:
        for key, listener in tuple(self._listeners.items()):
            if key not in self._listeners:
                continue  # disarmed by a listener before it
            try:
                listener(self._signum)
            except Exception as error:
                self._loop.call_exception_handler({"message": f"a callback of {self} failed", "exception": error})

    def _restore(self) -> None:
        # Whoever put a handler over ours keeps it. A closed loop has reset the handler, which is nobody's wish.
        current = signal.getsignal(self._signum)
        ours = current is self._installed or self._loop.is_closed()
        target = self._previous if ours else current
        if self._on_loop:
            self._loop.remove_signal_handler(self._signum)  # sets the default action: for a moment, no way around it
        # None is a handler that was not installed from Python, and that Python cannot put back.
        signal.signal(self._signum, signal.SIG_DFL if target is None else target)

    def __repr__(self) -> str:
        return f"SignalTrigger on {_signal_name(self._signum)}"


def _belongs_to_a_loop(handler: Any) -> bool:
    """Was this put there by `loop.add_signal_handler`? `Any`: a function, a number or any callable object.

    A loop keeps one callback per signal and has no public way to read it, so replacing it would lose it for ever.
    With `signal.signal` ours goes over the loop's stand-in, and the loop, told by its file descriptor, calls its own
    as before. If the guess by module name ever fails, that handler is replaced, and is not restored.
    """
    return str(getattr(handler, "__module__", "")).startswith(("asyncio.", "uvloop."))


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"  # the real-time signals between the first and the last have no names


def _check_delay(delay: object) -> None:
    if isinstance(delay, bool) or not isinstance(delay, (int, float)):
        raise TypeError(f"TimeoutTrigger needs a number of seconds, got {delay!r}")
    if math.isnan(delay) or delay < 0:
        raise ValueError(f"TimeoutTrigger needs seconds from 0 up, math.inf for never, got {delay!r}")


def _check_event(event: object) -> None:
    if isinstance(event, threading.Event):
        raise TypeError(
            "EventTrigger cannot watch a threading.Event without a thread that never ends: use an asyncio.Event, "
            "and set it from the other thread with loop.call_soon_threadsafe(event.set)"
        )
    if not isinstance(event, asyncio.Event):
        raise TypeError(f"EventTrigger needs an asyncio.Event, got {event!r}")


def _check_signal(signum: object) -> None:
    if isinstance(signum, bool) or not isinstance(signum, int):
        raise TypeError(f"SignalTrigger needs signals such as signal.SIGTERM, got {signum!r}")
    if signum not in signal.valid_signals():
        raise ValueError(f"SignalTrigger: there is no signal number {signum}, use a member of signal.Signals")
    if signum in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"SignalTrigger: {_signal_name(signum)} cannot be caught, use SIGTERM or SIGINT")
