"""Values that travel between the parent and a worker process, in boxes.

The rules kept here:

- A pickling error belongs to one item. Plain scalars travel in the frame's own pickle; anything else is pickled for
  itself, so that one bad item is one failed item and items share nothing with each other.
- Large buffers do not go through the pipe, as long as there is room for them in shared memory.
"""

from __future__ import annotations

import contextlib
import pickle
from functools import partial
from typing import Any

import dill

from pipeline.errors import PipelineError
from pipeline.result import Err

from ..base import Outcome
from .arena import LARGE, Arena, Block
from .memory import Memory

__all__ = ["SCALARS", "Packer", "RefusedError", "RemoteError", "UnreadableError", "is_unreadable", "portable", "unreadable"]

SCALARS: frozenset[type] = frozenset({int, float, str, bool, complex, type(None)})
"""Types that travel as they are, and are never anything but an ordinary output. A tuple is always a box."""

_PICKLE, _SHARED, _BYTES, _OUTCOME, _UNREADABLE, _REFUSED = range(6)
"""What is in a box, its first element: a pickle; a pickle and the blocks with its buffers; the block with the bytes; an
`Outcome` (boxed value, boxed error, the other fields); the reason why an item could not be unpickled; the reason why it
could not be pickled."""


class Packer:
    """Boxes values for the other side, and opens the boxes that come from there. Each side has one for each worker."""

    def __init__(self, out: Arena | None, back: Arena | None, memory: Memory | None = None) -> None:
        self.out = out
        """Where large buffers are put for the other side; None when everything goes through the pipe."""
        self._back = back
        self._memory = memory
        """Where large buffers are copied to. Without it, they stay in their blocks until nothing refers to them."""
        self.moved = 0
        """Bytes that went to and came from the other side in blocks."""

    def box(self, value: Any, *, by_value: bool = False) -> Any:
        """Make a value ready for a frame; raises whatever its pickling raises.

        The C pickler does most things 10 to 30 times faster than dill, which takes what the former refuses: lambdas,
        closures, classes defined in a function. `by_value` goes to dill at once.
        """
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is bytes:
            block = self.out.lend(memoryview(value)) if self.out is not None and len(value) >= LARGE else None
            if block is None:
                return value
            self.moved += len(value)
            return (_BYTES, block)
        if not by_value:
            with contextlib.suppress(Exception):  # whatever the reason, dill has a say before the item fails
                return self._pickled(value)
        return (_PICKLE, dill.dumps(value, recurse=True))

    def box_item(self, item: Any, *, by_value: bool) -> Any:
        """An item in a box. What cannot be pickled goes as a refusal: opening that fails, and so does the item."""
        try:
            return self.box(item, by_value=by_value)
        except Exception as error:  # an item's own pickling code may raise anything
            return (_REFUSED, f"the item cannot be sent to a worker process: {type(error).__name__}: {error}")

    def _pickled(self, value: Any) -> Any:
        out = self.out
        if out is None:
            return (_PICKLE, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        blocks: list[Block] = []
        try:
            data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL, buffer_callback=partial(out.place, blocks))
        except BaseException:
            for block in blocks:
                out.give_back(block)
            raise
        if not blocks:
            return (_PICKLE, data)
        self.moved += sum(length for _, _, length in blocks)
        return (_SHARED, data, blocks)

    def open(self, boxed: Any) -> Any:
        """The value again; raises whatever its unpickling raises."""
        if type(boxed) is not tuple:
            return boxed
        kind = boxed[0]
        if kind == _PICKLE:
            return pickle.loads(boxed[1])
        if kind == _REFUSED:
            raise RefusedError(boxed[1])
        if kind == _BYTES:
            return bytes(self._buffer(boxed[1]))
        value = pickle.loads(boxed[1], buffers=list(map(self._buffer, boxed[2])))
        if type(value) is memoryview:  # what was sent was a bare buffer; small ones arrive like this
            return bytes(value) if value.readonly else bytearray(value)
        return value

    def _buffer(self, block: Block) -> memoryview:
        back = self._back
        assert back is not None
        self.moved += block[2]
        if self._memory is None:
            return back.view(block)
        with back.read(block) as data:
            copy = self._memory.copy(data)
        back.give_back(block)
        return copy

    def drop(self, boxed: Any) -> None:
        """Nobody will open this box."""
        if type(boxed) is tuple and self._back is not None:
            for block in boxed[2] if boxed[0] == _SHARED else boxed[1:] if boxed[0] == _BYTES else ():
                self._back.give_back(block)

    # --- outcomes

    def box_outcome(self, outcome: Outcome) -> Any:
        """An outcome in a box; a value that cannot be pickled makes it a failure."""
        value, error = None, outcome.error
        if isinstance(error, UnreadableError):
            return (_UNREADABLE, str(error))
        if error is None and not outcome.many:
            try:
                value = self.box(outcome.value)
            except Exception as caught:  # a result's own pickling code may raise anything
                error = TypeError(f"the result cannot be sent back from the worker process: {type(caught).__name__}: {caught}")
        rest = (outcome.trace, outcome.attempts, outcome.retried, outcome.seconds, outcome.timed_out, outcome.lost, 0.0, outcome.many)
        return (_OUTCOME, value, None if error is None else self.box(portable(error)), rest)

    def open_outcome(self, boxed: Any) -> Any:
        """What a worker sent for one item: its value, or its `Outcome` if there is more to say. Never raises."""
        outcome = None
        try:
            if type(boxed) is not tuple or boxed[0] != _OUTCOME:
                return self.open(boxed)
            _, value, error, rest = boxed
            outcome = Outcome(None, None, *rest)
            outcome.value, outcome.error = self.open(value), self.open(error)
        except Exception as caught:  # a result's own unpickling code may raise anything
            outcome = outcome or Outcome()
            outcome.error = unreadable("result", caught)
        return outcome

    def open_output(self, boxed: Any) -> Any:
        """An output of a generator, or an `Err`. Never raises."""
        try:
            return self.open(boxed)
        except Exception as caught:  # likewise
            return Err(unreadable("output", caught))

    def open_error(self, boxed: Any) -> BaseException:
        """An exception. Never raises."""
        try:
            return self.open(boxed)
        except Exception as caught:  # the worker has tried it; still, modules may differ
            return unreadable("exception", caught)


class RefusedError(Exception):
    """The item could not be pickled in the parent."""


class UnreadableError(Exception):
    """The item could not be unpickled in the worker."""


def is_unreadable(boxed: Any) -> bool:
    """Whether this stands for an item that the worker could not read; its second element says why."""
    return type(boxed) is tuple and boxed[0] == _UNREADABLE


def unreadable(what: str, error: object) -> TypeError:
    """Why something that has come cannot be used."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return TypeError(f"the {what} cannot be unpickled: {text}")


class RemoteError(PipelineError):
    """Stands for an exception of a worker process that could not be pickled; keeps its type's name and its text."""


def portable(error: BaseException) -> BaseException:
    """The exception itself if it survives the way to the parent, else a `RemoteError` that describes it."""
    with contextlib.suppress(Exception):  # its own pickling code may raise anything
        if type(pickle.loads(pickle.dumps(error, pickle.HIGHEST_PROTOCOL))) is type(error):
            return error
    return RemoteError(f"{type(error).__name__}: {error}")
