"""The ledger, contract §5: random pipelines, failures, consumers and stops, and the laws checked with arithmetic of our own.

Items are tuples that say where they come from: `(3,)` is the source's fourth item, `(3, 1)` the second output that a
generator made of it. So a duplicate is a repeated tuple, and "in order" is "in lexicographic order".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import pytest
from aiostream import stream
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import stages as operators
from pipeline import Err, ErrorPolicy, Grace, Pipeline, PipelineCancelled, PipelineFailed, RunReport, is_err
from pipeline.runtime import StopLevel
from stages import SKIP, KillSwitch, Retry, stage

_SCALE = float(os.environ.get("PENSTOCK_EXAMPLES", "0.5"))
"""Multiplies the number of examples; above 1 they are drawn afresh each time, for a long hunt."""


_HUNG = 10.0 if _SCALE <= 1 else 3.0
"""Seconds after which a run that should take milliseconds is taken to hang."""


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


# --- the laws, in our own words

_COUNTS = ["received", "processed", "succeeded", "failed", "passed", "dropped", "emitted_errors", "sided", "raised", "retried", "timed_out", "lost", "cancelled", "skipped", "emitted", "in_flight", "queued", "discarded"]


def broken_laws(account: Any, *, closed: bool) -> list[str]:
    """Every law of §5 that a snapshot or a report breaks."""
    broken: list[str] = []
    arriving = account.pulled
    for row in account.stages:
        broken += [f"{row.name}.{name} = {getattr(row, name)}" for name in _COUNTS if getattr(row, name) < 0]
        if row.received != row.processed + row.cancelled + row.in_flight:
            broken.append(f"{row.name}: received {row.received} != {row.processed} + {row.cancelled} + {row.in_flight}")
        if row.processed != row.succeeded + row.failed + row.passed:
            broken.append(f"{row.name}: processed {row.processed} != {row.succeeded} + {row.failed} + {row.passed}")
        if row.failed != row.dropped + row.emitted_errors + row.sided + row.raised:
            broken.append(f"{row.name}: failed {row.failed} is not the sum of the policies")
        if row.lost > row.failed or row.timed_out > row.failed:
            broken.append(f"{row.name}: lost {row.lost}, timed out {row.timed_out}, failed {row.failed}")
        if row.skipped > row.succeeded:
            broken.append(f"{row.name}: skipped {row.skipped} > succeeded {row.succeeded}")
        if arriving != row.received + row.queued + row.discarded:
            broken.append(f"{row.name}: {arriving} sent != {row.received} + {row.queued} + {row.discarded}")
        if closed and (row.in_flight or row.queued):
            broken.append(f"{row.name}: {row.in_flight} in flight and {row.queued} queued after the end")
        arriving = row.emitted
    undelivered = getattr(account, "undelivered", 0)
    if arriving != account.delivered + undelivered + account.discarded:
        broken.append(f"output: {arriving} sent != {account.delivered} + {undelivered} + {account.discarded}")
    if closed and undelivered:
        broken.append(f"output: {undelivered} undelivered after the end")
    return broken


class Auditor:
    """Takes snapshots wherever it is told to, and keeps what was wrong in them."""

    def __init__(self) -> None:
        self.pipeline: Pipeline[Any] | None = None
        self.source: Source | None = None
        self.wrong: list[str] = []
        self.looks = 0

    def look(self, seen: dict[str, int] | None = None) -> None:
        """One snapshot: its laws, and that no count of `seen` (the same observer's last look) has become less."""
        if self.pipeline is None:
            return
        snapshot = self.pipeline.snapshot()
        self.looks += 1
        self.wrong += broken_laws(snapshot, closed=snapshot.state.value == "closed")
        if self.source is not None and self.source.counts and snapshot.pulled > self.source.given:
            self.wrong.append(f"pulled {snapshot.pulled}, but the source gave {self.source.given}")
        if seen is not None:
            for row in snapshot.stages:
                for name in set(_COUNTS) - {"in_flight", "queued"}:
                    key, value = f"{row.name}.{name}", getattr(row, name)
                    if value < seen.get(key, 0):
                        self.wrong.append(f"{key} went from {seen[key]} to {value}")
                    seen[key] = value

    @contextlib.contextmanager
    def thread(self) -> Iterator[None]:
        """Looks from another thread, as fast as it can."""
        over = threading.Event()
        started = threading.Event()

        def watch() -> None:
            seen: dict[str, int] = {}
            while not over.is_set():
                try:
                    self.look(seen)
                except Exception as error:
                    self.wrong.append(f"snapshot() raised {error!r}")
                    started.set()
                    return
                started.set()

        thread = threading.Thread(target=watch, name="auditor", daemon=True)
        thread.start()
        started.wait()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """Ends a run that hangs, and says so: a hang must fail the example that it belongs to."""

        def hung() -> None:
            pipeline = self.pipeline
            assert pipeline is not None
            tasks = sorted(task.get_name() for task in pipeline.runtime.tasks)
            self.wrong.append(f"it hung; left were {tasks} and {[str(row) for row in pipeline.snapshot().stages]}")
            pipeline.cancel("it hung", force=True)

        timer = threading.Timer(_HUNG, hung)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    async def task(self) -> None:
        """Looks from a concurrent task, at every step of the loop."""
        seen: dict[str, int] = {}
        while True:
            self.look(seen)
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _hurried_threads() -> Iterator[None]:
    """Threads take turns much more often than usual, so that a torn reading is likely to be seen."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(interval)


# --- random sources

SOURCES = ["list", "range", "generator", "iterator", "iterable", "async_generator", "async_iterator", "factory", "factory_async", "factory_coroutine", "pipeline", "aiostream"]


class Source:
    """One source of `length` items, of the given kind, that counts what it gives."""

    def __init__(self, kind: str, length: int, tick: Callable[[], None]) -> None:
        self.kind = kind
        self.length = length
        self.given = 0
        self.counts = kind not in ("list", "range", "factory_coroutine")
        self._tick = tick

    def open(self) -> Any:
        match self.kind:
            case "list" | "factory_coroutine":
                items = [(n,) for n in range(self.length)]
                return items if self.kind == "list" else (lambda: self._soon(items))
            case "range":
                return zip(range(self.length))  # a one-shot iterator of one-element tuples
            case "generator":
                return self._generate()
            case "iterator":
                return _Iterator(self)
            case "iterable":
                return _Iterable(self)
            case "async_generator":
                return self._generate_async()
            case "async_iterator":
                return _AsyncIterator(self)
            case "factory":
                return self._generate
            case "factory_async":
                return self._generate_async
            case "pipeline":
                return Pipeline(self._generate)
            case _:
                return stream.iterate(self._generate_async())

    async def _soon(self, items: list[Any]) -> list[Any]:
        await asyncio.sleep(0)
        return items

    def give(self) -> tuple[int]:
        self._tick()
        self.given += 1
        return (self.given - 1,)

    def _generate(self) -> Iterator[Any]:
        while self.given < self.length:
            yield self.give()

    async def _generate_async(self) -> AsyncIterator[Any]:
        while self.given < self.length:
            if self.given % 3 == 2:
                await asyncio.sleep(0)
            yield self.give()


class _Iterator:
    def __init__(self, source: Source) -> None:
        self._source = source

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        if self._source.given >= self._source.length:
            raise StopIteration
        return self._source.give()


class _Iterable(list[Any]):
    """A subclass of list: nothing may be assumed about it."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(_Iterator(self._source))


class _AsyncIterator:
    def __init__(self, source: Source) -> None:
        self._source = source

    def __aiter__(self) -> _AsyncIterator:
        return self

    async def __anext__(self) -> Any:
        if self._source.given % 4 == 1:
            await asyncio.sleep(0)
        if self._source.given >= self._source.length:
            raise StopAsyncIteration
        return self._source.give()


# --- random stages

ONE_TO_ONE = ("plain", "coroutine", "stateful", "map", "filter", "tap")
MANY = ("generator", "async_generator", "flat_map")


@dataclass(frozen=True)
class Plan:
    """One stage: what it is, and what it does with which item, as a function of the item alone."""

    kind: str
    run_in: str = "loop"
    concurrency: int = 1
    ordered: bool = False
    buffer: int | None = None
    policy: ErrorPolicy | None = None
    async_handler: bool = False
    attempts: int = 1
    seed: int = 0
    failing: int = 0
    """So many of a hundred items."""
    odd: int = 0
    """So many of a hundred items: skipped, failed by a returned Err, or failed until the last attempt."""
    size: int = 3
    waits: bool = False

    def rolled(self, item: Any) -> str:
        """What happens to this item: "ok", "fail", "skip", "err" or "late"."""
        roll = number_of(self.seed, _key(item)) % 100
        if roll < self.failing:
            return "fail"
        if roll < self.failing + self.odd:
            if self.kind == "tap":
                return "late"
            return ("skip", "err", "late")[roll % 3] if self.kind != "filter" else ("skip", "late")[roll % 2]
        return "ok"

    def outputs(self, item: Any) -> list[Any]:
        """What a generator makes of the item: parts of a batch, or numbered children."""
        if isinstance(item, list):
            return list(item)
        return [(*item, n) for n in range(number_of(self.seed, item, "many") % 4)]

    @property
    def keeps_order(self) -> bool:
        return self.ordered or self.concurrency == 1

    @property
    def resolved(self) -> ErrorPolicy:
        return self.policy or ErrorPolicy.DROP


def _key(item: Any) -> Any:
    """The item's identity; a batch goes by its first element."""
    return item if isinstance(item, tuple) else _key(item[0])


def number_of(*parts: Any) -> int:
    """A number that depends on its arguments only; `hash` of a text differs between processes."""
    return crc32(repr(parts).encode())


class Boom(Exception):
    """The failure that the tests inject."""


@dataclass
class Act:
    """What the handlers of one run share: how they tick, and where attempts are counted."""

    auditor: Auditor
    tick: Callable[[], Any]
    attempts: Counter[Any] = field(default_factory=Counter)
    sided: Counter[int] = field(default_factory=Counter)
    calls: Counter[int] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_stage(plan: Plan, number: int, act: Act) -> Any:
    """The stage that a plan describes, named by its number."""
    name = f"s{number}"
    if plan.kind == "batch":
        return operators.batch(plan.size, buffer=plan.buffer, name=name)
    if plan.kind == "take":
        return operators.take(plan.size).with_options(name=name)
    options: dict[str, Any] = {
        "run_in": plan.run_in,
        "concurrency": plan.concurrency,
        "ordered": plan.ordered,
        "buffer": plan.buffer,
        "on_error": plan.policy,
        "retry": Retry(attempts=plan.attempts, wait=0) if plan.attempts > 1 else None,
        "name": name,
    }
    if plan.policy is ErrorPolicy.SIDE:
        options["error_handler"] = _side_handler(plan, number, act)
    handler = _handler(plan, number, act)
    if plan.kind in ("map", "filter", "tap", "flat_map"):
        return getattr(operators, plan.kind)(handler, **options)
    return stage(**options)(handler)


def _side_handler(plan: Plan, number: int, act: Act) -> Callable[[Err], Any]:
    def note(err: Err) -> None:
        assert err.stage == f"s{number}"
        act.sided[number] += 1

    async def note_later(err: Err) -> None:
        await asyncio.sleep(0)
        note(err)

    return note_later if plan.async_handler else note


def _begin(plan: Plan, number: int, act: Act, item: Any) -> Any:
    """What every handler does first: count, look, roll; returns SKIP, an Err, a KillSwitch, or None to go on."""
    with act.lock:
        act.calls[number] += 1
        act.attempts[number, _key(item)] += 1
        attempt = act.attempts[number, _key(item)]
    if act.calls[number] % 3 == 0:
        act.auditor.look()
    asked = act.tick()
    if isinstance(asked, KillSwitch):
        return asked
    match plan.rolled(item):
        case "fail":
            raise Boom(item)
        case "late" if attempt < plan.attempts:
            raise Boom("not yet")
        case "skip":
            return SKIP
        case "err":
            return Err("handed back")
        case _:
            return None


def _handler(plan: Plan, number: int, act: Act) -> Callable[..., Any]:
    def plain(item: Any) -> Any:
        answer = _begin(plan, number, act, item)
        if plan.kind == "filter":
            return answer is not SKIP
        if plan.kind == "tap":
            return "ignored"
        return item if answer is None else answer

    def stateful(item: Any, state: Any) -> Any:
        state.update(last=item)
        assert state.stage == f"s{number}"
        assert state.get("last") is item
        return plain(item)

    async def coroutine(item: Any) -> Any:
        if plan.waits:
            for _ in range(number_of(plan.seed, _key(item), "waits") % 3):
                await asyncio.sleep(0)
        return plain(item)

    def generator(item: Any) -> Iterator[Any]:
        answer = _begin(plan, number, act, item)
        if answer is not None:
            yield answer
            return
        yield from plan.outputs(item)

    async def async_generator(item: Any) -> AsyncIterator[Any]:
        for output in generator(item):
            if plan.waits:
                await asyncio.sleep(0)
            yield output

    chosen: dict[str, Callable[..., Any]] = {
        "coroutine": coroutine,
        "stateful": stateful,
        "generator": generator,
        "flat_map": generator,
        "async_generator": async_generator,
    }
    return chosen.get(plan.kind, coroutine if plan.waits and plan.kind in ("map", "filter", "tap") else plain)


@st.composite
def plans(draw: st.DrawFn, *, kinds: tuple[str, ...], policies: tuple[ErrorPolicy | None, ...]) -> Plan:
    kind = draw(st.sampled_from(kinds))
    if kind in ("batch", "take"):
        return Plan(kind, size=draw(st.integers(0 if kind == "take" else 1, 9)), buffer=draw(st.sampled_from([None, 0, 1, 4])))
    return Plan(
        kind,
        run_in=draw(st.sampled_from(["loop", "loop", "thread"])),
        concurrency=draw(st.sampled_from([1, 1, 2, 5])),
        ordered=draw(st.booleans()),
        buffer=draw(st.one_of(st.none(), st.integers(0, 8))),
        policy=draw(st.sampled_from(policies)),
        async_handler=draw(st.booleans()),
        attempts=draw(st.sampled_from([1, 1, 3])),
        seed=draw(st.integers(0, 999)),
        failing=draw(st.sampled_from([0, 0, 10, 40])),
        odd=draw(st.sampled_from([0, 0, 30])),
        waits=draw(st.booleans()),
    )


QUIET = (None, ErrorPolicy.DROP, ErrorPolicy.EMIT, ErrorPolicy.SIDE)
"""The policies that never stop a pipeline."""


def build(source: Source, chain: list[Plan], act: Act, *, nested: int = 0, **options: Any) -> Pipeline[Any]:
    """The pipeline; with `nested`, the stages from there on come in a pipeline of their own."""
    pipeline: Pipeline[Any] = Pipeline(source.open(), grace=Grace(drain=20, abort=5), **options)
    made = [make_stage(plan, number, act) for number, plan in enumerate(chain)]
    cut = nested % (len(made) + 1)
    for one in made[:cut]:
        pipeline = pipeline >> one
    if cut < len(made):
        inner: Pipeline[Any] = Pipeline(name="inner")
        for one in made[cut:]:
            inner.stage(one)
        pipeline = pipeline >> inner
    act.auditor.pipeline, act.auditor.source = pipeline, source
    return pipeline


def flat(outputs: list[Any]) -> list[Any]:
    """All identities in the outputs, batches taken apart; an error comes after the children that its item had."""
    found: list[Any] = []
    for output in outputs:
        if isinstance(output, list):
            found += flat(output)
        elif isinstance(output, Err):
            found.append((*_key(output.item), 99))
        else:
            found.append(output)
    return found


# --- what must come out when nothing stops the run: a model

_BY_POLICY = {ErrorPolicy.DROP: "dropped", ErrorPolicy.EMIT: "emitted_errors", ErrorPolicy.SIDE: "sided"}


@dataclass(frozen=True)
class Failure:
    """An error of an earlier stage, on its way, in the model."""

    item: Any


def model(length: int, chain: list[Plan]) -> tuple[list[Any], list[dict[str, int]]]:
    """The outputs in order and the counts of every stage, by plain arithmetic."""
    items: list[Any] = [(n,) for n in range(length)]
    rows: list[dict[str, int]] = []
    for plan in chain:
        items, row = _model_stage(plan, items)
        rows.append(row)
    return items, rows


def _model_stage(plan: Plan, items: list[Any]) -> tuple[list[Any], dict[str, int]]:
    counts: Counter[str] = Counter(received=len(items), processed=len(items))
    counts["passed"] = sum(isinstance(item, Failure) for item in items)
    if plan.kind == "batch":
        whole = [item for item in items if not isinstance(item, Failure)]
        counts["succeeded"] = len(whole)
        made: list[Any] = [whole[n : n + plan.size] for n in range(0, len(whole), plan.size)]
        made += [item for item in items if isinstance(item, Failure)]
        counts["emitted"] = len(made)
        return made, counts
    made = []
    for item in items:
        if isinstance(item, Failure):
            made.append(item)
        else:
            made += _model_item(plan, item, counts)
    counts["failed"] = counts["dropped"] + counts["emitted_errors"] + counts["sided"]
    counts["emitted"] = len(made)
    return made, counts


def _model_item(plan: Plan, item: Any, counts: Counter[str]) -> list[Any]:
    fate = plan.rolled(item)
    if fate == "late":
        counts["retried"] += plan.attempts - 1
        fate = "ok"
    elif fate == "fail":
        counts["retried"] += plan.attempts - 1
    if fate in ("fail", "err"):
        counts[_BY_POLICY[plan.resolved]] += 1
        return [Failure(item)] if plan.resolved is ErrorPolicy.EMIT else []
    counts["succeeded"] += 1
    if fate == "skip":
        counts["skipped"] += plan.kind not in MANY  # a generator that yields SKIP has an output less, no more
        return []
    return plan.outputs(item) if plan.kind in MANY else [item]


# --- how a run is consumed


@dataclass
class Ending:
    """What a consumer saw of a run: what it got, the account, and how it ended."""

    got: list[Any] | None
    report: RunReport | None
    outcome: str
    left: bool = False
    """The consumer left early."""


async def consume(pipeline: Pipeline[Any], how: str, limit: int | None = None, max_buffer: int = 64) -> Ending:
    if how == "run":
        return ended(await pipeline.run(), None)
    if how == "collect":
        result = await pipeline.collect()
        if not is_err(result):
            return Ending(result, None, "completed")
        return ended(result, None)
    got: list[Any] = []
    try:
        iteration = pipeline.async_iter(max_buffer)
        async with contextlib.aclosing(iteration):
            async for item in iteration:
                got.append(item)
                if limit is not None and len(got) >= limit:
                    return Ending(got, None, "left", left=True)
                if len(got) % 5 == 0:
                    await asyncio.sleep(0)
    except (PipelineFailed, PipelineCancelled) as error:
        return Ending(got, error.report, error.report.outcome if error.report else "refused")
    return Ending(got, None, "completed")


def consume_in_thread(pipeline: Pipeline[Any], limit: int | None = None, max_buffer: int = 64) -> Ending:
    got: list[Any] = []
    try:
        with contextlib.closing(pipeline.iter(max_buffer)) as iteration:
            for item in iteration:
                got.append(item)
                if limit is not None and len(got) >= limit:
                    return Ending(got, None, "left", left=True)
    except (PipelineFailed, PipelineCancelled) as error:
        return Ending(got, error.report, error.report.outcome if error.report else "refused")
    return Ending(got, None, "completed")


def ended(result: Any, got: list[Any] | None) -> Ending:
    if isinstance(result, Err):
        assert result.report is not None, result
        return Ending(got, result.report, result.report.outcome)
    return Ending(got, result, result.outcome)


def go(pipeline: Pipeline[Any], auditor: Auditor, how: str, **options: Any) -> Ending:
    """One run, with an auditor in a thread and, where there is a loop of ours, in a task."""

    async def main() -> Ending:
        watcher = asyncio.create_task(auditor.task())
        try:
            return await consume(pipeline, how, **options)
        finally:
            watcher.cancel()
            await asyncio.wait((watcher,))

    with auditor.thread(), auditor.patience():
        return consume_in_thread(pipeline, **options) if how == "iter" else asyncio.run(main())


def check_end(pipeline: Pipeline[Any], act: Act, source: Source, ending: Ending) -> None:
    """What must hold after every run, however it ended."""
    snapshot = pipeline.snapshot()
    assert snapshot.state.value == "closed"
    assert act.auditor.wrong == []
    assert broken_laws(snapshot, closed=True) == []
    report = ending.report
    if report is not None:
        assert broken_laws(report, closed=True) == []
        assert report.balanced
        # Who is stopped by force waits for threads for 0.1 s only: on a busy machine some take longer.
        forced = any(request.level is StopLevel.KILL for request in pipeline.runtime.requests)
        assert forced or report.abandoned == ()
        assert (report.pulled, report.delivered, report.stages) == (snapshot.pulled, snapshot.delivered, snapshot.stages)
        assert report.processed == sum(row.processed for row in report.stages)
        assert report.failed == sum(row.failed for row in report.stages)
    if source.counts:
        assert snapshot.pulled == source.given
    assert snapshot.pulled <= source.length
    for number, sided in act.sided.items():
        assert snapshot.stage(f"s{number}").sided <= sided


def check_outputs(chain: list[Plan], got: list[Any]) -> None:
    """No item twice, and in order where that is promised."""
    identities = flat(got)
    assert [identity for identity, times in Counter(identities).items() if times > 1] == []
    if all(plan.keeps_order for plan in chain):
        if any(plan.kind == "batch" for plan in chain):  # which errors overtake, for they are never held
            identities = [identity for identity in identities if identity[-1] != 99]
        assert identities == sorted(identities)


consumers = st.sampled_from(["run", "collect", "async_for", "iter"])


class TestWhenNothingStopsTheRun:
    @given(
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY, "batch"), policies=QUIET), min_size=1, max_size=5),
        length=st.integers(0, 40),
        kind=st.sampled_from(SOURCES),
        how=consumers,
        nested=st.integers(0, 5),
        max_buffer=st.sampled_from([1, 3, 64]),
    )
    @profile(80)
    def test_every_count_and_every_output_is_what_arithmetic_says(
        self, chain: list[Plan], length: int, kind: str, how: str, nested: int, max_buffer: int
    ) -> None:
        chain = [plan for number, plan in enumerate(chain) if plan.kind != "batch" or number == _first(chain, "batch")]
        act = Act(Auditor(), lambda: None)
        source = Source(kind, length, lambda: None)
        pipeline = build(source, chain, act, nested=nested)
        options = {"max_buffer": max_buffer} if how in ("async_for", "iter") else {}
        ending = go(pipeline, act.auditor, how, **options)

        check_end(pipeline, act, source, ending)
        assert ending.outcome == "completed"
        snapshot = pipeline.snapshot()
        assert snapshot.pulled == length
        if not _deterministic(chain):
            return
        outputs, rows = model(length, chain)
        for row, expected in zip(snapshot.stages, rows, strict=True):
            actual = {name: getattr(row, name) for name in _COUNTS}
            assert actual == dict.fromkeys(_COUNTS, 0) | {name: expected[name] for name in expected}, row.name
        assert snapshot.delivered == len(outputs)
        if ending.got is not None:
            check_outputs(chain, ending.got)
            expected_items = [(*_key(output.item), 99) if isinstance(output, Failure) else output for output in outputs]
            assert sorted(flat(ending.got)) == sorted(flat(expected_items))

    @given(
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY), policies=QUIET), min_size=1, max_size=4),
        amount=st.integers(0, 9),
        where=st.integers(0, 4),
        length=st.integers(0, 60),
        kind=st.sampled_from(SOURCES),
        how=consumers,
    )
    @profile(40)
    def test_take_gives_the_first_items_and_the_rest_is_in_the_ledger(
        self, chain: list[Plan], amount: int, where: int, length: int, kind: str, how: str
    ) -> None:
        chain = [*chain[:where], Plan("take", size=amount), *chain[where:]]
        act = Act(Auditor(), lambda: None)
        source = Source(kind, length, lambda: None)
        pipeline = build(source, chain, act)
        ending = go(pipeline, act.auditor, how)

        check_end(pipeline, act, source, ending)
        assert ending.outcome == "completed"
        position = next(number for number, plan in enumerate(chain) if plan.kind == "take")
        row = pipeline.snapshot().stages[position]
        assert row.succeeded <= amount
        assert row.emitted == row.succeeded + row.passed
        if ending.got is not None:
            check_outputs(chain, ending.got)
            before, _ = model(length, chain[:position])
            reaching = [item for item in before if not isinstance(item, Failure)]
            assert row.succeeded == min(amount, len(reaching))
            if all(plan.keeps_order for plan in chain[:position]):
                kept = {tuple(item) for item in reaching[:amount]}
                depth = len(next(iter(kept), ()))
                whole = [identity for identity in flat(ending.got) if identity[-1] != 99]
                assert {identity[:depth] for identity in whole} <= kept


def _first(chain: list[Plan], kind: str) -> int:
    return next(number for number, plan in enumerate(chain) if plan.kind == kind)


def _deterministic(chain: list[Plan]) -> bool:
    """Whether the model can say which items share a batch."""
    for number, plan in enumerate(chain):
        if plan.kind == "batch":
            return all(before.keeps_order for before in chain[:number])
    return True


# --- stops at random moments

STOPS = ("cancel", "drain", "force", "cancel twice", "drain then cancel", "drain then force", "kill switch", "from a thread")


class Stopper:
    """Stops a pipeline when something has happened so many times: at a pull, in a handler, at a step of the loop."""

    def __init__(self, what: str, moment: int) -> None:
        self.what = what
        self.moment = moment
        self.pipeline: Pipeline[Any] | None = None
        self.asked = False
        self._ticks = 0
        self._lock = threading.Lock()

    def tick(self) -> Any:
        with self._lock:
            self._ticks += 1
            due = self._ticks == self.moment
        return self.stop() if due else None

    def stop(self) -> Any:
        pipeline = self.pipeline
        assert pipeline is not None
        self.asked = True
        match self.what:
            case "cancel":
                pipeline.cancel("enough", code="test")
            case "drain":
                pipeline.cancel("enough", code="test", drain=True)
            case "force":
                pipeline.cancel("enough", code="test", force=True)
            case "cancel twice":
                pipeline.cancel("enough", code="test")
                pipeline.cancel("really", code="test")
            case "drain then cancel":
                pipeline.cancel("enough", code="test", drain=True)
                pipeline.cancel("really", code="test")
            case "drain then force":
                pipeline.cancel("enough", code="test", drain=True)
                pipeline.cancel("really", code="test", force=True)
            case "kill switch":
                return KillSwitch("enough")
            case _:
                thread = threading.Thread(target=pipeline.cancel, args=("enough",), kwargs={"code": "test"})
                thread.start()
                thread.join()
        return None


class TestWhenTheRunIsStopped:
    @given(
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY, "batch", "take"), policies=QUIET), min_size=1, max_size=5),
        length=st.integers(1, 60),
        kind=st.sampled_from(SOURCES),
        how=consumers,
        nested=st.integers(0, 5),
        what=st.sampled_from(STOPS),
        moment=st.integers(1, 80),
        max_buffer=st.sampled_from([1, 3, 64]),
    )
    @profile(90)
    def test_the_books_balance_when_it_stops_at_any_pull_or_call(
        self, chain: list[Plan], length: int, kind: str, how: str, nested: int, what: str, moment: int, max_buffer: int
    ) -> None:
        stopper = Stopper(what, moment)
        act = Act(Auditor(), stopper.tick)
        source = Source(kind, length, stopper.tick)
        pipeline = stopper.pipeline = build(source, chain, act, nested=nested)
        options = {"max_buffer": max_buffer} if how in ("async_for", "iter") else {}
        ending = go(pipeline, act.auditor, how, **options)
        check_end(pipeline, act, source, ending)
        check_stopped(pipeline, chain, ending)

    @given(
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY, "batch", "take"), policies=QUIET), min_size=1, max_size=4),
        length=st.integers(1, 60),
        kind=st.sampled_from(SOURCES),
        how=st.sampled_from(["run", "collect", "async_for"]),
        what=st.sampled_from([stop for stop in STOPS if stop != "kill switch"]),
        steps=st.integers(0, 60),
    )
    @profile(60)
    def test_the_books_balance_when_it_stops_at_any_step_of_the_loop(
        self, chain: list[Plan], length: int, kind: str, how: str, what: str, steps: int
    ) -> None:
        stopper = Stopper(what, -1)
        act = Act(Auditor(), lambda: None)
        source = Source(kind, length, lambda: None)
        pipeline = stopper.pipeline = build(source, chain, act)

        async def main() -> Ending:
            consumer = asyncio.create_task(consume(pipeline, how))
            for _ in range(steps + 1):  # the first step starts the run
                await asyncio.sleep(0)
            stopper.stop()
            return await consumer

        with act.auditor.thread(), act.auditor.patience():
            ending = asyncio.run(main())
        check_end(pipeline, act, source, ending)
        check_stopped(pipeline, chain, ending)

    @given(
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY, "batch"), policies=QUIET), min_size=1, max_size=4),
        length=st.integers(1, 60),
        kind=st.sampled_from(SOURCES),
        how=st.sampled_from(["run", "collect", "async_for"]),
        steps=st.integers(0, 60),
        again=st.one_of(st.none(), st.integers(0, 3)),
    )
    @profile(40)
    def test_the_books_balance_when_the_waiting_task_is_cancelled(
        self, chain: list[Plan], length: int, kind: str, how: str, steps: int, again: int | None
    ) -> None:
        act = Act(Auditor(), lambda: None)
        source = Source(kind, length, lambda: None)
        pipeline = build(source, chain, act)
        got: list[Any] = []

        async def wait() -> None:
            if how != "async_for":
                await (pipeline.run() if how == "run" else pipeline.collect())
                return
            async for item in pipeline:
                got.append(item)

        async def main() -> bool:
            waiter = asyncio.create_task(wait())
            for _ in range(steps + 1):
                await asyncio.sleep(0)
            waiter.cancel()
            if again is not None:
                for _ in range(again):
                    await asyncio.sleep(0)
                waiter.cancel()
            await asyncio.wait((waiter,))
            return waiter.cancelled()

        with act.auditor.thread(), act.auditor.patience():
            cancelled = asyncio.run(main())
        snapshot = pipeline.snapshot()
        assert cancelled or not any(reason.code == "parent_cancelled" for reason in snapshot.reasons)
        check_end(pipeline, act, source, Ending(None, None, ""))
        if how == "async_for":
            assert snapshot.delivered == len(got)

    @given(
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY, "batch"), policies=QUIET), min_size=1, max_size=4),
        length=st.integers(1, 60),
        kind=st.sampled_from(SOURCES),
        how=st.sampled_from(["async_for", "iter"]),
        limit=st.integers(1, 12),
        max_buffer=st.sampled_from([1, 3, 64]),
    )
    @profile(60)
    def test_an_iteration_that_is_left_early_has_got_what_was_delivered(
        self, chain: list[Plan], length: int, kind: str, how: str, limit: int, max_buffer: int
    ) -> None:
        act = Act(Auditor(), lambda: None)
        source = Source(kind, length, lambda: None)
        pipeline = build(source, chain, act)
        ending = go(pipeline, act.auditor, how, limit=limit, max_buffer=max_buffer)
        check_end(pipeline, act, source, ending)
        snapshot = pipeline.snapshot()
        assert ending.got is not None
        assert snapshot.delivered == len(ending.got)
        check_outputs(chain, ending.got)
        if ending.left:
            assert [reason.code for reason in snapshot.reasons] in (["iter_closed"], [])

    @given(
        chain=st.lists(
            plans(kinds=(*ONE_TO_ONE, *MANY, "batch"), policies=(*QUIET, ErrorPolicy.RAISE)), min_size=1, max_size=5
        ),
        raising=st.integers(0, 5),
        length=st.integers(1, 60),
        kind=st.sampled_from(SOURCES),
        how=consumers,
        nested=st.integers(0, 5),
    )
    @profile(60)
    def test_the_books_balance_when_a_stage_raises(
        self, chain: list[Plan], raising: int, length: int, kind: str, how: str, nested: int
    ) -> None:
        bad = Plan("plain", policy=ErrorPolicy.RAISE, failing=20, seed=raising)
        chain = [*chain[:raising], bad, *chain[raising:]]
        act = Act(Auditor(), lambda: None)
        source = Source(kind, length, lambda: None)
        pipeline = build(source, chain, act, nested=nested)
        ending = go(pipeline, act.auditor, how)
        check_end(pipeline, act, source, ending)
        snapshot = pipeline.snapshot()
        raised = sum(row.raised for row in snapshot.stages)
        assert ending.outcome == ("failed" if raised else "completed")
        if ending.got is not None:
            check_outputs(chain, ending.got)
            assert snapshot.delivered == len(ending.got)

    @given(
        length=st.integers(1, 60),
        bad=st.integers(0, 59),
        kind=st.sampled_from(["generator", "iterator", "async_generator", "async_iterator", "factory"]),
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY, "batch"), policies=QUIET), min_size=0, max_size=3),
        how=consumers,
    )
    @profile(30)
    def test_the_books_balance_when_the_source_raises(
        self, length: int, bad: int, kind: str, chain: list[Plan], how: str
    ) -> None:
        def tick() -> None:
            if source.given == bad:
                raise Boom("source")

        act = Act(Auditor(), lambda: None)
        source = Source(kind, length, tick)
        pipeline = build(source, chain, act)
        ending = go(pipeline, act.auditor, how)
        check_end(pipeline, act, source, ending)
        assert ending.outcome == ("failed" if bad < length else "completed")
        assert pipeline.snapshot().pulled == min(bad, length)


def check_stopped(pipeline: Pipeline[Any], chain: list[Plan], ending: Ending) -> None:
    snapshot = pipeline.snapshot()
    if snapshot.reasons and ending.outcome != "refused":
        assert ending.outcome == "cancelled"
        assert snapshot.reasons[0].message == "enough"
    else:
        assert ending.outcome in ("completed", "refused")
    if ending.report is not None and ending.report.drained:
        assert not any(row.cancelled or row.discarded for row in snapshot.stages)
    if ending.got is not None:
        check_outputs(chain, ending.got)
        assert snapshot.delivered == len(ending.got)


class TestADrain:
    @given(
        chain=st.lists(plans(kinds=(*ONE_TO_ONE, *MANY, "batch"), policies=QUIET), min_size=1, max_size=4),
        kind=st.sampled_from(SOURCES),
        how=consumers,
        moment=st.integers(1, 60),
    )
    @profile(40)
    def test_loses_nothing_that_was_pulled(self, chain: list[Plan], kind: str, how: str, moment: int) -> None:
        chain = [plan for number, plan in enumerate(chain) if plan.kind != "batch" or number == _first(chain, "batch")]
        stopper = Stopper("drain", moment)
        act = Act(Auditor(), stopper.tick)
        source = Source(kind, 60, lambda: None)
        pipeline = stopper.pipeline = build(source, chain, act)
        ending = go(pipeline, act.auditor, how)
        check_end(pipeline, act, source, ending)
        snapshot = pipeline.snapshot()
        if not snapshot.reasons:
            return
        assert ending.outcome == "cancelled"
        assert ending.report is not None
        assert ending.report.drained
        assert not any(row.cancelled or row.discarded for row in snapshot.stages)
        if _deterministic(chain):
            # What came first from the source has gone all the way, as if the source had simply been that short.
            outputs, rows = model(snapshot.pulled, chain)
            assert snapshot.delivered == len(outputs)
            assert [row.succeeded for row in snapshot.stages] == [row["succeeded"] for row in rows]


class TestProcessStages:
    @given(
        before=plans(kinds=("plain", "coroutine", "generator"), policies=QUIET),
        failing=st.sampled_from([0, 30]),
        many=st.booleans(),
        concurrency=st.integers(1, 2),
        ordered=st.booleans(),
        buffer=st.one_of(st.none(), st.integers(0, 8)),
        policy=st.sampled_from([ErrorPolicy.DROP, ErrorPolicy.EMIT, ErrorPolicy.RAISE]),
        stop=st.one_of(st.none(), st.sampled_from(["cancel", "drain", "force"])),
        moment=st.integers(1, 40),
    )
    @profile(6)
    def test_the_books_balance_with_a_process_stage_in_the_middle(
        self,
        before: Plan,
        failing: int,
        many: bool,
        concurrency: int,
        ordered: bool,
        buffer: int | None,
        policy: ErrorPolicy,
        stop: str | None,
        moment: int,
    ) -> None:
        def in_process(item: Any) -> Any:
            if sum(item) * 37 % 100 < failing:
                raise ValueError(item)
            return item

        def many_in_process(item: Any) -> Iterator[Any]:
            if sum(item) * 37 % 100 < failing:
                raise ValueError(item)
            yield (*item, 0)
            yield (*item, 1)

        stopper = Stopper(stop or "", moment if stop else -1)
        act = Act(Auditor(), stopper.tick)
        source = Source("generator", 40, lambda: None)
        middle = stage(
            run_in="process", concurrency=concurrency, ordered=ordered, buffer=buffer, on_error=policy, name="s1"
        )(many_in_process if many else in_process)
        last = make_stage(Plan("plain"), 2, act)
        pipeline = stopper.pipeline = Pipeline(source.open()) >> make_stage(before, 0, act) >> middle >> last
        act.auditor.pipeline, act.auditor.source = pipeline, source
        ending = go(pipeline, act.auditor, "async_for")

        check_end(pipeline, act, source, ending)
        assert ending.got is not None
        check_outputs([before, Plan("plain", concurrency=concurrency, ordered=ordered)], ending.got)
        snapshot = pipeline.snapshot()
        assert snapshot.delivered == len(ending.got)
        assert ending.outcome == ("completed" if not snapshot.reasons else "cancelled" if stopper.asked else "failed") or (
            stopper.asked and snapshot.stage("s1").raised
        )


class TestSingleLaws:
    """The words of §5 one by one, on the smallest pipeline that shows each."""

    async def test_an_item_is_in_flight_until_its_last_output_has_left(self) -> None:
        seen: list[tuple[int, int]] = []

        @stage
        def two(item: int) -> Iterator[int]:
            yield item
            row = pipeline.snapshot().stage("two")
            seen.append((row.in_flight, row.succeeded))
            yield item

        pipeline = Pipeline([1]) >> two
        assert await pipeline.collect() == [1, 1]
        assert seen == [(1, 0)]
        assert pipeline.snapshot().stage("two").succeeded == 1

    async def test_an_item_stopped_before_its_last_output_has_left_is_cancelled(self) -> None:
        @stage
        async def two(item: int) -> AsyncIterator[int]:
            yield item
            pipeline.cancel("now")
            await asyncio.Event().wait()  # until the stop
            yield item

        pipeline = Pipeline([1]) >> two
        result = await pipeline.run()
        assert is_err(result)
        assert result.report is not None
        row = result.report.stage("two")
        assert (row.received, row.processed, row.cancelled, row.emitted) == (1, 0, 1, 1)

    async def test_skip_a_refusal_and_a_kill_switch_are_successes_that_emit_nothing(self) -> None:
        skipping = stage(name="skipping")(lambda item: SKIP if item % 2 else item)
        refusing = operators.filter(lambda item: item != 2, name="refusing")
        killing = stage(name="killing")(lambda item: KillSwitch("six") if item == 6 else item)
        result = await (Pipeline(range(100)) >> skipping >> refusing >> killing).run()
        assert is_err(result)
        assert result.report is not None
        rows = {row.name: (row.succeeded, row.skipped, row.emitted) for row in result.report.stages}
        assert rows == {"skipping": (7, 3, 4), "refusing": (4, 1, 3), "killing": (3, 1, 2)}

    async def test_errors_of_earlier_stages_are_passed_and_not_failed(self) -> None:
        @stage(on_error=ErrorPolicy.EMIT)
        def odd_fails(item: int) -> int:
            if item % 2:
                raise Boom(item)
            return item

        later = stage(concurrency=3, ordered=True, name="later")(lambda item: item)
        report = await (Pipeline(range(10)) >> odd_fails >> later >> operators.batch(2)).run()
        assert isinstance(report, RunReport)
        assert [(row.failed, row.passed) for row in report.stages] == [(5, 0), (0, 5), (0, 5)]
        assert report.failed == 5

    async def test_a_timed_out_item_is_a_part_of_the_failed_ones(self) -> None:
        @stage(timeout=0.01)
        async def waits(item: int) -> int:
            if item == 1:
                await asyncio.Event().wait()  # until the timeout
            return item

        report = await (Pipeline(range(3)) >> waits).run()
        assert isinstance(report, RunReport)
        row = report.stage("waits")
        assert (row.failed, row.timed_out, row.dropped, row.succeeded) == (1, 1, 1, 2)

    async def test_what_waits_before_a_stopped_stage_is_discarded(self) -> None:
        begun = asyncio.Event()

        @stage(buffer=4)
        async def stuck(item: int) -> int:
            begun.set()
            await asyncio.Event().wait()  # until the stop
            return item

        async def source() -> AsyncIterator[int]:
            for number in range(100):
                if number == 1:
                    await begun.wait()
                if number == 4:
                    pipeline.cancel("four wait")
                yield number

        pipeline = Pipeline(source) >> stuck
        result = await pipeline.run()
        assert is_err(result)
        assert result.report is not None
        row = result.report.stage("stuck")
        assert row.received == row.cancelled == 1
        assert row.discarded == result.report.pulled - 1
        assert broken_laws(result.report, closed=True) == []

    async def test_a_cancellation_that_a_plain_handler_makes_up_is_that_items_failure(self) -> None:
        @stage
        def reads_a_cancelled_future(item: int) -> int:
            if item == 2:
                raise asyncio.CancelledError
            return item

        pipeline = Pipeline([1, 2, 3]) >> reads_a_cancelled_future
        assert await pipeline.collect() == [1, 3]
        row = pipeline.snapshot().stages[0]
        assert (row.received, row.dropped, row.in_flight) == (3, 1, 0)

    async def test_a_cancellation_that_an_awaitable_makes_up_is_that_items_failure(self) -> None:
        async def fails(item: int) -> int:
            if item == 2:
                raise asyncio.CancelledError
            return item

        pipeline = Pipeline([1, 2, 3]) >> stage(name="returns a coroutine")(lambda item: fails(item))
        assert await pipeline.collect() == [1, 3]
        assert pipeline.snapshot().stages[0].dropped == 1

    async def test_a_cancellation_that_a_generator_makes_up_is_that_items_failure(self) -> None:
        @stage
        def makes_it_up(item: int) -> Iterator[int]:
            if item == 2:
                raise asyncio.CancelledError
            yield item

        pipeline = Pipeline([1, 2, 3]) >> makes_it_up
        assert await pipeline.collect() == [1, 3]
        assert pipeline.snapshot().stages[0].dropped == 1

    @pytest.mark.parametrize("concurrency", [1, 3])
    async def test_a_kill_switch_behind_a_generator_ends_it_at_once(self, concurrency: int) -> None:
        switch = stage(name="switch", concurrency=concurrency)(lambda item: KillSwitch(f"at {item}"))
        pipeline = Pipeline([0]) >> operators.flat_map(lambda _: range(50)) >> switch
        result = await pipeline.run()
        assert is_err(result)
        assert [reason.message for reason in result.reasons] == ["at 0"]
        assert pipeline.snapshot().stage("switch").received == 1

    async def test_a_failure_behind_a_generator_ends_it_at_once(self) -> None:
        calls: list[int] = []

        @stage(on_error=ErrorPolicy.RAISE)
        def fails(item: int) -> int:
            calls.append(item)
            raise Boom(item)

        result = await (Pipeline([0]) >> operators.flat_map(lambda _: range(50)) >> fails).run()
        assert is_err(result)
        assert calls == [0]
        assert len(result.reasons) == 1

    async def test_an_item_that_its_stage_passes_on_twice_is_counted_on_each_edge(self) -> None:
        doubled = operators.flat_map(lambda item: [item, item], name="doubled")
        pipeline = Pipeline(range(5)) >> doubled >> stage(name="after")(lambda item: item)
        report = await pipeline.run()
        assert isinstance(report, RunReport)
        assert (report.stage("doubled").received, report.stage("doubled").emitted, report.stage("after").received) == (5, 10, 10)

    def test_what_waits_for_a_synchronous_consumer_that_leaves_is_not_delivered(self) -> None:
        """Even when the run is closed before the consumer's thread gets to its next line."""
        pipeline = Pipeline(range(10)) >> stage(lambda item: item)
        iteration = pipeline.iter()
        got = [next(iteration)]
        while pipeline.snapshot().undelivered < 9:
            pass
        runtime = pipeline.runtime
        request_stop = runtime.request_stop

        def stop_and_see_it_close(request: Any) -> bool:
            effect = request_stop(request)
            runtime.closed.result(10)
            return effect

        runtime.request_stop = stop_and_see_it_close  # type: ignore[method-assign]
        iteration.close()
        snapshot = pipeline.snapshot()
        assert (snapshot.delivered, snapshot.discarded) == (len(got), 9)

    async def test_throughput_and_times_are_never_negative_and_latencies_are_in_order(self) -> None:
        @stage(concurrency=4)
        async def steps(item: int) -> int:
            for _ in range(item % 5):
                await asyncio.sleep(0)
            return item

        report = await (Pipeline(range(300)) >> steps >> operators.batch(7)).run()
        assert isinstance(report, RunReport)
        row = report.stage("steps")
        assert min(row.busy, row.starved, row.blocked, row.throughput) >= 0
        assert 0 < row.latency_p50 <= row.latency_p95 <= row.latency_p99
        assert 0 < row.busy <= report.duration * row.concurrency * 1.5
