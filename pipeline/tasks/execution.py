"""One attempt at a task, wherever it runs: what it tells while it runs, what stops it, and how it ended.

The rules kept here:

- How it ended is a value, and whoever owns the execution tells it, once. Whatever the work does, `run()` returns that
  value after the work's cleanup; only a KeyboardInterrupt and its like go through.
- The first reason to stop that came before the end of the work decides. What came later changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from time import time
from typing import Any, cast

from ..cancellation.fence import Fence
from ..cancellation.reason import CancelReason, CancelType, check_reason
from ..cancellation.signals import running_loop
from ..cancellation.triggers import TimeoutTrigger, Trigger, TriggerHandle
from ..errors import PipelineStopped
from ..iteration import stopped
from ..observe.logs import get_logger
from ..pipeline import Pipeline
from ..report import RunReport
from ..result import Err, describe
from .data import about_error, readable
from .events import EventType
from .graph import stages_of
from .progress import ProgressReporter
from .task import StreamTask, TaskContext, Work, check_work, enter_task, finished, leave_task

__all__ = ["Execution", "TaskEnd", "check_interval"]

_CODE = "task_cancelled"
"""The code of a cancellation that came through asyncio, without a reason."""
_MOST_REASONS = 100
"""Reasons that are kept and told; nobody reads more, and somebody may press a button without end."""


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """How an attempt ended: the type and the data of its terminal event, which is for its owner to publish.

    `error` is what was raised, `value` what was returned: a `RunReport`, or what the coroutine gave.
    """

    type: EventType
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: BaseException | None = None
    value: Any = None

    def conclude(self) -> Any:
        """End the asyncio task as asyncio expects: return the value, or raise the error or CancelledError."""
        if self.type in (EventType.CANCELLED, EventType.TIMED_OUT):
            if isinstance(self.error, asyncio.CancelledError):
                raise self.error
            raise asyncio.CancelledError(self.data.get("message")) from self.error
        if self.error is not None:
            raise self.error
        return self.value


class Execution:
    """One attempt. `run()` it once, on the loop on which it is; `cancel()` it from anywhere.

    `timeout` is in seconds from the start; `cancel_on` takes triggers; snapshots of a pipeline become `progress` events
    at most every `progress_interval` seconds; with `items` each of its outputs becomes an `item` event. Raises TypeError
    and ValueError for what cannot be run.
    """

    def __init__(
        self,
        work: Work,
        context: TaskContext,
        *,
        timeout: float | None = None,
        cancel_on: Trigger | Sequence[Trigger] = (),
        progress_interval: float = 0.25,
        items: bool = False,
    ) -> None:
        self._takes_context = check_work(work)
        check_interval(progress_interval)
        self.context = context
        self._work = work
        self._triggers = _triggers(timeout, cancel_on)
        self._interval = progress_interval
        self._items = items
        self._made = time()
        self._reasons: list[CancelReason] = []
        self._sealed: tuple[CancelReason, ...] | None = None
        self._stop: Callable[[CancelReason], object] | None = None
        """Passes a reason on to what runs now."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cancelling = 0
        """Requests to cancel the asyncio task that came before us."""

    @property
    def reasons(self) -> tuple[CancelReason, ...]:
        """Every reason to stop that came before the end of the work, in order."""
        return tuple(self._reasons) if self._sealed is None else self._sealed

    def cancel(self, reason: CancelReason) -> None:
        """Ask the work to stop. From any thread; before the start it will not begin, after the end nothing happens.

        Raises TypeError, in the trigger that calls it, for what is no reason.
        """
        check_reason(reason)
        loop = self._loop
        if loop is None or running_loop() is loop:
            self._heard(reason)
            return
        try:
            loop.call_soon_threadsafe(self._heard, reason)
        except RuntimeError:  # the loop was closed, and the work with it
            if not loop.is_closed():
                raise

    async def run(self) -> TaskEnd:
        """Do the work, and say how that ended. Once."""
        if self._loop is not None:
            raise RuntimeError(f"this attempt at task {self.context.key} was run before: make an Execution for each")
        self._loop = asyncio.get_running_loop()
        self._cancelling = _cancelling()
        self.context.bind(self._loop, lambda: self.reasons)
        token = enter_task(self.context)
        try:
            with ExitStack() as armed:
                self._arm(armed)
                end = await self._perform(self._work)
        except asyncio.CancelledError as error:
            self._interrupted()
            end = self._stopped(error=error)
        except Exception as error:  # the work's own are told by `_perform`: a trigger's, or our owner's when he publishes
            end = self._failed(error)
        finally:
            self._sealed = self.reasons
            self._stop = None
            self.context.close()
            leave_task(token)
        return self._with_what_was_said(end)

    def end_of(self, error: BaseException | None) -> TaskEnd:
        """How it ended, if `run()` did not get to say so: it was cancelled before its first step, or given up (None)."""
        if error is not None and not isinstance(error, asyncio.CancelledError):
            return self._with_what_was_said(self._failed(error))
        if error is not None or not self._reasons:
            self._interrupted()
        return self._with_what_was_said(self._stopped(error=error))

    # --- what stops it

    def _arm(self, armed: ExitStack) -> None:
        for trigger in self._triggers:
            reason = trigger.check()
            if reason is not None:
                self.cancel(reason)
            else:
                armed.callback(self._disarm, trigger.arm(self.cancel))

    def _disarm(self, handle: TriggerHandle) -> None:
        try:
            handle.disarm()
        except Exception as error:  # a trigger of somebody's own; how the work has ended stays as it is
            get_logger(task=str(self.context.key)).error("a trigger could not be disarmed", error=describe(error))

    def _heard(self, reason: CancelReason) -> None:
        if self._sealed is None and len(self._reasons) < _MOST_REASONS:
            self._reasons.append(reason)
            if self._stop is not None:
                self._stop(reason)

    def _interrupted(self) -> None:
        """It was cancelled through asyncio, where nobody says why."""
        if not any(reason.code == _CODE for reason in self._reasons):
            self._heard(CancelReason("the asyncio task was cancelled", CancelType.MANUAL, _CODE, origin="asyncio"))

    # --- the work

    async def _perform(self, work: Work) -> TaskEnd:
        if self._reasons:
            return self._stopped()
        if isinstance(work, Pipeline):
            return await self._run_pipeline(work)
        await self.context.tell(EventType.STARTED, {})
        if self._reasons:
            return self._stopped()
        value: Any = None
        error: Exception | None = None
        with Fence() as fence:
            self._stop = fence.cancel
            try:
                value = await self._call(work)
            except Exception as raised:
                error = raised
        self._stop = None
        if _cancelling() > self._cancelling:  # and the work has kept that from us
            self._interrupted()
        if self._reasons:
            return self._stopped(error=error, value=value)
        if error is not None:
            return self._failed(error)
        if isinstance(value, (Pipeline, StreamTask)):  # the coroutine has made what is to be done
            return await self._perform(cast("Work", value))
        return TaskEnd(EventType.COMPLETED, {} if value is None else {"value": readable(value)}, value=value)

    async def _call(self, work: Work) -> Any:
        if isinstance(work, StreamTask):
            return await work.run_with(self.context)
        call = cast("Callable[..., Any]", work)
        return await finished(call, call(self.context) if self._takes_context else call())

    async def _run_pipeline(self, pipeline: Pipeline[Any]) -> TaskEnd:
        await self.context.tell(EventType.STARTED, {"pipeline": pipeline.name, "stages": stages_of(pipeline)})
        if self._reasons:
            return self._stopped()
        interrupted: asyncio.CancelledError | None = None
        result: RunReport | Err | None = None
        try:
            async with ProgressReporter(pipeline, self.context, self._interval):
                result = await self._run_through(pipeline)
        except asyncio.CancelledError as error:
            interrupted, result = error, result or pipeline.report
            self._interrupted()
        except Exception as error:  # it could not start, or an item could not be told
            result = Err.of(error)
        return self._end_of_run(result, interrupted)

    async def _run_through(self, pipeline: Pipeline[Any]) -> RunReport | Err:
        self._stop = pipeline.cancel
        try:
            return await (self._iterate(pipeline) if self._items else pipeline.run())
        finally:
            self._stop = None  # before a start it would keep the pipeline from starting, and it may be started again

    async def _iterate(self, pipeline: Pipeline[Any]) -> RunReport | Err:
        try:
            async with aclosing(pipeline.async_iter()) as outputs:
                async for output in outputs:
                    await self.context.tell(EventType.ITEM, {"item": readable(output)})
        except PipelineStopped as error:
            return Err(error.__cause__ or error, reasons=error.reasons, report=error.report, attempts=0)
        report = pipeline.report
        assert report is not None
        return report

    # --- how it ended

    def _end_of_run(self, result: RunReport | Err | None, interrupted: asyncio.CancelledError | None) -> TaskEnd:
        report = result.report if isinstance(result, Err) else result
        data = {} if report is None else {"report": readable(report)}
        if isinstance(result, RunReport) and result.outcome == "completed" and interrupted is None and not self._reasons:
            told = data["report"]
            return TaskEnd(EventType.COMPLETED, told if isinstance(told, dict) else data, value=result)
        asked = bool(self._reasons)
        self._reasons[:] = _merged(() if result is None else result.reasons, self._reasons)
        if report is not None and report.outcome == "failed":
            assert isinstance(result, Err)
            return self._failed(_raised(result), about=result.value, more=data)
        if asked or (self._reasons and self._reasons[0].at >= self._made):  # else it was cancelled before, and has to be made anew
            return self._stopped(error=interrupted, value=report, more=data)
        assert isinstance(result, Err)
        return self._failed(_raised(result), more=data)

    def _stopped(
        self, *, error: BaseException | None = None, value: Any = None, more: Mapping[str, Any] | None = None
    ) -> TaskEnd:
        first = self._reasons[0]
        data = {"message": readable(first.message), "reasons": readable([reason.to_dict() for reason in self._reasons])}
        if more is not None:
            data |= more
        elif value is not None:
            data["value"] = readable(value)
        if isinstance(error, Exception):
            data["error"] = about_error(error)
        type = EventType.TIMED_OUT if first.cancel_type is CancelType.TIMEOUT else EventType.CANCELLED
        return TaskEnd(type, data, error=error, value=value)

    def _failed(
        self, error: BaseException, *, about: BaseException | str | None = None, more: Mapping[str, Any] | None = None
    ) -> TaskEnd:
        cause = about if isinstance(about, BaseException) else error
        data = about_error(cause) | dict(more or {})
        if self._reasons:
            data["reasons"] = readable([reason.to_dict() for reason in self._reasons])
        return TaskEnd(EventType.ERROR, data, error=error)

    def _with_what_was_said(self, end: TaskEnd) -> TaskEnd:
        """Terminal events that the work has sent: the last decides, if the work then returned, and all become part of the end."""
        said = self.context.said
        if not said:
            return end
        type, reasons = end.type, end.data.get("reasons")
        if type is EventType.COMPLETED:
            type = next(reversed(said))
        data = dict(end.data)
        for kind, told in said.items():
            data = {**data, **told} if kind is type else {**told, **data}
        if type in (EventType.CANCELLED, EventType.TIMED_OUT) and reasons is None:
            message = str(data.setdefault("message", f"the work says that it was {type.value}"))
            why = CancelType.TIMEOUT if type is EventType.TIMED_OUT else CancelType.MANUAL
            reasons = readable([CancelReason(message, why, origin="the work itself").to_dict()])
        if reasons is not None:
            data["reasons"] = reasons
        if type is EventType.ERROR and "message" not in data:
            data["message"] = "the work says that it has failed"
        return TaskEnd(type, readable(data), error=end.error, value=end.value)


def _raised(err: Err) -> BaseException:
    """What an iteration would raise for this run."""
    error = stopped(err)
    if isinstance(err.value, BaseException) and error is not err.value:
        error.__cause__ = err.value
    return error


def _merged(report: Sequence[CancelReason], ours: Sequence[CancelReason]) -> list[CancelReason]:
    """Those of the run, and those of ours that it has not heard. What asyncio brought to the run, it has from us."""
    merged: list[CancelReason] = []
    for reason in report:
        if reason.code == "iter_closed":
            continue
        if reason.code == "parent_cancelled" and any(one.code == _CODE for one in ours):
            reason = next(one for one in ours if one.code == _CODE)
        if not any(reason is one for one in merged):
            merged.append(reason)
    return merged + [reason for reason in ours if not any(reason is one for one in merged)]


def _cancelling() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()



def check_interval(seconds: object) -> None:
    """Raises ValueError for what is no interval of progress events."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"progress_interval is a number of seconds, more than 0, not {seconds!r}")


def _triggers(timeout: float | None, cancel_on: Trigger | Sequence[Trigger]) -> list[Trigger]:
    triggers = [cancel_on] if isinstance(cancel_on, Trigger) or not isinstance(cancel_on, Iterable) else list(cancel_on)
    for trigger in triggers:
        if isinstance(trigger, type) or not isinstance(trigger, Trigger):
            raise TypeError(f"cancel_on takes triggers, such as EventTrigger(event), not {trigger!r}")
    return triggers if timeout is None else [TimeoutTrigger(timeout, code="timeout"), *triggers]
