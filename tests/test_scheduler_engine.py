"""The engine of the scheduler against a plain model, and what it costs.

The rule kept here: the model is as simple as can be (a sorted list, exact fractions, a loop), and after every command
both have admitted the same work in the same order and have the same left.
"""

from __future__ import annotations

import sys
import weakref
from decimal import Decimal
from fractions import Fraction
from threading import get_ident
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from staging import Body, Work

from pipeline.scheduler import Scheduler
from pipeline.scheduler.amounts import as_capacity, as_needs, check_needs, plain
from pipeline.scheduler.claim import Claim, Group, Phase
from pipeline.scheduler.engine import Engine
from pipeline.scheduler.handles import PipelineHandle, State, TaskHandle

# --- engine and model


class Model:
    """The rules of admission, as plainly as they can be written."""

    def __init__(self, capacity: dict[str, Fraction], threads: int, fairness: int | None) -> None:
        self.free, self.threads, self.fairness = dict(capacity), threads, fairness
        self.waiting: list[tuple[Any, ...]] = []
        self.held: dict[int, tuple[Any, ...]] = {}
        self.admissions = 0
        self.since: dict[int, int] = {}
        """By group: admissions when it was served, or began to wait; in that order."""

    def submit(self, work: tuple[Any, ...]) -> list[int]:
        self.waiting.append(work)
        if self._group(work) not in self.since:
            self.since[self._group(work)] = self.admissions
        return self.admit()

    def drop(self, number: int) -> list[int]:
        if number in self.held:
            _, needs, threaded = self.held.pop(number)
            for label, amount in needs.items():
                self.free[label] += amount
            self.threads += threaded
        else:
            work = next(work for work in self.waiting if work[0][3] == number)
            self._leave(work)
        return self.admit()

    def admit(self) -> list[int]:
        admitted: list[int] = []
        while self.waiting:
            work = self._next()
            key, needs, threaded = work
            if any(amount > self.free[label] for label, amount in needs.items()) or threaded > self.threads:
                break
            for label, amount in needs.items():
                self.free[label] -= amount
            self.threads -= threaded
            self.held[key[3]] = work
            admitted.append(key[3])
            self.admissions += 1
            self._leave(work)
            group = self._group(work)
            if group in self.since:
                del self.since[group]
                self.since[group] = self.admissions
        return admitted

    def _next(self) -> tuple[Any, ...]:
        best = min(self.waiting)
        if self.fairness is not None:
            longest, since = next(iter(self.since.items()))
            if self.admissions - since >= self.fairness:
                best = min(work for work in self.waiting if self._group(work) == longest)
        return best

    def _leave(self, work: tuple[Any, ...]) -> None:
        self.waiting.remove(work)
        if not any(self._group(other) == self._group(work) for other in self.waiting):
            del self.since[self._group(work)]

    @staticmethod
    def _group(work: tuple[Any, ...]) -> int:
        return work[0][2]


class EngineMachine(RuleBasedStateMachine):
    """Random submissions, ends and withdrawals, given to both."""

    @initialize(
        capacity=st.dictionaries(st.sampled_from("abc"), st.sampled_from([1, 0.3, 2.5, Decimal("0.7")]), min_size=1),
        threads=st.integers(1, 4),
        fairness=st.none() | st.integers(1, 4),
    )
    def begin(self, capacity: dict[str, Any], threads: int, fairness: int | None) -> None:
        self.capacity = as_capacity(capacity)
        self.engine = Engine(self.capacity, threads, fairness)
        self.model = Model({label: Fraction(amount) for label, amount in self.capacity.items()}, threads, fairness)
        self.groups = [Group(number, f"group-{number}") for number in range(3)]
        self.claims: dict[int, Claim] = {}
        self.count = 0

    @rule(
        data=st.data(),
        group=st.integers(0, 2),
        stage=st.integers(0, 3),
        priority=st.integers(0, 9).map(lambda n: int(n == 9)),
        threaded=st.booleans(),
    )
    def submit(self, data: st.DataObject, group: int, stage: int, priority: int, threaded: bool) -> None:
        shares = st.sampled_from([0, Fraction(1, 10), Fraction(1, 3), Fraction(1, 2), 1])
        labels = data.draw(st.lists(st.sampled_from(sorted(self.capacity)), unique=True))
        wanted = {label: data.draw(shares) * self.capacity[label] for label in labels}
        self.count += 1
        key = (-priority, -stage, group, self.count)
        needs = check_needs(as_needs(wanted), self.capacity, "work")
        claim = Work(self.groups[group], needs, key, threaded=threaded)
        self.claims[self.count] = claim
        at_once = [self.count] if self.engine.submit(claim) else []
        assert at_once + self._admitted() == self.model.submit((key, {label: Fraction(amount) for label, amount in needs}, int(threaded)))

    @precondition(lambda self: getattr(self, "claims", None))
    @rule(data=st.data(), at_once=st.booleans())
    def end(self, data: st.DataObject, at_once: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.claims)))
        claim = self.claims.pop(number)
        if at_once:
            admitted = [claim.key[3] for claim in self.engine.hand_over(claim)]
            assert self._admitted() == []
        else:
            assert self.engine.drop(claim)
            admitted = self._admitted()
        assert not self.engine.drop(claim)
        assert admitted == self.model.drop(number)

    def _admitted(self) -> list[int]:
        return [claim.key[3] for claim in self.engine.admit()]

    @invariant()
    def the_same(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, model = self.engine, self.model
        assert engine.free == model.free
        assert engine.free_threads == model.threads
        assert [claim.key[3] for claim in engine.holding] == list(model.held)
        assert sorted(claim.key for claim in engine.queue) == sorted(work[0] for work in model.waiting)
        assert engine.queue.live == len(model.waiting)
        head = engine.queue.head()
        assert (head and head.key) == (model._next()[0] if model.waiting else None)
        for label, amount in engine.capacity.items():
            held = sum(need for claim in engine.holding for of, need in claim.needs if of == label)
            assert engine.free[label] + held == amount


class SchedulerMachine(RuleBasedStateMachine):
    """The same commands to a real scheduler's front; its threads are played by the machine, so all is deterministic."""

    @initialize(threads=st.integers(1, 3), fairness=st.none() | st.integers(1, 3))
    def begin(self, threads: int, fairness: int | None) -> None:
        self.scheduler = Scheduler(resources={"cpu": 2, "mem": 0.3}, task_parallelism=threads, fairness=fairness)
        self.ready: list[Any] = []
        self.scheduler.workers.hire = lambda: None  # type: ignore[method-assign]
        self.scheduler.workers.put = self.ready.append  # type: ignore[method-assign]
        self.model = Model({"cpu": Fraction(2), "mem": Fraction(3, 10)}, threads, fairness)
        self.pipelines = [self._pipeline(number) for number in range(2)]
        self.tasks: dict[int, TaskHandle] = {}
        self.began: list[int] = []
        self.ended = {State.SUCCEEDED: 0, State.FAILED: 0, State.CANCELLED: 0}

    def _pipeline(self, number: int) -> Any:
        body = Body(lambda _: None)
        group = self.scheduler.new_group(f"p{number}")
        body._submission = PipelineHandle(self.scheduler, body, group, 0.0)
        body._submission.thread = get_ident()
        return body

    @rule(who=st.integers(0, 1), cpu=st.sampled_from([0, 0.5, 1, 2]), mem=st.sampled_from([0, 0.1, 0.2, 0.3]))
    def submit(self, who: int, cpu: float, mem: float) -> None:
        handle = self.pipelines[who].task(lambda: None, resources={"cpu": cpu, "mem": mem}).run()
        key = handle.key
        self.tasks[key[3]] = handle
        amounts = {"cpu": Fraction(cpu), "mem": Fraction(str(mem))}
        self._begin(self.model.submit((key, amounts, 1)))

    @rule(who=st.integers(0, 1))
    def forward(self, who: int) -> None:
        self.pipelines[who].stage_forward()

    @precondition(lambda self: getattr(self, "began", None))
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        number = data.draw(st.sampled_from(self.began))
        task = self.tasks.pop(number)
        self.began.remove(number)
        self.ready.remove(task)
        with self.scheduler.turn.lock:
            assert task.begin()
        task._task.fn = (lambda: 1 / 0) if fails else (lambda: number)
        assert not task.cancel()
        task.perform()
        with self.scheduler.turn.lock:
            task.end()
        self.ended[State.FAILED if fails else State.SUCCEEDED] += 1
        assert (task.exception(0) is None) is not fails
        self._begin(self.model.drop(number))

    @precondition(lambda self: getattr(self, "tasks", None))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tasks)))
        task = self.tasks.pop(number)
        assert task.cancel()
        self.ended[State.CANCELLED] += 1
        if number in self.began:
            self.began.remove(number)
            self.ready.remove(task)
        assert not task.begin()
        self._begin(self.model.drop(number))

    def _begin(self, admitted: list[int]) -> None:
        self.began += admitted
        assert [task.key[3] for task in self.ready] == self.began

    @invariant()
    def the_same(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        snapshot = self.scheduler.snapshot()
        assert [row.free for row in snapshot.resources] == [plain(amount) for amount in self.model.free.values()]
        assert len(snapshot.ready) == len(self.model.held)
        assert snapshot.waiting == len(snapshot.blocked) == len(self.model.waiting)
        totals = self.scheduler.totals
        assert [totals[f"{how} tasks"] for how in ("succeeded", "failed", "cancelled")] == list(self.ended.values())
        assert all(row.reason for row in snapshot.blocked)


for _machine in (EngineMachine, SchedulerMachine):
    _machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestEngine = EngineMachine.TestCase
TestScheduler = SchedulerMachine.TestCase


# --- order


def _engine(threads: int = 10**6, fairness: int | None = None, **capacity: Any) -> Engine:
    return Engine(as_capacity(capacity), threads, fairness)


def _claim(engine: Engine, group: Group, number: int, stage: int = 0, priority: int = 0, **needs: Any) -> Claim:
    key = (-priority, -stage, group.number, number)
    amounts = check_needs(as_needs(needs), engine.capacity, "work")
    return Work(group, amounts, key)


def test_a_higher_priority_goes_before_a_later_stage() -> None:
    engine, group = _engine(cpu=1), Group(1, "g")
    first = _claim(engine, group, 1, cpu=1)
    assert engine.submit(first)
    late = _claim(engine, group, 2, stage=9, cpu=1)
    urgent = _claim(engine, group, 3, priority=1, cpu=1)
    assert not engine.submit(late)
    assert not engine.submit(urgent)
    engine.drop(first)
    assert engine.admit() == [urgent]


def test_whoever_fits_beside_one_that_takes_over_begins_with_it() -> None:
    engine, group = _engine(cpu=3), Group(1, "g")
    claims = [_claim(engine, group, number, cpu=cpu) for number, cpu in enumerate((2, 2, 1, 2))]
    assert [engine.submit(claim) for claim in claims] == [True, False, False, False]
    assert engine.hand_over(claims[0]) == claims[1:3]
    assert engine.free["cpu"] == 0
    assert engine.hand_over(claims[1]) == claims[3:]
    assert list(engine.holding) == claims[2:]


def test_without_fairness_what_is_further_along_always_goes_first() -> None:
    engine, ahead, late = _engine(cpu=1), Group(1, "ahead"), Group(2, "late")
    running = _claim(engine, ahead, 1, stage=1, cpu=1)
    engine.submit(running)
    engine.submit(_claim(engine, late, 2, cpu=1))
    for number in range(3, 100):
        engine.submit(_claim(engine, ahead, number, stage=1, cpu=1))
        engine.drop(running)
        (running,) = engine.admit()
        assert running.group is ahead


# --- cost


def _lines_run(work: Any) -> int:
    """Lines of Python that it takes: the same on every machine, however busy that is."""
    lines = 0

    def count(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("fairness", [None, 10])
def test_an_admission_costs_the_same_with_a_hundred_and_with_a_hundred_thousand_waiting(fairness: int | None) -> None:
    costs = []
    for waiting in (100, 100_000):
        engine, groups = _engine(cpu=1, fairness=fairness), [Group(number, "g") for number in range(10)]
        running = _claim(engine, groups[0], 0, cpu=1)
        engine.submit(running)
        for number in range(1, waiting + 1):
            engine.submit(_claim(engine, groups[number % 10], number, stage=number % 7, cpu=1))
        claims = [running]
        extra = [_claim(engine, groups[0], waiting + number, stage=3, cpu=1) for number in range(1, 51)]
        gone = extra[::2]

        def work(engine: Engine = engine, claims: list[Claim] = claims, extra: list[Claim] = extra, gone: list[Claim] = gone) -> None:
            for claim in extra:
                engine.submit(claim)
            for claim in gone:
                engine.drop(claim)
            for _ in range(50):
                engine.drop(claims[-1])
                claims += engine.admit()

        costs.append(_lines_run(work))
        assert len(claims) == 51
    assert costs[1] < 1.3 * costs[0]


def _in_line(queue: Any) -> Any:
    for line in queue._lines.values():
        claim = line.first
        while claim is not None:
            yield claim
            claim = claim.behind


def test_what_was_withdrawn_does_not_stay_in_memory() -> None:
    for fairness in (None, 5):
        engine, group = _engine(cpu=1, fairness=fairness), Group(1, "g")
        engine.submit(_claim(engine, group, 0, cpu=1))
        engine.submit(_claim(engine, group, 1, cpu=1))
        for number in range(2, 5000):
            claim = _claim(engine, group, number, cpu=1)
            engine.submit(claim)
            engine.drop(claim)
            assert claim.phase is Phase.OVER
        assert sum(1 for _ in _in_line(engine.queue)) < 200
        assert len(group.heap) < 200


def test_whoever_keeps_one_that_was_admitted_does_not_keep_those_behind_it() -> None:
    engine, group = _engine(cpu=1), Group(1, "g")
    first, *others = [_claim(engine, group, number, cpu=1) for number in range(4)]
    for claim in (first, *others):
        engine.submit(claim)
    kept, known = others[0], [weakref.ref(claim) for claim in others[1:]]
    for claim in (first, *others):
        engine.drop(claim)
        engine.admit()
    del others, claim
    assert kept.phase is Phase.OVER
    assert [each() for each in known] == [None, None]
