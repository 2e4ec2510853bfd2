"""What is said of worker processes that end when they should not.

The rule kept here: an error says what happened, in which stage, and what to try next.
"""

from __future__ import annotations

from pipeline.errors import WorkerLostError

from ..base import Handler

__all__ = ["hopeless", "lost", "not_started", "overran"]


def overran(handler: Handler) -> TimeoutError:
    """An item took too long."""
    return TimeoutError(f"the attempt took more than {handler.timeout:g} s; its worker process was killed")


def lost(stage: str, exit_code: int | None) -> WorkerLostError:
    """A worker died."""
    return WorkerLostError(f"the worker process of stage {stage!r} died while it handled this item ({_death(exit_code)})")


def hopeless(stage: str, deaths: int) -> WorkerLostError:
    """Workers die faster than they finish anything."""
    return WorkerLostError(f"{deaths} worker processes of stage {stage!r} died in a row without finishing an item; no more are started")


def not_started(stage: str, exit_code: int | None) -> WorkerLostError:
    """A worker did not even begin."""
    return WorkerLostError(
        f"a worker process of stage {stage!r} ended while it started ({_death(exit_code)}). The most common cause is a main "
        'program that starts its pipeline outside of `if __name__ == "__main__":`, for a worker process imports it again; '
        "the worker's own message on stderr tells more"
    )


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}"
    return f"exit code {exit_code}"
