"""What is said of worker processes that end when they should not.

The rule kept here: an error says what happened, in which stage, and what to try next.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from pipeline.errors import PipelineError, WorkerLostError

from ..base import Handler

__all__ = ["Exit", "hopeless", "lost", "no_guard", "not_started", "overran", "stillborn"]


class Exit(IntEnum):
    """Exit codes by which a worker process says why it ends."""

    NO_GUARD = 181
    """It has imported the main program, and that has started a pipeline again."""
    OUT_OF_MEMORY = 182
    """`max_memory` was reached outside of the handler: while an item was read, or a result sent."""


def overran(handler: Handler) -> TimeoutError:
    """An item took too long."""
    return TimeoutError(f"the attempt took more than {handler.timeout:g} s; its worker process was killed")


def lost(stage: str, exit_code: int | None, *, garbled: bool = False, max_memory: int | None = None) -> WorkerLostError:
    """A worker died."""
    died = f"the worker process of stage {stage!r} died while it handled this item"
    if exit_code == Exit.OUT_OF_MEMORY:
        return WorkerLostError(f"{died}: it exceeded max_memory={max_memory:,}")
    if garbled:
        return WorkerLostError(f"{died}: something was written to a descriptor that belongs to the library, so it was killed")
    hint = ""
    if max_memory is not None and exit_code in (-6, -11):  # SIGABRT, SIGSEGV
        hint = f"; C code that does not expect its allocations to fail ends like that when it has exceeded max_memory={max_memory:,}"
    return WorkerLostError(f"{died} ({_death(exit_code)}{hint})")


def hopeless(stage: str, deaths: int) -> WorkerLostError:
    """Workers die faster than they finish anything."""
    return WorkerLostError(f"{deaths} worker processes of stage {stage!r} died in a row without finishing an item; no more are started")


def not_started(stage: str, exit_code: int | None, said: Sequence[str]) -> PipelineError:
    """A worker did not even begin. `said`: the last lines of its stderr."""
    if exit_code == Exit.NO_GUARD:
        return no_guard()
    ended = f"a worker process of stage {stage!r} ended while it started ({_death(exit_code)})"
    words = [line for line in said if line.strip()]
    if words:
        return WorkerLostError(f"{ended}: {words[-1].strip()}; a worker process imports the main program, and its stderr, in the log, tells where")
    return WorkerLostError(
        f"{ended}. It imports the main program, which must be importable without effects: does it start its pipeline "
        'under `if __name__ == "__main__":`? A message of its own, if there is one, is on stderr'
    )


def stillborn(stage: str, exit_code: int | None, deaths: int) -> WorkerLostError:
    """Workers die by signals before they are ready."""
    return WorkerLostError(
        f"{deaths} worker processes of stage {stage!r} died in a row while they started ({_death(exit_code)}), in the main "
        "program, a module that it imports, or setup; their stderr, in the log, may tell where"
    )


def no_guard() -> PipelineError:
    """The main program starts its pipeline in worker processes, too."""
    return PipelineError(
        "a worker process is importing the main program, and that starts a pipeline again; "
        'put the start under `if __name__ == "__main__":`'
    )


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}"
    return f"exit code {exit_code}"
