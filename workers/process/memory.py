"""Memory for the large buffers that come from the workers: what is not used any more is used for the next ones.

The rule kept here: whoever has a buffer owns it; it is used again only when nothing refers to it. Fresh memory costs a
fault for every page, several times as much as the copy into it.
"""

from __future__ import annotations

import pickle
import weakref
from collections import deque
from functools import partial
from typing import Any

from .arena import array_type

__all__ = ["Memory"]

_LIMIT = 1 << 26
"""Bytes kept of each size."""
_SIZES = 8
"""Sizes kept."""


class Memory:
    """Makes copies of buffers. `_unused` may run in any thread, whenever something is deleted."""

    def __init__(self) -> None:
        self._free: dict[int, deque[bytearray]] = {}
        self._owners: dict[int, weakref.ref[Any]] = {}
        self._closed = False

    def copy(self, data: memoryview) -> memoryview:
        """The same bytes, to read and to write."""
        size = data.nbytes
        try:
            memory, fresh = self._free[size].pop(), False
        except (KeyError, IndexError):
            memory, fresh = bytearray(data), True
        owner = array_type(size).from_buffer(memory)
        self._owners[id(memory)] = weakref.ref(owner, partial(self._unused, memory))
        copy = pickle.PickleBuffer(owner).raw()
        if not fresh:
            copy[:] = data
        return copy

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        self._free.clear()
        self._owners.clear()

    def _unused(self, memory: bytearray, _: object) -> None:
        self._owners.pop(id(memory), None)
        size = len(memory)
        free = self._free.get(size)
        if free is None:
            if len(self._free) >= _SIZES:
                self._free.clear()
            free = self._free[size] = deque(maxlen=max(_LIMIT // size, 1))
        if not self._closed:
            free.append(memory)
