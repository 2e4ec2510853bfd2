"""The life of one run as a table, and the patience given to each phase of stopping.

The rule kept here: escalation goes one way. `NEW -> RUNNING -> {DRAINING | ABORTING} -> KILLING -> CLOSED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import isfinite

from .errors import StageConfigError

__all__ = ["TRANSITIONS", "Grace", "PipelineState", "may_move"]


class PipelineState(Enum):
    """Where a run stands."""

    NEW = "new"
    RUNNING = "running"
    DRAINING = "draining"
    """The source is stopped; what was taken finishes."""
    ABORTING = "aborting"
    """Everything is asked to stop at once; handlers may clean up."""
    KILLING = "killing"
    """Patience is over: processes are terminated, then killed."""
    CLOSED = "closed"


TRANSITIONS: dict[PipelineState, frozenset[PipelineState]] = {
    PipelineState.NEW: frozenset({PipelineState.RUNNING, PipelineState.CLOSED}),
    PipelineState.RUNNING: frozenset(
        {PipelineState.DRAINING, PipelineState.ABORTING, PipelineState.KILLING, PipelineState.CLOSED}
    ),
    PipelineState.DRAINING: frozenset({PipelineState.ABORTING, PipelineState.KILLING, PipelineState.CLOSED}),
    PipelineState.ABORTING: frozenset({PipelineState.KILLING, PipelineState.CLOSED}),
    PipelineState.KILLING: frozenset({PipelineState.CLOSED}),
    PipelineState.CLOSED: frozenset(),
}


def may_move(current: PipelineState, target: PipelineState) -> bool:
    """Whether `target` may follow `current`."""
    return target in TRANSITIONS[current]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grace:
    """How long each phase of stopping may take, in seconds.

    `drain`: for items already taken to finish. `abort`: for handlers to clean up after being cancelled.
    `terminate`: between asking worker processes to end (SIGTERM) and killing them. `kill`: for killed ones to be reaped.
    A stop never outlasts the sum of the phases that it enters by more than 0.5 s.
    """

    drain: float = 30.0
    abort: float = 1.0
    terminate: float = 0.5
    kill: float = 1.0

    def __post_init__(self) -> None:
        for name in ("drain", "abort", "terminate", "kill"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
                raise StageConfigError(f"Grace.{name} must be a finite number of seconds, 0 or more, not {value!r}")
