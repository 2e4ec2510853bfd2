"""What the engine asks of a stage, of a node at work, and of the two ends of an edge.

The rule kept here: `pipeline` knows stages and workers only by these shapes, so that imports run one way,
`stages -> workers -> pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from .cancellation.reason import CancelReason
from .lot import Lot
from .metrics import Counters

if TYPE_CHECKING:
    from .policy import ErrorPolicy
    from .runtime import PipelineRuntime
    from .scheduler import Scheduler

__all__ = ["Divisible", "Inlet", "Node", "Outlet", "Pullable", "Seat", "StageLike", "StopToken", "Wires", "is_stage"]

In_contra = TypeVar("In_contra", contravariant=True)
Out_co = TypeVar("Out_co", covariant=True)


class StopToken(Protocol):
    """Whether, and why, a worker should stop. Read from any thread or process, without waiting."""

    @property
    def cancelled(self) -> bool: ...
    @property
    def reasons(self) -> tuple[CancelReason, ...]: ...


class Inlet(Protocol):
    """The receiving end of an edge. `pop` returns `EMPTY` when nothing is there now."""

    stores: bool
    """Whether items may wait in it; if not, it never makes anybody wait either."""
    reads_ahead: bool
    """Whether a lot takes items from the source that may go back unused."""

    def pop(self) -> Any: ...
    def lot(self, limit: int) -> Lot | None: ...
    def count_lot(self, lot: Lot) -> None: ...
    def close_lot(self, lot: Lot) -> int: ...
    async def wait_items(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    def release(self, reserved: int) -> None: ...
    def lend(self, places: int) -> None:
        """Room of edges inside of the receiver, in which it never leaves anything; as for an outlet."""
        ...

    def abort(self) -> None: ...


class Outlet(Protocol):
    """The sending end of an edge. `room() > 0` allows as many `put_nowait`; `put` waits, and is False once closed."""

    keeps: bool
    """Whether outputs go anywhere; if not, `put_count` takes their number alone."""

    def put_count(self, number: int) -> None: ...
    def lend(self, places: int) -> None:
        """Room of edges inside of the sender, in which it never leaves anything: so many items more may wait here."""
        ...

    def room(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def put_nowait(self, item: Any) -> None: ...
    def offer(self, item: Any) -> bool:
        """Put one item if there is room; the same as asking for room first, in one call."""
        ...

    def put_many(self, items: list[Any]) -> None: ...
    async def wait_room(self) -> bool: ...
    async def put(self, item: Any) -> bool: ...
    def finish(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Seat:
    """One stage's place in one run: which stage, its counts, its name there, and the pipeline's policy and scheduler."""

    stage: Any
    name: str
    index: int
    counters: Counters
    default_policy: ErrorPolicy
    scheduler: Scheduler | None = None


@dataclass(frozen=True, slots=True)
class Wires:
    """What a node is connected to."""

    runtime: PipelineRuntime
    inlet: Inlet
    outlet: Outlet


class Node(Protocol):
    """One stage, or a few fused ones, at work in one run."""

    async def run(self) -> None:
        """Move items until the inlet has ended and every output has left, then let the workers go."""
        ...

    def abort(self) -> None:
        """Stop now: synchronous, idempotent. The node's tasks are cancelled right after it returns."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A node of several stages that can be stopped in part."""

    def cut(self, upto: int) -> None:
        """Stop the stages with an index up to `upto` at once; what they have passed on goes on."""
        ...


class Outside(Protocol):
    """A node or a feed that has threads or processes."""

    @property
    def outside(self) -> bool:
        """Whether they are at work now, and not waiting for something to do."""
        ...


class Pullable(Protocol):
    """A node that may make its outputs when they are asked for, in the consumer's own time."""

    def pull(self, reach: int) -> Iterator[Any] | None:
        """Up to `reach` outputs, each made when it is asked for; None when the node has to go on by itself.

        What is iterated is delivered. The iterator ends when its items do, or when somebody else needs the node.
        """
        ...

    def end_pull(self) -> None:
        """The consumer is done with that iterator, or leaves it."""
        ...


class StageLike(Protocol[In_contra, Out_co]):
    """A stage's definition: frozen, shared by any number of runs."""

    @property
    def name(self) -> str: ...
    @property
    def capacity(self) -> int:
        """Size of the inbound edge."""
        ...

    @property
    def width(self) -> int:
        """Items in work at once."""
        ...

    @property
    def fusable(self) -> bool:
        """Whether the stage may share one task with fusable neighbours."""
        ...

    def check(self, default_policy: ErrorPolicy) -> None:
        """Raise `StageConfigError` for what can only be known before a run; costs at most one pickling."""
        ...

    def open(self, seats: Sequence[Seat], wires: Wires) -> Node:
        """Build the node for this stage and the fusable neighbours that follow it."""
        ...

    def accepts(self, item: In_contra, /) -> Out_co:
        """Never called: gives the type checker the direction in which items go through."""
        ...


def is_stage(candidate: object) -> bool:
    """Whether this is a stage's definition. The same as `isinstance` with the protocol, at a tenth of its cost."""
    return all(hasattr(candidate, method) for method in ("accepts", "open", "check"))
