"""Code that does what nobody should: exits, floods, leaks, broken triggers and texts. Every task has its one end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
import uvloop
from helpers import turns
from tasking import KEY, Held, all_of, assert_well_told, everything, messages, types

from pipeline import CancelReason, Pipeline, TriggerHandle
from pipeline.tasks import (
    EventType,
    RunningTask,
    StreamTask,
    TaskContext,
    TaskCoordinator,
    TaskEvent,
    TaskOverError,
    current_task,
)
from stages import map, stage


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator() as coordinator:
        yield coordinator


async def nothing() -> None:
    pass


@pytest.mark.abandons("task")
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
def test_an_exit_in_the_work_is_told_and_goes_through(error: BaseException) -> None:
    coordinator, running = TaskCoordinator(), list[RunningTask]()

    async def work() -> None:
        raise error

    async def main() -> None:
        running.append(coordinator.start_task(*KEY, work))
        await asyncio.Event().wait()

    with pytest.raises(type(error)):
        asyncio.run(main())
    assert types(asyncio.run(everything(coordinator))) == ["started", "error"]
    assert running[0].status().result["type"] == type(error).__name__  # type: ignore[index]


@pytest.mark.abandons("task")
def test_a_program_that_ends_without_a_shutdown_has_told_the_end_of_its_tasks() -> None:
    coordinator = TaskCoordinator()

    async def main() -> None:
        held = Held()
        coordinator.start_task(*KEY, held)
        await held.began.wait()

    asyncio.run(main())
    events = asyncio.run(everything(coordinator))
    assert types(events) == ["started", "cancelled"]
    assert events[-1].data["reasons"][0]["code"] == "task_cancelled"


async def test_a_task_may_cancel_itself(coordinator: TaskCoordinator) -> None:
    async def politely() -> None:
        assert await coordinator.cancel_task(*KEY, "myself")
        await asyncio.Event().wait()

    async def rudely() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.Event().wait()

    assert messages(await coordinator.start_task(*KEY, politely).wait()) == ["myself"]
    assert messages(await coordinator.start_task(*KEY, rudely).wait()) == ["the asyncio task was cancelled"]


async def test_a_cancel_in_the_last_line_of_the_work_is_in_time(coordinator: TaskCoordinator) -> None:
    async def work() -> str:
        running.cancel("at the last moment")
        return "all of it"

    running = coordinator.start_task(*KEY, work)
    end = await running.wait()
    assert (end.type, end.data["value"], messages(end)) == (EventType.CANCELLED, "all of it", ["at the last moment"])


async def test_a_group_whose_child_fails_is_an_error_and_no_cancellation(coordinator: TaskCoordinator) -> None:
    async def fail() -> None:
        raise LookupError("a child")

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await asyncio.Event().wait()

    end = await coordinator.start_task(*KEY, work).wait()
    assert (end.type, end.data["type"]) == (EventType.ERROR, "ExceptionGroup")
    assert "a child" in end.data["traceback"]


async def test_a_pipeline_inside_the_work_is_stopped_with_the_reason_of_the_task(coordinator: TaskCoordinator) -> None:
    entered = asyncio.Event()

    @stage
    async def wait(n: int) -> int:
        entered.set()
        await asyncio.Event().wait()
        return n

    pipeline = Pipeline([1]) >> wait
    running = coordinator.start_task(*KEY, pipeline.run)
    await entered.wait()
    running.cancel("wrong file", code="user")
    end = await running.wait()
    assert messages(end) == ["wrong file"]
    assert pipeline.report is not None
    assert pipeline.report.reasons[0].code == "user"


async def test_a_task_that_starts_a_task_is_another_one(coordinator: TaskCoordinator) -> None:
    async def inner() -> str:
        found = current_task()
        assert found is not None
        return found.key.id

    async def outer() -> list[str]:
        ids = [await coordinator.start_task("shop", "Import", "inner", inner).task]
        return [*ids, await inner()]

    assert await coordinator.start_task("shop", "Import", "outer", outer).task == ["inner", "outer"]


async def test_a_flood_of_cancels_is_bounded(coordinator: TaskCoordinator) -> None:
    held = Held()
    running = coordinator.start_task(*KEY, held)
    await held.began.wait()
    for n in range(5_000):
        assert await coordinator.cancel_task(*KEY, f"press {n}")
    end = await running.wait()
    assert messages(end) == [f"press {n}" for n in range(100)]
    assert held.interrupted == 1


async def test_what_the_work_has_left_running_can_tell_nothing_after_the_end(coordinator: TaskCoordinator) -> None:
    async def later(context: TaskContext) -> None:
        await go.wait()
        await context.item("too late")

    async def work(context: TaskContext) -> None:
        left.append(asyncio.create_task(later(context)))

    left: list[asyncio.Task[None]] = []
    go = asyncio.Event()
    await coordinator.start_task(*KEY, work).wait()
    coordinator.start_task(*KEY, nothing)
    go.set()
    with pytest.raises(TaskOverError):
        await left[0]
    assert types(await everything(coordinator)) == ["started", "completed"]


async def test_a_lambda_may_make_the_work(coordinator: TaskCoordinator) -> None:
    async def double(n: int) -> int:
        return 2 * n

    assert await coordinator.start_task(*KEY, lambda: double(4)).task == 8
    assert (await coordinator.start_task(*KEY, lambda: Pipeline([1]) >> map(abs)).wait()).data["delivered"] == 1  # type: ignore[arg-type, return-value]
    end = await coordinator.start_task(*KEY, lambda: 5).wait()  # type: ignore[arg-type, return-value]
    assert "has returned 5; make it `async def`" in end.data["message"]


async def test_an_async_generator_is_a_source_and_no_task(coordinator: TaskCoordinator) -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match=r"is an async generator, a source and no task: make it Pipeline\(numbers\)"):
        coordinator.start_task(*KEY, numbers)  # type: ignore[arg-type]


async def test_a_failed_item_whose_text_fails_does_not_spoil_the_report(
    coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            return str(len(self.args[7]))

    @stage
    def fail(n: int) -> int:
        raise BrokenError("x")

    events = []
    coordinator.start_task(*KEY, Pipeline([1, 2]) >> fail)
    events = await everything(coordinator)
    assert_well_told(events)
    assert events[-1].terminal


# --- triggers


class Bell:
    """A trigger that anybody may ring, from anywhere."""

    def __init__(self) -> None:
        self.callback: Any = None

    def check(self) -> None:
        return None

    def arm(self, callback: Any) -> TriggerHandle:
        self.callback = callback
        return TriggerHandle(self.undo)

    def undo(self) -> None:
        self.callback = None


async def test_a_trigger_may_fire_in_a_thread(coordinator: TaskCoordinator) -> None:
    held, bell = Held(), Bell()
    running = coordinator.start_task(*KEY, held, cancel_on=bell)
    await held.began.wait()
    thread = threading.Thread(target=bell.callback, args=(CancelReason("ring"),))
    thread.start()
    assert messages(await running.wait()) == ["ring"]
    thread.join()
    assert bell.callback is None


async def test_a_trigger_may_fire_while_it_is_armed(coordinator: TaskCoordinator) -> None:
    class AtOnce(Bell):
        def arm(self, callback: Any) -> TriggerHandle:
            callback(CancelReason("at once"))
            return TriggerHandle()

    held = Held()
    running = coordinator.start_task(*KEY, held, cancel_on=AtOnce())
    assert messages(await running.wait()) == ["at once"]
    assert not held.began.is_set()


async def test_a_trigger_that_gives_no_reason_is_told_so_itself(coordinator: TaskCoordinator) -> None:
    held, bell = Held(), Bell()
    running = coordinator.start_task(*KEY, held, cancel_on=bell)
    await held.began.wait()
    with pytest.raises(TypeError, match="a reason to stop is a CancelReason, not 'ring'"):
        bell.callback("ring")
    assert running.reasons == ()
    held.opened.set()
    assert (await running.wait()).type is EventType.COMPLETED


async def test_a_reason_of_any_length_is_told(coordinator: TaskCoordinator) -> None:
    client = all_of(coordinator)
    running = coordinator.start_task(*KEY, Held())
    running.cancel("\udc80\0" + "long" * 5_000_000)
    events = await client
    assert_well_told(events)
    assert events[-1].data["message"].startswith("?\ufffdlong")
    assert not coordinator.is_task_running(*KEY)


async def test_a_trigger_that_cannot_be_disarmed_changes_nothing(
    coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    class Sticky(Bell):
        def undo(self) -> None:
            raise OSError("it sticks")

    bells = [Bell(), Sticky(), Bell()]
    event = await coordinator.start_task(*KEY, nothing, cancel_on=bells).wait()
    assert event.type is EventType.COMPLETED
    assert [bell.callback for bell in bells if type(bell) is Bell] == [None, None]
    assert "a trigger could not be disarmed" in capsys.readouterr().err


# --- followers


async def test_a_follower_that_fails_is_his_own_affair(coordinator: TaskCoordinator) -> None:
    async def fail() -> None:
        async for _ in coordinator.subscribe(*KEY):
            raise LookupError("a follower")

    held = Held()
    coordinator.start_task(*KEY, held)
    failing, client = asyncio.create_task(fail()), all_of(coordinator)
    with pytest.raises(LookupError):
        await failing
    held.opened.set()
    assert types(await client) == ["started", "completed"]


async def test_a_follower_that_looks_with_a_timeout_misses_nothing(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        for n in range(300):
            await context.item(n)
            await asyncio.sleep(0.0002 * (n % 3))

    coordinator.start_task(*KEY, work)
    subscription, seen, late = coordinator.subscribe(*KEY), list[TaskEvent](), 0
    while not seen or not seen[-1].terminal:
        try:
            seen.append(await asyncio.wait_for(anext(subscription), 0.0002))
        except TimeoutError:
            late += 1
    assert_well_told(seen)
    assert len(seen) == 302
    assert late


async def test_a_follower_may_cancel_and_start_what_he_follows(coordinator: TaskCoordinator) -> None:
    held, ends = Held(), list[str]()
    coordinator.start_task(*KEY, held)
    async for event in coordinator.subscribe(*KEY):
        if event.type is EventType.STARTED:
            await coordinator.cancel_task(*KEY, "by the follower")
        if event.terminal:
            ends = types(await everything(coordinator))
            coordinator.start_task(*KEY, nothing)
    assert ends == ["started", "cancelled"]


# --- all at once


async def test_hundreds_of_tasks_are_shut_down_at_once() -> None:
    coordinator = TaskCoordinator(keep=5_000)
    held = [Held() for _ in range(150)]
    for n, work in enumerate(held):
        coordinator.start_task("shop", "coroutine", n, work)
        coordinator.start_task("shop", "pipeline", n, Pipeline(iter_for_ever) >> map(abs))
    clients = [all_of(coordinator, ("shop", kind, n)) for n in range(150) for kind in ("coroutine", "pipeline")]
    await turns(20)
    report = await coordinator.shutdown(timeout=20)
    assert (len(report.ended), report.stuck) == (300, ())
    for events in await asyncio.gather(*clients):
        assert events[-1].type is EventType.CANCELLED
        assert [event.terminal for event in events].count(True) == 1


async def iter_for_ever() -> AsyncIterator[int]:
    await asyncio.Event().wait()
    yield 1


async def test_a_log_that_fails_does_not_take_the_end_away(coordinator: TaskCoordinator) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("the log is full")

    async def fail() -> None:
        raise LookupError("nothing there")

    structlog.configure(processors=[broken])
    try:
        event = await coordinator.start_task(*KEY, fail).wait()
    finally:
        structlog.reset_defaults()
    assert (event.type, event.data["message"]) == (EventType.ERROR, "nothing there")


def test_on_uvloop_it_is_the_same() -> None:
    async def main() -> list[list[str]]:
        async with TaskCoordinator() as coordinator:
            held, told = Held(), list[list[str]]()
            running = coordinator.start_task(*KEY, held)
            client = all_of(coordinator)
            await held.began.wait()
            await asyncio.to_thread(running.cancel, "from a thread")
            told.append(types(await client))
            coordinator.start_task(*KEY, Pipeline(range(3)) >> map(abs), items=True)
            told.append(types(await everything(coordinator)))
            return told

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        first, second = runner.run(main())
    assert first == ["started", "cancelled"]
    assert second == ["started", "item", "item", "item", "progress", "completed"]


class Nothing(StreamTask):
    async def process(self) -> None:
        return None


async def test_a_class_without_a_process_cannot_be_started(coordinator: TaskCoordinator) -> None:
    with pytest.raises(TypeError, match="process"):
        coordinator.start_task(*KEY, type("Empty", (StreamTask,), {})())
    assert Nothing()
