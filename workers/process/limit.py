"""How much memory a worker process may take.

The rules kept here:

- The kernel keeps the limit: an allocation beyond it fails in the handler as `MemoryError`, so it costs the item that
  asked for too much, says where, and cannot be late.
- What counts is memory of its own that was written to. Kernels limit what is reserved (`RLIMIT_DATA`), so what was
  reserved and not used is granted on top, again and again: a library may reserve hundreds of megabytes for its threads.
- A worker that keeps, between two items, more than half of what it had at its disposal is worn: another one takes its
  place, and nothing is lost. With half as the bound, a handler that leaks the same amount with each item never fails
  one for what others have left.
"""

from __future__ import annotations

import mmap
import os
import resource

from pipeline.errors import PipelineError

__all__ = ["MemoryLimit"]

_STEP = 1 << 20
"""Bytes by which the limit must be wrong before it is set again."""


class MemoryLimit:
    """The limit of this process. It holds from `hold` on; `lift` is for what must be done after it was reached."""

    def __init__(self, bytes_: int) -> None:
        self._limit = bytes_
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._worn_from = 0
        self._granted = 0
        self._hard = resource.getrlimit(resource.RLIMIT_DATA)[1]

    def hold(self) -> None:
        """The worker is set up: from now on no allocation takes it beyond the limit."""
        own, reserved = self._usage()
        if own >= self._limit:
            raise PipelineError(
                f"a worker process takes {own:,} bytes before its first item, which is more than max_memory={self._limit:,}; "
                "raise max_memory, or load less in the module and in setup"
            )
        self._worn_from = (own + self._limit) // 2
        self._set(self._limit + reserved - own)

    def lift(self) -> None:
        """Allow everything: the error is to be described and sent."""
        if self._granted:
            self._granted = 0
            resource.setrlimit(resource.RLIMIT_DATA, (self._hard, self._hard))

    def worn(self) -> bool:
        """Whether too much is kept. Before or after an item; costs 2 µs, and sets the limit again where that is needed."""
        own, reserved = self._usage()
        granted = self._limit + reserved - own
        if not self._granted or abs(granted - self._granted) > _STEP:
            self._set(granted)
        return own > self._worn_from

    def _set(self, granted: int) -> None:
        self._granted = granted
        if self._hard != resource.RLIM_INFINITY:  # somebody else limits it, too
            granted = min(granted, self._hard)
        resource.setrlimit(resource.RLIMIT_DATA, (granted, self._hard))

    def _usage(self) -> tuple[int, int]:
        """Bytes of its own that the process has written to, and that it has reserved."""
        try:
            _, resident, shared, _, _, data, _ = map(int, os.pread(self._statm, 128, 0).split())
        except (OSError, ValueError):  # a handler has closed all descriptors, or they mean something else now
            return 0, 0
        return (resident - shared) * mmap.PAGESIZE, data * mmap.PAGESIZE
