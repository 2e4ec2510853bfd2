"""From outcomes to ratios, verdicts and tables.

The rule kept here: two costs are compared within one round, and the median over the rounds is what counts. A bar
without a figure is not met, nor is one in whose workload penstock has failed in any round; and whatever failed has a
row that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median, median_high, median_low

from .model import BEST_PEER, LIMITS, OURS, PACKAGES, STDLIB, UVLOOP, Bar, Form, Workload
from .runner import Outcome

__all__ = ["Book", "Verdict", "markdown"]

ByRound = dict[int, float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar, and how penstock stands."""

    workload: str
    title: str
    bar: Bar
    reference: str
    """Who it was measured against, by name."""
    value: float | None
    """The ratio or the figure; None when one of the two sides has none."""
    failed: bool = False
    """Whether penstock has failed in a round."""

    @property
    def met(self) -> bool:
        return self.value is not None and not self.failed and self.bar.met(self.value)

    @property
    def score(self) -> float | None:
        """How the value stands to the bar: 1 is just met, more is better."""
        if self.value is None:
            return None
        return self.value / self.bar.required if self.bar.form is Form.SPEED else self.bar.required / max(self.value, 1e-9)


class Book:
    """All outcomes of a run, and what follows from them."""

    def __init__(self, workloads: Iterable[Workload], outcomes: Iterable[Outcome]) -> None:
        self._outcomes = list(outcomes)
        present = {outcome.workload for outcome in self._outcomes}
        self.workloads = [workload for workload in workloads if workload.name in present]

    def participants(self, workload: Workload) -> list[str]:
        """Those that took part, in the table's order."""
        present = {outcome.participant for outcome in self._outcomes if outcome.workload == workload.name}
        order = (*LIMITS, OURS, UVLOOP, *STDLIB, *PACKAGES)
        return sorted(present, key=lambda name: (order.index(name) if name in order else len(order), name))

    def costs(self, workload: Workload, participant: str, measure: str) -> ByRound:
        return {
            outcome.round: outcome.measures[measure]
            for outcome in self._outcomes
            if (outcome.workload, outcome.participant) == (workload.name, participant) and measure in outcome.measures
        }

    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self._outcomes if outcome.failure]

    def failure(self, workload: Workload, participant: str) -> str:
        found = [o.failure for o in self.failures() if (o.workload, o.participant) == (workload.name, participant)]
        return found[0] if found else ""

    # --- comparing

    def relative(self, workload: Workload, measure: str, participant: str, to: str) -> float | None:
        """How many times the first one's cost goes into the other's: above 1, it is cheaper."""
        ours, theirs = self.costs(workload, participant, measure), self.costs(workload, to, measure)
        both = [theirs[number] / ours[number] for number in ours.keys() & theirs.keys() if min(ours[number], theirs[number]) > 0]
        # Of the two in the middle the geometric mean: seen from the other side, it is the same ratio.
        return sqrt(median_low(both) * median_high(both)) if both else None

    def best_peer(self, workload: Workload, measure: str) -> str | None:
        """The library or executor with the lowest cost, among those that count."""
        costs = {
            name: median(found.values())
            for name in self.participants(workload)
            if name not in (*LIMITS, OURS, UVLOOP) and name not in workload.uncounted
            if (found := self.costs(workload, name, measure))
        }
        return min(costs, key=lambda name: costs[name]) if costs else None

    def verdicts(self) -> list[Verdict]:
        return [self._verdict(workload, bar) for workload in self.workloads for bar in workload.bars]

    def _verdict(self, workload: Workload, bar: Bar) -> Verdict:
        failed = bool(self.failure(workload, OURS))
        if bar.form is Form.LIMIT:
            costs = self.costs(workload, OURS, bar.measure)
            return Verdict(workload.name, workload.title, bar, "", median(costs.values()) if costs else None, failed)
        reference = self.best_peer(workload, bar.measure) if bar.against == BEST_PEER else bar.against
        ratio = self.relative(workload, bar.measure, OURS, reference) if reference else None
        if ratio is not None and bar.form is Form.COST:
            ratio = 1 / ratio
        return Verdict(workload.name, workload.title, bar, reference or "no peer finished", ratio, failed)


# --- tables


def markdown(book: Book, heading: Mapping[str, str]) -> str:
    """The whole report."""
    verdicts = book.verdicts()
    met = sum(verdict.met for verdict in verdicts)
    parts = [
        "# penstock and its peers",
        "Ratios of what ran side by side; medians over the rounds. " + "; ".join(f"{name}: {value}" for name, value in heading.items()) + ".",
        f"## The bars: {met} of {len(verdicts)} met",
        bars_table(verdicts),
        "## Everybody, with penstock as 1",
        "Speed in that workload as a multiple of penstock's: 0.5× is half as fast, – did not take part. A participant in "
        "brackets is shown but is not counted as a peer; the reason is below.",
        peers_table(book),
        *_notes(book),
    ]
    return "\n\n".join(parts) + "\n"


def bars_table(verdicts: Sequence[Verdict]) -> str:
    rows = [("workload", "against", "penstock", "bar", "met")]
    for verdict in verdicts:
        against = verdict.reference
        if verdict.bar.against == BEST_PEER:
            against = f"best peer: {against}"
        if verdict.bar.measure == "cpu":
            against += ", CPU an item"
        rows.append((verdict.title, against or "–", value_text(verdict), _required(verdict.bar), _met(verdict)))
    return _table(rows)


def _met(verdict: Verdict) -> str:
    return "yes" if verdict.met else "**no**, it failed" if verdict.failed else "**no**"


def value_text(verdict: Verdict) -> str:
    """The ratio or the figure, with as many digits as it is worth."""
    return "no figure" if verdict.value is None else _figure(verdict.value, verdict.bar.unit)


def _required(bar: Bar) -> str:
    return ("≥ " if bar.form is Form.SPEED else "≤ ") + _figure(bar.required, bar.unit, bar=True)


def _figure(value: float, unit: str, *, bar: bool = False) -> str:
    if unit == "×":
        return f"{value:g}×" if bar else ratio_text(value)
    return f"{value:g} {unit}" if bar else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def ratio_text(value: float) -> str:
    if value >= 10:
        return f"{value:.0f}×"
    if value >= 0.1:
        return f"{value:.2f}×"
    return f"{value:.2g}×" if value >= 0.00095 else "<0.001×"


def peers_table(book: Book) -> str:
    libraries = [name for name in PACKAGES if any(name in book.participants(workload) for workload in book.workloads)]
    rows = [("workload", "bare", "executors", *libraries)]
    for workload in book.workloads:
        others = book.participants(workload)
        if len(others) == 1:
            continue
        executors = [name for name in others if name in STDLIB]
        rows.append(
            (
                workload.title,
                " ".join(_standing(book, workload, name) for name in others if name in LIMITS) or "–",
                ", ".join(f"{name} {_standing(book, workload, name)}" for name in executors) or "–",
                *(_standing(book, workload, name) if name in others else "–" for name in libraries),
            )
        )
    return _table(rows)


def _standing(book: Book, workload: Workload, name: str) -> str:
    value = standing(book, workload, name)
    if value is None:
        return "failed" if book.failure(workload, name) else "no figure"
    text = ratio_text(value)
    return f"({text})" if name in workload.uncounted else text


def standing(book: Book, workload: Workload, name: str) -> float | None:
    """A participant's speed as a multiple of penstock's."""
    return book.relative(workload, main_measure(workload), name, OURS)


def main_measure(workload: Workload) -> str:
    return workload.bars[0].measure if workload.bars else "seconds"


def _notes(book: Book) -> list[str]:
    parts: list[str] = []
    with_uvloop = [(workload, standing(book, workload, UVLOOP)) for workload in book.workloads]
    rows = [(workload.title, ratio_text(value)) for workload, value in with_uvloop if value is not None]
    if rows:
        parts += ["## penstock under uvloop, with penstock under asyncio as 1", _table([("workload", "speed"), *rows])]
    failures = book.failures()
    if failures:
        titles = {workload.name: workload.title for workload in book.workloads}
        parts += [
            "## What went wrong",
            _table([("workload", "participant", "what happened"), *((titles[o.workload], o.participant, o.failure) for o in failures)]),
        ]
    reasons = {(name, why) for workload in book.workloads for name, why in workload.uncounted.items()}
    if reasons:
        parts += ["## Shown but not counted", "\n".join(f"- {name}: {why}." for name, why in sorted(reasons))]
    return parts


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])
