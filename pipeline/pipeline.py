"""`Pipeline`: a source and the stages that its items go through.

The rule kept here: a pipeline is a definition. Running it makes a `Run` with its own counters, channels and workers,
and throws them away; only the last runtime and its report stay.

Example:
    >>> from pipeline import Pipeline
    >>> from stages import stage
    >>> @stage(concurrency=8)
    ... async def fetch(url: str) -> bytes: ...
    >>> report = await (Pipeline(urls) >> fetch).run()
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from .assembly import Link, Sink, seats_for
from .bridge import BridgeSink
from .cancellation.ending import Ending
from .cancellation.reason import CancelReason, CancelType
from .cancellation.triggers import Trigger
from .errors import PipelineError
from .handle import CancelHandle
from .interop import is_stream_operator, stream_stage
from .iteration import check_buffer, iterate, iterate_in_thread, stopped
from .lifecycle import Grace, PipelineState
from .loops import loop_factory
from .metrics import Counters, PipelineSnapshot, read_ledger
from .options import PipelineOptions
from .policy import ErrorPolicy
from .protocols import StageLike, is_stage
from .report import RunReport
from .result import Err
from .run import Run
from .runtime import PipelineRuntime, StopLevel, StopRequest
from .sink import BufferSink, CollectingSink, DiscardingSink
from .source import Source, as_source
from .standing import Standing, report_of

if TYPE_CHECKING:
    from .scheduler import Scheduler

__all__ = ["Pipeline"]

T = TypeVar("T")
U = TypeVar("U")


class Pipeline(Generic[T]):
    """A source, and stages joined with `>>`.

    `source` is an iterable, an iterator, an async iterable, another pipeline, an aiostream stream, or a function
    without arguments that returns one of these afresh for every run; it may be given later, with `gen()`.
    `on_error` is the policy of stages that have none of their own. `cancel_on` takes triggers, armed while the pipeline
    runs. `grace` bounds the phases of stopping. `scheduler` has the resources that stages need (`resources=`): pipelines
    with the same one share them, and what is further along goes first; a pipeline inside another one keeps its own.
    `log=True` logs starts and stops. `tally_len=True` adds up the `len()` of delivered items in the report. Raises
    `TypeError` for a source that cannot be iterated.
    """

    def __init__(
        self,
        source: Iterable[T] | AsyncIterable[T] | Callable[[], Iterable[T] | AsyncIterable[T]] | Pipeline[T] | None = None,
        *,
        name: str | None = None,
        on_error: ErrorPolicy = ErrorPolicy.DROP,
        cancel_on: Trigger | Sequence[Trigger] = (),
        grace: Grace | None = None,
        scheduler: Scheduler | None = None,
        log: bool = False,
        tally_len: bool = False,
    ) -> None:
        triggers = (cancel_on,) if isinstance(cancel_on, Trigger) else tuple(cancel_on)
        self._options = PipelineOptions(
            name=name or "pipeline",
            on_error=on_error,
            cancel_on=triggers,
            grace=Grace() if grace is None else grace,
            scheduler=scheduler,
            log=log,
            tally_len=tally_len,
        )
        self._links: tuple[Link, ...] = ()
        self._inner: Pipeline[Any] | None = None
        self._members: tuple[Pipeline[Any], ...] = ()
        self._source: Source | None = None
        self._standing = Standing(self.name)
        if source is not None:
            self._set_source(source)

    @property
    def name(self) -> str:
        return self._options.name

    @property
    def links(self) -> tuple[Link, ...]:
        """Its stages, in order, each with what it gets from the pipeline that it was declared in."""
        return self._links

    @property
    def ending(self) -> Ending:
        """For `EndTrigger`: the end of the run under way, or of the last one."""
        return self._standing.ending

    # --- declaring

    @overload
    def __rshift__(self, other: StageLike[T, U]) -> Pipeline[U]: ...
    @overload
    def __rshift__(self, other: Pipeline[U]) -> Pipeline[U]: ...
    @overload
    def __rshift__(self, other: Callable[[AsyncIterable[T]], AsyncIterable[U]]) -> Pipeline[U]: ...
    def __rshift__(self, other: Any) -> Pipeline[Any]:
        """A new pipeline with one stage (or all stages of another pipeline) more; this one stays as it is."""
        # The untyped detour is the type change itself: the copy is a Pipeline of another item type.
        longer = cast("Pipeline[Any]", self._copy())
        longer._append(other)
        return longer

    @overload
    def stage(self, stage: StageLike[T, U]) -> Pipeline[U]: ...
    @overload
    def stage(self, stage: Pipeline[U]) -> Pipeline[U]: ...
    @overload
    def stage(self, stage: Callable[[AsyncIterable[T]], AsyncIterable[U]]) -> Pipeline[U]: ...
    def stage(self, stage: Any) -> Pipeline[Any]:
        """Add a stage (or all stages of another pipeline) to this pipeline, and return it."""
        self._refuse_running("be changed")
        self._append(stage)
        return self

    def gen(self, source: Iterable[T] | AsyncIterable[T] | Callable[[], Iterable[T] | AsyncIterable[T]]) -> Pipeline[T]:
        """Set a new source, and make a cancelled pipeline runnable again. Returns this pipeline."""
        self._refuse_running("get a new source")
        if self._inner is not None:  # a pipeline that was the source goes, with its stages
            self._links = self._links[len(self._inner._links) :]
            self._members = self._members[1:]
        self._set_source(source)
        self._standing.renew()
        return self

    def _set_source(self, source: Any) -> None:
        self._inner = None
        if isinstance(source, Pipeline):
            inner = cast("Pipeline[Any]", source)
            if inner is self:
                raise TypeError("a pipeline cannot be its own source")
            self._inner = inner._copy()
            self._source = inner._source
            self._links = inner._scheduled() + self._links
            self._members = (inner, *self._members)
        else:
            self._source = as_source(source)

    def _append(self, other: Any) -> None:
        if isinstance(other, Pipeline):
            right = cast("Pipeline[Any]", other)
            self._links += right._scheduled()
            self._members += (right,)
        elif is_stage(other):
            self._links += (Link(cast("StageLike[Any, Any]", other), self._options.on_error, self._options.scheduler),)
        elif is_stream_operator(other):
            self._links += (Link(stream_stage(other), self._options.on_error),)
        else:
            what = f"the function {other.__name__!r}" if hasattr(other, "__name__") else f"a {type(other).__name__}"
            raise TypeError(
                f"only a stage, a pipeline or an aiostream pipe operator can follow >>, not {what}; "
                "decorate the function with @stage (from stages import stage)"
            )

    def _scheduled(self) -> tuple[Link, ...]:
        """The links, those without a scheduler with this pipeline's."""
        if self._options.scheduler is None:
            return self._links
        return tuple([link if link.scheduler else replace(link, scheduler=self._options.scheduler) for link in self._links])

    def _copy(self) -> Pipeline[T]:
        twin: Pipeline[T] = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._standing = Standing(self.name)
        return twin

    # --- running

    async def run(self) -> RunReport | Err:
        """Run to the end, counting and discarding what the last stage emits.

        Returns the report, or an `Err` (with `.report` and `.reasons`) when the run failed or was cancelled, or could
        not start. Raises `PipelineError` when this pipeline is running already, `StageConfigError` when a stage cannot
        work as declared, and `CancelledError`, after everything is closed, when the awaiting task is cancelled.
        """
        return await self._finish(DiscardingSink(tally=self._options.tally_len))

    async def collect(self) -> list[T] | Err:
        """Run to the end and return all outputs in a list, which takes the memory that they need; errors as in `run`."""
        sink = CollectingSink(tally=self._options.tally_len)
        result = await self._finish(sink)
        items = sink.give()
        return result if isinstance(result, Err) else items

    async def _finish(self, sink: Sink) -> RunReport | Err:
        run = self._prepare(sink)
        if isinstance(run, Err):
            return run
        try:
            run.start()
            return await run.watch()
        finally:
            self._release(run)

    def __aiter__(self) -> AsyncGenerator[T, None]:
        return self.async_iter()

    def async_iter(self, max_buffer: int = 64) -> AsyncGenerator[T, None]:
        """Iterate over the outputs, at most `max_buffer` of which wait for the consumer.

        Fused stages never leave anything in the buffers between them, so that room is used here, too: as many outputs
        more may wait as those buffers would hold. Stages that only compute (operators on the item, no calls) run
        when their output is asked for.
        Leaving early cancels the run with code "iter_closed". After a failure or a cancel, what was produced is
        delivered first, then `PipelineFailed` or `PipelineCancelled` is raised.
        """
        return iterate(self._open, self._release, BufferSink(check_buffer(max_buffer), tally=self._options.tally_len))

    def iter(self, max_buffer: int = 64, *, uvloop: bool = False) -> Generator[T, None, None]:
        """Iterate from synchronous code: the pipeline runs on a loop of its own, in a thread of its own.

        `max_buffer`, leaving, failing and cancelling are as in `async_iter`. `uvloop=True` makes it a uvloop, and raises
        `ImportError` when that is not installed.
        """
        factory = loop_factory(uvloop=uvloop)
        return iterate_in_thread(
            self._open, self._release, BridgeSink(check_buffer(max_buffer), tally=self._options.tally_len), factory
        )

    def _open(self, sink: Sink) -> Run:
        """As `_prepare`; what keeps the run from starting is raised."""
        run = self._prepare(sink)
        if isinstance(run, Err):
            raise stopped(run)
        return run

    def _prepare(self, sink: Sink) -> Run | Err:
        """Check everything that can be checked before anything starts."""
        if self._standing.active:
            raise PipelineError(
                f"pipeline {self.name!r} is running already; await that run, or build a second pipeline from the same stages"
            )
        refusal = self._refusal()
        if refusal is not None:
            return refusal
        links = self._scheduled()
        for link in links:
            link.stage.check(link.default_policy)
            _check_resources(link)
        assert self._source is not None
        runtime = PipelineRuntime(self.name, self._options.grace)
        self._standing.own(runtime)
        for member in self._all_members():
            member._standing.join(runtime)
        for pipeline in (self, *self._all_members()):
            pipeline._standing.begin(runtime)
        return Run(runtime, self._source, links, sink, self._options.cancel_on, log=self._options.log)

    def _refusal(self) -> Err | None:
        for pipeline in (self, *self._all_members()):
            if (refusal := pipeline._standing.refusal()) is not None:
                return refusal
        if self._source is None:
            return Err(
                PipelineError("the pipeline has no source: give one to Pipeline(source), or set one with gen(source)"),
                attempts=0,
            )
        spent = self._source.refusal()
        return Err(PipelineError(spent), attempts=0) if spent else None

    def _release(self, run: Run) -> None:
        """The run is over: let go of it, and remember whether it was cancelled."""
        for member in self._all_members():
            member._standing.leave(run.runtime)
        self._standing.settle()

    def _all_members(self) -> list[Pipeline[Any]]:
        found: list[Pipeline[Any]] = []
        for member in self._members:
            found += [member, *member._all_members()]
        return found

    # --- stopping

    def cancel(
        self,
        reason: str | CancelReason | None = None,
        *,
        code: str | None = None,
        drain: bool = False,
        force: bool = False,
    ) -> CancelHandle:
        """Stop the pipeline, and the pipelines that contain it. Synchronous, idempotent, safe from anywhere.

        `drain=True` stops the source only and lets what was taken finish, within `Grace.drain`. `force=True` goes
        straight to killing. The handle is truthy when this call began or escalated the stop, and may be awaited for
        the result once everything is closed. Before a start it makes the pipeline refuse to start until `gen()`.
        """
        if drain and force:
            raise ValueError("drain=True lets items finish and force=True does not; choose one")
        level = StopLevel.KILL if force else StopLevel.DRAIN if drain else StopLevel.ABORT
        request = StopRequest(_as_reason(reason, code, self.name), level)
        return self._standing.cancel(request)

    # --- watching

    @property
    def runtime(self) -> PipelineRuntime:
        """The runtime of the current or last run; before the first run, an empty one."""
        return self._standing.runtime or PipelineRuntime(self.name, self._options.grace)

    @property
    def report(self) -> RunReport | None:
        """The account of the last run, also of one that was interrupted from outside; None while there is none."""
        return report_of(self._standing.runtime)

    @property
    def state(self) -> PipelineState:
        """Where the current or last run stands."""
        return self.snapshot().state

    def snapshot(self) -> PipelineSnapshot:
        """The ledger at this moment: any time, from any thread, without waiting. Costs a few microseconds a stage."""
        runtime = self._standing.runtime
        if runtime is None or runtime.assembly is None:
            seats = seats_for(self._links)
            ledger = read_ledger(Counters("source"), [seat.counters for seat in seats], None)
            reasons = runtime.reasons if runtime else self._standing.cancelled
            state = runtime.state if runtime else self._standing.idle_state
            elapsed = 0.0
        else:
            state, reasons, elapsed = runtime.state, runtime.reasons, runtime.elapsed
            runtime.catch_up()
            ledger = runtime.final_ledger or runtime.assembly.ledger(elapsed)
        return PipelineSnapshot(
            name=self.name,
            state=state,
            reasons=reasons,
            elapsed=elapsed,
            pulled=ledger.pulled,
            delivered=ledger.delivered,
            undelivered=ledger.undelivered,
            discarded=ledger.discarded,
            stages=ledger.stages,
        )

    def _refuse_running(self, what: str) -> None:
        if self._standing.active:
            raise PipelineError(f"pipeline {self.name!r} cannot {what} while it runs")

    def __repr__(self) -> str:
        chain = " >> ".join(["source" if self._source else "(no source)", *(link.stage.name for link in self._links)])
        return f"<Pipeline {self.name!r}: {chain}>"


def _as_reason(reason: str | CancelReason | None, code: str | None, origin: str) -> CancelReason:
    if isinstance(reason, CancelReason):
        return reason if code is None else replace(reason, code=code)
    return CancelReason(str(reason) if reason is not None else "cancelled", CancelType.MANUAL, code=code, origin=origin)


def _check_resources(link: Link) -> None:
    if getattr(link.stage, "resources", None):
        from .scheduler.share import check_stage  # imported only for those who need it, as the scheduler is

        check_stage(link.stage, link.scheduler)
