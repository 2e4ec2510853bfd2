"""Server-sent events: what a client gets, whenever it comes, however slow it is, and when it leaves."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers import turns
from serving import Client, app_for, http
from tasking import Held

from pipeline.tasks import EventType, RunningTask, TaskContext, TaskCoordinator, TaskEvent, TaskKey
from pipeline.tasks.web.sse import Encoder, streams_of

URL = "/tasks/shop/Import/7/events"


@pytest.fixture
async def hub() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator() as hub:
        yield hub


def start(hub: TaskCoordinator, work: object) -> RunningTask:
    return hub.start_task("shop", "Import", 7, work)  # type: ignore[arg-type]


async def three_items(context: TaskContext) -> str:
    for number in range(3):
        await context.item(number)
    return "done"


async def test_a_client_gets_everything_and_then_the_end(hub: TaskCoordinator) -> None:
    task = start(hub, three_items)
    client = Client(app_for(hub), URL)
    events = await client.end()
    assert [(event.id, event.type) for event in events] == [
        (1, "started"), (2, "item"), (3, "item"), (4, "item"), (5, "completed"),
    ]
    assert events[1].data["data"] == {"item": 0}
    assert [TaskEvent.from_dict(event.data) for event in events] == [event async for event in task.subscribe()]
    assert client.finished
    assert client.headers["content-type"].startswith("text/event-stream")
    assert client.headers["cache-control"] == "no-store"
    assert client.body.startswith(b"retry: 2000\n\n")


async def test_events_arrive_while_the_task_runs(hub: TaskCoordinator) -> None:
    work = Held()
    start(hub, work)
    client = Client(app_for(hub), URL)
    await client.until(lambda client: client.types == ["started"])
    assert work.context is not None
    await work.context.item("first")
    await client.until(lambda client: client.types == ["started", "item"])
    work.opened.set()
    assert [event.type for event in await client.end()] == ["started", "item", "completed"]


async def test_a_cancellation_reaches_every_client_once_with_its_reason(hub: TaskCoordinator) -> None:
    work = Held()
    start(hub, work)
    app = app_for(hub)
    clients = [Client(app, URL) for _ in range(20)]
    await work.began.wait()
    async with http(app) as requests:
        answer = await requests.post("/tasks/shop/Import/7/cancel", json={"reason": "wrong file"})
    assert answer.json() == {"cancelled": True}
    for client in clients:
        *_, last = await client.end()
        assert client.types == ["started", "cancelled"]
        (reason,) = last.data["data"]["reasons"]
        assert (reason["message"], reason["code"]) == ("wrong file", "web")


@pytest.mark.parametrize("how", ["header", "query", "both"])
async def test_a_client_that_comes_back_goes_on_after_its_last_event(hub: TaskCoordinator, how: str) -> None:
    start(hub, three_items)
    app = app_for(hub)
    await Client(app, URL).end()
    headers = {} if how == "query" else {"Last-Event-ID": "3"}
    query = {"header": "", "query": "?last_event_id=3", "both": "?last_event_id=1"}[how]  # the header is the newer one
    events = await Client(app, URL + query, headers=headers).end()
    assert [event.id for event in events] == [4, 5]


async def test_a_client_that_has_the_terminal_event_is_told_not_to_come_back(hub: TaskCoordinator) -> None:
    start(hub, three_items)
    app = app_for(hub)
    last = (await Client(app, URL).end())[-1].id
    again = Client(app, URL, headers={"Last-Event-ID": str(last)})
    assert await again.end() == []
    assert (again.status, again.body) == (204, b"")


async def test_a_client_of_an_earlier_life_gets_the_whole_run(hub: TaskCoordinator) -> None:
    start(hub, three_items)
    events = await Client(app_for(hub), URL, headers={"Last-Event-ID": "999"}).end()
    assert [event.id for event in events] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("wrong", ["x", "-1", "1.5", "1e3", "٣", "1" * 30, " 1 2"])
async def test_a_wrong_last_event_id_is_refused_in_words(hub: TaskCoordinator, wrong: str) -> None:
    start(hub, three_items)
    async with http(app_for(hub)) as requests:
        answers = [await requests.get(URL, params={"last_event_id": wrong})]
        if wrong.isascii():
            answers.append(await requests.get(URL, headers={"Last-Event-ID": wrong}))
    for answer in answers:
        assert answer.status_code == 400
        assert "send a whole number" in answer.json()["error"]


async def test_a_client_that_leaves_is_forgotten_at_once(hub: TaskCoordinator) -> None:
    work = Held()
    task = start(hub, work)
    client = Client(app_for(hub), URL)
    await client.until(lambda client: client.types == ["started"])
    streams = streams_of(hub)
    history = task._history
    assert (len(streams), history.followers) == (1, 1)
    tasks = len(asyncio.all_tasks())
    await client.leave()
    assert (len(streams), history.followers) == (0, 0)
    assert len(asyncio.all_tasks()) == tasks - 3  # the request's own, and its two helpers


async def test_a_client_that_leaves_while_it_takes_nothing_is_forgotten_too(hub: TaskCoordinator) -> None:
    work = Held()
    start(hub, work)
    client = Client(app_for(hub), URL)
    client.room.clear()
    await work.began.wait()
    assert work.context is not None
    for _ in range(100):
        await work.context.item("x" * 10_000)
    await turns()
    await client.leave()
    assert len(streams_of(hub)) == 0


@pytest.mark.parametrize("error", [ConnectionResetError(), RuntimeError("Unexpected message received: http.disconnect")])
async def test_a_client_whose_departure_is_told_as_an_error_is_forgotten_too(hub: TaskCoordinator, error: Exception) -> None:
    class Failing(Client):
        async def _receive(self) -> dict[str, Any]:
            await self._gone.wait()
            raise error

    work = Held()
    start(hub, work)
    client = Failing(app_for(hub), URL)
    await client.until(lambda client: client.types)
    assert len(streams_of(hub)) == 1
    await client.leave()
    assert len(streams_of(hub)) == 0


async def test_a_request_that_is_cancelled_leaves_nothing(hub: TaskCoordinator) -> None:
    start(hub, Held())
    client = Client(app_for(hub), URL)
    await client.until(lambda client: client.types)
    client.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.task
    assert len(streams_of(hub)) == 0


async def test_a_slow_client_holds_little_loses_progress_and_is_told_how_much(hub: TaskCoordinator) -> None:
    work = Held()
    start(hub, work)
    client = Client(app_for(hub), URL)
    await client.until(lambda client: client.types == ["started"])
    client.room.clear()
    assert work.context is not None
    for number in range(2_000):
        await work.context.progress(number, 2_000, filling="x" * 2_000)
        await turns(1)
    (stream,) = streams_of(hub)._streams
    assert sum(map(len, stream._waiting)) < 70_000  # of 4 MB
    await work.context.item("kept")
    work.opened.set()
    client.room.set()
    events = await client.end()
    assert [event.type for event in events if event.type != "progress"] == ["started", "item", "completed"]
    ids = [event.id for event in events]
    gaps = [after - before - 1 for before, after in itertools.pairwise(ids)]
    assert gaps == [event.data.get("dropped", 0) for event in events[1:]]
    assert sum(gaps) > 1_000


async def test_what_is_ready_is_sent_in_one_piece(hub: TaskCoordinator) -> None:
    async def many(context: TaskContext) -> None:
        for number in range(500):
            await context.item(number)

    task = start(hub, many)
    await task.wait()
    client = Client(app_for(hub), URL)
    assert len(await client.end()) == 502
    assert client.pieces <= 5


async def test_silence_is_filled_with_comments(hub: TaskCoordinator) -> None:
    work = Held()
    start(hub, work)
    client = Client(app_for(hub, heartbeat=0.01), URL)
    await client.until(lambda client: client.body.count(b": still here\n\n") >= 3)
    work.opened.set()
    assert [event.type for event in await client.end()] == ["started", "completed"]


async def test_a_head_request_opens_no_stream(hub: TaskCoordinator) -> None:
    start(hub, Held())
    client = Client(app_for(hub), URL, method="HEAD")
    await client.end()
    assert (client.status, client.body, client.finished) == (200, b"", True)
    assert len(streams_of(hub)) == 0


async def test_streams_that_are_closed_send_what_has_happened_first(hub: TaskCoordinator) -> None:
    work = Held()
    start(hub, work)
    client = Client(app_for(hub), URL)
    await client.until(lambda client: client.types == ["started"])
    assert work.context is not None
    for _number in range(200):
        await work.context.item("x" * 1_000)  # more than has room at once
    streams = streams_of(hub)
    streams.close()
    assert await streams.finished(5)
    assert len(await client.end()) == 201
    assert client.finished


async def test_a_client_that_takes_nothing_for_long_is_let_go(hub: TaskCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tasks.web.sse.EventStream.__init__.__kwdefaults__", {"send_timeout": 0.02})
    start(hub, Held())
    client = Client(app_for(hub), URL)
    client.room.clear()
    await client.end()
    assert not client.finished
    assert len(streams_of(hub)) == 0


async def test_a_hub_that_fails_in_the_middle_ends_the_stream_so_that_the_client_comes_back(
    hub: TaskCoordinator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(hub, Held())

    class Breaking:
        dropped = 0

        def __aiter__(self) -> Breaking:
            return self

        async def __anext__(self) -> TaskEvent:
            raise ConnectionError("the database has gone")

        async def aclose(self) -> None:
            pass

    monkeypatch.setattr(hub, "subscribe", lambda *_, **__: Breaking())
    client = Client(app_for(hub), URL)
    assert await client.end() == []
    assert client.finished
    assert "the database has gone" in capsys.readouterr().err


async def test_a_task_that_starts_again_goes_on_counting_for_its_clients(hub: TaskCoordinator) -> None:
    app = app_for(hub)
    await start(hub, three_items).wait()
    await start(hub, three_items).wait()
    assert [event.id for event in await Client(app, URL).end()] == [6, 7, 8, 9, 10]
    assert [event.id for event in await Client(app, URL, headers={"Last-Event-ID": "4"}).end()] == [5]
    assert [event.id for event in await Client(app, URL, headers={"Last-Event-ID": "5"}).end()] == [6, 7, 8, 9, 10]


def test_an_event_is_encoded_once_for_all_and_never_for_another() -> None:
    encoder, key = Encoder(), TaskKey("a", "b", "c")
    event = TaskEvent(key, 1, EventType.ITEM, {"item": "é \u2028 \n\r"})
    first = encoder.encode(event)
    assert encoder.encode(event) is first
    assert encoder.encode(TaskEvent(key, 1, EventType.ITEM, {"item": "of another life"})) != first
    assert b'"dropped":3' in encoder.encode(event.after(3))
    assert first.count(b"\n") == 4
    for number in range(1_000):
        encoder.encode(TaskEvent(key, number, EventType.ITEM, {"item": number}))
    assert len(encoder._recent) <= 256
