"""Workers that die, freeze or are told to stop, and a database that is restarted: nothing is lost, and nothing ends twice.

The rule kept here: processes are killed for real, at a moment that the database shows, never after a while.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from databases import backend_on, dsn, execute, first, follow, server, sql, worker_on, worker_program
from helpers import LIMIT, Journal, eventually, until

from pipeline.cli import main
from pipeline.tasks import TaskEvent
from pipeline.tasks.backends.postgres.sweeper import Sweeper

__all__ = ["dsn", "server"]

BACKEND = "from pipeline.tasks import PostgresTaskBackend; backend = PostgresTaskBackend"


def told(events: list[TaskEvent]) -> list[str]:
    return [event.type.value for event in events]


def items(events: list[TaskEvent]) -> list[int]:
    return [event.data["item"] for event in events if event.type == "item"]


def assert_counted(events: list[TaskEvent], to: int) -> None:
    """Each number once, in order; but for the one whose attempt has ended between telling and saving it."""
    numbers = items(events)
    again = [event.data["attempt"] for event in events if event.type == "item"]
    repeated = [number for n, number in enumerate(numbers) if n and number == numbers[n - 1] and again[n] != again[n - 1]]
    for number in repeated:
        numbers.remove(number)
    assert numbers == list(range(to))
    assert len(repeated) < again[-1]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


async def test_a_killed_workers_task_goes_on_where_it_was(dsn: str, tmp_path: Path) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit({"type": "count", "to": 40, "pause": 0.02})
        with worker_program(tmp_path, dsn, "mortal") as mortal:
            await first(backend, key, "item", item=10)
            status = await backend.get_task(*key)
            assert status is not None
            assert status.worker == "mortal"
            async with worker_on(dsn, name="heir"):
                watching = asyncio.create_task(follow(backend, key))
                mortal.process.send_signal(signal.SIGKILL)
                killed = time.time()
                events = await watching
        again = next(event for event in events if event.type == "started" and event.at > killed)
        assert again.at - killed < 25  # it takes one or two seconds; heartbeats would take half a minute
        warning = next(event for event in events if event.type == "warning")
        assert warning.data["code"] == "worker_lost"
        assert "mortal has died" in warning.data["message"]
        assert told(events)[-1] == "completed"
        assert_counted(events, 40)
        status = await backend.get_task(*key)
        assert status is not None
        assert (status.attempt, status.worker) == (2, "heir")
        assert sql(dsn, "select status from procrastinate_jobs where task_name = 'penstock' order by id") == ["failed", "succeeded"]


async def test_a_thawed_worker_writes_nothing_and_stops_its_work(dsn: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    async with backend_on(dsn) as backend:
        key = await backend.submit({"type": "wait", "journal": journal.path})
        with worker_program(tmp_path, dsn, "frozen", heartbeat=0.6) as frozen:
            await first(backend, key, "progress")
            frozen.process.send_signal(signal.SIGSTOP)
            async with backend_on(dsn, heartbeat=0.6):  # sweeps
                warning = await first(backend, key, "warning")
            assert "frozen was not heard of in time" in warning.data["message"]
            async with worker_on(dsn, name="successor", heartbeat=30) as successor:
                await eventually(lambda: sql(dsn, "select worker, attempt from penstock_tasks where state = 'running'") == [("successor", 2)])
                before = sql(dsn, "select * from penstock_events order by seq"), sql(dsn, "select seq from penstock_tasks")
                frozen.process.send_signal(signal.SIGCONT)
                await eventually(lambda: journal.lines() == ["superseded"])
                await successor.submit({"id": "next"})
                after = sql(dsn, "select * from penstock_events where task = 1 order by seq")
                assert [event for event in after if event in before[0]] == before[0]
                assert {row[3] for row in after if row not in before[0]} <= {"started", "progress"}  # its successor's
                assert await backend.cancel_task(*key, "enough")
                assert told(await follow(backend, key)).count("cancelled") == 1
    assert journal.lines() == ["superseded", "None"]


async def test_a_write_of_an_earlier_attempt_is_refused(dsn: str) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def work(task: dict[str, Any]) -> None:
        reached.set()
        await go_on.wait()

    async with worker_on(dsn, work) as backend:
        key = await backend.submit({})
        await reached.wait()
        sql(dsn, "update penstock_tasks set attempt = 2, worker = 'another'")
        go_on.set()
        await eventually(lambda: backend.inflight_count == 0)
        assert sql(dsn, "select state, attempt, worker from penstock_tasks") == [("running", 2, "another")]
        assert "completed" not in sql(dsn, "select type from penstock_events")
        sql(dsn, "update penstock_tasks set presence = 1")  # nobody's
        assert told(await follow(backend, key))[-1] == "completed"


async def test_a_task_that_kills_its_workers_comes_to_an_end(dsn: str) -> None:
    async with backend_on(dsn, max_attempts=2) as backend:
        key = await backend.submit({"type": "wait"})
        for attempt in (1, 2):
            sql(dsn, "update penstock_tasks set state = 'running', worker = 'victim', presence = 1, beat = now()")
            await eventually(lambda: sql(dsn, "select state from penstock_tasks") != ["running"])
            assert sql(dsn, "select lost, attempt from penstock_tasks") == [(min(attempt, 1), 2)]
        events = await follow(backend, key)
        assert told(events) == ["warning", "error"]
        assert events[-1].data["type"] == "WorkerLostError"
        assert "2 workers were lost" in events[-1].data["message"]


async def test_a_task_that_was_stopping_when_its_worker_died_is_cancelled(dsn: str, tmp_path: Path) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit({"type": "deaf"})
        with worker_program(tmp_path, dsn, "deaf") as worker:
            await first(backend, key, "progress")
            assert await backend.cancel_task(*key, "stop it")
            worker.process.send_signal(signal.SIGKILL)
            end = (await follow(backend, key))[-1]
        assert end.type == "cancelled"
        assert end.data["message"] == "stop it"
        assert "lost" in end.data["note"]


@pytest.mark.parametrize("job", ["none", "failed", "doing"])
async def test_a_task_whose_job_is_not_in_the_queue_is_queued_again(dsn: str, job: str) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit({})
        if job == "none":
            sql(dsn, "delete from procrastinate_jobs where id = (select job from penstock_tasks)")
        else:
            sql(dsn, "update procrastinate_jobs set status = %s", job)
            sql(dsn, "update procrastinate_events set at = at - interval '1 hour'")
    async with worker_on(dsn) as backend:
        events = await follow(backend, key)
    assert told(events) == ["warning", "started", "completed"]
    assert sql(dsn, "select attempt, lost from penstock_tasks") == [(2, 0)]


async def test_two_sweepers_recover_a_task_once(dsn: str) -> None:
    async with backend_on(dsn, sweep_interval=3600) as backend:
        opened = backend._open
        assert opened is not None
        sweepers = [Sweeper(opened.database, opened.store, interval=1, heartbeat=30) for _ in range(4)]
        for number in range(5):
            await backend.submit({"id": number})
        sql(dsn, "update penstock_tasks set state = 'running', presence = 1, beat = now() - interval '1 hour'")
        found = 0
        async with asyncio.timeout(LIMIT):  # who was just seen to be gone is believed a moment later
            while sql(dsn, "select count(*) from penstock_tasks where attempt = 1") != [0]:
                found += sum(await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers)))
        assert found == 5
        assert sum(await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))) == 0
        assert sql(dsn, "select distinct attempt, lost from penstock_tasks") == [(2, 1)]
        assert sql(dsn, "select count(*) from penstock_events where type = 'warning'") == [5]


async def test_a_sweeper_that_is_cancelled_when_it_gets_its_connection_ends(dsn: str) -> None:
    async with backend_on(dsn, sweep_interval=3600, pool_size=2) as backend:
        opened = backend._open
        assert opened is not None
        pool = opened.database.pool
        loop = asyncio.get_running_loop()

        def cancel(task: asyncio.Task[None], steps: int) -> None:
            task.cancel() if steps == 0 else loop.call_soon(cancel, task, steps - 1)

        for steps in range(25):
            held = [await pool.getconn() for _ in range(2)]
            sweeping = asyncio.create_task(Sweeper(opened.database, opened.store, interval=0.001, heartbeat=30).run())
            await eventually(lambda: pool.get_stats().get("requests_waiting") == 1)
            for connection in held:
                await pool.putconn(connection)
            cancel(sweeping, steps)
            _, pending = await asyncio.wait([sweeping], timeout=10)
            sweeping.cancel()
            assert not pending, f"cancelled {steps} steps after a connection was free"


async def test_a_lost_connection_of_a_worker_that_lives_costs_nothing(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"type": "count", "to": 60, "pause": 0.02})
        await first(backend, key, "item", item=3)
        opened = backend._open
        assert opened is not None
        opened.listener.ready.clear()
        killed = sql(dsn, "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()")
        assert killed[0] >= 3
        await opened.listener.ready.wait()
        events = await follow(backend, key)
    assert told(events).count("started") == 1
    assert told(events)[-1] == "completed"
    assert_counted(events, 60)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["in good order", "as in a crash"])
async def test_a_restart_of_the_database_in_mid_stream_loses_nothing(dsn: str, server: Any, how: signal.Signals) -> None:
    async with worker_on(dsn, name="steady") as backend, backend_on(dsn) as other:
        key = await backend.submit({"type": "count", "to": 100, "pause": 0.01})
        waiting = await backend.submit({"type": "wait"})
        watching = [asyncio.create_task(follow(hub, key)) for hub in (backend, other)]
        await first(backend, key, "item", item=20)
        await first(backend, waiting, "progress")
        await asyncio.to_thread(server.restart, how)
        seen = await asyncio.gather(*watching)
        assert seen[0] == seen[1] == await follow(other, key)
        assert told(seen[0]).count("started") == 1
        assert_counted(seen[0], 100)
        assert await other.cancel_task(*waiting, "works still")
        assert (await follow(backend, waiting))[-1].data["message"] == "works still"
        assert told(await follow(backend, await other.submit({}))) == ["started", "completed"]


async def test_a_worker_that_is_told_to_stop_gives_back_what_it_cannot_finish(dsn: str, tmp_path: Path) -> None:
    async with backend_on(dsn) as backend:
        keys = [await backend.submit({"type": "count", "to": 30, "pause": 0.05, "id": number}) for number in range(6)]
        quick = await backend.submit({"id": "quick"})
        with worker_program(tmp_path, dsn, "leaving", "--concurrency=3", "--grace=0") as leaving:
            for key in keys[:3]:
                await first(backend, key, "item", item=2)
            leaving.interrupt(signal.SIGTERM)
            finished = await asyncio.to_thread(leaving.finish)
        assert finished.code == 0, finished.err
        assert "Traceback" not in finished.err
        assert sql(dsn, "select count(*) from penstock_tasks where state = 'queued'") == [7]
        assert set(sql(dsn, "select lost from penstock_tasks")) == {0}
        async with worker_on(dsn, concurrency=7):
            for key in keys:
                events = await follow(backend, key)
                assert told(events)[-1] == "completed"
                assert_counted(events, 30)
            await follow(backend, quick)


async def test_a_worker_that_is_told_to_stop_lets_finish_what_can_within_its_grace(dsn: str, tmp_path: Path) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit({"type": "count", "to": 20, "pause": 0.02})
        with worker_program(tmp_path, dsn, "patient", "--grace=20") as patient:
            await first(backend, key, "item", item=2)
            patient.interrupt(signal.SIGINT)
            finished = await asyncio.to_thread(patient.finish)
        assert finished.code == 130, finished.err
        assert told(await follow(backend, key))[-1] == "completed"
        assert sql(dsn, "select attempt from penstock_tasks") == [1]


async def test_a_second_signal_gives_back_at_once_even_what_is_deaf(dsn: str, tmp_path: Path) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit({"type": "deaf"})
        with worker_program(tmp_path, dsn, "urged", "--grace=50", cleanup=0.2) as urged:
            await first(backend, key, "progress")
            urged.interrupt(signal.SIGTERM)
            await asyncio.to_thread(until, lambda: "worker stops" in urged.err() + urged.out())
            urged.interrupt(signal.SIGTERM)
            finished = await asyncio.to_thread(urged.finish)
        assert finished.code == 1
        assert "left behind" in finished.err + finished.out
        assert finished.seconds < 15
        status = await backend.get_task(*key)
        assert status is not None
        assert (status.state, status.attempt) == ("queued", 2)


async def test_a_cancelled_work_gives_back_too(dsn: str) -> None:
    async with backend_on(dsn, execute) as backend:
        working = asyncio.create_task(backend.work(grace=0))
        key = await backend.submit({"type": "wait"})
        await first(backend, key, "progress")
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert sql(dsn, "select state, attempt from penstock_tasks") == [("queued", 2)]
        await backend.cancel_task(*key)


@pytest.mark.parametrize(
    ("arguments", "service", "words"),
    [
        (["--concurrency=0"], None, "less than 1"),
        (["--grace=nan"], None, "no number of seconds"),
        ([], "backend = 3", "needs a PostgresTaskBackend"),
        ([], f"{BACKEND}('port=1 host=127.0.0.1 dbname=x'); backend.set_executor(print)", "cannot reach"),
        ([], "", "no attribute 'backend'"),
        ([], f"{BACKEND}('dbname=x')", "set_executor"),
    ],
)
def test_a_worker_command_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    service: str | None,
    words: str,
) -> None:
    name = f"service_{abs(hash(words))}"
    (tmp_path / f"{name}.py").write_text(service if service is not None else "backend = 3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        code = main(["worker", f"{name}:backend", *arguments])
    except SystemExit as usage:
        code = usage.code
    assert code == (1 if words == "cannot reach" else 2)
    assert words in capsys.readouterr().err
