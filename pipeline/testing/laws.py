"""The laws of the ledger, as arithmetic on what a user sees: reports and snapshots.

The rule kept here: nothing is taken from how the library checks itself. Every law is worked out anew from the counts.
"""

from __future__ import annotations

from ..lifecycle import PipelineState
from ..metrics import PipelineSnapshot, StageMetrics
from ..report import RunReport

__all__ = ["assert_balanced", "broken_laws"]

_COUNTS = (
    *("received", "processed", "succeeded", "failed", "passed", "dropped", "emitted_errors", "sided", "raised"),
    *("retried", "timed_out", "lost", "cancelled", "skipped", "emitted", "in_flight", "queued", "discarded"),
)


def assert_balanced(account: RunReport | PipelineSnapshot) -> None:
    """AssertionError with every law that does not hold; at the end, also that nothing is in work or waits."""
    broken = broken_laws(account)
    if broken:
        raise AssertionError("the ledger is out of balance:\n" + "\n".join(f"  {law}" for law in broken))


def broken_laws(account: RunReport | PipelineSnapshot) -> list[str]:
    """Every law that does not hold, with its numbers."""
    closed = isinstance(account, RunReport) or account.state is PipelineState.CLOSED
    broken: list[str] = []
    emitted, upstream = account.pulled, "the source"
    for row in account.stages:
        broken += _inside(row, closed=closed)
        arrived = row.received + row.queued + row.discarded
        if emitted != arrived:
            broken.append(
                f"{upstream} emitted {emitted}, of which {row.name!r} received {row.received}, {row.queued} wait and "
                f"{row.discarded} were discarded"
            )
        emitted, upstream = row.emitted, repr(row.name)
    waiting = account.undelivered if isinstance(account, PipelineSnapshot) else 0
    if emitted != account.delivered + waiting + account.discarded:
        broken.append(
            f"{upstream} emitted {emitted}, of which {account.delivered} were delivered, {waiting} wait and "
            f"{account.discarded} were discarded"
        )
    if closed and waiting:
        broken.append(f"{waiting} outputs still wait at the end")
    if isinstance(account, RunReport) and not account.balanced:
        broken += [f"the report says so itself: {law}" for law in account.imbalances]
    return broken


def _inside(row: StageMetrics, *, closed: bool) -> list[str]:
    laws = [
        (row.received == row.processed + row.cancelled + row.in_flight, "received = processed + cancelled + in_flight"),
        (row.processed == row.succeeded + row.failed + row.passed, "processed = succeeded + failed + passed"),
        (row.failed == row.dropped + row.emitted_errors + row.sided + row.raised, "failed = dropped + emitted_errors + sided + raised"),
        (row.lost + row.timed_out <= row.failed, "lost + timed_out <= failed"),
        (row.skipped <= row.succeeded, "skipped <= succeeded"),
        (all(getattr(row, count) >= 0 for count in _COUNTS), "no count is below 0"),
        (not closed or row.in_flight == 0, "at the end, in_flight = 0"),
        (not closed or row.queued == 0, "at the end, queued = 0"),
    ]
    counts = ", ".join(f"{count}={getattr(row, count)}" for count in _COUNTS if getattr(row, count))
    return [f"stage {row.name!r}: {law} does not hold: {counts}" for holds, law in laws if not holds]
