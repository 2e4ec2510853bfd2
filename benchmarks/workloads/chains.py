"""Three stages, one after the other: plain functions, coroutines, coroutines that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from .. import chains as ways
from ..chains import ASYNC_CHAINS, SYNC_CHAINS, Handlers, in_loop
from ..handlers import ASYNC, ASYNC_CALLING, CALLING, PLAIN, WAITING, through_three
from ..measure import Tally, Timed
from ..model import BEST_PEER, Bar, Form, Workload

__all__ = ["WORKLOADS"]


def _cell(run: Callable[[int], Tally]) -> Timed:
    return Timed(run=run, expected=through_three)


def _in_loop(handlers: Handlers) -> dict[str, Timed]:
    return {name: _cell(in_loop(chain, handlers)) for name, chain in ASYNC_CHAINS.items()}


def _sync(way: ways.SyncChain, handlers: Handlers) -> Timed:
    return _cell(partial(_swapped, way, handlers))


def _swapped(way: ways.SyncChain, handlers: Handlers, n: int) -> Tally:
    return way(n, handlers)


def _run_cells(handlers: Handlers) -> dict[str, Timed]:
    return {
        "bare": _sync(ways.bare_loop, handlers),
        "penstock": _cell(in_loop(ways.penstock_run, handlers)),
        **{name: _sync(way, handlers) for name, way in SYNC_CHAINS.items()},
        **_in_loop(handlers),
        "pipevine": _cell(in_loop(ways.pipevine_run, handlers)),
    }


def _for_cells(handlers: Handlers) -> dict[str, Timed]:
    return {
        "penstock": _cell(in_loop(ways.penstock_for, handlers)),
        **_in_loop(handlers),
        "pipevine": _cell(in_loop(ways.pipevine_for, handlers)),
    }


def _iter_cells(handlers: Handlers) -> dict[str, Timed]:
    return {
        "bare": _sync(ways.bare_loop, handlers),
        "penstock": _sync(ways.penstock_iter, handlers),
        "streamable": _sync(ways.streamable_iterated, handlers),
        "pypeln.sync": _sync(ways.pypeln_sync_iterated, handlers),
        "spdl": _sync(ways.spdl_chain, handlers),
        "pipevine": _sync(ways.pipevine_iter, handlers),
    }


def _async_run_cells(handlers: Handlers) -> dict[str, Timed]:
    return {
        "bare": _cell(in_loop(ways.bare_awaits, handlers)),
        "penstock": _cell(in_loop(ways.penstock_run, handlers)),
        **_in_loop(handlers),
        "spdl": _sync(ways.spdl_chain, handlers),
        "pipevine": _cell(in_loop(ways.pipevine_run, handlers)),
    }


async def _one_wait_each(n: int, handlers: Handlers) -> Tally:
    # Perfect overlap: the stages wait at the same time, so that an item costs one wait, whatever the number of stages.
    for _ in range(n):
        await asyncio.sleep(0.001)
    return Tally(n)


def _waiting_cells() -> dict[str, Timed]:
    cells = {**_async_run_cells(WAITING), "bare": _cell(in_loop(_one_wait_each, WAITING))}
    # A few items only, so that what it takes to find out that stages wait is in the time.
    return {name: Timed(run=cell.run, expected=through_three, base=1, seconds=0.3, repeats=2) for name, cell in cells.items()}


WORKLOADS = [
    Workload(
        name="sync3-run",
        title="three trivial sync stages, `run()`",
        cells=_run_cells(PLAIN),
        bars=(Bar(against="bare", required=0.85), Bar(against=BEST_PEER, required=1.05)),
    ),
    Workload(
        name="sync3-for",
        title="three trivial sync stages, `async for`",
        cells=_for_cells(PLAIN),
        bars=(Bar(against=BEST_PEER, required=3.0),),
    ),
    Workload(
        name="sync3-iter",
        title="three trivial sync stages, synchronous `iter()`",
        cells=_iter_cells(PLAIN),
        bars=(Bar(against="bare", required=0.35),),
    ),
    Workload(
        name="sync3calls-run",
        title="sync stages that call something, `run()`",
        cells=_run_cells(CALLING),
        bars=(Bar(against="bare", required=0.85), Bar(against=BEST_PEER, required=1.05)),
    ),
    Workload(
        name="sync3calls-for",
        title="sync stages that call something, `async for`",
        cells=_for_cells(CALLING),
        bars=(Bar(against=BEST_PEER, required=3.0),),
    ),
    Workload(
        name="sync3calls-iter",
        title="sync stages that call something, `iter()`",
        cells=_iter_cells(CALLING),
        bars=(Bar(against="bare", required=0.35),),
    ),
    Workload(
        name="async3-run",
        title="three trivial async stages, `run()`",
        cells=_async_run_cells(ASYNC),
        bars=(Bar(against="bare", required=0.75), Bar(against=BEST_PEER, required=1.8)),
    ),
    Workload(
        name="async3-for",
        title="three trivial async stages, `async for`",
        cells=_for_cells(ASYNC),
        bars=(Bar(against=BEST_PEER, required=1.5),),
    ),
    Workload(
        name="async3calls-run",
        title="async stages that call something, `run()`",
        cells=_async_run_cells(ASYNC_CALLING),
        bars=(Bar(against="bare", required=0.75), Bar(against=BEST_PEER, required=1.8)),
    ),
    Workload(
        name="async3calls-for",
        title="async stages that call something, `async for`",
        cells=_for_cells(ASYNC_CALLING),
        bars=(Bar(against=BEST_PEER, required=1.5),),
    ),
    Workload(
        name="wait3",
        title="three stages that each wait 1 ms (bare: perfect overlap)",
        cells=_waiting_cells(),
        bars=(Bar(against="bare", required=1.10, form=Form.COST),),
    ),
]
