"""For test suites, yours and penstock's own: nothing left behind, and hours in milliseconds.

- `assert_no_leaks`: a block, after which everything that was started in it has ended
- `run_virtual`: `asyncio.run` with a clock that jumps to the next timer; `real_time`: not in here

Nothing here needs pytest, or any package that penstock does not need.
"""

from .clock import StuckError, VirtualLoop, real_time, run_virtual
from .leaks import LeakCheck, assert_no_leaks

__all__ = ["LeakCheck", "StuckError", "VirtualLoop", "assert_no_leaks", "real_time", "run_virtual"]
