"""What a task tells: JSON, copied and bounded; from coroutines, other loops and threads; and nothing after its end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections import deque, namedtuple
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasking import KEY, all_of, assert_well_told, everything, types

from pipeline import CancelReason
from pipeline.tasks import EventType, TaskContext, TaskCoordinator, TaskEvent, TaskKey, TaskOverError
from pipeline.tasks.data import MAX_BYTES, about_error, plain, readable


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator() as coordinator:
        yield coordinator


async def told(coordinator: TaskCoordinator, work: Callable[[TaskContext], Any]) -> list[TaskEvent]:
    """What work tells between its start and its end."""
    coordinator.start_task(*KEY, work)
    events = await everything(coordinator)
    assert_well_told(events)
    return events[1:-1]


# --- telling


async def test_every_kind_of_event_has_a_method(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        await context.progress(3, 10, message="reading", file="a.txt")
        await context.progress()
        await context.item([1, 2], page=4)
        await context.warning("slow", host="there")
        await context.send_event(EventType.WARNING)
        await context.send_event("start", {"url": "x"})

    events = await told(coordinator, work)
    assert [(event.type.value, event.data) for event in events] == [
        ("progress", {"done": 3, "total": 10, "message": "reading", "file": "a.txt"}),
        ("progress", {}),
        ("item", {"item": [1, 2], "page": 4}),
        ("warning", {"message": "slow", "host": "there"}),
        ("warning", {}),
        ("started", {"url": "x"}),
    ]
    assert all(event.task == TaskKey("shop", "Import", "7") for event in events)


@pytest.mark.parametrize(
    ("type", "data", "kind", "text"),
    [
        ("finished", {}, ValueError, "there are no events 'finished'; there are started, progress"),
        ("item", [1], TypeError, "the data of an event is a dict"),
        ("item", {"a": object()}, TypeError, "the data of this 'item' event must be JSON: object is no type of JSON; send numbers"),
        ("item", {"a": {(1, 2): 3}}, TypeError, "must be JSON: keys must be str"),
        ("item", {"a": dict}, TypeError, "is a class"),
        ("item", {"a": b"bytes"}, TypeError, "bytes is no type of JSON"),
        ("item", {"a": "x" * MAX_BYTES}, ValueError, "takes 1,048,58\\d bytes as JSON, and 1,048,576 is the most: send a part"),
        ("completed", {"a": 10**5000}, ValueError, "cannot be made JSON"),
    ],
)
async def test_what_cannot_be_told_is_an_error_where_it_is_sent(
    coordinator: TaskCoordinator, type: str, data: Any, kind: type[Exception], text: str
) -> None:
    async def work(context: TaskContext) -> None:
        with pytest.raises(kind, match=text):
            await context.send_event(type, data)

    assert await told(coordinator, work) == []


async def test_a_circle_cannot_be_told(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        circle: dict[str, Any] = {}
        circle["self"] = circle
        with pytest.raises(ValueError, match=r"more than 1,048,576 bytes .*does it contain itself\?"):
            await context.send_event("item", circle)

    assert await told(coordinator, work) == []


async def test_data_is_copied_when_it_is_sent(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        mine = {"rows": [1]}
        await context.send_event("item", mine)
        mine["rows"].append(2)

    assert (await told(coordinator, work))[0].data == {"rows": [1]}


@dataclasses.dataclass(slots=True)
class Point:
    x: int
    y: set[int]


class Colour(Enum):
    RED = "red"


Pair = namedtuple("Pair", "one other")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Point(1, {2}), {"x": 1, "y": [2]}),
        (Colour.RED, "red"),
        (Pair(1, 2), [1, 2]),
        (datetime(2026, 5, 1, 12, tzinfo=UTC), "2026-05-01T12:00:00+00:00"),
        (date(2026, 5, 1), "2026-05-01"),
        (Path("a") / "b", "a/b"),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Decimal("1.10"), "1.10"),
        (Fraction(1, 3), "1/3"),
        (np.float64(1.5), 1.5),
        (np.int32(7), 7),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (CancelReason("why", at=1.0), CancelReason("why", at=1.0).to_dict()),
        (math.nan, None),
        ([math.inf, -math.inf, 1.0], [None, None, 1.0]),
        ("half \udcff a character", "half ? a character"),
        ("a\0b and a backslash \\0 and \\u0000", "a\ufffdb and a backslash \\0 and \\u0000"),
        ({1: "a", None: "b", False: "c"}, {"1": "a", "null": "b", "false": "c"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_does_not_know_is_told_in_the_nearest_way(value: Any, expected: Any) -> None:
    assert plain({"value": value}, "it") == {"value": expected} == readable({"value": value})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(object()) | st.characters(categories=["Cs"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text() | st.tuples(st.integers()), inner, max_size=4)
    | st.tuples(inner)
    | st.builds(deque, st.lists(inner, max_size=3)),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(anything)
def test_whatever_it_is_it_becomes_readable_json_that_stays_as_it_is(value: Any) -> None:
    copy = readable(value)
    encoded = json.dumps(copy, allow_nan=False, ensure_ascii=False).encode()
    assert json.loads(encoded) == copy
    assert b"\\u0000" not in encoded.replace(b"\\\\", b"")
    assert readable(copy) == copy == plain(copy, "it")


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def to_dict(self) -> Any:
        raise RuntimeError("no dict")

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Lazy(dict[str, Any]):
    """A dict whose contents are somewhere else."""

    def values(self) -> Any:
        raise ConnectionError("not there")

    items = values


class Unmeasured(str):
    def __len__(self) -> int:
        raise RuntimeError("no length")


def test_readable_never_fails() -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (Hostile(), Lazy(a=1), [Lazy(a=1)], Unmeasured("x"), circle, deep, {Hostile(): 1}, 10**6000, {"a": "x" * 3_000_000}, [["y" * 900] * 100] * 10_000, "z" * 2_000_000, np.zeros(10**6), list(range(10**6))):
        assert len(json.dumps(readable(value))) <= MAX_BYTES


def test_an_error_is_told_whatever_its_text_is() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def deeper(n: int) -> None:
        if n:
            deeper(n - 1)
        raise BrokenError

    with pytest.raises(BrokenError) as caught:
        deeper(500)
    told = about_error(caught.value)
    assert told["message"] == "<exception str() failed>"
    assert told["type"].endswith("BrokenError")
    assert len(told["traceback"]) <= 8_000
    assert about_error(KeyError())["message"] == "KeyError"


def test_an_error_that_cannot_be_formatted_is_told_by_its_repr() -> None:
    error = SyntaxError("bad template", ("page.html", 1, 1, "{%"))
    error.text = b"{%"  # type: ignore[assignment]  # as some parsers do
    told = about_error(error)
    assert (told["type"], "bad template" in told["message"]) == ("SyntaxError", True)


@pytest.mark.parametrize("value", [Hostile(), b"raw", [object()], "x" * 5_000_000, Point(1, {2})])
async def test_a_value_that_is_no_json_ends_a_task_as_any_other(coordinator: TaskCoordinator, value: Any) -> None:
    async def work() -> Any:
        return value

    running = coordinator.start_task(*KEY, work)
    event = await running.wait()
    assert event.type is EventType.COMPLETED
    assert await running.task is value
    assert len(json.dumps(event.data)) < MAX_BYTES


async def test_an_error_whose_text_fails_ends_a_task_as_any_other(
    coordinator: TaskCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    async def work() -> None:
        raise BrokenError

    event = await coordinator.start_task(*KEY, work).wait()
    assert (event.type, event.data["message"]) == (EventType.ERROR, "<exception str() failed>")
    assert "task failed" in capsys.readouterr().err


# --- other threads, other loops


async def test_a_thread_tells_and_waits_until_it_is_told(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        await asyncio.to_thread(tell, context)

    def tell(context: TaskContext) -> None:
        for n in range(3):
            context.send_event_threadsafe("item", {"n": n})
            context.send_event_threadsafe("warning", {"message": "from a thread"})

    events = await told(coordinator, work)
    assert [event.data.get("n") for event in events] == [0, None, 1, None, 2, None]


async def test_a_thread_with_a_loop_of_its_own_tells_as_everybody(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        await asyncio.to_thread(asyncio.run, context.progress(1, 2))

    assert types(await told(coordinator, work)) == ["progress"]


async def test_what_a_thread_cannot_tell_is_an_error_there(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        with pytest.raises(TypeError, match="must be JSON"):
            await asyncio.to_thread(context.send_event_threadsafe, "item", {"a": object()})
        with pytest.raises(RuntimeError, match=r"would wait for itself: await send_event\(\) instead"):
            context.send_event_threadsafe("item", {})

    assert await told(coordinator, work) == []


async def test_a_thread_that_outlives_its_task_is_told_so(coordinator: TaskCoordinator) -> None:
    contexts: list[TaskContext] = []

    async def work(context: TaskContext) -> None:
        contexts.append(context)

    await coordinator.start_task(*KEY, work).wait()
    with pytest.raises(TaskOverError, match="is over, and nothing more can be told about it"):
        await asyncio.to_thread(contexts[0].send_event_threadsafe, "item", {})
    with pytest.raises(TaskOverError):
        await contexts[0].progress(1)
    with pytest.raises(TaskOverError):
        await contexts[0].save({})


def test_a_thread_that_outlives_its_loop_is_told_so() -> None:
    contexts: list[TaskContext] = []

    async def work(context: TaskContext) -> None:
        contexts.append(context)

    async def main() -> None:
        await TaskCoordinator().start_task(*KEY, work).wait()

    asyncio.run(main())
    with pytest.raises(TaskOverError):
        contexts[0].send_event_threadsafe("item", {})


async def test_nothing_can_be_told_from_a_thread_before_the_start() -> None:
    async def publish(*_: object) -> None:
        pass

    context = TaskContext(TaskKey.of(*KEY), publish=publish)
    with pytest.raises(RuntimeError, match="has not begun"):
        context.send_event_threadsafe("item", {})


# --- saving


async def test_a_state_is_kept_as_it_was(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        assert (context.saved, context.attempt, dict(context.payload)) == (None, 1, {})
        state = {"at": [1]}
        await context.save(state)
        state["at"].append(2)
        with pytest.raises(TypeError, match="the state to save must be JSON"):
            await context.save(object())

    running = coordinator.start_task(*KEY, work)
    assert (await running.wait()).type is EventType.COMPLETED
    assert running.saved == {"at": [1]}


# --- fairness


async def test_work_that_only_tells_leaves_the_loop_to_others(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        for n in range(20_000):
            await context.progress(n)
            if context.reasons:
                break
        else:
            raise AssertionError("nobody else had a turn")

    running = coordinator.start_task(*KEY, work)
    client = all_of(coordinator)
    while (running.status().progress or {}).get("done", 0) < 100:
        await asyncio.sleep(0)
    running.cancel("seen enough")
    events = await client
    assert events[-1].type is EventType.CANCELLED
    assert len(events) > 20


# --- events


def test_an_event_survives_the_wire() -> None:
    event = TaskEvent(TaskKey("a", "b", "c"), 3, EventType.ITEM, {"item": 1}, at=5.0, dropped=2)
    assert TaskEvent.from_dict(json.loads(json.dumps(event.to_dict()))) == event
    assert event.after(0) is event
    assert event.after(4).dropped == 4
