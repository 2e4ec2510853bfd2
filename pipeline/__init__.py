"""How stages are joined, run, stopped and watched.

The rooms:

- `pipeline`: the definition. `run`: one run of it. `assembly`: its nodes and edges. `shutdown`: the phases of its end
- `runtime`: owns every task, thread and process of a run, and the reasons to stop; `handle`: what `cancel()` returns;
  `lifecycle`: the states
- `source`, `feeds`, `channel`, `lot`, `sink`, `bridge`, `host`: how items come in, move, and go out
- `metrics`, `report`: the ledger; `policy`, `result`, `errors`: what becomes of failures
- `cancellation`: reasons, scopes and triggers; `observe`: logs and the report in words
- `interop`: aiostream operators; `protocols`: what a stage must offer; `pace`: fairness
"""

from .cancellation.fence import Fence, get_current_reasons
from .cancellation.reason import CancelReason, CancelType
from .cancellation.triggers import EventTrigger, SignalTrigger, TimeoutTrigger, Trigger, TriggerHandle
from .errors import PipelineCancelled, PipelineError, PipelineFailed, StageConfigError, WorkerLostError
from .lifecycle import Grace, PipelineState
from .metrics import PipelineSnapshot, StageMetrics
from .pipeline import Pipeline
from .policy import ErrorPolicy
from .report import RunReport
from .result import Err, Result, err_as_value, get_err, is_err, is_ok, unwrap, unwrap_or
from .runtime import PipelineRuntime

__all__ = [
    "CancelReason",
    "CancelType",
    "Err",
    "ErrorPolicy",
    "EventTrigger",
    "Fence",
    "Grace",
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
    "unwrap",
    "unwrap_or",
]
