"""How one call is made: in the loop, in a thread, in a process.

- `base`: the state that a handler sees, and what a handler is
- `retry`: when to try again
- `performer`: calls a handler on a thread that may block
- `loop`: calls a handler in the run's own loop
- `placement`: loop, threads or processes, checked when a stage is declared
- `pooled`: what a stage and a pool of workers say to each other
- `parcel`: many items handed over at once
- `thread`: a pool of threads
- `bell`: wakes the loop from a thread
- `process`: a pool of processes
"""

from .base import WorkerHandler, WorkerState
from .retry import Retry

__all__ = ["Retry", "WorkerHandler", "WorkerState"]
