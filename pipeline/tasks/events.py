"""What is told about a task: frozen events, numbered per task.

The rule kept here: a task has exactly one terminal event, and it is the last one. Events are plain data, the same in
memory, in a database and on the wire.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

__all__ = ["TERMINAL", "EventType", "TaskEvent", "TaskKey"]


class TaskKey(NamedTuple):
    """What a task is known by: the application, the kind of work, and which one of its kind."""

    app: str
    name: str
    id: str

    def __str__(self) -> str:
        return f"{self.app}/{self.name}/{self.id}"

    @classmethod
    def of(cls, app: object, name: object, id: object) -> TaskKey:
        """The key for these three, as text: a number is as good as its digits.

        Raises ValueError for an empty part, one with a "/" or a control character, or one of more than 200 characters.
        """
        return cls(*(_part(label, value) for label, value in (("app", app), ("name", name), ("id", id))))


def _part(label: str, value: object) -> str:
    text = str(value)
    if not text or len(text) > 200 or "/" in text or text in (".", "..") or not text.isprintable():
        raise ValueError(
            f"the {label} of a task is {text[:200]!r}; use 1 to 200 printable characters without '/', other than '.' and '..'"
        )
    return text


class EventType(StrEnum):
    """What an event says. The last four are terminal."""

    STARTED = "started"
    PROGRESS = "progress"
    """How far it is. Only the newest counts: a slow subscriber loses older ones, and is told how many."""
    ITEM = "item"
    """One result, or a part of it."""
    WARNING = "warning"
    ERROR = "error"
    """It has failed."""
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    COMPLETED = "completed"


TERMINAL = frozenset((EventType.ERROR, EventType.CANCELLED, EventType.TIMED_OUT, EventType.COMPLETED))


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """One thing that happened to a task.

    `seq` counts from 1 for each task, and goes on counting when the task is started again; `at` is in seconds since the
    epoch; `data` is ready for JSON, and shared by
    all who follow the task: read it, and change a copy. `dropped` is how many events were left out for this subscriber between the one before
    and this one, because it was too slow or came too late; it is no part of the event itself.
    """

    task: TaskKey
    seq: int
    type: EventType
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    at: float = field(default_factory=time.time)
    dropped: int = field(default=0, compare=False)

    @property
    def terminal(self) -> bool:
        """Whether nothing follows."""
        return self.type in TERMINAL

    def after(self, dropped: int) -> TaskEvent:
        """The same event for a subscriber for whom `dropped` events before it were left out."""
        return replace(self, dropped=dropped) if dropped else self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        told = {"task": list(self.task), "seq": self.seq, "type": self.type.value, "at": self.at, "data": dict(self.data)}
        return told | {"dropped": self.dropped} if self.dropped else told

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> TaskEvent:
        """The event that `to_dict` has told."""
        return cls(
            TaskKey(*told["task"]), told["seq"], EventType(told["type"]), told["data"], told["at"], told.get("dropped", 0)
        )
