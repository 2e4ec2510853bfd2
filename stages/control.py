"""What a handler may return instead of an output."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from types import CoroutineType
from typing import Any, Final

from pipeline.result import Err

__all__ = ["SKIP", "KillSwitch", "Last", "PlainTypes", "Skip"]

_KNOWN_LIMIT = 64
"""Types remembered: a program's outputs have few, unless it makes classes as it goes."""


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


_SPECIAL = (Err, KillSwitch, Last, Skip, CoroutineType, asyncio.Future)


class PlainTypes:
    """Tells outputs from what has a meaning of its own: a look-up, once an output's type has been seen."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: set[type] = set()

    def has(self, result: Any) -> bool:
        """Whether a result is an ordinary output: not `SKIP`, an `Err`, a `KillSwitch`, nor a coroutine or a future."""
        kind = type(result)
        if kind in self.known:
            return True
        if issubclass(kind, _SPECIAL):
            return False
        if len(self.known) >= _KNOWN_LIMIT:
            self.known.clear()
        self.known.add(kind)
        return True
