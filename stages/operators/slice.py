"""A part of the stream: `take`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pipeline.errors import StageConfigError
from pipeline.policy import ErrorPolicy
from pipeline.protocols import Node, Seat, Wires
from workers.base import WorkerState

from ..control import Last
from ..definition import Stage, StageOptions

__all__ = ["TakeStage", "take"]

T = TypeVar("T")


class TakeStage(Stage[Any, Any]):
    """The definition of `take(n)`: a stage from any type to the same."""

    __slots__ = ()

    def accepts(self, item: T, /) -> T:
        raise AssertionError("for the type checker only, never called")


def take(n: int) -> TakeStage:
    """The first `n` items; then the stages before it and the source are stopped, and the run completes.

    What they had pulled beyond that is in the ledger, as cancelled or discarded.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StageConfigError(f"take needs a whole number of items, 0 or more, not {n!r}")
    if n == 0:
        return _TakeNothing([_pass], StageOptions(name="take"))

    def count(item: Any, state: WorkerState) -> Any:
        taken: int = state.values.get("taken", 0) + 1
        state.values["taken"] = taken
        return Last(item) if taken == n else item

    return TakeStage([count], StageOptions(name="take"))


def _pass(item: Any) -> Any:
    return item


class _TakeNothing(TakeStage):
    """Ends at once, before anything is pulled."""

    __slots__ = ()

    @property
    def fusable(self) -> bool:
        return False

    def check(self, default_policy: ErrorPolicy) -> None:
        pass

    def open(self, seats: Sequence[Seat], wires: Wires) -> Node:
        return _EndedNode()


class _EndedNode:
    async def run(self) -> None:
        pass

    def abort(self) -> None:
        pass
