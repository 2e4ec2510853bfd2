"""One attempt at a task, in a worker.

The rule kept here: how it ends is written once, in the transaction that ends its job; or it is given back to the queue; or
it belongs to another attempt by now, and nothing is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from procrastinate.jobs import Job
from procrastinate.retry import BaseRetryStrategy

from ....cancellation.reason import CancelReason, CancelType
from ....observe.logs import get_logger
from ...data import about_error, readable
from ...events import EventType
from ...execution import Execution, TaskEnd
from ...task import TaskContext
from ..base import Executor, Submitted
from .database import in_one_line
from .journal import Journal, superseded
from .store import Claim, Store

__all__ = ["Attempt", "AttemptOptions"]

_STATUS = {
    EventType.COMPLETED: "succeeded",
    EventType.ERROR: "failed",
    EventType.CANCELLED: "aborted",
    EventType.TIMED_OUT: "aborted",
}


@dataclass(frozen=True, slots=True)
class AttemptOptions:
    """What is the same for all attempts of a worker. Times are in seconds."""

    worker: str
    presence: int
    executor: Executor
    progress_interval: float
    items: bool
    retry: BaseRetryStrategy | None
    cleanup: float
    """How long the work has to stop when its worker does."""


class Attempt:
    """`run()` it once; `look`, `give_back` and `lose` it at any time, also before it has begun."""

    def __init__(self, store: Store, options: AttemptOptions, job: Job, task: int, run: int, attempt: int) -> None:
        self.task, self.run_number, self.attempt = task, run, attempt
        self.claim: Claim | None = None
        self.heard = 0
        """Reasons to stop that the work has heard."""
        self.cancelled = False
        """Whether it has ended as cancelled, or timed out."""
        self.stuck = False
        """Whether its work was left behind, still running."""
        self._store = store
        self._options = options
        self._job = job
        self._journal: Journal | None = None
        self._execution: Execution | None = None
        self._reasons: tuple[CancelReason, ...] = ()
        self._looks: set[asyncio.Task[None]] = set()
        self._leaving = asyncio.Event()
        self._lost: CancelReason | None = None

    async def run(self) -> None:
        """Do it, to its end."""
        claim = await self._store.claim(
            self.task, self.run_number, self.attempt, self._options.worker, self._options.presence
        )
        if claim is None:
            await self._store.dismiss(self._job.id or 0)
            return
        self.claim = claim
        log = get_logger(task=str(claim.key), attempt=claim.attempt, worker=self._options.worker)
        try:
            end = await self._perform(claim)
            outcome = await self._conclude(claim, end)
        finally:
            for look in self._looks:
                look.cancel()
            if self._journal is not None:
                await self._journal.close()
        if outcome == "superseded":
            await self._store.dismiss(claim.job)  # by its successor, or by nobody if the task was deleted
        if outcome != EventType.COMPLETED:
            log.info("task left", outcome=outcome)

    # --- what is heard from outside

    def look(self, *, aborted: bool = False) -> None:
        """Somebody has asked the task to stop: read why. With `aborted`, procrastinate has."""
        look = asyncio.create_task(self._look(aborted), name=f"reasons of task {self.task}")
        self._looks.add(look)
        look.add_done_callback(self._looks.discard)

    def give_back(self) -> None:
        """The worker stops: stop the work, and let another worker go on."""
        if not self._leaving.is_set():
            self._leaving.set()
            self._stop(
                CancelReason(
                    "its worker stops; another one goes on", CancelType.PARENT, "worker_stopped", self._options.worker
                )
            )

    def lose(self, reason: CancelReason | None = None) -> None:
        """It is another's by now: stop the work, and write nothing."""
        if self._lost is None and self.claim is not None:
            self._lost = reason or superseded(self.claim)
            get_logger().warning("task lost", task=str(self.claim.key), attempt=self.attempt, reason=self._lost.message)
            self._stop(self._lost)

    async def _look(self, aborted: bool) -> None:
        if self.claim is None:
            return  # it comes with the claim
        try:
            reasons = await self._store.reasons(self.claim)
            if aborted and reasons == ():  # by other means than ours, so nobody has said why
                reason = CancelReason("its job was aborted in the queue", code="job_aborted", origin="procrastinate")
                await self._store.ask(self.claim.key, reason)
                reasons = (reason,)
        except psycopg.Error as error:  # the next heartbeat looks again
            get_logger().warning("reasons could not be read", task=str(self.claim.key), error=in_one_line(error))
            return
        if reasons is None:
            self.lose()
        else:
            self._hear(reasons)

    def _hear(self, reasons: tuple[CancelReason, ...]) -> None:
        for reason in reasons[self.heard :]:
            self.heard += 1
            self._stop(reason)
        self._reasons = max(self._reasons, reasons, key=len)

    def _stop(self, reason: CancelReason) -> None:
        if self._execution is not None:
            self._execution.cancel(reason)

    # --- the work

    async def _perform(self, claim: Claim) -> TaskEnd | None:
        """How it ended; None when it does not stop although the worker does."""
        self._journal = journal = Journal(self._store, claim, self.lose)
        context = TaskContext(
            claim.key,
            publish=journal.publish,
            keep=journal.keep,
            attempt=claim.attempt,
            saved=claim.saved,
            payload=claim.payload,
        )
        try:
            self._execution = Execution(
                _Guarded(self._options.executor, claim.payload),
                context,
                timeout=claim.timeout,
                progress_interval=self._options.progress_interval,
                items=self._options.items,
            )
        except (TypeError, ValueError) as error:
            return TaskEnd(EventType.ERROR, about_error(error), error)
        journal.open()
        self._hear(claim.reasons)
        if self._leaving.is_set():  # since before the claim
            self._leaving.clear()
            self.give_back()
        running = asyncio.create_task(self._execution.run(), name=f"task {claim.key}, attempt {claim.attempt}")
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait([running, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await asyncio.wait([running], timeout=self._options.cleanup)
        finally:
            leaving.cancel()
        if running.done():
            return _end_of(self._execution, running)
        context.close()
        self.stuck = True
        get_logger().error("task does not stop, and is left behind", task=str(claim.key), waited=self._options.cleanup)
        return None

    # --- its end

    async def _conclude(self, claim: Claim, end: TaskEnd | None) -> str:
        if self._lost is not None:
            assert self._journal is not None
            await self._journal.flush()
            return "superseded"
        stopped = end is None or end.type in (EventType.CANCELLED, EventType.TIMED_OUT)
        if self._leaving.is_set() and stopped and not self._reasons:
            event = {
                "message": f"worker {self._options.worker} has stopped; another one goes on",
                "code": "worker_stopped",
            }
            if await self._again(claim, event):
                return "given back"
        if end is not None and end.type is EventType.ERROR and not self._reasons and self._options.retry is not None:
            error = end.error if isinstance(end.error, Exception) else RuntimeError(str(end.data.get("message")))
            again = self._options.retry.get_retry_exception(error, self._job.evolve(attempts=claim.retried))
            if again is not None:
                event = {"message": f"attempt {claim.attempt} has failed: {end.data.get('message')}", "code": "retry"}
                if await self._again(claim, event, retried=1, at=again.retry_decision.retry_at):
                    return "to be retried"
        return await self._finish(end or TaskEnd(EventType.CANCELLED, {"stuck": True}))

    async def _finish(self, end: TaskEnd) -> str:
        assert self._journal is not None
        while True:
            type, data = told(end, self._reasons)
            written = await self._journal.end(type, data, heard=len(self._reasons), status=_STATUS[type])
            if written.outcome != "reasons":
                break
            self._reasons = written.reasons
        self.cancelled = type in (EventType.CANCELLED, EventType.TIMED_OUT)
        return type.value if written.outcome == "written" else written.outcome

    async def _again(self, claim: Claim, event: Mapping[str, Any], *, retried: int = 0, at: Any = None) -> bool:
        """Queue another attempt; False when there is a reason to stop by now, which counts."""
        assert self._journal is not None
        reasons = await self._store.reasons(claim)
        if reasons:
            self._reasons = reasons
            return False
        await self._journal.write_waiting()
        if not await self._store.transact_again(claim, event, retried=retried, at=at):
            reasons = await self._store.reasons(claim)
            if reasons:
                self._reasons = reasons
                return False
        await self._journal.flush()
        return True


class _Guarded(Submitted):
    """A submitted task that cannot end the worker, and with it the tasks of others."""

    async def __call__(self) -> Any:
        try:
            return await super().__call__()
        except SystemExit as error:
            raise RuntimeError(f"the task has called sys.exit({error.code!r}); raise an exception instead") from error


def _end_of(execution: Execution, running: asyncio.Task[TaskEnd]) -> TaskEnd:
    """How work has ended, also when it has raised what is no `Exception`. What ends the program goes through."""
    error = asyncio.CancelledError() if running.cancelled() else running.exception()
    if error is None:
        return running.result()
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    return execution.end_of(error)


def told(end: TaskEnd, asked: tuple[CancelReason, ...]) -> tuple[EventType, Mapping[str, Any]]:
    """The terminal event of work that ended so, when it was asked to stop for these reasons.

    Whoever has asked was told that the task stops, so it has not completed, even if the work had ended by then.
    """
    if not asked:
        return end.type, end.data
    type, data = end.type, dict(end.data)
    reasons: list[Any] = list(data.get("reasons", ()))
    reasons += [reason for reason in readable([one.to_dict() for one in asked]) if reason not in reasons]
    if type is EventType.COMPLETED:
        type = EventType.TIMED_OUT if asked[0].cancel_type is CancelType.TIMEOUT else EventType.CANCELLED
        data = {"message": asked[0].message} | (data if "value" in data or not data else {"report": data})
    data.setdefault("message", asked[0].message)
    return type, data | {"reasons": reasons}
