"""The scheduler: work by the resources that it needs, and what is further along first.

`Scheduler` is the front for threads and for event loops; `engine.py` decides, and knows neither.
"""

from .context import raise_if_terminate_requested, terminate_requested
from .errors import CancelledError, TerminatedError, UnknownResourceError, UnschedulableTaskError
from .handles import PipelineHandle, TaskHandle
from .reserve import Reservation
from .scheduler import Scheduler
from .snapshot import PipelineRow, ResourceRow, SchedulerSnapshot, ShortageRow, WorkRow
from .staged import StagedPipeline, TaskBuilder
from .subprocess import run_subprocess
from .waiting import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION

__all__ = [
    "ALL_COMPLETED",
    "FIRST_COMPLETED",
    "FIRST_EXCEPTION",
    "CancelledError",
    "PipelineHandle",
    "PipelineRow",
    "Reservation",
    "ResourceRow",
    "Scheduler",
    "SchedulerSnapshot",
    "ShortageRow",
    "StagedPipeline",
    "TaskBuilder",
    "TaskHandle",
    "TerminatedError",
    "UnknownResourceError",
    "UnschedulableTaskError",
    "WorkRow",
    "raise_if_terminate_requested",
    "run_subprocess",
    "terminate_requested",
]
