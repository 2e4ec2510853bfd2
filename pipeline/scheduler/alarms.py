"""`Alarms`: what is to happen in some seconds, if nothing else has happened by then.

The rule kept here: one thread for all of them, started with the first one and gone with the scheduler. Who sets no alarm
has no thread.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from itertools import count
from time import monotonic

__all__ = ["Alarm", "Alarms"]

_FEW = 64
"""Alarms that are not worth a sweep."""


class Alarm:
    """Something that will be called."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """It is not to be called any more."""
        self._callback = None

    def fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    @property
    def alive(self) -> bool:
        return self._callback is not None


class Alarms:
    """Alarms by time, and the thread that waits for the next one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._heap: list[tuple[float, int, Alarm]] = []
        self._numbers = count()
        self._changed = threading.Condition()
        self._closed = False
        self._sweep_at = _FEW
        self.thread: threading.Thread | None = None

    def hire(self) -> None:
        """Make sure that there is a thread to watch; what keeps it from starting is raised."""
        with self._changed:
            if self.thread is None:
                thread = threading.Thread(target=self._watch, name=self._name, daemon=True)
                thread.start()
                self.thread = thread

    def set(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        """Call back in so many seconds, in another thread, which the callback must not hold up."""
        alarm = Alarm(callback)
        with self._changed:
            if len(self._heap) > self._sweep_at:  # most alarms are cancelled long before their time
                self._heap = [entry for entry in self._heap if entry[2].alive]
                heapq.heapify(self._heap)
                self._sweep_at = 2 * len(self._heap) + _FEW
            heapq.heappush(self._heap, (monotonic() + seconds, next(self._numbers), alarm))
            if self._heap[0][2] is alarm:
                self._changed.notify()
        return alarm

    def close(self) -> None:
        """Nothing is called any more."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()

    def _watch(self) -> None:
        while (alarm := self._next()) is not None:
            alarm.fire()

    def _next(self) -> Alarm | None:
        with self._changed:
            while not self._closed:
                while self._heap and not self._heap[0][2].alive:
                    heapq.heappop(self._heap)
                if not self._heap:
                    self._changed.wait()  # bounded by the scheduler's close, and the thread is a daemon
                elif (seconds := self._heap[0][0] - monotonic()) > 0:
                    self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
                else:
                    return heapq.heappop(self._heap)[2]
            return None
