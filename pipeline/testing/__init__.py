"""For test suites, yours and penstock's own: nothing left behind, hours in milliseconds, every step a victim.

- `assert_no_leaks`: a block, after which everything that was started in it has ended
- `run_virtual`: `asyncio.run` with a clock that jumps to the next timer; `real_time`: not in here
- `explore`: a pipeline again and again, with one `Fault` at every step; `replay`: one of these runs again
- `assert_balanced`: the laws of the ledger, on a report or a snapshot

Nothing here needs pytest, or any package that penstock does not need.
"""

from .clock import StuckError, VirtualLoop, real_time, run_virtual
from .explore import ALL_FAULTS, Exploration, explore, replay
from .faults import Fault, InjectedError
from .laws import assert_balanced
from .leaks import LeakCheck, assert_no_leaks
from .play import Play, Victim

__all__ = [
    "ALL_FAULTS",
    "Exploration",
    "Fault",
    "InjectedError",
    "LeakCheck",
    "Play",
    "StuckError",
    "Victim",
    "VirtualLoop",
    "assert_balanced",
    "assert_no_leaks",
    "explore",
    "real_time",
    "replay",
    "run_virtual",
]
