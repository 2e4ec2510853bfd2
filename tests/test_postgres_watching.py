"""Who watches a task in a database sees the same wherever he is, from wherever he begins, and costs nothing when he leaves.

The rule kept here: what was seen is compared with what stands in the table.
"""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path
from typing import Any

import pytest
from databases import backend_on, dsn, first, follow, server, sql, worker_on
from helpers import Program, eventually

from pipeline.tasks import PostgresTaskBackend, TaskEvent, TaskKey, UnknownTaskError, current_task
from pipeline.tasks.backends.postgres.database import Database
from pipeline.tasks.backends.postgres.mirrors import Mirrors

__all__ = ["dsn", "server"]

COUNT = {"type": "count", "to": 30, "pause": 0.005}

WATCHER = """
    import asyncio, json, sys
    from pipeline.tasks import PostgresTaskBackend
    async def main():
        async with PostgresTaskBackend(sys.argv[1]) as backend:
            async for event in backend.subscribe(*sys.argv[2:5]):
                print(json.dumps(event.to_dict()), flush=True)
    asyncio.run(main())
"""


def mirrors_of(backend: PostgresTaskBackend) -> Mirrors:
    assert backend._open is not None
    return backend._open.mirrors


def in_the_table(dsn: str, key: TaskKey) -> list[tuple[int, str]]:
    return sql(dsn, "select e.seq, e.type from penstock_events e join penstock_tasks t on t.id = e.task where t.key = %s order by e.seq", key.id)


def seen(events: list[TaskEvent]) -> list[tuple[int, str]]:
    return [(event.seq, event.type.value) for event in events]


async def test_two_processes_see_the_same_stream(dsn: str, tmp_path: Path) -> None:
    async with backend_on(dsn) as backend:
        key = await backend.submit(COUNT)
        with Program(tmp_path, WATCHER, dsn, *key) as other:
            watching = asyncio.create_task(follow(backend, key))
            await eventually(lambda: mirrors_of(backend).watched)
            async with worker_on(dsn):
                here = await watching
            finished = await asyncio.to_thread(other.finish)
        assert finished.code == 0, finished.err
        there = [TaskEvent.from_dict(json.loads(line)) for line in finished.out.splitlines()]
        assert here == there
        assert seen(here) == in_the_table(dsn, key)


async def test_who_comes_late_or_again_sees_the_rest(dsn: str) -> None:
    async with worker_on(dsn) as backend, backend_on(dsn) as other:
        key = await backend.submit(COUNT)
        everything = await follow(backend, key)
        assert await follow(other, key) == everything
        for last in (0, 1, 7, everything[-2].seq):
            assert await follow(other, key, last_event_id=last) == everything[last:]
        assert await follow(other, key, last_event_id=everything[-1].seq) == []
        assert await follow(other, key, last_event_id=10_000) == everything  # of an earlier life


async def test_an_unknown_task_is_an_error_at_the_first_event(dsn: str) -> None:
    async with backend_on(dsn) as backend:
        with pytest.raises(UnknownTaskError):
            await follow(backend, TaskKey("no", "such", "task"))
        assert await backend.get_task("no", "such", "task") is None
        with pytest.raises(ValueError, match="printable"):
            backend.subscribe("a/b", "c", "d")


async def test_a_task_that_many_watch_is_read_once(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    rows = Database.rows

    async def counted(self: Database, query: Any, values: Any = ()) -> Any:
        read.append(str(query))
        return await rows(self, query, values)

    async with backend_on(dsn) as backend:
        key = await backend.submit(COUNT)
        monkeypatch.setattr(Database, "rows", counted)
        watching = [asyncio.create_task(follow(backend, key)) for _ in range(200)]
        await eventually(lambda: len(read) >= 400)
        assert mirrors_of(backend).watched == 1
        monkeypatch.undo()
        async with worker_on(dsn):
            monkeypatch.setattr(Database, "rows", counted)
            read.clear()
            streams = await asyncio.gather(*watching)
        assert all(stream == streams[0] for stream in streams)
        assert seen(streams[0]) == in_the_table(dsn, key)
        assert sum("lateral" in query for query in read) < 100
        assert mirrors_of(backend).watched == 0


async def test_leaving_frees_what_was_watched(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"type": "wait"})
        await first(backend, key, "progress")
        assert mirrors_of(backend).watched == 0
        subscription = backend.subscribe(*key)
        async with subscription:
            await anext(subscription)
            assert mirrors_of(backend).watched == 1
            waiting = asyncio.create_task(_last(subscription))
            await asyncio.sleep(0)
        last = await waiting
        assert last is None or not last.terminal
        assert mirrors_of(backend).watched == 0
        forgotten = backend.subscribe(*key)
        await anext(forgotten)
        del forgotten
        gc.collect()
        assert mirrors_of(backend).watched == 0
        await backend.cancel_task(*key)


async def _last(subscription: Any) -> TaskEvent | None:
    last = None
    async for event in subscription:
        last = event
    return last


async def test_a_slow_follower_loses_progress_and_is_told_and_nothing_else(dsn: str) -> None:
    go_on = asyncio.Event()

    async def work(task: dict[str, Any]) -> None:
        context = current_task()
        assert context is not None
        await go_on.wait()
        for number in range(150):
            await context.progress(number)
        await context.warning("the end is near")

    async with worker_on(dsn, work) as backend:
        key = await backend.submit({})
        async with backend.subscribe(*key, buffer=10) as slow:
            events = [await anext(slow)]
            go_on.set()
            await follow(backend, key)
            events += [event async for event in slow]
        assert [event.type.value for event in events if event.type != "progress"] == ["started", "warning", "completed"]
        assert len(events) <= 12
        assert sum(event.dropped for event in events) == slow.dropped == events[-1].seq - len(events)


async def test_a_run_that_comes_after_is_followed_from_its_beginning(dsn: str) -> None:
    async with worker_on(dsn) as backend:
        key = await backend.submit({"id": 1})
        async with backend.subscribe(*key) as staying:  # keeps the history here
            old = [event async for event in staying]
        async with backend.subscribe(*key) as again:
            assert await anext(again) == old[0]
            assert await backend.submit({"id": 1}) == key
            new = await follow(backend, key)
            assert [event.seq for event in new] == [3, 4]
            assert [event async for event in again] == old[1:]
