"""Forgets what is old, so that the tables stay bounded.

The rule kept here: only what is over is deleted, a bounded number of rows at a time.
"""

from __future__ import annotations

import math

from procrastinate.jobs import Status

from .database import Database
from .queue import TASK, Queue

__all__ = ["CRON", "prune"]

CRON = "*/10 * * * *"
"""When workers prune."""
_ROWS = 1_000
"""Tasks that are deleted in one transaction."""


async def prune(database: Database, queue: Queue, older_than: float) -> int:
    """Delete tasks that were over for so many seconds, with their events; returns how many.

    Besides: progress that a newer one has replaced, of tasks that were over for a minute; and procrastinate's jobs that
    have ended so long ago, to the hour.
    """
    await database.rows(
        """delete from penstock_events e using penstock_tasks t
           where t.ended between now() - interval '1 day' and now() - interval '1 minute' and e.task = t.id
             and e.type = 'progress'
             and exists (select from penstock_events n where n.task = t.id and n.type = 'progress' and n.run = e.run and n.seq > e.seq)"""
    )
    deleted = 0
    while True:
        rows = await database.rows(
            """delete from penstock_tasks where id in (select id from penstock_tasks
               where ended < now() - make_interval(secs => %s) limit %s for update skip locked) returning id""",
            (older_than, _ROWS),
        )
        deleted += len(rows)
        if len(rows) < _ROWS:
            break
    jobs = queue.app.job_manager
    for job in await jobs.get_stalled_jobs(queue=queue.name):
        if job.id is not None and job.task_name.startswith(f"{TASK}:"):  # ours, periodic, and its worker has died
            await jobs.finish_job(job, Status.FAILED, delete_job=False)
    await queue.forget(math.ceil(older_than / 3600))
    return deleted
