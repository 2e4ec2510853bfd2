"""Why something stopped: one frozen record for every way to stop.

The rule kept here: a reason is data. It is recorded by whoever stops and read by everyone else;
the messages that asyncio attaches to a cancelled task are never relied upon.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

__all__ = ["CancelReason", "CancelType", "check_code", "check_reason"]


class CancelType(Enum):
    """What kind of thing asked for the stop."""

    EVENT = "event"
    TIMEOUT = "timeout"
    SIGNAL = "signal"
    MANUAL = "manual"
    ERROR = "error"
    PARENT = "parent"
    """The task, scope or pipeline around this one was stopped."""
    FENCE = "fence"
    """Another fence was left."""
    PIPELINE = "pipeline"
    """Another pipeline's run has ended."""
    MEMORY = "memory"
    DISCONNECT = "disconnect"
    """The client that asked for the work has gone."""


@dataclass(frozen=True, slots=True)
class CancelReason:
    """One reason to stop. `origin` names the stage, trigger or caller; `at` is the time in seconds since the epoch.

    `causes` are the reasons behind this one, in order: those of the fence or pipeline whose end it reports.
    Two reasons are equal when message, type and code are. Raises TypeError for what nobody could read or send on.
    """

    message: str
    cancel_type: CancelType = CancelType.MANUAL
    code: str | None = None
    origin: str | None = field(default=None, compare=False)
    at: float = field(default_factory=time.time, compare=False)
    causes: tuple[CancelReason, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check_text("message", self.message)
        _check_type(self.cancel_type)
        check_code(self.code, "a CancelReason")
        if self.origin is not None:
            _check_text("origin", self.origin)
        _check_causes(self.causes)

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, numbers and lists, ready for JSON."""
        return {
            "message": self.message,
            "cancel_type": self.cancel_type.value,
            "code": self.code,
            "origin": self.origin,
            "at": self.at,
            "causes": [cause.to_dict() for cause in self.causes],
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> CancelReason:
        """The reason that `to_dict` has told, perhaps in another process."""
        causes = tuple(cls.from_dict(cause) for cause in told.get("causes", ()))
        return cls(told["message"], CancelType(told["cancel_type"]), told.get("code"), told.get("origin"), told["at"], causes)

    def lines(self) -> Iterator[str]:
        """The reason in words, and indented below it the reasons behind it."""
        code = "" if self.code is None else f", code {self.code!r}"
        yield f"{self.message} ({self.cancel_type.value}{code})"
        for cause in self.causes:
            first, *rest = cause.lines()
            yield f"  because: {first}"
            yield from (f"  {line}" for line in rest)


def check_code(code: object, of: str) -> None:
    """Raises TypeError for what is neither a text nor None: when a trigger is made, for when it fires it is too late."""
    if code is not None and not isinstance(code, str):
        raise TypeError(f"the code of {of} is a text, not {code!r}")


def check_reason(reason: object) -> None:
    """Raises TypeError for what is no `CancelReason`: a trigger of somebody's own may give anything."""
    if not isinstance(reason, CancelReason):
        raise TypeError(f"a reason to stop is a CancelReason, not {reason!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"the {name} of a CancelReason is a text, not {value!r}")


def _check_type(value: object) -> None:
    if not isinstance(value, CancelType):
        raise TypeError(f"the type of a CancelReason is a CancelType, such as CancelType.MANUAL, not {value!r}")


def _check_causes(causes: object) -> None:
    if not isinstance(causes, tuple) or not all(isinstance(cause, CancelReason) for cause in cast("tuple[object, ...]", causes)):
        raise TypeError(f"the causes of a CancelReason are a tuple of reasons, not {causes!r}")
