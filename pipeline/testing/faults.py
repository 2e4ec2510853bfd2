"""What an explorer does to a run, and what each of these faults implies for its end.

The rule kept here: a fault is injected between two steps of the loop, but for RAISE, which is an exception at the very
beginning of a call of a handler. What it implies holds for every pipeline, whatever its stages do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from types import CodeType, FrameType
from typing import Any

__all__ = ["Calls", "Fault", "InjectedError"]

_INSIDE = 3
"""How deep a function is looked for in another: an operator's handler holds the user's."""


class Fault(Enum):
    """What is done."""

    LOOK = "look"
    """A snapshot is taken. Nothing changes."""
    CANCEL = "cancel"
    """`pipeline.cancel()`."""
    DRAIN = "drain"
    """`pipeline.cancel(drain=True)`."""
    FORCE = "force"
    """`pipeline.cancel(force=True)`."""
    TASK = "task"
    """The task that awaits the pipeline is cancelled."""
    RAISE = "raise"
    """A handler raises. Handlers in the loop only."""
    TIME = "time"
    """The clock leaps to the next timer, though others are ready: a timeout, a trigger, a batch's or a retry's wait."""

    @property
    def cancels(self) -> bool:
        """Whether it is a call of `pipeline.cancel`."""
        return self in (Fault.CANCEL, Fault.DRAIN, Fault.FORCE)


class InjectedError(Exception):
    """What RAISE raises."""


class Calls:
    """Counts calls of handlers as they begin, and lets one of them raise: a trace function, so that no wrapper is needed.

    A coroutine or a generator begins a call whenever it goes on.
    """

    def __init__(self, victim: int | None = None) -> None:
        self.number = 0
        self.raised = False
        self._victim = victim
        self._codes: frozenset[CodeType] = frozenset()
        self._before: Any = None
        self._watching = False

    def watch(self, functions: list[Callable[..., Any]]) -> None:
        """From now on, until `rest`."""
        self._codes = frozenset(code for function in functions for code in _codes(function, _INSIDE))
        self._before, self._watching = sys.gettrace(), True
        sys.settrace(self._entered)

    def rest(self) -> None:
        if self._watching:
            self._watching = False
            sys.settrace(self._before)

    def _entered(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or frame.f_code not in self._codes:
            return
        number, self.number = self.number, self.number + 1
        if number == self._victim:
            self.raised = True
            self.rest()
            raise InjectedError(f"injected into {frame.f_code.co_qualname}")


def _codes(thing: Any, depth: int) -> Iterator[CodeType]:
    """The code of a user's function, wherever it is inside an operator's own handler."""
    if isinstance(thing, partial):
        thing = thing.func
    function = getattr(thing, "__func__", thing)
    if not hasattr(function, "__code__"):
        function = getattr(type(thing), "__call__", None)  # noqa: B004 - an object that can be called
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return
    inner: list[CodeType] = []
    if depth and getattr(function, "__module__", type(thing).__module__).partition(".")[0] == "stages":
        for held in _held(function, thing):
            inner += _codes(held, depth - 1)
    yield from inner or [code]


def _held(function: Any, thing: Any) -> Iterator[Any]:
    """What a closure or an object of ours refers to."""
    for cell in getattr(function, "__closure__", None) or ():
        yield getattr(cell.cell_contents, "function", cell.cell_contents)
    for value in getattr(thing, "__dict__", {}).values():
        for branch in value if isinstance(value, list) else ():
            yield getattr(branch, "function", branch)
