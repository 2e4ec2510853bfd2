"""What a worker process shares with its parent besides the pipes: a few words of memory, and the pipes' own ends.

The rule kept here: the words are written by the worker before and after each item. They survive its death and tell
exactly which item it was at.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any

from multiprocess import reduction

__all__ = ["ChildEnd", "SharedWords", "seal"]

_ADD_SEALS, _SEAL_FUTURE_WRITE = 1033, 0x10
"""Of Linux's `fcntl`; the module has the second one from Python 3.13 on."""


class SharedWords:
    """Three 64-bit numbers that both processes see: the item at work (its id + 1, or 0), its attempt, and its start.

    Backed by anonymous memory where the system has it, else by an unlinked private file. The start is in nanoseconds of
    the monotonic clock, which all processes of a machine share.
    """

    ITEM, ATTEMPT, BEGAN = range(3)
    _SIZE = mmap.PAGESIZE

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, self._SIZE)
        self._descriptor: int | None = descriptor
        self._map = mmap.mmap(descriptor, self._SIZE)
        self.words = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Let the memory and the descriptor go."""
        self.words.release()
        self._map.close()
        self.close_descriptor()

    def close_descriptor(self) -> None:
        """The memory stays, without this. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __reduce__(self) -> tuple[Callable[[Any], SharedWords], tuple[Any]]:
        # Only while a process is being started: the descriptor travels with it.
        return (_attach_words, (reduction.DupFd(self._descriptor),))


def _attach_words(duplicate: Any) -> SharedWords:
    descriptor = duplicate.detach()
    words = SharedWords(descriptor)
    seal(descriptor)
    words.close_descriptor()
    return words


def seal(descriptor: int) -> None:
    """Let what is mapped already be the only way to this memory: `mmap` keeps a descriptor that a handler might write to."""
    with contextlib.suppress(OSError):  # before Linux 5.1 there is no such thing
        fcntl.fcntl(descriptor, _ADD_SEALS, _SEAL_FUTURE_WRITE)


class ChildEnd:
    """A descriptor that travels to the process being started; there it is `number` again."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        os.close(self.number)

    def keep(self) -> None:
        """In the process: let no other one inherit it, and leave the numbers of the standard streams to these."""
        number = fcntl.fcntl(self.number, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(self.number)
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], ChildEnd], tuple[Any]]:
        return (_attach_end, (reduction.DupFd(self.number),))


def _attach_end(duplicate: Any) -> ChildEnd:
    return ChildEnd(duplicate.detach())


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("penstock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
