"""Finds tasks that nobody works on although they are not over, and has another worker go on with them.

The rules kept here:

- It is outside the queue, for the queue believes in workers that are dead. Any process may sweep, one at a time.
- Nobody is asked whether he is alive. A killed worker's session ends, and with it the advisory lock that shows its
  presence; a frozen one stops saying that it lives. Whoever was wrongly taken for dead has lost its fencing number.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ....cancellation.reason import CancelReason
from ....observe.logs import get_logger
from .database import AWAY, Connection, Database, in_one_line, pass_cancellation
from .listener import PRESENCE
from .store import Lost, Store, as_json

__all__ = ["Sweeper"]

_LOCK = 0x70656E73_00000002
_RECONNECT = 3.0
"""Seconds that workers have to come back after a start of the server."""
_TAKEN = 5.0
"""Seconds in which a worker begins the job that it has taken."""
_SURE = 1.0
"""Seconds for which a worker has been gone when it is believed: its connection may only have been lost, while a task held
its event loop."""

_ASTRAY = 10
"""Each how many sweeps tasks that wait are looked at, too: that costs a look at each of them,"""
_SHARE = 20
"""and so many times what it took passes until the next, at least."""

_COLUMNS = """t.id, t.run, t.attempt, t.state, t.worker, t.lost, t.max_attempts, t.app, t.name, t.key, j.status::text as job
    from penstock_tasks t left join procrastinate_jobs j on j.id = t.job"""
_IS_FROZEN = "greatest(t.beat, pg_postmaster_start_time()) < now() - make_interval(secs => %(heartbeat)s)"
_FIND_LOST = f"""
    with alive as materialized (
        select objid::bigint as presence from pg_locks
        where locktype = 'advisory' and classid = {PRESENCE} and objsubid = 2 and granted
          and database = (select oid from pg_database where datname = current_database())
    )
    select case when {_IS_FROZEN} then 'frozen' else 'gone' end as why, {_COLUMNS}
    where t.state in ('running', 'cancelling') and (
        {_IS_FROZEN} or (now() - pg_postmaster_start_time() > make_interval(secs => {_RECONNECT})
            and not exists (select from alive where alive.presence = t.presence)))
    order by t.id limit 100 for update of t skip locked
"""
_FIND_ASTRAY = f"""
    select 'astray' as why, {_COLUMNS}
    where t.state = 'queued' and coalesce(j.status::text, 'missing') <> 'todo' and not exists (
        select from procrastinate_events e where e.job_id = j.id and j.status = 'doing' and e.type = 'started'
            and e.at > now() - make_interval(secs => {_TAKEN}))
    order by t.id limit 100 for update of t skip locked
"""


class Sweeper:
    """`run()` it as a task. `interval` and `heartbeat` are in seconds."""

    def __init__(self, database: Database, store: Store, *, interval: float, heartbeat: float) -> None:
        self._database = database
        self._store = store
        self._interval = interval
        self._heartbeat = heartbeat
        self._suspects: dict[tuple[int, int, int], float] = {}
        """Attempts whose worker seems to be gone, and since when."""
        self._look_at_waiting = 0.0

    async def run(self) -> None:
        while True:
            pass_cancellation()
            try:
                await self.sweep()
            except AWAY:
                self._suspects.clear()
            except Exception as error:  # nobody else may be there to sweep, so it goes on whatever it was
                self._suspects.clear()
                get_logger().error("the sweep has failed; trying again", error=in_one_line(error))
            await asyncio.sleep(min(self._interval, 1.5 * _SURE) if self._suspects else self._interval)

    async def sweep(self) -> int:
        """Look once; how many tasks were found and seen to. Nothing, when another process is at it."""
        async with self._database.transaction() as connection:
            cursor = await connection.execute("select pg_try_advisory_xact_lock(%s) as ours", (_LOCK,))
            row = await cursor.fetchone()
            if row is None or not row["ours"]:
                return 0
            cursor = await connection.execute(_FIND_LOST.encode(), {"heartbeat": self._heartbeat})
            sure = self._only_sure(await cursor.fetchall())
            began = time.monotonic()
            if began >= self._look_at_waiting:
                cursor = await connection.execute(_FIND_ASTRAY.encode())
                sure += await cursor.fetchall()
                took = time.monotonic() - began
                self._look_at_waiting = began + max(_ASTRAY * self._interval, _SHARE * took)
            for lost in sure:
                await self._see_to(connection, lost)
        for lost in sure:
            get_logger().warning(
                "task recovered",
                task="/".join((lost["app"], lost["name"], lost["key"])),
                attempt=lost["attempt"],
                why=lost["why"],
                worker=lost["worker"],
            )
        return len(sure)

    def _only_sure(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        now, before, self._suspects = time.monotonic(), self._suspects, {}
        sure: list[dict[str, Any]] = []
        for row in found:
            attempt = row["id"], row["run"], row["attempt"]
            since = before.get(attempt, now)
            if row["why"] == "gone" and now - since < _SURE:
                self._suspects[attempt] = since
            else:
                sure.append(row)
        return sure

    async def _see_to(self, connection: Connection, row: dict[str, Any]) -> None:
        lost = Lost(row["id"], row["run"], row["attempt"], row["why"], row["worker"])
        if row["state"] == "cancelling":
            await _end_cancelled(connection, lost.task, "its worker was lost while it was stopping")
        elif row["state"] == "queued":
            if row["job"] == "cancelled":  # by other means than ours, so nobody has said why
                reason = CancelReason(
                    "its job was cancelled in the queue", code="job_cancelled", origin="procrastinate"
                )
                await connection.execute(
                    "update penstock_tasks set reasons = reasons || %s::jsonb where id = %s and reasons = '[]'",
                    (as_json([reason.to_dict()]), lost.task),
                )
                await _end_cancelled(connection, lost.task, None)
            else:
                event = {"message": "its job was lost; queued again", "code": "job_lost"}
                await self._store.try_again(connection, lost, event=event)
        elif row["lost"] + 1 >= row["max_attempts"]:
            data = {
                "message": f"{row['max_attempts']} workers were lost at this task, the last one {_how(lost)}; "
                "see what it does to them, or raise max_attempts",
                "type": "WorkerLostError",
                "code": "worker_lost",
            }
            await connection.execute("select penstock_end(%s, 'error', %s::json, 'failed')", (lost.task, as_json(data)))
        else:
            event = {
                "message": f"worker {_how(lost)}; another one goes on",
                "code": "worker_lost",
                "worker": lost.worker,
            }
            await self._store.try_again(connection, lost, lost=1, event=event)


def _how(lost: Lost) -> str:
    return f"{lost.worker} {'was not heard of in time' if lost.why == 'frozen' else 'has died'}"


async def _end_cancelled(connection: Connection, task: int, note: str | None) -> None:
    await connection.execute("select penstock_end_cancelled(%s, %s)", (task, note))
