"""`Stage`: a function that items go through, with its options. A definition: frozen, and shared by any number of runs.

The rule kept here: every option is checked when the stage is declared, so that a wrong one never reaches a run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline import Pipeline
from pipeline.errors import StageConfigError
from pipeline.policy import ErrorHandler, ErrorPolicy, FailureRule
from pipeline.protocols import Node, Seat, Wires
from workers.base import Handler, HandlerKind, WorkerState, describe_function
from workers.placement import Placement, as_placement
from workers.retry import Retry, as_retry

from .burst import only_computes

if TYPE_CHECKING:
    from pipeline.protocols import StageLike

__all__ = ["Stage", "StageOptions"]

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)
Next = TypeVar("Next")

_LEAST_MEMORY = 16 << 20
"""Bytes: less than a worker takes before it has done anything, so it must be meant in other units."""
DEFAULT_CAPACITY = 64
"""Items that wait in front of a stage, when `buffer` does not say: enough to make hand-overs cheap, small in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """The options of `@stage`, checked.

    `concurrency`: items in work at once. `run_in`: "loop", "thread", "process", or a configured placement.
    `ordered`: keep the input's order. `buffer`: capacity of the inbound edge, in items. `on_error`, `error_handler`,
    `max_failures`: what becomes of failed items. `retry`: attempts, or a `Retry`. `timeout`: seconds for one attempt.
    `setup`, `teardown`: run once per worker, with its state. `resources`: what one item needs of the pipeline's
    scheduler while its handler works on it, retries included, such as `{"gpu": 1, "mem_gb": 4}`.

    For `run_in="process"` only: `max_items`: after so many items a worker is replaced by a fresh one. `max_memory`: bytes
    that one worker process may take, `512 * 2**20` for instance; an item that needs more fails with `MemoryError`, and a
    worker that keeps much of it between two items is replaced. Nothing is lost when a worker is replaced.
    """

    concurrency: int = 1
    run_in: str | Placement = "loop"
    ordered: bool = False
    buffer: int | None = None
    on_error: ErrorPolicy | None = None
    error_handler: ErrorHandler | None = None
    max_failures: int | float | None = None
    retry: int | Retry | None = None
    timeout: float | None = None
    setup: Callable[[WorkerState], Any] | None = None
    teardown: Callable[[WorkerState], Any] | None = None
    resources: Mapping[str, Any] | None = None
    name: str | None = None
    max_items: int | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.concurrency, 1):
            raise StageConfigError(f"concurrency is the number of items in work at once: a whole number, 1 or more, not {self.concurrency!r}")
        if self.buffer is not None and not _is_count(self.buffer, 0):
            raise StageConfigError(f"buffer is a number of items, 0 or more, not {self.buffer!r}")
        if self.timeout is not None and not _is_seconds(self.timeout):
            raise StageConfigError(f"timeout is a number of seconds for one attempt, more than 0, not {self.timeout!r}")
        for hook in ("setup", "teardown"):
            if getattr(self, hook) is not None and not callable(getattr(self, hook)):
                raise StageConfigError(f"{hook} must be a function that takes the worker's state, not {getattr(self, hook)!r}")
        if self.name is not None and (not isinstance(self.name, str) or not self.name):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StageConfigError(f"name must be a text that is not empty, not {self.name!r}")
        if self.resources is not None:
            _check_resources(self.resources)
        FailureRule.check(self.on_error, self.error_handler, self.max_failures)
        as_retry(self.retry)
        self._check_limits(as_placement(self.run_in).kind)

    def _check_limits(self, kind: str) -> None:
        """What only a worker process has."""
        if self.max_items is not None and not _is_count(self.max_items, 1):
            raise StageConfigError(f"max_items is the number of items after which a worker is replaced: a whole number, 1 or more, not {self.max_items!r}")
        if self.max_memory is not None and not _is_count(self.max_memory, _LEAST_MEMORY):
            raise StageConfigError(
                f"max_memory is a whole number of bytes for one worker process, {_LEAST_MEMORY:,} or more, not {self.max_memory!r}; "
                "for 512 MiB write 512 * 2**20"
            )
        for option in ("max_items", "max_memory"):
            if getattr(self, option) is not None and kind != "process":
                raise StageConfigError(f'{option} is for worker processes, which can be replaced; it needs run_in="process", not {kind!r}')
        if self.max_memory is not None and sys.platform != "linux":
            raise StageConfigError("max_memory is kept by the Linux kernel and not available on this system; leave it out, or use max_items")


def _check_resources(resources: Any) -> None:
    """The amounts; whether there is as much, the pipeline's scheduler knows."""
    from pipeline.scheduler.amounts import as_needs

    try:
        as_needs(resources)
    except (TypeError, ValueError) as error:
        raise StageConfigError(str(error)) from None


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value > 0


class Stage(Generic[In, Out]):
    """One or several handlers with their options. Made by the decorators; call it to call the function.

    With several handlers each worker has one of them, and an item goes to whichever worker is free.
    """

    __slots__ = ("__wrapped__", "_fusable", "_handlers", "computes", "name", "options")

    def __init__(self, functions: Sequence[Callable[..., Any]], options: StageOptions) -> None:
        self.options = options
        self.name = options.name or describe_function(functions[0])
        self.__wrapped__ = functions[0]
        self._handlers = tuple(
            Handler.of(
                function,
                retry=as_retry(options.retry),
                timeout=options.timeout,
                setup=options.setup,
                teardown=options.teardown,
                guarded=bool(options.resources),
            )
            for function in functions
        )
        self._fusable = self._is_fusable()
        self.computes = only_computes(functions[0])
        """The function does nothing but operators; see `burst`."""

    def with_options(self, **changes: Any) -> Stage[In, Out]:
        """The same handlers under other options."""
        functions = [handler.function for handler in self._handlers]
        return type(self)(functions, dataclasses.replace(self.options, **changes))

    def __call__(self, item: In, /, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(item, *args, **kwargs)

    def __rshift__(self, other: StageLike[Out, Next]) -> Pipeline[Next]:
        """Stages joined without a source: a pipeline to put after a source, or into another pipeline."""
        chain: Pipeline[Any] = Pipeline()
        return chain >> self >> other

    def __repr__(self) -> str:
        return f"<Stage {self.name!r}>"

    # --- what a pipeline asks (`StageLike`)

    @property
    def capacity(self) -> int:
        return DEFAULT_CAPACITY if self.options.buffer is None else self.options.buffer

    @property
    def width(self) -> int:
        return self.options.concurrency

    @property
    def resources(self) -> Mapping[str, Any] | None:
        """What each item needs of the pipeline's scheduler, if anything."""
        return self.options.resources

    @property
    def handlers(self) -> tuple[Handler, ...]:
        return self._handlers

    @property
    def fusable(self) -> bool:
        return self._fusable

    def _is_fusable(self) -> bool:
        """A function in the loop, one at a time, called once for each item, needs no task of its own."""
        handler = self._handlers[0]
        return (
            len(self._handlers) == 1
            and self.options.concurrency == 1
            and as_placement(self.options.run_in).kind == "loop"
            and handler.kind is not HandlerKind.ASYNC_GENERATOR
            and handler.retry.attempts == 1
            and handler.timeout is None
            and not handler.guarded
        )

    def check(self, default_policy: ErrorPolicy) -> None:
        self.rule(default_policy)
        as_placement(self.options.run_in).check(self.name, self._handlers)

    def rule(self, default_policy: ErrorPolicy) -> FailureRule:
        """The stage's policy in a pipeline with that default."""
        options = self.options
        return FailureRule.resolve(options.on_error, options.error_handler, options.max_failures, default_policy)

    def open(self, seats: Sequence[Seat], wires: Wires) -> Node:
        if self.fusable:
            from .chain import ChainNode

            return ChainNode(seats, wires)
        if as_placement(self.options.run_in).kind == "loop":
            from .crew import CrewNode

            return CrewNode(seats[0], wires)
        if self.options.resources:
            from .guarded import GuardedPoolNode

            return GuardedPoolNode(seats[0], wires)
        from .pool import PoolNode

        return PoolNode(seats[0], wires)

    def accepts(self, item: In, /) -> Out:
        raise AssertionError("for the type checker only, never called")
