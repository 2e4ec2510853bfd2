"""When to try again, and after how long. Pure arithmetic; whoever calls the handler does the waiting."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import isfinite

from pipeline.errors import StageConfigError

__all__ = ["NO_RETRY", "Retry", "as_retry"]


@dataclass(frozen=True, slots=True)
class Retry:
    """Try an item up to `attempts` times in all.

    Before attempt n + 1 it waits `wait * 2 ** (n - 1)` seconds, at most `max_wait`, give or take the share `jitter` of
    it. Only exceptions of the type (or types) `on` are tried again; a returned `Err` never is.
    """

    attempts: int = 3
    wait: float = 0.1
    max_wait: float = 30.0
    jitter: float = 0.1
    on: type[BaseException] | tuple[type[BaseException], ...] = Exception

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StageConfigError(f"retry counts attempts, the first included: a whole number, 1 or more, not {self.attempts!r}")
        for name in ("wait", "max_wait", "jitter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
                raise StageConfigError(f"Retry.{name} must be a finite number, 0 or more, not {value!r}")
        if self.jitter > 1:
            raise StageConfigError(f"Retry.jitter is a share of the wait, between 0 and 1, not {self.jitter!r}")
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StageConfigError(f"Retry.on must be an exception class or a tuple of them, not {self.on!r}")

    def delay(self, attempt: int, error: BaseException) -> float | None:
        """Seconds to wait after attempt number `attempt` failed with `error`; None when it was the last."""
        if attempt >= self.attempts or not isinstance(error, self.on):
            return None
        seconds = min(self.wait * 2.0 ** min(attempt - 1, 60), self.max_wait)
        return seconds * (1 + self.jitter * random.uniform(-1, 1))


NO_RETRY = Retry(attempts=1)


def as_retry(retry: int | Retry | None) -> Retry:
    """The retry of a stage's options: None is one attempt, an int counts attempts."""
    if retry is None:
        return NO_RETRY
    return retry if isinstance(retry, Retry) else Retry(attempts=retry)
