"""What a handler may return instead of an output."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

__all__ = ["SKIP", "KillSwitch", "Last", "Skip"]


class Skip(Enum):
    """The type of `SKIP`: an enum member, so that it stays itself through pickling to a process and back."""

    SKIP = "skip"

    def __repr__(self) -> str:
        return "SKIP"


SKIP: Final = Skip.SKIP
"""Return this to emit nothing for an item; the item counts as succeeded and skipped."""


@dataclass(frozen=True, slots=True)
class KillSwitch:
    """Return this to cancel the whole pipeline, with a reason."""

    reason: str = "a kill switch was returned"


@dataclass(frozen=True, slots=True)
class Last:
    """Return this from an operator to emit `value` and end the stage's input: the stages before it are let go."""

    value: Any
