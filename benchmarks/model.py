"""What is compared: workloads, their participants, and the bars that penstock has to reach.

The rule kept here: every measure is a cost, so less is better, everywhere. Speeds appear only as ratios of two costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

__all__ = ["BEST_PEER", "LIMITS", "OURS", "PACKAGES", "STDLIB", "UVLOOP", "Bar", "Cell", "Form", "Measures", "Workload"]

Measures = dict[str, float]
"""What one cell found, by name: `seconds` and `cpu` an item, or what the workload says."""

OURS = "penstock"
UVLOOP = "penstock+uvloop"

LIMITS = ("bare", "bare, no IPC")
"""Participants that are no library: the same functions called by hand, with nothing in between."""

STDLIB = ("Executor.map", "ThreadPool.imap", "Pool.imap", "Queue workers")

PACKAGES = ("streamable", "streamable async", "aioitertools", "pipestage", "aiostream", "pypeln", "pypeln.sync", "spdl", "pipevine", "stagegate")
"""Libraries, in the order of the table. Two names for one library where it has two ways that differ in speed."""

BEST_PEER = "best peer"
"""Against whichever library or stdlib executor is the cheapest in that workload."""


class Form(Enum):
    """How a bar is read."""

    SPEED = "speed"
    """The reference's cost divided by ours is at least so much."""
    COST = "cost"
    """Our cost divided by the reference's is at most so much."""
    LIMIT = "limit"
    """Our figure itself is at most so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One thing that penstock has to reach in a workload."""

    required: float
    against: str = ""
    """A participant's name, or `BEST_PEER`; nothing for a limit."""
    form: Form = Form.SPEED
    measure: str = "seconds"
    unit: str = "×"

    def met(self, value: float) -> bool:
        return value >= self.required if self.form is Form.SPEED else value <= self.required


class Cell(Protocol):
    """One participant's way through one workload."""

    def check(self) -> None:
        """Run a tiny size and raise when its outputs are wrong."""
        ...

    def measure(self) -> Measures:
        """Check, warm up, and measure; called once, in a fresh process."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The same task for everybody."""

    name: str
    title: str
    """As in the list of bars."""
    cells: Mapping[str, Cell]
    bars: tuple[Bar, ...] = ()
    uncounted: Mapping[str, str] = field(default_factory=dict)
    """Participants that are shown but are nobody's reference, each with the reason."""
    rounds: int | None = None
    """At most so many rounds, where one tells as much as several."""
    timeout: float = 30.0
    """Seconds for one cell, all of its runs together."""
    loop: bool = True
    """Whether penstock's cell depends on the event loop, so that it is worth trying under uvloop too."""
