"""How one call is made: in the loop, in a thread, in a process.

- `base`: the state that a handler sees, and what a handler is
- `retry`: when to try again
- `performer`: calls a handler on a thread that may block
- `loop`: calls a handler in the run's own loop
- `thread`: a pool of threads
- `process`: a pool of processes
"""

from .base import WorkerHandler, WorkerState
from .retry import Retry

__all__ = ["Retry", "WorkerHandler", "WorkerState"]
