"""What a page needs to draw a pipeline: its stages, in the order of the chain."""

from __future__ import annotations

from typing import Any

from ..assembly import seats_for
from ..pipeline import Pipeline

__all__ = ["stages_of"]


def stages_of(pipeline: Pipeline[Any]) -> list[dict[str, Any]]:
    """For each stage its name, as in snapshots, `concurrency`, `capacity`, and `run_in`: None where it says none."""
    return [
        {
            "name": seat.name,
            "concurrency": seat.counters.concurrency,
            "capacity": seat.counters.capacity,
            "run_in": _run_in(seat.stage),
        }
        for seat in seats_for(pipeline.links)
    ]


def _run_in(stage: Any) -> str | None:
    """"loop", "thread", "process". A stage of a kind of its own, such as a batch, says nothing."""
    where = getattr(getattr(stage, "options", None), "run_in", None)
    kind = where if isinstance(where, str) else getattr(where, "kind", None)
    return kind if isinstance(kind, str) else None
