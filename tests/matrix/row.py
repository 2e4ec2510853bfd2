"""One row of the matrix: what is injected, how often, and how long it took until everything was closed.

The rule kept here: a row that injected nothing has shown nothing.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from helpers import contention

__all__ = ["ROWS", "Row", "Scenario", "fault", "share"]

_NOISE = 1.0
"""Seconds by which a shared machine may be late now and then; a hang takes longer."""


@dataclass
class Row:
    """What a scenario tells."""

    injected: int = 0
    seconds: list[float] = field(default_factory=list)
    contention: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def closed(self, began: float) -> None:
        """One fault, injected at `began` on the monotonic clock, is over."""
        self.injected += 1
        self.seconds.append(monotonic() - began)
        self.contention.append(contention())

    def within(self, limit: float) -> None:
        """Each of the faults must have been over within `limit` seconds; a noisy machine may delay a few.

        The limit is for a machine of one's own. On one that others use as well it is as much longer as everything is.
        """
        assert self.seconds, "nothing was measured"
        shared = statistics.median(self.contention)
        if shared > 1.1:
            self.notes.append(f"limits × {shared:.1f} on this shared machine")
        limit *= shared
        late = [seconds for seconds in self.seconds if seconds > limit]
        assert statistics.median(self.seconds) <= limit, f"typically {statistics.median(self.seconds):.3f} s, not {limit:.3f} s"
        assert len(late) <= 1 + len(self.seconds) // 50, f"{len(late)} of {len(self.seconds)} took more than {limit:.3f} s: {late}"
        assert max(self.seconds) <= limit + _NOISE, f"one took {max(self.seconds):.3f} s"


@dataclass(frozen=True)
class Scenario:
    """A fault and the code that injects it: a function, or a coroutine function for a running loop."""

    name: str
    fault: str
    run: Callable[[Row], Any]
    passes_when: str


ROWS: dict[str, Scenario] = {}


def fault(name: str, what: str, passes_when: str) -> Callable[[Callable[[Row], Any]], Callable[[Row], Any]]:
    """Enter a scenario in the matrix."""

    def enter(run: Callable[[Row], Any]) -> Callable[[Row], Any]:
        assert name not in ROWS, name
        ROWS[name] = Scenario(name, what, run, passes_when)
        return run

    return enter


def share(times: int) -> int:
    """How often to inject: as often as asked for in `make matrix`, a share of that in the suite. Never less than twice."""
    return max(2, round(times * float(os.environ.get("MATRIX_SHARE", "1"))))
