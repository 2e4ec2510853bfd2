"""Memory above a limit as a reason to stop. psutil does the reading; it is an extra, and imported when it is needed.

The rule kept here: reading is sampling. Between two looks memory may rise above the limit and fall again unseen.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from .reason import CancelReason, CancelType, check_code
from .triggers import Trigger, TriggerHandle

__all__ = ["MemoryTrigger"]

_SMALLEST = 1 << 20
"""Bytes below which a limit must be meant in another unit: an empty interpreter takes ten times as much."""


@dataclass(frozen=True)
class MemoryTrigger(Trigger):
    """Fires when this process holds more than `limit` bytes of physical memory: `MemoryTrigger(2 * 2**30)` is 2 GiB.

    `workers=True` adds up its child processes as well, what they share counted more than once. Looked at every
    `interval` seconds on the loop, which costs about 20 µs, and 1 ms and more with `workers=True`.
    Raises ImportError without psutil, TypeError and ValueError for numbers that make no sense.
    """

    limit: float
    interval: float = field(default=0.25, kw_only=True)
    workers: bool = field(default=False, kw_only=True)
    code: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_number("a limit in bytes", self.limit)
        _check_number("an interval in seconds", self.interval)
        if self.limit < _SMALLEST:
            raise ValueError(f"MemoryTrigger needs a limit in bytes, got {self.limit!r}; 512 MiB is 512 * 2**20")
        if not self.interval > 0:
            raise ValueError(f"MemoryTrigger needs an interval above 0 seconds, got {self.interval!r}")
        check_code(self.code, "a MemoryTrigger")
        _psutil()

    def check(self) -> CancelReason | None:
        used = _resident(workers=self.workers)
        if used <= self.limit:
            return None
        whose = "this process and its workers hold" if self.workers else "this process holds"
        message = f"{whose} {_in_units(used)} of memory, above the limit of {_in_units(self.limit)}"
        return CancelReason(message, CancelType.MEMORY, self.code, origin="MemoryTrigger")

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        return TriggerHandle(_Sampling(self, callback).stop)


class _Sampling:
    """Looks again and again, until the limit is passed or somebody stops it."""

    def __init__(self, trigger: MemoryTrigger, callback: Callable[[CancelReason], None]) -> None:
        self._trigger = trigger
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(trigger.interval, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        reason = self._trigger.check()
        if reason is None:
            self._timer = self._loop.call_later(self._trigger.interval, self._look)
        else:
            self._callback(reason)


def _resident(*, workers: bool) -> int:
    psutil = _psutil()
    me = psutil.Process()
    total = int(me.memory_info().rss)
    for child in me.children(recursive=True) if workers else ():
        try:
            total += int(child.memory_info().rss)
        except psutil.Error:  # gone since, or not ours to see
            continue
    return total


def _psutil() -> Any:
    """`Any`: an optional package, which the type checker need not find."""
    try:
        return import_module("psutil")
    except ImportError as error:
        raise ImportError("MemoryTrigger needs psutil: pip install 'penstock[memory]'") from error


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"MemoryTrigger needs {what}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"MemoryTrigger needs {what}, got {value!r}")


def _in_units(amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"
