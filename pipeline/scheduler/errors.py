"""The exceptions of the scheduler.

The rule kept here: what cannot work is refused when it is asked for, by name and with the numbers; waiting for it would
be waiting for ever.
"""

from __future__ import annotations

import concurrent.futures

from pipeline.errors import PipelineError, StageConfigError

__all__ = ["CancelledError", "TerminatedError", "UnknownResourceError", "UnschedulableTaskError"]


class CancelledError(concurrent.futures.CancelledError):
    """The task or pipeline was cancelled before it started, so it has neither a result nor an exception."""


class UnknownResourceError(StageConfigError):
    """Work asks for a resource that the scheduler does not have."""


class UnschedulableTaskError(StageConfigError):
    """Work needs more of a resource than the scheduler has in all, and would wait for ever."""


class TerminatedError(PipelineError):
    """A running task has ended early because it was asked to.

    `argv`, `pid`, `returncode`, `forced_kill`: of the program that it ran with `run_subprocess`, if it did;
    `forced_kill` says that the program had to be killed.
    """

    def __init__(
        self,
        message: str = "the task ended early because it was asked to",
        *,
        argv: tuple[str, ...] = (),
        pid: int | None = None,
        returncode: int | None = None,
        forced_kill: bool = False,
    ) -> None:
        super().__init__(message)
        self.argv = argv
        self.pid = pid
        self.returncode = returncode
        self.forced_kill = forced_kill
