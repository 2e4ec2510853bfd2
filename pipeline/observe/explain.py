"""A report in plain words: what ran, what was lost and why, and which stage was the limit. Pure text from numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..result import describe

if TYPE_CHECKING:
    from ..metrics import StageMetrics
    from ..report import RunReport

__all__ = ["explain", "limiting_stage"]

_LOSSES = (
    ("dropped", "dropped after an error"),
    ("sided", "handed to the error handler"),
    ("emitted_errors", "sent on as errors"),
    ("raised", "failed and stopped the pipeline"),
)


def explain(report: RunReport) -> str:
    """The whole account, a few short lines."""
    return "\n".join(_lines(report))


def limiting_stage(stages: tuple[StageMetrics, ...]) -> StageMetrics | None:
    """The stage that the others waited for: the one whose workers were busy for the largest share of the time.

    Busy time is summed over a stage's workers, so it is divided by their number.
    """
    worked = [stage for stage in stages if stage.busy > 0]
    return max(worked, key=lambda stage: stage.busy / max(stage.concurrency, 1)) if worked else None


def _lines(report: RunReport) -> Iterator[str]:
    yield _headline(report)
    if report.reasons:
        for position, reason in enumerate(report.reasons):
            word = "It stopped because" if position == 0 else "Then also"
            first, *causes = reason.lines()
            yield f"{word}: {first}."
            yield from causes
    for stage in report.stages:
        yield from _stage_lines(stage)
    if report.discarded:
        yield f"{_items(report.discarded)} left the last stage and had not reached the consumer."
    yield from _error_lines(report)
    limit = limiting_stage(report.stages)
    if limit is not None and report.duration > 0:
        share = min(limit.busy / max(limit.concurrency, 1) / report.duration, 1.0)
        yield f"The limit was stage {limit.name!r}: busy {share:.0%} of the time{_latency(limit)}."
    if report.abandoned:
        yield f"Could not be stopped, and still running: {', '.join(report.abandoned)}."
    if not report.balanced:
        yield f"The ledger does not balance, which is a fault of the library: {'; '.join(report.imbalances)}."
    elif _lost_nothing(report):
        yield "Every item is accounted for; nothing was lost."
    else:
        yield "Every item is accounted for."


def _headline(report: RunReport) -> str:
    verb = {"completed": "completed", "failed": "failed", "cancelled": "was cancelled"}[report.outcome]
    if report.drained:
        verb = "was drained"
    return (
        f"Pipeline {report.name!r} {verb} after {report.duration:.3g} s: "
        f"{_items(report.pulled)} taken from the source, {report.delivered:,} delivered."
    )


def _stage_lines(stage: StageMetrics) -> Iterator[str]:
    parts = [f"{getattr(stage, name):,} {text}" for name, text in _LOSSES if getattr(stage, name)]
    if stage.timed_out:
        parts.append(f"{stage.timed_out:,} of them timed out")
    if stage.lost:
        parts.append(f"{stage.lost:,} of them lost with a worker that died")
    if stage.cancelled:
        parts.append(f"{stage.cancelled:,} cancelled in work")
    if stage.discarded:
        parts.append(f"{stage.discarded:,} left in its queue")
    if stage.retried:
        parts.append(f"{stage.retried:,} {'retry' if stage.retried == 1 else 'retries'}")
    if parts:
        yield f"Stage {stage.name!r} received {_items(stage.received)}: {', '.join(parts)}."


def _error_lines(report: RunReport) -> Iterator[str]:
    kinds = Counter(
        (err.stage or "source", describe(err.value))
        for err in report.errors
    )
    for (stage, text), number in kinds.most_common(5):
        times = f" ({number} times among the samples)" if number > 1 else ""
        yield f"Error in {stage!r}: {text}{times}."


def _latency(stage: StageMetrics) -> str:
    if stage.latency_p50 <= 0:
        return ""
    return f", {_duration(stage.latency_p50)} an item at the median and {_duration(stage.latency_p95)} at the 95th percentile"


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _items(number: int) -> str:
    return f"{number:,} item" if number == 1 else f"{number:,} items"


def _lost_nothing(report: RunReport) -> bool:
    return not report.discarded and not any(
        stage.dropped or stage.raised or stage.cancelled or stage.discarded for stage in report.stages
    )
