"""`Gate`: where the items of a stage with `resources=` wait until those are free.

The rule kept here: an item holds its resources while its handler works on it, and not a moment longer. Whoever waits for
room downstream holds nothing, for the stages there may need the very same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.protocols import Seat
from pipeline.runtime import PipelineRuntime
from workers.base import Outcome
from workers.loop import LoopPerformer, Send

if TYPE_CHECKING:
    from pipeline.scheduler.amounts import Needs
    from pipeline.scheduler.reserve import Hold
    from pipeline.scheduler.share import Share

__all__ = ["Gate", "gate_for"]


def gate_for(seat: Seat, runtime: PipelineRuntime) -> Gate | None:
    """None for a stage that needs nothing."""
    if not seat.stage.options.resources:
        return None
    from pipeline.scheduler.amounts import as_needs, check_needs

    assert seat.scheduler is not None  # checked before the run
    needs = check_needs(as_needs(seat.stage.options.resources), seat.scheduler.engine.capacity, seat.name)
    return Gate(seat.scheduler.share_of(runtime), needs, seat)


class Gate:
    """One stage's in one run."""

    def __init__(self, share: Share, needs: Needs, seat: Seat) -> None:
        self._share = share
        self._needs = needs
        self._name = seat.name
        self._index = seat.index

    async def enter(self) -> Hold:
        """Wait until an item may begin. Cancelled meanwhile, nothing is held."""
        hold = self._share.hold(self._needs, self._name, self._index)
        try:
            await hold.acquire()
        except BaseException:
            self._share.release(hold)
            raise
        return hold

    def leave(self, hold: Hold) -> None:
        """Its handler is done with the item. Once is enough."""
        self._share.release(hold)

    async def perform(self, performer: LoopPerformer, item: Any, send: Send) -> Outcome:
        """As the performer does, with the resources. Outputs of a generator come when it has ended."""
        hold = await self.enter()

        async def send_freely(output: Any) -> bool:
            self.leave(hold)
            return await send(output)

        try:
            return await performer.perform(item, send_freely)
        finally:
            self.leave(hold)
