"""`SchedulerSnapshot`: all that a scheduler does and what keeps the rest waiting, at one moment.

The rule kept here: everything that somebody watches is in here, as plain values that never change. Reading it holds up the
scheduler for as long as what is described takes, whatever else waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from .amounts import plain
from .claim import Claim
from .engine import Shortage, reason, shortages

if TYPE_CHECKING:
    from .handles import PipelineHandle
    from .scheduler import Scheduler

__all__ = ["PipelineRow", "ResourceRow", "SchedulerSnapshot", "ShortageRow", "WorkRow", "read_snapshot"]

_HOLDERS = 10
"""Holders that are named for each shortage: all of them, for each that waits, would be a product of two large numbers."""


@dataclass(frozen=True, slots=True)
class ResourceRow:
    """One resource: what there is, what is held, and what is free."""

    label: str
    capacity: int | float
    in_use: int | float
    free: int | float


@dataclass(frozen=True, slots=True)
class ShortageRow:
    """What blocked work lacks: how much it needs of what, how much is free, and who holds how much of it.

    `holders` are the ten that hold most of it; `more` counts the others.
    """

    label: str
    needed: int | float
    free: int | float
    holders: tuple[tuple[str, int | float], ...]
    more: int = 0


@dataclass(frozen=True, slots=True)
class WorkRow:
    """A task, a reservation, or an item of a streaming pipeline.

    `state`: "running", "ready" (its resources are its own, and its thread comes for it) or "blocked". `seconds`: for how
    long. `reason`: why it is blocked, in words; `shortages`: what it lacks, in numbers.
    """

    kind: str
    name: str
    pipeline: str
    stage: int
    priority: int
    state: str
    seconds: float
    needs: tuple[tuple[str, int | float], ...]
    reason: str | None = None
    shortages: tuple[ShortageRow, ...] = ()


@dataclass(frozen=True, slots=True)
class PipelineRow:
    """A staged pipeline that runs or is queued, and the stage that it has reached."""

    name: str
    state: str
    stage: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """One moment of a scheduler. `blocked` has the next ones, in order; `waiting` counts all of them.

    `totals`: what has ended so far, by what and how, and what was submitted.
    """

    name: str
    resources: tuple[ResourceRow, ...]
    running: tuple[WorkRow, ...]
    ready: tuple[WorkRow, ...]
    blocked: tuple[WorkRow, ...]
    waiting: int
    pipelines: tuple[PipelineRow, ...]
    totals: Mapping[str, int]
    pipeline_parallelism: int
    task_parallelism: int
    shutdown_started: bool
    closed: bool

    def resource(self, label: str) -> ResourceRow:
        """One resource by its name; `KeyError` if there is none."""
        for row in self.resources:
            if row.label == label:
                return row
        raise KeyError(label)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists of numbers and texts."""
        return asdict(self)


def read_snapshot(scheduler: Scheduler, most: int) -> SchedulerSnapshot:
    """For `Scheduler.snapshot`."""
    engine = scheduler.engine
    turn = scheduler.turn
    with turn.glance, turn.lock:
        turn.clear()
        now = monotonic()
        free = dict(engine.free)
        held = [_row(claim, "running" if claim.at_work else "ready", now) for claim in engine.holding]
        holders = engine.holders()
        taken = engine.threads_taken
        head = engine.queue.head()
        next_ones = engine.queue.first(most)
        waiting = engine.queue.live
        pipelines = tuple([_pipeline(handle, now) for handle in scheduler.pipelines])
        totals = dict(scheduler.totals)
    if head is not None and most > 0 and next_ones[0] is not head:  # one whose group has been passed over too often
        next_ones = [head, *(claim for claim in next_ones if claim is not head)][:most]
    blocked: list[WorkRow] = []
    for claim in next_ones:
        lacks = shortages(claim, free, holders)
        blocked.append(_row(claim, "blocked", now, reason(lacks, claim, head, taken), tuple(map(_shortage, lacks))))
    return SchedulerSnapshot(
        name=scheduler.name,
        resources=tuple(
            [
                ResourceRow(label, plain(amount), plain(amount - free[label]), plain(free[label]))
                for label, amount in engine.capacity.items()
            ]
        ),
        running=tuple([row for row in held if row.state == "running"]),
        ready=tuple([row for row in held if row.state == "ready"]),
        blocked=tuple(blocked),
        waiting=waiting,
        pipelines=pipelines,
        totals=totals,
        pipeline_parallelism=scheduler.pipeline_parallelism,
        task_parallelism=scheduler.task_parallelism,
        shutdown_started=scheduler.shutdown_started(),
        closed=scheduler.closed(),
    )


def _row(
    claim: Claim, state: str, now: float, why: str | None = None, shortages: tuple[ShortageRow, ...] = ()
) -> WorkRow:
    return WorkRow(
        kind=claim.kind,
        name=claim.title,
        pipeline=claim.group.name,
        stage=claim.stage,
        priority=claim.priority,
        state=state,
        seconds=now - claim.at,
        needs=tuple([(label, plain(amount)) for label, amount in claim.needs]),
        reason=why,
        shortages=shortages,
    )


def _shortage(short: Shortage) -> ShortageRow:
    holders = tuple([(name, plain(amount)) for name, amount in short.holders[:_HOLDERS]])
    return ShortageRow(short.label, plain(short.needed), plain(short.free), holders, len(short.holders) - len(holders))


def _pipeline(handle: PipelineHandle, now: float) -> PipelineRow:
    return PipelineRow(handle.title, handle.state.name.lower(), handle.stage, now - handle.at)
