"""The coordinator of tasks: starting by key, cancelling with reasons, and what all who watch are told.

The rule kept here: what is waited for is an event of the task or of the test, and every task ends with one terminal event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers import Gate

from pipeline.tasks import (
    TaskCoordinator,
    TaskEvent,
    TaskState,
)

KEY = ("shop", "Import", 7)


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator(progress_interval=0.005) as coordinator:
        yield coordinator


async def everything(coordinator: TaskCoordinator, key: tuple[Any, ...] = KEY, **options: Any) -> list[TaskEvent]:
    """All events of a task, to its end."""
    return [event async for event in coordinator.subscribe(*key, **options)]


def types(events: list[TaskEvent]) -> list[str]:
    return [event.type.value for event in events]


# --- the eight tests of the document that this comes from


async def test_task_cancellation_sends_cancelled_event_to_clients(coordinator: TaskCoordinator) -> None:
    gate = Gate()
    coordinator.start_task(*KEY, lambda_of(gate))
    client = asyncio.create_task(everything(coordinator))
    await gate.entered.wait()
    assert await coordinator.cancel_task(*KEY, "the file was wrong")
    events = await client
    assert types(events) == ["started", "cancelled"]
    assert events[-1].data["message"] == "the file was wrong"
    assert [reason["message"] for reason in events[-1].data["reasons"]] == ["the file was wrong"]


async def test_task_cancellation_is_re_raised(coordinator: TaskCoordinator) -> None:
    gate = Gate()
    running = coordinator.start_task(*KEY, lambda_of(gate))
    await gate.entered.wait()
    running.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running.task
    assert running.task.cancelled()
    assert gate.cancelled == 1


async def test_multiple_clients_all_receive_cancellation_event(coordinator: TaskCoordinator) -> None:
    gate = Gate()
    coordinator.start_task(*KEY, lambda_of(gate))
    clients = [asyncio.create_task(everything(coordinator)) for _ in range(5)]
    await gate.entered.wait()
    await coordinator.cancel_task(*KEY)
    for events in await asyncio.gather(*clients):
        assert types(events) == ["started", "cancelled"]


async def test_task_cleanup_happens_on_cancellation(coordinator: TaskCoordinator) -> None:
    began, told = asyncio.Event(), list[str]()

    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            told.append("cleaned up")

    coordinator.start_task(*KEY, work)
    await began.wait()
    await coordinator.cancel_task(*KEY)
    async for event in coordinator.subscribe(*KEY):
        told.append(event.type.value)
    assert told == ["started", "cleaned up", "cancelled"]


async def test_cancel_task_method_exists(coordinator: TaskCoordinator) -> None:
    assert asyncio.iscoroutinefunction(coordinator.cancel_task)


async def test_cancel_task_cancels_running_task(coordinator: TaskCoordinator) -> None:
    gate = Gate()
    running = coordinator.start_task(*KEY, lambda_of(gate))
    await gate.entered.wait()
    assert coordinator.is_task_running(*KEY)
    assert await coordinator.cancel_task(*KEY) is True
    await running.wait()
    assert not coordinator.is_task_running(*KEY)
    assert gate.cancelled == 1


async def test_cancel_nonexistent_task_returns_false(coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    assert await coordinator.cancel_task("nobody", "knows", 1) is False
    assert "an unknown task cannot be cancelled" in capsys.readouterr().err


async def test_cancel_already_completed_task_returns_false(
    coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> int:
        return 3

    await coordinator.start_task(*KEY, work).wait()
    assert await coordinator.cancel_task(*KEY) is False
    assert "a task that is over cannot be cancelled" in capsys.readouterr().err
    status = await coordinator.get_task(*KEY)
    assert status is not None
    assert status.state is TaskState.COMPLETED


def lambda_of(gate: Gate) -> Any:
    """Work that waits in a gate."""

    async def work() -> Any:
        return await gate("item")

    return work
