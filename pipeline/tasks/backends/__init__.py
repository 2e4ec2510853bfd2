"""Tasks as dicts: submitted anywhere, done by an executor.

`base` says what a backend is; `inline` does each task where it is submitted, `fire_and_track` in the background of this
process, `postgres` in workers, which may die. `default` is the one that a program has chosen.
"""

from .base import Executor, TaskBackend
from .default import get_default_task_backend, set_default_task_backend
from .fire_and_track import AsyncFireAndTrackBackend
from .inline import SyncTaskBackend

__all__ = [
    "AsyncFireAndTrackBackend",
    "Executor",
    "SyncTaskBackend",
    "TaskBackend",
    "get_default_task_backend",
    "set_default_task_backend",
]
