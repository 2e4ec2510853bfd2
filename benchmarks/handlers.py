"""The functions that items go through: top-level, as in anybody's program, the same for every participant.

`inc`, `double`, `dec` hold nothing but operators, which an engine can see. Their `call_` twins call something, so that
nobody can tell from outside what they do.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from operator import add, mul, sub
from typing import Any

from .measure import Tally

SPIN = int(os.environ.get("PENSTOCK_BENCH_SPIN", "4000"))
"""Passes of an empty loop that take about 200 µs; the runner measures how many once, for everybody."""


def inc(x: int) -> int:
    return x + 1


def double(x: int) -> int:
    return x * 2


def dec(x: int) -> int:
    return x - 3


def call_inc(x: int) -> int:
    return add(x, 1)


def call_double(x: int) -> int:
    return mul(x, 2)


def call_dec(x: int) -> int:
    return sub(x, 3)


async def async_inc(x: int) -> int:
    return x + 1


async def async_double(x: int) -> int:
    return x * 2


async def async_dec(x: int) -> int:
    return x - 3


async def async_call_inc(x: int) -> int:
    return add(x, 1)


async def async_call_double(x: int) -> int:
    return mul(x, 2)


async def async_call_dec(x: int) -> int:
    return sub(x, 3)


async def wait_inc(x: int) -> int:
    await asyncio.sleep(0.001)
    return x + 1


async def wait_double(x: int) -> int:
    await asyncio.sleep(0.001)
    return x * 2


async def wait_dec(x: int) -> int:
    await asyncio.sleep(0.001)
    return x - 3


async def yield_inc(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


def sleep_inc(x: int) -> int:
    time.sleep(0.001)
    return x + 1


def spin_inc(x: int) -> int:
    for _ in range(SPIN):
        pass
    return x + 1


def brighten(image: Any) -> Any:
    """A new array of the same size."""
    return image + 1


class Stateful:
    """A handler with the second argument that pipevine passes. An object, so that it can be sent to processes by name."""

    def __init__(self, handler: Callable[[Any], Any]) -> None:
        self._handler = handler

    def __call__(self, item: Any, state: Any) -> Any:
        return self._handler(item)


PLAIN = (inc, double, dec)
CALLING = (call_inc, call_double, call_dec)
ASYNC = (async_inc, async_double, async_dec)
ASYNC_CALLING = (async_call_inc, async_call_double, async_call_dec)
WAITING = (wait_inc, wait_double, wait_dec)


def through_three(n: int) -> Tally:
    """What three stages make of `range(n)`: twice x, less one."""
    return Tally(n, n * (n - 1) - n, 2 * (n - 1) - 1)


def through_one(n: int) -> Tally:
    """What one `inc` makes of `range(n)`, in any order."""
    return Tally(n, n * (n - 1) // 2 + n)
