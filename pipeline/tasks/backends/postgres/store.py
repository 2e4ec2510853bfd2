"""The statements on the tables of tasks and events.

The rule kept here: every statement of a worker names the attempt that it is at, so it changes nothing once another attempt
has begun.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from ....cancellation.reason import CancelReason
from ...errors import TaskAlreadyRunningError
from ...events import EventType, TaskEvent, TaskKey
from ...status import TaskState, TaskStatus
from .database import Connection, Database
from .queue import Queue

__all__ = ["Claim", "Lost", "Store", "Written", "as_json", "event_of"]

T = TypeVar("T")

_STATUS = """
    select t.*, extract(epoch from t.created)::float8 as created_at, extract(epoch from t.started)::float8 as started_at,
        extract(epoch from t.ended)::float8 as ended_at, p.data as progress, s.data as about, e.data as result
    from ({tasks}) t
    left join lateral (select data from penstock_events where task = t.id and type = 'progress' and run = t.run
        order by seq desc limit 1) p on true
    left join lateral (select data from penstock_events where task = t.id and type = 'started' and run = t.run
        order by seq desc limit 1) s on true
    left join penstock_events e on e.task = t.id and e.run = t.run and e.type in ('error', 'cancelled', 'timed_out', 'completed')
"""
_ONE = _STATUS.format(tasks="select * from penstock_tasks where app = %s and name = %s and key = %s")
_LIST = (
    _STATUS.format(tasks="select * from penstock_tasks order by (ended is null) desc, created desc limit %s")
    + " order by (t.ended is null) desc, t.created desc"
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt, and what its worker needs to know."""

    task: int
    run: int
    attempt: int
    key: TaskKey
    job: int
    seq: int
    payload: dict[str, Any]
    timeout: float | None
    saved: Any
    retried: int
    reasons: tuple[CancelReason, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a write: "written", "superseded" or "reasons", and all reasons to stop so far."""

    outcome: str
    reasons: tuple[CancelReason, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """A task that nobody works on, though it is not over. `why`: "gone", "frozen" or "astray"."""

    task: int
    run: int
    attempt: int
    why: str
    worker: str | None


class Store:
    """Statements. Those of a worker may be repeated, and wait for a server that is away."""

    def __init__(self, database: Database, queue: Queue) -> None:
        self._database = database
        self._queue = queue

    # --- submitting and cancelling

    async def submit(
        self,
        connection: Connection,
        key: TaskKey,
        payload: str,
        *,
        queue: str,
        timeout: float | None,
        max_attempts: int,
    ) -> int:
        """A row and a job, in the transaction of this connection. Returns the task's number."""
        cursor = connection.cursor(row_factory=dict_row)
        await cursor.execute(
            """insert into penstock_tasks as t (app, name, key, queue, payload, timeout, max_attempts)
               values (%s, %s, %s, %s, %s::json, %s, %s)
               on conflict (app, name, key) do update set queue = excluded.queue, payload = excluded.payload,
                 timeout = excluded.timeout, max_attempts = excluded.max_attempts, run = t.run + 1, attempt = 1,
                 state = 'queued', lost = 0, retried = 0, saved = null, reasons = '[]', first_seq = t.seq + 1, job = null,
                 worker = null, presence = null, beat = null, created = now(), started = null, ended = null
               where t.ended is not null returning id, run""",
            (*key, queue, payload, timeout, max_attempts),
        )
        row = await cursor.fetchone()
        if row is None:
            raise TaskAlreadyRunningError(key)
        if row["run"] > 2:  # those of this run and of the one before are kept
            await cursor.execute(
                "delete from penstock_events where task = %s and run < %s", (row["id"], row["run"] - 1)
            )
        job = await self._queue.defer(connection, queue, row["id"], row["run"], 1)
        await cursor.execute("update penstock_tasks set job = %s where id = %s", (job, row["id"]))
        return row["id"]

    async def ask(self, key: TaskKey, reason: CancelReason) -> str:
        """Ask a task to stop: "unknown", "over", "ended" or "asked"."""
        row = await self._database.row("select penstock_ask(%s, %s, %s, %s) as answer", (*key, Jsonb(reason.to_dict())))
        return "unknown" if row is None else row["answer"]

    # --- an attempt

    async def claim(self, task: int, run: int, attempt: int, worker: str, presence: int) -> Claim | None:
        """Begin an attempt; None when it is not to be begun, because it was cancelled or is another's by now."""
        row = await self._database.persist(
            lambda: self._database.row(
                """update penstock_tasks set state = case state when 'queued' then 'running' else state end,
                     worker = %(worker)s, presence = %(presence)s, beat = now(), started = coalesce(started, now())
                   where id = %(task)s and run = %(run)s and attempt = %(attempt)s
                     and (state = 'queued' or (state in ('running', 'cancelling') and presence = %(presence)s))
                   returning *""",
                {"task": task, "run": run, "attempt": attempt, "worker": worker, "presence": presence},
            )
        )
        if row is None:
            return None
        return Claim(
            task=task,
            run=run,
            attempt=attempt,
            key=TaskKey(row["app"], row["name"], row["key"]),
            job=row["job"],
            seq=row["seq"],
            payload=row["payload"],
            timeout=row["timeout"],
            saved=row["saved"],
            retried=row["retried"],
            reasons=_reasons(row["reasons"]),
        )

    async def dismiss(self, job: int) -> None:
        """End a job that is nobody's attempt any more."""
        await self._database.persist(
            lambda: self._database.rows(
                """select penstock_end_job(%(job)s, 'aborted') where not exists
                   (select from penstock_tasks where job = %(job)s and state in ('queued', 'running', 'cancelling'))""",
                {"job": job},
            )
        )

    async def write(
        self,
        claim: Claim,
        seq: int,
        events: Sequence[tuple[str, float, str]],
        *,
        saved: str | None = None,
        heard: int = 0,
        status: str | None = None,
    ) -> Written:
        """Add events after `seq`, each its type, time and JSON; with a job's `status` the last one ends the task."""
        types, times, data = ([event[part] for event in events] for part in range(3))
        values = (claim.task, claim.run, claim.attempt, seq, types, times, data, saved, heard, status)
        row = await self._database.persist(
            lambda: self._database.row(
                """select * from penstock_write(%s, %s, %s, %s, %s::text[], %s::float8[], %s::json[], %s::json, %s,
                     %s::procrastinate_job_status)""",
                values,
            )
        )
        assert row is not None
        return Written(row["outcome"], _reasons(row["reasons"]))

    async def reasons(self, claim: Claim) -> tuple[CancelReason, ...] | None:
        """Why an attempt is asked to stop; None when it is not the current one any more."""
        row = await self._database.persist(
            lambda: self._database.row(
                "select reasons from penstock_tasks where id = %s and run = %s and attempt = %s",
                (claim.task, claim.run, claim.attempt),
            )
        )
        return None if row is None else _reasons(row["reasons"])

    async def forget_progress(self, task: int, before: int) -> None:
        """Delete the progress events of a task up to this one, which newer ones have replaced."""
        await self._database.rows(
            "delete from penstock_events where task = %s and type = 'progress' and seq <= %s", (task, before)
        )

    async def forget_events(self, task: int, keep: int) -> None:
        """Delete items and warnings of a task, but for so many of the newest."""
        await self._database.rows(
            """delete from penstock_events where task = %(task)s and type in ('item', 'warning') and seq <=
               (select seq from penstock_events where task = %(task)s and type in ('item', 'warning')
                order by seq desc offset %(keep)s limit 1)""",
            {"task": task, "keep": keep},
        )

    async def beat(self, presence: int, tasks: Sequence[int]) -> dict[int, tuple[int, int, int]]:
        """Say that a worker still has these tasks. Returns those that are its own: run, attempt, and number of reasons."""
        rows = await self._database.rows(
            """update penstock_tasks set beat = now()
               where presence = %s and id = any(%s::bigint[]) and state in ('running', 'cancelling')
               returning id, run, attempt, jsonb_array_length(reasons) as reasons""",
            (presence, list(tasks)),
        )
        return {row["id"]: (row["run"], row["attempt"], row["reasons"]) for row in rows}

    # --- another attempt

    async def try_again(
        self,
        connection: Connection,
        of: Claim | Lost,
        *,
        lost: int = 0,
        retried: int = 0,
        at: Any = None,
        event: Mapping[str, Any],
    ) -> bool:
        """End an attempt and queue the next, with a `warning`. False when it is not the current one, or is to be cancelled."""
        cursor = await connection.execute(
            """update penstock_tasks set attempt = attempt + 1, state = 'queued', presence = null, seq = seq + 1,
                 lost = lost + %s, retried = retried + %s
               where id = %s and run = %s and attempt = %s and state in ('queued', 'running') returning *""",
            (lost, retried, of.task, of.run, of.attempt),
        )
        row = await cursor.fetchone()
        if row is None:
            return False
        await connection.execute(
            """insert into penstock_events (task, seq, run, type, at, data)
               values (%s, %s, %s, 'warning', extract(epoch from clock_timestamp()), %s::json)""",
            (of.task, row["seq"], of.run, as_json({**event, "attempt": row["attempt"]})),
        )
        await connection.execute("select penstock_end_job(%s, 'failed')", (row["job"],))
        job = await self._queue.defer(connection, row["queue"], of.task, of.run, row["attempt"], at)
        await connection.execute("update penstock_tasks set job = %s where id = %s", (job, of.task))
        await connection.execute("select pg_notify('penstock', %s)", (str(of.task),))
        return True

    async def transact_again(self, claim: Claim, event: Mapping[str, Any], *, retried: int, at: Any) -> bool:
        """`try_again` in a transaction of its own."""

        async def act() -> bool:
            async with self._database.transaction() as connection:
                return await self.try_again(connection, claim, retried=retried, at=at, event=event)

        return await self.persist(act)

    # --- looking

    async def status(self, key: TaskKey) -> TaskStatus | None:
        row = await self._database.row(_ONE, tuple(key))
        return None if row is None else _status(row)

    async def statuses(self, limit: int) -> list[TaskStatus]:
        return [_status(row) for row in await self._database.rows(_LIST, (limit,))]

    async def find(self, key: TaskKey) -> dict[str, Any] | None:
        """Number, run, and first event of the run of a task."""
        query = "select id, run, first_seq from penstock_tasks where app = %s and name = %s and key = %s"
        return await self.persist(lambda: self._database.row(query, tuple(key)))

    async def existing(self, tasks: Sequence[int]) -> set[int]:
        """Which of these there are."""
        rows = await self._database.rows("select id from penstock_tasks where id = any(%s::bigint[])", (list(tasks),))
        return {row["id"] for row in rows}

    async def persist(self, act: Callable[[], Awaitable[T]]) -> T:
        """See `Database.persist`."""
        return await self._database.persist(act)

    async def events(self, seen: Mapping[int, int], *, limit: int) -> list[dict[str, Any]]:
        """For each of these tasks its events after the one that was seen, in order; at most `limit` of each."""
        return await self._database.rows(
            """select e.* from unnest(%s::bigint[], %s::bigint[]) as w (task, seen) cross join lateral
               (select task, seq, run, type, at, data from penstock_events
                where task = w.task and seq > w.seen order by seq limit %s) e order by e.task, e.seq""",
            (list(seen), list(seen.values()), limit),
        )


def event_of(key: TaskKey, row: Mapping[str, Any]) -> TaskEvent:
    return TaskEvent(key, row["seq"], EventType(row["type"]), row["data"], row["at"])


def as_json(data: Any) -> str:
    """Text for a column of type json; the data is plain already. `Any`: JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _reasons(told: Sequence[Mapping[str, Any]] | None) -> tuple[CancelReason, ...]:
    return tuple(CancelReason.from_dict(one) for one in told or ())


def _status(row: Mapping[str, Any]) -> TaskStatus:
    return TaskStatus(
        TaskKey(row["app"], row["name"], row["key"]),
        TaskState(row["state"]),
        attempt=row["attempt"],
        seq=row["seq"],
        created=row["created_at"],
        started=row["started_at"],
        ended=row["ended_at"],
        reasons=_reasons(row["reasons"]),
        progress=row["progress"],
        result=row["result"],
        about=row["about"] or {},
        worker=row["worker"],
    )
