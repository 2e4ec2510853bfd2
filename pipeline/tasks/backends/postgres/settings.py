"""What can be chosen for a backend, checked when it is chosen."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from procrastinate.retry import BaseRetryStrategy, RetryValue, get_retry_strategy

__all__ = ["Settings", "seconds"]

_MOST = 1_000_000_000
"""Of seconds, some 30 years, and of anything else: more overflows in the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """See `PostgresTaskBackend` for what each is."""

    queue: str
    max_attempts: int
    heartbeat: float
    sweep_interval: float
    connect_timeout: float
    pool_size: int
    progress_interval: float
    items: bool
    cleanup: float
    keep: float | None
    retry: BaseRetryStrategy | None
    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.queue, str) or not 0 < len(self.queue) <= 100 or not self.queue.isprintable():
            raise ValueError(f"the name of a queue is a text of 1 to 100 printable characters, not {self.queue!r}")
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 200 or not self.name.isprintable():
            raise ValueError(f"the name of a worker is a text of 1 to 200 printable characters, not {self.name!r}")
        for name, least in (("max_attempts", 1), ("pool_size", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
                raise ValueError(f"{name} is a whole number from {least} on, not {value!r}")
        for name in ("heartbeat", "sweep_interval", "connect_timeout", "progress_interval", "cleanup"):
            seconds(name, getattr(self, name))
        if self.keep is not None:
            seconds("keep", self.keep)


def seconds(name: str, value: Any) -> float:
    """A number above 0 and of at most 30 years, as a float. Raises ValueError for others. `Any`: it is being checked."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST:
        raise ValueError(f"{name} is a number of seconds above 0, and at most {_MOST:,}, not {value!r}")
    return float(value)


def retry_strategy(retry: RetryValue | None) -> BaseRetryStrategy | None:
    """As procrastinate takes it: a number of attempts, True, or a strategy of its own."""
    if retry is None or isinstance(retry, (bool, int, BaseRetryStrategy)):
        return get_retry_strategy(retry or False)
    raise TypeError(f"retry is a number, or a RetryStrategy of procrastinate, not {retry!r}")


def default_name() -> str:
    """Where a worker runs: its host and its process."""
    return f"{socket.gethostname()}:{os.getpid()}"
