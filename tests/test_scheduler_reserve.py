"""Reservations in event loops: waiting, being cancelled at any moment, several loops and threads at once.

The rule kept here: after every test all resources are free and nobody waits; `idle` says so.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from decimal import Decimal
from typing import Any

import pytest
from helpers import LIMIT, eventually, turns
from staging import Latch, submit

from pipeline.scheduler import Scheduler, UnknownResourceError, UnschedulableTaskError


def idle(scheduler: Scheduler) -> bool:
    snapshot = scheduler.snapshot()
    return not snapshot.waiting and not snapshot.running and all(row.free == row.capacity for row in snapshot.resources)


@pytest.fixture
def scheduler() -> Any:
    with Scheduler(resources={"cpu": 2, "mem": 0.3}, task_parallelism=2) as scheduler:
        yield scheduler
        assert idle(scheduler)


async def test_what_is_free_is_had_without_going_round_the_loop(scheduler: Scheduler) -> None:
    passed: list[str] = []
    asyncio.get_running_loop().call_soon(passed.append, "round")
    async with scheduler.reserve(cpu=2, mem=0.1):
        assert passed == []
        assert scheduler.snapshot().resource("cpu").in_use == 2
    assert scheduler.snapshot().resource("cpu").free == 2


async def test_a_block_that_raises_gives_back_what_it_held(scheduler: Scheduler) -> None:
    with pytest.raises(LookupError):
        async with scheduler.reserve(cpu=2):
            raise LookupError
    async with scheduler.reserve({"cpu": 2}):
        pass


async def test_those_who_wait_come_in_order_and_nobody_passes_the_first(scheduler: Scheduler) -> None:
    order: list[str] = []

    async def use(name: str, **options: Any) -> None:
        async with scheduler.reserve(name=name, **options):
            order.append(name)
            await turns()

    async with asyncio.TaskGroup() as group:
        async with scheduler.reserve(cpu=1):
            for name, options in {
                "large": {"cpu": 2},
                "small": {"cpu": 0.5},
                "later stage": {"cpu": 2, "stage": 3},
                "urgent": {"cpu": 2, "priority": 1},
            }.items():
                group.create_task(use(name, **options))
            await eventually(lambda: scheduler.snapshot().waiting == 4)
            assert [row.name for row in scheduler.snapshot().blocked] == ["urgent", "later stage", "large", "small"]
            assert order == []
    assert order == ["urgent", "later stage", "large", "small"]


async def test_a_cancelled_waiter_leaves_the_queue_and_those_behind_it_move_up(scheduler: Scheduler) -> None:
    async with scheduler.reserve(cpu=1):
        large = asyncio.create_task(_use(scheduler, cpu=2))
        small = asyncio.create_task(_use(scheduler, cpu=1))
        await eventually(lambda: scheduler.snapshot().waiting == 2)
        large.cancel()
        await small
        assert large.cancelled()


async def _use(scheduler: Scheduler, rounds: int = 1, **amounts: Any) -> None:
    async with scheduler.reserve(**amounts):
        await turns(rounds)


async def test_a_waiter_cancelled_at_the_very_moment_of_its_grant_gives_it_back(scheduler: Scheduler) -> None:
    for grant_first in (True, False):
        holder = scheduler.reserve(cpu=2)
        await holder.__aenter__()
        waiter = asyncio.create_task(_use(scheduler, cpu=2))
        await eventually(lambda: scheduler.snapshot().waiting == 1)
        if not grant_first:
            waiter.cancel()
        await holder.__aexit__()  # granted to the waiter, which has not run since
        assert scheduler.snapshot().resource("cpu").in_use == 2
        if grant_first:
            waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert idle(scheduler)


async def test_waiting_has_a_limit_and_its_error_says_who_has_it(scheduler: Scheduler) -> None:
    async with scheduler.reserve(cpu=1.5, name="the first"):
        with pytest.raises(TimeoutError, match=r"needs 1 cpu, 0\.5 free, held by the first \(1\.5\)"):
            async with scheduler.reserve(cpu=1, timeout=0.001):
                raise AssertionError("not possible")
        with pytest.raises(TimeoutError, match="within 0.001 s"):
            await scheduler.reserve(cpu=1, timeout=Decimal("0.001")).__aenter__()
        async with scheduler.reserve(cpu=0.5, timeout=0):
            pass


async def test_what_can_never_be_is_refused_when_it_is_asked_for(scheduler: Scheduler) -> None:
    for amounts, error in (({"gpu": 1}, UnknownResourceError), ({"cpu": 2.1}, UnschedulableTaskError), ({"cpu": -1}, ValueError)):
        with pytest.raises(error):
            scheduler.reserve(**amounts)
    with pytest.raises(ValueError, match="timeout is a number"):
        scheduler.reserve(cpu=1, timeout=-1)


@pytest.mark.parametrize(
    ("given", "options", "error", "text"),
    [
        ([("cpu", 1)], {}, TypeError, "resources is a mapping"),
        ("cpu", {"mem": 0.1}, TypeError, "resources is a mapping"),
        ({"cpu": 1}, {"cpu": 2}, ValueError, "'cpu' is given twice"),
        ({"cpu": 1}, {"priority": "high"}, ValueError, "priority is a whole number"),
        ({"cpu": 1}, {"priority": float("nan")}, ValueError, "priority is a whole number"),
        ({"cpu": 1}, {"stage": 0.5}, ValueError, "stage is a whole number"),
        ({"cpu": 1}, {"name": 3}, TypeError, "name is a text"),
    ],
)
def test_a_reservation_is_checked_when_it_is_asked_for(
    scheduler: Scheduler, given: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        scheduler.reserve(given, **options)


async def test_a_mapping_and_names_go_together(scheduler: Scheduler) -> None:
    async with scheduler.reserve({"mem": 0.1}, cpu=1):
        assert [row.in_use for row in scheduler.snapshot().resources] == [1, 0.1]


async def test_a_reservation_is_for_one_block(scheduler: Scheduler) -> None:
    reservation = scheduler.reserve(cpu=1)
    async with reservation:
        pass
    with pytest.raises(RuntimeError, match="call reserve"):
        async with reservation:
            pass


async def test_after_a_shutdown_nothing_new_is_reserved_and_what_is_held_stays() -> None:
    scheduler = Scheduler(resources={"cpu": 2})
    async with scheduler.reserve(cpu=1):
        scheduler.close()
        with pytest.raises(RuntimeError, match="shutting down"):
            async with scheduler.reserve(cpu=1):
                pass
        assert scheduler.snapshot().resource("cpu").in_use == 1
    assert idle(scheduler)


async def test_tasks_and_reservations_take_from_the_same(scheduler: Scheduler) -> None:
    latch = Latch()
    handle = submit(scheduler, lambda pipeline: pipeline.task(latch, resources={"cpu": 2}).run().result())
    await asyncio.to_thread(latch.wait_begun)
    waiter = asyncio.create_task(_use(scheduler, cpu=1))
    await eventually(lambda: scheduler.snapshot().waiting == 1)
    latch.let_go.set()
    await waiter
    assert await asyncio.to_thread(handle.result, LIMIT) is None


def test_a_waiter_whose_loop_was_closed_is_passed_over() -> None:
    scheduler = Scheduler(resources={"cpu": 1})

    async def hold_and_wait() -> Any:
        holder = scheduler.reserve(cpu=1)
        await holder.__aenter__()
        waiting = scheduler.reserve(cpu=1).__aenter__()
        waiting.send(None)  # as the loop does; nobody will come back to it
        return holder, waiting

    loop = asyncio.new_event_loop()
    holder, waiting = loop.run_until_complete(hold_and_wait())
    loop.close()
    assert scheduler.snapshot().waiting == 1
    with pytest.raises(StopIteration):
        holder.__aexit__().send(None)
    assert idle(scheduler)
    waiting.close()
    assert idle(scheduler)


def test_a_coroutine_that_is_thrown_away_gives_back_what_it_held_also_while_the_scheduler_is_busy() -> None:
    scheduler = Scheduler(resources={"cpu": 1})

    async def hold() -> None:
        async with scheduler.reserve(cpu=1):
            await asyncio.get_running_loop().create_future()

    async def begin() -> Any:
        coroutine = hold()
        coroutine.send(None)
        return coroutine

    coroutine = asyncio.run(begin())
    with scheduler.turn, scheduler.turn.lock:  # as when the collector runs in the middle of something
        del coroutine
        gc.collect()
        assert scheduler.engine.free["cpu"] == 0
    assert idle(scheduler)


@pytest.mark.parametrize("seed", range(5))
def test_random_cancels_in_several_loops_and_threads_leave_nothing_held(seed: int) -> None:
    scheduler = Scheduler(resources={"cpu": 3, "mem": 0.3}, task_parallelism=2)
    in_use, lock, over = [0.0], threading.Lock(), []

    async def use(generator: random.Random) -> None:
        amount = generator.choice([0.5, 1, 2, 3])
        async with scheduler.reserve(cpu=amount, mem=generator.choice([0, 0.1, 0.3]), stage=generator.randrange(3)):
            with lock:
                in_use[0] += amount
                over.append(in_use[0] > 3)
            try:
                await turns(generator.randrange(3))
            finally:
                with lock:
                    in_use[0] -= amount

    async def churn(generator: random.Random) -> None:
        tasks = []
        for _ in range(150):
            tasks.append(asyncio.create_task(use(generator)))
            await turns(generator.randrange(2))
            generator.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    threads = [threading.Thread(target=asyncio.run, args=(churn(random.Random(10 * seed + n)),)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert over
    assert not any(over)
    assert idle(scheduler)
