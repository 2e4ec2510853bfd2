"""Log records of the library, through structlog, and a limiter so that a million failures are not a million lines.

The rule kept here: the library logs, it never prints. Until a program configures structlog, records go to stderr, so
that they never mix with a program's output.
"""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any

__all__ = ["RateLimitedLog", "get_logger"]


def get_logger(**context: Any) -> Any:
    """A structlog logger bound to `context`; made when it is needed, so that later configuration counts.

    `Any`: structlog's bound logger has the methods of whatever class the program configures.
    """
    import structlog  # here, for most programs log nothing, and each that starts would pay for it

    if structlog.is_configured():
        return structlog.get_logger("penstock", **context)
    return structlog.wrap_logger(structlog.PrintLogger(sys.stderr)).bind(**context)


class RateLimitedLog:
    """One record at once, then at most one per `interval` seconds; each tells how many were suppressed before it."""

    def __init__(self, interval: float = 1.0, **context: Any) -> None:
        self._interval = interval
        self._context = context
        self._next = 0.0
        self._last: tuple[str, str, dict[str, Any]] | None = None
        self.suppressed = 0

    def emit(self, level: str, event: str, **fields: Any) -> None:
        """Log, or count as suppressed."""
        now = monotonic()
        if now < self._next:
            self.suppressed += 1
            self._last = (level, event, fields)
            return
        self._next = now + self._interval
        suppressed, self.suppressed, self._last = self.suppressed, 0, None
        getattr(get_logger(**self._context), level)(event, **fields, suppressed=suppressed)

    def flush(self) -> None:
        """Log the last suppressed record with the count of the others, so that the numbers add up at the end."""
        if self._last is not None:
            level, event, fields = self._last
            suppressed, self.suppressed, self._last = self.suppressed - 1, 0, None
            getattr(get_logger(**self._context), level)(event, **fields, suppressed=suppressed)
