"""Those who follow a task: slow, late, many, gone and back. Nobody misses the end, and everybody knows what he missed."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers import turns
from hypothesis import given, settings
from hypothesis import strategies as st
from tasking import KEY, Held, all_of, assert_well_told, everything, types

from pipeline.tasks import EventType, TaskContext, TaskCoordinator, TaskEvent, TaskKey, TaskOverError
from pipeline.tasks.log import HistorySubscription, RunHistory, TaskLog
from pipeline.testing import assert_no_leaks


@pytest.fixture
async def coordinator() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator() as coordinator:
        yield coordinator


def a_log() -> TaskLog:
    return TaskLog(TaskKey.of(*KEY))


async def drained(subscription: HistorySubscription) -> list[TaskEvent]:
    """What it gives without waiting."""
    return [event async for event in Ready(subscription)]


class Ready:
    """A subscription that ends where it would wait."""

    def __init__(self, subscription: HistorySubscription) -> None:
        self._subscription = subscription

    def __aiter__(self) -> Ready:
        return self

    async def __anext__(self) -> TaskEvent:
        step = self._subscription.__anext__()
        try:
            step.send(None)
        except StopIteration as given:
            return given.value
        step.close()
        raise StopAsyncIteration


# --- whatever the order of telling and reading


steps = st.lists(
    st.one_of(
        st.tuples(st.just("tell"), st.sampled_from(["progress", "item", "warning"]), st.integers(1, 3)),
        st.tuples(st.just("tell"), st.just("progress"), st.integers(90, 130)),
        st.tuples(st.just("read"), st.integers(0, 3), st.integers(1, 5)),
        st.tuples(st.just("join"), st.integers(1, 8), st.none() | st.integers(0, 200)),
        st.tuples(st.just("again"), st.just(0), st.just(0)),
        st.tuples(st.just("back"), st.integers(0, 3), st.integers(1, 300)),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(steps)
def test_whatever_the_order_everybody_sees_what_is_promised(steps: list[tuple[str, Any, Any]]) -> None:
    asyncio.run(follow(steps))


async def follow(steps: list[tuple[str, Any, Any]]) -> None:
    log = a_log()
    told: dict[int, TaskEvent] = {}
    history = log.begin()
    followers: list[Follower] = [Follower(log, told, None, 4)]

    def tell(type: EventType) -> None:
        event = history.publish(type, {})
        told[event.seq] = event

    for kind, one, other in steps:
        if kind == "tell":
            for _ in range(other):
                tell(EventType(one))
        elif kind == "join":
            followers.append(Follower(log, told, other, one))
        elif kind == "back":
            gone = followers[one % len(followers)]
            followers.append(Follower(log, told, gone.seen[-1].seq if gone.seen else None, other))
        elif kind == "read":
            await followers[one % len(followers)].read(other)
        else:
            tell(EventType.COMPLETED)
            history = log.begin()
    tell(EventType.COMPLETED)
    for follower in followers:
        await follower.read(10_000)
        follower.check_the_end()


class Follower:
    """One subscription, and what it has given, checked against what was told."""

    def __init__(self, log: TaskLog, told: dict[int, TaskEvent], last: int | None, buffer: int) -> None:
        self.subscription = HistorySubscription(log, last_event_id=last, buffer=buffer)
        self.seen: list[TaskEvent] = []
        self._told = told
        self._ended = False
        assert log.current is not None
        known = last is not None and last <= log.seq
        self._at = last if known else log.current.first - 1
        self._over = known and last == log.seq and log.current.terminal is not None

    async def read(self, most: int) -> None:
        reading = Ready(self.subscription)
        for _ in range(most):
            try:
                event = await reading.__anext__()
            except StopAsyncIteration:
                return
            self._check(event)

    def _check(self, event: TaskEvent) -> None:
        assert not self._ended
        assert self._at is not None
        assert event.seq > self._at
        assert event == self._told[event.seq]
        missed = [self._told[seq] for seq in range(self._at + 1, event.seq)]
        assert event.dropped == len(missed)
        if not self.seen:  # whoever comes back after two more runs finds the newest
            missed = [one for one in missed if one.seq > self._last_end(event.seq)]
        assert {one.type for one in missed} <= {EventType.PROGRESS}
        self.seen.append(event)
        self._at = event.seq
        self._ended = event.terminal

    def _last_end(self, before: int) -> int:
        return max((seq for seq, event in self._told.items() if seq < before and event.terminal), default=0)

    def check_the_end(self) -> None:
        assert self._ended != self._over
        assert [event.terminal for event in self.seen].count(True) == (not self._over)
        assert self.subscription.dropped == sum(event.dropped for event in self.seen)


# --- slow ones


async def test_a_slow_subscriber_loses_old_progress_and_is_told_how_much() -> None:
    log = a_log()
    history = log.begin()
    slow, quick = (HistorySubscription(log, last_event_id=None, buffer=n) for n in (5, 1_000))
    history.publish(EventType.STARTED, {})
    for n in range(50):
        history.publish(EventType.PROGRESS, {"done": n})
    history.publish(EventType.ITEM, {"item": 1})
    history.publish(EventType.CANCELLED, {})
    seen = await drained(slow)
    assert types(seen) == ["started", "progress", "progress", "progress", "item", "cancelled"]
    assert [event.data["done"] for event in seen if event.type is EventType.PROGRESS] == [47, 48, 49]
    assert [event.dropped for event in seen] == [0, 47, 0, 0, 0, 0]
    assert slow.dropped == 47
    assert len(await drained(quick)) == 53
    assert quick.dropped == 0


async def test_items_are_never_passed_over_while_there_is_room() -> None:
    log = a_log()
    history = log.begin()
    slow = HistorySubscription(log, last_event_id=None, buffer=1)
    for n in range(998):
        history.publish(EventType.ITEM, {"item": n})
        history.publish(EventType.PROGRESS, {"done": n})
    history.publish(EventType.COMPLETED, {})
    assert [event.data["item"] for event in await drained(slow) if event.type is EventType.ITEM] == list(range(998))


async def test_a_history_is_bounded_and_what_is_missing_is_told() -> None:
    log = a_log()
    history = log.begin()
    slow = HistorySubscription(log, last_event_id=None, buffer=1)
    history.publish(EventType.STARTED, {"about": 1})
    for n in range(5_000):
        history.publish(EventType.ITEM, {"item": n})
    history.publish(EventType.COMPLETED, {})
    seen = await drained(slow)
    assert len(seen) == 1_000
    assert [event.data["item"] for event in seen[:-1]] == list(range(4_001, 5_000))
    assert (seen[0].dropped, seen[-1].type) == (4_002, EventType.COMPLETED)
    assert history.newest[EventType.STARTED].data == {"about": 1}


async def test_a_history_is_bounded_in_bytes() -> None:
    history = RunHistory(TaskKey.of(*KEY), 1)
    for _ in range(40):
        history.publish(EventType.ITEM, {"item": "x" * 1_000_000})
        history.publish(EventType.PROGRESS, {"done": "x" * 1_000_000})
        assert history.bytes <= 16 << 20
    history.publish(EventType.COMPLETED, {"value": "x" * 1_000_000})
    log = a_log()
    log.current = history
    seen = await drained(HistorySubscription(log, last_event_id=0, buffer=256))
    assert types(seen) == ["item"] * 15 + ["completed"]


async def test_nothing_follows_the_end() -> None:
    history = a_log().begin()
    history.publish(EventType.COMPLETED, {})
    with pytest.raises(TaskOverError):
        history.publish(EventType.ITEM, {})


@pytest.mark.parametrize("options", [{"buffer": 0}, {"buffer": 1.5}, {"last_event_id": -1}, {"last_event_id": "5"}])
async def test_a_subscription_that_cannot_be_is_refused(coordinator: TaskCoordinator, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is a whole number"):
        coordinator.subscribe(*KEY, **options)


# --- late ones


async def test_who_comes_late_is_told_everything_that_is_kept(coordinator: TaskCoordinator) -> None:
    async def work(context: TaskContext) -> None:
        for n in range(3):
            await context.item(n)

    await coordinator.start_task(*KEY, work).wait()
    events = await everything(coordinator)
    assert types(events) == ["started", "item", "item", "item", "completed"]
    assert_well_told(events)


async def test_who_comes_back_goes_on_where_he_was(coordinator: TaskCoordinator) -> None:
    held = Held()
    coordinator.start_task(*KEY, held)
    await held.began.wait()
    assert held.context is not None
    for n in range(5):
        await held.context.item(n)
    async with coordinator.subscribe(*KEY) as first:
        seen = [await anext(first) for _ in range(3)]
    again = asyncio.create_task(everything(coordinator, last_event_id=seen[-1].seq))
    held.opened.set()
    events = seen + await again
    assert_well_told(events)
    assert types(events) == ["started", *["item"] * 5, "completed"]


async def test_who_holds_a_run_follows_that_one_though_the_key_was_started_again(coordinator: TaskCoordinator) -> None:
    runs = [coordinator.start_task(*KEY, nothing)]
    for _ in range(2):
        await runs[-1].wait()
        runs.append(coordinator.start_task(*KEY, nothing))
    assert [[event.seq async for event in running.subscribe()] for running in runs] == [[1, 2], [3, 4], [5, 6]]
    assert [event.seq async for event in runs[1].subscribe(last_event_id=3)] == [4]
    assert [event.seq async for event in runs[1].subscribe(last_event_id=1)] == [3, 4]


async def test_who_has_seen_the_end_is_told_nothing_more(coordinator: TaskCoordinator) -> None:
    end = await coordinator.start_task(*KEY, nothing).wait()
    assert await everything(coordinator, last_event_id=end.seq) == []


async def test_who_has_missed_the_end_of_an_earlier_run_is_told_that_first(coordinator: TaskCoordinator) -> None:
    first = await coordinator.start_task(*KEY, nothing).wait()
    second = await coordinator.start_task(*KEY, nothing).wait()
    assert await everything(coordinator, last_event_id=first.seq - 1) == [first]
    assert (await everything(coordinator, last_event_id=first.seq))[-1] == second
    assert (await everything(coordinator))[-1] == second
    third = await coordinator.start_task(*KEY, nothing).wait()
    late = await everything(coordinator, last_event_id=first.seq - 1)
    assert (late[-1], late[0].dropped) == (third, 3)


async def test_who_knows_of_events_that_never_were_begins_anew(coordinator: TaskCoordinator) -> None:
    await coordinator.start_task(*KEY, nothing).wait()
    assert types(await everything(coordinator, last_event_id=5_000)) == ["started", "completed"]


async def test_a_slow_follower_of_a_run_gets_its_end_though_the_next_one_runs(coordinator: TaskCoordinator) -> None:
    async def many(context: TaskContext) -> None:
        for n in range(3_000):
            await context.item(n)

    running = coordinator.start_task(*KEY, nothing)
    slow = coordinator.subscribe(*KEY)
    first = await running.wait()
    for _ in range(3):
        await coordinator.start_task(*KEY, many).wait()
    assert [event async for event in slow][-1] == first


async def nothing() -> None:
    pass


# --- leaving


async def test_leaving_leaves_nothing_behind(coordinator: TaskCoordinator) -> None:
    held = Held()
    running = coordinator.start_task(*KEY, held)
    await held.began.wait()
    history = running._history
    async with assert_no_leaks():
        clients = [all_of(coordinator) for _ in range(50)]
        while history.followers < 50:
            await asyncio.sleep(0)
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
        assert history.followers == 0
    subscription = coordinator.subscribe(*KEY)
    waiting = asyncio.create_task(everything_of(subscription))
    while not history.followers:
        await asyncio.sleep(0)
    await subscription.aclose()
    assert types(await waiting) == ["started"]
    assert history.followers == 0
    await subscription.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(subscription)


async def everything_of(subscription: Any) -> list[TaskEvent]:
    return [event async for event in subscription]


async def test_one_subscription_is_for_one_task(coordinator: TaskCoordinator) -> None:
    held = Held()
    coordinator.start_task(*KEY, held)
    await held.began.wait()
    subscription = coordinator.subscribe(*KEY)
    waiting = asyncio.create_task(everything_of(subscription))
    await turns()
    with pytest.raises(RuntimeError, match="two tasks wait in one subscription: give each its own"):
        await everything_of(subscription)
    held.opened.set()
    assert types(await waiting) == ["started", "completed"]


async def test_a_subscription_that_is_forgotten_is_no_burden(coordinator: TaskCoordinator) -> None:
    held = Held()
    running = coordinator.start_task(*KEY, held)
    await held.began.wait()
    for _ in range(100):
        subscription = coordinator.subscribe(*KEY)
        await anext(subscription)
    del subscription
    gc.collect()
    assert running._history.followers == 0


# --- many


async def test_ten_thousand_subscribers_are_all_told_the_end(coordinator: TaskCoordinator) -> None:
    held, number = Held(), 10_000
    running = coordinator.start_task(*KEY, held)
    await held.began.wait()
    clients = [asyncio.create_task(the_end(coordinator)) for _ in range(number)]
    while running._history.followers < number:
        await asyncio.sleep(0)
    assert held.context is not None
    await held.context.progress(1, 2)
    while running._history.followers < number:
        await asyncio.sleep(0)
    running.cancel("all of you")
    ends = await asyncio.gather(*clients)
    assert ends == [(await running.wait(), 3)] * number


async def the_end(coordinator: TaskCoordinator) -> tuple[TaskEvent | None, int]:
    last, number = None, 0
    async for event in coordinator.subscribe(*KEY):
        last, number = event, number + 1
    return last, number


async def test_leaving_costs_the_same_however_many_stay(coordinator: TaskCoordinator) -> None:
    """Counted in what is looked at: a set of those who wait, from which one is taken out."""
    held = Held()
    running = coordinator.start_task(*KEY, held)
    await held.began.wait()
    history, loop = running._history, asyncio.get_running_loop()
    looks = 0

    class Counted(asyncio.Future[None]):
        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            return id(self)

    for _ in range(5_000):
        history._waiters.add(Counted(loop=loop))
    client = all_of(coordinator)
    while history.followers <= 5_000:
        await asyncio.sleep(0)
    looks = 0
    client.cancel()
    await asyncio.wait([client])
    assert (history.followers, looks < 5) == (5_000, True)
