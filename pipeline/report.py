"""`RunReport`: what a finished run did, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cancellation.reason import CancelReason
from .metrics import StageMetrics
from .result import Err

__all__ = ["RunReport"]


@dataclass(frozen=True, slots=True)
class RunReport:
    """The account of one run.

    `outcome` is "completed", "failed" or "cancelled", by the first reason to stop; `duration` is in seconds.
    `pulled` items came from the source and `delivered` ones left at the end; `processed` and `failed` are sums over the
    stages, earlier stages' errors not counted twice. `errors` samples the failures (at most 20 a stage).
    `abandoned` names tasks and threads that did not stop. `drained` is true when a drain finished with nothing lost.
    `balanced` is true when every law of the ledger held at the end; if not, `imbalances` says which did not.
    """

    name: str
    outcome: str
    reasons: tuple[CancelReason, ...]
    duration: float
    pulled: int
    delivered: int
    discarded: int
    tallied: int
    stages: tuple[StageMetrics, ...]
    errors: tuple[Err, ...]
    abandoned: tuple[str, ...]
    drained: bool
    imbalances: tuple[str, ...] = ()

    @property
    def balanced(self) -> bool:
        return not self.imbalances

    @property
    def processed(self) -> int:
        """Items that stages have finished with, summed over the stages."""
        return sum(stage.processed for stage in self.stages)

    @property
    def failed(self) -> int:
        """Items that failed, summed over the stages; an item fails in one stage only."""
        return sum(stage.failed for stage in self.stages)

    def stage(self, name: str) -> StageMetrics:
        """The metrics of the stage of that name; `KeyError` lists the names there are."""
        for metrics in self.stages:
            if metrics.name == name:
                return metrics
        raise KeyError(f"no stage {name!r}; the stages are {', '.join(repr(m.name) for m in self.stages) or 'none'}")

    def explain(self) -> str:
        """What ran, what was lost and why, and which stage was the limit, in plain words."""
        from .observe.explain import explain

        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON; errors as text."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "reasons": [reason.to_dict() for reason in self.reasons],
            "duration": self.duration,
            "pulled": self.pulled,
            "delivered": self.delivered,
            "discarded": self.discarded,
            "tallied": self.tallied,
            "processed": self.processed,
            "failed": self.failed,
            "stages": [metrics.to_dict() for metrics in self.stages],
            "errors": [
                {"stage": err.stage, "error": str(err.value), "type": type(err.value).__name__, "attempts": err.attempts}
                for err in self.errors
            ],
            "abandoned": list(self.abandoned),
            "drained": self.drained,
            "balanced": self.balanced,
        }
