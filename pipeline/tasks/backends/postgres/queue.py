"""procrastinate, as it is used here: its queue, claims, notifications, aborts and periodic jobs.

The rule kept here: a job is one attempt at a task, and how it ends is decided by the transaction that ends the attempt.
So procrastinate's own worker, which has no fencing, ends none of these jobs: a worker that was frozen cannot end the
attempt of its successor.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import croniter  # procrastinate's own
from procrastinate import App, JobContext, PsycopgConnector
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager

from .database import Connection, Database

__all__ = ["TASK", "Queue", "is_cron"]

TASK = "penstock"
"""The one task of procrastinate's in which all of ours run."""


class Queue:
    """procrastinate's `App` on our pool. `app` is for whoever wants more of it: tasks and periodic tasks of their own."""

    def __init__(self, database: Database, name: str) -> None:
        self.name = name
        self._database = database
        self._connector = _PatientConnector(database)
        self.app = App(connector=self._connector)
        self.app.job_manager = _Jobs(self._connector)

    async def open(self) -> None:
        await self.app.open_async(self._database.pool)  # type: ignore[arg-type]  # `Any` in procrastinate

    def serve(self, perform: Callable[[JobContext, int, int, int], Awaitable[None]]) -> None:
        """Say what is done with a job: with its context, and task, run and attempt."""

        async def penstock(context: JobContext, *, task: int, run: int, attempt: int) -> None:
            await perform(context, task, run, attempt)

        self.app.task(name=TASK, queue=self.name, pass_context=True)(penstock)

    def repeat(self, cron: str, name: str, act: Callable[[], Awaitable[object]]) -> None:
        """Have one of the workers do something periodically. `cron` as procrastinate takes it, in UTC; once for each time."""

        async def periodic(timestamp: int) -> None:  # noqa: ARG001  # procrastinate says which time it is
            await act()

        task = self.app.task(name=f"{TASK}:{name}", queue=self.name, queueing_lock=f"{TASK}:{name}")(periodic)
        self.app.periodic(cron=cron)(task)

    async def defer(self, connection: Connection, queue: str, task: int, run: int, attempt: int, at: Any = None) -> int:
        """Put an attempt into a queue, in this transaction; with `at` (a datetime) not before then. Returns the job's id."""
        deferrer = self.app.configure_task(TASK, queue=queue, schedule_at=at, connection=connection)
        try:
            return await deferrer.defer_async(task=task, run=run, attempt=attempt)
        except ConnectorException as error:
            raise error.__cause__ or error from None  # as all other statements of this transaction

    async def run(self, *, concurrency: int, grace: float, heartbeat: float, name: str) -> None:
        """procrastinate's worker, until it is cancelled: then it takes no more jobs, and aborts after `grace` seconds."""
        await self.app.run_worker_async(
            queues=[self.name],
            name=name,
            concurrency=concurrency,
            install_signal_handlers=False,
            shutdown_graceful_timeout=grace,
            fetch_job_polling_interval=1.0,
            abort_job_polling_interval=1.0,
            update_heartbeat_interval=heartbeat / 3,
            stalled_worker_timeout=heartbeat,
        )

    async def forget(self, hours: int) -> None:
        """Delete jobs of this queue that have ended so long ago."""
        await self.app.job_manager.delete_old_jobs(
            hours, queue=self.name, include_failed=True, include_cancelled=True, include_aborted=True
        )


def is_cron(text: object) -> bool:
    """Whether procrastinate can read it, who would find out in a running worker only, and end that."""
    return isinstance(text, str) and croniter.croniter.is_valid(text)


class _PatientConnector(PsycopgConnector):
    """Waits for a server that is away, where procrastinate's would end its worker, and with it what that has begun.

    A fetch whose answer is lost has taken a job that nobody does: the sweeper finds it.
    """

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database

    async def execute_query_async(self, query: Any, **arguments: Any) -> None:
        act = super().execute_query_async
        await self._persist(lambda: act(query, **arguments))

    async def execute_query_one_async(self, query: Any, **arguments: Any) -> dict[str, Any]:
        act = super().execute_query_one_async
        return await self._persist(lambda: act(query, **arguments))

    async def execute_query_all_async(self, query: Any, **arguments: Any) -> list[dict[str, Any]]:
        act = super().execute_query_all_async
        return await self._persist(lambda: act(query, **arguments))

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        act = super().listen_notify
        await self._persist(lambda: act(on_notification, channels))

    async def _persist(self, act: Callable[[], Awaitable[Any]]) -> Any:
        return await self._database.persist(act, (ConnectorException,))


class _Jobs(JobManager):
    """Leaves the end of our jobs to our own transactions; see the rule of this module."""

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:
        if job.task_name != TASK:
            await super().finish_job(job, status, delete_job)
