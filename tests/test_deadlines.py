"""Deadlines and memory: limits that are looked at. When they fire, when they are looked at again, what is left."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import pytest
import uvloop
from helpers import LIMIT, Heard, LeapingLoop, turns

from pipeline import CancelType, DeadlineTrigger, Fence, MemoryTrigger, Pipeline, Trigger
from pipeline.cancellation import memory, triggers
from stages import stage

MIB = 1 << 20


async def forever() -> None:
    await asyncio.Event().wait()


def leaping(main: Callable[[LeapingLoop], Coroutine[Any, Any, None]]) -> None:
    """Run on a loop whose clock jumps to the next timer; at the end no timer may be alive."""
    loop = LeapingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main(loop))
        assert loop.live_timers() == 0


# --- a time of the loop's clock


def test_a_deadline_fires_at_its_moment_and_not_before() -> None:
    async def main(loop: LeapingLoop) -> None:
        for when in (0.5, 59.9, 60.0, 60.1, 3600.0, 1e5):
            with Fence(DeadlineTrigger(when, code="late")) as fence:
                await forever()
            assert loop.time() == pytest.approx(when)
            assert fence.cancelled_by("late")
            assert fence.reasons[0].cancel_type is CancelType.TIMEOUT

    leaping(main)


def test_one_deadline_bounds_many_scopes_and_what_is_left_shrinks() -> None:
    async def main(loop: LeapingLoop) -> None:
        deadline = DeadlineTrigger(loop.time() + 3)
        for left in (3, 2, 1):
            assert deadline.left() == pytest.approx(left)
            with Fence(deadline) as fence:
                await asyncio.sleep(1)
            assert not fence.cancelled or left == 1
        with Fence(deadline) as fence:
            await forever()
        assert fence.cancelled_caught
        assert deadline.left() <= 0

    leaping(main)


def test_a_deadline_that_has_passed_has_fired_already() -> None:
    async def main(loop: LeapingLoop) -> None:
        await asyncio.sleep(5)
        for when in (5, 4.9, 0, -1, -math.inf):
            reason = DeadlineTrigger(when, code="late").check()
            assert reason is not None
            assert reason.message.startswith("the deadline has passed: ")
            heard = Heard()
            DeadlineTrigger(when).arm(heard)  # by somebody who does not look first
            await heard.next()

    leaping(main)


def test_never_is_infinity_and_takes_no_timer() -> None:
    async def main(loop: LeapingLoop) -> None:
        with Fence(DeadlineTrigger(math.inf)) as fence:
            await turns()
            assert loop.live_timers() == 0
        assert not fence.cancelled

    leaping(main)


@pytest.mark.parametrize("spent", [0, 1, 61])
def test_disarming_a_deadline_leaves_no_timer_whenever_it_comes(spent: int) -> None:
    async def main(loop: LeapingLoop) -> None:
        heard = Heard()
        handle = DeadlineTrigger(1000).arm(heard)
        await asyncio.sleep(spent)
        handle.disarm()
        handle.disarm()
        assert loop.live_timers() == 0
        await asyncio.sleep(2000)
        assert heard.reasons == []

    leaping(main)


def test_a_deadline_disarmed_by_its_own_callback_stays_quiet() -> None:
    async def main(loop: LeapingLoop) -> None:
        heard: list[Any] = []
        handle = DeadlineTrigger(1).arm(lambda reason: (heard.append(reason), handle.disarm()))
        await asyncio.sleep(100)
        assert len(heard) == 1

    leaping(main)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_deadline_fires_on_a_real_clock(factory: Callable[[], Any]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        when = loop.time() + 0.02
        with Fence(DeadlineTrigger(when)) as fence:
            await asyncio.wait_for(forever(), LIMIT)
        assert fence.cancelled_caught
        assert loop.time() >= when
        with Fence(DeadlineTrigger(datetime.now(UTC) + timedelta(seconds=0.02))) as fence:
            await asyncio.wait_for(forever(), LIMIT)
        assert fence.cancelled_caught

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


# --- a date


class _AnyDatetime(type):
    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, datetime)


class Wall(metaclass=_AnyDatetime):
    """Stands for `datetime`: the computer's clock, which goes with the loop's, and can be set."""

    loop: LeapingLoop
    start = datetime(2030, 1, 1, tzinfo=UTC)

    @classmethod
    def now(cls, zone: tzinfo) -> datetime:
        return (cls.start + timedelta(seconds=cls.loop.time())).astimezone(zone)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> type[Wall]:
    monkeypatch.setattr(triggers, "datetime", Wall)
    monkeypatch.setattr(Wall, "start", Wall.start)
    return Wall


def test_a_date_fires_at_its_moment_in_any_time_zone(wall: type[Wall]) -> None:
    async def main(loop: LeapingLoop) -> None:
        wall.loop = loop
        for seconds, hours in ((90, 0), (150, 5), (3600, -8)):
            when = (wall.start + timedelta(seconds=seconds)).astimezone(timezone(timedelta(hours=hours)))
            with Fence(DeadlineTrigger(when)) as fence:
                await forever()
            assert loop.time() == pytest.approx(seconds)
            assert f"{when:%H:%M:%S}" in fence.reasons[0].message

    leaping(main)


def test_a_clock_that_is_set_forward_is_noticed_within_a_minute(wall: type[Wall]) -> None:
    async def main(loop: LeapingLoop) -> None:
        wall.loop = loop
        loop.call_later(100, lambda: setattr(wall, "start", wall.start + timedelta(hours=2)))
        with Fence(DeadlineTrigger(wall.start + timedelta(hours=1))) as fence:
            await forever()
        assert fence.cancelled_caught
        assert 100 <= loop.time() <= 160

    leaping(main)


def test_a_clock_that_is_set_back_does_not_fire_early(wall: type[Wall]) -> None:
    async def main(loop: LeapingLoop) -> None:
        wall.loop = loop
        when = wall.start + timedelta(seconds=90)
        loop.call_later(80, lambda: setattr(wall, "start", wall.start - timedelta(seconds=600)))
        with Fence(DeadlineTrigger(when)):
            await forever()
        assert loop.time() == pytest.approx(690)

    leaping(main)


def test_the_last_and_the_first_date_that_there_are_will_do() -> None:
    assert DeadlineTrigger(datetime.max.replace(tzinfo=UTC)).check() is None
    assert DeadlineTrigger(datetime.min.replace(tzinfo=UTC)).check() is not None


class _NoOffset(tzinfo):
    def utcoffset(self, moment: datetime | None) -> None:
        return None


@pytest.mark.parametrize("when", [datetime(2030, 1, 1), datetime(2030, 1, 1, tzinfo=_NoOffset())], ids=["naive", "no offset"])
def test_a_date_without_a_time_zone_is_a_type_error(when: datetime) -> None:
    with pytest.raises(TypeError, match="time zone"):
        DeadlineTrigger(when)


@pytest.mark.parametrize("when", ["12:00", None, True, 1j, timedelta(seconds=1), datetime.now(UTC).date()], ids=repr)
def test_something_that_is_no_moment_is_a_type_error(when: Any) -> None:
    with pytest.raises(TypeError, match="loop's clock or a datetime"):
        DeadlineTrigger(when)


def test_a_time_since_the_epoch_and_nan_are_value_errors_that_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"datetime\.fromtimestamp\(seconds, UTC\)"):
        DeadlineTrigger(time.time() + 5)
    with pytest.raises(ValueError, match="moment"):
        DeadlineTrigger(math.nan)


def test_a_deadline_outside_a_loop_can_be_asked_only_if_it_is_a_date() -> None:
    assert isinstance(DeadlineTrigger(1), Trigger)
    with pytest.raises(RuntimeError, match="no running event loop"):
        DeadlineTrigger(1).check()
    with pytest.raises(RuntimeError, match="no running event loop"):
        DeadlineTrigger(datetime.now(UTC)).arm(lambda reason: None)


# --- memory


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What this process holds, in MiB, for the trigger to read."""
    amount = {"MiB": 10, "looks": 0}

    def resident(*, workers: bool) -> int:
        amount["looks"] += 1
        return amount["MiB"] * MIB

    monkeypatch.setattr(memory, "_resident", resident)
    return amount


def test_memory_above_the_limit_fires_at_the_next_look(held: dict[str, int]) -> None:
    async def main(loop: LeapingLoop) -> None:
        loop.call_later(3.1, held.update, {"MiB": 101})
        with Fence(MemoryTrigger(100 * MIB, interval=0.5, code="memory")) as fence:
            await forever()
        assert fence.cancelled_by("memory")
        assert loop.time() == pytest.approx(3.5)
        assert fence.reasons[0].message == "this process holds 101 MiB of memory, above the limit of 100 MiB"
        assert fence.reasons[0].cancel_type is CancelType.MEMORY

    leaping(main)


def test_memory_at_the_limit_is_not_above_it_and_a_peak_between_two_looks_is_not_seen(held: dict[str, int]) -> None:
    async def main(loop: LeapingLoop) -> None:
        held["MiB"] = 100
        with Fence(MemoryTrigger(100 * MIB, interval=1)) as fence:
            await asyncio.sleep(1.2)
            held["MiB"] = 500
            await asyncio.sleep(0.5)
            held["MiB"] = 100
            await asyncio.sleep(5)
        assert not fence.cancelled

    leaping(main)


def test_memory_above_the_limit_at_the_start_has_fired_already_and_more_units_are_told(held: dict[str, int]) -> None:
    held["MiB"] = 3072
    reason = MemoryTrigger(1536 * MIB, workers=True).check()
    assert reason is not None
    assert str(reason) == "this process and its workers hold 3.00 GiB of memory, above the limit of 1.50 GiB"


def test_disarming_ends_the_looks(held: dict[str, int]) -> None:
    async def main(loop: LeapingLoop) -> None:
        heard = Heard()
        handle = MemoryTrigger(100 * MIB, interval=1).arm(heard)
        await asyncio.sleep(3.5)
        handle.disarm()
        handle.disarm()
        assert loop.live_timers() == 0
        looks, held["MiB"] = held["looks"], 500
        await asyncio.sleep(10)
        assert (held["looks"], heard.reasons) == (looks, [])

    leaping(main)


def test_memory_fires_once(held: dict[str, int]) -> None:
    async def main(loop: LeapingLoop) -> None:
        heard = Heard()
        handle = MemoryTrigger(100 * MIB, interval=1).arm(heard)
        held["MiB"] = 500
        await asyncio.sleep(10)
        assert len(heard.reasons) == 1
        handle.disarm()

    leaping(main)


def test_the_memory_of_this_process_and_its_children_is_read() -> None:
    alone = memory._resident(workers=False)
    assert 5 * MIB < alone < 64 * 1024 * MIB
    assert memory._resident(workers=True) >= alone // 2


async def test_memory_that_a_handler_takes_stops_its_run() -> None:
    held: list[bytearray] = []

    async def work(item: int) -> None:
        held.append(bytearray(b"x") * (4 * MIB))
        await asyncio.sleep(0)

    limit = memory._resident(workers=False) + 64 * MIB
    pipeline = Pipeline(range(10_000), cancel_on=MemoryTrigger(limit, interval=0.001, code="memory")) >> stage(work)
    await pipeline.run()
    held.clear()
    report = pipeline.report
    assert report is not None
    assert [reason.code for reason in report.reasons] == ["memory"]


@pytest.mark.parametrize(
    ("limit", "options", "error"),
    [
        ("1G", {}, TypeError),
        (True, {}, TypeError),
        (math.inf, {}, ValueError),
        (math.nan, {}, ValueError),
        (512, {}, ValueError),
        (100 * MIB, {"interval": 0}, ValueError),
        (100 * MIB, {"interval": -1}, ValueError),
        (100 * MIB, {"interval": "1"}, TypeError),
    ],
)
def test_numbers_that_make_no_sense_are_refused(limit: Any, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="MemoryTrigger needs"):
        MemoryTrigger(limit, **options)


def test_without_psutil_the_trigger_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r"pip install 'penstock\[memory\]'"):
        MemoryTrigger(100 * MIB)
