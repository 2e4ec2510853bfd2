"""What travels between the parent and a worker process: frames, and values in boxes.

The rules kept here:

- A pickling error belongs to one item. Plain scalars travel in the frame's own pickle; anything else is pickled for
  itself, so that one bad item is one failed item and items share nothing with each other.
- Large buffers do not go through the pipe, as long as there is room for them in shared memory.
- What is unpickled comes from the library's own children, over descriptors that nobody else has.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
from enum import IntEnum
from typing import Any

import dill

from pipeline.errors import PipelineError

from ..base import Outcome

__all__ = ["SCALARS", "Frame", "FrameReader", "RefusedError", "RemoteError", "UnreadableError", "box", "box_outcome", "frame", "is_unreadable", "open_box", "open_outcome", "portable", "refusal", "unsendable_result"]


# --- frames


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


_HEADER = struct.Struct("<QB")


def frame(kind: Frame, content: Any) -> bytes:
    """One frame, ready to write. `content` is made of packed values and scalars only, so this cannot fail."""
    body = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body), kind) + body


class FrameReader:
    """Puts frames together from the chunks that a pipe gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[tuple[Frame, Any]]:
        """The frames that this chunk completes."""
        buffer = self._buffer
        buffer += chunk
        frames: list[tuple[Frame, Any]] = []
        start = 0
        while len(buffer) - start >= _HEADER.size:
            length, kind = _HEADER.unpack_from(buffer, start)
            end = start + _HEADER.size + length
            if len(buffer) < end:
                break
            with memoryview(buffer)[start + _HEADER.size : end] as body:
                frames.append((Frame(kind), pickle.loads(body)))
            start = end
        if start:
            del buffer[:start]
        return frames


# --- values

SCALARS: frozenset[type] = frozenset({int, float, str, bool, complex, type(None)})
"""Types that travel as they are, and are never anything but an ordinary output. A tuple is always a box."""


_PICKLE, _OUTCOME, _UNREADABLE, _REFUSED = range(4)
"""What is in a box, its first element: a pickle; an `Outcome` (boxed value, boxed error, the other fields); the reason why
an item could not be unpickled; the reason why it could not be pickled."""


def box(value: Any, *, by_value: bool = False) -> Any:
    """Make a value ready for a frame; raises whatever its pickling raises.

    The C pickler does most things 10 to 30 times faster than dill, which takes what the former refuses: lambdas,
    closures, classes defined in a function. `by_value` goes to dill at once.
    """
    kind = type(value)
    if kind in SCALARS or kind is bytes:
        return value
    if not by_value:
        with contextlib.suppress(Exception):  # whatever the reason, dill has a say before the item fails
            return (_PICKLE, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    return (_PICKLE, dill.dumps(value, recurse=True))


def open_box(boxed: Any) -> Any:
    """The value again; raises whatever its unpickling raises."""
    if type(boxed) is not tuple:
        return boxed
    kind, data = boxed
    if kind == _PICKLE:
        return pickle.loads(data)
    raise RefusedError(data)


class RefusedError(Exception):
    """The item could not be pickled in the parent."""


def refusal(error: Exception) -> Any:
    """Goes to the worker in place of an item that cannot be pickled: opening it fails, and so does the item."""
    return (_REFUSED, f"the item cannot be sent to a worker process: {type(error).__name__}: {error}")


class UnreadableError(Exception):
    """An item's own unpickling code has raised."""


def is_unreadable(boxed: Any) -> bool:
    """Whether this stands for an item that the worker could not read."""
    return type(boxed) is tuple and boxed[0] == _UNREADABLE


def box_outcome(outcome: Outcome) -> Any:
    """An outcome in a box; a value that cannot be pickled makes it a failure."""
    error = outcome.error
    if isinstance(error, UnreadableError):
        return (_UNREADABLE, str(error))
    value = None
    if error is None and not outcome.many:
        try:
            value = box(outcome.value)
        except Exception as caught:  # a result's own pickling code may raise anything
            error = unsendable_result(caught)
    return (
        _OUTCOME,
        value,
        None if error is None else box(portable(error)),
        (outcome.trace, outcome.attempts, outcome.retried, outcome.seconds, outcome.timed_out, outcome.lost, 0.0, outcome.many),
    )


def unsendable_result(error: Exception) -> TypeError:
    """Why a result did not come back."""
    return TypeError(f"the result cannot be sent back from the worker process: {type(error).__name__}: {error}")


def open_outcome(boxed: Any) -> Any:
    """What a worker sent for one item: its value, or its `Outcome` if there is more to say. Never raises."""
    outcome = None
    try:
        if type(boxed) is not tuple or boxed[0] != _OUTCOME:
            return open_box(boxed)
        _, value, error, rest = boxed
        outcome = Outcome(None, None, *rest)
        outcome.value, outcome.error = open_box(value), open_box(error)
    except Exception as caught:  # a result's own unpickling code may raise anything
        outcome = outcome or Outcome()
        outcome.error = TypeError(f"the result cannot be unpickled: {type(caught).__name__}: {caught}")
    return outcome


class RemoteError(PipelineError):
    """Stands for an exception of a worker process that could not be pickled; keeps its type's name and its text."""


def portable(error: BaseException) -> BaseException:
    """The exception itself if it survives the way to the parent, else a `RemoteError` that describes it."""
    with contextlib.suppress(Exception):  # its own pickling code may raise anything
        if type(pickle.loads(pickle.dumps(error, pickle.HIGHEST_PROTOCOL))) is type(error):
            return error
    return RemoteError(f"{type(error).__name__}: {error}")
