"""Tasks in a database: submitted, done, told, cancelled, each exactly once.

The rule kept here: the worker is in this process, and everything else is real.
"""

from __future__ import annotations

import asyncio
import random
import socket
import statistics
import time
from typing import Any

import psycopg
import pytest
from databases import backend_on, dsn, execute, first, follow, server, sql, worker_on
from helpers import contention, eventually
from procrastinate import RetryStrategy

from pipeline import CancelReason, Pipeline
from pipeline.tasks import PostgresTaskBackend, TaskAlreadyRunningError, TaskKey, TaskState, current_task
from pipeline.tasks.backends.postgres import schema
from stages import map

__all__ = ["dsn", "server"]

TERMINAL = ("error", "cancelled", "timed_out", "completed")


def told(events: list[Any]) -> list[str]:
    return [event.type.value for event in events]


async def test_a_pipeline_tells_its_stages_its_progress_and_its_report(dsn: str) -> None:
    async def squares(task: dict[str, Any]) -> Any:
        return Pipeline(range(task["to"]), name="squares") >> map(lambda n: n * n)

    async with worker_on(dsn, squares, items=True) as backend:
        key = await backend.submit({"app": "shop", "type": "squares", "id": 7, "to": 4})
        assert key == TaskKey("shop", "squares", "7")
        events = await follow(backend, key)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert told(events)[:2] == ["started", "started"]
        assert [event.data["item"] for event in events if event.type == "item"] == [0, 1, 4, 9]
        assert events[-1].type == "completed"
        assert events[-1].data["delivered"] == 4
        status = await backend.get_task(*key)
        assert status is not None
        assert status.state is TaskState.COMPLETED
        assert [stage["name"] for stage in status.about["stages"]] == ["map"]
        assert status.result == events[-1].data
        assert status.progress is not None
        assert status.created <= status.started <= status.ended  # type: ignore[operator]
        assert sql(dsn, "select status from procrastinate_jobs where task_name = 'penstock'") == ["succeeded"]
        assert [status.task for status in await backend.list_tasks()] == [key]


async def test_a_failure_is_an_event_and_the_job_has_failed(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"type": "fail"})
        *_, end = await follow(backend, key)
        assert (end.type, end.data["type"], end.data["message"]) == ("error", "LookupError", "nothing there")
        assert sql(dsn, "select status from procrastinate_jobs where task_name = 'penstock'") == ["failed"]


async def test_an_executor_that_is_no_coroutine_function_is_an_error_of_the_task(dsn: str) -> None:
    async with worker_on(dsn, lambda task: 3) as backend:
        *_, end = await follow(backend, await backend.submit({}))
        assert end.type == "error"
        assert "async def" in end.data["message"]


async def test_a_task_that_waits_ends_at_once_when_it_is_cancelled(dsn: str) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit({"type": "wait"})
        assert await backend.cancel_task(*key, "not needed", code="changed my mind")
        (end,) = await follow(backend, key)
        assert end.type == "cancelled"
        assert end.data["message"] == "not needed"
        assert [reason["code"] for reason in end.data["reasons"]] == ["changed my mind"]
        assert sql(dsn, "select status from procrastinate_jobs where task_name = 'penstock'") == ["cancelled"]
        assert not await backend.cancel_task(*key)
        assert not await backend.cancel_task("tasks", "wait", "unknown")
    async with worker_on(dsn) as backend:
        assert told(await follow(backend, await backend.submit({}))) == ["started", "completed"]
        assert told(await follow(backend, key)) == ["cancelled"]


async def test_every_reason_reaches_the_work_and_all_who_watch(dsn: str) -> None:
    heard: list[list[str]] = []
    hold = asyncio.Event()

    async def work(task: dict[str, Any]) -> None:
        context = current_task()
        assert context is not None
        await context.progress(1)
        try:
            await asyncio.sleep(60)
        finally:
            await hold.wait()
            heard.append([reason.message for reason in context.reasons])

    async with worker_on(dsn, work) as backend, backend_on(dsn) as other:
        key = await backend.submit({})
        watching = [asyncio.create_task(follow(hub, key)) for hub in (backend, other, other)]
        await first(other, key, "progress")
        assert await other.cancel_task(*key, "first")
        status = await backend.get_task(*key)
        assert status is not None
        assert status.state is TaskState.CANCELLING
        assert await backend.cancel_task(*key, CancelReason("second", origin="a test"))
        assert sql(dsn, "select penstock_cancel('tasks', 'task', %s, 'third', 'psql')", key.id) == [True]
        await eventually(lambda: len(backend._worker._attempts.copy().pop()._execution.reasons) == 3)  # type: ignore[union-attr]
        hold.set()
        for events in await asyncio.gather(*watching):
            assert [reason["message"] for reason in events[-1].data["reasons"]] == ["first", "second", "third"]
        assert heard == [["first", "second", "third"]]
        assert sql(dsn, "select status from procrastinate_jobs where task_name = 'penstock'") == ["aborted"]


async def test_an_abort_through_procrastinate_alone_is_a_reason_too(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"type": "wait"})
        await first(backend, key, "progress")
        (job,) = sql(dsn, "select job from penstock_tasks")
        assert await backend.app.job_manager.cancel_job_by_id_async(job, abort=True)
        assert (await follow(backend, key))[-1].data["reasons"][0]["code"] == "job_aborted"


async def test_a_cancel_through_procrastinate_of_a_task_that_waits_ends_it(dsn: str) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit({"type": "wait"})
        (job,) = sql(dsn, "select job from penstock_tasks")
        assert await backend.app.job_manager.cancel_job_by_id_async(job)
        assert (await follow(backend, key))[-1].data["reasons"][0]["code"] == "job_cancelled"


async def test_a_cancel_is_delivered_and_not_polled_for(dsn: str) -> None:
    seconds, others = list[float](), list[float]()
    async with worker_on(dsn), backend_on(dsn) as other:
        for _ in range(15):
            key = await other.submit({"type": "wait"})
            await first(other, key, "progress")
            began = time.monotonic()
            await other.cancel_task(*key, "enough")
            await follow(other, key)
            seconds.append(time.monotonic() - began)
            others.append(contention())
    assert statistics.median(seconds) < 0.5 * statistics.median(others)  # workers poll once a second


async def test_a_cancel_that_meets_the_end_leaves_one_terminal_event(dsn: str) -> None:
    random.seed(5)
    lanes = asyncio.Semaphore(8)

    async def work(task: dict[str, Any]) -> None:
        await asyncio.sleep(task["seconds"])

    async with worker_on(dsn, work, concurrency=8) as backend:

        async def race(number: int) -> tuple[bool, str]:
            async with lanes:
                key = await backend.submit({"id": number, "seconds": 0.01 + random.random() * 0.05})
                await first(backend, key, "started")
                await asyncio.sleep(random.random() * 0.04)
                cancelled = await backend.cancel_task(*key, "too late?")
                events = await follow(backend, key)
            assert told(events)[-1] in TERMINAL
            assert not set(told(events)[:-1]) & set(TERMINAL)
            return cancelled, events[-1].type.value

        outcomes = await asyncio.gather(*(race(number) for number in range(50)))
    assert set(outcomes) <= {(True, "cancelled"), (False, "completed")}
    assert len(set(outcomes)) == 2, "the race was always won by the same side"
    assert sql(dsn, f"select count(*) from penstock_events where type in {TERMINAL}") == [50]


async def test_a_second_terminal_event_is_refused_by_the_database_itself(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({})
        await follow(backend, key)
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(dsn, "insert into penstock_events select task, seq + 1, run, 'error', at, data from penstock_events where seq = 2")


async def test_a_submit_is_part_of_the_callers_transaction(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            key = await backend.submit({"id": "rolled back"}, connection=connection)
            await connection.rollback()
            assert await backend.get_task(*key) is None
            assert sql(dsn, "select count(*) from procrastinate_jobs where task_name = 'penstock'") == [0]
            key = await backend.submit({"id": "committed"}, connection=connection)
            assert await backend.get_task(*key) is None
            with pytest.raises(TaskAlreadyRunningError):
                await backend.submit({"id": "committed"}, connection=connection)
            await connection.commit()  # a refused submit costs the transaction nothing
        assert told(await follow(backend, key)) == ["started", "completed"]
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            with pytest.raises(ValueError, match="autocommit"):
                await backend.submit({}, connection=connection)
            async with connection.transaction():
                key = await backend.submit({}, connection=connection)
        assert told(await follow(backend, key)) == ["started", "completed"]


async def test_a_submit_into_another_database_is_refused(dsn: str, server: Any) -> None:
    async with backend_on(dsn) as backend, await psycopg.AsyncConnection.connect(server.dsn) as connection:
        with pytest.raises(ValueError, match="without penstock's tables"):
            await backend.submit({}, connection=connection)


async def test_a_key_is_free_again_when_its_task_is_over_and_seq_goes_on(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"id": 1, "type": "wait"})
        with pytest.raises(TaskAlreadyRunningError):
            await backend.submit({"id": 1, "type": "wait"})
        await first(backend, key, "progress")
        await backend.cancel_task(*key)
        before = await follow(backend, key)
        for value in (1, 2, 3):
            assert await backend.submit({"id": 1, "type": "wait" if value == 3 else "x"}) in (key, TaskKey("tasks", "x", "1"))
            if value < 3:
                events = await follow(backend, TaskKey("tasks", "x", "1"))
                assert told(events) == ["started", "completed"]
                assert [event.seq for event in events] == [2 * value - 1, 2 * value]
        assert (await first(backend, key, "progress")).seq == before[-1].seq + 2
        await backend.cancel_task(*key)
        assert [event.seq for event in await follow(backend, key, last_event_id=1)] == [2, 3]  # the run before, to its end


async def test_two_submits_of_one_key_at_once_are_one_task(dsn: str) -> None:
    async with worker_on(dsn) as backend, backend_on(dsn) as other:
        submits = [hub.submit({"id": 1, "type": "wait"}) for hub in (backend, other) * 8]
        results = await asyncio.gather(*submits, return_exceptions=True)
        assert sum(isinstance(result, TaskAlreadyRunningError) for result in results) == 15
        assert sql(dsn, "select count(*) from procrastinate_jobs where task_name = 'penstock'") == [1]
        await backend.cancel_task("tasks", "wait", 1)


async def test_a_task_has_its_timeout(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"type": "wait"}, timeout=0.1)
        end = (await follow(backend, key))[-1]
        assert end.type == "timed_out"
        assert sql(dsn, "select state from penstock_tasks") == ["timed_out"]


async def test_a_task_that_fails_is_done_again_when_that_is_wanted(dsn: str) -> None:
    attempts: list[tuple[int, Any]] = []

    async def work(task: dict[str, Any]) -> str:
        context = current_task()
        assert context is not None
        attempts.append((context.attempt, context.saved))
        await context.save({"tried": context.attempt})
        if context.attempt < 3:
            raise ConnectionError("not yet")
        return "done"

    async with worker_on(dsn, work, retry=RetryStrategy(max_attempts=5)) as backend:
        events = await follow(backend, await backend.submit({}))
    assert attempts == [(1, None), (2, {"tried": 1}), (3, {"tried": 2})]
    assert told(events) == ["started", "warning", "started", "warning", "started", "completed"]
    assert events[1].data == {"message": "attempt 1 has failed: not yet", "code": "retry", "attempt": 2}


async def test_retries_come_to_an_end(dsn: str) -> None:
    async with worker_on(dsn, retry=2) as backend:
        events = await follow(backend, await backend.submit({"type": "fail"}))
    assert told(events).count("started") == 3
    assert events[-1].type == "error"


async def test_many_tasks_keep_the_concurrency(dsn: str) -> None:
    running, most, done, all_there = 0, 0, set[int](), asyncio.Event()

    async def work(task: dict[str, Any]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 7:
            all_there.set()
        await all_there.wait()
        await asyncio.sleep(0.005)
        running -= 1
        done.add(task["id"])

    async with worker_on(dsn, work, concurrency=7) as backend:
        await asyncio.gather(*(backend.submit({"id": number}) for number in range(60)))
        await eventually(lambda: len(done) == 60)
        await eventually(lambda: sql(dsn, "select count(*) from penstock_tasks where state = 'completed'") == [60])
    assert most == 7


async def test_what_is_told_may_be_larger_than_a_notification(dsn: str) -> None:
    async def work(task: dict[str, Any]) -> None:
        context = current_task()
        assert context is not None
        await context.item("x" * 500_000)
        await context.item("\x00 \ud800 é 🙂", number=float("nan"))

    async with worker_on(dsn, work) as backend:
        _, large, odd, _ = await follow(backend, await backend.submit({}))
    assert large.data["item"] == "x" * 500_000
    assert odd.data["number"] is None
    assert odd.data["item"].endswith("é 🙂")


async def test_the_table_of_events_stays_bounded(dsn: str) -> None:
    async def work(task: dict[str, Any]) -> None:
        context = current_task()
        assert context is not None
        for number in range(2_500):
            await context.progress(number)
            await context.item(number)

    async with worker_on(dsn, work) as backend:
        key = await backend.submit({})
        events = await follow(backend, key)
        assert events[-1].type == "completed"
        assert sum(event.dropped for event in events) + len(events) == events[-1].seq
        counts = dict(sql(dsn, "select type, count(*) from penstock_events group by type"))
        assert counts["progress"] <= 1_200, counts  # one batch, and what is kept
        assert counts["item"] <= 3_000, counts
        late = await follow(backend, key)
        assert len(late) <= 1_101
        assert [event.data["item"] for event in late if event.type == "item"][-3:] == [2497, 2498, 2499]


async def test_what_is_over_for_long_is_forgotten(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        old, new = [await backend.submit({"id": name}) for name in ("old", "new")]
        waiting = await backend.submit({"type": "wait"})
        for key in (old, new):
            await follow(backend, key)
        sql(dsn, "update penstock_tasks set ended = now() - interval '2 days' where key = 'old'")
        assert await backend.prune(24 * 3600) == 1
        assert await backend.get_task(*old) is None
        assert await backend.get_task(*new) is not None
        assert await backend.prune(0) == 1
        assert [status.task for status in await backend.list_tasks()] == [waiting]
        assert sql(dsn, "select count(distinct task) from penstock_events") <= [1]


async def test_a_periodic_task_is_submitted_by_the_workers_once_each_time(dsn: str) -> None:
    ran: list[Any] = []

    async def work(task: dict[str, Any]) -> None:
        ran.append(task["type"])

    backends = [PostgresTaskBackend(dsn, sweep_interval=0.1, name=f"worker {number}") for number in (1, 2)]
    for backend in backends:
        backend.set_executor(work)
        backend.schedule("* * * * * */1", {"type": "tick"})  # with seconds
    async with backends[0], backends[1]:
        working = [asyncio.create_task(backend.work()) for backend in backends]
        await eventually(lambda: len(ran) >= 2)
        for backend in backends:
            backend.stop()
        await asyncio.gather(*working)
    times = sql(dsn, "select args->>'timestamp' from procrastinate_jobs where task_name like 'penstock:tick%%'")
    assert len(times) == len(set(times)) >= 2


# --- what cannot be


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dsn": 3}, TypeError, "a DSN is a text"),
        ({"dsn": "my secret"}, ValueError, "cannot be read"),
        ({"dsn": ""}, ValueError, "cannot be read"),
        ({"dsn": "dbname=x", "data_dir": "y"}, ValueError, "not both"),
        ({"dsn": "dbname=x", "queue": ""}, ValueError, "queue"),
        ({"dsn": "dbname=x", "max_attempts": 0}, ValueError, "max_attempts"),
        ({"dsn": "dbname=x", "heartbeat": float("nan")}, ValueError, "heartbeat"),
        ({"dsn": "dbname=x", "keep": -1}, ValueError, "keep"),
        ({"dsn": "dbname=x", "retry": "often"}, TypeError, "retry"),
    ],
)
def test_options_that_cannot_be_are_refused_when_they_are_given(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        PostgresTaskBackend(**options)
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ("import", TypeError, "a task is a dict"),
        ({"path": object()}, TypeError, "must be JSON"),
        ({"text": "x" * (1 << 20)}, ValueError, "1,048,576 bytes"),
        ({"type": "a/b"}, ValueError, "printable"),
    ],
)
async def test_tasks_that_cannot_be_are_refused_and_leave_nothing(dsn: str, task: Any, error: Any, words: str) -> None:
    async with backend_on(dsn) as backend:
        with pytest.raises(error, match=words):
            await backend.submit(task)
        with pytest.raises(ValueError, match="timeout"):
            await backend.submit({}, timeout=0)
        with pytest.raises(TypeError, match="AsyncConnection"):
            await backend.submit({}, connection=3)  # type: ignore[arg-type]
    assert sql(dsn, "select count(*) from penstock_tasks") == [0]


async def test_a_database_that_is_not_there_is_said_in_time_and_without_the_password() -> None:
    backend = PostgresTaskBackend("postgresql://me:secret@127.0.0.1:1/db", connect_timeout=2)
    with pytest.raises(ConnectionError, match="db at 127.0.0.1:1") as raised:
        await backend.initialize()
    assert "secret" not in f"{raised.value!r} {backend!r}"
    with pytest.raises(RuntimeError, match="initialize"):
        await backend.submit({})


async def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # nobody accepts
        port = listening.getsockname()[1]
        backend = PostgresTaskBackend(f"host=127.0.0.1 port={port} dbname=x", connect_timeout=2)
        with pytest.raises(ConnectionError):
            await backend.initialize()


async def test_tables_of_another_version_are_refused(dsn: str) -> None:
    sql(dsn, "update penstock_schema set version = 99")
    with pytest.raises(RuntimeError, match="version 99"):
        await PostgresTaskBackend(dsn).initialize()


async def test_a_server_that_is_too_old_is_refused(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "OLDEST_SERVER", 990000)
    with pytest.raises(RuntimeError, match=r"this PostgreSQL is version \d+; use 99 or newer"):
        await PostgresTaskBackend(dsn).initialize()


async def test_tables_of_an_older_procrastinate_are_refused_with_what_to_do(dsn: str) -> None:
    sql(dsn, "drop function procrastinate_fetch_job_v2")
    with pytest.raises(RuntimeError, match="apply its migrations"):
        await PostgresTaskBackend(dsn).initialize()


async def test_a_worker_may_begin_again(dsn: str) -> None:
    async with backend_on(dsn, execute) as backend:
        for number in range(2):
            working = asyncio.create_task(backend.work())
            assert told(await follow(backend, await backend.submit({"id": number}))) == ["started", "completed"]
            backend.stop()
            assert await working == []


async def test_tables_are_made_once_when_many_begin_at_once(server: Any) -> None:
    sql(server.dsn, "create database fresh")
    fresh = server.database_dsn("fresh")
    backends = [PostgresTaskBackend(fresh) for _ in range(5)]
    await asyncio.gather(*(backend.initialize() for backend in backends))
    await asyncio.gather(*(backend.shutdown() for backend in backends))
    assert sql(fresh, "select version from penstock_schema") == [1]
    sql(server.dsn, "drop database fresh with (force)")


async def test_a_worker_needs_an_executor_and_works_once(dsn: str) -> None:
    async with backend_on(dsn) as backend:
        with pytest.raises(RuntimeError, match="set_executor"):
            await backend.work()
    async with worker_on(dsn) as backend:
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="works already"):
            await backend.work()
        with pytest.raises(ValueError, match="concurrency"):
            await backend.work(concurrency=0)


async def test_a_shutdown_ends_the_worker_and_the_subscriptions(dsn: str) -> None:
    backend = PostgresTaskBackend(dsn, cleanup=1.0)
    backend.set_executor(execute)
    await backend.initialize()
    working = asyncio.create_task(backend.work(grace=0))
    key = await backend.submit({"type": "wait"})
    await first(backend, key, "progress")
    watching = asyncio.create_task(follow(backend, key))
    await eventually(lambda: backend._open is not None and backend._open.mirrors.watched)
    assert backend.inflight_count == 1
    await backend.shutdown()
    await backend.shutdown()
    await working
    assert told(await watching)[-1] != "cancelled"
    assert sql(dsn, "select state, attempt, lost from penstock_tasks") == [("queued", 2, 0)]
