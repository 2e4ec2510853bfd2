"""Signals as a reason to stop.

The rule kept here: a signal handler only ever hands over to a loop, and the last who listens puts back what was there.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from typing import Any, ClassVar

from .reason import CancelReason, CancelType
from .triggers import Trigger, TriggerHandle

__all__ = ["SignalTrigger"]


class SignalTrigger(Trigger):
    """Calls back at EVERY arrival of one of the signals, so that a listener can escalate: first, second, third.

    Python delivers signals in the main thread. In another one it can be armed while the main thread holds it: see
    `hold()`, which `pipeline.iter()` does for its own triggers. Raises RuntimeError elsewhere. While it is armed it takes
    the place of the handlers set by `signal.signal`, Ctrl-C's KeyboardInterrupt included; the last `disarm` puts them
    back. A handler that the program gave to `loop.add_signal_handler` keeps being called beside it.

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
        handing_over = _HandingOver(asyncio.get_running_loop(), callback)
        handle = self.listen(handing_over)
        return TriggerHandle(partial(handing_over.stop, handle))

    def listen(self, callback: Callable[[CancelReason], None]) -> TriggerHandle:
        """As `arm`, but `callback` is called inside the signal handler: at once, even if the loop is blocked.

        It must be safe there, as appending to a list and `Pipeline.cancel` are. What it raises, the main thread raises.
        """
        listener = partial(self._arrived, callback, count(1))
        with ExitStack() as listening:  # when the second signal cannot be had, the first is given back
            for signum in self.signals:
                listening.callback(_SignalHub.add(signum, listener))
            return TriggerHandle(listening.pop_all().close)

    def hold(self) -> TriggerHandle:
        """Take the signals now, in the main thread, so that the trigger can be armed in others until this is disarmed."""
        return self.listen(_ignore)

    def _arrived(self, callback: Callable[[CancelReason], None], arrivals: Iterator[int], signum: int) -> None:
        nth = next(arrivals)
        message = f"received {_signal_name(signum)}" + (f" (signal number {nth} since armed)" if nth > 1 else "")
        callback(CancelReason(message, CancelType.SIGNAL, self.code, origin="SignalTrigger"))


class _HandingOver:
    """A callback that is called on its loop, between the steps of tasks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[CancelReason], None]) -> None:
        self._loop = loop
        self._callback: Callable[[CancelReason], None] | None = callback

    def __call__(self, reason: CancelReason) -> None:
        with suppress(RuntimeError):  # the loop was closed while armed, so there is nobody to tell
            self._loop.call_soon_threadsafe(self._call, reason)

    def _call(self, reason: CancelReason) -> None:
        if self._callback is not None:  # else disarmed since
            self._callback(reason)

    def stop(self, handle: TriggerHandle) -> None:
        self._callback = None
        handle.disarm()


class _SignalHub:
    """All that listens to one signal: the first listener installs a handler, the last restores.

    Installed and restored in the main thread only; listeners come and go in any, which takes no lock: a dict changes
    atomically. Signals that arrive faster than the kernel or the interpreter hands them out may count as one; that is
    so for every handler in Python.
    """

    _hubs: ClassVar[dict[int, _SignalHub]] = {}

    def __init__(self, signum: int) -> None:
        self._signum = signum
        self._listeners: dict[object, Callable[[int], None]] = {}
        self._previous: Any = None  # Any: a function, a number or any callable object
        self._loops: list[asyncio.AbstractEventLoop] = []

    @classmethod
    def add(cls, signum: int, listener: Callable[[int], None]) -> Callable[[], None]:
        """Call `listener` at every arrival; the function returned ends that."""
        hub = cls._hubs.get(signum)
        if threading.current_thread() is threading.main_thread():
            hub = hub or cls(signum)
            hub._install()
            cls._hubs[signum] = hub
        elif hub is None:
            raise RuntimeError(
                "SignalTrigger can only be armed in the main thread, where Python delivers signals: arm it there, "
                "or hold() it there, or set an asyncio.Event from there and use EventTrigger here"
            )
        key = object()
        hub._listeners[key] = listener
        return partial(hub._remove, key)

    def _remove(self, key: object) -> None:
        self._listeners.pop(key, None)
        # In another thread the handler stays until the next arrival, which finds nobody, or until somebody listens again.
        if not self._listeners and threading.current_thread() is threading.main_thread():
            self._restore()

    def _install(self) -> None:
        """Put our handler in place, and have the loop that runs here woken by a file descriptor.

        Without that, a signal that arrives just before the loop goes to sleep waits until something else wakes it. The
        loop's own handlers would not do: they are callbacks, and a blocked loop calls none.
        """
        current = signal.getsignal(self._signum)
        if current != self._arrived and not any(loop.is_closed() for loop in self._loops):  # a closed one has reset it
            self._previous = current
        loop = _running_loop()
        if loop is not None and loop not in self._loops and not _belongs_to_a_loop(current):
            with suppress(RuntimeError):  # NotImplementedError among them: this loop cannot
                loop.add_signal_handler(self._signum, _nothing)
                self._loops.append(loop)
        signal.signal(self._signum, self._arrived)

    def _arrived(self, signum: int, frame: object) -> None:
        # We may be anywhere in the main thread, in the middle of the loop's own code too.
        if not self._listeners:
            self._restore()
            signal.raise_signal(signum)  # it was for whoever was here before us
            return
        for key, listener in tuple(self._listeners.items()):
            if key in self._listeners:  # else disarmed by a listener before it
                listener(signum)

    def _restore(self) -> None:
        del self._hubs[self._signum]
        # Whoever put a handler over ours keeps it. A closed loop has reset the handler, which is nobody's wish.
        current = signal.getsignal(self._signum)
        ours = current == self._arrived or any(loop.is_closed() for loop in self._loops)
        target = self._previous if ours else current
        for loop in self._loops:
            loop.remove_signal_handler(self._signum)  # sets the default action: for a moment, no way around it
        # None is a handler that was not installed from Python, and that Python cannot put back.
        signal.signal(self._signum, signal.SIG_DFL if target is None else target)


def _ignore(_reason: CancelReason) -> None:
    pass


def _nothing() -> None:
    pass


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


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


def _check_signal(signum: object) -> None:
    if isinstance(signum, bool) or not isinstance(signum, int):
        raise TypeError(f"SignalTrigger needs signals such as signal.SIGTERM, got {signum!r}")
    if signum not in signal.valid_signals():
        raise ValueError(f"SignalTrigger: there is no signal number {signum}, use a member of signal.Signals")
    if signum in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"SignalTrigger: {_signal_name(signum)} cannot be caught, use SIGTERM or SIGINT")
