"""`Share`: one run of a streaming pipeline in a scheduler.

The rule kept here: whatever becomes of the run, and of items whose handlers could not be stopped, its end gives back
everything that is still held in its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, StageConfigError

from .amounts import Needs, as_needs, check_needs
from .claim import Group
from .reserve import Hold

if TYPE_CHECKING:
    from pipeline.runtime import PipelineRuntime

    from .scheduler import Scheduler

__all__ = ["Share", "check_stage"]


class Share:
    """Makes the claims of a run's items: all have the run's place in the order of pipelines."""

    def __init__(self, scheduler: Scheduler, runtime: PipelineRuntime, group: Group) -> None:
        self._scheduler = scheduler
        self._runtime = runtime
        self._group = group
        self._holds: set[Hold] = set()
        runtime.closed.add_done_callback(self._end)

    def hold(self, needs: Needs, stage: str, index: int) -> Hold:
        """For one item of a stage, which is the `index`-th of the run: the later goes first."""
        hold = Hold(self._scheduler, self._group, needs, f"{self._group.name}/{stage}", "item", 0, index)
        self._holds.add(hold)
        return hold

    def release(self, hold: Hold) -> None:
        """The item is over; once is enough."""
        self._holds.discard(hold)
        hold.release()

    def _end(self, _: object) -> None:
        holds, self._holds = self._holds, set()
        for hold in holds:
            hold.release()
        self._scheduler.end_share(self._runtime)


def check_stage(stage: Any, scheduler: Scheduler | None) -> None:
    """Before a run starts: what a stage with resources needs can be given. `StageConfigError`, or a kind of it, if not."""
    if scheduler is None:
        raise StageConfigError(
            f"stage {stage.name!r} needs resources and its pipeline has no scheduler; "
            "give it one: Pipeline(..., scheduler=Scheduler(resources=...))"
        )
    check_needs(as_needs(stage.resources), scheduler.engine.capacity, f"each item of stage {stage.name!r}")
    if scheduler.shutdown_started():
        raise PipelineError(f"stage {stage.name!r} needs the scheduler {scheduler.name!r}, which is shutting down")
