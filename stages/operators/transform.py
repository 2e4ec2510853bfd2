"""One item in, some items out: `map`, `filter`, `flat_map`, `tap`.

The rule kept here: each takes the options of `stage`, so that it runs wherever a stage can, with retries and policies.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar, cast, overload

from pipeline.errors import StageConfigError
from workers.base import Handler, HandlerKind, WorkerState, describe_function, is_pending

from ..control import SKIP
from ..decorators import Answer, Function, stage
from ..definition import Stage

__all__ = ["filter", "flat_map", "map", "tap"]

In = TypeVar("In")
Out = TypeVar("Out")


@overload
def map(fn: Function[In, Awaitable[Answer[Out]]], **options: Any) -> Stage[In, Out]: ...
@overload
def map(fn: Function[In, Answer[Out]], **options: Any) -> Stage[In, Out]: ...
def map(fn: Callable[..., Any], **options: Any) -> Stage[Any, Any]:
    """Each item through `fn`. Options as for `stage`."""
    return _declare("map", fn, fn, options)


def filter(fn: Function[In, object], **options: Any) -> Stage[In, In]:
    """The items for which `fn` is true; the others count as skipped. Options as for `stage`."""
    inner = _single("filter", fn)
    call = inner.function
    if inner.kind is HandlerKind.COROUTINE:

        async def keep_later(item: Any, state: WorkerState) -> Any:
            return item if await inner.call(item, state) else SKIP

        return _declare("filter", fn, keep_later, options)

    def keep_by_state(item: Any, state: WorkerState) -> Any:
        return _kept(item, call(item, state))

    def keep(item: Any) -> Any:
        verdict = call(item)
        return item if verdict is True else _kept(item, verdict)

    return _declare("filter", fn, keep_by_state if inner.takes_state else keep, options)


def tap(fn: Function[In, object], **options: Any) -> Stage[In, In]:
    """Call `fn` with each item and pass the item on; what `fn` returns is ignored, what it raises fails the item."""
    inner = _single("tap", fn)

    def look(item: Any, state: WorkerState) -> Any:
        seen = inner.call(item, state)
        return _after(seen, item) if is_pending(seen) else item

    async def look_later(item: Any, state: WorkerState) -> Any:
        await inner.call(item, state)
        return item

    return _declare("tap", fn, look_later if inner.kind is HandlerKind.COROUTINE else look, options)


@overload
def flat_map(fn: Function[In, AsyncIterable[Out]], **options: Any) -> Stage[In, Out]: ...
@overload
def flat_map(fn: Function[In, Awaitable[Iterable[Out]]], **options: Any) -> Stage[In, Out]: ...
@overload
def flat_map(fn: Function[In, Iterable[Out]], **options: Any) -> Stage[In, Out]: ...
def flat_map(fn: Callable[..., Any], **options: Any) -> Stage[Any, Any]:
    """All elements of what `fn` returns for each item. Options as for `stage`.

    `fn` is a function that returns an iterable, or a generator, a coroutine or an async generator function.
    """
    inner = Handler.of(fn)
    if inner.kind.many:
        return _declare("flat_map", fn, fn, options)
    if inner.kind is HandlerKind.COROUTINE:

        async def spread_later(item: Any, state: WorkerState) -> AsyncIterator[Any]:
            for element in await inner.call(item, state):
                yield element

        return _declare("flat_map", fn, spread_later, options)

    def spread(item: Any, state: WorkerState) -> Iterator[Any]:
        elements = inner.call(item, state)
        if is_pending(elements) or isinstance(elements, AsyncIterable):
            close = getattr(elements, "close", None)
            if close is not None:
                close()
            raise TypeError("flat_map got something to await from a plain function; give it the async function itself")
        yield from elements

    return _declare("flat_map", fn, spread, options)


def _kept(item: Any, verdict: Any) -> Any:
    if is_pending(verdict):
        return _kept_later(item, verdict)
    return item if verdict else SKIP


async def _kept_later(item: Any, verdict: Awaitable[Any]) -> Any:
    return item if await verdict else SKIP


async def _after(seen: Awaitable[Any], item: Any) -> Any:
    await seen
    return item


def _single(operator: str, fn: Any) -> Handler:
    inner = Handler.of(fn) if callable(fn) else None
    if inner is None or inner.kind.many:
        raise StageConfigError(f"{operator} takes a function that returns one value, not {describe_function(fn)!r}")
    return inner


def _declare(operator: str, fn: Any, handler: Callable[..., Any], options: dict[str, Any]) -> Stage[Any, Any]:
    if not callable(fn):
        raise StageConfigError(f"{operator} takes a function, not {fn!r}")
    options.setdefault("name", operator if describe_function(fn) == "lambda" else f"{operator}({describe_function(fn)})")
    return cast("Stage[Any, Any]", cast(Any, stage)(**options)(handler))


