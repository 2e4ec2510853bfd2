"""Mixed pipelines under random faults, for as long as you like: `make soak SECONDS=600 SEED=1`.

Every run is made of random stages, gets a random fault at a random moment, and is judged: it ended in time, the ledger
balances by arithmetic of our own, and the outcome is one that the fault allows. Descriptors, threads and memory must stay
flat. A run that fails names its number and seed; `--only NUMBER` makes the same one again.

The rule kept here: what a run is and what befalls it depends on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import psutil
import structlog
from helpers import assert_balanced

from pipeline import (
    Err,
    ErrorPolicy,
    Fence,
    Grace,
    Pipeline,
    PipelineCancelled,
    PipelineFailed,
    RunReport,
    TimeoutTrigger,
)
from stages import Retry, batch, filter, flat_map, map, mix_pool, stage, take, tap

from .topologies import nap, rest

_AT_ONCE = 4
"""Runs side by side on the loop."""
_GRACE = Grace(drain=5.0, abort=2.0, terminate=0.5, kill=1.0)
_PATIENCE = 60.0
"""Seconds for a run without an end of its own to come to its fault, on a machine that is busy."""
_LIMIT = 30.0
"""MiB by which memory may grow after the first quarter."""


class Planted(Exception):
    """Raised by handlers on purpose."""


class Trips:
    """A handler that raises now and then; where, depends on the item alone."""

    def __init__(self, every: int, inner: Callable[[Any], Any]) -> None:
        self.every = every
        self.inner = inner
        self.__name__ = f"trips_{every}"

    def __call__(self, item: Any) -> Any:
        if hash(str(item)) % self.every == 0:
            raise Planted(item)
        return self.inner(item)


async def trips_and_waits(item: Any) -> Any:
    await asyncio.sleep(0)
    if isinstance(item, int) and item % 11 == 3:
        raise Planted(item)
    return item


def twice(item: Any) -> Iterator[Any]:
    yield item
    yield item


def as_int(item: Any) -> int:
    return len(item) if isinstance(item, (list, tuple)) else int(item)


def same(item: Any) -> Any:
    return item


@dataclass
class Plan:
    """One run: what it is made of, and what befalls it."""

    pipeline: Pipeline[Any]
    names: list[str]
    fault: str
    how: str
    endless: bool
    after: float
    dice: random.Random
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.how} of {' >> '.join(self.names)} with {self.fault} after {self.after:.3f} s"


FAULTS = ("nothing", "cancel", "drain", "force", "drain then abort", "cancelled task", "fence", "trigger", "killed worker")
HOW = ("run", "collect", "async_iter", "left early", "iter", "iter left early")


def planned(seed: int, number: int) -> Plan:
    """The run of that number."""
    dice = random.Random(f"{seed}/{number}")
    endless = dice.random() < 0.5
    fault = dice.choice(FAULTS if not endless else FAULTS[1:])
    how = dice.choice(HOW)
    if how.startswith("iter") and fault in ("cancelled task", "fence"):
        fault = "cancel"
    limit = None if endless else dice.choice((0, 1, 7, 300, 3000))
    source, source_name = _source(dice, limit)
    names = [source_name]
    triggers = [TimeoutTrigger(0.05 * dice.random())] if fault == "trigger" else []
    policy = dice.choice((ErrorPolicy.DROP, ErrorPolicy.DROP, ErrorPolicy.EMIT, ErrorPolicy.RAISE))
    pipeline: Pipeline[Any] = Pipeline(source, grace=_GRACE, cancel_on=triggers, on_error=policy)
    for _ in range(dice.randint(1, 5)):
        name, make = dice.choice(STAGES)
        names.append(name)
        pipeline = pipeline >> make(dice)
    if fault == "killed worker":
        names.append("processes")
        pipeline = pipeline >> stage(run_in="process", concurrency=2)(rest_of_any)
    names.append(policy.name)
    return Plan(pipeline, names, fault, how, endless, dice.choice((0.0, 0.002, 0.02, 0.08)) * dice.random() * 2, dice)


def rest_of_any(item: Any) -> Any:
    rest(as_int(item) if not isinstance(item, Err) else 1)
    return item


async def nap_of_any(item: Any) -> Any:
    await nap(as_int(item))
    return item


STAGES: list[tuple[str, Callable[[random.Random], Any]]] = [
    ("sync", lambda dice: stage(same)),
    ("map", lambda dice: map(as_int)),
    ("async", lambda dice: stage(nap_of_any)),
    ("crew", lambda dice: stage(concurrency=dice.randint(2, 9), buffer=dice.choice((None, 0, 1, 5)))(nap_of_any)),
    ("ordered", lambda dice: stage(concurrency=dice.randint(2, 9), ordered=True)(nap_of_any)),
    ("trips", lambda dice: stage(Trips(dice.choice((2, 17, 301)), same))),
    ("trips async", lambda dice: stage(concurrency=dice.randint(1, 3), retry=dice.choice((None, Retry(2, wait=0.001))))(trips_and_waits)),
    ("fork", lambda dice: mix_pool(fork_merge=max, buffer=2)(lambda: [nap_of_any, same])),
    ("batch", lambda dice: batch(dice.choice((1, 3, 50)), within=dice.choice((None, 0.005)))),
    ("flat_map", lambda dice: flat_map(twice)),
    ("filter", lambda dice: filter(bool)),
    ("take", lambda dice: take(dice.choice((0, 5, 5000)))),
    ("tap", lambda dice: tap(same)),
    ("threads", lambda dice: stage(run_in="thread", concurrency=dice.randint(1, 3), ordered=dice.random() < 0.5)(rest_of_any)),
    ("fast threads", lambda dice: stage(run_in="thread", concurrency=2, buffer=dice.choice((None, 64)))(same)),
    ("processes", lambda dice: stage(run_in="process", concurrency=2, ordered=dice.random() < 0.5)(rest_of_any)),
]


def _source(dice: random.Random, limit: int | None) -> tuple[Any, str]:
    kind = dice.choice(("range", "generator", "async", "broken"))
    if kind == "range":
        return (count if limit is None else lambda: range(limit)), "range"
    if kind == "generator":
        return lambda: (n for n in islice(count(), limit)), "generator"
    if kind == "async":
        return lambda: _async_source(limit), "async source"
    return lambda: _broken_source(limit, dice.choice((0, 3, 900))), "broken source"


async def _async_source(limit: int | None) -> AsyncIterator[int]:
    for n in islice(count(), limit):
        if n % 5 == 0:
            await asyncio.sleep(0)
        yield n


def _broken_source(limit: int | None, at: int) -> Iterator[int]:
    for n in islice(count(), limit):
        if n == at:
            raise Planted("source")
        yield n


# --- one run


async def go(plan: Plan) -> RunReport | None:
    """Run it, inject the fault, and return the account."""
    began = time.monotonic()
    fault = asyncio.create_task(befall(plan)) if plan.fault not in ("nothing", "fence", "trigger", "cancelled task") else None
    work = asyncio.create_task(consume(plan))
    try:
        if plan.fault == "cancelled task":
            await asyncio.wait([work], timeout=plan.after)
            work.cancel()
        await asyncio.wait([work], timeout=_PATIENCE)
        assert work.done(), f"still running: {plan.pipeline.snapshot()}"
        if not work.cancelled():
            error = work.exception()
            if error is not None and not isinstance(error, (PipelineCancelled, PipelineFailed)):
                raise error
    finally:
        plan.seconds = time.monotonic() - began
        if fault is not None:
            fault.cancel()
            await asyncio.wait([fault])
            if not fault.cancelled() and fault.exception() is not None:
                raise fault.exception()  # type: ignore[misc]
    return plan.pipeline.report


async def consume(plan: Plan) -> None:
    pipeline, leave_at = plan.pipeline, plan.dice.choice((0, 1, 40)) if "left early" in plan.how else None
    if plan.how in ("run", "collect"):
        with Fence(TimeoutTrigger(plan.after)) if plan.fault == "fence" else contextlib.nullcontext():
            await (pipeline.run() if plan.how == "run" else pipeline.collect())
    elif plan.how.startswith("iter"):
        await asyncio.to_thread(iterate, pipeline, leave_at)
    else:
        with Fence(TimeoutTrigger(plan.after)) if plan.fault == "fence" else contextlib.nullcontext():
            async with contextlib.aclosing(pipeline.async_iter(plan.dice.choice((1, 64)))) as outputs:
                taken = 0
                async for _ in outputs:
                    if taken == leave_at:
                        break
                    taken += 1


def iterate(pipeline: Pipeline[Any], leave_at: int | None) -> None:
    outputs = pipeline.iter()
    try:
        for taken, _ in enumerate(outputs):
            if taken == leave_at:
                break
    finally:
        outputs.close()


async def befall(plan: Plan) -> None:
    """The fault, once the time has come."""
    pipeline = plan.pipeline
    await asyncio.sleep(plan.after)
    if plan.fault == "killed worker":
        while not (processes := list(pipeline.runtime.processes)):
            await asyncio.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(plan.dice.choice(processes).pid, signal.SIGKILL)  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        if not plan.endless:
            return
    pipeline.cancel(plan.fault, drain=plan.fault.startswith("drain"), force=plan.fault == "force")
    if plan.fault == "drain then abort":
        await asyncio.sleep(0.01)
        pipeline.cancel("abort")
    while True:  # one that had not begun yet refuses to start; one that has ended starts no more
        await asyncio.sleep(1)


def judge(plan: Plan, report: RunReport | None) -> None:
    if report is None:
        return  # cancelled before it had begun
    assert_balanced(report)
    assert not report.abandoned, report.abandoned
    if plan.fault == "nothing" and "left early" not in plan.how and "RAISE" not in plan.names and "broken source" not in plan.names:
        assert report.outcome == "completed", report.explain()
    if report.outcome == "completed":
        assert not report.reasons
        assert not plan.endless or "take" in plan.names, "an endless source has ended"
    else:
        assert report.reasons, "nobody knows why it stopped"
    if report.drained:
        assert all(row.cancelled == row.discarded == 0 for row in report.stages)


# --- all of them


class Watch:
    """What must stay flat."""

    def __init__(self) -> None:
        self._me = psutil.Process()
        self.memory: list[float] = []
        self.base = self.census()

    def census(self) -> tuple[int, int, int]:
        return self._me.num_fds(), threading.active_count(), len(self._me.children(recursive=True))

    def look(self) -> str:
        gc.collect()
        self.memory.append(self._me.memory_info().rss / 2**20)
        descriptors, threads, children = self.census()
        return f"{self.memory[-1]:.0f} MiB, {descriptors} descriptors, {threads} threads, {children} children"

    async def settle(self) -> None:
        for _ in range(500):
            if self.census() <= self.base:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"descriptors, threads, children: {self.census()}, and were {self.base}")

    def grown(self) -> float:
        quarter = max(1, len(self.memory) // 4)
        return min(self.memory[-quarter:]) - min(self.memory[quarter : 2 * quarter] or self.memory[:1])


async def soak(seconds: float, seed: int, only: int | None) -> int:
    loop_calls: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: loop_calls.append(context))
    await (Pipeline([1]) >> stage(run_in="process")(abs)).run()  # the fork server
    await asyncio.to_thread(int)  # and the executor, all of it
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(64)))
    watch, faults, outcomes = Watch(), Counter[str](), Counter[str]()
    runs = items = failed = 0
    slowest = (0.0, -1)
    began, spoke = time.monotonic(), time.monotonic()
    numbers = iter([only]) if only is not None else count()
    while time.monotonic() - began < seconds:
        group = list(islice(numbers, _AT_ONCE))
        if not group:
            break
        plans = {number: planned(seed, number) for number in group}
        results = await asyncio.gather(*(go(plan) for plan in plans.values()), return_exceptions=True)
        for (number, plan), result in zip(plans.items(), results, strict=True):
            runs += 1
            try:
                if isinstance(result, BaseException):
                    raise result
                judge(plan, result)
            except BaseException as error:
                failed += 1
                print(f"run {number} of seed {seed} FAILED: {plan}: {type(error).__name__}: {error}", flush=True)
            slowest = max(slowest, (plan.seconds, number))
            report = result if isinstance(result, RunReport) else None
            items += report.pulled if report else 0
            faults[plan.fault] += plan.fault != "nothing"
            faults["handler or source raised"] += bool(report and (report.failed or report.errors))
            outcomes[report.outcome if report else "never begun"] += 1
        if loop_calls:
            failed += 1
            print(f"the loop's exception handler was called in runs {group}: {loop_calls.pop()}", flush=True)
        try:
            await watch.settle()
        except AssertionError as error:
            failed += 1
            print(f"left behind by runs {group} of seed {seed}: {error}: {list(plans.values())}", flush=True)
            watch.base = watch.census()
        if time.monotonic() - spoke > 10:
            spoke = time.monotonic()
            print(f"{spoke - began:6.0f} s: {runs:,} runs, {items:,} items, {failed} failed; {watch.look()}", flush=True)
    if len(watch.memory) >= 8 and watch.grown() > _LIMIT:
        failed += 1
        print(f"memory has grown by {watch.grown():.1f} MiB: {watch.memory}")
    print(f"{runs:,} runs, {items:,} items in {time.monotonic() - began:.0f} s, seed {seed}; {watch.look()}")
    print("faults injected:", ", ".join(f"{name} {number:,}" for name, number in sorted(faults.items()) if number))
    print(f"slowest: run {slowest[1]}, {slowest[0]:.1f} s")
    print("outcomes:", ", ".join(f"{name} {number:,}" for name, number in sorted(outcomes.items())))
    print(f"{failed} failed" if failed else "all ledgers balanced; descriptors, threads and memory flat")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run mixed pipelines under random faults.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one run")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    return asyncio.run(soak(options.seconds, options.seed, options.only))


if __name__ == "__main__":
    sys.exit(main())
