"""The chart: on the left how penstock stands to each bar, on the right everybody's speed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .model import LIMITS, OURS, PACKAGES, STDLIB, UVLOOP
from .report import Book, Verdict, standing, value_text

__all__ = ["draw"]

_MET, _MISSED, _GREY = "#2a7f62", "#c8553d", "#8a8f98"
_SLOWEST = 1e-3
"""Everything slower is drawn at the edge."""
_FARTHEST = 16.0
"""Bars are drawn up to so many times above or below what is required."""


def draw(book: Book, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    verdicts = [verdict for verdict in book.verdicts() if verdict.score is not None]
    shown = [workload for workload in book.workloads if len(book.participants(workload)) > 1]
    rows = max(len(verdicts), len(shown), 4)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(18, 1.6 + 0.27 * rows), gridspec_kw={"width_ratios": [1, 1.3]})
    _draw_bars(left, verdicts)
    _draw_peers(right, book, shown)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _draw_bars(axes: Any, verdicts: Sequence[Verdict]) -> None:
    scores = [min(max(verdict.score or 0.0, 1 / _FARTHEST), _FARTHEST) for verdict in verdicts]
    places = range(len(verdicts))
    axes.barh(places, [score - 1 for score in scores], left=1, color=[_MET if v.met else _MISSED for v in verdicts], height=0.6)
    for place, verdict, score in zip(places, verdicts, scores, strict=True):
        text = value_text(verdict)
        axes.annotate(text, (score, place), xytext=(4 if score >= 1 else -4, 0), textcoords="offset points", va="center", ha="left" if score >= 1 else "right", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / _FARTHEST / 3, _FARTHEST * 3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, [_label(verdict) for verdict in verdicts], fontsize=8)
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    axes.set_xticks([1 / 16, 1 / 4, 1, 4, 16], ["1/16 or less", "1/4", "the bar", "4 times", "16 or more"], fontsize=8)
    axes.minorticks_off()
    axes.set_title("penstock against its bars (right of the line: met)", fontsize=10)
    _plain(axes)


def _label(verdict: Verdict) -> str:
    against = f"  vs {verdict.reference}" if verdict.reference else ""
    return verdict.workload + against + (", CPU" if verdict.bar.measure == "cpu" else "")


def _draw_peers(axes: Any, book: Book, shown: Sequence[Any]) -> None:
    from matplotlib import colormaps

    names = [name for name in (*LIMITS, UVLOOP, *STDLIB, *PACKAGES) if any(name in book.participants(workload) for workload in shown)]
    colours = dict(zip([name for name in names if name not in LIMITS], colormaps["tab20"].colors, strict=False))
    for name in names:
        points = [
            (max(value, _SLOWEST), place)
            for place, workload in enumerate(shown)
            if name in book.participants(workload) and (value := standing(book, workload, name)) is not None
        ]
        if points:
            marker, colour = ("D", _GREY) if name in LIMITS else ("o", colours[name])
            axes.scatter(*zip(*points, strict=True), label=name, marker=marker, color=colour, s=34, zorder=3)
    for place in range(len(shown)):
        axes.axhline(place, color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.axvline(1, color=_MET, linewidth=2, label=OURS)
    axes.set_xscale("log")
    axes.set_xlim(left=_SLOWEST / 1.3)
    ticks = [0.001, 0.01, 0.1, 1]
    axes.set_xticks(ticks, ["1/1000 or less", "1/100", "1/10", OURS], fontsize=8)
    axes.set_yticks(range(len(shown)), [workload.name for workload in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_title("speed beside penstock (left of the line: slower)", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _plain(axes)


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
