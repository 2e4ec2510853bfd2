"""What users get wrong, and what they may well do: each is told before anything starts, or works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
from helpers import turns
from tasking import KEY, Deaf, Held, everything

from pipeline.tasks import (
    AsyncFireAndTrackBackend,
    EventType,
    RunningTask,
    StreamTask,
    SyncTaskBackend,
    TaskContext,
    TaskCoordinator,
    TaskError,
    TaskState,
    UnknownTaskError,
    current_task,
)


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator() as coordinator:
        yield coordinator


# --- classes


@dataclass(frozen=True)
class Fetch(StreamTask):
    url: str

    async def process(self) -> str:
        assert self.context.attempt == 1
        return self.url


async def test_a_task_may_be_a_frozen_dataclass(coordinator: TaskCoordinator) -> None:
    work = Fetch("https://example.org")
    assert (await coordinator.start_task(*KEY, work).wait()).data == {"value": work.url}
    work.check_idle()


class Registered(type):
    """A metaclass, as the models of Django and SQLAlchemy have one."""


async def test_a_task_may_be_a_model_with_a_metaclass_of_its_own(coordinator: TaskCoordinator) -> None:
    class Model(metaclass=Registered):
        pk = 7

    class Import(StreamTask, Model):
        async def process(self) -> int:
            return self.pk

    assert (await coordinator.start_task(*KEY, Import()).wait()).data == {"value": 7}


class Nameless(StreamTask):
    pass


class Plain(StreamTask):
    def process(self) -> Any:
        return 1


class Generator(StreamTask):
    async def process(self) -> Any:
        yield 1


class Asking(StreamTask):
    async def process(self, context: TaskContext) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (Nameless, "Nameless has no process: write `async def process.self.`"),
        (Plain, "Plain.process is no coroutine function: make it `async def process.self.`"),
        (Generator, "Generator.process is no coroutine function"),
        (Asking, "Asking.process takes .*; it is called without arguments, and finds the context in self.context"),
    ],
)
async def test_a_process_that_cannot_be_run_is_refused_before_anything_starts(
    coordinator: TaskCoordinator, work: type[StreamTask], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        coordinator.start_task(*KEY, work())
    assert await coordinator.list_tasks() == []


# --- functions


def traced(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A decorator that is no coroutine function, as many are."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
        return function(*args, **kwargs)

    return call


async def test_a_decorated_coroutine_function_is_one(coordinator: TaskCoordinator) -> None:
    @traced
    async def work(context: TaskContext) -> str:
        return context.key.name

    assert (await coordinator.start_task(*KEY, work).wait()).data == {"value": KEY[1]}


async def test_an_optional_context_is_known_by_its_type_too(coordinator: TaskCoordinator) -> None:
    async def work(ctx: TaskContext | None = None) -> bool:
        return ctx is not None

    async def other(times: int = 3) -> int:
        return times

    assert (await coordinator.start_task(*KEY, work).wait()).data == {"value": True}
    assert (await coordinator.start_task(*KEY, other).wait()).data == {"value": 3}


# --- waiting for oneself


async def test_a_task_cannot_wait_for_its_own_end(coordinator: TaskCoordinator) -> None:
    handles = list[RunningTask]()

    async def work() -> None:
        await handles[0].wait()

    handles.append(coordinator.start_task(*KEY, work))
    (end,) = [event for event in await everything(coordinator) if event.terminal]
    assert end.type is EventType.ERROR
    assert "cannot wait for its own end" in end.data["message"]


async def test_a_task_that_starts_eagerly_cannot_wait_for_its_own_shutdown(coordinator: TaskCoordinator) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))  # from Python 3.12 on

    async def work() -> None:
        await coordinator.shutdown()

    try:
        end = await coordinator.start_task(*KEY, work).wait()
    finally:
        loop.set_task_factory(None)
    assert end.data["type"] == "pipeline.tasks.errors.TaskError"


async def test_a_submitted_task_cannot_wait_for_the_shutdown_that_waits_for_it() -> None:
    backend = AsyncFireAndTrackBackend()
    errors = list[TaskError]()

    async def work(_: dict[str, Any]) -> None:
        with pytest.raises(TaskError, match="start that from outside") as caught:
            await backend.shutdown()
        errors.append(caught.value)

    backend.set_executor(work)
    await backend.initialize()
    await backend.submit({})
    await backend.shutdown()
    assert len(errors) == 1


# --- options


@pytest.mark.parametrize("timeout", [None, "soon", float("nan"), True])
async def test_a_shutdown_of_no_time_is_refused_before_anything_is_cancelled(timeout: Any) -> None:
    coordinator = TaskCoordinator()
    held = Held()
    running = coordinator.start_task(*KEY, held)
    with pytest.raises(ValueError, match="timeout is a number of seconds, 0 or more, not"):
        await coordinator.shutdown(timeout)
    assert running.status().state is TaskState.QUEUED
    with pytest.raises(ValueError, match="timeout is a number of seconds"):
        coordinator.shutting_down_on(15, timeout=timeout)
    await coordinator.shutdown()


async def test_a_shutdown_for_no_reason_is_refused_before_anything_is_closed() -> None:
    coordinator = TaskCoordinator()
    with pytest.raises(TypeError, match="a reason is a text or a CancelReason, not 5"):
        await coordinator.shutdown(reason=5)  # type: ignore[arg-type]
    coordinator.start_task(*KEY, Held())
    await coordinator.shutdown()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"progress_interval": 0}, "progress_interval is a number of seconds, more than 0, not 0"),
        ({"keep": -1}, "keep is a whole number, 0 or more, not -1"),
        ({"keep": 1.5}, "keep is a whole number"),
        ({"keep_for": "an hour"}, "keep_for is a number of seconds, 0 or more, not 'an hour'"),
    ],
)
def test_a_coordinator_checks_its_options_when_it_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TaskCoordinator(**options)


@pytest.mark.parametrize("name", ["shutdown_timeout_seconds", "cancel_timeout_seconds"])
@pytest.mark.parametrize("value", [None, -1, "soon"])
def test_a_backend_checks_its_options_when_it_is_made(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is a number of seconds, 0 or more, not"):
        AsyncFireAndTrackBackend(**{name: value})


# --- loops


def test_a_start_without_a_loop_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"start them in an `async def`, run by asyncio.run"):
        TaskCoordinator().start_task(*KEY, Fetch(""))


@pytest.mark.abandons("task")
def test_a_task_whose_loop_was_closed_is_not_said_to_run() -> None:
    coordinator, loop = TaskCoordinator(), asyncio.new_event_loop()

    async def start() -> RunningTask:
        return coordinator.start_task(*KEY, Held())

    running = loop.run_until_complete(start())
    running.task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()

    async def ask() -> tuple[Any, ...]:
        assert not await coordinator.cancel_task(*KEY)
        with pytest.raises(UnknownTaskError):
            await everything(coordinator)
        return coordinator.is_task_running(*KEY), await coordinator.get_task(*KEY), await coordinator.list_tasks()

    assert asyncio.run(ask()) == (False, None, [])


async def test_what_the_one_who_submitted_it_has_left_is_counted_and_stopped_by_the_shutdown() -> None:
    backend, deaf = SyncTaskBackend(), Deaf()
    backend.set_executor(lambda task: deaf(current_task()))  # type: ignore[arg-type]
    submitting = asyncio.create_task(backend.submit({}))
    await deaf.began.wait()
    for _ in range(2):  # the second time it does not wait for the cleanup
        submitting.cancel()
        await turns(5)
    assert submitting.cancelled()
    assert backend.inflight_count == 1
    stopping = asyncio.create_task(backend.shutdown())
    await turns(5)
    assert not stopping.done()
    deaf.opened.set()
    await stopping
    assert backend.inflight_count == 0
