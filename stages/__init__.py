"""How items move: the decorators that make stages, the operators, and the nodes that they become in a run.

- `definition`, `decorators`: a function with options, and how to declare one
- `control`: what a handler may return instead of an output
- `desk`: books what became of each item
- `chain`: neighbouring plain functions, run as one; `crew`: loop workers; `pool`: threads and processes
- `line`: the line in which finished items wait; `fork`: every item to several handlers
- `operators`: ready-made stages, a small file each
"""

from workers.placement import InLoop, InProcess, InThread
from workers.retry import Retry

from .control import SKIP, KillSwitch
from .decorators import PathChoice, as_stage, mix_pool, stage, work_pool
from .definition import Stage, StageOptions
from .operators import batch, filter, flat_map, map, pipe, take, tap

__all__ = [
    "SKIP",
    "InLoop",
    "InProcess",
    "InThread",
    "KillSwitch",
    "PathChoice",
    "Retry",
    "Stage",
    "StageOptions",
    "as_stage",
    "batch",
    "filter",
    "flat_map",
    "map",
    "mix_pool",
    "pipe",
    "stage",
    "take",
    "tap",
    "work_pool",
]
