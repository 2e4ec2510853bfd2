"""The exceptions of the library.

An item's failure is an `Err` that travels as data; the program's failure is one of these.
Each says what happened, where, and what to try next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cancellation.reason import CancelReason
    from .report import RunReport

__all__ = [
    "PipelineCancelled",
    "PipelineError",
    "PipelineFailed",
    "PipelineStopped",
    "StageConfigError",
    "WorkerLostError",
]


class PipelineError(RuntimeError):
    """A pipeline was used in a way that cannot work: run twice at once, awaited from inside itself, and so on."""


class StageConfigError(PipelineError, ValueError):
    """A stage's options cannot work together; raised when the stage is declared or before a run starts."""


class WorkerLostError(PipelineError):
    """A worker process died while it handled an item; the item is counted as lost and its policy applies."""


class PipelineStopped(PipelineError):
    """An iteration ended before its source did: the base of `PipelineFailed` and `PipelineCancelled`."""

    def __init__(self, message: str, *, report: RunReport | None = None, reasons: tuple[CancelReason, ...] = ()) -> None:
        super().__init__(message)
        self.report = report
        self.reasons = reasons


class PipelineFailed(PipelineStopped):
    """An iteration ended because the pipeline failed; the original exception is the `__cause__`."""


class PipelineCancelled(PipelineStopped):
    """An iteration ended because the pipeline was cancelled; `reasons` says by whom, in order."""
