"""Where a pipeline stands: the run under way or the last one, the runs it is carried by, and cancels that met none.

The rule kept here: a cancel is never lost between looking and starting. A start sets its runtime, then looks for
cancels; a cancel leaves its reason, then looks for a runtime. One of them finds the other, without a lock.
"""

from __future__ import annotations

from concurrent.futures import Future

from .cancellation.ending import Ending
from .cancellation.reason import CancelReason, CancelType
from .errors import PipelineCancelled
from .handle import CancelHandle
from .lifecycle import PipelineState
from .report import RunReport
from .result import Err
from .runtime import PipelineRuntime, StopLevel, StopRequest

__all__ = ["Standing"]

_HOW_IT_ENDED = {"completed": "completed", "failed": "failed", "cancelled": "was cancelled", None: "could not start"}


class Standing:
    """What changes about one pipeline while its definition stays."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._own: PipelineRuntime | None = None
        self._carriers: set[PipelineRuntime] = set()
        self._cancelled: list[CancelReason] = []
        self.ending = Ending()

    @property
    def runtime(self) -> PipelineRuntime | None:
        """That of the run under way, a carrier's first, or of the last one."""
        return next(iter(self._carriers), None) or self._own

    @property
    def active(self) -> bool:
        """Whether a run of its own is under way."""
        return self._own is not None and self._own.ended is None

    @property
    def idle_state(self) -> PipelineState:
        """The state of a pipeline that has not run."""
        return PipelineState.CLOSED if self._cancelled else PipelineState.NEW

    @property
    def cancelled(self) -> tuple[CancelReason, ...]:
        """Why it does not start; empty when it may."""
        return tuple(self._cancelled)

    def refusal(self) -> Err | None:
        """What a start is answered after a cancel."""
        if not self._cancelled:
            return None
        reasons = self.cancelled
        text = f"pipeline {self._name!r} was cancelled ({reasons[0]}); set a source with gen() to run it again"
        return Err(PipelineCancelled(text, reasons=reasons), reasons=reasons, attempts=0)

    def renew(self) -> None:
        """It has a new source: what was is forgotten."""
        self._cancelled = []
        self._own = None
        self.ending.begin()

    # --- from a start to an end

    def own(self, runtime: PipelineRuntime) -> None:
        self._own = runtime

    def join(self, runtime: PipelineRuntime) -> None:
        """It is a part of the pipeline that this run is of."""
        self._carriers.add(runtime)

    def begin(self, runtime: PipelineRuntime) -> None:
        """The run is about to start, and known as `own` or by `join`."""
        self.ending.begin()
        runtime.closed.add_done_callback(self._tell_end)
        for reason in tuple(self._cancelled):  # by another thread, since somebody looked: it may have found no run yet
            _pass_on(StopRequest(reason, StopLevel.ABORT), runtime)

    def leave(self, runtime: PipelineRuntime) -> None:
        """The run that carried it is over."""
        self._carriers.discard(runtime)

    def settle(self) -> None:
        """The run of its own is over: remember whether it was cancelled."""
        report = report_of(self._own)
        if report is not None and report.outcome == "cancelled":
            self._cancelled = list(report.reasons)

    def _tell_end(self, closed: Future[RunReport | Err]) -> None:
        result = closed.result()
        report = result.report if isinstance(result, Err) else result
        self._tell(_HOW_IT_ENDED[report.outcome if report is not None else None], result.reasons)

    def _tell(self, how: str, causes: tuple[CancelReason, ...]) -> None:
        text = f"pipeline {self._name!r} {how}"
        self.ending.tell(CancelReason(text, CancelType.PIPELINE, origin=self._name, causes=causes))

    # --- a cancel

    def cancel(self, request: StopRequest) -> CancelHandle:
        """Pass it on to whatever runs; if nothing does, and nothing has, keep it from starting."""
        if (handle := self._stop_running(request)) is not None:
            return handle
        if self._own is not None:
            return CancelHandle(False, self._own.closed, None)
        self._cancelled.append(request.reason)  # atomic, as other threads may do the same
        if (handle := self._stop_running(request, once=True)) is not None:  # started by another thread at this very moment
            return handle
        reasons = self.cancelled
        self._tell("was cancelled before it started", reasons)
        never: Future[RunReport | Err] = Future()
        never.set_result(Err(reasons[0].message, reasons=reasons, attempts=0))
        return CancelHandle(reasons[0] is request.reason, never, None)

    def _stop_running(self, request: StopRequest, *, once: bool = False) -> CancelHandle | None:
        running = [runtime for runtime in (self._own, *tuple(self._carriers)) if runtime is not None and runtime.ended is None]
        if not running:
            return None
        effects = [_pass_on(request, runtime) if once else runtime.request_stop(request) for runtime in running]
        return CancelHandle(any(effects), running[0].closed, running[0])


def report_of(runtime: PipelineRuntime | None) -> RunReport | None:
    """The account of a run that is over; None without one."""
    if runtime is None or not runtime.closed.done():
        return None
    result = runtime.closed.result()
    return result.report if isinstance(result, Err) else result


def _pass_on(request: StopRequest, runtime: PipelineRuntime) -> bool:
    """A cancel has met a start: it is told by one of the two who have noticed."""
    return all(known.reason is not request.reason for known in runtime.requests) and runtime.request_stop(request)
