"""Tasks in a database, watched and cancelled over HTTP, at two web processes at once.

The rule kept here: the web processes are `penstock serve`, real ones, the clients real connections, and what they have
been sent is compared with what stands in the table.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from databases import dsn, first, server, sql, worker_on
from helpers import LIMIT, Program
from serving import Sent, follow_over_http, served

from pipeline.tasks import TaskKey

__all__ = ["dsn", "server"]

WEB = """
    from pipeline.tasks import PostgresTaskBackend
    hub = PostgresTaskBackend({dsn!r})
"""


@contextmanager
def web_process(folder: Path, dsn: str) -> Iterator[tuple[Program, str]]:
    folder.mkdir()
    with served(folder, WEB.format(dsn=dsn)) as (program, url):
        yield program, url


def path_of(key: TaskKey) -> str:
    return "/tasks/" + "/".join(key) + "/events"


def in_the_table(dsn: str, key: TaskKey) -> list[tuple[int, str]]:
    return sql(
        dsn, "select e.seq, e.type from penstock_events e join penstock_tasks t on t.id = e.task where t.key = %s order by e.seq", key.id
    )


def numbers(events: list[Sent]) -> list[tuple[int, str]]:
    return [(event.id, event.type) for event in events]


async def test_two_hundred_clients_of_two_web_processes_get_one_stream_and_one_end(dsn: str, tmp_path: Path) -> None:
    with web_process(tmp_path / "one", dsn) as (_, one), web_process(tmp_path / "two", dsn) as (_, two):
        async with worker_on(dsn) as backend, asyncio.timeout(LIMIT):
            key = await backend.submit({"type": "count", "to": 100_000, "pause": 0.02})
            await first(backend, key, "started")
            started = asyncio.Semaphore(0)
            clients = [
                asyncio.create_task(follow_over_http(url, path_of(key), started=started)) for url in (one, two) for _ in range(100)
            ]
            for _ in clients:
                await started.acquire()
            async with httpx.AsyncClient() as person:
                answer = await person.post(f"{two}/tasks/{'/'.join(key)}/cancel", json={"reason": "not needed any more"})
            assert answer.json() == {"cancelled": True}
            streams = await asyncio.gather(*clients)
        assert all(complete for _, complete in streams)
        for events, _ in streams:
            assert numbers(events) == in_the_table(dsn, key)
            assert events == streams[0][0]
        end = streams[0][0][-1]
        assert end.type == "cancelled"
        assert [reason["message"] for reason in end.data["data"]["reasons"]] == ["not needed any more"]


async def test_who_loses_his_web_process_goes_on_at_another_and_misses_nothing(dsn: str, tmp_path: Path) -> None:
    with web_process(tmp_path / "one", dsn) as (leaving, one), web_process(tmp_path / "two", dsn) as (_, two):
        async with worker_on(dsn) as backend, asyncio.timeout(LIMIT):
            key = await backend.submit({"type": "count", "to": 60, "pause": 0.02})
            await first(backend, key, "started")
            started = asyncio.Semaphore(0)
            clients = [asyncio.create_task(follow_over_http(one, path_of(key), started=started)) for _ in range(20)]
            for _ in clients:
                await started.acquire()
            leaving.interrupt(signal.SIGTERM)
            cut = [events for events, _ in await asyncio.gather(*clients)]
            rest = await asyncio.gather(*(follow_over_http(two, path_of(key), last=events[-1].id) for events in cut))
        assert leaving.finish().code == 0
        for begun, (went_on, complete) in zip(cut, rest, strict=True):
            assert complete
            assert begun[-1].type == "item"  # the task knows nothing of a web process that goes
            assert numbers(begun + went_on) == in_the_table(dsn, key)
        assert went_on[-1].type == "completed"
