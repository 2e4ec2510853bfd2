"""Neighbouring loop stages that run as one: to be told from separate stages by their speed alone.

What a row of stages does is compared with arithmetic of our own. Waits of different stages must overlap, which is shown
with barriers: a row that does not spread never gets past one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import pytest
from helpers import LIMIT, assert_balanced
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline import Err, ErrorPolicy, Grace, Pipeline, PipelineCancelled, PipelineFailed, RunReport, is_err
from stages import SKIP, KillSwitch, stage, take
from stages.burst import only_computes
from workers import WorkerState

_SCALE = float(os.environ.get("PENSTOCK_EXAMPLES", "0.5"))
"""Multiplies the number of examples; above 1 they are drawn afresh each time, for a long hunt."""


def profile(examples: int) -> settings:
    return settings(
        max_examples=max(1, int(examples * _SCALE)),
        derandomize=_SCALE <= 1,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=[phase for phase in Phase if phase is not Phase.shrink or _SCALE <= 1],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


def row(source: Any, *functions: Any, **options: Any) -> Pipeline[Any]:
    """A pipeline; functions become stages."""
    pipeline = Pipeline(source, **options)
    for one in functions:
        pipeline = pipeline >> (one if hasattr(one, "accepts") else stage(one))
    return pipeline


async def pause(times: int = 1) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def increment(item: Any) -> Any:
    return item + 1


def plain(item: Any) -> Any:
    return int(item)


async def prompt(item: Any) -> Any:
    return int(item)


async def computed(item: Any) -> Any:
    return item + 0


async def waiting(item: Any) -> Any:
    await asyncio.sleep(0)
    return item


def one_by_one(item: Any) -> Iterator[Any]:
    yield item


def later(item: Any) -> Any:
    return waiting(item)


EVERY_KIND = [increment, plain, prompt, computed, waiting, one_by_one, later]
NEUTRAL = [plain, prompt, computed, waiting, one_by_one, later]


def counts(pipeline: Pipeline[Any], *names: str) -> list[tuple[int, ...]]:
    return [tuple(getattr(metrics, name) for name in names) for metrics in pipeline.snapshot().stages]


# --- waits overlap, calls of one stage do not


@pytest.mark.parametrize("between", [None, *NEUTRAL], ids=lambda kind: getattr(kind, "__name__", "nothing"))
async def test_handlers_of_neighbouring_stages_wait_at_the_same_time(between: Any) -> None:
    meeting = asyncio.Barrier(3)

    def meets(number: int) -> Any:
        @stage(name=f"s{number}")
        async def meet(item: int) -> int:
            if item == 2 - number:
                await meeting.wait()
            else:
                await asyncio.sleep(0)
            return item

        return meet

    functions: list[Any] = []
    for number in range(3):
        functions += [meets(number), *([between] if between else [])]
    pipeline = row(range(9), *functions)
    async with asyncio.timeout(LIMIT):
        assert await pipeline.collect() == list(range(9))
    assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("first", range(3))
async def test_stages_that_begin_to_wait_late_wait_at_the_same_time(first: int) -> None:
    meeting = asyncio.Barrier(3)

    def meets(number: int) -> Any:
        @stage(name=f"s{number}")
        async def meet(item: int) -> int:
            if item < 500:
                return item
            if item == 500 + first and number == first:
                await asyncio.sleep(0)
            if item == 700 - number:
                await meeting.wait()
            return item

        return meet

    pipeline = row(range(1000), *map(meets, range(3)))
    async with asyncio.timeout(LIMIT):
        assert await pipeline.collect() == list(range(1000))


@pytest.mark.parametrize("concurrency", [2, 5])
@pytest.mark.parametrize("ordered", [False, True])
async def test_workers_are_hired_until_the_concurrency_is_reached(concurrency: int, ordered: bool) -> None:
    meeting, inside, most = asyncio.Barrier(concurrency), 0, 0

    @stage(concurrency=concurrency, ordered=ordered)
    async def meet(item: int) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await meeting.wait()
        inside -= 1
        return item

    async with asyncio.timeout(LIMIT):
        outputs = await row(range(concurrency * 8), plain, meet, plain).collect()
    assert sorted(outputs) == list(range(concurrency * 8))
    assert most == concurrency
    assert not ordered or outputs == sorted(outputs)


@pytest.mark.parametrize("kind", [plain, prompt, computed], ids=lambda kind: kind.__name__)
async def test_one_worker_does_it_all_when_no_handler_waits(kind: Any) -> None:
    workers: Counter[int] = Counter()

    @stage(concurrency=50)
    async def spy(item: int, state: WorkerState) -> int:
        workers[state.worker_id] += 1
        return kind(item) if kind is plain else await kind(item)

    assert await row(range(5000), spy).collect() == list(range(5000))
    assert workers == {0: 5000}


async def test_a_worker_that_is_still_at_work_is_waited_for_without_a_busy_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = asyncio.Event(), asyncio.Event()

    @stage(concurrency=3)
    async def held(item: int) -> int:
        await (second if item else first).wait()
        return item

    pipeline = row([0, 1], held)
    task = asyncio.create_task(pipeline.run())
    await pause(20)
    first.set()
    await pause(20)
    waits = 0
    wait = asyncio.wait

    def counted(*args: Any, **options: Any) -> Awaitable[Any]:
        nonlocal waits
        waits += 1
        return wait(*args, **options)

    monkeypatch.setattr(asyncio, "wait", counted)
    await pause(50)
    second.set()
    await task
    assert waits < 5


@pytest.mark.parametrize(
    "kind", [None, waiting, one_by_one, later], ids=lambda kind: getattr(kind, "__name__", "nothing")
)
async def test_no_stage_has_more_items_in_flight_than_its_concurrency(kind: Any) -> None:
    most: Counter[str] = Counter()

    def look() -> None:
        for metrics in pipeline.snapshot().stages:
            most[metrics.name] = max(most[metrics.name], metrics.in_flight)

    @stage
    def before(item: int) -> int:
        look()
        return item

    @stage
    async def after(item: int) -> int:
        look()
        await pause(3)
        look()
        return item

    pipeline = row(range(20), before, *([kind] if kind else []), after, plain)
    await pipeline.run()
    assert max(most.values()) == 1, most


async def test_an_item_that_a_later_stage_has_is_not_in_flight_before() -> None:
    held = asyncio.Event()

    async def hold(item: int) -> int:
        await held.wait()
        return item

    pipeline = row([1], plain, hold)
    task = asyncio.create_task(pipeline.run())
    await pause(10)
    seen = counts(pipeline, "received", "succeeded", "in_flight")
    held.set()
    await task
    assert seen == [(1, 1, 0), (1, 0, 1)]


# --- what a handler may do


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("neighbour", EVERY_KIND, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("error", [StopIteration, asyncio.CancelledError, StopAsyncIteration, RecursionError])
async def test_an_exception_with_a_meaning_of_its_own_fails_its_item(
    error: type[BaseException], neighbour: Any, position: int
) -> None:
    @stage(name="culprit")
    def culprit(item: int) -> int:
        if item % 4 == 3:
            raise error
        return item

    functions: list[Any] = [plain, plain]
    functions[position // 2] = neighbour
    functions.insert(position, culprit)
    pipeline = row(range(12), *functions)
    report = await pipeline.run()
    assert isinstance(report, RunReport)
    assert report.outcome == "completed"
    assert [(type(err.value), err.stage) for err in report.errors] == [(error, "culprit")] * 3
    assert (pipeline.snapshot().stage("culprit").dropped, report.delivered) == (3, 9)
    assert_balanced(report)


@pytest.mark.parametrize("make", ["coroutine", "task", "future"])
async def test_what_a_plain_function_returns_to_be_awaited_is_awaited(make: str) -> None:
    def promise(item: int) -> Any:
        if make == "coroutine":
            return waiting(item)
        if make == "task":
            return asyncio.ensure_future(waiting(item))
        future = asyncio.get_running_loop().create_future()
        future.get_loop().call_soon(future.set_result, item)
        return future

    pipeline = row(range(50), plain, promise, plain, waiting, promise)
    assert await pipeline.collect() == list(range(50))
    assert counts(pipeline, "received", "succeeded", "emitted") == [(50, 50, 50)] * 5


@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.__name__)
async def test_skips_and_errors_of_each_policy_are_counted_where_they_are(kind: Any) -> None:
    sided: list[Any] = []

    async def aside(err: Err) -> None:
        await pause(3)
        sided.append(err.item)

    def sieve(item: int) -> Any:
        if item % 10 == 1:
            return SKIP
        if item % 10 == 2:
            return Err("handed back")
        if item % 10 == 3:
            raise ValueError(item)
        return item

    for policy, name in [("DROP", "dropped"), ("EMIT", "emitted_errors"), ("SIDE", "sided")]:
        handler = aside if policy == "SIDE" else None
        sieving = stage(on_error=ErrorPolicy[policy], error_handler=handler, name="sieve")(sieve)
        pipeline = row(range(40), kind, sieving, kind, waiting, kind)
        outputs = await pipeline.collect()
        assert not is_err(outputs)
        metrics = pipeline.snapshot().stages
        assert (metrics[1].received, metrics[1].skipped, metrics[1].failed, getattr(metrics[1], name)) == (40, 4, 8, 8)
        passed = 8 if policy == "EMIT" else 0
        assert [one.passed for one in metrics[2:]] == [passed] * 3
        assert [one.received for one in metrics[2:]] == [28 + passed] * 3
        assert sum(isinstance(output, Err) for output in outputs) == passed
        steps = [output.item if isinstance(output, Err) else output - 2 * (kind is increment) for output in outputs]
        assert steps == sorted(steps)
        assert_balanced(pipeline.snapshot())
    assert sided == [n for n in range(40 + (kind is increment)) if n % 10 in (2, 3)][: len(sided)]
    assert len(sided) == 8


@pytest.mark.parametrize("later_kind", [waiting, one_by_one, prompt, plain], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("amount", [1, 2, 3, 70])
@pytest.mark.parametrize("position", range(3))
async def test_take_in_the_middle_of_a_row_gives_what_it_says(amount: int, later_kind: Any, position: int) -> None:
    functions: list[Any] = [plain, later_kind, plain]
    functions.insert(position, take(amount))
    pipeline = row(range(300), *functions)
    assert await pipeline.collect() == list(range(amount))
    metrics = pipeline.snapshot().stages
    assert (metrics[position].succeeded, metrics[position].emitted) == (amount, amount)
    assert [one.succeeded for one in metrics[position + 1 :]] == [amount] * (3 - position)
    assert_balanced(pipeline.snapshot())


async def test_take_whose_last_item_is_the_first_to_be_waited_for_ends_the_stream() -> None:
    async def waits_once(item: int) -> int:
        if item == 4:
            await pause(5)
        return item

    pipeline = row(range(300), plain, take(5), waits_once, plain)
    assert await pipeline.collect() == list(range(5))
    assert pipeline.snapshot().stage("take").received == 5


@pytest.mark.parametrize("kind", NEUTRAL, ids=lambda kind: kind.__name__)
async def test_outputs_of_ever_new_types_are_treated_like_all_others(kind: Any) -> None:
    def fresh(item: int) -> Any:
        return type("Fresh", (int,), {})(item)

    pipeline = row(range(300), fresh, kind, fresh, waiting, fresh)
    assert await pipeline.collect() == list(range(300))
    assert counts(pipeline, "received", "succeeded", "emitted", "cancelled") == [(300, 300, 300, 0)] * 5


# --- a failure stops its stage and those before it; what is behind goes on


@pytest.mark.parametrize("at", [0, 1, 6, 40])
@pytest.mark.parametrize("before", NEUTRAL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("waits", [False, True], ids=["plain", "waits"])
async def test_what_left_a_stage_before_it_raised_is_finished_and_delivered(at: int, before: Any, waits: bool) -> None:
    calls: list[int] = []

    def fragile(item: int) -> Any:
        calls.append(item)
        if item == at:
            raise ValueError(item)
        return item

    async def fragile_later(item: int) -> Any:
        await asyncio.sleep(0)
        return fragile(item)

    handler = stage(on_error=ErrorPolicy.RAISE, name="fragile")(fragile_later if waits else fragile)

    async def slow(item: int) -> int:
        await pause(4)
        return item

    seen: list[int] = []
    pipeline = row(range(100), before, handler, slow, plain, waiting)
    with pytest.raises(PipelineFailed) as caught:
        async for item in pipeline:
            seen.append(item)
    assert seen == list(range(at))
    assert calls == list(range(at + 1))
    assert isinstance(caught.value.__cause__, ValueError)
    _, failed, *rest = pipeline.snapshot().stages
    assert (failed.received, failed.succeeded, failed.raised, failed.cancelled) == (at + 1, at, 1, 0)
    assert [(one.received, one.succeeded, one.cancelled, one.discarded) for one in rest] == [(at, at, 0, 0)] * 3
    assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("at", [0, 1, 6])
@pytest.mark.parametrize("waits", [False, True], ids=["plain", "waits"])
@pytest.mark.parametrize("way", ["raise", "kill switch"])
async def test_an_item_that_has_left_a_stage_succeeded_there_whatever_the_next_one_does(
    at: int, waits: bool, way: str
) -> None:
    def end(item: int) -> Any:
        if item == at and way == "raise":
            raise ValueError(item)
        return KillSwitch("enough") if item == at else item

    async def end_later(item: int) -> Any:
        await asyncio.sleep(0)
        return end(item)

    ending = stage(on_error=ErrorPolicy.RAISE)(end_later if waits else end)
    pipeline = row(range(at + 1), plain, ending, plain)
    assert is_err(await pipeline.run())
    first, second, _ = pipeline.snapshot().stages
    assert (first.received, first.succeeded, first.cancelled, first.emitted) == (at + 1, at + 1, 0, at + 1)
    assert (second.received, second.processed) == (at + 1, at + 1)


@pytest.mark.parametrize("where", ["setup", "teardown"])
@pytest.mark.parametrize("position", range(3))
async def test_a_broken_hook_fails_the_run_and_closes_what_was_opened(where: str, position: int) -> None:
    journal: list[str] = []

    def hooked(number: int) -> Any:
        async def setup(state: WorkerState) -> None:
            await asyncio.sleep(0)
            if where == "setup" and number == position:
                raise OSError("no setup")
            journal.append(f"+{number}")

        async def teardown(state: WorkerState) -> None:
            journal.append(f"-{number}")
            await asyncio.sleep(0)
            if where == "teardown" and number == position:
                raise OSError("no teardown")

        return stage(setup=setup, teardown=teardown, name=f"s{number}")(waiting)

    pipeline = row(range(20), *map(hooked, range(3)))
    result = await pipeline.run()
    assert is_err(result)
    assert isinstance(result.value, OSError)
    assert result.reasons[0].code == f"{where}_failed"
    opened = position if where == "setup" else 3
    assert sorted(journal) == sorted([*(f"+{n}" for n in range(opened)), *(f"-{n}" for n in range(opened))])
    assert_balanced(pipeline.snapshot())


async def test_an_error_handler_that_raises_after_a_wait_stops_the_row() -> None:
    async def broken(err: Err) -> None:
        await pause(2)
        raise OSError("the handler too")

    @stage(error_handler=broken)
    def fragile(item: int) -> int:
        if item == 5:
            raise ValueError(item)
        return item

    pipeline = row(range(50), plain, fragile, waiting, plain)
    result = await pipeline.run()
    assert is_err(result)
    assert isinstance(result.value, OSError)
    assert result.report is not None
    assert result.report.delivered == 5
    assert_balanced(result.report)


# --- stopping


@pytest.mark.parametrize("way", ["cancel", "force", "drain", "kill switch"])
@pytest.mark.parametrize("neighbour", NEUTRAL, ids=lambda kind: kind.__name__)
async def test_a_handler_that_stops_the_pipeline_is_not_called_again(neighbour: Any, way: str) -> None:
    for at in (0, 1, 7, 150):
        await stopped_by_handler(neighbour, at, way)


async def stopped_by_handler(neighbour: Any, at: int, way: str) -> None:
    calls = 0

    @stage(name="stopper")
    def stopper(item: int) -> Any:
        nonlocal calls
        calls += 1
        if item != at:
            return item
        if way == "kill switch":
            return KillSwitch("enough")
        assert pipeline.cancel("enough", drain=way == "drain", force=way == "force")
        assert not pipeline.cancel("again", drain=way == "drain", force=way == "force")
        return item

    pipeline = row(range(5000), neighbour, stopper, plain, waiting)
    result = await pipeline.run()
    assert is_err(result)
    assert result.report is not None
    assert result.value == "enough"
    assert_balanced(result.report)
    if way == "drain":
        assert result.report.drained
        assert result.report.delivered == result.report.pulled == calls
        assert at < calls <= at + 140
    else:
        assert calls == at + 1


@pytest.mark.parametrize("kind", [increment, computed], ids=lambda kind: kind.__name__)
async def test_an_operator_that_cancels_the_pipeline_is_not_called_again(kind: Any) -> None:
    class Item:
        calls = 0

        def __add__(self, other: Any) -> Item:
            Item.calls += 1
            if Item.calls == 300:
                pipeline.cancel("enough")
            return self

    pipeline = row([Item() for _ in range(5000)], kind, kind)
    assert is_err(await pipeline.run())
    assert Item.calls <= 301
    assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("drain", [False, True], ids=["abort", "drain"])
@pytest.mark.parametrize("passes", range(5))
@pytest.mark.parametrize("swallows", [False, True], ids=["lets it pass", "swallows it"])
@pytest.mark.parametrize("at", [0, 3])
async def test_a_stop_about_when_a_handler_begins_to_wait_leaves_a_balanced_ledger(
    drain: bool, passes: int, swallows: bool, at: int
) -> None:
    loop = asyncio.get_running_loop()

    def soon(left: int) -> None:
        if left:
            loop.call_soon(soon, left - 1)
        else:
            pipeline.cancel("now", drain=drain)

    def before(item: int) -> int:
        if item == at and passes == 0:
            soon(0)
        return item

    async def waits(item: int) -> int:
        if item == at and passes:
            soon(passes - 1)
        try:
            await pause(2)
        except asyncio.CancelledError:
            if not swallows:
                raise
        return item

    pipeline = row(range(300), before, waits, waiting, plain, waiting)
    result = await pipeline.run()
    assert is_err(result)
    assert result.report is not None
    assert_balanced(result.report)
    assert result.report.abandoned == ()
    if drain:
        assert result.report.drained
        assert result.report.delivered == result.report.pulled


CHAINS: dict[str, list[Any]] = {
    "plain": [plain, plain],
    "computing": [increment, computed],
    "prompt": [plain, prompt, plain],
    "waiting": [plain, waiting, waiting, plain],
    "generators": [plain, one_by_one, waiting, one_by_one],
    "pending": [plain, later, plain, later],
    "workers": [waiting, stage(concurrency=3)(waiting), plain, waiting],
    "ordered": [waiting, stage(concurrency=3, ordered=True)(waiting), plain, prompt],
}


@pytest.mark.parametrize("how", ["run", "collect", "async for"])
@pytest.mark.parametrize("chain", CHAINS)
async def test_cancelling_the_awaiting_task_after_any_number_of_passes_closes_everything(chain: str, how: str) -> None:
    async def consume(pipeline: Pipeline[Any]) -> None:
        if how == "async for":
            async with contextlib.aclosing(pipeline.async_iter(4)) as outputs:
                async for _ in outputs:
                    await asyncio.sleep(0)
        else:
            assert not is_err(await getattr(pipeline, how)())

    for passes in itertools.count():
        pipeline = row(list(range(12)), *CHAINS[chain])
        before = asyncio.all_tasks()
        task = asyncio.create_task(consume(pipeline))
        await pause(passes)
        if task.done():
            await task
            break
        task.cancel("mine")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() <= before
        assert_balanced(pipeline.snapshot())
    assert passes > 3


@pytest.mark.parametrize("way", ["cancel", "drain"])
@pytest.mark.parametrize("chain", CHAINS)
async def test_a_stop_after_any_number_of_passes_is_balanced_and_a_drain_loses_nothing(chain: str, way: str) -> None:
    for passes in itertools.count():
        pipeline = row(list(range(12)), *CHAINS[chain])
        task = asyncio.create_task(pipeline.run())
        await pause(passes)
        if task.done():
            break
        if pipeline.runtime.loop is not None and pipeline.cancel("now", drain=way == "drain"):
            result = await task
            assert is_err(result)
            assert result.report is not None
            assert_balanced(result.report)
            assert way == "cancel" or result.report.drained
            assert way == "cancel" or result.report.delivered == result.report.pulled
        await task
    assert passes > 3


@pytest.mark.parametrize("chain", CHAINS)
async def test_a_timeout_around_a_run_closes_it(chain: str) -> None:
    pipeline = row(range(10**9), *CHAINS[chain])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await pipeline.run()
    assert pipeline.snapshot().state.value == "closed"
    assert_balanced(pipeline.snapshot())
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.abandons("task")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("chain", CHAINS)
def test_an_interrupt_raised_in_a_handler_ends_the_program_and_closes_the_run(
    chain: str, error: type[BaseException]
) -> None:
    def interrupted(item: int) -> int:
        if item == 7:
            raise error
        return item

    pipeline = row(range(100), *CHAINS[chain], interrupted, plain)
    with pytest.raises(error):
        asyncio.run(pipeline.run())
    snapshot = pipeline.snapshot()
    assert snapshot.state.value == "closed"
    assert_balanced(snapshot)


# --- snapshots


@pytest.mark.parametrize("chain", CHAINS)
async def test_the_ledger_holds_in_every_snapshot_from_handlers_and_other_tasks(chain: str) -> None:
    looks = 0
    over = False

    def look() -> None:
        nonlocal looks
        looks += 1
        assert_balanced(pipeline.snapshot())

    async def watcher() -> None:
        while not over:
            look()
            await asyncio.sleep(0)

    def looks_plain(item: int) -> Any:
        look()
        if item % 11 == 3:
            raise ValueError(item)
        return SKIP if item % 7 == 2 else item

    async def looks_around(item: int) -> int:
        look()
        if item % 3:
            await asyncio.sleep(0)
        look()
        return item

    pipeline = row(range(120), looks_plain, *CHAINS[chain], looks_around, looks_plain, *CHAINS[chain], looks_plain)
    task = asyncio.create_task(watcher())
    report = await pipeline.run()
    over = True
    await task
    assert isinstance(report, RunReport), report
    assert {type(err.value) for err in report.errors} == {ValueError}
    assert looks > 240
    assert_balanced(report)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_ledger_holds_in_every_snapshot_from_another_thread(chain: str) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    pipeline = row(range(200_000 if chain in ("plain", "computing", "prompt") else 2000), *CHAINS[chain])
    over, wrong, looks = threading.Event(), list[str](), 0

    def watch() -> None:
        nonlocal looks
        before = (0, 0)
        while not over.is_set():
            snapshot = pipeline.snapshot()
            looks += 1
            try:
                assert_balanced(snapshot)
            except AssertionError as error:
                wrong.append(str(error)[:300])
            if (snapshot.pulled, snapshot.delivered) < before:
                wrong.append(f"from {before} to {snapshot.pulled}, {snapshot.delivered}")
            before = (snapshot.pulled, snapshot.delivered)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        asyncio.run(pipeline.run())
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    assert looks > 0


# --- functions whose results are not looked at


ODD: Any = SKIP


class Operand:
    """Every operator of it returns what it was given."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def _operate(self, *_: Any) -> Any:
        return self.result

    __add__ = __radd__ = __mul__ = __or__ = __neg__ = __invert__ = __pos__ = __lt__ = __matmul__ = _operate
    __eq__ = _operate  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def tricky_functions() -> dict[str, Callable[[Any], Any]]:
    captured: Any = SKIP
    rebound: Any = 1

    def rebind() -> None:
        nonlocal rebound
        rebound = SKIP

    def by_local(item: Any) -> Any:
        kept = captured
        return kept  # noqa: RET504

    def by_global(item: Any) -> Any:
        kept = ODD
        return kept  # noqa: RET504

    def by_branch(item: Any) -> Any:
        if item:
            return ODD
        return item

    def by_default(item: Any, other: Any = SKIP) -> Any:
        return other

    def by_keyword(item: Any, *, other: Any = SKIP) -> Any:
        return other

    def by_swap(item: Any) -> Any:
        one, two = ODD, item  # noqa: F841
        return one

    def by_chain(item: Any) -> Any:
        return 0 < item < 999 and captured

    def by_loop(item: Any) -> Any:
        while True:
            return ODD

    def by_finally(item: Any) -> Any:
        try:
            return item
        finally:
            return ODD  # noqa: B012, SIM107

    def by_star(*items: Any) -> Any:
        return items[0] and SKIP

    def by_del(item: Any) -> Any:
        kept = ODD
        del item
        return kept

    def by_import(item: Any) -> Any:
        from stages import SKIP as imported

        return imported

    def by_argument(item: Any) -> Any:
        item = ODD
        return item  # noqa: RET504

    def by_augmented(item: Any) -> Any:
        item += 1
        item = ODD if item else item
        return item  # noqa: RET504

    def by_unpacking(item: Any) -> Any:
        kept, *_ = (captured, item)
        return kept

    def by_match(item: Any) -> Any:
        match item:
            case 0:
                return item
            case _:
                return ODD

    async def by_coroutine(item: Any) -> Any:
        return ODD

    async def by_coroutine_and_branch(item: Any) -> Any:
        return captured if item else item

    async def by_awaiting(item: Any) -> Any:
        return await by_coroutine(item)

    rebind()
    functions = [
        *(by_local, by_global, by_branch, by_default, by_keyword, by_swap, by_chain, by_loop, by_finally, by_star),
        *(by_del, by_import, by_argument, by_augmented, by_unpacking, by_match),
        *(by_coroutine, by_coroutine_and_branch, by_awaiting),
    ]
    named: dict[str, Any] = {function.__name__: function for function in functions}
    named |= {
        "closure": lambda item: captured,
        "rebound closure": lambda item: rebound,
        "global": lambda item: ODD,
        "conditional": lambda item: ODD if item else item,
        "conditional, the other way": lambda item: item if not item else captured,
        "and": lambda item: item and ODD,
        "or": lambda item: (not item) or ODD,
        "walrus": lambda item: (kept := ODD),  # noqa: F841
        "comprehension": lambda item: [other for other in (ODD,)][0],  # noqa: C416, RUF015
        "subscript": lambda item: (item, ODD)[1],
        "attribute": lambda item: sys.modules[__name__].ODD,
        "nested lambda": lambda item: (lambda: ODD)(),
    }
    return named


@pytest.mark.parametrize("name", tricky_functions())
async def test_a_function_that_can_return_a_special_value_by_itself_is_looked_at(name: str) -> None:
    function = tricky_functions()[name]
    assert not only_computes(function)
    for functions in ([function], [increment, function], [function, increment], [computed, function, computed]):
        assert await row(range(1, 9), *functions).collect() == []


async def test_a_global_that_is_rebound_during_a_run_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ODD", 5)

    def rebinds(item: int) -> int:
        if item == 50:
            globals()["ODD"] = SKIP
        return item

    assert await row(range(100), rebinds, lambda item: ODD, plain).collect() == [5] * 50


@pytest.mark.parametrize("special", ["skip", "error", "kill switch", "coroutine"])
@pytest.mark.parametrize("neighbours", [0, 2])
async def test_a_special_value_that_an_operator_returns_keeps_its_meaning(special: str, neighbours: int) -> None:
    async def in_async(item: Any) -> Any:
        return item + 1

    operators: list[Any] = [
        lambda item: item + 1,
        lambda item: 1 + item,
        lambda item: item < 1,
        lambda item: item == 1,
        lambda item: -item,
        in_async,
    ]
    results: dict[str, Any] = {"skip": SKIP, "error": Err("odd"), "kill switch": KillSwitch("odd")}
    for operator in operators:
        result = waiting(7) if special == "coroutine" else results[special]
        around = [lambda item: item] * neighbours
        pipeline = row([Operand(result)], *around, stage(name="odd")(operator), *around)
        outputs = await pipeline.collect()
        if special == "coroutine":
            result.close()
            assert outputs == [7]
        elif special == "kill switch":
            assert is_err(outputs)
        else:
            assert outputs == []
        metrics = pipeline.snapshot().stage("odd")
        assert (metrics.skipped, metrics.failed) == (special in ("skip", "kill switch"), special == "error")


@pytest.mark.parametrize("special", [SKIP, KillSwitch("odd")], ids=["skip", "kill switch"])
async def test_a_special_value_that_passes_through_a_function_keeps_its_meaning(special: Any) -> None:
    pipeline = row([1, special, 2], lambda item: item)
    outputs = await pipeline.collect()
    assert outputs == [1, 2] if special is SKIP else is_err(outputs)


@pytest.mark.parametrize("failing", [20, 300])
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("kind", [increment, computed], ids=lambda kind: kind.__name__)
async def test_an_operator_that_raises_fails_its_item_in_its_stage(kind: Any, position: int, failing: int) -> None:
    class Item:
        def __init__(self, number: int, steps: int) -> None:
            self.number, self.steps = number, steps

        def __add__(self, other: Any) -> Item:
            if self.number % failing == failing - 1 and self.steps == position:
                raise shared
            return Item(self.number, self.steps + 1)

    shared = ValueError("always the same one")
    pipeline = row([Item(n, 0) for n in range(600)], *(stage(name=f"s{n}")(kind) for n in range(3)))
    report = await pipeline.run()
    assert isinstance(report, RunReport)
    failures = 600 // failing
    assert [one.dropped for one in report.stages] == [failures if n == position else 0 for n in range(3)]
    assert {(err.stage, err.item.steps) for err in report.errors} == {(f"s{position}", position)}
    assert [err.item.number for err in report.errors] == list(range(failing - 1, 600, failing))[: len(report.errors)]
    assert_balanced(report)


# --- fairness


def saturated(kind: str, seen: Counter[str]) -> Pipeline[Any]:
    """A pipeline that never has to wait."""

    def counted(item: int) -> int:
        seen["items"] += 1
        return item

    async def counted_later(item: int) -> int:
        seen["items"] += 1
        return item

    handlers: dict[str, Any] = {
        "plain": counted,
        "async": counted_later,
        "workers": stage(concurrency=100)(counted_later),
        "ordered workers": stage(concurrency=100, ordered=True)(counted_later),
        "plain workers": stage(concurrency=100)(counted),
    }
    return row(range(10**9), handlers[kind], lambda item: item + 1)


@pytest.mark.parametrize("how", ["run", "async for"])
@pytest.mark.parametrize("kind", ["plain", "async", "workers", "ordered workers", "plain workers"])
async def test_a_saturated_pipeline_lets_the_loop_go_round(kind: str, how: str) -> None:
    seen: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    pipeline = saturated(kind, seen)
    before = passes = worst = 0

    def look() -> None:
        nonlocal before, passes, worst
        passes += 1
        worst, before = max(worst, seen["items"] - before), seen["items"]
        if passes < 60:
            loop.call_soon(look)
        else:
            pipeline.cancel("seen enough")

    async def consume() -> None:
        async for _ in pipeline:
            pass

    loop.call_soon(look)
    if how == "run":
        assert is_err(await pipeline.run())
    else:
        with pytest.raises(PipelineCancelled):
            await consume()
    assert worst < 150_000
    assert seen["items"] < before + 150_000
    assert_balanced(pipeline.snapshot())


@pytest.mark.parametrize("kind", ["plain", "async", "workers", "ordered workers"])
async def test_a_timer_stops_a_saturated_pipeline(kind: str) -> None:
    pipeline = saturated(kind, Counter())
    asyncio.get_running_loop().call_later(0.01, pipeline.cancel, "time is up")
    result = await pipeline.run()
    assert is_err(result)
    assert result.value == "time is up"


class Slow(int):
    """Adding to it takes half a millisecond."""

    def __add__(self, other: Any) -> int:
        until = perf_counter() + 0.0005
        while perf_counter() < until:
            pass
        return 0


@pytest.mark.parametrize("kind", ["computing", "plain", "computing, async", "async"])
async def test_functions_that_turn_slow_do_not_keep_the_loop_for_many_items(kind: str) -> None:
    async def added(item: Any) -> Any:
        return abs(item) if type(item) is int else item + abs(1)

    functions: dict[str, Any] = {
        "computing": lambda item: item + 1,
        "plain": lambda item: item + abs(1),
        "computing, async": computed,
        "async": added,
    }
    loop = asyncio.get_running_loop()
    slow = 400
    pipeline = row([*range(20_000), *map(Slow, range(slow))], functions[kind])
    before = worst = 0
    over = False

    def look() -> None:
        nonlocal before, worst
        pulled = max(pipeline.snapshot().pulled - 20_000, 0)
        worst, before = max(worst, pulled - before), pulled
        if not over:
            loop.call_soon(look)

    loop.call_soon(look)
    await pipeline.run()
    over = True
    await asyncio.sleep(0)
    assert worst <= 130


# --- random rows


KINDS = ["pure", "call", "async pure", "async call", "async zero", "async wait", "pending", "generator", "fresh"]
POLICIES = [ErrorPolicy.DROP, ErrorPolicy.EMIT, ErrorPolicy.SIDE]
SOURCES = ["list", "range", "iterator", "generator", "async generator", "deque", "dict", "function"]


@dataclass(frozen=True)
class Plan:
    """One stage of a random row."""

    kind: str
    concurrency: int = 1
    ordered: bool = False
    policy: ErrorPolicy = ErrorPolicy.DROP
    fails: int = 0
    """Raises for the items that leave 1 when divided by this; 0: never."""
    skips: int = 0
    """Skips the items that leave 2 when divided by this; 0: never."""
    buffer: int | None = None

    @property
    def keeps_order(self) -> bool:
        return self.ordered or self.concurrency == 1

    @property
    def pure(self) -> bool:
        return self.kind in ("pure", "async pure")

    def fate(self, item: int) -> str:
        if not self.pure and self.fails and item % self.fails == 1:
            return "fail"
        return "skip" if not self.pure and self.skips and item % self.skips == 2 else "ok"


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        kind=draw(st.sampled_from(KINDS)),
        concurrency=draw(st.sampled_from([1, 1, 1, 3])),
        ordered=draw(st.booleans()),
        policy=draw(st.sampled_from(POLICIES)),
        fails=draw(st.sampled_from([0, 0, 7])),
        skips=draw(st.sampled_from([0, 0, 5])),
        buffer=draw(st.sampled_from([None, None, 0, 1, 3])),
    )


class Marker(Exception):
    """What failing handlers raise."""


@dataclass
class Watch:
    """What the handlers of a random row report to."""

    pipeline: Pipeline[Any] | None = None
    wrong: list[str] = field(default_factory=list)
    inside: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    stop_at: int | None = None
    drain: bool = False

    def look(self) -> None:
        assert self.pipeline is not None
        snapshot = self.pipeline.snapshot()
        try:
            assert_balanced(snapshot)
        except AssertionError as error:
            self.wrong.append(str(error)[:400])

    def enter(self, number: int, plan: Plan) -> None:
        self.calls += 1
        self.inside[number] += 1
        if self.inside[number] > plan.concurrency:
            self.wrong.append(f"{self.inside[number]} calls of s{number} at once")
        if self.calls % 4 == 0:
            self.look()
        if self.calls == self.stop_at:
            assert self.pipeline is not None
            self.pipeline.cancel("stop", drain=self.drain)

    def leave(self, number: int) -> None:
        self.inside[number] -= 1


def built(plan: Plan, number: int, watch: Watch) -> Any:
    """The stage of a plan. Whatever it is, it adds one (a generator: gives an item no, one or two times)."""

    def act(item: int) -> Any:
        match plan.fate(item):
            case "fail":
                raise Marker(item)
            case "skip":
                return SKIP
            case _:
                return item + 1

    def call(item: int) -> Any:
        watch.enter(number, plan)
        try:
            answer = act(item)
            return type("Fresh", (int,), {})(answer) if plan.kind == "fresh" and answer is not SKIP else answer
        finally:
            watch.leave(number)

    async def call_later(item: int) -> Any:
        watch.enter(number, plan)
        try:
            if plan.kind == "async zero":
                await pause(item % 3)
            elif plan.kind == "async wait" and item % 4 == 0:
                await asyncio.sleep(0.001)
            if watch.calls % 5 == 0:
                watch.look()
            return act(item)
        finally:
            watch.leave(number)

    def pending(item: int) -> Any:
        return call_later(item) if item % 2 else call(item)

    def generate(item: int) -> Iterator[Any]:
        watch.enter(number, plan)
        try:
            answer = act(item)
            for _ in range(item % 3):
                watch.leave(number)
                try:
                    yield answer
                finally:
                    watch.inside[number] += 1
        finally:
            watch.leave(number)

    async def pure_later(item: int) -> int:
        return item + 1

    chosen: dict[str, Any] = {
        "pure": lambda item: item + 1,
        "async pure": pure_later,
        "call": call,
        "fresh": call,
        "pending": pending,
        "generator": generate,
    }
    handler = (lambda err: None) if plan.policy is ErrorPolicy.SIDE else None
    return stage(
        concurrency=plan.concurrency,
        ordered=plan.ordered,
        on_error=plan.policy,
        error_handler=handler,
        buffer=plan.buffer,
        name=f"s{number}",
    )(chosen.get(plan.kind, call_later))


@dataclass(frozen=True)
class Failed:
    """An error on its way, in the oracle."""

    item: int


def oracle(items: list[Any], chain: list[Plan]) -> tuple[list[Any], list[Counter[str]]]:
    """Outputs and counts by plain arithmetic, up to the first item that stops the run."""
    rows: list[Counter[str]] = []
    for plan in chain:
        row_counts: Counter[str] = Counter()
        made: list[Any] = []
        for item in items:
            row_counts["received"] += 1
            if isinstance(item, Failed):
                row_counts["passed"] += 1
                made.append(item)
                continue
            fate = plan.fate(item)
            if fate == "fail":
                if plan.policy is ErrorPolicy.RAISE:
                    row_counts["raised"] += 1
                    break
                name = {"DROP": "dropped", "EMIT": "emitted_errors", "SIDE": "sided"}[plan.policy.name]
                row_counts[name] += 1
                if plan.policy is ErrorPolicy.EMIT:
                    made.append(Failed(item))
                continue
            row_counts["succeeded"] += 1
            if plan.kind == "generator":
                made += [item + 1] * (item % 3 if fate == "ok" else 0)
            elif fate == "skip":
                row_counts["skipped"] += 1
            else:
                made.append(item + 1)
        row_counts["emitted"] = len(made)
        rows.append(row_counts)
        items = made
    return items, rows


def opened(kind: str, length: int) -> Any:
    async def generate_later() -> AsyncIterator[int]:
        for n in range(length):
            if n % 5 == 4:
                await asyncio.sleep(0)
            yield n

    match kind:
        case "list":
            return list(range(length))
        case "range":
            return range(length)
        case "iterator":
            return iter([*range(length)]) if length else []
        case "generator":
            return (n for n in range(length))
        case "async generator":
            return generate_later()
        case "deque":
            return deque(range(length))
        case "dict":
            return dict.fromkeys(range(length))
        case _:
            return lambda: list(range(length))


async def consumed(
    pipeline: Pipeline[Any], how: str, leave_at: int | None, max_buffer: int, watch: Watch
) -> tuple[Any, str]:
    """What the consumer got (or how many), and how it ended."""
    if how == "run":
        result = await pipeline.run()
        report = result.report if isinstance(result, Err) else result
        assert report is not None, result
        return report.delivered, report.outcome
    if how == "collect":
        outputs = await pipeline.collect()
        if not isinstance(outputs, Err):
            return outputs, "completed"
        assert outputs.report is not None, outputs
        return outputs.report.delivered, outputs.report.outcome
    got: list[Any] = []
    try:
        async with contextlib.aclosing(pipeline.async_iter(max_buffer)) as outputs:
            async for output in outputs:
                got.append(output)
                check_delivered(pipeline, len(got), watch)
                if len(got) == leave_at:
                    return got, "left"
                if len(got) % 4 == 0:
                    await asyncio.sleep(0)
    except (PipelineFailed, PipelineCancelled) as error:
        return got, error.report.outcome if error.report else "refused"
    return got, "completed"


def consumed_in_thread(pipeline: Pipeline[Any], leave_at: int | None, max_buffer: int, watch: Watch) -> tuple[Any, str]:
    got: list[Any] = []
    try:
        with contextlib.closing(pipeline.iter(max_buffer)) as outputs:
            for output in outputs:
                got.append(output)
                check_delivered(pipeline, len(got), watch)
                if len(got) == leave_at:
                    return got, "left"
    except (PipelineFailed, PipelineCancelled) as error:
        return got, error.report.outcome if error.report else "refused"
    return got, "completed"


def check_delivered(pipeline: Pipeline[Any], number: int, watch: Watch) -> None:
    snapshot = pipeline.snapshot()
    if snapshot.state.value != "closed" and snapshot.delivered != number:
        watch.wrong.append(f"the consumer has {number}, the ledger says {snapshot.delivered}")


def plainly(outputs: list[Any]) -> list[Any]:
    return [Failed(output.item) if isinstance(output, Err) else output for output in outputs]


def carried_out(
    chain: list[Plan], length: int, kind: str, how: str, watch: Watch, leave_at: int | None = None, max_buffer: int = 64
) -> tuple[Any, str, Any]:
    """Build, run, and check what holds for every run."""
    made = [built(plan, number, watch) for number, plan in enumerate(chain)]
    watch.pipeline = pipeline = row(opened(kind, length), *made, grace=Grace(drain=20, abort=5))

    async def main() -> tuple[Any, str]:
        async with asyncio.timeout(LIMIT):
            return await consumed(pipeline, how, leave_at, max_buffer, watch)

    got, outcome = consumed_in_thread(pipeline, leave_at, max_buffer, watch) if how == "iter" else asyncio.run(main())
    snapshot = pipeline.snapshot()
    assert watch.wrong == []
    assert snapshot.state.value == "closed"
    assert_balanced(snapshot)
    assert snapshot.delivered == (len(got) if isinstance(got, list) else got)
    return got, outcome, snapshot


ways = st.sampled_from(["run", "collect", "async for", "iter"])
chains = st.lists(plans(), min_size=1, max_size=5)
lengths = st.sampled_from([0, 1, 2, 5, 30, 90])


@given(chain=chains, length=lengths, kind=st.sampled_from(SOURCES), how=ways, max_buffer=st.sampled_from([1, 2, 3, 64]))
@profile(90)
def test_random_rows_give_what_arithmetic_says(
    chain: list[Plan], length: int, kind: str, how: str, max_buffer: int
) -> None:
    got, outcome, snapshot = carried_out(chain, length, kind, how, Watch(), None, max_buffer)
    outputs, rows = oracle(list(range(length)), chain)
    assert outcome == "completed"
    for metrics, expected in zip(snapshot.stages, rows, strict=True):
        assert {name: getattr(metrics, name) for name in expected} == expected, metrics.name
        assert (metrics.cancelled, metrics.discarded) == (0, 0)
    if isinstance(got, list):
        if all(plan.keeps_order for plan in chain):
            assert plainly(got) == outputs
        else:
            assert sorted(map(str, plainly(got))) == sorted(map(str, outputs))


@given(
    chain=chains,
    length=st.sampled_from([5, 30, 90, 300]),
    kind=st.sampled_from(SOURCES),
    how=ways,
    max_buffer=st.sampled_from([1, 3, 64]),
    stop_at=st.integers(1, 200),
    way=st.sampled_from(["cancel", "drain", "leave"]),
)
@profile(80)
def test_random_rows_stop_at_any_point(
    chain: list[Plan], length: int, kind: str, how: str, max_buffer: int, stop_at: int, way: str
) -> None:
    if way == "leave":
        how = how if how in ("async for", "iter") else "async for"
        watch = Watch()
        got, outcome, snapshot = carried_out(chain, length, kind, how, watch, stop_at, max_buffer)
    else:
        watch = Watch(stop_at=stop_at, drain=way == "drain")
        got, outcome, snapshot = carried_out(chain, length, kind, how, watch, None, max_buffer)
    outputs, _ = oracle(list(range(snapshot.pulled)), chain)
    if outcome == "cancelled" and way == "drain":
        assert snapshot.delivered == len(outputs)
    if isinstance(got, list) and all(plan.keeps_order for plan in chain):
        assert plainly(got) == outputs[: len(got)]
        if way == "drain" and outcome == "cancelled":
            assert plainly(got) == outputs


@given(
    chain=chains,
    raising=st.integers(0, 4),
    divisor=st.sampled_from([2, 7, 40]),
    length=st.sampled_from([30, 90]),
    kind=st.sampled_from(SOURCES),
    how=ways,
)
@profile(60)
def test_random_rows_deliver_what_left_a_stage_before_it_raised(
    chain: list[Plan], raising: int, divisor: int, length: int, kind: str, how: str
) -> None:
    number = raising % len(chain)
    one = chain[number]
    one = Plan(
        "call" if one.pure else one.kind, one.concurrency, one.ordered, ErrorPolicy.RAISE, divisor, 0, one.buffer
    )
    chain = [*chain[:number], one, *chain[number + 1 :]]
    got, outcome, snapshot = carried_out(chain, length, kind, how, Watch())
    outputs, rows = oracle(list(range(length)), chain)
    in_order = all(plan.keeps_order for plan in chain[: number + 1])
    assert outcome == ("failed" if rows[number]["raised"] else "completed") or not in_order
    if in_order:
        assert snapshot.delivered == len(outputs)
        for metrics, expected in zip(snapshot.stages[number + 1 :], rows[number + 1 :], strict=True):
            assert {name: getattr(metrics, name) for name in expected} == expected, metrics.name
        assert snapshot.stages[number].raised == rows[number]["raised"]
    if isinstance(got, list) and all(plan.keeps_order for plan in chain):
        assert plainly(got) == outputs


async def test_errors_that_pass_by_a_stage_that_waits_let_the_loop_go_round() -> None:
    held = asyncio.Event()

    async def hold(item: int) -> int:
        await held.wait()
        return item

    errors = [Err(ValueError("earlier"), stage="elsewhere") for _ in range(20_000)]
    pipeline = Pipeline([0, *errors]) >> stage(concurrency=2)(hold)
    task = asyncio.create_task(pipeline.run())
    passed: set[int] = set()
    while (now := pipeline.snapshot().stage("hold").passed) < len(errors):
        passed.add(now)
        await asyncio.sleep(0)
    held.set()
    report = await task
    assert len(passed) > 4
    assert_balanced(report)
