"""The decorators that make stages: `stage`, and the source plan's `work_pool`, `mix_pool`, `as_stage`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar, cast, overload

from pipeline.errors import StageConfigError
from pipeline.policy import ErrorHandler, ErrorPolicy, FailureRule
from pipeline.result import Err
from workers.base import WorkerState, describe_function
from workers.placement import Placement
from workers.retry import Retry

from .control import KillSwitch, Skip
from .definition import Stage, StageOptions
from .fork import forked

__all__ = ["PathChoice", "as_stage", "mix_pool", "stage", "work_pool"]

In = TypeVar("In")
Out = TypeVar("Out")
R = TypeVar("R")


class PathChoice(Enum):
    """Which handlers of a pool an item goes to."""

    One = auto()
    """Whichever is free."""
    All = auto()
    """Every one; their outputs for that item are merged."""


Answer: TypeAlias = Out | Skip | Err | KillSwitch
Function: TypeAlias = Callable[[In], R] | Callable[[In, WorkerState], R]


class StageDecorator(Protocol):
    """What `stage(...)` with options returns. Generators come first: they are functions that return iterators."""

    @overload
    def __call__(self, function: Function[In, AsyncIterator[Answer[Out]]], /) -> Stage[In, Out]: ...
    @overload
    def __call__(self, function: Function[In, Iterator[Answer[Out]]], /) -> Stage[In, Out]: ...
    @overload
    def __call__(self, function: Function[In, Awaitable[Answer[Out]]], /) -> Stage[In, Out]: ...
    @overload
    def __call__(self, function: Function[In, Answer[Out]], /) -> Stage[In, Out]: ...


class _Bare(Protocol):
    """`@stage` without parentheses is the decorator with default options; with them it returns one."""

    @overload
    def __call__(self, function: Function[In, AsyncIterator[Answer[Out]]], /) -> Stage[In, Out]: ...
    @overload
    def __call__(self, function: Function[In, Iterator[Answer[Out]]], /) -> Stage[In, Out]: ...
    @overload
    def __call__(self, function: Function[In, Awaitable[Answer[Out]]], /) -> Stage[In, Out]: ...
    @overload
    def __call__(self, function: Function[In, Answer[Out]], /) -> Stage[In, Out]: ...
    @overload
    def __call__(
        self,
        *,
        concurrency: int = 1,
        run_in: str | Placement = "loop",
        ordered: bool = False,
        buffer: int | None = None,
        on_error: ErrorPolicy | None = None,
        error_handler: ErrorHandler | None = None,
        max_failures: int | float | None = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        setup: Callable[[WorkerState], Any] | None = None,
        teardown: Callable[[WorkerState], Any] | None = None,
        resources: Mapping[str, Any] | None = None,
        name: str | None = None,
        max_items: int | None = None,
        max_memory: int | None = None,
    ) -> StageDecorator: ...


def _stage(function: Any = None, /, **options: Any) -> Any:
    checked = _options(options)
    if function is None:
        return partial(_declare_one, options=checked)
    return _declare([function], checked)


stage = cast("_Bare", _stage)
"""Make a stage of a function: `@stage` or `@stage(concurrency=16, ...)`; the options are those of `StageOptions`.

The function takes `(item)` or `(item, state)`. It may be plain, `async def`, a generator or an async generator; a
generator yields any number of outputs for one item. It may return `SKIP` to emit nothing, an `Err` to fail the item,
or `KillSwitch(reason)` to cancel the pipeline. Raises `StageConfigError` for options that cannot work.
"""


def _options(options: dict[str, Any]) -> StageOptions:
    unknown = set(options) - set(StageOptions.__dataclass_fields__)
    if unknown:
        known = ", ".join(StageOptions.__dataclass_fields__)
        raise StageConfigError(f"unknown stage option {sorted(unknown)[0]!r}; the options are {known}")
    return StageOptions(**options)


def _declare_one(function: Any, options: StageOptions) -> Stage[Any, Any]:
    return _declare([function], options)


def _declare(functions: list[Any], options: StageOptions) -> Stage[Any, Any]:
    for function in functions:
        if isinstance(function, Stage):
            raise StageConfigError(f"{function.name!r} is a stage already; change its options with with_options()")
        if not callable(function):
            raise StageConfigError(f"a stage is made of a function, not of {function!r}")
    return Stage(functions, options)


def work_pool(
    *,
    buffer: int = 1,
    retries: int = 1,
    num_workers: int = 1,
    multi_proc: bool = False,
    fork_merge: Callable[[list[Any]], Any] | None = None,
    error_policy: ErrorPolicy | None = None,
    error_handler: ErrorHandler | None = None,
) -> Callable[[Callable[..., Any]], Stage[Any, Any]]:
    """A pool of `num_workers` workers with the same handler; `retries` counts attempts, the first included.

    With `fork_merge` every item goes to all workers and `fork_merge` gets the list of their outputs for that item.
    """

    FailureRule.check(error_policy, error_handler, None)

    def decorate(function: Callable[..., Any]) -> Stage[Any, Any]:
        options = _pool_options(num_workers, buffer, retries, multi_proc, error_policy, error_handler, describe_function(function))
        if fork_merge is None:
            return _declare([function], options)
        return forked([function] * num_workers, fork_merge, options)

    return decorate


def mix_pool(
    *,
    buffer: int = 1,
    retries: int = 1,
    multi_proc: bool = False,
    fork_merge: Callable[[list[Any]], Any] | None = None,
    error_policy: ErrorPolicy | None = None,
    error_handler: ErrorHandler | None = None,
) -> Callable[[Callable[[], list[Callable[..., Any]]]], Stage[Any, Any]]:
    """A pool with one worker for each handler in the list that the decorated function returns.

    An item goes to whichever worker is free; with `fork_merge` it goes to all of them, and `fork_merge` gets the list
    of their outputs for that item, in the handlers' order. When one handler fails, the item fails.
    """

    FailureRule.check(error_policy, error_handler, None)

    def decorate(make: Callable[[], list[Callable[..., Any]]]) -> Stage[Any, Any]:
        functions = list(make())
        if not functions:
            raise StageConfigError(f"{describe_function(make)!r} returned no handlers; a mix_pool needs one at least")
        options = _pool_options(len(functions), buffer, retries, multi_proc, error_policy, error_handler, describe_function(make))
        if fork_merge is None:
            return _declare(functions, options)
        return forked(functions, fork_merge, options)

    return decorate


def _pool_options(
    workers: int,
    buffer: int,
    retries: int,
    multi_proc: bool,
    policy: ErrorPolicy | None,
    handler: ErrorHandler | None,
    name: str,
) -> StageOptions:
    return StageOptions(
        concurrency=workers,
        buffer=buffer,
        retry=Retry(attempts=retries, wait=0.0),
        run_in="process" if multi_proc else "loop",
        on_error=policy,
        error_handler=handler,
        name=name,
    )


def as_stage(function: Callable[..., Any] | Stage[Any, Any]) -> Stage[Any, Any]:
    """A stage with default options; a stage comes back as it is."""
    return cast("Stage[Any, Any]", function) if isinstance(function, Stage) else _declare([function], StageOptions())
