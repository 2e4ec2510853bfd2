"""What all workers share: the state that a handler sees, what a handler is, and what came of one call.

The rule kept here: everything that crosses to a thread or a process is in `Handler` (going) and `Outcome` (coming).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar

from pipeline.cancellation.reason import CancelReason
from pipeline.errors import StageConfigError
from pipeline.protocols import StopToken

from .retry import NO_RETRY, Retry

__all__ = ["Handler", "HandlerKind", "Outcome", "WorkerHandler", "WorkerState", "describe_function", "is_pending"]


T = TypeVar("T")

_MARGIN = 0.25
"""Seconds beyond its timeout that a coroutine gets to end by itself before its thread is given up, or its process killed."""


class WorkerHandler(Protocol):
    """A handler that keeps something between items: it takes the item and the worker's state."""

    def __call__(self, item: Any, state: WorkerState, /) -> Any: ...


class WorkerState:
    """What one worker keeps between items, and what it can know about its run.

    Each worker has its own; nothing in it is shared with other workers. `values` is free for the handler, `setup` and
    `teardown`. `attempt` starts at 1. `cancelled` turns true in threads and processes too, so that a long synchronous
    handler can stop by itself.
    """

    __slots__ = ("_token", "attempt", "stage", "values", "worker_id")

    def __init__(self, stage: str, worker_id: int, token: StopToken, values: dict[str, Any] | None = None) -> None:
        self.values: dict[str, Any] = {} if values is None else values
        self.stage = stage
        self.worker_id = worker_id
        self.attempt = 1
        self._token = token

    def get(self, key: str, default: Any = None) -> Any:
        """The value under `key`, or `default`."""
        return self.values.get(key, default)

    def update(self, **values: Any) -> None:
        """Set several values."""
        self.values.update(values)

    def start_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task beside the handler. In the loop the run owns it: it is cancelled, and awaited, with the run."""
        start = getattr(self._token, "start_task", None)
        if start is not None:
            return start(coroutine, name=f"{self.stage}:task", supervised=False)
        return asyncio.get_running_loop().create_task(coroutine)

    @property
    def cancelled(self) -> bool:
        """Whether the run is being aborted: stop soon; what is returned now is not used."""
        return self._token.cancelled

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        """Why, in order; empty while nothing asks to stop."""
        return self._token.reasons


class HandlerKind(Enum):
    """How a handler gives its outputs."""

    PLAIN = "plain"
    COROUTINE = "coroutine"
    GENERATOR = "generator"
    ASYNC_GENERATOR = "async generator"

    @property
    def many(self) -> bool:
        """Whether one item may have any number of outputs."""
        return self in (HandlerKind.GENERATOR, HandlerKind.ASYNC_GENERATOR)


@dataclass(frozen=True, slots=True)
class Handler:
    """One user function and how to call it; frozen, and pickled as a whole for worker processes."""

    function: Callable[..., Any]
    kind: HandlerKind
    takes_state: bool
    retry: Retry = NO_RETRY
    timeout: float | None = None
    setup: Callable[[WorkerState], Any] | None = None
    teardown: Callable[[WorkerState], Any] | None = None
    guarded: bool = False
    """Each call waits for resources. Its outputs leave when it has returned: who waits for room must hold nothing."""

    @classmethod
    def of(cls, function: Callable[..., Any], **options: Any) -> Handler:
        """Look at a function once, at declaration; `StageConfigError` when it cannot take an item."""
        return cls(function, _kind_of(function), _takes_state(function), **options)

    @property
    def simple(self) -> bool:
        """One call, one value: no second attempt, no clock, no outputs one by one, nothing to wait for first."""
        return self.retry.attempts == 1 and self.timeout is None and not self.kind.many and not self.guarded

    @property
    def holds_back(self) -> bool:
        """Outputs are held back until the attempt has succeeded; with retries, so that none is ever sent twice."""
        return self.retry.attempts > 1 or self.guarded

    @property
    def patience(self) -> float:
        """Seconds after which an attempt is ended from outside. A coroutine may end by itself before that, at its timeout."""
        asynchronous = self.kind in (HandlerKind.COROUTINE, HandlerKind.ASYNC_GENERATOR)
        return (self.timeout or 0.0) + (_MARGIN if asynchronous else 0.0)

    def call(self, item: Any, state: WorkerState) -> Any:
        """Call the function; what it returns depends on its kind."""
        return self.function(item, state) if self.takes_state else self.function(item)

    def bound(self, state: WorkerState) -> Callable[[Any], Any]:
        """The function of the item alone."""
        if not self.takes_state:
            return self.function
        function = self.function
        return lambda item: function(item, state)


@dataclass(slots=True)
class Outcome:
    """What came of one item in a worker: a value, or an error with its traceback's text."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    attempts: int = 1
    retried: int = 0
    seconds: float = 0.0
    timed_out: bool = False
    lost: bool = False
    held: float = 0.0
    """Seconds that the longest uninterrupted call held the loop; 0.0 where it does not run in the loop."""
    many: bool = field(default=False)
    """The outputs were sent one by one; `value` means nothing."""


def is_pending(result: Any) -> bool:
    """Whether a plain function's result is still to be awaited: a coroutine, or a future.

    Not everything with an `__await__` is: the handle of `cancel()` and an aiostream stream are values, too.
    """
    return isinstance(result, (types.CoroutineType, asyncio.Future))


def describe_function(function: Any) -> str:
    """A function's name, for messages and as the default name of its stage."""
    while isinstance(function, functools.partial):
        function = function.func  # pyright: ignore[reportUnknownMemberType]
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else str(name)


def _unwrapped(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func  # pyright: ignore[reportUnknownMemberType]
    if not inspect.isroutine(function) and not isinstance(function, type) and callable(function):
        return type(function).__call__  # an object with __call__: the method says what kind it is
    return function


def _kind_of(function: Any) -> HandlerKind:
    inner = _unwrapped(function)
    if inspect.isasyncgenfunction(inner):
        return HandlerKind.ASYNC_GENERATOR
    if inspect.isgeneratorfunction(inner):
        return HandlerKind.GENERATOR
    if inspect.iscoroutinefunction(inner):
        return HandlerKind.COROUTINE
    return HandlerKind.PLAIN


def _takes_state(function: Callable[..., Any]) -> bool:
    """A second positional parameter without a default, or one called `state`, is the worker's state."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-ins do not tell; they take the item
        return False
    name = describe_function(function)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needed = [p for p in positional if p.default is p.empty]
    if not positional and not variadic:
        raise StageConfigError(f"handler {name!r} takes no argument; it must take (item) or (item, state)")
    if len(needed) > 2:
        raise StageConfigError(f"handler {name!r} needs {len(needed)} arguments; it must take (item) or (item, state)")
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if missing:
        raise StageConfigError(f"handler {name!r} needs the keyword {missing[0]!r}; it must take (item) or (item, state)")
    return len(needed) == 2 or (len(positional) >= 2 and positional[1].name == "state")
