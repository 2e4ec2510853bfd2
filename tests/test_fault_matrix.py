"""The fault matrix: every fault that the project promises to survive, injected for real, in programs of their own.

The rule kept here: each row runs in a process with a hard limit, must leave nothing behind and nothing on stderr, and
says how often its fault was injected. The table is printed when all are through: conftest.py does it, for the rows may run
in several processes.

`make matrix` injects as often as was promised; the suite takes a share of that, MATRIX_SHARE.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import run_program
from matrix.__main__ import ROWS

from pipeline.testing import assert_no_leaks

LIMIT = 300.0
"""Seconds after which a row hangs."""
SHARE = os.environ.get("MATRIX_SHARE", "0.06")

EXPECTED = [f"F{number}" for number in range(1, 19)]


def test_every_row_of_the_matrix_is_there() -> None:
    assert sorted(ROWS, key=EXPECTED.index) == EXPECTED


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_fault_is_survived(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATRIX_SHARE", SHARE)
    scenario = ROWS[name]
    record_property("matrix", f"{name:4} {scenario.fault:75} {'':>8}  {'':>8}  FAILED: {scenario.passes_when}")
    finished = run_program(tmp_path, "", name, seconds=LIMIT, interpreter=("-m", "matrix"))
    assert finished.code == 0, finished.err
    assert finished.err == ""
    told = json.loads(finished.out.splitlines()[-1])
    assert told["name"] == name
    assert told["injected"] > 0
    worst = f"{told['worst'] * 1e3:,.0f} ms" if told["worst"] is not None else "-"
    outcome = "; ".join([f"passed: {scenario.passes_when}", *told["notes"]])
    record_property("matrix", f"{name:4} {scenario.fault:75} {told['injected']:>8,}  {worst:>8}  {outcome}")


def test_a_leak_would_be_seen() -> None:
    descriptor = -1
    with pytest.raises(AssertionError, match="descriptor"), assert_no_leaks(settle=0.05):
        descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
