"""Triggers one by one: what `check` says, when `arm` calls back, and that `disarm` leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from helpers import Heard, turns

from pipeline import Pipeline, RunReport
from pipeline.cancellation import (
    CancelReason,
    CancelType,
    DeadlineTrigger,
    EndTrigger,
    EventTrigger,
    Fence,
    MemoryTrigger,
    SignalTrigger,
    TimeoutTrigger,
    Trigger,
    TriggerHandle,
)
from stages import tap

USR1 = signal.SIGUSR1


class CountedEvent(asyncio.Event):
    """Knows by public means how many wait for it."""

    waiting = 0

    async def wait(self) -> Any:
        self.waiting += 1
        try:
            return await super().wait()
        finally:
            self.waiting -= 1


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[asyncio.TimerHandle]]:
    """The timers of this test that are neither cancelled nor due; call it inside the test."""
    made: list[asyncio.TimerHandle] = []
    original = asyncio.BaseEventLoop.call_at

    def call_at(self: Any, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = original(self, when, callback, *args, context=context)
        made.append(handle)
        return handle

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_at", call_at)
    return lambda: [t for t in made if not t.cancelled() and t.when() > asyncio.get_running_loop().time()]


# --- the contract


def test_a_handle_calls_its_undo_once_however_often_it_is_disarmed() -> None:
    undone: list[str] = []
    handle = TriggerHandle(lambda: undone.append("undone"))
    handle.disarm()
    handle.disarm()
    assert undone == ["undone"]


def test_a_handle_without_an_undo_can_be_disarmed() -> None:
    TriggerHandle().disarm()


def test_any_object_with_check_and_arm_is_a_trigger() -> None:
    class Own:
        def check(self) -> CancelReason | None:
            return None

        def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
            return TriggerHandle()

    assert isinstance(Own(), Trigger)
    assert not isinstance(asyncio.Event, Trigger)


@pytest.mark.parametrize(
    "trigger", [TimeoutTrigger(1), EventTrigger(asyncio.Event()), SignalTrigger(USR1)], ids=["timeout", "event", "signal"]
)
def test_the_triggers_are_triggers_and_cannot_be_armed_without_a_loop(trigger: Trigger) -> None:
    assert isinstance(trigger, Trigger)
    with pytest.raises(RuntimeError, match="no running event loop"):
        trigger.arm(lambda reason: None)


# --- timeout


def test_a_delay_of_zero_has_fired_already_and_a_longer_one_has_not() -> None:
    reason = TimeoutTrigger(0, code="budget").check()
    assert reason == CancelReason("timed out after 0s", CancelType.TIMEOUT, "budget")
    assert TimeoutTrigger(0.1).check() is None


@pytest.mark.asyncio
async def test_a_timeout_calls_back_when_its_delay_is_over(timers: Callable[[], list[Any]]) -> None:
    heard = Heard()
    handle = TimeoutTrigger(0.001, code="budget").arm(heard)
    assert await heard.next() == CancelReason("timed out after 0.001s", CancelType.TIMEOUT, "budget")
    handle.disarm()
    assert len(heard.reasons) == 1
    assert timers() == []


@pytest.mark.asyncio
async def test_a_reason_carries_the_time_at_which_it_came_about() -> None:
    heard = Heard()
    TimeoutTrigger(0.01).arm(heard)
    EventTrigger(armed := asyncio.Event()).arm(heard)
    armed.set()
    await heard.next()
    await heard.next()
    event, timeout = heard.reasons
    assert timeout.at > event.at


@pytest.mark.asyncio
async def test_disarming_a_timeout_cancels_its_timer(timers: Callable[[], list[Any]]) -> None:
    handle = TimeoutTrigger(60).arm(lambda reason: None)
    assert len(timers()) == 1
    handle.disarm()
    handle.disarm()
    assert timers() == []


@pytest.mark.asyncio
async def test_an_infinite_delay_needs_no_timer_and_never_fires(timers: Callable[[], list[Any]]) -> None:
    trigger = TimeoutTrigger(math.inf)
    handle = trigger.arm(lambda reason: None)
    assert trigger.check() is None
    assert timers() == []
    handle.disarm()


@pytest.mark.asyncio
async def test_one_timeout_can_be_armed_many_times_at_once() -> None:
    trigger, kept, disarmed = TimeoutTrigger(0.001), Heard(), Heard()
    trigger.arm(kept)
    trigger.arm(disarmed).disarm()
    await kept.next()
    assert disarmed.reasons == []


@pytest.mark.parametrize("delay", ["1", None, True, 1j])
def test_a_delay_that_is_no_number_is_a_type_error(delay: Any) -> None:
    with pytest.raises(TypeError, match="needs a number of seconds"):
        TimeoutTrigger(delay)


@pytest.mark.parametrize("delay", [0, -0.001, -1, -math.inf])
async def test_a_budget_that_is_used_up_has_fired_already(delay: float) -> None:
    trigger, heard = TimeoutTrigger(delay), Heard()
    assert trigger.check() is not None
    trigger.arm(heard)  # by somebody who does not look first
    await heard.next()


def test_a_meaningless_delay_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="number of seconds"):
        TimeoutTrigger(math.nan)


def test_a_trigger_cannot_be_changed_after_its_check_on_creation() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TimeoutTrigger(1).delay = -1  # type: ignore[misc]


# --- event


@pytest.mark.asyncio
async def test_an_event_trigger_calls_back_once_when_the_event_is_set() -> None:
    event, heard = CountedEvent(), Heard()
    trigger = EventTrigger(event, code="shutdown")
    assert trigger.check() is None
    trigger.arm(heard)
    event.set()
    assert await heard.next() == CancelReason("event 'shutdown' set", CancelType.EVENT, "shutdown") == trigger.check()
    event.clear()
    event.set()
    await turns()
    assert len(heard.reasons) == 1
    assert event.waiting == 0


@pytest.mark.asyncio
async def test_an_event_calls_back_before_a_task_that_yielded_after_the_set() -> None:
    event, heard = asyncio.Event(), Heard()
    EventTrigger(event).arm(heard)
    event.set()
    await asyncio.sleep(0)
    assert len(heard.reasons) == 1


@pytest.mark.asyncio
async def test_an_event_that_is_cleared_at_once_was_set_all_the_same() -> None:
    event, heard = asyncio.Event(), Heard()
    EventTrigger(event).arm(heard)
    event.set()
    event.clear()
    await heard.next()


@pytest.mark.asyncio
async def test_arming_on_an_event_already_set_calls_back_soon_and_not_inside_arm() -> None:
    event, heard, disarmed = asyncio.Event(), Heard(), Heard()
    event.set()
    EventTrigger(event).arm(heard)
    EventTrigger(event).arm(disarmed).disarm()
    assert heard.reasons == []
    await heard.next()
    assert disarmed.reasons == []


@pytest.mark.asyncio
async def test_disarming_takes_the_waiter_out_of_the_event_at_once_and_needs_no_task() -> None:
    event = CountedEvent()
    handle = EventTrigger(event).arm(lambda reason: None)
    assert event.waiting == 1
    assert len(asyncio.all_tasks()) == 1
    handle.disarm()
    handle.disarm()
    assert event.waiting == 0


@pytest.mark.asyncio
async def test_disarming_between_the_set_and_the_callback_prevents_the_callback() -> None:
    event, heard, failures = asyncio.Event(), Heard(), []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
    handle = EventTrigger(event).arm(heard)
    event.set()
    handle.disarm()
    await turns()
    assert heard.reasons == failures == []


@pytest.mark.asyncio
async def test_an_event_class_of_ones_own_may_wait_in_several_steps() -> None:
    class Slow(asyncio.Event):
        async def wait(self) -> Any:
            await asyncio.sleep(0)
            await super().wait()
            await asyncio.sleep(0)

    event, heard = Slow(), Heard()
    EventTrigger(event).arm(heard)
    await turns()
    event.set()
    await heard.next()


@pytest.mark.parametrize("event", [None, threading.Condition(), 3.0, asyncio.Event])
def test_something_that_is_no_event_is_a_type_error(event: Any) -> None:
    with pytest.raises(TypeError, match=r"needs an asyncio\.Event"):
        EventTrigger(event)


def test_a_threading_event_is_a_type_error_that_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"call_soon_threadsafe\(event\.set\)"):
        EventTrigger(threading.Event())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"message": ValueError("x")}, "the message of a CancelReason is a text"),
        ({"cancel_type": "manual"}, r"such as CancelType\.MANUAL, not 'manual'"),
        ({"code": 5}, "the code of a CancelReason is a text, not 5"),
        ({"origin": object()}, "the origin of a CancelReason is a text"),
        ({"causes": ["why"]}, "the causes of a CancelReason are a tuple of reasons"),
        ({"causes": ("why",)}, "the causes of a CancelReason are a tuple of reasons"),
    ],
)
def test_a_reason_that_nobody_could_read_is_a_type_error_where_it_is_made(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        CancelReason(**({"message": "why"} | wrong))


class Talks(Trigger):
    """A trigger that gives no reason, but a text."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once
        self.callback: Callable[[Any], None] | None = None

    def check(self) -> Any:
        return "a text" if self.at_once else None

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        self.callback = callback
        return TriggerHandle(lambda: None)


async def test_a_trigger_that_gives_no_reason_is_told_so_before_anything_begins() -> None:
    with pytest.raises(TypeError, match="a reason to stop is a CancelReason, not 'a text'"), Fence(Talks(at_once=True)):
        pytest.fail("the block has begun")
    taken: list[int] = []
    with pytest.raises(TypeError, match="a reason to stop is a CancelReason, not 'a text'"):
        await (Pipeline([1], cancel_on=[Talks(at_once=True)]) >> tap(taken.append)).run()
    assert taken == []


async def test_a_trigger_that_gives_no_reason_later_is_told_so_and_stops_nothing() -> None:
    talks = Talks(at_once=False)

    def talk(_item: object) -> None:
        assert talks.callback is not None
        with pytest.raises(TypeError, match="a reason to stop is a CancelReason, not 'later'"):
            talks.callback("later")

    with Fence(talks) as fence:
        talk(1)
    assert fence.reasons == ()
    report = await (Pipeline([1], cancel_on=[talks]) >> tap(talk)).run()
    assert isinstance(report, RunReport)
    assert report.reasons == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: TimeoutTrigger(1, code=5),  # type: ignore[arg-type]
        lambda: DeadlineTrigger(1.0, code=5),  # type: ignore[arg-type]
        lambda: EventTrigger(asyncio.Event(), code=5),  # type: ignore[arg-type]
        lambda: SignalTrigger(USR1, code=5),  # type: ignore[arg-type]
        lambda: MemoryTrigger(2**40, code=5),  # type: ignore[arg-type]
        lambda: EndTrigger(Fence(), code=5),  # type: ignore[arg-type]
        lambda: CancelReason("x", CancelType.MANUAL, 5),  # type: ignore[arg-type]
    ],
    ids=["timeout", "deadline", "event", "signal", "memory", "end", "reason"],
)
def test_a_code_that_is_no_text_is_refused_when_the_trigger_is_made(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="the code of .* is a text, not 5"):
        make()
