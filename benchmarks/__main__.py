"""The command line: `python -m benchmarks --rounds 3 --only sync3`. `make bench` calls it.

A complete run is written to `benchmarks/results/`; a partial one is only printed, unless `--merge` puts it in the
place of the same workloads there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .report import Book, bars_table, markdown, peers_table
from .runner import Outcome, Selection, cells_of, run_all
from .workloads import WORKLOADS

AGAIN = "measured again later"
"""The heading that says which workloads are of another run than the rest."""

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    selection = Selection(rounds=options.rounds, only=options.only, peers=options.peers, uvloop=options.uvloop)
    chosen = selection.workloads(WORKLOADS)
    if options.list:
        for workload in chosen:
            print(f"{workload.name:<18}{workload.title}: {', '.join(cells_of(workload, selection))}")
    elif options.render:
        heading, outcomes = _read()
        _write(heading, outcomes)
    elif not chosen:
        raise SystemExit(f"no workload's name has {options.only!r} in it; --list shows them")
    else:
        _run(selection, complete=not (options.only or options.peers), merge=options.merge)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default: 3)")
    parser.add_argument("--only", default="", help="workloads whose name has this in it; several with commas")
    parser.add_argument("--peers", default="", help="participants whose name has this in it; penstock and its references always")
    parser.add_argument("--uvloop", action="store_true", help="penstock under uvloop, too")
    parser.add_argument("--merge", action="store_true", help="write a partial run into the results")
    parser.add_argument("--render", action="store_true", help="write tables and chart anew from results.json")
    parser.add_argument("--list", action="store_true", help="show what would run")
    return parser


def _run(selection: Selection, *, complete: bool, merge: bool) -> None:
    chosen = selection.workloads(WORKLOADS)
    outcomes = list(run_all(chosen, selection, lambda line: print(line, flush=True)))
    book = Book(chosen, outcomes)
    print("", bars_table(book.verdicts()), "", peers_table(book), sep="\n")
    for outcome in book.failures():
        print(f"{outcome.workload}, {outcome.participant}: {outcome.failure}")
    if complete:
        _write(_heading(selection), outcomes)
    elif merge:
        heading, before = _read()
        replaced = {workload.name for workload in chosen}
        again = {name for name in heading.get(AGAIN, "").split(", ") if name} | replaced
        heading[AGAIN] = ", ".join(sorted(again))
        _write(heading, [outcome for outcome in before if outcome.workload not in replaced] + outcomes)


def _heading(selection: Selection) -> dict[str, str]:
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.system(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "rounds": str(selection.rounds),
    }


def _read() -> tuple[dict[str, str], list[Outcome]]:
    try:
        saved: dict[str, Any] = json.loads((RESULTS / "results.json").read_text())
    except FileNotFoundError:
        raise SystemExit("there are no results yet; run everything once first") from None
    return saved["run"], [Outcome(**outcome) for outcome in saved["outcomes"]]


def _write(heading: dict[str, str], outcomes: list[Outcome]) -> None:
    RESULTS.mkdir(exist_ok=True)
    book = Book(WORKLOADS.values(), outcomes)
    saved = {"run": heading, "outcomes": [asdict(outcome) for outcome in outcomes]}
    (RESULTS / "results.json").write_text(json.dumps(saved, indent=1) + "\n")
    (RESULTS / "results.md").write_text(markdown(book, heading))
    try:
        from .chart import draw
    except ModuleNotFoundError:
        print("no chart: matplotlib is not installed")
        return
    draw(book, RESULTS / "results.png")
    print(f"written: {', '.join(sorted(path.name for path in RESULTS.iterdir()))} in benchmarks/results")


if __name__ == "__main__":
    main()
