"""What the tests of tasks share: work that a test can follow, and what all who watch must have been told."""

from __future__ import annotations

import asyncio
from typing import Any

from helpers import LIMIT

from pipeline.tasks import EventType, TaskContext, TaskCoordinator, TaskEvent

KEY = ("shop", "Import", 7)


class Held:
    """Work that says when it has begun, waits until the test opens it, and says when it was interrupted."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.opened = asyncio.Event()
        self.interrupted = 0
        self.context: TaskContext | None = None

    async def __call__(self, context: TaskContext) -> str:
        self.context = context
        self.began.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.interrupted += 1
            raise
        return "done"


class Deaf:
    """Work that swallows its cancellation until the test lets it go."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.opened = asyncio.Event()
        self.heard = asyncio.Event()
        self.context: TaskContext | None = None

    async def __call__(self, context: TaskContext) -> str:
        self.context = context
        self.began.set()
        rescue = asyncio.get_running_loop().call_later(LIMIT, self.opened.set)  # a test that fails lets it go, too
        while not self.opened.is_set():
            try:
                await self.opened.wait()
            except asyncio.CancelledError:
                self.heard.set()
        rescue.cancel()
        return "at last"


async def everything(coordinator: TaskCoordinator, key: tuple[Any, ...] = KEY, **options: Any) -> list[TaskEvent]:
    """All events of a task, to its end."""
    return [event async for event in coordinator.subscribe(*key, **options)]


def types(events: list[TaskEvent]) -> list[str]:
    return [event.type.value for event in events]


def messages(event: TaskEvent) -> list[str]:
    """Its reasons."""
    return [reason["message"] for reason in event.data["reasons"]]


def assert_well_told(events: list[TaskEvent]) -> None:
    """What holds for every task: numbers in a row, and one terminal event, which is the last."""
    assert [event.seq for event in events] == list(range(events[0].seq, events[0].seq + len(events)))
    assert [event.terminal for event in events] == [False] * (len(events) - 1) + [True]
    assert [event.at for event in events] == sorted(event.at for event in events)
    if events[-1].type in (EventType.CANCELLED, EventType.TIMED_OUT):
        assert events[-1].data["reasons"]
        assert events[-1].data["message"]


def all_of(coordinator: TaskCoordinator, key: tuple[Any, ...] = KEY) -> asyncio.Task[list[TaskEvent]]:
    """The same, collected beside the test."""
    return asyncio.create_task(everything(coordinator, key))

