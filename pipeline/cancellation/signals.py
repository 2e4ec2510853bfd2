"""Signals as a reason to stop.

The rule kept here: a signal handler only ever hands over to a loop, and the last who listens puts back what was there.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from typing import Any, ClassVar

from .reason import CancelReason, CancelType, check_code
from .triggers import Trigger, TriggerHandle

__all__ = ["SignalTrigger", "running_loop", "signal_name"]


class SignalTrigger(Trigger):
    """Calls back at EVERY arrival of one of the signals, so that a listener can escalate: first, second, third.

    Python delivers signals in the main thread. In another one it can be armed while the main thread holds it: see
    `hold()`; `pipeline.iter()` sees to its own triggers. Raises RuntimeError elsewhere. While it is armed it takes
    the place of the handlers set by `signal.signal`, Ctrl-C's KeyboardInterrupt included; the last `disarm` puts them
    back. A handler that the program gave to `loop.add_signal_handler` keeps being called beside it.

    `drain` is for a pipeline's `cancel_on`: the first signal then drains instead of aborting.
    """

    def __init__(self, *signals: int, code: str | None = None, drain: bool = False) -> None:
        if not signals:
            raise ValueError("SignalTrigger needs at least one signal, for example SignalTrigger(signal.SIGTERM)")
        for signum in signals:
            _check_signal(signum)
        check_code(code, "a SignalTrigger")
        self.signals = tuple(dict.fromkeys(signals))
        self.code = code
        self.drain = drain

    def __repr__(self) -> str:
        names = ", ".join(signal_name(signum) for signum in self.signals)
        return f"SignalTrigger({names}, code={self.code!r}, drain={self.drain})"

    def check(self) -> CancelReason | None:
        return None  # a signal is a moment and not a state: there is none to be found in the past

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        handing_over = _HandingOver(asyncio.get_running_loop(), callback)
        handle = self.listen(handing_over)
        return TriggerHandle(partial(handing_over.stop, handle))

    def listen(self, callback: Callable[[CancelReason], object]) -> TriggerHandle:
        """As `arm`, but `callback` is called inside the signal handler: at once, even if the loop is blocked.

        It must be safe there, as appending to a list and `Pipeline.cancel` are. What it raises, the main thread raises.
        When it returns False it is called no more, and a signal that nobody wants goes to who was there before.
        """
        listener = partial(self._arrived, callback, count(1))
        with ExitStack() as listening:  # when the second signal cannot be had, the first is given back
            listening.callback(_Waker.share())
            for signum in self.signals:
                listening.callback(_SignalHub.add(signum, listener))
            return TriggerHandle(listening.pop_all().close)

    def hold(self) -> TriggerHandle:
        """Take the signals now, in the main thread, so that the trigger can be armed in others until this is disarmed."""
        return self.listen(_ignore)

    def _arrived(self, callback: Callable[[CancelReason], object], arrivals: Iterator[int], signum: int) -> object:
        nth = next(arrivals)
        message = f"received {signal_name(signum)}" + (f" (signal number {nth} since armed)" if nth > 1 else "")
        return callback(CancelReason(message, CancelType.SIGNAL, self.code, origin="SignalTrigger"))


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

    Installed and restored in the main thread only; listeners come and go in any. There is no lock, which a signal handler
    could find taken by the very code that it has interrupted: a dict changes atomically, and every step below leaves a
    state in which a signal may arrive. Signals that arrive faster than the kernel or the interpreter hands them out may
    count as one; that is so for every handler in Python.
    """

    _hubs: ClassVar[dict[int, _SignalHub]] = {}

    def __init__(self, signum: int) -> None:
        self._signum = signum
        self._listeners: dict[object, Callable[[int], object]] = {}
        self._previous: Any = None  # Any: a function, a number or any callable object
        self._waiting: list[int] = []  # arrivals that nobody has been told of; to append and to pop is atomic
        self._telling = False

    @classmethod
    def add(cls, signum: int, listener: Callable[[int], object]) -> Callable[[], None]:
        """Call `listener` at every arrival; the function returned ends that."""
        key = object()
        if threading.current_thread() is threading.main_thread():
            hub = cls._hubs.get(signum) or cls(signum)
            hub._listeners[key] = listener  # before the handler is there: who arrives meanwhile finds somebody
            try:
                hub._install()
            except BaseException:
                hub._remove(key)
                raise
        else:
            hub = cls._hubs.get(signum)
            if hub is not None:
                hub._listeners[key] = listener
            if hub is None or cls._hubs.get(signum) is not hub:  # not there, or let go of at this moment
                raise RuntimeError(
                    "SignalTrigger can only be armed in the main thread, where Python delivers signals: arm it there, "
                    "or hold() it there, or set an asyncio.Event from there and use EventTrigger here"
                )
        return partial(hub._remove, key)

    def _remove(self, key: object) -> None:
        self._listeners.pop(key, None)
        # In another thread the handler stays until the next arrival, which finds nobody, or until somebody listens again.
        if not self._listeners and threading.current_thread() is threading.main_thread():
            self._restore()

    def _install(self) -> None:
        current = signal.getsignal(self._signum)
        if current != self._arrived:
            self._previous = current
        self._hubs[self._signum] = self
        signal.signal(self._signum, self._arrived)

    def _arrived(self, signum: int, frame: object) -> None:
        # We may be anywhere in the main thread, in the middle of the loop's own code too, or of ours. In the middle of this
        # very method the outer call goes on with it, so that the first arrival is told before the second.
        self._waiting.append(signum)
        while self._waiting and not self._telling:
            self._telling = True
            try:
                self._waiting.pop()
                self._tell(signum)
            finally:
                self._telling = False

    def _tell(self, signum: int) -> None:
        wanted = False
        for key, listener in tuple(self._listeners.items()):
            if key not in self._listeners:  # disarmed by a listener before it
                continue
            if listener(signum) is False:
                self._listeners.pop(key, None)
            else:
                wanted = True
        if not wanted and not self._listeners:
            self._restore()
            signal.raise_signal(signum)  # it was for whoever was here before us

    def _restore(self) -> None:
        if self._hubs.get(self._signum) is self:
            self._hubs.pop(self._signum, None)
        if self._listeners:  # another thread has found us in the last moment
            self._hubs[self._signum] = self
        elif signal.getsignal(self._signum) == self._arrived:  # else somebody has put a handler over ours, and keeps it
            # None is a handler that was not installed from Python, and that Python cannot put back.
            signal.signal(self._signum, signal.SIG_DFL if self._previous is None else self._previous)


class _Waker:
    """Has a loop of the main thread wake up for signals; shared by all who want that for the same loop.

    A signal that arrives just before the loop goes to sleep, or that the kernel gives to another thread, would wait until
    something else wakes the loop. Rejected: `loop.add_signal_handler`, which would do this as well. Taking it back sets
    the signal's default action for a moment, and so does closing the loop: a signal then would end the program.
    """

    _wakers: ClassVar[dict[asyncio.AbstractEventLoop, _Waker]] = {}

    @classmethod
    def share(cls) -> Callable[[], None]:
        """For the loop that runs here, if there is one and this is the main thread; the function returned ends that."""
        loop = running_loop()
        if loop is None or threading.current_thread() is not threading.main_thread():
            return _nothing
        waker = cls._wakers.get(loop) or cls(loop)
        waker._users += 1
        return waker._release

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._users = 0
        self._ends: tuple[socket.socket, ...] = ()
        before = signal.set_wakeup_fd(-1)
        if before == -1:
            self._open()
        else:
            signal.set_wakeup_fd(before)  # it is woken already, as uvloop always is, and by `add_signal_handler`
        self._wakers[loop] = self

    def _open(self) -> None:
        ours, theirs = self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        try:
            self._loop.add_reader(ours, _read_away, ours)
        except NotImplementedError:  # a loop without readers: it is Windows', which sees to this itself
            self._close()
            return
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def _release(self) -> None:
        self._users -= 1
        # In another thread it cannot be taken down: it stays for the next who wants it.
        if self._users == 0 and threading.current_thread() is threading.main_thread():
            del self._wakers[self._loop]
            self._close()

    def _close(self) -> None:
        ends, self._ends = self._ends, ()
        if not ends:
            return
        ours, theirs = ends
        current = signal.set_wakeup_fd(-1)
        if current not in (-1, theirs.fileno()):
            signal.set_wakeup_fd(current)  # somebody has put his own over it
        if not self._loop.is_closed():
            self._loop.remove_reader(ours)
        for end in ends:
            end.close()


def _ignore(_reason: CancelReason) -> None:
    pass


def _nothing() -> None:
    pass


def _read_away(end: socket.socket) -> None:
    with suppress(BlockingIOError):
        end.recv(4096)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """That of this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def signal_name(signum: int) -> str:
    """As in `signal.Signals`."""
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
        raise ValueError(f"SignalTrigger: {signal_name(signum)} cannot be caught, use SIGTERM or SIGINT")
