"""What the workers do: index the source code that was uploaded, and remember how far they came.

Files are taken in the order of their names, and stages keep it. So all that a worker has to save, after each batch that is
in the index, is the last name: whoever comes after goes on behind it.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Any

from index_source.database import Index
from index_source.parsing import Module, SourceFile, find_files, parse_file, prepare_parser, printable, read_file

from pipeline import Err, ErrorPolicy, Pipeline
from pipeline.tasks import PostgresTaskBackend, TaskContext, current_task
from stages import batch, stage
from workers import WorkerState

FOLDER = Path(os.environ.get("INDEX_SERVICE", "index-service")).absolute()
"""Uploads, indexes and the database of tasks."""


async def index(task: dict[str, Any]) -> Pipeline[str]:
    """The work: from the folder of a task to its index."""
    context = current_task()
    assert context is not None
    files = sorted(find_files(FOLDER / "uploads" / task["id"]), key=printable)
    done = [path for path in files if printable(path) <= (context.saved or "")]
    await context.item(f"attempt {context.attempt}: {len(done)} of {len(files)} files are in the index")
    return index_pipeline(files[len(done) :], index_of(task["id"]), float(task.get("pause", 0)), context)


def index_of(id: str) -> Path:
    """Where the index of an upload is."""
    return FOLDER / "indexes" / f"{id}.db"


def index_pipeline(files: list[Path], database: Path, pause: float, context: TaskContext) -> Pipeline[str]:
    """As in 10_index_source.py, and at its end what was done is remembered."""
    database.parent.mkdir(exist_ok=True)

    async def bury(err: Err) -> None:
        await context.warning(f"{err.item}: {err.value}"[:500], stage=err.stage)

    async def take_time(source: SourceFile) -> SourceFile:
        await asyncio.sleep(pause)  # so that there is something to watch
        return source

    async def remember(last: str) -> str:
        await context.save(last)
        return last

    side = {"ordered": True, "on_error": ErrorPolicy.SIDE, "error_handler": bury}
    return (
        Pipeline(files, name="index", on_error=ErrorPolicy.RAISE)
        >> stage(name="read", run_in="thread", concurrency=2, **side)(read_file)
        >> stage(name="take time", ordered=True)(take_time)
        >> stage(name="parse", run_in="process", concurrency=2, setup=prepare_parser, **side)(parse_file)
        >> batch(8, within=0.5)
        >> stage(name="write", run_in="thread", setup=partial(_open, database), teardown=_close)(write)
        >> stage(name="remember")(remember)
    )


def write(modules: list[Module], state: WorkerState) -> str:
    """One transaction; a file that is there already is replaced. Returns the last name."""
    state.values["index"].write(modules)
    return modules[-1].path


def _open(database: Path, state: WorkerState) -> None:
    state.update(index=Index(database))


def _close(state: WorkerState) -> None:
    state.values["index"].close()


backend = PostgresTaskBackend(data_dir=FOLDER)
"""In production: PostgresTaskBackend("postgresql://…")."""
backend.set_executor(index)
