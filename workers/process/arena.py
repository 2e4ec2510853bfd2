"""Shared memory for the large buffers that go one way between the parent and one worker process.

The rules kept here:

- One side lends blocks, the other gives them back; each writes only what is its own. A block is given back by setting a
  byte of the shared memory, so that it needs no message, works from any thread, and may happen in any order.
- It is a help, never a must: when there is no room (or no shared memory at all) the buffer goes through the pipe.
- It has no name: when both processes have ended, however they did, nothing is left.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import pickle
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from multiprocess import reduction

from .shared import seal

__all__ = ["LARGE", "Arena", "Block", "array_type"]

LARGE = 1 << 15
"""Bytes from which on a buffer is worth a block."""

Block = tuple[int, int, int]
"""Number of the block's byte, offset, length."""

_SIZE = 1 << 28
"""Bytes of address space. Memory is only taken where something has been written."""
_BLOCKS = mmap.PAGESIZE
"""Blocks lent at once, at most; so many bytes at the beginning say which of them have been given back."""


class Arena:
    """One direction's memory. Make it before the process is started; it travels there with the process's arguments."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("penstock-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, _BLOCKS + _SIZE)
        size = os.fstat(descriptor).st_size
        try:
            self._map = mmap.mmap(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor: int | None = descriptor
        self._bytes = memoryview(self._map)
        self._free: list[tuple[int, int]] = [(_BLOCKS, size - _BLOCKS)]
        """Offset and length of what is not lent, by offset. The lowest place is taken first: its pages are warm."""
        self._spare = list(range(_BLOCKS - 1, -1, -1))
        self._lent: dict[int, tuple[int, int]] = {}
        self._views: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def make(cls) -> Arena | None:
        """A new one; None where the system has no such memory, or no room for it."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            return cls()
        except (OSError, ValueError):  # the address space, or the number of descriptors, is limited
            return None

    def close_descriptor(self) -> None:
        """The process has been started: the memory stays, without this."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def close(self) -> None:
        """Let the memory go. In the parent, which has no views of it."""
        self.close_descriptor()
        self._bytes.release()
        self._map.close()

    def __reduce__(self) -> tuple[Callable[[Any], Arena | None], tuple[Any]]:
        # Only while a process is being started: the descriptor travels with it.
        return (_attach, (reduction.DupFd(self._descriptor),))

    # --- the lending side

    def lend(self, data: memoryview) -> Block | None:
        """Copy the bytes into a block; None when there is no room."""
        size = -(-data.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._take_back_first()
        offset = self._find(size)
        if offset is None:
            self._take_back_all()
            offset = self._find(size)
        if offset is None:
            return None
        number = self._spare.pop()
        self._lent[number] = (offset, size)
        self._bytes[number] = 0
        self._bytes[offset : offset + data.nbytes] = data
        return number, offset, data.nbytes

    def place(self, blocks: list[Block], buffer: pickle.PickleBuffer) -> bool:
        """For the pickler: True when the buffer has to go with the pickle."""
        try:
            data = buffer.raw()
        except BufferError:  # not contiguous
            return True
        with data:
            block = self.lend(data) if data.nbytes >= LARGE else None
        if block is None:
            return True
        blocks.append(block)
        return False

    def _find(self, size: int) -> int | None:
        if not self._spare:
            return None
        for index, (offset, length) in enumerate(self._free):
            if length >= size:
                if length == size:
                    del self._free[index]
                else:
                    self._free[index] = (offset + size, length - size)
                return offset
        return None

    def _take_back_first(self) -> None:
        """The oldest ones are the first to come back: a look at each costs nothing where there is nothing."""
        while self._lent:
            number = next(iter(self._lent))
            if not self._bytes[number]:
                return
            self._take_back(number)

    def _take_back_all(self) -> None:
        for number in [number for number in self._lent if self._bytes[number]]:
            self._take_back(number)

    def _take_back(self, number: int) -> None:
        offset, size = self._lent.pop(number)
        self._spare.append(number)
        free = self._free
        index = bisect.bisect(free, (offset, size))
        if index < len(free) and free[index][0] == offset + size:
            size += free.pop(index)[1]
        if index and sum(free[index - 1]) == offset:
            offset, size = free[index - 1][0], free[index - 1][1] + size
            index -= 1
            del free[index]
        free.insert(index, (offset, size))

    # --- the other side; `give_back` is for both

    def give_back(self, block: Block) -> None:
        """Nobody needs the block any more."""
        self._bytes[block[0]] = 1

    def read(self, block: Block) -> memoryview:
        """The block's bytes, to be copied at once."""
        _, offset, length = block
        return self._bytes[offset : offset + length]

    def view(self, block: Block) -> memoryview:
        """The block itself, to read and to write. It is given back when nothing refers to it any more."""
        number, offset, length = block
        # Whatever is made of a memoryview refers to what is behind it, not to the view: so something is put there.
        owner = array_type(length).from_buffer(self._map, offset)
        self._views[number] = weakref.ref(owner, partial(self._unused, block))
        return pickle.PickleBuffer(owner).raw()

    def _unused(self, block: Block, _: object) -> None:
        self._views.pop(block[0], None)
        self.give_back(block)


@lru_cache(64)
def array_type(length: int) -> Any:
    """So many bytes as a type whose instances can be made of any memory, and referred to weakly."""
    return ctypes.c_ubyte * length


def _attach(duplicate: Any) -> Arena | None:
    descriptor = duplicate.detach()
    try:
        arena = Arena(descriptor)
    except (OSError, ValueError):  # the worker does without; it says so when it is ready
        return None
    seal(descriptor)
    arena.close_descriptor()
    return arena
