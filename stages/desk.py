"""The desk of one stage in one run: it books what became of each item, and says what happens next.

The rule kept here: an item is booked once. It is booked after its last output has left, so that an item which is
stopped before that is still in flight and becomes `cancelled`. A part (`skipped`, `lost`, `timed_out`) is booked after
its whole, so that no reading in another thread sees more parts than whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.cancellation.reason import CancelReason, CancelType
from pipeline.errors import PipelineError
from pipeline.observe.logs import RateLimitedLog
from pipeline.policy import ErrorPolicy, FailureRule
from pipeline.protocols import Seat, Wires
from pipeline.result import Err, describe
from pipeline.runtime import StopLevel, StopRequest

from .control import SKIP, KillSwitch, PlainTypes

__all__ = ["Desk", "Emit"]

Emit = Callable[[Any], Awaitable[bool]]
"""Hands one output downstream; False when nobody takes it any more."""

LAG = 0.1
"""Seconds that a plain function may hold the loop before the log says so."""


class Desk:
    """Books the items of one stage. Owned by its node; all methods on the run's loop."""

    __slots__ = ("_failures", "_lags", "_last", "_runtime", "counters", "cut", "inlet", "name", "plain", "rule", "stopped")

    def __init__(self, seat: Seat, rule: FailureRule, wires: Wires, cut: int) -> None:
        self.name = seat.name
        self.counters = seat.counters
        self.rule = rule
        self.plain = PlainTypes()
        self.stopped = False
        """This stage has stopped the pipeline: nothing that it finishes from now on leaves it."""
        self.cut = cut
        """The index up to which to stop when this stage fails: its own, or the last one of its fused neighbours."""
        self.inlet = wires.inlet
        """Where this stage's items come from at present: closed when the stage stops."""
        self._runtime = wires.runtime
        self._failures: RateLimitedLog | None = None
        self._lags: RateLimitedLog | None = None
        self._last: Err | None = None

    # --- an item's end

    async def settle(self, item: Any, result: Any, attempts: int, emit: Emit) -> None:
        """Book one item by the single value that its handler returned."""
        counters = self.counters
        if result is SKIP:
            counters.succeeded += 1
            counters.skipped += 1
        elif isinstance(result, Err):
            await self.failed(self.complete(result, item, attempts), emit)
        elif isinstance(result, KillSwitch):
            self.kill(result)
        elif await emit(result):
            counters.succeeded += 1

    async def pass_on(self, err: Err, emit: Emit) -> None:
        """Book an error of an earlier stage, handed on untouched."""
        if await emit(err):
            self.counters.passed += 1

    def kill(self, switch: KillSwitch) -> None:
        """A handler has asked to cancel the pipeline."""
        self.counters.succeeded += 1
        self.counters.skipped += 1
        reason = CancelReason(str(switch.reason), CancelType.MANUAL, code="kill_switch", origin=self.name)
        self.stopped = True
        self.inlet.abort()
        self._runtime.request_stop(StopRequest(reason, StopLevel.ABORT))

    async def failed(self, err: Err, emit: Emit, *, lost: bool = False, timed_out: bool = False) -> None:
        """Book a failed item by the stage's policy."""
        counters, policy = self.counters, self.rule.policy
        self._last = err
        if policy is ErrorPolicy.EMIT:
            if not await emit(err):
                return  # nobody takes it any more: still in flight, so it becomes `cancelled`
            counters.emitted_errors += 1
        elif policy is ErrorPolicy.SIDE:
            if not await self._hand_to_side(err):
                return
            counters.sided += 1
        elif policy is ErrorPolicy.RAISE:
            counters.raised += 1
        else:
            counters.dropped += 1
        counters.lost += lost
        counters.timed_out += timed_out
        self._log(err)
        if policy is ErrorPolicy.RAISE:
            self.stop(err, "stage_error")
            return
        self._runtime.note(self.name, err)
        self._check_limit(ended=False)

    def complete(self, err: Err, item: Any, attempts: int) -> Err:
        """Fill in what a handler's own `Err` does not say."""
        if err.stage is None:
            err.stage, err.item, err.attempts = self.name, item if err.item is None else err.item, attempts
        elif err.stage == self.name and err.item is not item:
            return replace(err, item=item, attempts=attempts)  # one object, returned for many items
        return err

    async def _hand_to_side(self, err: Err) -> bool:
        handler = self.rule.handler
        assert handler is not None
        try:
            answer = handler(err)
            if inspect.isawaitable(answer):
                await answer
        except Exception as error:
            self.counters.raised += 1
            self._runtime.note(self.name, err)
            if isinstance(err.value, BaseException) and error.__cause__ is None and error is not err.value:
                error.__cause__ = err.value  # both are on record, and a traceback shows both
            self._log(err)
            self.stop(Err.of(error, item=err.item, stage=self.name, attempts=err.attempts), "error_handler_failed")
            return False
        return True

    # --- the stage's end

    def stop(self, err: Err, code: str) -> None:
        """Fail the pipeline: this stage and those before it stop at once, what is behind finishes shortly."""
        self.stopped = True
        self.inlet.abort()
        self._runtime.fail(err, origin=self.name, code=code, cut=self.cut)

    def broke(self, error: BaseException, what: str) -> None:
        """`setup` or `teardown` has raised: the pipeline fails."""
        err = Err.of(error, stage=self.name)
        self._runtime.fail(err, origin=f"{what} of stage {self.name!r}", code=f"{what}_failed", level=StopLevel.ABORT)

    def close(self) -> None:
        """The stage's input has ended: judge shares."""
        self._check_limit(ended=True)

    def _check_limit(self, *, ended: bool) -> None:
        rule, counters = self.rule, self.counters
        if rule.max_failures is None or self.stopped or self._runtime.cancelled:
            return
        failed, processed = counters.failed, counters.processed - counters.passed
        if rule.too_many(failed, processed, ended=ended):
            limit = rule.max_failures if isinstance(rule.max_failures, int) else f"{rule.max_failures:.0%}"
            error = PipelineError(f"{failed} of {processed} items failed in stage {self.name!r}, more than max_failures={limit} allows")
            if self._last is not None and isinstance(self._last.value, BaseException):
                error.__cause__ = self._last.value
            self.stop(Err.of(error, stage=self.name), "max_failures")

    # --- the log

    def _log(self, err: Err) -> None:
        if self._failures is None:
            self._failures = RateLimitedLog(pipeline=self._runtime.name, stage=self.name)
            self._runtime.at_end.append(self._failures.flush)
        level = "error" if self.rule.policy is ErrorPolicy.RAISE else "warning"
        self._failures.emit(level, "item failed", policy=self.rule.policy.name, attempts=err.attempts, error=describe(err.value))

    def lagged(self, seconds: float, *, among: Sequence[str] = ()) -> None:
        """A plain function has held the loop for too long: say which (or that it was one of these), and what to do."""
        if self._lags is None:
            self._lags = RateLimitedLog(10.0, pipeline=self._runtime.name, stage=self.name)
        self._lags.emit(
            "warning",
            "a plain function blocks the event loop",
            seconds=round(seconds, 3),
            advice='declare the stage with run_in="thread", or run_in="process" if it computes',
            **({"among": list(among)} if among else {}),
        )
