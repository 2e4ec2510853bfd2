"""Index real source code: find, read, parse, store, and account for every file.

    python examples/10_index_source.py                      the standard library of this interpreter
    python examples/10_index_source.py PATH                 your own project
    python examples/10_index_source.py PATH --database FILE

Files are read in threads, parsed in processes, and written to SQLite in batches by one more thread. A file that cannot
be read, decoded or parsed becomes a dead letter. Ctrl-C finishes what was taken and stops; a second Ctrl-C stops at
once. Either way the database holds whole batches only, and the account at the end says what became of everything.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sqlite3
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import structlog
from index_source.database import Index, summarize
from index_source.display import (
    dead_letters_as_text,
    ledger_as_table,
    show_progress,
    slowest_stage_as_text,
    summary_as_text,
)
from index_source.parsing import Module, find_files, parse_file, prepare_parser, printable, read_file

from pipeline import Err, ErrorPolicy, Pipeline, RunReport, SignalTrigger
from stages import batch, stage
from workers import WorkerState


def index_pipeline(root: Path, database: Path, dead_letters: list[Err]) -> Pipeline[int]:
    """The whole job. Worker processes import this program again, so what they run is at the top level of a module."""
    broken = dead_letters.append
    read = stage(name="read", run_in="thread", concurrency=4, on_error=ErrorPolicy.SIDE, error_handler=broken)
    parse = stage(
        name="parse",
        run_in="process",
        concurrency=os.cpu_count() or 1,
        setup=prepare_parser,
        on_error=ErrorPolicy.SIDE,
        error_handler=broken,
    )
    # A database that cannot be written is no broken file: it ends the run.
    write = stage(
        name="write",
        run_in="thread",
        setup=partial(open_index, database),
        teardown=close_index,
        on_error=ErrorPolicy.RAISE,
    )
    return (
        Pipeline(
            lambda: find_files(root),
            name="index",
            cancel_on=(
                SignalTrigger(signal.SIGINT, code="SIGINT", drain=True),
                SignalTrigger(signal.SIGTERM, code="SIGTERM"),
            ),
        )
        >> read(read_file)
        >> parse(parse_file)
        >> batch(64, within=0.5)
        >> write(write_batch)
    )


def open_index(database: Path, state: WorkerState) -> None:
    """Once in the writing thread, before the first batch."""
    state.update(index=Index(database))


def write_batch(modules: list[Module], state: WorkerState) -> int:
    """One transaction."""
    state.values["index"].write(modules)
    return len(modules)


def close_index(state: WorkerState) -> None:
    """Once in the writing thread, after the last batch or after a stop."""
    state.values["index"].close()


async def run(pipeline: Pipeline[int]) -> RunReport | Err:
    """Run with a progress line."""
    progress = asyncio.create_task(show_progress(pipeline))
    try:
        return await pipeline.run()
    finally:
        progress.cancel()
        await asyncio.wait([progress])


def main() -> int:
    root, database = parse_arguments()
    # Broken files are on our list, by name; the library's own records of them would only cut through the progress line.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pipeline; a late one must not cut off its account
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever a file is called

    print(f"Indexing {printable(root)} into {printable(database)}", flush=True)
    dead_letters: list[Err] = []
    result = asyncio.run(run(index_pipeline(root, database, dead_letters)))

    report = result.report if isinstance(result, Err) else result
    if report is None:
        print(f"The run did not start: {result}")
        return 1
    print("", report.explain(), "", ledger_as_table(report), slowest_stage_as_text(report), sep="\n")
    print("", dead_letters_as_text(dead_letters), sep="\n")
    print("", summary_as_text(summarize(database)), sep="\n")
    return exit_code(report)


def parse_arguments() -> tuple[Path, Path]:
    parser = argparse.ArgumentParser(description="Index Python source code into SQLite.")
    parser.add_argument("path", nargs="?", type=Path, default=sysconfig.get_path("stdlib"), help="a directory or a file")
    parser.add_argument("--database", type=Path, help="where to write the index (default: a new temporary directory)")
    options = parser.parse_args()
    if not options.path.exists():
        parser.error(f"there is no {printable(options.path)}")
    database = options.database or Path(tempfile.mkdtemp(prefix="penstock-")) / "index.db"
    try:
        Index(database).close()  # now, so that a wrong path is an error before anything starts
    except sqlite3.Error as error:
        parser.error(f"cannot write to {printable(database)}: {error}")
    return options.path.resolve(), database


def exit_code(report: RunReport) -> int:
    """As a shell expects it: 128 and the number of the signal that stopped us."""
    if report.outcome == "cancelled" and (name := report.reasons[0].code) is not None:
        return 128 + signal.Signals[name]
    return 0 if report.outcome == "completed" else 1


if __name__ == "__main__":
    sys.exit(main())
