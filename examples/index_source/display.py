"""What the example shows: a progress line while it runs, and the account at the end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from index_source.database import Summary
from index_source.parsing import printable
from pipeline import Err, Pipeline, PipelineSnapshot, PipelineState, RunReport

__all__ = ["dead_letters_as_text", "ledger_as_table", "show_progress", "slowest_stage_as_text", "summary_as_text"]

_COLUMNS = ("received", "succeeded", "sided", "cancelled", "discarded", "emitted")
_SHOWN = 10
"""Dead letters shown; all are counted."""


async def show_progress(pipeline: Pipeline[Any], seconds: float = 0.1) -> None:
    """Until cancelled: one line that is rewritten if stderr is a terminal, else a plain line a second."""
    terminal, shown, due = sys.stderr.isatty(), "", 0.0
    try:
        while True:
            snapshot = pipeline.snapshot()
            if terminal:
                print(f"\r\x1b[K{_progress(snapshot)}", end="", file=sys.stderr, flush=True)
            elif snapshot.delivered and (snapshot.elapsed >= due or snapshot.state.value != shown):
                print(_progress(snapshot), file=sys.stderr, flush=True)
                shown, due = snapshot.state.value, snapshot.elapsed + 1.0
            await asyncio.sleep(seconds)
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _progress(snapshot: PipelineSnapshot) -> str:
    read, parse, write = snapshot.stage("read"), snapshot.stage("parse"), snapshot.stage("write")
    hint = " (Ctrl-C again to abort)" if snapshot.state is PipelineState.DRAINING else ""
    return (
        f"{snapshot.state.value}{hint}: {snapshot.elapsed:.1f} s, files read {read.succeeded:,}, "
        f"parsed {parse.succeeded:,}, broken {read.sided + parse.sided:,}, batches written {write.succeeded:,}"
    )


def ledger_as_table(report: RunReport) -> str:
    """Every stage's counts, and whether they add up."""
    rows = [("stage", *_COLUMNS, "busy s")]
    rows += [
        (stage.name, *(f"{getattr(stage, column):,}" for column in _COLUMNS), f"{stage.busy:.2f}")
        for stage in report.stages
    ]
    verdict = "the ledger balances" if report.balanced else f"OUT OF BALANCE: {'; '.join(report.imbalances)}"
    lines = ["".join(f"{cell:>11}" if n else f"{cell:<8}" for n, cell in enumerate(row)) for row in rows]
    return "\n".join([*lines, f"source {report.pulled:,} pulled, output {report.delivered:,} delivered; {verdict}"])


def slowest_stage_as_text(report: RunReport) -> str:
    """The stage whose workers were busy for the longest."""
    slowest = max(report.stages, key=lambda stage: stage.busy / stage.concurrency)
    return (
        f"Slowest stage: {slowest.name}, {slowest.busy:.2f} s of work at concurrency {slowest.concurrency}, "
        f"{slowest.throughput:,.0f} items a second"
    )


def dead_letters_as_text(letters: Sequence[Err]) -> str:
    """The first few broken files with reasons, and how many there are."""
    lines = [f"Dead letters: {len(letters):,}"]
    for err in letters[:_SHOWN]:
        path = getattr(err.item, "path", None) or printable(err.item)
        lines.append(f"  {path}\n      {err.stage}: {type(err.value).__name__}: {err.value}")
    if len(letters) > _SHOWN:
        lines.append(f"  and {len(letters) - _SHOWN:,} more")
    return "\n".join(lines)


def summary_as_text(summary: Summary) -> str:
    """What the database says."""
    lines = [
        f"In the database: {summary.files:,} files, {summary.functions:,} functions, {summary.classes:,} classes; "
        f"{summary.coverage:.1%} with a docstring",
        "Most imported, by number of files:",
    ]
    lines += [f"  {module:<24}{count:>7,}" for module, count in summary.most_imported]
    return "\n".join(lines)
