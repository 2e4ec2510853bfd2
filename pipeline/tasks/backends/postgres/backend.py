"""`PostgresTaskBackend`: the front door of durable tasks.

The rule kept here: this class holds the documentation and wires the rooms; what is done is done in them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
from procrastinate import App, JobContext
from procrastinate.retry import RetryValue
from psycopg.pq import TransactionStatus

from ....cancellation.reason import CancelReason
from ....cancellation.signals import running_loop
from ....observe.logs import get_logger
from ...data import plain
from ...errors import CoordinatorClosedError, TaskAlreadyRunningError
from ...events import TaskKey
from ...running import as_reason
from ...status import TaskStatus
from ..base import TaskBackend, key_of
from ..embedded import EmbeddedServer
from .attempt import AttemptOptions
from .database import check_dsn
from .mirrors import TableSubscription
from .opened import Opened
from .queue import is_cron
from .retention import CRON, prune
from .settings import Settings, default_name, retry_strategy, seconds
from .store import as_json
from .worker import Worker

__all__ = ["PostgresTaskBackend"]


class PostgresTaskBackend(TaskBackend):
    """Tasks in a PostgreSQL database: submitted, watched and cancelled from any process, done by workers that may die.

    It is a `TaskBackend` and a `TaskHub`. Without a `dsn` it is an embedded server in `data_dir`, see `embedded.py`.
    A worker calls `work()`, or is `penstock worker module:backend`; all others only `initialize()` and `shutdown()`.

    A task whose worker is lost is done again by another, as a further attempt, up to `max_attempts`; `current_task().saved`
    has what the one before has saved. So work is done at least once: what it does outside of the database should bear a
    repetition, or carry `current_task().attempt`, which only grows within a run, as a fencing number. A worker whose process
    has ended is noticed in one or two seconds; one that is frozen, cut off, or whose event loop is blocked, after
    `heartbeat` seconds, which have to be the same in all processes. A task that kills its worker is a loss to all that
    the worker was at: give such tasks a queue of their own, with `concurrency=1`.

    `queue` is procrastinate's, and workers serve one. `retry` is for tasks that fail: a number of further attempts, or a
    `RetryStrategy` of procrastinate; without it a failure ends the task. Tasks that are over are forgotten after `keep`
    seconds (7 days; None: never) while there are workers. `cleanup` is how long, in seconds, work may take to stop when its
    worker does. `connect_timeout` is in seconds, too, whole ones from 2 on. `items` and `progress_interval` are as in `TaskCoordinator`. `name` is what a worker is called.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        queue: str = "penstock",
        max_attempts: int = 3,
        retry: RetryValue | None = None,
        heartbeat: float = 30.0,
        sweep_interval: float = 0.5,
        connect_timeout: float = 10.0,
        pool_size: int = 8,
        progress_interval: float = 0.25,
        items: bool = False,
        cleanup: float = 10.0,
        keep: float | timedelta | None = timedelta(days=7),
        name: str | None = None,
    ) -> None:
        super().__init__()
        if dsn is not None and data_dir is not None:
            raise ValueError("give a dsn, or a data_dir for an embedded server, not both")
        self.settings = Settings(
            queue=queue,
            max_attempts=max_attempts,
            retry=retry_strategy(retry),
            heartbeat=heartbeat,
            sweep_interval=sweep_interval,
            connect_timeout=connect_timeout,
            pool_size=pool_size,
            progress_interval=progress_interval,
            items=items,
            cleanup=cleanup,
            keep=keep.total_seconds() if isinstance(keep, timedelta) else keep,
            name=name or default_name(),
        )
        self._dsn = None if dsn is None else check_dsn(dsn)
        self._server = EmbeddedServer(data_dir) if dsn is None else None
        self._periodic: list[tuple[str, dict[str, Any]]] = []
        self._opening = asyncio.Lock()
        self._open: Opened | None = None
        self._closing: asyncio.Task[None] | None = None
        self._closed = False
        self._worker: Worker | None = None

    def __repr__(self) -> str:
        where = (
            self._server.data_dir if self._server is not None else self._open.database.place if self._open else "a DSN"
        )
        return f"<PostgresTaskBackend, {where}, queue {self.settings.queue!r}>"

    @property
    def hub(self) -> PostgresTaskBackend:
        return self

    @property
    def dsn(self) -> str:
        """Where the database is; that of an embedded server once it is initialized. It may have a password."""
        return self._dsn if self._dsn is not None else self._server.dsn if self._server is not None else ""

    @property
    def app(self) -> App:
        """procrastinate's own `App` on this database, for more than is offered here. Once initialized."""
        return self._opened().queue.app

    @property
    def has_executor(self) -> bool:
        return self._executor is not None

    @property
    def inflight_count(self) -> int:
        """Tasks that the worker of this process is at."""
        return 0 if self._worker is None else self._worker.running

    # --- opening and closing

    async def initialize(self) -> None:
        """Reach the database, make its tables, and look after it. Idempotent, in any number of processes at once.

        Raises ConnectionError, within `connect_timeout` for a DSN, when there is no database; RuntimeError when it is
        too old, or the role has no rights to it.
        """
        async with self._opening:
            if self._open is not None and self._open.loop.is_closed():
                self._open = self._worker = None  # left behind, without a shutdown
            if self._open is None:
                dsn = self._dsn if self._server is None else await self._server.start()
                assert dsn is not None
                try:
                    self._open = await Opened.make(
                        dsn, self.settings, self._heard, self._look, self._server.start if self._server else None
                    )
                except BaseException:
                    if self._server is not None:
                        await self._server.leave()
                    raise
                self._open.queue.serve(self._perform)
                for number, (cron, task) in enumerate(self._periodic):
                    self._repeat(self._open, number, cron, task)
                if self.settings.keep is not None:
                    self._open.queue.repeat(CRON, "prune", partial(self.prune, self.settings.keep))
                self._closed = False

    async def shutdown(self) -> None:
        """Stop the worker of this process, end all subscriptions, and close. Tasks stay where they are. Idempotent.

        Who gives up waiting for it does not stop it; another call waits for the same end.
        """
        self.stop()
        if self._closing is None or self._closing.done():
            self._closing = asyncio.create_task(self._close(), name="penstock shutdown")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        async with self._opening:
            self._closed = True
            opened, self._open = self._open, None
            if opened is not None:
                await opened.close()
            if self._server is not None:
                await self._server.leave()

    async def __aenter__(self) -> PostgresTaskBackend:
        await self.initialize()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    # --- submitting and cancelling

    async def submit(
        self,
        task: dict[str, Any],
        *,
        connection: psycopg.AsyncConnection[Any] | None = None,
        timeout: float | None = None,
    ) -> TaskKey:
        """Have a worker do a task, which is a dict of JSON of at most 1 MiB. Its key is as in `TaskBackend`.

        With `connection`, one of psycopg's to this database, it is part of the transaction there: it begins when that is
        committed, and if that is rolled back it never was. `timeout` is in seconds, for each attempt. A key may be
        submitted again when its task is over; while it is not, `TaskAlreadyRunningError` is raised.
        """
        key, opened = key_of(task), self._opened()
        payload = plain(dict(task), "a submitted task")
        limit = None if timeout is None else seconds("timeout", timeout)
        write = partial(
            opened.store.submit,
            key=key,
            payload=as_json(payload),
            queue=self.settings.queue,
            timeout=limit,
            max_attempts=self.settings.max_attempts,
        )
        if connection is None:
            async with opened.database.transaction() as own:
                await write(own)
        else:
            async with _part_of(connection):
                await write(connection)
        return key

    async def cancel_task(
        self,
        app: object,
        name: object,
        id: object,
        reason: str | CancelReason | None = None,
        *,
        code: str | None = None,
    ) -> bool:
        """Ask a task to stop, wherever it runs. True while it waits or runs; then this reason is in its terminal event,
        `cancelled`, or `error` if its work had failed before it heard of it.

        One that waits ends at once. In psql: `select penstock_cancel('app', 'name', 'id', 'why')`.
        """
        key = TaskKey.of(app, name, id)
        given = CancelReason.from_dict(plain(as_reason(reason, code).to_dict(), "a reason"))
        answer = await self._opened().store.ask(key, given)
        if answer == "over":
            get_logger(task=str(key)).info("a task that is over cannot be cancelled")
        elif answer == "unknown":
            get_logger(task=str(key)).warning("an unknown task cannot be cancelled")
        return answer in ("asked", "ended")

    def schedule(self, cron: str, task: dict[str, Any]) -> None:
        """Have a task submitted periodically, by the workers: `cron` as in crontab, in UTC. Before `initialize`.

        Each time is taken once, however many workers there are. While the task of its key is not over, a time is left out;
        without an "id" each has a key of its own.
        """
        if self._open is not None:
            raise RuntimeError("schedule() periodic tasks before initialize()")
        key_of(task)
        if not is_cron(cron):
            raise ValueError(f"{cron!r} cannot be read as in crontab; write '*/5 * * * *' for every five minutes")
        self._periodic.append((cron, plain(dict(task), "a periodic task")))

    # --- looking

    async def list_tasks(self, *, limit: int = 100) -> Sequence[TaskStatus]:
        """The newest tasks, those that are not over first."""
        return await self._opened().store.statuses(max(limit, 0))

    async def get_task(self, app: object, name: object, id: object) -> TaskStatus | None:
        """The status of one task; None when it is not known."""
        return await self._opened().store.status(TaskKey.of(app, name, id))

    def subscribe(
        self, app: object, name: object, id: object, *, last_event_id: int | None = None, buffer: int = 256
    ) -> TableSubscription:
        """See `TaskHub.subscribe`. It goes on across a restart of the database."""
        return self._opened().mirrors.subscribe(TaskKey.of(app, name, id), last_event_id, buffer)

    async def prune(self, older_than: float | timedelta) -> int:
        """Forget tasks that were over for so long, in seconds; returns how many. Workers do so by themselves."""
        age = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
        opened = self._opened()
        return await prune(opened.database, opened.queue, 0.0 if age == 0 else seconds("older_than", age))

    # --- working

    async def work(self, *, concurrency: int = 1, grace: float = 5.0) -> Sequence[TaskKey]:
        """Do tasks, `concurrency` at once, until `stop()`, `shutdown()` or a cancellation.

        Then nothing more is taken; what runs may end within `grace` seconds, and what is left is stopped and given back to
        the queue for another worker, as a further attempt that does not count as lost. Returns
        the keys of tasks whose work did not stop and was left behind. One `work()` at a time.
        """
        if self._executor is None:
            raise RuntimeError("a worker has nothing to do tasks with; call backend.set_executor(function) first")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency is a whole number from 1 on, not {concurrency!r}")
        grace = 0.0 if grace == 0 else seconds("grace", grace)
        if self._worker is not None:
            raise RuntimeError("this backend works already; choose a higher concurrency, or start another process")
        opened, settings = self._opened(), self.settings
        options = AttemptOptions(
            worker=settings.name,
            presence=opened.presence,
            executor=self._executor,
            progress_interval=settings.progress_interval,
            items=settings.items,
            retry=settings.retry,
            cleanup=settings.cleanup,
        )
        worker = Worker(opened.database, opened.store, opened.queue, options, heartbeat=settings.heartbeat)
        self._worker = worker
        working = asyncio.current_task()
        assert working is not None
        opened.working.add(working)
        try:
            await worker.run(opened.listener.ready, concurrency=concurrency, grace=grace)
            return worker.stuck
        finally:
            opened.working.discard(working)
            self._worker = None

    def stop(self) -> None:
        """End `work()` in good order; a second time: without waiting for what runs."""
        if self._worker is not None:
            self._worker.stop()

    # --- what the rooms call

    async def _perform(self, context: JobContext, task: int, run: int, attempt: int) -> None:
        assert self._worker is not None
        await self._worker.perform(context, task, run, attempt)

    def _heard(self, payload: str) -> None:
        if self._worker is not None:
            self._worker.heard(payload)

    def _look(self) -> None:
        if self._worker is not None:
            self._worker.look()

    def _repeat(self, opened: Opened, number: int, cron: str, task: Mapping[str, Any]) -> None:
        async def submit() -> None:
            try:
                await self.submit(dict(task))
            except TaskAlreadyRunningError:
                get_logger(task=str(key_of(task))).warning(
                    "a periodic task is still running, and this time is left out"
                )

        opened.queue.repeat(cron, f"{key_of(task).name}:{cron}:{number}", submit)

    def _opened(self) -> Opened:
        if self._open is None:
            if self._closed:
                raise CoordinatorClosedError("the backend was shut down; initialize() it again")
            raise RuntimeError("the backend is not ready; call await backend.initialize() first")
        if running_loop() not in (self._open.loop, None):
            raise RuntimeError("this backend was initialized in another event loop; make one for each, or initialize() it there when the other is closed")
        return self._open


@asynccontextmanager
async def _part_of(connection: psycopg.AsyncConnection[Any]) -> AsyncGenerator[None]:
    """In the transaction that the caller has begun, or is about to: as a whole, and committed when he commits."""
    if not isinstance(connection, psycopg.AsyncConnection):
        raise TypeError(f"connection is a psycopg.AsyncConnection, not {connection!r}")
    if connection.info.transaction_status is TransactionStatus.IDLE:
        if connection.autocommit:
            raise ValueError(
                "this connection is in autocommit mode and in no transaction; submit inside `async with connection.transaction():`"
            )
        await connection.execute("select 1")  # begins it, so that what follows is a part of it
    try:
        async with connection.transaction():
            yield
    except psycopg.errors.UndefinedTable:
        raise ValueError(
            "this connection is to a database without penstock's tables; use the one of the backend"
        ) from None
