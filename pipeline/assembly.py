"""One run's nodes and edges: built from the definition, taken apart by a stop.

The rule kept here: taking apart is synchronous and idempotent. `stop_source` starts a drain, `cut` ends everything up
to one stage, `abort` ends everything; afterwards `settle` books what was in flight as cancelled, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from .channel import EMPTY, Channel
from .feeds import Feed
from .metrics import Counters, Ledger, read_ledger
from .pace import Pacer
from .policy import ErrorPolicy
from .protocols import Divisible, Inlet, Node, Outlet, Seat, StageLike, Wires
from .runtime import PipelineRuntime
from .source import Source

_BARE_CAPACITY = 64
"""Size of the only edge of a pipeline without stages, in items."""

if TYPE_CHECKING:
    from .scheduler import Scheduler

__all__ = ["Assembly", "Link", "Sink", "seats_for"]


@dataclass(frozen=True, slots=True)
class Link:
    """One stage of a definition, with what the pipeline that it was declared in has for it: policy and scheduler."""

    stage: StageLike[Any, Any]
    default_policy: ErrorPolicy
    scheduler: Scheduler | None = None


class Sink(Outlet, Protocol):
    """Where the last stage's outputs go, and a consumer takes them."""

    tallied: int

    @property
    def delivered(self) -> int:
        """Outputs that the consumer has."""
        ...

    @property
    def discarded(self) -> int:
        """Outputs that were left when the consumer was gone."""
        ...

    @property
    def drained(self) -> bool:
        """Whether the consumer has taken everything."""
        ...

    def connect(self, up: Counters, runtime: PipelineRuntime) -> None: ...
    def abort(self) -> None: ...
    def lose(self, number: int) -> None:
        """So many outputs were stopped on their way here."""
        ...

    def attract(self, node: Node, *, alone: bool) -> None:
        """The node that the outputs come from: an iteration may ask it for more, see `Pullable`.

        `alone`: it is all there is, and nothing in it ever waits for anything but room.
        """
        ...

    def hand_over(self) -> None:
        """The run closes: what still waits becomes the consumer's own."""
        ...


def seats_for(links: Sequence[Link]) -> tuple[Seat, ...]:
    """A fresh set of counters for every stage, under names that are unique in the chain."""
    taken: set[str] = set()
    seats: list[Seat] = []
    for index, link in enumerate(links):
        name = link.stage.name
        if name in taken:
            name = next(f"{name}-{n}" for n in count(2) if f"{name}-{n}" not in taken)
        taken.add(name)
        counters = Counters(name, capacity=link.stage.capacity, concurrency=link.stage.width)
        seats.append(Seat(link.stage, name, index, counters, link.default_policy, link.scheduler))
    return tuple(seats)


@dataclass(slots=True)
class _Placed:
    """A node with its ends, and the range of stages that it runs."""

    node: Node
    inlet: Inlet
    outlet: Outlet
    seats: Sequence[Seat]
    task: asyncio.Task[None] | None = None
    stopped: bool = False

    @property
    def last(self) -> int:
        return self.seats[-1].index


class Assembly:
    """The nodes, the edges between them, the source's feed and the sink of one run."""

    def __init__(self, runtime: PipelineRuntime, source: Source, links: Sequence[Link], sink: Sink) -> None:
        assert runtime.loop is not None
        self.runtime = runtime
        self.sink = sink
        self.source_counters = Counters("source")
        self.seats = seats_for(links)
        self._bare = Counters("pass")
        self._placed: list[_Placed] = []
        self._cut = -1
        """The index up to which stages have been stopped."""
        self._feed: Feed = self._open_feed(source)
        self._place_nodes()

    # --- building

    def _open_feed(self, source: Source) -> Feed:
        first = self.seats[0].counters if self.seats else self._bare
        capacity = self.seats[0].stage.capacity if self.seats else _BARE_CAPACITY
        return source.open(self.runtime, self.source_counters, first, capacity)

    def _place_nodes(self) -> None:
        inlet: Inlet = self._feed.inlet
        groups = _fused_groups(self.seats)
        for position, group in enumerate(groups):
            last = group[-1].counters
            if position == len(groups) - 1:
                self.sink.connect(last, self.runtime)
                outlet: Outlet = self.sink
                following: Inlet | None = None
            else:
                following = self._channel(last, groups[position + 1][0])
                outlet = following
            node = group[0].stage.open(group, Wires(self.runtime, inlet, outlet))
            self._placed.append(_Placed(node, inlet, outlet, group))
            if following is not None:
                inlet = following
        if not groups:
            self._place_bare(inlet)
        node = self._placed[-1].node
        self.sink.attract(node, alone=len(groups) == 1 and not self._feed.inlet.stores and hasattr(node, "pull"))

    def _place_bare(self, inlet: Inlet) -> None:
        """A pipeline without stages: the source's items go to the sink as they are, past counters that nobody sees."""
        self.sink.connect(self._bare, self.runtime)
        seat = Seat(None, "pass", 0, self._bare, ErrorPolicy.DROP)
        self._placed.append(_Placed(_PassThrough(inlet, self.sink), inlet, self.sink, (seat,)))

    def _channel(self, up: Counters, seat: Seat) -> Channel:
        assert self.runtime.loop is not None
        return Channel(seat.stage.capacity, up, seat.counters, self.runtime.loop)

    def start(self) -> None:
        """Start every node's task, the last one first so that each finds its consumer waiting, and then the feed."""
        for placed in reversed(self._placed):
            placed.task = self.runtime.start_task(
                placed.node.run(), name=_label(placed.seats), group=placed.last, on_end=partial(self._node_ended, placed)
            )
        self._feed.start()

    @property
    def done(self) -> bool:
        """Whether the feed and every node have ended."""
        return self._feed.done and all(placed.task is not None and placed.task.done() for placed in self._placed)

    def _node_ended(self, placed: _Placed, _: asyncio.Task[Any]) -> None:
        # Also reached by a task that was cancelled before its first step, whose own `finally` never runs.
        placed.outlet.finish()
        if not placed.inlet.ended:
            self.cut(placed.seats[0].index - 1)
            placed.inlet.abort()

    @property
    def outside(self) -> bool:
        """Whether threads or processes are at work: what happens next is not in the loop's hands."""
        parts = (self._feed, *(placed.node for placed in self._placed))
        return any(getattr(part, "outside", False) for part in parts)  # see the protocol `Outside`

    # --- taking apart

    def stop_source(self) -> None:
        """Take nothing more from the source; what is inside goes on."""
        self._feed.stop()

    def cut(self, upto: int) -> None:
        """End the source and every stage with an index up to `upto`; what they have already passed on goes on."""
        self._cut = max(self._cut, upto)
        for placed in self._placed:
            if placed.seats[0].index <= upto < placed.last and isinstance(placed.node, Divisible):
                placed.inlet.abort()
                placed.node.cut(upto)
            elif placed.last <= upto and not placed.stopped:
                placed.stopped = True
                placed.inlet.abort()
                placed.node.abort()
                placed.outlet.finish()
        self._feed.abort()
        self.runtime.cancel_tasks(upto)

    def abort(self) -> None:
        """Close every edge and stop every node, at once."""
        self._feed.abort()
        for placed in self._placed:
            placed.stopped = True
            placed.inlet.abort()
            placed.node.abort()
        self.sink.abort()

    def settle(self) -> None:
        """Book what stopped nodes still held as cancelled, and what the source gave too late as discarded.

        A node that ended by itself is left alone: if it holds an item, that is a fault, and the ledger shall show it.
        """
        self._feed.settle()
        for placed in self._placed:
            for seat in placed.seats:
                if placed.stopped or seat.index <= self._cut or self.runtime.cancelled:
                    seat.counters.cancelled += seat.counters.in_flight
        if not self.seats and (self.runtime.cancelled or self._bare.discarded):
            self.sink.lose(self.source_counters.emitted - self._bare.emitted)

    def ledger(self, elapsed: float) -> Ledger:
        """All counts at this moment; from any thread."""
        return read_ledger(self.source_counters, [seat.counters for seat in self.seats], self.sink, elapsed)


def _fused_groups(seats: Sequence[Seat]) -> list[list[Seat]]:
    groups: list[list[Seat]] = []
    for seat in seats:
        if groups and seat.stage.fusable and groups[-1][-1].stage.fusable:
            groups[-1].append(seat)
        else:
            groups.append([seat])
    return groups


def _label(seats: Sequence[Seat]) -> str:
    return "+".join(seat.name for seat in seats)


class _PassThrough:
    """A pipeline without stages: the source's items go to the sink as they are."""

    def __init__(self, inlet: Inlet, outlet: Outlet) -> None:
        self._inlet = inlet
        self._outlet = outlet

    async def run(self) -> None:
        inlet, outlet = self._inlet, self._outlet
        pace = Pacer()
        while await outlet.wait_room():
            item = inlet.pop()
            if item is not EMPTY:
                outlet.put_nowait(item)
                if pace.due():
                    await pace.rest()
            elif not await inlet.wait_items():
                return

    def abort(self) -> None:
        pass
