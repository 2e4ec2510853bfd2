"""One attempt at a task by itself, as a worker of a database runs it: it only ever returns how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from tasking import KEY, Held

from pipeline import CancelReason, CancelType, Pipeline
from pipeline.tasks import EventType, Execution, TaskContext, TaskEnd, TaskKey, TaskOverError
from pipeline.testing import run_virtual
from stages import map, stage


class Journal:
    """The owner of a context: keeps what is told and saved, and may fail."""

    def __init__(self, **options: Any) -> None:
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.kept: list[Any] = []
        self.failing: set[EventType] = set()
        self.context = TaskContext(TaskKey.of(*KEY), publish=self.publish, keep=self.keep, **options)

    async def publish(self, type: EventType, data: Mapping[str, Any]) -> None:
        await asyncio.sleep(0)
        if type in self.failing:
            raise OSError("the database is away")
        self.told.append((type.value, data))

    async def keep(self, state: Any) -> None:
        self.kept.append(state)

    @property
    def types(self) -> list[str]:
        return [type for type, _ in self.told]


async def nothing() -> None:
    pass


async def test_an_attempt_knows_what_earlier_ones_have_saved() -> None:
    async def work(context: TaskContext) -> list[Any]:
        await context.save({"at": 5})
        return [context.attempt, context.saved, dict(context.payload)]

    journal = Journal(attempt=2, saved={"at": 3}, payload={"path": "a"})
    end = await Execution(work, journal.context).run()
    assert end.data == {"value": [2, {"at": 3}, {"path": "a"}]}
    assert journal.kept == [{"at": 5}]
    assert journal.types == ["started"]


async def test_the_end_is_returned_and_not_told() -> None:
    journal = Journal()
    end = await Execution(nothing, journal.context).run()
    assert end == TaskEnd(EventType.COMPLETED, {})
    assert end.conclude() is None
    assert journal.types == ["started"]


async def test_a_cancellation_by_asyncio_is_returned_as_an_end_and_concluded_as_one() -> None:
    journal, held = Journal(), Held()
    attempt = asyncio.create_task(Execution(held, journal.context).run())
    await held.began.wait()
    attempt.cancel()
    end = await attempt
    assert end.type is EventType.CANCELLED
    with pytest.raises(asyncio.CancelledError):
        end.conclude()


async def test_an_error_is_returned_as_an_end_and_concluded_as_one() -> None:
    async def fail() -> None:
        raise LookupError("nothing there")

    end = await Execution(fail, Journal().context).run()
    assert end.type is EventType.ERROR
    with pytest.raises(LookupError):
        end.conclude()


async def test_what_is_cancelled_before_it_runs_does_not_begin() -> None:
    journal, held = Journal(), Held()
    execution = Execution(held, journal.context)
    execution.cancel(CancelReason("superseded", code="superseded"))
    end = await execution.run()
    assert (end.type, journal.told, held.began.is_set()) == (EventType.CANCELLED, [], False)


async def test_a_cancel_while_the_start_is_told_keeps_the_work_from_beginning() -> None:
    class Cancelling(Journal):
        async def publish(self, type: EventType, data: Mapping[str, Any]) -> None:
            await super().publish(type, data)
            execution.cancel(CancelReason("just now"))

    for work in (held := Held(), pipeline := Pipeline([1]) >> map(abs)):
        execution = Execution(work, Cancelling().context)
        assert (await execution.run()).data["message"] == "just now"
    assert not held.began.is_set()
    assert await pipeline.collect() == [1]


async def test_nothing_is_heard_after_the_end() -> None:
    execution = Execution(nothing, Journal().context)
    await execution.run()
    execution.cancel(CancelReason("too late"))
    await asyncio.to_thread(execution.cancel, CancelReason("too late"))
    await asyncio.sleep(0)
    assert execution.reasons == ()


async def test_an_attempt_is_made_once() -> None:
    execution = Execution(nothing, Journal().context)
    await execution.run()
    with pytest.raises(RuntimeError, match="was run before: make an Execution for each"):
        await execution.run()


async def test_an_end_without_a_run_can_be_asked_for() -> None:
    never = Execution(nothing, Journal().context)
    assert never.end_of(asyncio.CancelledError()).data["reasons"][0]["code"] == "task_cancelled"
    stopped = Execution(nothing, Journal().context)
    stopped.cancel(CancelReason("time is up", CancelType.TIMEOUT))
    assert stopped.end_of(None).type is EventType.TIMED_OUT
    assert Execution(nothing, Journal().context).end_of(LookupError("broken")).data["message"] == "broken"


async def test_a_start_that_cannot_be_told_is_the_end() -> None:
    journal, held = Journal(), Held()
    journal.failing.add(EventType.STARTED)
    end = await Execution(held, journal.context).run()
    assert (end.type, end.data["message"], held.began.is_set()) == (EventType.ERROR, "the database is away", False)


def test_progress_that_cannot_be_told_does_not_stop_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    @stage
    async def slow(n: int) -> int:
        await asyncio.sleep(1)
        return n

    async def main() -> tuple[TaskEnd, list[str]]:
        journal = Journal()
        journal.failing.add(EventType.PROGRESS)
        execution = Execution(Pipeline(range(20)) >> slow, journal.context, progress_interval=0.5)
        return await execution.run(), journal.types

    end, types = run_virtual(main())
    assert (end.type, end.data["delivered"], types) == (EventType.COMPLETED, 20, ["started"])
    assert "progress could not be told" in capsys.readouterr().err


async def test_an_item_that_cannot_be_told_is_the_end_of_the_run() -> None:
    journal = Journal()
    journal.failing.add(EventType.ITEM)
    pipeline = Pipeline(range(20)) >> map(abs)
    end = await Execution(pipeline, journal.context, items=True).run()
    assert (end.type, end.data["message"]) == (EventType.ERROR, "the database is away")
    assert pipeline.report is not None
    assert pipeline.report.balanced


async def test_a_cancel_after_the_run_decides_and_does_not_reach_the_next_one_of_the_same_pipeline() -> None:
    class Late(Journal):
        async def publish(self, type: EventType, data: Mapping[str, Any]) -> None:
            if type is EventType.PROGRESS and data["state"] == "closed":
                pipeline.gen([3, 4])
                execution.cancel(CancelReason("too late"))

    pipeline = Pipeline([1, 2]) >> map(abs)
    execution = Execution(pipeline, Late().context)
    end = await execution.run()
    assert (end.type, end.data["message"]) == (EventType.CANCELLED, "too late")
    assert end.data["report"]["outcome"] == "completed"
    assert await pipeline.collect() == [3, 4]


async def test_what_its_owner_gives_up_is_told_so() -> None:
    journal, held = Journal(), Held()
    attempt = asyncio.create_task(Execution(held, journal.context).run())
    await held.began.wait()
    journal.context.close()
    for telling in (journal.context.progress(1), journal.context.save({}), journal.context.send_event("completed")):
        with pytest.raises(TaskOverError):
            await telling
    attempt.cancel()
    await attempt


@pytest.mark.parametrize("interval", [0, -1, True, "soon"])
async def test_an_interval_that_is_none_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match="progress_interval is a number of seconds, more than 0"):
        Execution(nothing, Journal().context, progress_interval=interval)
