"""Backends in memory: tasks as dicts, done at once or in the background, whose failures are told and whose end is in time."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers import turns
from tasking import Deaf, assert_well_told, everything, messages, types

from pipeline import Pipeline
from pipeline.tasks import (
    AsyncFireAndTrackBackend,
    CoordinatorClosedError,
    EventType,
    StreamTask,
    SyncTaskBackend,
    TaskAlreadyRunningError,
    TaskBackend,
    TaskCoordinator,
    TaskKey,
    current_task,
    get_default_task_backend,
    set_default_task_backend,
)
from stages import map


@pytest.fixture(params=[SyncTaskBackend, AsyncFireAndTrackBackend], ids=["inline", "fire and track"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[TaskBackend]:
    backend = request.param()
    await backend.initialize()
    yield backend
    await backend.shutdown()


@pytest.fixture
async def tracking() -> AsyncIterator[AsyncFireAndTrackBackend]:
    backend = AsyncFireAndTrackBackend()
    await backend.initialize()
    yield backend
    await backend.shutdown()


async def the_end(backend: TaskBackend, key: TaskKey | None) -> Any:
    assert key is not None
    return (await everything(backend.hub, key))[-1]  # type: ignore[arg-type]


# --- both


async def test_a_task_is_done_by_the_executor(backend: TaskBackend) -> None:
    done: list[dict[str, Any]] = []

    async def execute(task: dict[str, Any]) -> str:
        done.append(task)
        return "well"

    backend.set_executor(execute)
    key = await backend.submit({"app": "shop", "type": "import", "id": 7, "path": "a.txt"})
    assert key == ("shop", "import", "7")
    assert (await the_end(backend, key)).data == {"value": "well"}
    assert done == [{"app": "shop", "type": "import", "id": 7, "path": "a.txt"}]
    assert backend.inflight_count == 0


async def test_a_task_without_a_name_gets_one(backend: TaskBackend) -> None:
    backend.set_executor(nothing)
    first, second = await backend.submit({}), await backend.submit({"id": None})
    assert first is not None
    assert first[:2] == ("tasks", "task")
    assert first != second


async def nothing(task: dict[str, Any]) -> None:
    pass


async def test_a_failure_is_logged_swallowed_and_told(backend: TaskBackend, capsys: pytest.CaptureFixture[str]) -> None:
    async def execute(task: dict[str, Any]) -> None:
        raise LookupError("nothing there")

    backend.set_executor(execute)
    key = await backend.submit({"type": "import"})
    end = await the_end(backend, key)
    assert (end.type, end.data["message"]) == (EventType.ERROR, "nothing there")
    err = capsys.readouterr().err
    assert "task failed" in err
    assert "tasks/import/" in err
    assert backend.inflight_count == 0


async def test_without_an_executor_a_task_is_dropped_with_a_warning(
    backend: TaskBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await backend.submit({"type": "import"}) is None
    err = capsys.readouterr().err
    assert "warning" in err
    assert "no executor, so the task is dropped" in err
    assert backend.inflight_count == 0


class Tell(StreamTask):
    async def process(self) -> int:
        await self.send_event("item", dict(self.context.payload))
        return 5


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_executor_may_return_what_is_to_be_run(backend: TaskBackend, asynchronous: bool) -> None:
    def execute(task: dict[str, Any]) -> Any:
        return Pipeline(range(task["n"])) >> map(abs) if task["type"] == "pipeline" else Tell()

    async def execute_later(task: dict[str, Any]) -> Any:
        return execute(task)

    backend.set_executor(execute_later if asynchronous else execute)
    pipeline = await backend.submit({"type": "pipeline", "n": 3})
    assert (await the_end(backend, pipeline)).data["delivered"] == 3
    stream = await backend.submit({"type": "stream"})
    assert stream is not None
    events = await everything(backend.hub, stream)  # type: ignore[arg-type]
    assert [event.data for event in events if event.type is EventType.ITEM] == [{"type": "stream"}]
    assert events[-1].data == {"value": 5}


async def test_an_executor_that_does_the_work_itself_without_async_is_told_so(backend: TaskBackend) -> None:
    backend.set_executor(lambda task: 5)
    end = await the_end(backend, await backend.submit({}))
    assert end.type is EventType.ERROR
    assert "has returned 5; make it `async def`, or return a Pipeline or a StreamTask" in end.data["message"]


async def test_code_below_an_executor_finds_its_task(backend: TaskBackend) -> None:
    async def execute(task: dict[str, Any]) -> str:
        found = current_task()
        assert found is not None
        assert found.payload == task
        return str(found.key)

    backend.set_executor(execute)
    key = await backend.submit({"id": "a"})
    assert (await the_end(backend, key)).data == {"value": "tasks/task/a"}


@pytest.mark.parametrize(("task", "kind"), [("import", TypeError), (None, TypeError), ({"type": "a/b"}, ValueError)])
async def test_what_is_no_task_is_refused(backend: TaskBackend, task: Any, kind: type[Exception]) -> None:
    backend.set_executor(nothing)
    with pytest.raises(kind):
        await backend.submit(task)


async def test_what_is_no_executor_is_refused(backend: TaskBackend) -> None:
    with pytest.raises(TypeError, match="an executor is a function that takes the dict of a task, not 5"):
        backend.set_executor(5)  # type: ignore[arg-type]


async def test_a_task_that_is_changed_after_it_was_submitted_is_done_as_it_was() -> None:
    backend, seen = AsyncFireAndTrackBackend(), list[Any]()
    await backend.initialize()

    async def execute(task: dict[str, Any]) -> None:
        context = current_task()
        assert context is not None
        seen.extend([task.pop("n"), context.payload])

    backend.set_executor(execute)
    task = {"n": 1}
    await backend.submit(task)
    task["n"] = 2
    await backend.shutdown()
    assert seen == [1, {"n": 1}]


# --- inline


async def test_inline_a_task_is_over_when_submit_returns() -> None:
    backend = SyncTaskBackend()
    counts: list[int] = []

    async def execute(task: dict[str, Any]) -> None:
        counts.append(backend.inflight_count)
        await asyncio.sleep(0)

    backend.set_executor(execute)
    key = await backend.submit({})
    assert key is not None
    assert not backend.hub.is_task_running(*key)
    assert (counts, backend.inflight_count) == ([1], 0)


async def test_inline_tasks_submit_tasks() -> None:
    backend, done = SyncTaskBackend(), list[int]()

    async def execute(task: dict[str, Any]) -> None:
        if task["n"]:
            await backend.submit({"n": task["n"] - 1})
        done.append(task["n"])

    backend.set_executor(execute)
    await backend.submit({"n": 3})
    assert done == [0, 1, 2, 3]


async def test_inline_who_is_cancelled_while_he_waits_takes_the_task_with_him() -> None:
    backend, began, cleaned = SyncTaskBackend(), asyncio.Event(), list[str]()

    async def execute(task: dict[str, Any]) -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("up")

    backend.set_executor(execute)
    submitting = asyncio.create_task(backend.submit({"id": "a"}))
    await began.wait()
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert cleaned == ["up"]
    end = await the_end(backend, TaskKey("tasks", "task", "a"))
    assert messages(end) == ["the code that has submitted the task was cancelled"]


async def test_inline_nothing_is_kept_for_one_who_is_cancelled_at_the_end_of_his_task() -> None:
    class Large:
        pass

    backend, made, submitting = SyncTaskBackend(), list[weakref.ref[Large]](), list[asyncio.Task[Any]]()
    loop = asyncio.get_running_loop()

    async def execute(task: dict[str, Any]) -> Large:
        current = asyncio.current_task()
        assert current is not None
        current.add_done_callback(lambda _: loop.call_soon(submitting[0].cancel))
        large = Large()
        made.append(weakref.ref(large))
        return large

    backend.set_executor(execute)
    submitting.append(asyncio.create_task(backend.submit({})))
    await asyncio.wait(submitting)
    assert submitting.pop().cancelled()
    gc.collect()
    assert [reference() for reference in made] == [None]


async def test_inline_a_task_that_is_cancelled_does_not_cancel_who_has_submitted_it() -> None:
    backend, began = SyncTaskBackend(), asyncio.Event()

    async def execute(task: dict[str, Any]) -> None:
        began.set()
        await asyncio.Event().wait()

    backend.set_executor(execute)
    submitting = asyncio.create_task(backend.submit({"id": "a"}))
    await began.wait()
    await backend.hub.cancel_task("tasks", "task", "a", "no")
    assert await submitting == ("tasks", "task", "a")


def test_inline_one_backend_serves_one_loop_after_the_other() -> None:
    backend = SyncTaskBackend()
    backend.set_executor(nothing)
    assert asyncio.run(backend.submit({})) is not None
    assert asyncio.run(backend.submit({})) is not None


# --- fire and track


async def test_submit_returns_at_once_and_what_is_in_flight_is_counted(tracking: AsyncFireAndTrackBackend) -> None:
    go = asyncio.Event()

    async def execute(task: dict[str, Any]) -> None:
        await go.wait()

    tracking.set_executor(execute)
    keys = [await tracking.submit({"n": n}) for n in range(3)]
    assert tracking.inflight_count == 3
    go.set()
    for key in keys:
        assert (await the_end(tracking, key)).type is EventType.COMPLETED
    await turns()
    assert tracking.inflight_count == 0


async def test_submit_before_initialize_warns_and_works(capsys: pytest.CaptureFixture[str]) -> None:
    backend = AsyncFireAndTrackBackend()
    backend.set_executor(nothing)
    key = await backend.submit({"type": "early"})
    assert (await the_end(backend, key)).type is EventType.COMPLETED
    assert "submit before initialize" in capsys.readouterr().err
    await backend.shutdown()


async def test_a_shutdown_waits_for_what_is_in_flight() -> None:
    backend, done = AsyncFireAndTrackBackend(shutdown_timeout_seconds=30), list[int]()
    await backend.initialize()

    async def execute(task: dict[str, Any]) -> None:
        await asyncio.sleep(0.01)
        done.append(task["n"])

    backend.set_executor(execute)
    for n in range(3):
        await backend.submit({"n": n})
    await backend.shutdown()
    assert sorted(done) == [0, 1, 2]
    assert backend.inflight_count == 0
    await backend.shutdown()


async def test_what_is_late_is_cancelled_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    backend, cleaned = AsyncFireAndTrackBackend(shutdown_timeout_seconds=0.01), list[str]()
    await backend.initialize()

    async def execute(task: dict[str, Any]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(task["id"])

    backend.set_executor(execute)
    key = await backend.submit({"type": "import", "id": "late"})
    await backend.shutdown()
    assert cleaned == ["late"]
    end = await the_end(backend, key)
    assert (end.type, messages(end)) == (EventType.CANCELLED, ["the backend is shutting down"])
    assert end.data["reasons"][0]["code"] == "shutdown"
    err = capsys.readouterr().err
    assert "tasks were still in flight, and are cancelled" in err
    assert "tasks/import/late" in err


async def test_what_does_not_stop_is_left_behind_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    backend, deaf = AsyncFireAndTrackBackend(shutdown_timeout_seconds=0.01, cancel_timeout_seconds=0.01), Deaf()
    await backend.initialize()
    backend.set_executor(deaf)  # type: ignore[arg-type]
    key = await backend.submit({"type": "import", "id": "deaf"})
    await backend.shutdown()
    assert (await the_end(backend, key)).data["stuck"] is True
    assert "tasks did not stop and were left behind" in capsys.readouterr().err
    assert backend.inflight_count == 0
    deaf.opened.set()
    await turns(5)


async def test_a_backend_that_was_shut_down_takes_nothing_until_it_is_initialized_again() -> None:
    backend = AsyncFireAndTrackBackend()
    backend.set_executor(nothing)
    await backend.initialize()
    await backend.shutdown()
    with pytest.raises(CoordinatorClosedError, match="the backend was shut down"):
        await backend.submit({})
    await backend.initialize()
    assert (await the_end(backend, await backend.submit({}))).type is EventType.COMPLETED
    await backend.shutdown()


async def test_a_backend_on_a_coordinator_leaves_its_other_tasks_alone() -> None:
    async with TaskCoordinator() as coordinator:
        backend, deaf = AsyncFireAndTrackBackend(coordinator=coordinator), Deaf()
        backend.set_executor(nothing)
        await backend.initialize()
        other = coordinator.start_task("shop", "Import", 1, deaf)
        await deaf.began.wait()
        await backend.submit({})
        await backend.shutdown()
        assert other.reasons == ()
        deaf.opened.set()
        assert (await other.wait()).type is EventType.COMPLETED


async def test_a_task_that_is_in_flight_cannot_be_submitted_again(tracking: AsyncFireAndTrackBackend) -> None:
    go = asyncio.Event()

    async def execute(task: dict[str, Any]) -> None:
        await go.wait()

    tracking.set_executor(execute)
    key = await tracking.submit({"id": 1})
    with pytest.raises(TaskAlreadyRunningError):
        await tracking.submit({"id": 1})
    go.set()
    events = await everything(tracking.hub, key)  # type: ignore[arg-type]
    assert_well_told(events)
    assert types(events) == ["started", "completed"]
    assert await tracking.submit({"id": 1}) == key


# --- the default


def test_the_default_is_inline_and_always_the_same() -> None:
    set_default_task_backend(None)
    default = get_default_task_backend()
    assert isinstance(default, SyncTaskBackend)
    assert get_default_task_backend() is default
    other = AsyncFireAndTrackBackend()
    set_default_task_backend(other)
    assert get_default_task_backend() is other
    with pytest.raises(TypeError, match="a default backend is a TaskBackend"):
        set_default_task_backend("inline")  # type: ignore[arg-type]
    assert get_default_task_backend() is other
    set_default_task_backend(None)
    assert get_default_task_backend() is not default
    set_default_task_backend(None)


async def test_a_backend_of_ones_own_needs_three_methods_only() -> None:
    class Recording(TaskBackend):
        async def initialize(self) -> None:
            self.seen: list[dict[str, object]] = []

        async def submit(self, task: dict[str, object]) -> None:
            self.seen.append(task)

        async def shutdown(self) -> None:
            self.seen.clear()

    backend = Recording()
    await backend.initialize()
    await backend.submit({"type": "x"})
    assert backend.seen == [{"type": "x"}]
    assert backend.inflight_count == 0
    with pytest.raises(TypeError, match="no hub"):
        _ = backend.hub
