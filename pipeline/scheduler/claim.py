"""`Claim`: one piece of work that needs resources, and `Group`: the pipeline that it belongs to.

The rule kept here: a claim waits, then holds, then is over; it never goes back. Its place in the queue is fixed when it is
made: higher priority, later stage, earlier pipeline, earlier submission.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeAlias

from .amounts import Needs

__all__ = ["Claim", "Group", "Key", "Phase", "check_name", "check_rank"]

Key: TypeAlias = tuple[int, int, int, int]
"""Minus priority, minus stage, the pipeline's number, the claim's number. The smallest goes first."""


class Phase(IntEnum):
    """`WAITING` in the queue, `HELD`: its resources are its own, `OVER`: given back, or withdrawn while it waited."""

    WAITING = 0
    HELD = 1
    OVER = 2


class Group:
    """A pipeline, a run or a single caller: what fairness is kept between, and what has one number in the order."""

    __slots__ = ("heap", "name", "number", "priority", "since", "waiting")

    def __init__(self, number: int, name: str, priority: int = 0) -> None:
        self.number = number
        self.name = name
        self.priority = priority
        self.waiting = 0
        self.since = 0
        """Admissions of the whole scheduler when one of this group was last admitted, or when it began to wait."""
        self.heap: list[tuple[int, int, int, int, Claim]] = []


class Claim:
    """What one piece of work needs, and how far it has come. The work itself is a kind of it: there is one for each."""

    __slots__ = ()

    kind: str
    """"task", "reservation" or "item"."""
    needs: Needs
    key: Key
    threaded = False
    """It also needs one of the scheduler's own threads."""
    phase: Phase
    behind: Claim | None
    """In the queue: the next of the same rank."""
    at: float
    """When it came into this phase, by `time.monotonic()`."""

    @property
    def group(self) -> Group:
        """What it belongs to."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What people call it."""
        raise NotImplementedError

    @property
    def at_work(self) -> bool:
        """Whether the work itself has begun."""
        raise NotImplementedError

    def granted(self) -> None:
        """Its resources are its own. Called while the scheduler is locked, from any thread; must not wait."""
        raise NotImplementedError

    @property
    def stage(self) -> int:
        return -self.key[1]

    @property
    def priority(self) -> int:
        return -self.key[0]


def check_rank(**ranks: Any) -> None:
    """What decides who goes first: whole numbers, for they are compared with those of everybody else."""
    for option, rank in ranks.items():
        if not isinstance(rank, int):
            raise ValueError(f"{option} is a whole number, the higher goes first, and not {rank!r}")


def check_name(name: Any) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a text for people, or None, and not {name!r}")
