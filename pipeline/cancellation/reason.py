"""Why something stopped: one frozen record for every way to stop.

The rule kept here: a reason is data. It is recorded by whoever stops and read by everyone else;
the messages that asyncio attaches to a cancelled task are never relied upon.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["CancelReason", "CancelType"]


class CancelType(Enum):
    """What kind of thing asked for the stop."""

    EVENT = "event"
    TIMEOUT = "timeout"
    SIGNAL = "signal"
    MANUAL = "manual"
    ERROR = "error"
    PARENT = "parent"
    """The task, scope or pipeline around this one was stopped."""


@dataclass(frozen=True, slots=True)
class CancelReason:
    """One reason to stop. `origin` names the stage, trigger or caller; `at` is the time in seconds since the epoch."""

    message: str
    cancel_type: CancelType = CancelType.MANUAL
    code: str | None = None
    origin: str | None = field(default=None, compare=False)
    at: float = field(default_factory=time.time, compare=False)

    def __str__(self) -> str:
        return self.message
