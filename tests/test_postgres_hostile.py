"""Tasks in a database under hostile hands: work that misbehaves, wrong options, stops that are given up, odd databases.

The rule kept here: whatever one task, one caller or one setting does, tasks end once, and others do not notice.
"""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import AsyncIterator, Coroutine
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from databases import backend_on, dsn, execute, first, follow, server, sql, worker_on
from helpers import LIMIT, eventually
from procrastinate.exceptions import ConnectorException

from pipeline import CancelReason, Pipeline
from pipeline.tasks import EventType, PostgresTaskBackend
from pipeline.tasks.backends.postgres import database, mirrors, sweeper
from pipeline.tasks.backends.postgres.database import AWAY, in_one_line
from pipeline.tasks.backends.postgres.store import Claim, Store

__all__ = ["dsn", "server"]


class NoException(BaseException):
    """What test frameworks and other event loops raise past `except Exception`."""


@pytest.mark.parametrize(
    ("raised", "words"),
    [(NoException("over"), "over"), (GeneratorExit("closed"), "closed"), (SystemExit(3), r"sys\.exit\(3\)")],
    ids=["no Exception", "GeneratorExit", "sys.exit"],
)
async def test_a_task_that_raises_what_is_no_exception_fails_and_the_worker_goes_on(
    dsn: str, raised: BaseException, words: str
) -> None:
    async def work(task: dict[str, Any]) -> Any:
        if task["type"] == "bad":
            raise raised
        return await execute(task)

    async with worker_on(dsn, work) as backend:
        neighbour = await backend.submit({"type": "count", "to": 10})
        events = await follow(backend, await backend.submit({"type": "bad"}))
        assert [event.type for event in events] == ["started", "error"]
        assert sql(dsn, "select count(*) where %s ~ %s", events[-1].data["message"], words) == [1]
        events = await follow(backend, neighbour)
        assert (events[-1].type, sql(dsn, "select distinct attempt from penstock_tasks")) == ("completed", [1])
        await eventually(lambda: not [task for task in asyncio.all_tasks() if "journal" in task.get_name()])


async def test_a_shutdown_that_is_given_up_goes_on_and_another_waits_for_it(dsn: str) -> None:
    backend = PostgresTaskBackend(dsn, cleanup=5.0)
    held = asyncio.Event()

    async def work(task: dict[str, Any]) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await held.wait()

    backend.set_executor(work)
    await backend.initialize()
    working = asyncio.create_task(backend.work(grace=0))
    key = await backend.submit({})
    await first(backend, key, "started")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await backend.shutdown()
    held.set()
    await backend.shutdown()
    await working
    assert not [task for task in asyncio.all_tasks() if "penstock" in task.get_name()]
    assert sql(dsn, "select state, attempt from penstock_tasks") == [("queued", 2)]
    async with backend:
        assert await backend.cancel_task(*key)


def run_and_leave(coroutine: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, which the search for leaks would find at fault."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(coroutine)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.wait(asyncio.all_tasks(loop)))
    loop.close()


def test_a_backend_that_a_closed_loop_has_left_behind_begins_again_in_the_next(dsn: str) -> None:
    backend = PostgresTaskBackend(dsn)
    backend.set_executor(execute)

    async def one() -> None:
        await backend.initialize()
        await backend.submit({})

    async def two() -> list[str]:
        await backend.initialize()
        working = asyncio.create_task(backend.work())
        events = await follow(backend, await backend.submit({}))
        await backend.shutdown()
        await working
        return [event.type.value for event in events]

    async def elsewhere() -> None:
        async with backend_on(dsn) as other:

            def use() -> None:
                with pytest.raises(RuntimeError, match="another event loop"):
                    asyncio.run(other.submit({}))

            await asyncio.to_thread(use)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # connections that nobody has closed
        run_and_leave(one())
        assert asyncio.run(two()) == ["started", "completed"]
        gc.collect()
    asyncio.run(elsewhere())


def test_a_periodic_task_is_checked_when_it_is_scheduled() -> None:
    backend = PostgresTaskBackend("dbname=x")
    for cron in ("nonsense", "99 * * * *", "", None):
        with pytest.raises(ValueError, match="crontab"):
            backend.schedule(cron, {"type": "tick"})  # type: ignore[arg-type]


async def test_a_task_may_be_scheduled_twice_at_one_time(dsn: str) -> None:
    backend = PostgresTaskBackend(dsn)
    for _ in range(2):
        backend.schedule("* * * * *", {"type": "tick"})
    async with backend:
        assert len([name for name in backend.app.tasks if name.startswith("penstock:tick")]) == 2


@pytest.mark.parametrize(
    "given",
    [
        "postgresql://me:se/cret@127.0.0.1:1/db",
        "postgresql://me:12/se@cret@127.0.0.1:1/db",
        "postgresql://me:se@cret@127.0.0.1:1/db",
        "host=127.0.0.1 dbname=postgresql://me:secret@127.0.0.1/db",
    ],
)
def test_a_dsn_whose_password_is_cut_wrongly_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(ValueError, match="%2F") as raised:
        PostgresTaskBackend(given)
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": 3}, "name of a worker"),
        ({"name": "a\0b"}, "name of a worker"),
        ({"max_attempts": 10**12}, "max_attempts"),
        ({"heartbeat": 1e300}, "heartbeat"),
        ({"keep": 10**400}, "keep"),
    ],
)
def test_options_that_no_database_holds_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PostgresTaskBackend("dbname=x", **options)


async def test_arguments_that_no_database_holds_are_refused(dsn: str) -> None:
    async with backend_on(dsn, execute) as backend:
        with pytest.raises(ValueError, match="timeout"):
            await backend.submit({}, timeout=10**400)
        with pytest.raises(ValueError, match="grace"):
            await backend.work(grace=float("nan"))
        with pytest.raises(ValueError, match="older_than"):
            await backend.prune(1e300)
        assert await backend.list_tasks(limit=-1) == []


@pytest.mark.parametrize(
    "setting",
    ["default_transaction_isolation = 'serializable'", "datestyle = 'German'", "client_encoding = 'LATIN1'"],
)
async def test_the_defaults_of_a_database_change_nothing(dsn: str, setting: str) -> None:
    (name,) = sql(dsn, "select current_database()")
    sql(dsn, f"alter database {name} set {setting}")
    async with worker_on(dsn, concurrency=4) as backend, backend_on(dsn) as other:
        keys = [await other.submit({"type": "wait", "id": number}) for number in range(4)]
        for key in keys:
            await first(backend, key, "progress")
        asked = [hub.cancel_task(*key, "ü 🙂") for key in keys for hub in (backend, other) * 3]
        assert all(isinstance(answer, bool) for answer in await asyncio.gather(*asked))
        for key in keys:
            (*_, end) = await follow(other, key)
            assert (end.type, end.data["message"]) == ("cancelled", "ü 🙂")


async def test_a_write_is_not_taken_for_written_because_somebody_else_has_ended_the_task(dsn: str) -> None:
    async with backend_on(dsn, sweep_interval=3600) as backend:
        opened = backend._open
        assert opened is not None
        store: Store = opened.store
        await backend.submit({})
        claim = await store.claim(1, 1, 1, "frozen", opened.presence)
        assert isinstance(claim, Claim)
        event = (EventType.WARNING.value, 1.5, "{}")
        assert [(await store.write(claim, 0, [event])).outcome for _ in range(2)] == ["written", "written"]
        assert sql(dsn, "select count(*) from penstock_events") == [1]  # asked for again, because the answer was lost
        sql(dsn, "select penstock_end(1, 'cancelled', '{}', 'aborted')")
        assert (await store.write(claim, 1, [event], saved="3")).outcome == "superseded"
        await eventually(lambda: sql(dsn, "select saved from penstock_tasks") == [None])


async def test_a_role_that_may_not_make_tables_is_told_so_and_one_that_may_use_them_is_enough(dsn: str, server: Any) -> None:
    sql(dsn, "do $$ begin create role user_only login; exception when duplicate_object then null; end $$")
    sql(dsn, "grant select, insert, update, delete on all tables in schema public to user_only")
    sql(dsn, "grant usage on all sequences in schema public to user_only")
    sql(server.dsn, "create database bare")
    sql(server.database_dsn("bare"), "revoke create on schema public from public")
    try:
        bare, filled = (where.replace("://postgres", "://user_only") for where in (server.database_dsn("bare"), dsn))
        with pytest.raises(RuntimeError, match="permission denied .* may make tables"):
            await PostgresTaskBackend(bare).initialize()
        async with worker_on(filled) as backend:
            assert (await follow(backend, await backend.submit({"type": "count", "to": 3})))[-1].type == "completed"
            assert await backend.prune(0) == 1
    finally:
        sql(server.dsn, "drop database bare with (force)")


def test_a_log_says_what_is_behind_an_error_of_procrastinates() -> None:
    error = ConnectorException()
    error.__cause__ = psycopg.OperationalError("the server\n has closed the connection")
    assert in_one_line(error) == "the server has closed the connection"


async def test_an_error_whose_message_cannot_be_encoded_is_told_at_once(dsn: str) -> None:
    async def work(task: dict[str, Any]) -> None:
        raise FileNotFoundError("no file '\udcff\0.txt'")  # as undecodable names of files are

    async with worker_on(dsn, work, retry=1) as backend:
        events = await follow(backend, await backend.submit({}))
    assert [event.type for event in events] == ["started", "warning", "started", "error"]
    assert events[-1].data["message"] == "no file '?\ufffd.txt'"
    assert sql(dsn, "select lost from penstock_tasks") == [0]


async def test_a_pipeline_that_is_cancelled_from_a_machine_whose_clock_is_late_is_cancelled(dsn: str) -> None:
    async def forever() -> AsyncIterator[int]:
        while True:
            yield 1
            await asyncio.sleep(0.01)

    async def work(task: dict[str, Any]) -> Any:
        return Pipeline(forever())

    async with worker_on(dsn, work, progress_interval=0.01) as backend:
        key = await backend.submit({})
        await first(backend, key, "progress")
        assert await backend.cancel_task(*key, CancelReason("enough", at=time.time() - 3600))
        end = (await follow(backend, key))[-1]
    assert (end.type, end.data["message"]) == ("cancelled", "enough")


async def only_sweeper(backend: PostgresTaskBackend) -> sweeper.Sweeper:
    """One that sweeps when it is told to, instead of the backend's own."""
    opened = backend._open
    assert opened is not None
    (own,) = (task for task in asyncio.all_tasks() if task.get_name() == "penstock sweeper")
    own.cancel()
    await asyncio.wait([own])
    return sweeper.Sweeper(opened.database, opened.store, interval=0.5, heartbeat=30)


async def test_a_worker_whose_connection_was_lost_has_a_second_to_come_back(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(sweeper, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    async with backend_on(dsn, sweep_interval=3600) as backend:
        sweeping = await only_sweeper(backend)
        await backend.submit({})
        sql(dsn, "update penstock_tasks set state = 'running', presence = 1, beat = now()")
        await eventually(lambda: sql(dsn, "select now() - pg_postmaster_start_time() > interval '3 seconds'") == [True])
        for seconds, found in ((0.0, 0), (0.3, 0), (0.6, 0), (0.2, 1)):  # as a loop that a task holds comes back
            clock[0] += seconds
            assert await sweeping.sweep() == found


async def test_tasks_that_wait_are_looked_at_the_more_seldom_the_longer_that_takes(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looked = [100.0], list[float]()

    real: Any = psycopg.AsyncConnection.execute

    async def noted(self: Any, query: Any, *values: Any) -> Any:
        if b"'astray'" in (query if isinstance(query, bytes) else b""):
            looked.append(clock[0])
            clock[0] += 2.0
        return await real(self, query, *values)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", noted)
    monkeypatch.setattr(sweeper, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    async with backend_on(dsn, sweep_interval=3600) as backend:
        sweeping = await only_sweeper(backend)
        looked.clear()
        clock[0] = 100.0
        for _ in range(60):
            await sweeping.sweep()
            clock[0] += 1.0
    assert looked == [100.0, 140.0]


async def test_a_notification_of_somebody_elses_does_no_harm(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"type": "count", "to": 10})
        watching = asyncio.create_task(follow(backend, key))
        await first(backend, key, "started")
        for payload in ("9" * 5000, "\u00b2", "-1", " asked", "x" * 7000):
            sql(dsn, "select pg_notify('penstock', %s)", payload)
        assert (await watching)[-1].type == "completed"
        waiting = await backend.submit({"type": "wait"})
        await first(backend, waiting, "progress")
        assert await backend.cancel_task(*waiting, "still heard")
        assert (await follow(backend, waiting))[-1].type == "cancelled"
        assert {"penstock listener", "penstock sweeper"} <= {task.get_name() for task in asyncio.all_tasks()}


async def test_who_watches_a_task_that_is_deleted_is_not_left_waiting(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "_LOOK", 0.05)
    async with worker_on(dsn, heartbeat=0.6) as backend, backend_on(dsn) as other:
        key = await backend.submit({"type": "wait"})
        async with asyncio.timeout(20), other.subscribe(*key) as events:
            assert [(await anext(events)).type for _ in range(2)] == ["started", "progress"]
            sql(dsn, "delete from penstock_tasks")
            assert [event async for event in events] == []
        await eventually(lambda: sql(dsn, "select status from procrastinate_jobs where task_name = 'penstock'") == ["aborted"])


async def test_a_process_that_freezes_in_a_transaction_holds_nobody_up(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_STALLED", 0.2)
    async with backend_on(dsn, sweep_interval=3600) as backend:
        sweeping = await only_sweeper(backend)
        opened = backend._open
        assert opened is not None
        await backend.submit({"type": "wait"})
        sql(dsn, "update penstock_tasks set state = 'running', presence = 1, beat = now() - interval '1 hour'")
        with pytest.raises(AWAY):
            async with opened.database.transaction() as frozen:
                await frozen.execute("select pg_advisory_xact_lock(%s)", (sweeper._LOCK,))
                assert await sweeping.sweep() == 0
                async with asyncio.timeout(LIMIT):
                    while await sweeping.sweep() == 0:
                        await asyncio.sleep(0.01)
                await frozen.execute("select 1")
        assert sql(dsn, "select state, attempt from penstock_tasks") == [("queued", 2)]
        assert await opened.store.persist(lambda: opened.database.row("select 1 as one")) == {"one": 1}


async def test_a_worker_that_is_stopped_twice_does_not_wait_for_a_database_that_is_away(
    dsn: str, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "procrastinate")  # what is logged is kept, and with its traceback a connection
    (name,) = sql(dsn, "select current_database()")
    backend = PostgresTaskBackend(dsn, connect_timeout=2.0, cleanup=1.0, heartbeat=3600)
    backend.set_executor(execute)
    async with backend:
        working = asyncio.create_task(backend.work(grace=600.0))
        await first(backend, await backend.submit({"type": "wait"}), "progress")
        sql(server.dsn, f"alter database {name} allow_connections false")
        sql(server.dsn, f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")
        backend.stop()
        backend.stop()
        await asyncio.wait_for(working, LIMIT)
        sql(server.dsn, f"alter database {name} allow_connections true")
