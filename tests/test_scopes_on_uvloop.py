"""Fences, ends and signals once more, on uvloop: its timers, callbacks and wake-ups are not asyncio's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

PLUGIN = """
import uvloop

made = 0

def new_loop():
    global made
    made += 1
    return uvloop.new_event_loop()

def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": new_loop}

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"uvloops: {made}")
"""


def test_scopes_behave_as_on_asyncio(tmp_path: Path) -> None:
    (tmp_path / "on_uvloop.py").write_text(PLUGIN)
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("fence", "endings", "signals")]
    options = ["-x", "-p", "on_uvloop", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    loops = re.search(r"^uvloops: (\d+)$", finished.stdout, re.MULTILINE)
    assert loops is not None
    assert int(loops[1]) > 100
