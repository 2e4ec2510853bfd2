"""The coordinator of tasks: starting by key, cancelling with reasons, and what all who watch are told.

The rule kept here: what is waited for is an event of the task or of the test, and every task ends with one terminal event.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers import turns
from tasking import KEY, Deaf, Held, all_of, everything, messages, types

from pipeline import EventTrigger, Pipeline
from pipeline.tasks import (
    CoordinatorClosedError,
    EventType,
    RunningTask,
    StreamTask,
    TaskAlreadyRunningError,
    TaskContext,
    TaskCoordinator,
    TaskHub,
    TaskKey,
    TaskState,
    UnknownTaskError,
    current_task,
)
from pipeline.tasks import coordinator as module
from stages import stage


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator(progress_interval=0.005) as coordinator:
        yield coordinator


async def nothing() -> None:
    pass


# --- the eight tests of the document that this comes from


async def test_task_cancellation_sends_cancelled_event_to_clients(coordinator: TaskCoordinator) -> None:
    work = Held()
    coordinator.start_task(*KEY, work)
    client = all_of(coordinator)
    await work.began.wait()
    assert await coordinator.cancel_task(*KEY, "the file was wrong")
    events = await client
    assert types(events) == ["started", "cancelled"]
    assert events[-1].data["message"] == "the file was wrong"
    assert messages(events[-1]) == ["the file was wrong"]


async def test_task_cancellation_is_re_raised(coordinator: TaskCoordinator) -> None:
    work = Held()
    running = coordinator.start_task(*KEY, work)
    await work.began.wait()
    running.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running.task
    assert running.task.cancelled()
    assert work.interrupted == 1


async def test_multiple_clients_all_receive_cancellation_event(coordinator: TaskCoordinator) -> None:
    work = Held()
    coordinator.start_task(*KEY, work)
    clients = [all_of(coordinator) for _ in range(5)]
    await work.began.wait()
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
    assert inspect.iscoroutinefunction(coordinator.cancel_task)
    assert list(inspect.signature(coordinator.cancel_task).parameters)[:4] == ["app", "name", "id", "reason"]


async def test_cancel_task_cancels_running_task(coordinator: TaskCoordinator) -> None:
    work = Held()
    running = coordinator.start_task(*KEY, work)
    await work.began.wait()
    assert coordinator.is_task_running(*KEY)
    assert await coordinator.cancel_task(*KEY) is True
    await running.wait()
    assert not coordinator.is_task_running(*KEY)
    assert work.interrupted == 1


async def test_cancel_nonexistent_task_returns_false(coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    assert await coordinator.cancel_task("nobody", "knows", 1) is False
    assert "an unknown task cannot be cancelled" in capsys.readouterr().err


async def test_cancel_already_completed_task_returns_false(
    coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    await coordinator.start_task(*KEY, nothing).wait()
    assert await coordinator.cancel_task(*KEY) is False
    assert "a task that is over cannot be cancelled" in capsys.readouterr().err
    status = await coordinator.get_task(*KEY)
    assert status is not None
    assert status.state is TaskState.COMPLETED


# --- starting, by key


async def test_an_id_is_as_good_as_its_text(coordinator: TaskCoordinator) -> None:
    running = coordinator.start_task("shop", "Import", 7, nothing)
    assert running.key == TaskKey("shop", "Import", "7")
    assert coordinator.is_task_running("shop", "Import", "7")
    assert types(await everything(coordinator)) == ["started", "completed"]


async def test_a_second_start_of_a_running_key_is_refused(coordinator: TaskCoordinator) -> None:
    work = Held()
    running = coordinator.start_task(*KEY, work)
    with pytest.raises(TaskAlreadyRunningError, match="task shop/Import/7 is running already; cancel it, wait"):
        coordinator.start_task(*KEY, nothing)
    work.opened.set()
    assert (await running.wait()).data == {"value": "done"}


async def test_a_key_that_is_started_again_goes_on_counting(coordinator: TaskCoordinator) -> None:
    first = await coordinator.start_task(*KEY, nothing).wait()
    running = coordinator.start_task(*KEY, nothing)
    events = await everything(coordinator)
    assert [event.seq for event in events] == [first.seq + 1, first.seq + 2]
    assert (await running.wait()) == events[-1]


async def test_a_key_can_be_started_again_as_soon_as_its_end_is_told(coordinator: TaskCoordinator) -> None:
    coordinator.start_task(*KEY, nothing)
    async for event in coordinator.subscribe(*KEY):
        if event.terminal:
            coordinator.start_task(*KEY, nothing)
    assert coordinator.is_task_running(*KEY)


@pytest.mark.parametrize("part", ["", "a/b", "x" * 201, "..", "line\n"])
async def test_a_key_that_no_address_can_hold_is_refused(coordinator: TaskCoordinator, part: str) -> None:
    with pytest.raises(ValueError, match="the name of a task is"):
        coordinator.start_task("shop", part, 7, nothing)


def plain_function() -> None:
    pass


async def two_arguments(one: int, two: int) -> None:
    pass


class Fetch(StreamTask):
    def __init__(self, url: str) -> None:
        self.url = url

    async def process(self) -> str:
        await self.send_event("start", {"url": self.url})
        return self.url.upper()


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (plain_function, "a plain function, which would hold the event loop; make it `async def`"),
        (two_arguments, "called without arguments, or with the TaskContext alone"),
        (Fetch, "pass an object of it: Fetch"),
        (42, "a task is a Pipeline, a StreamTask or a coroutine function, not 42"),
        (None, "a task is a Pipeline"),
        (dict, "a task is a Pipeline"),
    ],
)
async def test_what_cannot_be_run_is_refused_before_anything_starts(coordinator: TaskCoordinator, work: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        coordinator.start_task(*KEY, work)
    assert not coordinator.is_task_running(*KEY)
    assert await coordinator.list_tasks() == []


async def test_a_coroutine_that_was_called_is_refused_and_closed(coordinator: TaskCoordinator) -> None:
    with pytest.raises(TypeError, match=r"pass the function itself, nothing, without calling it"):
        coordinator.start_task(*KEY, nothing())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"timeout": "soon"}, TypeError),
        ({"timeout": float("nan")}, ValueError),
        ({"cancel_on": [5]}, TypeError),
        ({"cancel_on": EventTrigger}, TypeError),
        ({"cancel_on": None}, TypeError),
    ],
)
async def test_options_that_cannot_work_are_refused_before_anything_starts(
    coordinator: TaskCoordinator, options: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="needs a number of seconds|takes triggers, such as"):
        coordinator.start_task(*KEY, nothing, **options)
    assert not coordinator.is_task_running(*KEY)


async def test_work_may_take_the_context_or_nothing(coordinator: TaskCoordinator) -> None:
    async def optional(context: TaskContext | None = None) -> str:
        assert context is not None
        return str(context.key)

    async def other(number: int = 3) -> int:
        return number

    async def named(context: TaskContext) -> int:
        return context.attempt

    class Callable:
        async def __call__(self, context: TaskContext) -> dict[str, Any]:
            return dict(context.payload)

    expected = {"shop/Import/0": optional, 3: other, 1: named, 8: functools.partial(other, number=8)}
    for n, (value, work) in enumerate(expected.items()):
        assert await coordinator.start_task("shop", "Import", n, work).task == value
    assert await coordinator.start_task(*KEY, Callable(), payload={"a": 1}).task == {"a": 1}


async def test_a_stream_task_has_its_context_while_it_runs(coordinator: TaskCoordinator) -> None:
    task = Fetch("http://there")
    running = coordinator.start_task(*KEY, task)
    events = await everything(coordinator)
    assert types(events) == ["started", "started", "completed"]
    assert events[1].data == {"url": "http://there"}
    assert await running.task == "HTTP://THERE"
    with pytest.raises(RuntimeError, match="Fetch does not run"):
        assert task.context


async def test_one_stream_task_runs_once_at_a_time(coordinator: TaskCoordinator) -> None:
    class Waiting(StreamTask):
        async def process(self) -> None:
            held.set()
            await go.wait()

    held, go, task = asyncio.Event(), asyncio.Event(), Waiting()
    coordinator.start_task(*KEY, task)
    await held.wait()
    with pytest.raises(RuntimeError, match="runs already as task shop/Import/7; make another one"):
        coordinator.start_task("shop", "Import", 8, task)
    go.set()
    await everything(coordinator)
    assert (await coordinator.start_task("shop", "Import", 8, task).wait()).type is EventType.COMPLETED


async def test_code_deep_below_finds_its_task(coordinator: TaskCoordinator) -> None:
    def in_a_thread() -> str:
        found = current_task()
        assert found is not None
        return found.key.id

    @stage
    async def handler(n: int) -> str:
        return in_a_thread()

    async def work() -> list[Any]:
        beside = asyncio.create_task(asyncio.to_thread(in_a_thread))
        return [await beside, await (Pipeline([1]) >> handler).collect()]

    assert await coordinator.start_task(*KEY, work).task == ["7", ["7"]]
    assert current_task() is None


async def test_the_handle_has_the_value_and_the_error_of_the_work(coordinator: TaskCoordinator) -> None:
    async def fail() -> None:
        raise LookupError("nothing there")

    assert await coordinator.start_task(*KEY, value_of(5)).task == 5
    running = coordinator.start_task(*KEY, fail)
    with pytest.raises(LookupError, match="nothing there"):
        await running.task


def value_of(value: Any) -> Any:
    async def work() -> Any:
        return value

    return work


async def test_a_failure_is_told_and_logged_with_its_traceback(
    coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> None:
        raise LookupError("nothing there")

    event = await coordinator.start_task(*KEY, fail).wait()
    assert event.type is EventType.ERROR
    assert event.data["message"] == "nothing there"
    assert event.data["type"] == "LookupError"
    assert "in fail" in event.data["traceback"]
    err = capsys.readouterr().err
    assert "task failed" in err
    assert "shop/Import/7" in err
    assert "in fail" in err


async def test_a_failure_that_nobody_awaits_is_no_complaint_of_asyncio(coordinator: TaskCoordinator) -> None:
    async def fail() -> None:
        raise LookupError("nothing there")

    await coordinator.start_task(*KEY, fail).wait()
    gc.collect()  # the fixture of all tests hears what asyncio logs about exceptions that were never retrieved


async def test_tasks_that_are_eager_are_known_as_all_others(coordinator: TaskCoordinator) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))  # from Python 3.12 on
    try:
        running = coordinator.start_task(*KEY, nothing)
        assert types(await everything(coordinator)) == ["started", "completed"]
    finally:
        loop.set_task_factory(None)
    assert not coordinator.is_task_running(*KEY)
    assert running.status().state is TaskState.COMPLETED


# --- asking


async def test_the_status_follows_a_task_through_its_life(coordinator: TaskCoordinator) -> None:
    held = Deaf()
    running = coordinator.start_task(*KEY, held)
    queued = await coordinator.get_task(*KEY)
    assert queued is not None
    assert (queued.state, queued.started, queued.ended, queued.seq) == (TaskState.QUEUED, None, None, 0)
    await held.began.wait()
    await held.context.progress(3, 10)
    status = running.status()
    assert (status.state, status.progress, status.seq, status.attempt) == (TaskState.RUNNING, {"done": 3, "total": 10}, 2, 1)
    running.cancel("no more")
    assert running.status().state is TaskState.CANCELLING
    assert [str(reason) for reason in running.status().reasons] == ["no more"]
    await held.heard.wait()
    held.opened.set()
    end = await running.wait()
    over = await coordinator.get_task(*KEY)
    assert over is not None
    assert over.state is TaskState.CANCELLED
    assert over.state.over
    assert over.result == end.data
    assert over.created <= over.started <= over.ended == end.at  # type: ignore[operator]
    assert over.to_dict()["reasons"][0]["message"] == "no more"


async def test_a_task_that_asyncio_cancels_is_cancelling_too(coordinator: TaskCoordinator) -> None:
    held = Deaf()
    running = coordinator.start_task(*KEY, held)
    await held.began.wait()
    running.task.cancel()
    await held.heard.wait()
    assert running.status().state is TaskState.CANCELLING
    held.opened.set()
    event = await running.wait()
    assert event.type is EventType.CANCELLED
    assert event.data["value"] == "at last"
    assert running.task.cancelled()


async def test_the_newest_tasks_are_listed_and_those_that_run_come_first(coordinator: TaskCoordinator) -> None:
    held = [Held() for _ in range(2)]
    for n in range(2):
        coordinator.start_task("shop", "long", n, held[n])
    for n in range(3):
        await coordinator.start_task("shop", "short", n, nothing).wait()
    listed = [(status.task.name, status.task.id) for status in await coordinator.list_tasks()]
    assert listed == [("long", "1"), ("long", "0"), ("short", "2"), ("short", "1"), ("short", "0")]
    assert len(await coordinator.list_tasks(limit=3)) == 3
    assert await coordinator.list_tasks(limit=0) == []


async def test_unknown_tasks_are_unknown(coordinator: TaskCoordinator) -> None:
    assert await coordinator.get_task(*KEY) is None
    assert not coordinator.is_task_running(*KEY)
    with pytest.raises(UnknownTaskError, match="no task shop/Import/7 is known here"):
        await everything(coordinator)


async def test_tasks_that_are_over_are_kept_by_number_and_age() -> None:
    coordinator = TaskCoordinator(keep=3)
    for n in range(5):
        await coordinator.start_task("shop", "Import", n, nothing).wait()
    assert [status.task.id for status in await coordinator.list_tasks()] == ["4", "3", "2"]
    assert await coordinator.get_task("shop", "Import", 1) is None
    short = TaskCoordinator(keep_for=0.0)
    await short.start_task(*KEY, nothing).wait()
    assert await short.list_tasks() == []


async def test_tasks_that_are_over_are_kept_as_long_as_their_events_take_little(coordinator: TaskCoordinator) -> None:
    large_text = "x" * 1_000_000

    async def large(context: TaskContext) -> None:
        for _ in range(15):
            await context.item(large_text)

    for n in range(6):
        await coordinator.start_task("shop", "Import", n, large).wait()
    assert [status.task.id for status in await coordinator.list_tasks()] == ["5", "4", "3", "2"]


async def test_nothing_of_the_work_is_kept_when_it_is_over(coordinator: TaskCoordinator) -> None:
    class Large:
        pass

    async def work() -> None:
        large = Large()
        watched.append(weakref.ref(large))
        raise LookupError(large)

    watched: list[weakref.ref[Large]] = []
    await coordinator.start_task(*KEY, work).wait()
    await turns()
    gc.collect()
    assert watched[0]() is None
    assert await coordinator.get_task(*KEY) is not None


# --- loops


def test_the_one_of_the_module_serves_one_loop_after_the_other() -> None:
    async def main() -> list[str]:
        async with module.coordinator as coordinator:
            held = Held()
            coordinator.start_task(*KEY, held)
            await held.began.wait()
        with pytest.raises(CoordinatorClosedError):
            coordinator.start_task(*KEY, nothing)
        return types(await everything(coordinator))

    assert asyncio.run(main()) == ["started", "cancelled"]
    assert asyncio.run(main()) == ["started", "cancelled"]


@pytest.mark.abandons("task")
def test_tasks_of_a_loop_that_was_closed_under_them_are_forgotten() -> None:
    coordinator = TaskCoordinator()

    async def start() -> RunningTask:
        return coordinator.start_task(*KEY, Held())

    loop = asyncio.new_event_loop()
    running = loop.run_until_complete(start())
    running.task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert asyncio.run(again(coordinator)) == ["started", "completed"]


async def again(coordinator: TaskCoordinator) -> list[str]:
    coordinator.start_task(*KEY, nothing)
    return types(await everything(coordinator))


async def test_a_loop_whose_tasks_run_keeps_its_coordinator(coordinator: TaskCoordinator) -> None:
    coordinator.start_task(*KEY, Held())
    with pytest.raises(RuntimeError, match="has tasks in another event loop: make a coordinator for each loop"):
        await asyncio.to_thread(asyncio.run, again(coordinator))


async def test_a_task_is_followed_in_its_own_loop(coordinator: TaskCoordinator) -> None:
    held = Held()
    coordinator.start_task(*KEY, held)
    with pytest.raises(RuntimeError, match="runs in another event loop: follow it there, or over HTTP"):
        await asyncio.to_thread(asyncio.run, everything(coordinator))  # also if nobody follows it there yet
    client = all_of(coordinator)
    await held.began.wait()
    held.opened.set()
    assert types(await client) == ["started", "completed"]


def test_a_coordinator_is_a_hub() -> None:
    hub: TaskHub = TaskCoordinator()
    assert isinstance(hub, TaskCoordinator)
