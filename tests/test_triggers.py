"""Triggers one by one: what `check` says, when `arm` calls back, and that `disarm` leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.cancellation import (
    CancelReason,
    CancelType,
    EventTrigger,
    SignalTrigger,
    TimeoutTrigger,
    Trigger,
    TriggerHandle,
)

USR1, USR2 = signal.SIGUSR1, signal.SIGUSR2


class Heard:
    """A callback that keeps what it was told, and lets a test wait for it instead of sleeping."""

    def __init__(self) -> None:
        self.reasons: list[CancelReason] = []
        self._news = asyncio.Event()

    def __call__(self, reason: CancelReason) -> None:
        self.reasons.append(reason)
        self._news.set()

    async def next(self) -> CancelReason:
        await self._news.wait()
        self._news.clear()
        return self.reasons[-1]


class CountedEvent(asyncio.Event):
    """Knows by public means how many wait for it."""

    waiting = 0

    async def wait(self) -> Any:
        self.waiting += 1
        try:
            return await super().wait()
        finally:
            self.waiting -= 1


async def turns(count: int = 3) -> None:
    """Let everything that is ready now run, and what that makes ready."""
    for _ in range(count):
        await asyncio.sleep(0)


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


@pytest.fixture
def handler() -> Iterator[Callable[..., None]]:
    """A handler of the program's own for SIGUSR1 and SIGUSR2, which must be in place again at the end."""

    def own(_signum: int, _frame: object) -> None:
        pass

    before = {signum: signal.signal(signum, own) for signum in (USR1, USR2)}
    yield own
    found = [signal.signal(signum, previous) for signum, previous in before.items()]
    assert found == [own, own]


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


@pytest.mark.parametrize("trigger", [TimeoutTrigger(1), EventTrigger(asyncio.Event()), SignalTrigger(USR1)], ids=repr)
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


# --- signals


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_signal_calls_back_at_every_arrival_and_the_reasons_tell_them_apart() -> None:
    heard = Heard()
    trigger = SignalTrigger(USR1, USR2, code="stop")
    handle = trigger.arm(heard)
    for signum in (USR1, USR1, USR2):
        signal.raise_signal(signum)
        await heard.next()
    handle.disarm()
    assert [reason.message for reason in heard.reasons] == [
        "received SIGUSR1",
        "received SIGUSR1 (signal number 2 since armed)",
        "received SIGUSR2 (signal number 3 since armed)",
    ]
    assert {(reason.cancel_type, reason.code) for reason in heard.reasons} == {(CancelType.SIGNAL, "stop")}
    assert trigger.check() is None


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_signal_wakes_a_loop_that_sleeps() -> None:
    heard = Heard()
    handle = SignalTrigger(USR1).arm(heard)
    killer = threading.Thread(target=os.kill, args=(os.getpid(), USR1))
    asyncio.get_running_loop().call_soon(killer.start)
    await heard.next()
    killer.join()
    handle.disarm()


@pytest.mark.asyncio
async def test_all_triggers_on_one_signal_fire_and_the_last_to_disarm_restores(handler: Callable[..., None]) -> None:
    first, second = Heard(), Heard()
    one, two = SignalTrigger(USR1).arm(first), SignalTrigger(USR1, USR2).arm(second)
    signal.raise_signal(USR1)
    await first.next()
    await second.next()

    one.disarm()
    assert signal.getsignal(USR1) is not handler
    signal.raise_signal(USR1)
    await second.next()

    two.disarm()
    two.disarm()
    assert signal.getsignal(USR1) is handler
    assert (len(first.reasons), len(second.reasons)) == (1, 2)


@pytest.mark.asyncio
async def test_each_arming_counts_its_own_arrivals(handler: Callable[..., None]) -> None:
    trigger, early, late = SignalTrigger(USR1), Heard(), Heard()
    one = trigger.arm(early)
    signal.raise_signal(USR1)
    await early.next()
    two = trigger.arm(late)
    signal.raise_signal(USR1)
    await late.next()
    one.disarm()
    two.disarm()
    assert late.reasons == [early.reasons[0]]


@pytest.mark.asyncio
async def test_ctrl_c_is_a_keyboard_interrupt_again_after_the_disarm() -> None:
    before, heard = signal.getsignal(signal.SIGINT), Heard()
    handle = SignalTrigger(signal.SIGINT).arm(heard)
    signal.raise_signal(signal.SIGINT)
    await heard.next()
    handle.disarm()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_listener_may_disarm_another_that_is_then_not_called() -> None:
    second = Heard()

    def disarm_second(_reason: CancelReason) -> None:
        two.disarm()
        told.set()

    told = asyncio.Event()
    one = SignalTrigger(USR1).arm(disarm_second)
    two = SignalTrigger(USR1).arm(second)
    signal.raise_signal(USR1)
    await told.wait()
    await turns()
    one.disarm()
    assert second.reasons == []


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_signal_that_came_before_the_disarm_is_not_reported_after_it() -> None:
    heard = Heard()
    handle = SignalTrigger(USR1).arm(heard)
    signal.raise_signal(USR1)
    handle.disarm()
    await turns(5)
    assert heard.reasons == []


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_listener_that_raises_is_reported_and_keeps_the_signal_from_nobody() -> None:
    def fail(_reason: CancelReason) -> None:
        raise ValueError("boom")

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
    heard = Heard()
    one, two = SignalTrigger(USR1).arm(fail), SignalTrigger(USR1).arm(heard)
    signal.raise_signal(USR1)
    await heard.next()
    one.disarm()
    two.disarm()
    assert [str(context["exception"]) for context in reported] == ["boom"]


@pytest.mark.asyncio
async def test_the_loops_own_signal_handler_is_called_beside_ours_and_survives_it(handler: Callable[..., None]) -> None:
    loop, own, heard = asyncio.get_running_loop(), asyncio.Event(), Heard()
    loop.add_signal_handler(USR1, own.set)
    handle = SignalTrigger(USR1).arm(heard)
    signal.raise_signal(USR1)
    await heard.next()
    await own.wait()

    handle.disarm()
    own.clear()
    signal.raise_signal(USR1)
    await own.wait()
    assert len(heard.reasons) == 1
    loop.remove_signal_handler(USR1)
    signal.signal(USR1, handler)


@pytest.mark.asyncio
async def test_a_handler_put_over_ours_stays(handler: Callable[..., None]) -> None:
    def theirs(_signum: int, _frame: object) -> None:
        pass

    handle = SignalTrigger(USR1).arm(lambda reason: None)
    signal.signal(USR1, theirs)
    handle.disarm()
    assert signal.signal(USR1, handler) is theirs


class WithoutSignals(asyncio.SelectorEventLoop):
    """A loop like those of other systems."""

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
        raise NotImplementedError


def test_signals_arrive_where_the_loop_cannot_handle_them_itself(handler: Callable[..., None]) -> None:
    async def main() -> None:
        heard = Heard()
        handle = SignalTrigger(USR1, USR2).arm(heard)
        for signum in (USR1, USR2):
            killer = threading.Thread(target=os.kill, args=(os.getpid(), signum))
            asyncio.get_running_loop().call_soon(killer.start)
            await heard.next()
            killer.join()
        handle.disarm()
        assert len(heard.reasons) == 2
        assert signal.getsignal(USR1) is handler

    with asyncio.Runner(loop_factory=WithoutSignals) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop_factory", [asyncio.SelectorEventLoop, WithoutSignals])
@pytest.mark.usefixtures("handler")
def test_a_handle_may_outlive_its_loop_and_still_restores(loop_factory: Callable[[], Any]) -> None:
    async def main() -> TriggerHandle:
        return SignalTrigger(USR1).arm(lambda reason: None)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        handle = runner.run(main())
    if loop_factory is WithoutSignals:
        signal.raise_signal(USR1)  # nobody is there to hear it, and nothing is raised
    handle.disarm()


def test_when_one_of_the_signals_cannot_be_had_the_others_are_given_back(handler: Callable[..., None]) -> None:
    class Choosy(asyncio.SelectorEventLoop):
        def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
            if sig == USR2:
                raise OSError("not this one")
            super().add_signal_handler(sig, callback, *args)

    async def main() -> None:
        with pytest.raises(OSError, match="not this one"):
            SignalTrigger(USR1, USR2).arm(lambda reason: None)
        assert signal.getsignal(USR1) is handler

    with asyncio.Runner(loop_factory=Choosy) as runner:
        runner.run(main())


@pytest.mark.asyncio
async def test_arming_a_signal_outside_the_main_thread_is_an_error_that_says_what_to_do() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"main thread.*EventTrigger"):
            SignalTrigger(USR1).arm(lambda reason: None)

    await asyncio.to_thread(asyncio.run, main())


def test_no_signals_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least one signal"):
        SignalTrigger()


@pytest.mark.parametrize("signum", ["SIGTERM", None, True])
def test_something_that_is_no_signal_is_a_type_error(signum: Any) -> None:
    with pytest.raises(TypeError, match=r"signal\.SIGTERM"):
        SignalTrigger(signum)


@pytest.mark.parametrize(("signum", "advice"), [(0, "signal.Signals"), (signal.SIGKILL, "use SIGTERM or SIGINT")])
def test_a_signal_that_cannot_be_caught_is_a_value_error(signum: int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        SignalTrigger(signum)


def test_a_signal_trigger_shows_how_it_was_made() -> None:
    trigger = SignalTrigger(USR1, USR1, USR2, code="stop", drain=True)
    assert trigger.signals == (USR1, USR2)
    assert trigger.drain
    assert repr(trigger) == "SignalTrigger(SIGUSR1, SIGUSR2, code='stop', drain=True)"
