"""Sources that are known never to wait: read in place, when an item is asked for.

The rule kept here: nothing is taken from the collection that is not passed on, so a run that stops early has pulled
exactly what its ledger says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from operator import length_hint
from typing import Any, cast

from .channel import EMPTY
from .lot import Lot, Meter
from .metrics import Counters
from .protocols import Inlet
from .result import Err
from .runtime import PipelineRuntime

__all__ = ["SEQUENCES", "IteratorFeed", "SequenceFeed"]

SEQUENCES: frozenset[type] = frozenset({list, tuple, range, str, bytes})
"""Exact types that can be read by position, and whose slices know how far they have been read."""
_PART = 64
"""Items looked up at once when they are taken one by one."""
_EXACT_ITERATORS: frozenset[type] = frozenset(type(iter(example)) for example in (range(0), "", "ä", b""))
"""Iterators over what cannot change, nor hold an error: how far they got can be read off their `__length_hint__`."""


class _PromptInlet:
    """A feed that is its own inlet: no task, no queue, and never a wait."""

    stores = False
    reads_ahead = False

    def __init__(self, up: Counters, down: Counters) -> None:
        self._up = up
        self._down = down
        self.ended = False
        self.inlet: Inlet = cast("Inlet", self)

    @property
    def done(self) -> bool:
        return True

    def start(self) -> None:
        pass

    def count_lot(self, lot: Lot) -> None:
        """Count what was taken since the last look."""
        fresh = lot.fresh()
        self._up.emitted += fresh
        self._down.received += fresh

    def _close(self, lot: Lot) -> tuple[int, int]:
        """Count what was taken: how many, and how many the lot's iterator has left."""
        fresh, taken, left = lot.finish()
        self._up.emitted += fresh
        self._down.received += fresh
        return taken, left

    async def wait_items(self) -> bool:
        return not self.ended

    def release(self, reserved: int) -> None:
        pass

    def lend(self, places: int) -> None:
        pass

    def stop(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True

    def settle(self) -> None:
        """What was read ahead was not pulled as far as anyone can tell: the collection is still there."""


class SequenceFeed(_PromptInlet):
    """Reads a sequence by position: the quickest way there is."""

    def __init__(self, origin: Any, up: Counters, down: Counters) -> None:
        super().__init__(up, down)
        self._origin = origin
        self._position = 0
        """Where the next part begins."""
        self._part: Iterator[Any] = iter(())
        """Items that are taken one by one."""
        self._errors = type(origin) in (list, tuple)
        """Whether an `Err` may be among the items."""

    def pop(self) -> Any:
        for item in self._part:
            self._up.emitted += 1
            self._down.received += 1
            return item
        if self.ended:
            return EMPTY
        part = self._next_part(_PART)
        if not part:
            return EMPTY
        self._position += len(part)
        self._part = iter(part)
        return self.pop()

    def lot(self, limit: int) -> Lot | None:
        """Up to `limit` items for a synchronous loop; None at the end."""
        if self.ended:
            return None
        self._position -= length_hint(self._part)
        self._part = iter(())
        part = self._next_part(limit)
        if not part:
            return None
        items = iter(part)
        return Lot(items, cast("Meter", items), len(part), part if self._errors else None, errors=self._errors)

    def _next_part(self, limit: int) -> Any:
        part = self._origin[self._position : self._position + limit]
        if not part:
            self.ended = True
        return part

    def close_lot(self, lot: Lot) -> int:
        """Count what was taken, and say how many; the rest is still the sequence's."""
        taken, _ = self._close(lot)
        self._position += taken
        return taken

    def stop(self) -> None:
        self.ended = True
        self._part = iter(())

    abort = stop


class IteratorFeed(_PromptInlet):
    """Reads an iterator in place."""

    def __init__(self, origin: Any, runtime: PipelineRuntime, up: Counters, down: Counters) -> None:
        super().__init__(up, down)
        self._iterator: Iterator[Any] = iter(origin)
        self._direct = type(self._iterator) in _EXACT_ITERATORS
        self.reads_ahead = not self._direct
        self._ahead: deque[Any] = deque()
        """Items of a lot that were not taken after all; only for iterators that cannot be read in place."""
        self._runtime = runtime

    def pop(self) -> Any:
        if self.ended:
            return EMPTY
        try:
            item = self._ahead.popleft() if self._ahead else next(self._iterator, EMPTY)
        except Exception as error:
            self._failed(error)
            return EMPTY
        if item is EMPTY:
            self.ended = True
            return EMPTY
        self._up.emitted += 1
        self._down.received += 1
        return item

    def lot(self, limit: int) -> Lot | None:
        """Up to `limit` items for a synchronous loop; None at the end."""
        if self.ended:
            return None
        if self._direct:
            return Lot(islice(self._iterator, limit), cast("Meter", self._iterator), limit)
        ahead = self._ahead
        try:
            # No further than what is known to be there: a list may grow while it is read, and asking past its end ends it.
            more = min(limit - len(ahead), length_hint(self._iterator, limit))
            ahead.extend(islice(self._iterator, max(more, 0)))
            if not ahead:
                ahead.append(next(self._iterator))
        except StopIteration:
            pass
        except Exception as error:
            self._failed(error)
        self.ended = not ahead
        iterator = iter(ahead)
        return Lot(iterator, cast("Meter", iterator), len(ahead), ahead, errors=True) if ahead else None

    def close_lot(self, lot: Lot) -> int:
        """Count what was taken, and say how many; the rest is still the iterator's."""
        taken, left = self._close(lot)
        if self._direct:
            if not left:
                self.ended = True
        elif taken == len(self._ahead):
            self._ahead.clear()
        else:
            for _ in range(taken):
                self._ahead.popleft()
        return taken

    def _failed(self, error: Exception) -> None:
        # A collection that changed while it was iterated.
        self.ended = True
        self._runtime.fail(Err.of(error, stage="source"), origin="source", code="source_error")
