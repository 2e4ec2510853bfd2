"""Injects one fault: `python -m matrix F6`."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import sys

import multiprocess.forkserver
import multiprocess.resource_tracker
import structlog

from pipeline.testing import assert_no_leaks

from . import failures, programs, stopping, workers  # each enters its rows
from .row import ROWS, Row

__all__ = ["failures", "main", "programs", "stopping", "workers"]


def main() -> None:
    scenario = ROWS[sys.argv[1]]
    # Failed items are logged, as they should be; what else is on stderr is not meant.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    multiprocess.resource_tracker.ensure_running()
    multiprocess.forkserver.ensure_running()
    row = Row()
    with assert_no_leaks(settle=5.0):
        if inspect.iscoroutinefunction(scenario.run):
            asyncio.run(scenario.run(row))
        else:
            scenario.run(row)
    assert row.injected, "nothing was injected"
    worst = max(row.seconds, default=None)
    print(json.dumps({"name": scenario.name, "injected": row.injected, "worst": worst, "notes": row.notes}))


if __name__ == "__main__":
    main()
