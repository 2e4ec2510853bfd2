"""Where a stage's handlers run: in the loop, in threads, in processes.

The rule kept here: a placement is a definition. It makes the workers of one run, and refuses, before the run, handlers
that it could not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from pipeline.errors import StageConfigError

from .base import Handler
from .pooled import Executor, Order

__all__ = ["InLoop", "InProcess", "InThread", "Placement", "as_placement"]


class Placement(Protocol):
    """What a stage needs of `run_in`."""

    kind: ClassVar[str]

    def check(self, stage: str, handlers: Sequence[Handler]) -> None: ...
    def executor(self, order: Order) -> Executor: ...


@dataclass(frozen=True, slots=True)
class InLoop:
    """In the run's own event loop: for coroutines, and for functions that are done in microseconds."""

    kind: ClassVar[str] = "loop"

    def check(self, stage: str, handlers: Sequence[Handler]) -> None:
        """Anything callable can be called here."""

    def executor(self, order: Order) -> Executor:
        raise AssertionError(f"stage {order.stage!r} runs in the loop, which needs no executor")


@dataclass(frozen=True, slots=True)
class InThread:
    """In threads of the run: for functions that wait (files, drivers) and release the interpreter's lock."""

    kind: ClassVar[str] = "thread"

    def check(self, stage: str, handlers: Sequence[Handler]) -> None:
        """Anything callable can be called here."""

    def executor(self, order: Order) -> Executor:
        from .thread import ThreadExecutor

        return ThreadExecutor(order)


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcess:
    """In worker processes: for functions that compute.

    `start_method` is "forkserver" or "spawn"; "fork" is refused, for a forked copy of a program with threads can hang.
    `restarts` is the budget for replacing workers that die, for each of the stage's `concurrency`: as many may die in a
    row without any worker finishing an item between them. The first replacement comes at once, the others after 0.05 s,
    0.1 s and so on, up to 1 s. When the budget is used up, what is left of the input fails with `WorkerLostError`, by
    the stage's policy. Workers killed for their item's `timeout`, or replaced for `max_items` or `max_memory`, use up
    nothing.
    """

    kind: ClassVar[str] = "process"
    start_method: str = "forkserver"
    restarts: int = 5

    def __post_init__(self) -> None:
        if self.start_method not in ("forkserver", "spawn"):
            raise StageConfigError(f'start_method must be "forkserver" or "spawn", not {self.start_method!r}')
        if isinstance(self.restarts, bool) or not isinstance(self.restarts, int) or self.restarts < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StageConfigError(f"restarts must be a whole number, 0 or more, not {self.restarts!r}")

    def check(self, stage: str, handlers: Sequence[Handler]) -> None:
        """Pickle the handlers, so that one that cannot travel is refused before anything starts."""
        from .process.handlers import pack_handler

        for handler in handlers:
            pack_handler(stage, handler)

    def executor(self, order: Order) -> Executor:
        from .process.parent import ProcessExecutor

        return ProcessExecutor(order, self.start_method, self.restarts)


_BY_NAME: dict[str, Placement] = {"loop": InLoop(), "thread": InThread(), "process": InProcess()}


def as_placement(run_in: str | Placement) -> Placement:
    """The placement of that name, or the configured one itself; `StageConfigError` for anything else."""
    if not isinstance(run_in, str):
        if all(hasattr(run_in, name) for name in ("kind", "check", "executor")):
            return run_in
        raise StageConfigError(f'run_in must be "loop", "thread" or "process", or a configured worker such as InProcess(), not {run_in!r}')
    if run_in == "cluster":
        raise StageConfigError('run_in="cluster" is not available yet; use run_in="process"')
    placement = _BY_NAME.get(run_in)
    if placement is None:
        raise StageConfigError(f'run_in must be "loop", "thread" or "process", not {run_in!r}')
    return placement
