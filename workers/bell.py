"""Wakes the run's loop from a thread.

The rule kept here: however often it is rung before the loop listens, the loop is woken once; what is rung after it has
begun to listen is heard again. `loop.call_soon_threadsafe` does the same at twice the price, and threads that wait for
milliseconds pay it in full: every microsecond between two waits is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Callable

__all__ = ["Bell"]

_ONE = (1).to_bytes(8, "little")
"""What an event descriptor counts; to a pipe it is eight bytes like any others."""


class Bell:
    """Made and closed on the loop, rung from anywhere. A file, not a bare number: closed, it writes to nobody else's."""

    def __init__(self, heard: Callable[[], None]) -> None:
        self._heard = heard
        self._rung = False
        if hasattr(os, "eventfd"):
            self._ear = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._rope = io.FileIO(self._ear, "w", closefd=False)
        else:
            self._ear, rope = os.pipe()
            os.set_blocking(self._ear, False)
            os.set_blocking(rope, False)
            self._rope = io.FileIO(rope, "w")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ear, self._listen)

    def ring(self) -> None:
        """From any thread, and never raises: after the end it is heard by nobody."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(ValueError):
                self._rope.write(_ONE)

    def close(self) -> None:
        """Idempotent."""
        if not self._rope.closed:
            self._rope.close()
            self._loop.remove_reader(self._ear)
            os.close(self._ear)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._ear, 4096)
        self._rung = False  # before looking: what comes from now on rings again
        self._heard()
