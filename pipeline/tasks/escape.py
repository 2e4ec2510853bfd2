"""The way out of a program whose event loop is blocked, so that signals do not reach what would shut it down.

The rule kept here: while the loop hears its signals nothing is done. Only a person, or a supervisor, who asks again after a
while ends the program.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from time import monotonic

from ..cancellation.reason import CancelReason
from ..cancellation.signals import SignalTrigger
from ..cancellation.triggers import TriggerHandle
from ..observe.logs import get_logger

__all__ = ["BlockedLoopExit"]

_DEAF = 2.0
"""Seconds after which a loop that has not heard of a signal counts as blocked."""


class BlockedLoopExit:
    """A signal that comes 2 s or more after one that the loop has not heard of raises SystemExit in what blocks the loop.

    Its code is 128 and the number of the signal. To be armed on the loop, in the main thread.
    """

    def __init__(self, *signals: int) -> None:
        self._signals = signals
        self._unheard: float | None = None
        """When the first signal came that the loop has not heard of."""

    def arm(self) -> TriggerHandle:
        """Listen, until the handle is disarmed."""
        loop = asyncio.get_running_loop()
        with ExitStack() as armed:
            for signum in self._signals:
                armed.callback(SignalTrigger(signum).listen(partial(self._arrived, loop, signum)).disarm)
            return TriggerHandle(armed.pop_all().close)

    def _arrived(self, loop: asyncio.AbstractEventLoop, signum: int, _: CancelReason) -> None:
        # Inside the signal handler, so also while the loop is blocked.
        now = monotonic()
        if self._unheard is None:
            self._unheard = now
            loop.call_soon_threadsafe(self._heard)
        elif now - self._unheard >= _DEAF:
            get_logger().error("the event loop is blocked and hears no signals: the program ends", signal=signum)
            raise SystemExit(128 + signum)

    def _heard(self) -> None:
        self._unheard = None
