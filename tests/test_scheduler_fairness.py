"""The bound of fairness: how often a pipeline that waits is passed over, whatever else happens.

The rule kept here: the bound is counted from outside, by what was admitted, and not by what the queue counts itself.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from random import Random

import pytest
from helpers import LIMIT, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from staging import Latch, Work, submit

from pipeline.scheduler import Scheduler, StagedPipeline
from pipeline.scheduler.amounts import as_capacity
from pipeline.scheduler.claim import Claim, Group, Phase
from pipeline.scheduler.engine import Engine

GROUPS = 6


class Counter:
    """Plays commands, and counts for each group that waits how many of others were admitted since it was served."""

    def __init__(self, fairness: int) -> None:
        self.fairness = fairness
        self.engine = Engine(as_capacity({"cpu": 3}), threads=10, fairness=fairness)
        self.groups = [Group(number, f"g{number}") for number in range(GROUPS)]
        self.held: list[Claim] = []
        self.waiting: list[Claim] = []
        self.passed: dict[Group, int] = {}
        self.before: dict[Group, int] = {}
        """Groups that waited already when it began to, or was served: each may go before it once more."""
        self.number = 0
        self.longest = 0

    def submit(self, group: int, stage: int, priority: int, cpu: int) -> None:
        self.number += 1
        owner = self.groups[group]
        claim = Work(owner, (("cpu", cpu),), (-priority, -stage, group, self.number))
        if owner not in self.passed:
            self._starts(owner)
        self.waiting.append(claim)
        if self.engine.submit(claim):
            self._admitted(claim)
        self._admit()

    def end(self, which: int) -> None:
        if self.held:
            self.engine.drop(self.held.pop(which % len(self.held)))
            self._admit()

    def withdraw(self, which: int) -> None:
        if self.waiting:
            claim = self.waiting.pop(which % len(self.waiting))
            self.engine.drop(claim)
            self._leaves(claim.group)
            self._admit()

    def _admit(self) -> None:
        for claim in self.engine.admit():
            self._admitted(claim)

    def _admitted(self, claim: Claim) -> None:
        assert claim.phase is Phase.HELD
        self.waiting.remove(claim)
        self.held.append(claim)
        for group in self.passed:
            if group is not claim.group:
                self.passed[group] += 1
                self.longest = max(self.longest, self.passed[group])
                assert self.passed[group] <= self.fairness + self.before[group]
        if self._leaves(claim.group):
            self._starts(claim.group)

    def _starts(self, group: Group) -> None:
        self.passed.pop(group, None)
        self.before[group] = len(self.passed)
        self.passed[group] = 0

    def _leaves(self, group: Group) -> bool:
        if any(claim.group is group for claim in self.waiting):
            return True
        self.passed.pop(group, None)
        return False


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.randoms(use_true_random=True))
def test_nobody_is_passed_over_more_often_than_the_bound_says(fairness: int, random: Random) -> None:
    counter = Counter(fairness)
    for _ in range(120):
        match random.choice(("submit", "submit", "end", "withdraw")):
            case "submit":
                counter.submit(random.randrange(GROUPS), random.randrange(4), random.randrange(2), random.randint(1, 3))
            case "end":
                counter.end(random.randrange(9))
            case _:
                counter.withdraw(random.randrange(99))
    while counter.held:
        counter.end(0)
    assert counter.waiting == []


def test_the_bound_is_reached() -> None:
    counter = Counter(3)
    *others, late, favourite = range(GROUPS)
    counter.submit(favourite, 0, 0, 3)
    for group in (*others, late):
        counter.submit(group, 0, 0, 3)
    for _ in range(3 + len(others)):
        counter.submit(favourite, 3, 0, 3)
        counter.end(0)
    assert counter.longest == 3 + len(others)
    counter.end(0)
    assert [claim.group for claim in counter.held] == [counter.groups[late]]


@pytest.mark.parametrize("kind", ["reservation", "task"])
async def test_who_is_overdue_by_one_that_holds_at_once_begins_at_once(kind: str) -> None:
    latch = Latch()
    with Scheduler(resources={"cpu": 4}, fairness=1) as scheduler:
        async with AsyncExitStack() as held:
            early = scheduler.reserve(cpu=3)
            await early.__aenter__()
            await held.enter_async_context(scheduler.reserve(cpu=1))
            waiters: list[asyncio.Task[None]] = []
            for name, options in {"passed over": {"cpu": 2}, "large": {"cpu": 4, "stage": 1}}.items():
                waiters.append(asyncio.create_task(_hold(scheduler, name, options)))
                await eventually(lambda: scheduler.snapshot().waiting == len(waiters))
            await early.__aexit__()
            assert [row.name for row in scheduler.snapshot().blocked] == ["large", "passed over"]
            if kind == "reservation":
                await held.enter_async_context(scheduler.reserve(cpu=1, stage=2))
            else:
                handle = submit(scheduler, lambda pipeline: _later(pipeline, latch))
                await asyncio.to_thread(handle.result, LIMIT)
            assert [row.name for row in scheduler.snapshot().blocked] == ["large"]
            latch.let_go.set()
        await asyncio.wait(waiters)


async def _hold(scheduler: Scheduler, name: str, options: dict[str, int]) -> None:
    async with scheduler.reserve(name=name, **options):
        await asyncio.sleep(0)


def _later(pipeline: StagedPipeline, latch: Latch) -> None:
    pipeline.stage_forward()
    pipeline.stage_forward()
    pipeline.task(latch, resources={"cpu": 1}).run()
