"""How a hub is made ready and shut down, whatever kind it is, in bounded time.

The rule kept here: nobody waits longer than was said, and what did not stop is named.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any, cast

from ...cancellation.reason import CancelReason
from ...observe.logs import get_logger
from ...result import describe
from ..shutdown import ShutdownReport
from ..targets import hub_of

__all__ = ["initialize", "shut_down", "shut_down_within"]

_CLEANUP = 1.0
"""Seconds for what is left when the time is over: to be given up, and to say so."""


async def initialize(hub: object) -> None:
    """Get it ready, if it is of a kind that needs that."""
    ready = getattr(hub, "initialize", None)
    if ready is not None:
        await _finished(ready)


async def shut_down(hub: object) -> None:
    """Shut it down in its own time."""
    stop = getattr(hub, "shutdown", None)
    if stop is not None:
        await _finished(stop)


async def shut_down_within(hub: object, timeout: float, reason: CancelReason) -> list[str]:
    """Shut it down in about `timeout` seconds, and return the names of the tasks that did not stop. Raises nothing of its."""
    stop = getattr(hub, "shutdown", None)
    if stop is None:
        return []
    deadline = monotonic() + timeout
    wanted = _wanted(stop, {"timeout": timeout, "reason": reason})
    stopping = asyncio.ensure_future(_finished(partial(stop, **wanted)))
    await asyncio.wait([stopping], timeout=max(deadline - monotonic(), 0.0) + (_CLEANUP if "timeout" in wanted else 0.0))
    stuck: list[str] = []
    inner = hub_of(hub)
    if not stopping.done() and inner is not hub:  # a backend with patience of its own: its tasks end now
        stuck += await shut_down_within(inner, min(timeout, _CLEANUP), reason)
        await asyncio.wait([stopping], timeout=_CLEANUP)
    if not stopping.done():
        stopping.cancel()
        await asyncio.wait([stopping], timeout=_CLEANUP)
        get_logger().error("the shutdown of the tasks did not end", hub=repr(hub), waited=timeout)
        return [*stuck, "the shutdown itself"]
    return stuck + _stuck(stopping)


async def _finished(function: Callable[[], Any]) -> Any:
    """What it gives, awaited if need be: a hub of somebody's own may have nothing to wait for. `Any`: its value."""
    given = function()
    return await given if inspect.isawaitable(given) else given


def _stuck(stopping: asyncio.Future[Any]) -> list[str]:
    if stopping.cancelled():
        return ["the shutdown itself"]
    error = stopping.exception()
    if error is not None:
        get_logger().error("the shutdown of the tasks has failed", error=describe(error))
        return ["the shutdown itself"]
    report = stopping.result()
    return [str(key) for key in report.stuck] if isinstance(report, ShutdownReport) else []


def _wanted(function: object, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function has. `Any`: a number and a reason."""
    names = inspect.signature(cast("Callable[..., Any]", function)).parameters
    return {name: value for name, value in arguments.items() if name in names}
