"""Ready-made stages: small functions that return one.

Each is a stage like any other: typed, in the ledger, cancellable at every point.
"""

from .batch import batch
from .interop import pipe
from .slice import take
from .transform import filter, flat_map, map, tap

__all__ = ["batch", "filter", "flat_map", "map", "pipe", "take", "tap"]
