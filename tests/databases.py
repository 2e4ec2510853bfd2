"""Real PostgreSQL servers for tests, and workers on them, in this process and in others.

The rule kept here: each test process has one server, started when a test first asks for it, and each test a database of
its own, so that nothing is left for the next one. What a worker did is read from the database.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from helpers import LIMIT, Journal, Program, until

from pipeline.tasks import PostgresTaskBackend, TaskEvent, TaskKey, current_task
from pipeline.tasks.backends.embedded import EmbeddedServer

_numbers = count(1)


def _in_words(record: logging.LogRecord) -> bool:
    """A record is kept until its test is over, and with it would be the connection that it tells of."""
    record.msg, record.args = record.getMessage(), None
    return True


logging.getLogger("psycopg.pool").addFilter(_in_words)


class _Server:
    """The server of this test process."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="pg")  # short, for a socket is in it
        os.chmod(self.folder, 0o755)
        self.embedded = EmbeddedServer(self.folder)
        atexit.register(self.close)
        self.dsn = self.embedded.start_now()
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("alter system set fsync = off")
            connection.execute("select pg_reload_conf()")
            connection.execute("create database template")
        asyncio.run(self._fill(self.database_dsn("template")))

    @staticmethod
    async def _fill(dsn: str) -> None:
        async with PostgresTaskBackend(dsn):
            pass

    def database_dsn(self, name: str) -> str:
        return self.dsn.replace("/postgres?", f"/{name}?")

    def pid(self) -> int:
        return int(Path(self.folder, "pg", "postmaster.pid").read_text().split()[0])

    def restart(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server, SIGINT in good order or SIGQUIT as in a crash, and start it again."""
        pid = self.pid()
        os.kill(pid, how)
        until(lambda: not Path(self.folder, "pg", "postmaster.pid").exists() or zombie(pid))
        self.embedded.start_now()

    def close(self) -> None:
        self.embedded.leave_now()
        shutil.rmtree(self.folder, ignore_errors=True)


def zombie(pid: int) -> bool:
    """Whether a process has ended, though nobody may have asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


_server: list[_Server] = []


@pytest.fixture(scope="session")
def server() -> _Server:
    """The server of this test process; it ends with that."""
    if not _server:
        _server.append(_Server())
    return _server[0]


@pytest.fixture
def dsn(server: _Server) -> Iterator[str]:
    """A database with tables and nothing in them."""
    name = f"test{next(_numbers)}"
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"create database {name} template template strategy file_copy")
    yield server.database_dsn(name)
    gc.collect()  # psycopg leaves it the sockets of connections that have failed
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")


def sql(dsn: str, query: str, *values: Any) -> list[Any]:
    """The rows of one statement; those of one column as values."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode(), values)
        rows = cursor.fetchall() if cursor.description else []
    return [row[0] if len(row) == 1 else row for row in rows]


# --- tasks


async def execute(task: dict[str, Any]) -> Any:
    """Does what the tests submit. Those of type "count" go on from what they have saved."""
    context = current_task()
    assert context is not None
    kind = task.get("type")
    if kind == "count":
        for number in range(context.saved or 0, task["to"]):
            await context.item(number, attempt=context.attempt)
            await context.save(number + 1)
            await asyncio.sleep(task.get("pause", 0.01))
        return "counted"
    if kind == "wait":
        journal = Journal(Path(task["journal"])) if "journal" in task else None
        try:
            await context.progress(message="waiting")
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            if journal is not None:
                journal.write(" ".join(str(reason.code) for reason in context.reasons))
            raise
    if kind == "deaf":
        await context.progress(message="deaf")
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(600)
    if kind == "fail":
        raise LookupError("nothing there")
    return task.get("value")


QUICK: dict[str, Any] = {"sweep_interval": 0.1, "connect_timeout": 5.0, "cleanup": 1.0}


@asynccontextmanager
async def backend_on(dsn: str, executor: Any = None, **options: Any) -> AsyncIterator[PostgresTaskBackend]:
    """A backend that watches and submits, without a worker."""
    backend = PostgresTaskBackend(dsn, **{**QUICK, **options})
    if executor is not None:
        backend.set_executor(executor)
    async with backend:
        yield backend


@asynccontextmanager
async def worker_on(
    dsn: str, executor: Any = execute, *, concurrency: int = 2, grace: float = 0.0, **options: Any
) -> AsyncIterator[PostgresTaskBackend]:
    """A backend with a worker in this process; it is stopped in good order."""
    async with backend_on(dsn, executor, **options) as backend:
        working = asyncio.create_task(backend.work(concurrency=concurrency, grace=grace))
        try:
            yield backend
        finally:
            backend.stop()
            await working


def worker_program(folder: Path, dsn: str, name: str, *arguments: str, **options: Any) -> Program:
    """A worker in a process of its own, as people start it. Use it in `with`."""
    home = folder / name
    home.mkdir()
    settings = {**QUICK, "name": name, **options}
    (home / "service.py").write_text(
        "from databases import PostgresTaskBackend, execute\n"
        f"backend = PostgresTaskBackend({dsn!r}, **{settings!r})\nbackend.set_executor(execute)\n"
    )
    return Program(home, "", *arguments, interpreter=("-m", "pipeline.cli", "worker", "service:backend"))


# --- looking


async def follow(backend: PostgresTaskBackend, key: TaskKey, **options: Any) -> list[TaskEvent]:
    """All events of a task, up to its end."""
    async with asyncio.timeout(LIMIT):
        return [event async for event in backend.subscribe(*key, **options)]


async def first(backend: PostgresTaskBackend, key: TaskKey, type: str, **data: Any) -> TaskEvent:
    """The first event of this type and with these values."""
    async with asyncio.timeout(LIMIT), backend.subscribe(*key) as events:
        async for event in events:
            if event.type == type and data.items() <= event.data.items():
                return event
    raise AssertionError(f"{key} has ended without {type} {data}")
