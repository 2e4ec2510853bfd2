"""What goes over the pipes between the parent and a worker process: frames.

The rule kept here: what is unpickled comes from the library's own children, over descriptors that nobody else has, and
begins as a frame does.
"""

from __future__ import annotations

import pickle
import struct
from enum import IntEnum
from typing import Any

__all__ = ["Frame", "FrameReader", "GarbledError", "frame"]


class Frame(IntEnum):
    """Kinds of frames. Down: to the worker; up: from it."""

    ITEMS = 1
    """Down: (number of the first, [item, ...], whether some are in boxes). For jobs: [(attempt, item), ...]."""
    CREDIT = 2
    """Down: how many outputs of the generator at work have left."""
    CANCEL = 3
    """Down: the reasons to stop."""
    READY = 4
    """Up: `setup` is done."""
    RESULTS = 5
    """Up: (number of the first, [result, ...], whether some are in boxes, seconds or 0.0 when they are not known yet)."""
    OUTPUTS = 6
    """Up: (number, [output, ...]) of a generator that is still at work."""
    RECALL = 7
    """Down: give back what has not begun."""
    RETURNED = 8
    """Up: the items from this number on have not begun, and will not."""
    BROKEN = 9
    """Up: (what, error): `setup`, `teardown`, or the handler could not be loaded."""
    WORN = 10
    """Up: this worker keeps so much memory that another one shall take its place."""


_HEADER = struct.Struct("<IBQ")
_MARK = 0x5EA1F00D
"""Begins every frame, so that what a handler writes to all descriptors that it finds is not taken for one."""


class GarbledError(Exception):
    """What has come is not a frame."""


def frame(kind: Frame, content: Any) -> bytes:
    """One frame, ready to write. `content` is made of packed values and scalars only, so this cannot fail."""
    body = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(_MARK, kind, len(body)) + body


class FrameReader:
    """Puts frames together from the chunks that a pipe gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[tuple[Frame, Any]]:
        """The frames that this chunk completes. Raises when they are none; no more must be fed then."""
        buffer = self._buffer
        buffer += chunk
        frames: list[tuple[Frame, Any]] = []
        start = 0
        while len(buffer) - start >= _HEADER.size:
            mark, kind, length = _HEADER.unpack_from(buffer, start)
            if mark != _MARK:
                raise GarbledError
            end = start + _HEADER.size + length
            if len(buffer) < end:
                break
            with memoryview(buffer)[start + _HEADER.size : end] as body:
                frames.append((Frame(kind), pickle.loads(body)))
            start = end
        if start:
            del buffer[:start]
        return frames
