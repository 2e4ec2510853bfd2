"""Runs cells in processes of their own, one at a time, in turns.

The rule kept here: a cell can do no harm. It has a process group of its own and a time limit; when it is over, nothing
of the group is left, and whatever happened is an outcome in words.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import IO, Any

from .model import OURS, UVLOOP, Measures, Workload

__all__ = ["Outcome", "Selection", "cells_of", "run_all", "run_command"]

ROOT = Path(__file__).resolve().parent.parent
LINGER = 1.0
"""Seconds for the rest of a group, such as a resource tracker that still cleans up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one cell of one round came to: measures, or a failure in words."""

    workload: str
    participant: str
    round: int
    measures: Measures = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What to run. Names match by part; several parts are separated by commas."""

    rounds: int = 3
    only: str = ""
    peers: str = ""
    uvloop: bool = False

    def workloads(self, known: Mapping[str, Workload]) -> list[Workload]:
        return [workload for name, workload in known.items() if _matches(self.only, name)]


def _matches(parts: str, name: str) -> bool:
    wanted = [part.strip() for part in parts.split(",") if part.strip()]
    return not wanted or any(part in name for part in wanted)


def cells_of(workload: Workload, selection: Selection) -> list[str]:
    """The participants of a workload; penstock and what its bars are measured against are always among them."""
    needed = {OURS, "bare", *(bar.against for bar in workload.bars)}
    names = [name for name in workload.cells if name in needed or _matches(selection.peers, name)]
    if selection.uvloop and workload.loop:
        names.insert(names.index(OURS) + 1, UVLOOP)
    return names


def run_all(workloads: Sequence[Workload], selection: Selection, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Every cell once a round, participants of a workload one after the other, each round beginning with another one.

    A participant that failed is not tried again in that workload.
    """
    environment = os.environ | {"PENSTOCK_BENCH_SPIN": str(spin_passes())}
    failed: set[tuple[str, str]] = set()
    for number in range(selection.rounds):
        for workload in workloads:
            if workload.rounds is not None and number >= workload.rounds:
                continue
            names = cells_of(workload, selection)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                if (workload.name, name) in failed:
                    continue
                began = monotonic()
                outcome = _run_cell(workload, name, number, environment)
                if outcome.failure:
                    failed.add((workload.name, name))
                say(f"round {number + 1} {workload.name:>18} {name:>17} {monotonic() - began:5.1f} s  {_brief(outcome)}")
                yield outcome


def _run_cell(workload: Workload, name: str, number: int, environment: Mapping[str, str]) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.cell", workload.name, name]
    measures, failure = run_command(command, workload.timeout, environment)
    return Outcome(workload.name, name, number, measures, failure)


def _brief(outcome: Outcome) -> str:
    if outcome.failure:
        return outcome.failure
    if "seconds" in outcome.measures:
        return f"{outcome.measures['seconds'] * 1e9:,.0f} ns an item"
    return ", ".join(f"{name} {value:,.2f}" for name, value in outcome.measures.items())


def spin_passes() -> int:
    """How many passes of an empty loop take 200 µs here, at the machine's best."""
    trial = 4_000
    best = float("inf")
    for _ in range(1_000):
        began = perf_counter()
        for _ in range(trial):
            pass
        best = min(best, perf_counter() - began)
    return max(1, round(trial * 200e-6 / best))


# --- one process group


def run_command(command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None) -> tuple[Measures, str]:
    """What a cell's process answered, or what happened to it. Nothing of its group is left when this returns."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaints:
        # Files, not pipes: whoever is left of a dead cell may hold a pipe open, and nobody has to read a file.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=answer, stderr=complaints, start_new_session=True
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {}, f"had not finished after {timeout:g} s, and was killed"
        finally:
            if process.poll() is None:
                _signal_group(process.pid)
                process.wait()
            _clear_group(process.pid)
        return _understood(process.returncode, _text(answer), _text(complaints))


def _clear_group(group: int) -> None:
    deadline = monotonic() + LINGER
    while _signal_group(group, 0):
        if monotonic() > deadline:
            _signal_group(group)
            return
        sleep(0.005)


def _signal_group(group: int, number: int = signal.SIGKILL) -> bool:
    """Whether there was anybody to get the signal."""
    with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, for a group of zombies
        os.killpg(group, number)
        return True
    return False


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _understood(code: int, answer: str, complaints: str) -> tuple[Measures, str]:
    try:
        said: dict[str, Any] = json.loads(answer)
    except ValueError:
        last = complaints.strip().splitlines()[-1:]
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return {}, without_paths(f"{how}: {last[0]}" if last else how)
    return said.get("measures", {}), without_paths(said.get("failure", ""))


def without_paths(text: str) -> str:
    """The words without the folders of this machine, and not too many of them."""
    text = re.sub(r"(?:/[\w.+@-]+)+/", "…/", text)
    return text if len(text) <= 200 else text[:199] + "…"
