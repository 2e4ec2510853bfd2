"""What a stage and a pool of workers (threads, processes) say to each other.

The rule kept here: the stage owns order, policy and counting; the pool owns who does what. Between them go parcels, whose
results come back as they are there. A handler that needs more than one call for one value (attempts, a clock, outputs
one by one) gets parcels of jobs; each job comes back once, with its `outcome`. All calls are on the run's loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .base import Handler, Outcome

if TYPE_CHECKING:
    from pipeline.runtime import PipelineRuntime

    from .parcel import Parcel

__all__ = ["DONE", "HOLD_LIMIT", "PARTIAL_LIMIT", "Executor", "Job", "Order", "Pace"]

HOLD_LIMIT = 2048
"""Items that one worker holds at most beside the one it works on."""
PARTIAL_LIMIT = 64
"""Outputs of one item that a worker may send ahead of what has been passed on downstream."""


DONE = Outcome()
"""The outcome of a job that simply returned its `value` at the first attempt; one object for all of them."""


class Job:
    """One item on its way through a pool. Its `outputs` (of a generator) may leave before its `outcome` is known."""

    __slots__ = ("attempt", "booked", "finished", "grant", "item", "outcome", "outputs", "passing", "queued", "retried", "settled", "spoiled", "value")

    def __init__(self, item: Any) -> None:
        self.item = item
        self.attempt = 1
        self.retried = 0
        """Attempts of earlier workers that were given up."""
        self.outcome: Outcome | None = None
        self.value: Any = None
        """The output, when `outcome` is `DONE`."""
        self.outputs: deque[Any] | tuple[()] = ()
        """Of a generator: made outputs that have not left yet."""
        self.grant: Callable[[int], None] | None = None
        """Tells the worker how many of `outputs` have left, so that it may send as many more."""
        self.queued = False
        """Whether the stage knows already that there is news."""
        self.passing = False
        """An error of an earlier stage that only keeps its place in the order."""
        self.spoiled: Any = None
        """The `Err` that a generator yielded: the item has failed, whatever comes after."""
        self.finished = False
        self.settled = False
        self.booked = False
        """The item is in the ledger already."""

    def add_output(self, output: Any) -> None:
        """One more output of a generator."""
        if not self.outputs:
            self.outputs = deque()
        self.outputs.append(output)


@dataclass(frozen=True, slots=True)
class Order:
    """What a stage asks of a pool: how many workers, doing what, holding how much, and whom to tell."""

    runtime: PipelineRuntime
    stage: str
    group: int
    handlers: Sequence[Handler]
    concurrency: int
    buffer: int | None
    simple: bool
    """Parcels hold the items themselves, not jobs."""
    known: set[type]
    """Types of ordinary outputs that the stage has seen; looked at from any thread."""
    news: Callable[[Parcel], None]
    """More of this parcel is finished."""
    told: Callable[[Job], None]
    """There are outputs of this job, which is still at work."""
    took: Callable[[float, int], None]
    """An item took so many seconds, as did so many in all; for jobs, their outcomes say it."""
    ready: Callable[[], None]
    """A worker may take more."""
    broke: Callable[[BaseException, str], None]
    """`setup` or `teardown` has raised (the second argument says which), or workers cannot start."""
    max_items: int | None = None
    """Items that a worker process handles before another one takes its place."""
    max_memory: int | None = None
    """Bytes that a worker process may take."""


class Pace:
    """How long items take, in seconds, as far as is known: the newest count most."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.weight = 0.0
        """Bytes in large buffers that an item brings and leaves."""

    @property
    def known(self) -> bool:
        return self.mean > 0

    def add(self, seconds: float, items: int, moved: int = 0) -> None:
        """So many items took so long together, and so many bytes in large buffers were moved for them."""
        if seconds > 0 and items > 0:
            share = 1 - 0.8**items if self.mean else 1.0
            self.mean += (seconds / items - self.mean) * share
            self.weight += (moved / items - self.weight) * share

    def items_in(self, seconds: float, limit: int) -> int:
        """How many items take so long: at least one, and only one until anything is known."""
        return min(max(int(seconds / self.mean), 1), limit) if self.mean else 1


class Executor(Protocol):
    """A pool of workers of one stage in one run."""

    def start(self) -> None:
        """Start the workers; does not wait for them."""
        ...

    @property
    def capacity(self) -> int:
        """How many items the workers may hold at once, as things are."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a worker has something to do that takes real time: an item, its start, or its end."""
        ...

    def room(self) -> int:
        """How many more items may be handed over now: none, while a few more would only make a small parcel."""
        ...

    def share(self, items: int) -> int:
        """How many items shall go into one parcel, when there are so many."""
        ...

    def submit(self, parcels: Sequence[Parcel]) -> None:
        """Hand over parcels; at most `room()` items."""
        ...

    async def close(self) -> None:
        """No more parcels will come and all have come back: run `teardown`s, and wait until every worker has ended."""
        ...

    def abort(self) -> None:
        """Ask every worker to stop now. Synchronous, idempotent; nothing is reported after it."""
        ...
