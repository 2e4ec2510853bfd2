"""What each stage more costs, up to 16.

A straight line is laid through the times of 1, 4, 8 and 16 stages. It is scaled by the bare loop of three calls, timed
in the same process, to the machine on which the bars were set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import linear_regression
from typing import Any

from .. import chains as ways
from ..handlers import ASYNC, PLAIN, async_inc, inc
from ..measure import Tally, Timed
from ..model import Bar, Cell, Form, Measures, Workload

__all__ = ["WORKLOADS"]

DEPTHS = (1, 4, 8, 16)

REFERENCE_NS = {"sync": 88.0, "async": 232.0}
"""The bare loop of three calls on the machine on which the bars were set."""

Handlers = ways.Handlers
Deep = Callable[[Handlers, int], Tally]


@dataclass(frozen=True, slots=True)
class Depth:
    """A cell that lays a line through the times of several depths."""

    way: Deep
    handler: Callable[[Any], Any]
    kind: str

    def check(self) -> None:
        for depth in DEPTHS:
            self._timed(depth).check()

    def measure(self) -> Measures:
        # The bare loop on both sides of the rest: it is the yardstick, and a disturbance makes it longer.
        before = _bare_loop(self.kind).measure()["seconds"]
        costs = [self._timed(depth).measure()["seconds"] for depth in DEPTHS]
        loop = min(before, _bare_loop(self.kind).measure()["seconds"])
        slope = linear_regression(DEPTHS, costs).slope * 1e9
        return {"stage_ns": slope, "scaled_ns": slope * REFERENCE_NS[self.kind] / (loop * 1e9), "loop_ns": loop * 1e9}

    def _timed(self, depth: int) -> Timed:
        return Timed(
            run=partial(self.way, (self.handler,) * depth),
            expected=partial(_added, depth),
            seconds=0.06,
            repeats=3,
        )


def _added(depth: int, n: int) -> Tally:
    return Tally(n, n * (n - 1) // 2 + n * depth, n - 1 + depth)


def _bare_loop(kind: str) -> Timed:
    run = partial(_swapped, ways.bare_loop, PLAIN) if kind == "sync" else ways.in_loop(ways.bare_awaits, ASYNC)
    return Timed(run=run, expected=lambda n: Tally(n), seconds=0.06)


def _swapped(way: ways.SyncChain, handlers: Handlers, n: int) -> Tally:
    return way(n, handlers)


# --- the bare limit: the calls written out, as many as there are stages


def _written_out(handlers: Handlers, n: int) -> Tally:
    function = _source(len(handlers), "def", "")
    return Tally(last=function(handlers[0], n))


def _awaits_written_out(handlers: Handlers, n: int) -> Tally:
    function = _source(len(handlers), "async def", "await ")
    return Tally(last=asyncio.run(function(handlers[0], n)))


def _source(depth: int, define: str, wait: str) -> Callable[..., Any]:
    call = "x"
    for _ in range(depth):
        call = f"{wait}f({call})"
    room: dict[str, Any] = {}
    exec(f"{define} loop(f, n):\n    last = None\n    for x in range(n):\n        last = {call}\n    return last", room)
    return room["loop"]


# --- everybody else


def _async_way(chain: ways.AsyncChain, handlers: Handlers, n: int) -> Tally:
    return ways.in_loop(chain, handlers)(n)


def _cells(kind: str) -> dict[str, Cell]:
    found: dict[str, Deep] = {
        "bare": _written_out if kind == "sync" else _awaits_written_out,
        "penstock": partial(_async_way, ways.penstock_run),
        **({"streamable": partial(_swapped, ways.streamable_drained)} if kind == "sync" else {}),
        **{name: partial(_async_way, chain) for name, chain in ways.ASYNC_CHAINS.items()},
        "pipevine": partial(_async_way, ways.pipevine_run),
    }
    handler = inc if kind == "sync" else async_inc
    return {name: Depth(way, handler, kind) for name, way in found.items()}


WORKLOADS = [
    Workload(
        name="depth-sync",
        title="each stage more, up to 16, sync",
        cells=_cells("sync"),
        bars=(Bar(required=30.0, form=Form.LIMIT, measure="scaled_ns", unit="ns"),),
    ),
    Workload(
        name="depth-async",
        title="each stage more, up to 16, async",
        cells=_cells("async"),
        bars=(Bar(required=95.0, form=Form.LIMIT, measure="scaled_ns", unit="ns"),),
    ),
]
