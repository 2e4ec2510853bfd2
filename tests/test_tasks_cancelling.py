"""Tasks that are stopped: by anybody, at any moment, for every reason, and by a shutdown in bounded time.

The rule kept here: whatever stops a task, and wherever it is, all who follow it get one terminal event, after its cleanup.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from helpers import turns
from tasking import KEY, Deaf, Held, assert_well_told, everything, messages, types

from pipeline import CancelReason, CancelType, EventTrigger, Pipeline, get_current_reasons
from pipeline.tasks import (
    EventType,
    RunningTask,
    StreamTask,
    TaskContext,
    TaskCoordinator,
    TaskEvent,
    TaskState,
)
from pipeline.testing import run_virtual
from pipeline.testing.stepping import SteppingLoop
from stages import batch, stage


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator(progress_interval=0.005) as coordinator:
        yield coordinator


async def nothing() -> None:
    pass


# --- reasons


async def test_every_reason_is_kept_in_order_and_the_first_is_the_message(coordinator: TaskCoordinator) -> None:
    work = Deaf()
    coordinator.start_task(*KEY, work)
    await work.began.wait()
    assert await coordinator.cancel_task(*KEY, "wrong file", code="user")
    assert await coordinator.cancel_task(*KEY, CancelReason("and too late", CancelType.EVENT))
    assert await coordinator.cancel_task(*KEY)
    await work.heard.wait()
    work.opened.set()
    event = (await everything(coordinator))[-1]
    assert event.data["message"] == "wrong file"
    assert messages(event) == ["wrong file", "and too late", "cancelled by hand"]
    assert [(reason["cancel_type"], reason["code"]) for reason in event.data["reasons"]] == [
        ("manual", "user"),
        ("event", None),
        ("manual", None),
    ]


async def test_a_reason_is_a_text_or_a_reason(coordinator: TaskCoordinator) -> None:
    running = coordinator.start_task(*KEY, Held())
    with pytest.raises(TypeError, match="a reason is a text or a CancelReason, not 5"):
        await coordinator.cancel_task(*KEY, 5)  # type: ignore[arg-type]
    assert running.reasons == ()


async def test_the_work_knows_why_it_is_stopped(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            seen.extend([context.reasons, get_current_reasons()])

    seen: list[tuple[CancelReason, ...]] = []
    began = asyncio.Event()
    running = coordinator.start_task(*KEY, work)
    await began.wait()
    reason = CancelReason("enough", code="user")
    running.cancel(reason)
    await running.wait()
    assert seen == [(reason,), (reason,)]


async def test_a_cancel_that_asyncio_brings_has_a_reason_of_its_own(coordinator: TaskCoordinator) -> None:
    work = Held()
    running = coordinator.start_task(*KEY, work)
    await work.began.wait()
    running.task.cancel("a message that nobody can rely on")
    event = await running.wait()
    assert event.type is EventType.CANCELLED
    assert [(reason["cancel_type"], reason["code"]) for reason in event.data["reasons"]] == [("manual", "task_cancelled")]


async def test_a_cancel_by_hand_and_one_by_asyncio_are_both_told(coordinator: TaskCoordinator) -> None:
    work = Held()
    running = coordinator.start_task(*KEY, work)
    await work.began.wait()
    running.cancel("by hand")
    running.task.cancel()
    assert messages(await running.wait()) == ["by hand", "the asyncio task was cancelled"]
    assert running.task.cancelled()


async def test_a_task_may_be_cancelled_from_a_thread(coordinator: TaskCoordinator) -> None:
    work = Held()
    running = coordinator.start_task(*KEY, work)
    await work.began.wait()
    thread = threading.Thread(target=running.cancel, args=("from a thread",))
    thread.start()
    assert messages(await running.wait()) == ["from a thread"]
    thread.join()
    assert running.cancel("too late") is False


async def test_a_trigger_stops_a_task(coordinator: TaskCoordinator) -> None:
    event, work = asyncio.Event(), Held()
    running = coordinator.start_task(*KEY, work, cancel_on=[EventTrigger(event, code="closing time")])
    await work.began.wait()
    event.set()
    assert (await running.wait()).data["reasons"][0]["code"] == "closing time"


async def test_a_trigger_that_fired_before_keeps_the_work_from_starting(coordinator: TaskCoordinator) -> None:
    event, work = asyncio.Event(), Held()
    event.set()
    running = coordinator.start_task(*KEY, work, cancel_on=EventTrigger(event))
    assert types(await everything(coordinator)) == ["cancelled"]
    assert not work.began.is_set()
    assert running.status().started is None


async def test_a_trigger_that_cannot_be_armed_is_the_end_of_the_task(coordinator: TaskCoordinator) -> None:
    class Broken:
        def check(self) -> None:
            return None

        def arm(self, callback: object) -> Any:
            raise OSError("no such device")

    event = await coordinator.start_task(*KEY, nothing, cancel_on=[Broken()]).wait()
    assert (event.type, event.data["message"]) == (EventType.ERROR, "no such device")


# --- time


def test_a_timeout_is_an_end_of_its_own() -> None:
    async def main() -> tuple[list[TaskEvent], TaskState]:
        async with TaskCoordinator() as coordinator:
            running = coordinator.start_task(*KEY, Held(), timeout=3600)
            return await everything(coordinator), running.status().state

    events, state = run_virtual(main())
    assert types(events) == ["started", "timed_out"]
    assert events[-1].data["message"] == "timed out after 3600s"
    assert events[-1].data["reasons"][0]["cancel_type"] == "timeout"
    assert state is TaskState.TIMED_OUT


def test_the_first_reason_decides_whether_it_has_timed_out() -> None:
    async def main() -> list[TaskEvent]:
        async with TaskCoordinator() as coordinator:
            work = Deaf()
            running = coordinator.start_task(*KEY, work, timeout=10)
            await work.began.wait()
            running.cancel("by hand")
            await asyncio.sleep(20)
            work.opened.set()
            return await everything(coordinator)

    events = run_virtual(main())
    assert types(events) == ["started", "cancelled"]
    assert messages(events[-1]) == ["by hand", "timed out after 10s"]


async def test_a_timeout_of_nothing_has_passed(coordinator: TaskCoordinator) -> None:
    assert (await coordinator.start_task(*KEY, nothing, timeout=0).wait()).type is EventType.TIMED_OUT


def test_one_timeout_is_for_a_coroutine_and_the_pipeline_that_it_makes() -> None:
    @stage
    async def slow(n: int) -> int:
        await asyncio.sleep(1)
        return n

    async def work() -> Pipeline[int]:
        await asyncio.sleep(5)
        return Pipeline(range(100)) >> slow

    async def main() -> TaskEvent:
        async with TaskCoordinator() as coordinator:
            return await coordinator.start_task(*KEY, work, timeout=10).wait()

    event = run_virtual(main())
    assert event.type is EventType.TIMED_OUT
    assert event.data["report"]["stages"][0]["succeeded"] == pytest.approx(5, abs=1)


# --- work that has its own idea of a cancellation


async def test_work_that_swallows_its_cancellation_and_returns_was_cancelled(coordinator: TaskCoordinator) -> None:
    async def work() -> str:
        try:
            began.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return "half of it"

    for stop in (RunningTask.cancel, lambda running: running.task.cancel()):
        began = asyncio.Event()
        running = coordinator.start_task(*KEY, work)
        await began.wait()
        stop(running)
        event = await running.wait()
        assert event.type is EventType.CANCELLED
        assert event.data["value"] == "half of it"
        await turns()
        assert running.task.cancelled()


async def test_a_cleanup_that_fails_is_told_in_the_cancelled_event_and_logged(
    coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            raise OSError("the disk is full")

    began = asyncio.Event()
    running = coordinator.start_task(*KEY, work)
    await began.wait()
    running.cancel("enough")
    event = await running.wait()
    assert event.type is EventType.CANCELLED
    assert event.data["error"]["message"] == "the disk is full"
    assert "task failed while it was stopping" in capsys.readouterr().err


async def test_a_cancelled_event_that_the_work_sends_becomes_a_part_of_the_one_at_the_end(coordinator: TaskCoordinator) -> None:
    class Fetch(StreamTask):
        async def process(self) -> None:
            try:
                began.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await self.send_event("cancelled", {"message": "Fetch cancelled", "url": "http://there"})
                raise

    began = asyncio.Event()
    running = coordinator.start_task(*KEY, Fetch())
    await began.wait()
    running.cancel("enough")
    events = await everything(coordinator)
    assert types(events) == ["started", "cancelled"]
    assert events[-1].data["message"] == "Fetch cancelled"
    assert events[-1].data["url"] == "http://there"
    assert messages(events[-1]) == ["enough"]


@pytest.mark.parametrize(
    ("said", "data", "expected"),
    [
        ("error", {"message": "no such host"}, {"message": "no such host"}),
        ("error", None, {"message": "the work says that it has failed"}),
        ("completed", {"value": 5}, {"value": 5}),
        ("cancelled", {"message": "nobody needs it"}, {"message": "nobody needs it"}),
        ("timed_out", {"message": "the host was too slow"}, {"message": "the host was too slow"}),
    ],
)
async def test_work_that_says_how_it_ended_and_returns_has_ended_so(
    coordinator: TaskCoordinator, said: str, data: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    async def work(context: TaskContext) -> str:
        await context.send_event(said, data)
        await context.progress(1)
        return "returned"

    running = coordinator.start_task(*KEY, work)
    events = await everything(coordinator)
    assert types(events) == ["started", "progress", said]
    assert {**events[-1].data, **expected} == events[-1].data
    assert running.status().state.value == said
    if said in ("cancelled", "timed_out"):
        assert messages(events[-1]) == [expected["message"]]


async def test_what_the_work_has_said_last_decides(coordinator: TaskCoordinator) -> None:
    class Task(StreamTask):
        async def process(self) -> None:
            await self.mark_failed("the first try", tries=1)
            await self.mark_completed("the second")

    event = await coordinator.start_task(*KEY, Task()).wait()
    assert event.type is EventType.COMPLETED
    assert event.data["value"] == "the second"


async def test_an_exception_outweighs_what_the_work_has_said(coordinator: TaskCoordinator) -> None:
    class Task(StreamTask):
        async def process(self) -> None:
            await self.mark_completed("too early")
            raise LookupError("nothing there")

    event = await coordinator.start_task(*KEY, Task()).wait()
    assert (event.type, event.data["message"]) == (EventType.ERROR, "nothing there")


async def test_a_cancellation_that_comes_out_of_the_work_itself_is_one(coordinator: TaskCoordinator) -> None:
    async def work() -> None:
        other = asyncio.get_running_loop().create_future()
        other.cancel()
        await other

    event = await coordinator.start_task(*KEY, work).wait()
    assert event.type is EventType.CANCELLED
    assert event.data["reasons"][0]["code"] == "task_cancelled"


async def test_work_that_uses_timeouts_and_groups_is_stopped_in_the_midst_of_them(coordinator: TaskCoordinator) -> None:
    async def work() -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait())
            began.set()
            await asyncio.Event().wait()

    began = asyncio.Event()
    running = coordinator.start_task(*KEY, work)
    await began.wait()
    running.cancel("enough")
    assert messages(await running.wait()) == ["enough"]


async def test_a_timeout_of_the_work_itself_is_its_failure(coordinator: TaskCoordinator) -> None:
    async def work() -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    event = await coordinator.start_task(*KEY, work).wait()
    assert (event.type, event.data["type"]) == (EventType.ERROR, "TimeoutError")


# --- at every moment


Scene = Callable[[TaskCoordinator], RunningTask]


async def waiting(context: TaskContext) -> str:
    for n in range(3):
        await context.progress(n)
        await asyncio.sleep(1)
    return "done"


async def cleaning(context: TaskContext) -> str:
    try:
        return await waiting(context)
    finally:
        await asyncio.sleep(1)
        await context.warning("cleaned up")


async def swallowing(context: TaskContext) -> str:
    try:
        return await waiting(context)
    except asyncio.CancelledError:
        await asyncio.sleep(1)
        return "swallowed"


async def failing(context: TaskContext) -> str:
    try:
        return await waiting(context)
    finally:
        await asyncio.sleep(1)
        raise LookupError("in the end")


async def telling(context: TaskContext) -> str:
    try:
        return await waiting(context)
    except asyncio.CancelledError:
        await context.send_event("cancelled", {"message": "as I say"})
        raise


async def making() -> Pipeline[Any]:
    await asyncio.sleep(1)
    return slow_pipeline()


def slow_pipeline() -> Pipeline[Any]:
    @stage(concurrency=2)
    async def slow(n: int) -> int:
        await asyncio.sleep(1)
        return n

    return Pipeline(range(4)) >> slow >> batch(2)


def start(work: Any, **options: Any) -> Scene:
    return lambda coordinator: coordinator.start_task(*KEY, work, **options)


SCENES: dict[str, Callable[[], Scene]] = {
    "waiting": lambda: start(waiting),
    "cleaning": lambda: start(cleaning),
    "swallowing": lambda: start(swallowing),
    "failing": lambda: start(failing),
    "telling": lambda: start(telling),
    "a pipeline": lambda: start(slow_pipeline()),
    "a pipeline with its items": lambda: start(slow_pipeline(), items=True),
    "a pipeline made by a coroutine": lambda: start(making),
}
STOPS: dict[str, Callable[[RunningTask], object]] = {
    "cancel": lambda running: running.cancel("explored", code="explored"),
    "asyncio": lambda running: running.task.cancel(),
    "both": lambda running: (running.cancel("explored", code="explored"), running.task.cancel()),
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("scene", SCENES)
def test_a_task_that_is_stopped_at_any_step_has_one_end(scene: str, stop: str) -> None:
    step = 0
    while end := stopped_at(step, SCENES[scene](), stop):
        assert end.type is EventType.CANCELLED
        step += 1
    assert step > 8


def stopped_at(step: int, scene: Scene, stop: str) -> TaskEvent | None:
    """Play it with a stop before that step, and give its end; None when it was over by then."""
    loops: list[SteppingLoop] = []
    hit: list[object] = []

    def new_loop() -> SteppingLoop:
        loops.append(SteppingLoop(seed=0, limit=5, most_steps=5_000))
        return loops[0]

    async def play() -> tuple[RunningTask, list[TaskEvent]]:
        def before_step(number: int, _: asyncio.Handle) -> None:
            if number == step and not running.over:
                hit.append(STOPS[stop](running))

        async with TaskCoordinator(progress_interval=0.4) as coordinator:
            running = scene(coordinator)
            loops[0].before_step = before_step
            one, other = await asyncio.gather(everything(coordinator), everything(coordinator))
            await asyncio.wait([running.task])
            loops[0].before_step = None
            assert one == other
            assert not coordinator.is_task_running(*KEY)
        return running, one

    with asyncio.Runner(loop_factory=new_loop) as runner:
        running, events = runner.run(play())
    assert_well_told(events)
    end = events[-1]
    assert running.status().state.value == end.type.value
    assert running.task.cancelled() == (end.type is EventType.CANCELLED)
    if not hit:
        return None
    expected = {"cancel": ["explored"], "asyncio": ["task_cancelled"], "both": ["explored", "task_cancelled"]}[stop]
    assert [reason["code"] for reason in end.data["reasons"]] == expected
    return end
