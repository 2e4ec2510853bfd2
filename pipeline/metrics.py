"""The ledger: what is counted for each stage, and the laws that the counts obey.

The rule kept here: a run only ever *adds* to the counts of `Counters`, and only on its event loop. Whatever could
contradict another count (items in flight, items queued, the sums) is derived when somebody looks. Because every count
only grows, a reader in any thread sees a consistent ledger without a lock, provided that it reads downstream before
upstream and results before receipts: an item may be missing from a reading, never be in it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .cancellation.reason import CancelReason
from .lifecycle import PipelineState

__all__ = ["Counters", "LatencySample", "Output", "PipelineSnapshot", "StageMetrics", "read_ledger", "violations"]

_SAMPLES = 256
"""Latencies kept per stage: a ring of the newest samples, 2 kB."""


class LatencySample:
    """A ring of sampled handler durations, in seconds, and the busy time that they stand for."""

    __slots__ = ("_ring", "busy", "count")

    def __init__(self) -> None:
        self._ring: list[float] = []
        self.count = 0
        self.busy = 0.0

    def add(self, seconds: float, weight: int = 1) -> None:
        """Record one measured duration that stands for `weight` items."""
        if self.count < _SAMPLES:
            self._ring.append(seconds)
        else:
            self._ring[self.count % _SAMPLES] = seconds
        self.count += 1
        self.busy += seconds * weight

    def percentiles(self, *shares: float) -> list[float]:
        """For each share, the sampled duration below which it lies; 0.0 without samples."""
        ring = sorted(self._ring)
        return [ring[min(int(share * len(ring)), len(ring) - 1)] if ring else 0.0 for share in shares]


class Counters:
    """The counts of one stage in one run. Only grows; only the run's event loop writes."""

    __slots__ = (
        "blocked",
        "cancelled",
        "capacity",
        "concurrency",
        "discarded",
        "dropped",
        "emitted",
        "emitted_errors",
        "latency",
        "lost",
        "name",
        "passed",
        "raised",
        "received",
        "retried",
        "sided",
        "skipped",
        "starved",
        "succeeded",
        "timed_out",
    )

    def __init__(self, name: str, *, capacity: int = 0, concurrency: int = 1) -> None:
        self.name = name
        self.capacity = capacity
        self.concurrency = concurrency
        self.received = self.succeeded = self.passed = 0
        self.dropped = self.emitted_errors = self.sided = self.raised = 0
        self.retried = self.timed_out = self.lost = 0
        self.cancelled = self.skipped = self.emitted = self.discarded = 0
        self.starved = self.blocked = 0.0
        self.latency = LatencySample()

    @property
    def failed(self) -> int:
        return self.dropped + self.emitted_errors + self.sided + self.raised

    @property
    def processed(self) -> int:
        return self.succeeded + self.passed + self.failed

    @property
    def in_flight(self) -> int:
        """Only meaningful on the loop's own thread; snapshots derive it in a safe order."""
        return self.received - self.processed - self.cancelled


@dataclass(frozen=True, slots=True)
class StageMetrics:
    """One stage's ledger at one moment. Times in seconds; `throughput` in items a second of the run's time.

    `received = processed + cancelled + in_flight`; `processed = succeeded + failed + passed`;
    `failed = dropped + emitted_errors + sided + raised`; `lost` and `timed_out` are parts of `failed`;
    `skipped` is a part of `succeeded`. On the edge into the stage, the upstream's `emitted` is
    `received + queued + discarded`. `capacity` is the size of that edge; between
    fused stages nothing ever waits in it.
    """

    name: str
    received: int = 0
    processed: int = 0
    succeeded: int = 0
    failed: int = 0
    passed: int = 0
    dropped: int = 0
    emitted_errors: int = 0
    sided: int = 0
    raised: int = 0
    retried: int = 0
    timed_out: int = 0
    lost: int = 0
    cancelled: int = 0
    skipped: int = 0
    emitted: int = 0
    in_flight: int = 0
    queued: int = 0
    discarded: int = 0
    capacity: int = 0
    concurrency: int = 1
    busy: float = 0.0
    starved: float = 0.0
    blocked: float = 0.0
    throughput: float = 0.0
    latency_p50: float = 0.0
    latency_p95: float = 0.0
    latency_p99: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PipelineSnapshot:
    """A whole pipeline's ledger at one moment; cheap, and taken from any thread without waiting.

    `pulled` counts what the source gave, `delivered` what the consumer took; `undelivered` waits in the output buffer
    of an iteration, `discarded` was left there when it stopped. `elapsed` is in seconds.
    """

    name: str
    state: PipelineState
    reasons: tuple[CancelReason, ...]
    elapsed: float
    pulled: int
    delivered: int
    undelivered: int
    discarded: int
    stages: tuple[StageMetrics, ...]

    def stage(self, name: str) -> StageMetrics:
        """The metrics of the stage of that name; `KeyError` lists the names there are."""
        for metrics in self.stages:
            if metrics.name == name:
                return metrics
        raise KeyError(f"no stage {name!r}; the stages are {', '.join(repr(m.name) for m in self.stages) or 'none'}")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return {
            "name": self.name,
            "state": self.state.value,
            "reasons": [reason.to_dict() for reason in self.reasons],
            "elapsed": self.elapsed,
            "pulled": self.pulled,
            "delivered": self.delivered,
            "undelivered": self.undelivered,
            "discarded": self.discarded,
            "stages": [metrics.to_dict() for metrics in self.stages],
        }


@dataclass(frozen=True, slots=True)
class Ledger:
    """One consistent reading of all counters."""

    pulled: int
    delivered: int
    undelivered: int
    discarded: int
    stages: tuple[StageMetrics, ...]


class Output(Protocol):
    """Where a run's outputs go, as far as the ledger is concerned."""

    @property
    def delivered(self) -> int:
        """Outputs that the consumer has."""
        ...

    @property
    def discarded(self) -> int:
        """Outputs that were left when the consumer was gone."""
        ...


def read_ledger(source: Counters, stages: Sequence[Counters], output: Output | None, elapsed: float = 0.0) -> Ledger:
    """Read all counters, from the output up to the source, so that no item is seen twice (see the module's rule)."""
    delivered, discarded = (output.delivered, output.discarded) if output else (0, 0)
    taken = delivered + discarded
    rows: list[StageMetrics] = []
    emitted_below = taken
    undelivered = 0
    for index in range(len(stages) - 1, -1, -1):
        counters = stages[index]
        emitted = counters.emitted
        if index == len(stages) - 1:
            undelivered = emitted - taken
        else:
            rows[-1] = _with_queue(rows[-1], emitted - emitted_below)
        row = _read_stage(counters, emitted, elapsed)
        rows.append(row)
        emitted_below = row.received + row.discarded
    pulled = source.emitted
    if rows:
        rows[-1] = _with_queue(rows[-1], pulled - emitted_below)
    else:
        undelivered = pulled - taken
    return Ledger(pulled, delivered, undelivered, discarded, tuple(reversed(rows)))


def _read_stage(counters: Counters, emitted: int, elapsed: float) -> StageMetrics:
    latency = counters.latency
    p50, p95, p99 = latency.percentiles(0.50, 0.95, 0.99)
    lost, timed_out, skipped = counters.lost, counters.timed_out, counters.skipped
    succeeded, passed, cancelled = counters.succeeded, counters.passed, counters.cancelled
    dropped, emitted_errors = counters.dropped, counters.emitted_errors
    sided, raised = counters.sided, counters.raised
    failed = dropped + emitted_errors + sided + raised
    processed = succeeded + passed + failed
    discarded, received = counters.discarded, counters.received
    return StageMetrics(
        name=counters.name,
        received=received,
        processed=processed,
        succeeded=succeeded,
        failed=failed,
        passed=passed,
        dropped=dropped,
        emitted_errors=emitted_errors,
        sided=sided,
        raised=raised,
        retried=counters.retried,
        timed_out=timed_out,
        lost=lost,
        cancelled=cancelled,
        skipped=skipped,
        emitted=emitted,
        in_flight=received - processed - cancelled,
        discarded=discarded,
        capacity=counters.capacity,
        concurrency=counters.concurrency,
        busy=latency.busy,
        starved=counters.starved,
        blocked=counters.blocked,
        throughput=processed / elapsed if elapsed > 0 else 0.0,
        latency_p50=p50,
        latency_p95=p95,
        latency_p99=p99,
    )


def _with_queue(row: StageMetrics, queued: int) -> StageMetrics:
    # dataclasses.replace would do, at ten times the cost; the row is ours and has not been shown to anyone yet.
    object.__setattr__(row, "queued", queued)
    return row


def violations(ledger: Ledger | PipelineSnapshot, *, closed: bool) -> list[str]:
    """Every law of the ledger that does not hold, in words; an empty list is a balanced ledger.

    `closed` also demands that nothing is in flight, queued or undelivered any more.
    """
    broken: list[str] = []
    upstream, emitted = "source", ledger.pulled
    for row in ledger.stages:
        broken += _broken_laws(row, upstream, emitted, closed=closed)
        upstream, emitted = row.name, row.emitted
    if emitted != ledger.delivered + ledger.undelivered + ledger.discarded:
        broken.append(f"{upstream} -> output: emitted != delivered + undelivered + discarded")
    if closed and ledger.undelivered:
        broken.append(f"output: {ledger.undelivered} still undelivered at the end")
    return broken


def _broken_laws(row: StageMetrics, upstream: str, emitted: int, *, closed: bool) -> list[str]:
    name = row.name
    laws = (
        (row.received == row.processed + row.cancelled + row.in_flight, "{name}: received != processed + cancelled + in_flight"),
        (row.processed == row.succeeded + row.failed + row.passed, "{name}: processed != succeeded + failed + passed"),
        (
            row.failed == row.dropped + row.emitted_errors + row.sided + row.raised,
            "{name}: failed != dropped + emitted_errors + sided + raised",
        ),
        (emitted == row.received + row.queued + row.discarded, "{upstream} -> {name}: emitted != received + queued + discarded"),
        (row.in_flight >= 0, "{name}: {in_flight} in flight"),
        (row.queued >= 0, "{name}: {queued} queued"),
        (row.skipped <= row.succeeded, "{name}: more skipped than succeeded"),
        (row.lost + row.timed_out <= row.failed, "{name}: more lost and timed out than failed"),
        (not closed or row.in_flight == 0, "{name}: {in_flight} still in flight at the end"),
        (not closed or row.queued == 0, "{name}: {queued} still queued at the end"),
    )
    values = {"name": name, "upstream": upstream, "in_flight": row.in_flight, "queued": row.queued}
    return [text.format(**values) for holds, text in laws if not holds]
