"""`Share`: one run of a streaming pipeline in a scheduler.

The rule kept here: whatever becomes of the run, and of items whose handlers could not be stopped, its end gives back
everything that is still held in its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .claim import Group
from .reserve import Hold

if TYPE_CHECKING:
    from .amounts import Needs
    from .scheduler import Scheduler

__all__ = ["Share"]


class Share:
    """Makes the claims of a run's items."""

    def __init__(self, scheduler: Scheduler, group: Group) -> None:
        self._scheduler = scheduler
        self._group = group
        self._holds: set[Hold] = set()

    def hold(self, needs: Needs, stage: str, index: int) -> Hold:
        """For one item of a stage, which is the `index`-th of the run: the later goes first."""
        hold = Hold(self._scheduler, self._group, needs, f"{self._group.name}/{stage}", "item", 0, index)
        self._holds.add(hold)
        return hold

    def release(self, hold: Hold) -> None:
        """The item is over."""
        self._holds.discard(hold)
        hold.release()

    def end(self) -> None:
        """The run is over."""
        holds, self._holds = self._holds, set()
        for hold in holds:
            hold.release()
