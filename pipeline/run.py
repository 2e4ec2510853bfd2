"""One run from start to report: assembles it, arms its triggers, watches it, and writes its account.

The rule kept here: a run is started once and concluded once, whatever happens in between; the conclusion is a value.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from .assembly import Assembly, Link, Sink
from .cancellation.current import Stopped, get_current_reasons, pop_reasons, push_reasons, tell_who_stopped
from .cancellation.reason import CancelReason, CancelType, check_reason
from .cancellation.signals import SignalTrigger
from .metrics import Ledger, violations
from .observe.logs import get_logger
from .report import RunReport
from .result import Err, describe
from .runtime import PipelineRuntime, StopLevel, StopRequest
from .shutdown import supervise
from .source import Source

if TYPE_CHECKING:
    from .cancellation.triggers import Trigger, TriggerHandle

__all__ = ["Run"]


class Run:
    """Everything that belongs to one run and is thrown away after it, but for the report."""

    def __init__(
        self,
        runtime: PipelineRuntime,
        source: Source,
        links: Sequence[Link],
        sink: Sink,
        triggers: Sequence[Trigger],
        *,
        log: bool,
    ) -> None:
        self.runtime = runtime
        self.sink = sink
        self._source = source
        self._links = links
        self._triggers = triggers
        self._handles: list[TriggerHandle] = []
        self._heard: set[int] = set()
        """Triggers that another thread listens to."""
        self._arrivals: Counter[int] = Counter()
        self._log = log
        self._supervisor: asyncio.Task[None] | None = None
        self.stopped = Stopped()
        """Fences inside handlers that were left because the run stopped."""
        self._story = _Story(runtime.name, self.stopped)
        self._over: asyncio.Future[None] | None = None
        """What `watch` waits for."""

    def start(self) -> None:
        """Start on the running loop. A run that was cancelled already starts nothing and concludes at once."""
        runtime = self.runtime
        runtime.attach(asyncio.get_running_loop())
        runtime.began = monotonic()
        try:
            self._arm()
            runtime.assembly = Assembly(runtime, self._source, self._links, self.sink)
        except BaseException as error:
            self.could_not_start(error)
            raise
        if self._log:
            runtime.on_requests = self._log_requests
            self._logger().info("pipeline started", stages=[seat.name for seat in runtime.assembly.seats])
        # Tasks and threads copy the context in which they are started: code deep inside a handler can ask for the reasons.
        token = push_reasons(lambda: runtime.reasons, self)
        try:
            runtime.supervisor = self._supervisor = runtime.start_task(
                self._oversee(runtime.assembly), name="supervisor", on_end=self._tell
            )
            runtime.assembly.start()
        finally:
            pop_reasons(token)
        if runtime.requests:
            runtime.abort_now()

    def could_not_start(self, error: BaseException) -> None:
        """Conclude a run of which nothing but triggers has been started."""
        self._disarm()
        self.runtime.conclude()
        self.runtime.closed.set_result(Err.of(error))

    async def watch(self) -> RunReport | Err:
        """Wait for the conclusion.

        When the waiting task is cancelled, the run is stopped first, in bounded time, and then the cancellation goes
        on; a second cancellation stops waiting for handlers to clean up.
        """
        supervisor = self._supervisor
        assert supervisor is not None
        interrupted: asyncio.CancelledError | None = None
        while not supervisor.done():
            self._over = over = supervisor.get_loop().create_future()
            try:
                await over
            except asyncio.CancelledError as error:
                self.parent_cancelled()
                interrupted = interrupted or error
        if interrupted is not None:
            raise interrupted
        if not self.runtime.closed.done():
            supervisor.result()  # raises what has kept it from its conclusion: better than to wait for that for ever
        return self.runtime.closed.result()

    def parent_cancelled(self) -> None:
        """The task that waits for this run was cancelled: abort, or kill when it is not the first time."""
        runtime = self.runtime
        if not runtime.cancelled:
            tell_who_stopped(self._story.lines)
        again = any(request.reason.code == "parent_cancelled" for request in runtime.requests)
        for reason in get_current_reasons():  # of the scopes around the waiting task: they know why
            if reason not in runtime.reasons:
                runtime.request_stop(StopRequest(reason, StopLevel.ABORT))
        reason = CancelReason("the task that awaits the pipeline was cancelled", CancelType.PARENT, code="parent_cancelled")
        if again:
            runtime.request_stop(StopRequest(reason, StopLevel.KILL))
        elif reason not in runtime.reasons:  # that of the run around this one, in one of whose handlers this one is
            runtime.request_stop(StopRequest(reason, StopLevel.ABORT))

    # --- triggers

    def listen_here(self, listening: ExitStack) -> None:
        """In the main thread, to which signals come, before the run starts in another.

        From now on none is lost: one that comes once the run is closed is for whoever was there before.
        """
        for index, trigger in enumerate(self._triggers):
            if isinstance(trigger, SignalTrigger):
                listening.callback(trigger.listen(partial(self._signalled, index)).disarm)
                self._heard.add(index)

    def _signalled(self, index: int, reason: CancelReason) -> bool:
        self._triggered(index, reason)
        return any(known is reason for known in self.runtime.reasons)

    def _arm(self) -> None:
        for index, trigger in enumerate(self._triggers):
            if index in self._heard:
                continue
            fired = trigger.check()
            if fired is not None:
                self._triggered(index, fired)
                continue
            # Signals at once: a plain handler that blocks the loop can look at its state, and stop.
            arm = trigger.listen if isinstance(trigger, SignalTrigger) else trigger.arm
            self._handles.append(arm(partial(self._triggered, index)))

    def _disarm(self) -> None:
        handles, self._handles = self._handles, []
        for handle in reversed(handles):
            try:
                handle.disarm()
            except Exception as error:  # a trigger of somebody's own; the others are to be disarmed, and the run to end
                self._logger().error("a trigger could not be disarmed", error=describe(error))

    def _triggered(self, index: int, reason: CancelReason) -> None:
        """Each arrival asks for one step more: abort (or drain first, if the trigger says so), then kill."""
        check_reason(reason)
        first = StopLevel.DRAIN if getattr(self._triggers[index], "drain", False) else StopLevel.ABORT
        level = StopLevel(min(first + self._arrivals[index], StopLevel.KILL))
        self._arrivals[index] += 1
        self.runtime.request_stop(StopRequest(reason, level))

    # --- the conclusion

    @property
    def interrupting(self) -> bool:
        """Whether the code inside, in the handlers, is being stopped."""
        return self.runtime.cancelled

    def _tell(self, *_: object) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    async def _oversee(self, assembly: Assembly) -> None:
        try:
            await supervise(self.runtime, assembly)
        finally:
            self._conclude(assembly)
            # This task is done when the one that waits for it comes to see it: a pass of the loop earlier than by callback.
            self.runtime.tasks.discard(cast("asyncio.Task[None]", self._supervisor))
            self._tell()

    def _conclude(self, assembly: Assembly) -> None:
        runtime = self.runtime
        self._disarm()
        assembly.settle()
        for finish in runtime.at_end:
            finish()
        self.sink.hand_over()
        runtime.conclude()
        runtime.final_ledger = ledger = assembly.ledger(runtime.elapsed)
        report = self._story.report = self._report(ledger)
        if not report.balanced:
            self._logger().error("ledger out of balance", laws=list(report.imbalances))
        if self._log:
            self._logger().info("pipeline stopped", outcome=report.outcome, reasons=[str(r) for r in report.reasons])
        runtime.closed.set_result(self._result(report))

    def _report(self, ledger: Ledger) -> RunReport:
        runtime = self.runtime
        requests = runtime.requests
        outcome = "completed" if not requests else "failed" if requests[0].error is not None else "cancelled"
        nothing_lost = not ledger.discarded and not any(row.cancelled or row.discarded or row.lost for row in ledger.stages)
        return RunReport(
            name=runtime.name,
            outcome=outcome,
            reasons=runtime.reasons,
            duration=runtime.elapsed,
            pulled=ledger.pulled,
            delivered=ledger.delivered,
            discarded=ledger.discarded,
            tallied=self.sink.tallied,
            stages=ledger.stages,
            errors=tuple(err for sample in runtime.errors.values() for err in sample),
            abandoned=tuple(runtime.abandoned),
            drained=outcome == "cancelled" and runtime.level == StopLevel.DRAIN and nothing_lost,
            imbalances=tuple(violations(ledger, closed=True)),
        )

    def _result(self, report: RunReport) -> RunReport | Err:
        requests = self.runtime.requests
        if not requests:
            return report
        err = requests[0].error or Err(requests[0].reason.message, attempts=0)
        err.reasons, err.report = report.reasons, report
        return err

    def _log_requests(self, requests: Sequence[StopRequest]) -> None:
        for request in requests:
            reason = request.reason
            self._logger().info(
                "pipeline asked to stop",
                how=request.level.name.lower(),
                reason=reason.message,
                type=reason.cancel_type.value,
                code=reason.code,
                origin=reason.origin,
            )

    def _logger(self) -> Any:
        return get_logger(pipeline=self.runtime.name)


class _Story:
    """What a scope around a run tells of it: it keeps the account alive, and nothing that the run has worked with."""

    def __init__(self, name: str, stopped: Stopped) -> None:
        self.report: RunReport | None = None
        self._name = name
        self._stopped = stopped

    def lines(self) -> Iterator[str]:
        report = self.report
        if report is None:
            yield f"pipeline {self._name!r}: stopping"
        else:
            yield f"pipeline {report.name!r}: {report.outcome}, {report.pulled} taken from the source, {report.delivered} delivered"
        yield from self._stopped.lines()
