"""How stages are joined, run, stopped and watched.

The rooms:

- `pipeline`: the definition; `options`: what it can be told; `standing`: where it stands. `run`: one run of it.
  `assembly`: its nodes and edges.
  `shutdown`: the phases of its end
- `runtime`: the reasons to stop a run; `registers`: its tasks, threads and processes; `handle`: what `cancel()` returns;
  `lifecycle`: the states
- `source`, `feeds`, `channel`, `lot`, `sink`: how items come in, move, and go out; `iteration`, `bridge`, `host`: to
  somebody who iterates
- `metrics`, `report`: the ledger; `policy`, `result`, `errors`: what becomes of failures
- `cancellation`: reasons, scopes and triggers; `program`: Ctrl-C for whole programs; `observe`: logs and the report in words
- `interop`: aiostream operators; `protocols`: what a stage must offer; `pace`: fairness
"""

from .cancellation import (
    CancelReason,
    CancelType,
    DeadlineTrigger,
    EndTrigger,
    EventTrigger,
    Fence,
    MemoryTrigger,
    SignalTrigger,
    TimeoutTrigger,
    Trigger,
    TriggerHandle,
    get_current_reasons,
)
from .cancellation.asgi import ClientConnection, DisconnectMiddleware, DisconnectTrigger
from .errors import PipelineCancelled, PipelineError, PipelineFailed, StageConfigError, WorkerLostError
from .lifecycle import Grace, PipelineState
from .metrics import PipelineSnapshot, StageMetrics
from .pipeline import Pipeline
from .policy import ErrorPolicy
from .program import run_until_signalled
from .report import RunReport
from .result import Err, Result, err_as_value, get_err, is_err, is_ok, unwrap, unwrap_or
from .runtime import PipelineRuntime

__all__ = [
    "CancelReason",
    "CancelType",
    "ClientConnection",
    "DeadlineTrigger",
    "DisconnectMiddleware",
    "DisconnectTrigger",
    "EndTrigger",
    "Err",
    "ErrorPolicy",
    "EventTrigger",
    "Fence",
    "Grace",
    "MemoryTrigger",
    "Pipeline",
    "PipelineCancelled",
    "PipelineError",
    "PipelineFailed",
    "PipelineRuntime",
    "PipelineSnapshot",
    "PipelineState",
    "Result",
    "RunReport",
    "SignalTrigger",
    "StageConfigError",
    "StageMetrics",
    "TimeoutTrigger",
    "Trigger",
    "TriggerHandle",
    "WorkerLostError",
    "err_as_value",
    "get_current_reasons",
    "get_err",
    "is_err",
    "is_ok",
    "run_until_signalled",
    "unwrap",
    "unwrap_or",
]
