"""What a whole run costs: three stages, one item, in a loop that runs already."""

from __future__ import annotations

import asyncio
from functools import partial

from ..chains import ASYNC_CHAINS, AsyncChain, penstock_run, pipevine_run, spdl_chain
from ..handlers import PLAIN, through_three
from ..measure import Tally, Timed, WrongResult
from ..model import Bar, Form, Workload

__all__ = ["WORKLOADS"]


async def _trivial() -> int:
    return 1


def _bare(n: int) -> Tally:
    for _ in range(n):
        asyncio.run(_trivial())
    return Tally(n)


def _each_anew(chain: AsyncChain, n: int) -> Tally:
    return asyncio.run(_in_one_loop(chain, n))


async def _in_one_loop(chain: AsyncChain, n: int) -> Tally:
    for _ in range(n):
        _verify(await chain(1, PLAIN))
    return Tally(n)


def _spdl(n: int) -> Tally:
    for _ in range(n):
        _verify(spdl_chain(1, PLAIN))
    return Tally(n)


def _verify(tally: Tally) -> None:
    if tally.count is None and tally.last is None:
        raise WrongResult("the one item went nowhere")
    tally.verify(through_three(1))


_CHAINS: dict[str, AsyncChain] = {"penstock": penstock_run, **ASYNC_CHAINS, "pipevine": pipevine_run}

_CELLS = {
    "bare": Timed(run=_bare, expected=Tally, base=4),
    **{name: Timed(run=partial(_each_anew, chain), expected=Tally, base=4) for name, chain in _CHAINS.items()},
    "spdl": Timed(run=_spdl, expected=Tally, base=1, repeats=1),
}

WORKLOADS = [
    Workload(
        name="startup",
        title="three stages, one item, in a running loop (bare: `asyncio.run`)",
        cells=_CELLS,
        bars=(Bar(against="bare", required=1.3, form=Form.COST),),
    ),
]
