"""What becomes of an item that failed. The decision is here; counting and moving items is the stage's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from math import ceil
from typing import TYPE_CHECKING, Any

from .errors import StageConfigError

if TYPE_CHECKING:
    from .result import Err

__all__ = ["ErrorHandler", "ErrorPolicy", "FailureRule"]

ErrorHandler = Callable[["Err"], Awaitable[Any] | Any]
"""Takes the `Err` of one item; its return value is ignored. May be a coroutine function."""


class ErrorPolicy(Enum):
    """What a stage does with an item whose handler failed for good."""

    DROP = "drop"
    """Count it, log it (rate-limited), go on without it."""
    EMIT = "emit"
    """Send the `Err` downstream in the item's place, through the bounded buffers."""
    RAISE = "raise"
    """Stop the pipeline; `run()` returns that `Err`."""
    SIDE = "side"
    """Call the stage's `error_handler` with the `Err`, then drop the item."""


@dataclass(frozen=True, slots=True)
class FailureRule:
    """One stage's policy, resolved: never None, and checked."""

    policy: ErrorPolicy = ErrorPolicy.DROP
    handler: ErrorHandler | None = None
    max_failures: int | float | None = None

    @classmethod
    def check(cls, policy: ErrorPolicy | None, handler: ErrorHandler | None, max_failures: int | float | None) -> None:
        """Refuse options that cannot work together, at declaration."""
        if policy is not None and not isinstance(policy, ErrorPolicy):
            raise StageConfigError(f"on_error must be an ErrorPolicy (DROP, EMIT, RAISE or SIDE), not {policy!r}")
        if handler is not None and not callable(handler):
            raise StageConfigError(f"error_handler must be a function that takes the Err, not {handler!r}")
        if handler is not None and policy not in (None, ErrorPolicy.SIDE):
            raise StageConfigError(
                f"error_handler is only called under ErrorPolicy.SIDE, but on_error is {policy.name if policy else policy}; "
                "leave on_error out, or set it to ErrorPolicy.SIDE"
            )
        if policy is ErrorPolicy.SIDE and handler is None:
            raise StageConfigError("ErrorPolicy.SIDE needs an error_handler; give one, or use ErrorPolicy.DROP")
        if max_failures is None:
            return
        if isinstance(max_failures, bool) or not isinstance(max_failures, (int, float)) or max_failures < 0:
            raise StageConfigError(f"max_failures must be a count (int) or a share between 0 and 1 (float), not {max_failures!r}")
        if isinstance(max_failures, float) and max_failures > 1:
            raise StageConfigError(f"max_failures as a float is a share between 0.0 and 1.0, not {max_failures!r}; use an int to count")

    @classmethod
    def resolve(
        cls, policy: ErrorPolicy | None, handler: ErrorHandler | None, max_failures: int | float | None, default: ErrorPolicy
    ) -> FailureRule:
        """The stage's own policy, or SIDE when it has a handler, or the pipeline's default."""
        if policy is None:
            policy = ErrorPolicy.SIDE if handler is not None else default
        if policy is ErrorPolicy.SIDE and handler is None:
            raise StageConfigError("the pipeline's on_error is SIDE, but this stage has no error_handler; give it one or its own on_error")
        return cls(policy, handler, max_failures)

    def too_many(self, failed: int, processed: int, *, ended: bool = False) -> bool:
        """Whether the failures so far are past the limit.

        A share is judged once enough items are in for one failure to be within it (10 items for 0.1),
        and in any case when the stage ends: the first item alone says nothing about a share.
        """
        limit = self.max_failures
        if limit is None or failed == 0:
            return False
        if isinstance(limit, int):
            return failed > limit
        if limit > 0 and not ended and processed < ceil(1 / limit):
            return False
        return failed > limit * processed
