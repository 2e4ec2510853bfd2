"""Fences: what they interrupt and what they let through, and that nothing of them is left in the task or the loop."""

from __future__ import annotations

import asyncio
import gc
import math
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers import LeapingLoop
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cancellation import (
    CancelReason,
    CancelType,
    DeadlineTrigger,
    EndTrigger,
    EventTrigger,
    Fence,
    TimeoutTrigger,
    TriggerHandle,
    get_current_reasons,
)
from pipeline.cancellation.current import pop_reasons, push_reasons


class Manual:
    """A trigger fired by hand, which shows whether it is armed."""

    def __init__(self, code: str = "manual", *, fired: bool = False) -> None:
        self.reason = CancelReason(f"{code} fired", CancelType.MANUAL, code)
        self.fired = fired
        self.armed: list[Callable[[CancelReason], None]] = []

    def check(self) -> CancelReason | None:
        return self.reason if self.fired else None

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        self.armed.append(callback)
        return TriggerHandle(lambda: self.armed.remove(callback))

    def fire(self) -> None:
        for callback in tuple(self.armed):
            callback(self.reason)


class Broken(Manual):
    """A trigger that cannot be armed."""

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        raise OSError("cannot be armed")


class CountedEvent(asyncio.Event):
    """Knows by public means how many wait for it."""

    waiting = 0

    async def wait(self) -> Any:
        self.waiting += 1
        try:
            return await super().wait()
        finally:
            self.waiting -= 1


async def forever() -> None:
    """Only a cancellation ends this."""
    await asyncio.Event().wait()


async def turns(count: int = 4) -> None:
    """Let everything that is ready run: a cancellation that is still on its way would arrive here."""
    for _ in range(count):
        await asyncio.sleep(0)


def soon(callback: Callable[..., object], *args: Any) -> None:
    asyncio.get_running_loop().call_soon(callback, *args)


def refuse_careless_threads() -> None:
    """Let the loop raise when a thread calls it in a way that would not wake it."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = math.inf


def this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def codes(fence: Fence) -> list[str | None]:
    return [reason.code for reason in fence.reasons]


@pytest.fixture(autouse=True)
def live_timers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[asyncio.TimerHandle]]:
    """After every test: each timer that was set has been cancelled or has come due."""
    made: list[asyncio.TimerHandle] = []
    original = asyncio.BaseEventLoop.call_at

    def call_at(self: Any, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = original(self, when, callback, *args, context=context)
        made.append(handle)
        return handle

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_at", call_at)
    yield made
    assert [t for t in made if not t.cancelled() and t.when() > time.monotonic()] == []


async def balanced() -> None:
    """The end of a test: no cancellation on its way, none counted, no task or reason left over."""
    await turns()
    assert this_task().cancelling() == 0
    assert asyncio.all_tasks() == {this_task()}
    assert get_current_reasons() == ()


# --- the block itself


@pytest.mark.asyncio
async def test_a_fence_without_triggers_does_nothing() -> None:
    with Fence() as fence:
        await asyncio.sleep(0)
    assert not fence.cancelled
    assert fence.reasons == ()
    assert not fence.cancelled_by("anything")
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_whose_triggers_stay_silent_does_nothing_and_leaves_nothing() -> None:
    event, manual = CountedEvent(), Manual()
    with Fence(TimeoutTrigger(60), EventTrigger(event), manual, TimeoutTrigger(math.inf)) as fence:
        await asyncio.sleep(0)
        assert (event.waiting, len(manual.armed)) == (1, 1)
        assert asyncio.all_tasks() == {this_task()}
    assert not fence.cancelled
    assert (event.waiting, len(manual.armed)) == (0, 0)
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("triggers", [(), (TimeoutTrigger(60),), (TimeoutTrigger(0),)], ids=["none", "silent", "fired"])
async def test_an_exception_of_the_body_goes_through(triggers: tuple[TimeoutTrigger, ...]) -> None:
    with pytest.raises(ValueError, match="boom"), Fence(*triggers):
        raise ValueError("boom")
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_cannot_be_entered_twice_in_a_row_or_inside_itself() -> None:
    fence = Fence()
    with fence:
        with pytest.raises(RuntimeError, match="make a new one"), fence:
            pass
        assert not fence.cancelled
    with pytest.raises(RuntimeError, match="make a new one"), fence:
        pass
    await balanced()


def test_a_fence_outside_a_loop_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match="interrupts the asyncio task that enters it"), Fence():
        pass


@pytest.mark.asyncio
async def test_a_fence_in_a_callback_is_outside_a_task() -> None:
    caught = asyncio.get_running_loop().create_future()

    def callback() -> None:
        try:
            with Fence():
                pass
        except RuntimeError as error:
            caught.set_result(error)

    soon(callback)
    assert "interrupts the asyncio task" in str(await caught)


@pytest.mark.parametrize("wrong", [3.0, asyncio.Event(), None])
def test_something_that_is_no_trigger_is_a_type_error_that_names_the_wrappers(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"TimeoutTrigger.*EventTrigger"):
        Fence(wrong)


# --- what interrupts, and when


@pytest.mark.asyncio
@pytest.mark.parametrize("first_await", [forever, lambda: asyncio.sleep(0)], ids=["future", "bare yield"])
async def test_a_fence_that_has_fired_interrupts_the_first_await(first_await: Callable[[], Any]) -> None:
    event = asyncio.Event()
    event.set()
    for trigger in (TimeoutTrigger(0), EventTrigger(event), Manual(fired=True)):
        reached = []
        with Fence(trigger) as fence:
            reached.append("before")
            await first_await()
            reached.append("after")
        assert fence.cancelled
        assert len(fence.reasons) == 1
        assert reached == ["before"]
    await balanced()


@pytest.mark.asyncio
async def test_a_body_without_an_await_completes_and_the_fence_is_cancelled_all_the_same() -> None:
    event = asyncio.Event()
    event.set()
    for trigger in (TimeoutTrigger(0), EventTrigger(event), Manual(fired=True)):
        completed = False
        with Fence(trigger) as fence:
            completed = True
        assert completed
        assert fence.cancelled
        await balanced()


@pytest.mark.asyncio
async def test_an_event_set_while_the_body_waits_interrupts_it() -> None:
    event = CountedEvent()
    soon(event.set)
    with Fence(EventTrigger(event, code="shutdown")) as fence:
        await forever()
    assert codes(fence) == ["shutdown"]
    assert event.waiting == 0
    await balanced()


@pytest.mark.asyncio
async def test_a_timeout_interrupts_a_body_that_waits() -> None:
    with Fence(TimeoutTrigger(0.001, code="budget")) as fence:
        await forever()
    assert fence.cancelled_by("budget")
    assert not fence.cancelled_by("shutdown")
    assert fence.reasons[0].cancel_type is CancelType.TIMEOUT
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("next_await", [forever, lambda: asyncio.sleep(0)], ids=["future", "bare yield"])
async def test_an_event_set_inside_the_body_interrupts_the_next_await(next_await: Callable[[], Any]) -> None:
    event = asyncio.Event()
    with Fence(EventTrigger(event)) as fence:
        await asyncio.sleep(0)
        event.set()
        await next_await()
        pytest.fail("the await was not interrupted")
    assert fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_an_event_set_after_the_last_await_interrupts_nothing_and_is_recorded() -> None:
    event = CountedEvent()
    with Fence(EventTrigger(event)) as fence:
        await asyncio.sleep(0)
        event.set()
    assert fence.cancelled
    assert len(fence.reasons) == 1
    assert event.waiting == 0
    await balanced()


@pytest.mark.asyncio
async def test_a_trigger_that_calls_back_inside_arm_interrupts_the_first_await() -> None:
    class Inline(Manual):
        def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
            callback(self.reason)
            return super().arm(callback)

    with Fence(inline := Inline()) as fence:
        await asyncio.sleep(0)
        pytest.fail("the await was not interrupted")
    assert codes(fence) == ["manual"]
    assert inline.armed == []
    with Fence(Inline()):
        pass
    await balanced()


@pytest.mark.asyncio
async def test_a_trigger_fired_by_the_body_itself_interrupts_the_next_await() -> None:
    with Fence(manual := Manual()) as fence:
        manual.fire()
        assert fence.cancelled
        await asyncio.sleep(0)
        pytest.fail("the await was not interrupted")
    with Fence(manual):
        manual.fire()
    await balanced()


@pytest.mark.asyncio
async def test_a_trigger_may_call_back_from_a_thread() -> None:
    refuse_careless_threads()
    with Fence(manual := Manual()) as fence:
        threading.Thread(target=manual.fire).start()
        await forever()
    assert codes(fence) == ["manual"]
    await balanced()


@pytest.mark.asyncio
async def test_two_tasks_with_one_event_are_both_interrupted() -> None:
    event = CountedEvent()

    async def work() -> bool:
        with Fence(EventTrigger(event)) as fence:
            started.release()
            await forever()
        return fence.cancelled

    started = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(work()) for _ in range(2)]
    await started.acquire()
    await started.acquire()
    event.set()
    assert await asyncio.gather(*tasks) == [True, True]
    assert event.waiting == 0
    await balanced()


@pytest.mark.asyncio
async def test_fences_in_a_row_do_not_know_of_each_other() -> None:
    event = CountedEvent()
    for _ in range(3):
        event.clear()
        with Fence(EventTrigger(event)) as fence:
            event.set()
            await forever()
        assert len(fence.reasons) == 1
        with Fence(TimeoutTrigger(60)) as silent:
            await turns()
        assert not silent.cancelled
    assert event.waiting == 0
    await balanced()


# --- bodies that do as they like with the cancellation


@pytest.mark.asyncio
async def test_a_body_may_swallow_the_cancellation_and_the_counter_is_balanced() -> None:
    with Fence(TimeoutTrigger(0)) as fence:
        try:
            await forever()
        except asyncio.CancelledError:
            assert this_task().cancelling() == 1
        await turns()
    assert fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_body_may_raise_instead_and_the_counter_is_balanced() -> None:
    with pytest.raises(ValueError, match="boom"), Fence(TimeoutTrigger(0)) as fence:
        try:
            await forever()
        finally:
            raise ValueError("boom")
    assert fence.cancelled
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("reraise", [False, True])
async def test_a_body_may_call_uncancel_and_the_counter_is_balanced(reraise: bool) -> None:
    with Fence(TimeoutTrigger(0)) as fence:
        try:
            await forever()
        except asyncio.CancelledError:
            this_task().uncancel()
            if reraise:
                raise
    assert fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_body_that_calls_uncancel_leaves_the_requests_of_others_counted() -> None:
    async def work() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            with Fence(TimeoutTrigger(0)):
                try:
                    await forever()
                except asyncio.CancelledError:
                    this_task().uncancel()
            assert this_task().cancelling() == 1
            raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.asyncio
async def test_a_cancelled_error_that_nobody_asked_for_is_not_ours() -> None:
    child = asyncio.create_task(forever())
    soon(child.cancel)
    with pytest.raises(asyncio.CancelledError), Fence(TimeoutTrigger(60)) as fence:
        await child
    assert not fence.cancelled
    await balanced()


# --- several reasons


@pytest.mark.asyncio
async def test_all_reasons_are_recorded_in_order_and_the_body_is_interrupted_once() -> None:
    interruptions = 0
    with Fence(first := Manual("first"), second := Manual("second"), Manual("third")) as fence:
        soon(second.fire)
        soon(first.fire)
        try:
            await forever()
        except asyncio.CancelledError:
            interruptions += 1
            await turns()
    assert codes(fence) == ["second", "first"]
    assert fence.cancelled_by("first")
    assert fence.cancelled_by("second")
    assert not fence.cancelled_by("third")
    assert interruptions == 1
    await balanced()


@pytest.mark.asyncio
async def test_triggers_that_fired_before_are_all_recorded() -> None:
    with Fence(Manual("a", fired=True), TimeoutTrigger(0, code="b"), Manual("c", fired=True)) as fence:
        await forever()
    assert codes(fence) == ["a", "b", "c"]
    await balanced()


@pytest.mark.asyncio
async def test_a_trigger_that_fired_before_does_not_keep_a_later_one_from_being_recorded() -> None:
    with Fence(early := Manual("early", fired=True), late := Manual("late")) as fence:
        assert (early.armed, len(late.armed)) == ([], 1)
        try:
            await forever()
        except asyncio.CancelledError:
            late.fire()
            raise
    assert codes(fence) == ["early", "late"]
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("awaits", [True, False])
async def test_a_trigger_that_fires_during_cleanup_is_recorded_and_does_not_disturb_it(awaits: bool) -> None:
    first, second, cleaned = asyncio.Event(), asyncio.Event(), False
    first.set()
    with Fence(EventTrigger(first, code="first"), EventTrigger(second, code="second")) as fence:
        try:
            await forever()
        finally:
            second.set()
            if awaits:
                await turns()
            cleaned = True
    assert cleaned
    assert codes(fence) == ["first", "second"]
    await balanced()


@pytest.mark.asyncio
async def test_nothing_is_recorded_or_interrupted_after_the_exit() -> None:
    first, second, manual = asyncio.Event(), CountedEvent(), Manual()
    with Fence(EventTrigger(first, code="first"), EventTrigger(second), manual) as fence:
        [late] = manual.armed
        first.set()
        await forever()
    second.set()
    late(manual.reason)
    fence.cancel("too late")
    threading.Thread(target=fence.cancel).start()
    await turns()
    assert codes(fence) == ["first"]
    await balanced()


@pytest.mark.asyncio
async def test_the_same_trigger_may_serve_twice_in_one_fence_and_in_many() -> None:
    event = asyncio.Event()
    trigger = EventTrigger(event, code="shared")
    with Fence(trigger, trigger) as fence:
        event.set()
        await forever()
    with Fence(trigger) as other:
        await forever()
    assert (codes(fence), codes(other)) == (["shared", "shared"], ["shared"])
    await balanced()


# --- by hand


@pytest.mark.asyncio
@pytest.mark.parametrize("next_await", [forever, lambda: asyncio.sleep(0)], ids=["future", "bare yield"])
async def test_cancel_by_hand_records_at_once_and_interrupts_the_next_await(next_await: Callable[[], Any]) -> None:
    with Fence() as fence:
        fence.cancel("enough", code="enough")
        assert fence.reasons == (CancelReason("enough", CancelType.MANUAL, "enough"),)
        await next_await()
        pytest.fail("the await was not interrupted")
    await balanced()


@pytest.mark.asyncio
async def test_cancel_by_hand_takes_a_reason_a_text_or_nothing() -> None:
    own = CancelReason("disk full", CancelType.ERROR, "disk")
    with Fence() as fence:
        fence.cancel(own)
        fence.cancel(own, code="other")
        fence.cancel("enough")
        fence.cancel()
        with pytest.raises(TypeError, match="a text, a CancelReason or nothing"):
            fence.cancel(3)  # type: ignore[arg-type]
    assert [reason.message for reason in fence.reasons] == ["disk full", "disk full", "enough", "cancelled by hand"]
    assert codes(fence) == ["disk", "other", None, None]
    assert fence.reasons[0] is own
    await balanced()


@pytest.mark.asyncio
async def test_cancel_before_the_block_interrupts_its_first_await() -> None:
    fence = Fence()
    fence.cancel("not today")
    with fence:
        await asyncio.sleep(0)
        pytest.fail("the await was not interrupted")
    assert fence.reasons[0].message == "not today"
    await balanced()


@pytest.mark.asyncio
async def test_cancel_from_another_task_and_from_a_callback_interrupts() -> None:
    async def cancel(fence: Fence) -> None:
        fence.cancel("from a task")

    with Fence() as by_task:
        helper = asyncio.create_task(cancel(by_task))
        await forever()
    with Fence() as by_callback:
        soon(by_callback.cancel, "from a callback")
        await forever()
    await helper
    assert [fence.reasons[0].message for fence in (by_task, by_callback)] == ["from a task", "from a callback"]
    await balanced()


@pytest.mark.asyncio
async def test_cancel_from_many_threads_keeps_every_reason_and_interrupts_once() -> None:
    interruptions = 0
    refuse_careless_threads()
    with Fence() as fence:
        threads = [threading.Thread(target=fence.cancel, args=(f"thread {n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        try:
            await forever()
        except asyncio.CancelledError:
            interruptions += 1
            for thread in threads:
                thread.join()
            await turns()
    assert sorted(reason.message for reason in fence.reasons) == [f"thread {n}" for n in range(8)]
    assert interruptions == 1
    await balanced()


def test_cancel_after_the_loop_was_closed_is_harmless() -> None:
    async def enter() -> None:
        fence.__enter__()

    fence = Fence(EventTrigger(event := CountedEvent()))
    asyncio.run(enter())
    fence.cancel("nobody hears this")
    assert fence.__exit__(None, None, None) is False
    assert fence.cancelled
    assert event.waiting == 0


@pytest.mark.asyncio
@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_cancel_from_an_eager_child_leaves_no_stray_cancellation() -> None:
    async def child(fence: Fence, manual: Manual) -> None:
        fence.cancel()
        manual.fire()

    with Fence(manual := Manual()) as fence:
        asyncio.Task(child(fence, manual), eager_start=True, loop=asyncio.get_running_loop())  # type: ignore[call-arg]
    assert len(fence.reasons) == 2
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_that_was_left_is_forgotten() -> None:
    with Fence(Manual(fired=True)) as fence:
        fence.cancel()
    remembered = weakref.ref(fence)
    del fence
    await turns()
    gc.collect()
    assert remembered() is None
    await balanced()


# --- when triggers misbehave


@pytest.mark.asyncio
async def test_when_the_second_trigger_cannot_be_armed_the_first_is_disarmed() -> None:
    event, manual = CountedEvent(), Manual()
    fence = Fence(EventTrigger(event), manual, TimeoutTrigger(60), TimeoutTrigger(0), Broken(), Manual())
    with pytest.raises(OSError, match="cannot be armed"), fence:
        pytest.fail("the body must not start")
    assert (event.waiting, manual.armed) == (0, [])
    with pytest.raises(RuntimeError, match="make a new one"), fence:
        pass
    await balanced()


@pytest.mark.asyncio
async def test_when_one_trigger_cannot_be_disarmed_the_others_are_and_the_error_is_seen() -> None:
    class Stuck(Manual):
        def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
            return TriggerHandle(self.fail)

        def fail(self) -> None:
            raise OSError("cannot be disarmed")

    first, last = Manual(), Manual()
    with pytest.raises(OSError, match="cannot be disarmed"), Fence(first, Stuck(), last, TimeoutTrigger(0)):
        await forever()
    assert (first.armed, last.armed) == ([], [])
    await balanced()


# --- nesting


@pytest.mark.asyncio
async def test_an_inner_fence_stops_only_its_own_body() -> None:
    reached = []
    with Fence(TimeoutTrigger(60)) as outer:
        for trigger in (TimeoutTrigger(0), Manual(fired=True)):
            with Fence(trigger) as inner:
                await forever()
            assert inner.cancelled
            await turns()
            reached.append("between")
    assert not outer.cancelled
    assert reached == ["between", "between"]
    await balanced()


@pytest.mark.asyncio
async def test_an_outer_fence_goes_through_the_inner_one() -> None:
    with Fence(manual := Manual("outer")) as outer:
        with Fence(TimeoutTrigger(60)) as inner:
            soon(manual.fire)
            await forever()
        pytest.fail("the code between the fences belongs to the outer one")
    assert not inner.cancelled
    assert codes(outer) == ["outer"]
    await balanced()


@pytest.mark.asyncio
async def test_a_shared_event_is_recorded_by_three_fences_and_swallowed_by_the_outermost() -> None:
    shutdown = CountedEvent()
    trigger = EventTrigger(shutdown, code="shutdown")
    with Fence(trigger) as outer:
        with Fence(trigger) as middle:
            with Fence(trigger) as inner:
                shutdown.set()
                await forever()
            pytest.fail("the code between the fences belongs to the outer ones")
        pytest.fail("the code between the fences belongs to the outer one")
    assert [codes(fence) for fence in (outer, middle, inner)] == [["shutdown"]] * 3
    assert shutdown.waiting == 0
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("which", [0, 1, 2], ids=["outer", "middle", "inner"])
async def test_three_deep_the_fence_that_fired_is_the_one_that_ends(which: int) -> None:
    triggers = [Manual(str(n)) for n in range(3)]
    ended = []
    with Fence(triggers[0]) as outer:
        with Fence(triggers[1]) as middle:
            with Fence(triggers[2]) as inner:
                soon(triggers[which].fire)
                await forever()
            ended.append(2)
            await turns()
        ended.append(1)
        await turns()
    ended.append(0)
    assert [fence.cancelled for fence in (outer, middle, inner)] == [n == which for n in range(3)]
    assert ended == list(range(which, -1, -1))
    await balanced()


@pytest.mark.asyncio
async def test_when_both_have_fired_before_the_outer_one_ends() -> None:
    with Fence(TimeoutTrigger(0)) as outer:
        with Fence(TimeoutTrigger(0)) as inner:
            await forever()
        pytest.fail("the code between the fences belongs to the outer one")
    assert outer.cancelled
    assert inner.cancelled
    with Fence(TimeoutTrigger(0)), Fence(TimeoutTrigger(0)):
        pass
    await balanced()


@pytest.mark.asyncio
async def test_an_outer_fence_that_fires_while_the_inner_cleans_up_ends_both() -> None:
    with Fence(manual := Manual("outer")) as outer:
        with Fence(TimeoutTrigger(0)) as inner:
            try:
                await forever()
            except asyncio.CancelledError:
                soon(manual.fire)
                await forever()
        pytest.fail("the code between the fences belongs to the outer one")
    assert outer.cancelled
    assert inner.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_an_outer_event_set_as_the_inner_one_unwinds_interrupts_the_next_await() -> None:
    event, between = asyncio.Event(), False
    with Fence(EventTrigger(event)) as outer:
        with Fence(TimeoutTrigger(0)) as inner:
            try:
                await forever()
            finally:
                event.set()
        between = True
        await forever()
    assert between
    assert outer.cancelled
    assert inner.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_may_bound_the_cleanup_inside_a_cancelled_fence() -> None:
    bounded = False
    with Fence(TimeoutTrigger(0)) as outer:
        try:
            await forever()
        finally:
            with Fence(TimeoutTrigger(0)) as inner:
                await forever()
            bounded = True
    assert bounded
    assert outer.cancelled
    assert inner.cancelled
    await balanced()


# --- cancellation from outside


async def cancelled_at(task: asyncio.Task[Any]) -> int:
    """Wait for the end of a task that must end cancelled; the count of requests it had then."""
    await asyncio.wait([task])
    assert task.cancelled()
    return task.cancelling()


@pytest.mark.asyncio
@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_a_cancellation_from_outside_goes_through_every_fence(depth: int) -> None:
    fences = [Fence(TimeoutTrigger(60)) for _ in range(depth)]

    async def work(level: int = 0) -> None:
        if level == depth:
            await forever()
        with fences[level]:
            await work(level + 1)
        pytest.fail("the cancellation was swallowed")

    task = asyncio.create_task(work())
    await turns()
    task.cancel()
    assert await cancelled_at(task) == 1
    assert not any(fence.cancelled for fence in fences)
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("trigger_first", [True, False])
async def test_a_cancellation_from_outside_at_the_same_moment_goes_through(trigger_first: bool) -> None:
    fence = Fence(manual := Manual())

    async def work() -> None:
        with fence:
            await forever()
        pytest.fail("the cancellation was swallowed")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    both = [manual.fire, task.cancel]
    for act in both if trigger_first else reversed(both):
        soon(act)
    assert await cancelled_at(task) == 1
    assert fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_cancellation_from_outside_meets_a_fence_that_has_just_fired() -> None:
    async def work() -> None:
        with Fence(TimeoutTrigger(0)):
            await forever()
        pytest.fail("the cancellation was swallowed")

    task = asyncio.create_task(work())
    soon(task.cancel)
    assert await cancelled_at(task) == 1
    await balanced()


@pytest.mark.asyncio
async def test_a_cancellation_from_outside_during_the_cleanup_goes_through() -> None:
    cleaning = asyncio.Event()

    async def work() -> None:
        with Fence(TimeoutTrigger(0)):
            try:
                await forever()
            finally:
                cleaning.set()
                await forever()
        pytest.fail("the cancellation was swallowed")

    task = asyncio.create_task(work())
    await cleaning.wait()
    assert task.cancelling() == 1
    task.cancel()
    assert await cancelled_at(task) == 1
    await balanced()


@pytest.mark.asyncio
async def test_a_task_that_cancels_itself_inside_a_fence_is_cancelled() -> None:
    async def work() -> None:
        with Fence(TimeoutTrigger(0)):
            this_task().cancel()
            await asyncio.sleep(0)
        pytest.fail("the cancellation was swallowed")

    assert await cancelled_at(asyncio.create_task(work())) == 1
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_works_in_a_task_that_was_cancelled_and_went_on() -> None:
    async def work() -> int:
        try:
            await forever()
        except asyncio.CancelledError:
            pass  # without uncancel(): the request stays counted
        with Fence(TimeoutTrigger(0)) as fence:
            await forever()
        assert fence.cancelled
        await turns()
        return this_task().cancelling()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == 1
    await balanced()


# --- together with asyncio.timeout


@pytest.mark.asyncio
@pytest.mark.parametrize("delay", [0, 0.001])
async def test_a_timeout_inside_a_fence_raises_its_own_error(delay: float) -> None:
    with Fence(TimeoutTrigger(60)) as fence:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay):
                await forever()
        await turns()
    assert not fence.cancelled
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("delay", [0, 0.001])
async def test_a_timeout_outside_a_fence_goes_through_it(delay: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(delay):
            with Fence(TimeoutTrigger(60)) as fence:
                await forever()
            pytest.fail("the cancellation was swallowed")
    assert not fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_that_fires_around_a_timeout_is_not_a_timeout() -> None:
    with Fence(TimeoutTrigger(0)) as fence:
        async with asyncio.timeout(60):
            await forever()
    assert fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_that_fires_inside_a_timeout_leaves_the_timeout_at_work() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60) as timeout:
            with Fence(TimeoutTrigger(0)) as fence:
                await forever()
            assert fence.cancelled
            await turns()
            timeout.reschedule(asyncio.get_running_loop().time())
            await forever()
    await balanced()


@pytest.mark.asyncio
async def test_of_a_fence_and_a_timeout_that_fire_together_the_outer_one_wins() -> None:
    with Fence(TimeoutTrigger(0)) as outside:
        async with asyncio.timeout(0):
            await forever()
    assert outside.cancelled
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            with Fence(TimeoutTrigger(0)) as inside:
                await forever()
    assert inside.cancelled
    await balanced()


# --- together with TaskGroup


async def fail() -> None:
    raise ValueError("boom")


@pytest.mark.asyncio
async def test_a_fence_around_a_group_stops_its_children() -> None:
    with Fence(manual := Manual()) as fence:
        async with asyncio.TaskGroup() as group:
            child = group.create_task(forever())
            soon(manual.fire)
    assert fence.cancelled
    assert child.cancelled()
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_in_the_body_of_a_group_stops_only_itself() -> None:
    async with asyncio.TaskGroup() as group:
        child = group.create_task(turns())
        with Fence(TimeoutTrigger(0)) as fence:
            await forever()
    assert fence.cancelled
    assert not child.cancelled()
    await balanced()


@pytest.mark.asyncio
async def test_a_fence_in_a_child_stops_only_that_child() -> None:
    async def fenced(delay: float) -> bool:
        with Fence(TimeoutTrigger(delay)) as fence:
            await turns()
        return fence.cancelled

    async with asyncio.TaskGroup() as group:
        children = [group.create_task(fenced(delay)) for delay in (0, 60, 0)]
    assert [child.result() for child in children] == [True, False, True]
    await balanced()


@pytest.mark.asyncio
async def test_a_failing_body_of_a_group_goes_through_the_fence_around_it() -> None:
    with pytest.raises(ExceptionGroup) as caught, Fence(TimeoutTrigger(60)) as fence:
        async with asyncio.TaskGroup() as group:
            group.create_task(forever())
            raise ValueError("boom")
    assert isinstance(caught.value.exceptions[0], ValueError)
    assert not fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_failing_child_goes_through_the_fence_around_the_group() -> None:
    with pytest.raises(ExceptionGroup), Fence(TimeoutTrigger(60)) as fence:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await forever()
    assert not fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_child_that_fails_as_the_fence_around_the_group_fires_is_not_lost() -> None:
    with pytest.raises(ExceptionGroup), Fence(TimeoutTrigger(0)) as fence:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await forever()
    assert fence.cancelled
    await balanced()


@pytest.mark.asyncio
async def test_a_failing_sibling_stops_a_fenced_child() -> None:
    after = []

    async def fenced() -> None:
        with Fence(TimeoutTrigger(60)):
            await forever()
        after.append("reached")

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            child = group.create_task(fenced())
            group.create_task(fail())
            await child  # until 3.13 a group that is already leaving keeps its own request in the counter
    assert child.cancelled()
    assert after == []
    await balanced()


@pytest.mark.asyncio
@pytest.mark.parametrize("also_fires", [False, True])
async def test_a_failing_child_stops_the_fenced_body_of_its_group(also_fires: bool) -> None:
    fence = Fence(manual := Manual())

    async def child() -> None:
        if also_fires:
            soon(manual.fire)
        raise ValueError("boom")

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            with fence:
                await forever()
            pytest.fail("the group's cancellation was swallowed")
    assert fence.cancelled is also_fires
    await balanced()


# --- reasons for code that does not hold the fence


@pytest.mark.asyncio
async def test_current_reasons_are_those_of_the_fences_around_innermost_first() -> None:
    assert get_current_reasons() == ()
    with Fence() as outer, Fence() as inner:
        assert get_current_reasons() == ()
        outer.cancel("outer")
        inner.cancel("inner")
        assert [reason.message for reason in get_current_reasons()] == ["inner", "outer"]
    assert get_current_reasons() == ()
    await balanced()


@pytest.mark.asyncio
async def test_interrupted_code_deep_below_learns_why() -> None:
    why: list[tuple[CancelReason, ...]] = []

    async def deep() -> None:
        try:
            await forever()
        finally:
            why.append(get_current_reasons())

    with Fence(manual := Manual("budget")) as fence:
        async with asyncio.TaskGroup() as group:
            group.create_task(deep())
            await turns()
            soon(manual.fire)
            await deep()
    assert why == [fence.reasons] * 2
    await balanced()


@pytest.mark.asyncio
async def test_current_reasons_reach_threads_that_got_a_copy_of_the_context() -> None:
    with Fence(Manual("budget", fired=True)):
        try:
            await forever()
        except asyncio.CancelledError:
            assert [reason.code for reason in await asyncio.to_thread(get_current_reasons)] == ["budget"]
    await balanced()


@pytest.mark.asyncio
async def test_a_task_that_outlives_the_fence_is_no_longer_inside_it() -> None:
    left = asyncio.Event()

    async def outlive() -> tuple[CancelReason, ...]:
        await left.wait()
        return get_current_reasons()

    with Fence() as fence:
        task = asyncio.create_task(outlive())
        fence.cancel()
    left.set()
    assert await task == ()
    await balanced()


@pytest.mark.asyncio
async def test_a_runtime_can_publish_reasons_of_its_own() -> None:
    live: list[CancelReason] = []
    with Fence() as outer:
        outer.cancel(CancelReason("outer"))
        token = push_reasons(lambda: tuple(live))
        live.append(CancelReason("pipeline stopped"))
        with Fence() as inner:
            inner.cancel(CancelReason("inner"))
            assert [str(reason) for reason in get_current_reasons()] == ["inner", "pipeline stopped", "outer"]
            child = asyncio.create_task(asyncio.to_thread(get_current_reasons))
        pop_reasons(token)
        assert [str(reason) for reason in get_current_reasons()] == ["outer"]
    assert [str(reason) for reason in await child] == ["pipeline stopped"]
    await balanced()


@pytest.mark.asyncio
async def test_taking_back_a_provider_in_another_context_is_harmless() -> None:
    async def push() -> Any:
        return push_reasons(tuple)

    pop_reasons(await asyncio.create_task(push()))
    await balanced()


# --- the tree of reasons


@pytest.mark.asyncio
async def test_the_tree_tells_what_fired_first_what_followed_and_what_was_stopped() -> None:
    this_task().set_name("request")

    async def child() -> None:
        with Fence(TimeoutTrigger(60)), Fence(TimeoutTrigger(0, code="slow")):
            try:
                await forever()
            finally:
                soon(outer.cancel, "client left")
                soon(
                    outer.cancel,
                    "shutdown",
                )
                await forever()

    with Fence() as outer:
        async with asyncio.TaskGroup() as group:
            group.create_task(child(), name="llm")
    assert re.sub(r"\d\.\d{3}", "0.000", outer.explain()).splitlines() == [
        "fence in task 'request': client left (manual): body interrupted",
        "  0.000 s later: shutdown (manual)",
        "  stopped with it: fence in task 'llm': no reason of its own",
        "    stopped with it: fence in task 'llm': timed out after 0s (timeout, code 'slow'): body interrupted",
    ]
    await balanced()


@pytest.mark.asyncio
async def test_the_tree_nests_as_the_fences_do() -> None:
    trigger = Manual("shared")
    this_task().set_name("t")
    with Fence(trigger) as outer, Fence(trigger), Fence():
        soon(trigger.fire)
        await forever()
    assert outer.explain().splitlines() == [
        "fence in task 't': shared fired (manual, code 'shared'): body interrupted",
        "  stopped with it: fence in task 't': shared fired (manual, code 'shared'): body interrupted",
        "    stopped with it: fence in task 't': no reason of its own",
    ]
    await balanced()


@pytest.mark.asyncio
async def test_the_tree_says_when_nothing_was_interrupted() -> None:
    this_task().set_name("t")
    assert Fence().explain() == "fence, not entered: no reason of its own"
    with Fence(TimeoutTrigger(0)) as fence:
        pass
    assert fence.explain() == "fence in task 't': timed out after 0s (timeout): body not interrupted"
    await balanced()


# --- any triggers in any nesting: counters, timers, waiters, tasks and reasons balance


Plan = tuple[Any, ...]

EVENTS = 3
times = st.integers(0, 3)
numbers = st.integers(0, EVENTS - 1)
trigger_plans = st.one_of(
    st.tuples(st.just("timeout"), times | st.just(math.inf)),
    st.tuples(st.just("event"), numbers),
    st.tuples(st.just("manual"), st.booleans()),
    st.tuples(st.just("deadline"), times | st.just(math.inf)),
    st.tuples(st.just("end"), numbers),
)
actions = st.one_of(
    st.tuples(st.just("sleep"), times),
    st.tuples(st.sampled_from(["set", "clear"]), numbers),
    st.sampled_from([("cancel innermost",), ("cancel outermost from a thread",), ("raise",)]),
    st.tuples(st.just("beside"), numbers, times),
)
endings = st.sampled_from(["let go", "let go", "clean up", "swallow", "uncancel"])


def scopes(inside: st.SearchStrategy[list[Plan]]) -> st.SearchStrategy[list[Plan]]:
    fences = st.tuples(st.just("fence"), st.lists(trigger_plans, max_size=3), endings, inside)
    watched = st.tuples(st.just("watched fence"), numbers, endings, inside)
    timeouts = st.tuples(st.just("asyncio.timeout"), times, inside)
    return st.lists(st.one_of(fences, fences, watched, timeouts, actions), max_size=4)


plans = st.recursive(st.lists(actions, max_size=3), scopes, max_leaves=8)


@dataclass
class Nest:
    """Carries out a plan, and watches every fence in it."""

    events: list[CountedEvent] = field(default_factory=lambda: [CountedEvent() for _ in range(EVENTS)])
    manuals: list[Manual] = field(default_factory=list)
    watched: list[Fence] = field(default_factory=lambda: [Fence() for _ in range(EVENTS)])
    """Fences whose ends are triggers: entered around, inside or beside those who watch them, or never."""
    siblings: list[asyncio.Task[None]] = field(default_factory=list)
    inside: list[Fence] = field(default_factory=list)
    left: list[tuple[Fence, tuple[CancelReason, ...]]] = field(default_factory=list)
    refused: bool = False
    """A body has swallowed a cancellation that may have been somebody else's."""

    async def carry_out(self, plan: list[Plan]) -> None:
        for step in plan:
            match step:
                case ("sleep", seconds):
                    await self.sleep(seconds)
                case ("set", number):
                    self.events[number].set()
                case ("clear", number):
                    self.events[number].clear()
                case ("cancel innermost",):
                    if self.inside:
                        self.inside[-1].cancel()
                case ("cancel outermost from a thread",):
                    if self.inside:
                        thread = threading.Thread(target=self.inside[0].cancel)
                        thread.start()
                        thread.join()
                case ("beside", number, seconds):
                    self.siblings.append(asyncio.create_task(self.beside(self.watched[number], seconds)))
                case ("raise",):
                    raise ValueError("boom")
                case ("fence", triggers, ending, body):
                    await self.fenced(Fence(*(self.trigger(*trigger) for trigger in triggers)), ending, body)
                case ("watched fence", number, ending, body):
                    if not self.watched[number]._entered:
                        await self.fenced(self.watched[number], ending, body)
                case (_, seconds, body):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(seconds):
                            await self.carry_out(body)

    async def sleep(self, seconds: int) -> None:
        has_to_stop = any(fence.cancelled for fence in self.inside) and not self.refused
        await asyncio.sleep(seconds)
        assert not has_to_stop, "an await came back in a fence that had a reason"

    async def beside(self, fence: Fence, seconds: int) -> None:
        if not fence._entered:
            with fence:
                await asyncio.sleep(seconds)

    async def fenced(self, fence: Fence, ending: str, body: list[Plan]) -> None:
        try:
            with fence:
                self.inside.append(fence)
                try:
                    await self.carry_out(body)
                except asyncio.CancelledError:
                    if ending == "clean up":
                        await asyncio.sleep(1)
                    if ending == "uncancel":
                        this_task().uncancel()
                    if ending in ("let go", "clean up"):
                        raise
                    self.refused = True
        finally:
            self.inside.pop()
            self.left.append((fence, fence.reasons))

    def trigger(self, kind: str, argument: Any) -> Any:
        if kind == "timeout":
            return TimeoutTrigger(argument)
        if kind == "event":
            return EventTrigger(self.events[argument])
        if kind == "deadline":
            return DeadlineTrigger(asyncio.get_running_loop().time() + argument)
        if kind == "end":
            return EndTrigger(self.watched[argument])
        self.manuals.append(Manual(fired=argument))
        return self.manuals[-1]


def words(plan: Any) -> set[str]:
    """All that occurs in a plan."""
    if isinstance(plan, (list, tuple)):
        return set().union(*map(words, plan))
    return {str(plan)}


@settings(max_examples=300, deadline=None)
@given(plan=plans, cancel_at=st.none() | times)
def test_random_triggers_in_random_nestings_leave_everything_balanced(plan: list[Plan], cancel_at: int | None) -> None:
    if "uncancel" in words(plan):
        cancel_at = None  # which of two requests the body takes back is then for nobody to say
    loop = LeapingLoop()

    async def main() -> None:
        nest = Nest()
        task = asyncio.create_task(nest.carry_out(plan))
        requested: list[bool] = []
        stranger = loop.call_at(math.inf if cancel_at is None else cancel_at, lambda: requested.append(task.cancel()))
        await asyncio.wait([task])
        if nest.siblings:
            await asyncio.wait(nest.siblings)
            assert all(sibling.cancelling() == 0 and not sibling.cancelled() for sibling in nest.siblings)
        stranger.cancel()
        await turns()

        assert task.cancelling() == sum(requested)
        if not any(requested):
            assert not task.cancelled(), "a fence let its own cancellation out"
        elif not words(plan) & {"swallow", "raise"}:
            assert task.cancelled(), "a fence swallowed the cancellation of a stranger"
        if not task.cancelled():
            assert isinstance(task.exception(), ValueError | None)
        assert [event.waiting for event in nest.events] == [0] * EVENTS
        assert [manual.armed for manual in nest.manuals] == [[]] * len(nest.manuals)
        assert [fence.ending._watchers for fence in nest.watched] == [{}] * EVENTS
        assert [fence.reasons for fence, _ in nest.left] == [reasons for _, reasons in nest.left]
        assert loop.live_timers() == 0
        assert asyncio.all_tasks() == {this_task()}
        assert get_current_reasons() == ()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())
