"""Anything that can be iterated becomes one kind of source.

The rule kept here: the loop is never blocked. An iterator whose `next()` might wait (a generator, a file, a cursor) is
driven from a thread of its own; those that are known not to wait are read in place, at no cost.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from operator import length_hint
from typing import Any, cast

from .channel import Channel
from .feeds import Feed, WaitingFeed
from .metrics import Counters
from .prompt import SEQUENCES, IteratorFeed, SequenceFeed
from .runtime import PipelineRuntime

__all__ = ["Source", "as_source"]

_PROMPT_TYPES: frozenset[type] = frozenset(
    {list, tuple, range, dict, set, frozenset, str, bytes, bytearray, memoryview, deque}
    | {type({}.keys()), type({}.values()), type({}.items())}
    | {type(iter(example)) for example in ([], (), range(0), range(1 << 65, 1 << 66), {}, set[int](), "", "ä", b"", bytearray(), deque[int]())}
    | {type(iter(view)) for view in ({}.values(), {}.items())}
    | {type(reversed([])), type(reversed({})), itertools.count, itertools.repeat}
)
"""Exact types whose `next()` computes and never waits. Anything else may wait, subclasses included."""


def as_source(source: Any) -> Source:
    """Check a source, at declaration; `TypeError` says what it should be."""
    if isinstance(source, (AsyncIterable, Iterable)):
        return Source(cast("Any", source))
    if inspect.iscoroutine(source):
        source.close()
        raise TypeError("the source is a coroutine object; pass the function itself, so that every run can call it afresh")
    if callable(source):
        _check_factory(source)
        return Source(cast("Any", source))
    raise TypeError(
        f"a source must be an iterable, an async iterable, another Pipeline, an aiostream stream, "
        f"or a function without arguments that returns one of these, not {type(source).__name__}"
    )


def _check_factory(function: Callable[..., Any]) -> None:
    if hasattr(function, "accepts") and hasattr(function, "fusable"):
        raise TypeError("the source is a stage; write Pipeline(source) >> stage")
    if isinstance(function, type) and not issubclass(function, (Iterable, AsyncIterable)):
        raise TypeError(f"the source is the class {function.__name__}, whose objects cannot be iterated")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have no signature to read; the run will tell
        return
    try:
        signature.bind()
    except TypeError:
        raise TypeError(
            f"a function given as source is called without arguments, but {getattr(function, '__name__', function)!r} needs some; "
            "wrap it: Pipeline(lambda: function(...))"
        ) from None


class Source:
    """A source's definition. Shared by the pipelines derived from one another, which is how a spent one is noticed."""

    def __init__(self, origin: Any) -> None:
        self._origin = origin
        self._used = False

    def refusal(self) -> str | None:
        """Why a run cannot start from this source now, or None."""
        origin = self._origin
        if not isinstance(origin, (Iterator, AsyncIterator)):
            return None
        if self._used or _is_finished(origin):
            return (
                f"the source, a one-shot {type(origin).__name__}, has been used already; "
                "pass a list, a function that makes a fresh one for every run, or set a new one with gen()"
            )
        return None

    def open(self, runtime: PipelineRuntime, up: Counters, down: Counters, capacity: int) -> Feed:
        """Make the feed for one run. The iterator itself is only made when the run starts to pull."""
        self._used = True
        origin = self._origin
        if type(origin) in SEQUENCES:
            return SequenceFeed(origin, up, down)
        if type(origin) in _PROMPT_TYPES:
            return IteratorFeed(origin, runtime, up, down)
        assert runtime.loop is not None
        channel = Channel(capacity, up, down, runtime.loop, errors=True)
        return WaitingFeed(origin, runtime, channel)


def _is_finished(origin: Any) -> bool:
    if type(origin) in _PROMPT_TYPES:
        return _is_exhausted(origin)
    if isinstance(origin, types.GeneratorType):
        return inspect.getgeneratorstate(cast("types.GeneratorType[Any, Any, Any]", origin)) == inspect.GEN_CLOSED
    if isinstance(origin, types.AsyncGeneratorType):
        return cast("types.AsyncGeneratorType[Any, Any]", origin).ag_frame is None  # pyright: ignore[reportUnnecessaryComparison]
    return False


def _is_exhausted(iterator: Any) -> bool:
    """Whether a built-in iterator has been used up; one over something empty has not, as far as it can tell."""
    try:
        if length_hint(iterator, 1):
            return False
    except TypeError:  # itertools.repeat without an end
        return False
    _, *state = iterator.__reduce__()
    if len(state) < 2:
        return True
    collection, position = state[0][0], state[1]
    return bool(position) or (isinstance(collection, range) and collection.start != 0)
