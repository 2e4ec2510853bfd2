"""`WaitingQueue`: the claims that wait, best first.

The rule kept here: there is one head, and nobody passes it. Adding, taking and removing cost O(log n); what was removed
stays in the heap as a dead entry until it comes up, or until the dead are the majority.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from .claim import Claim, Group, Phase

__all__ = ["WaitingQueue"]

_FEW = 64
"""Dead entries that are not worth a sweep."""

_Entry = tuple[int, int, int, int, Claim]
"""A key with its claim, flat, which compares quickest; keys differ, so claims are never compared."""


class WaitingQueue:
    """By key. With `fairness`, a group that waits is passed over by so many admissions of others and then goes first.

    Groups come first in the order in which they were last served, so of `g` waiting groups each is served at least once
    in `fairness + g` admissions. It costs a second heap, for the best claim of each group.
    """

    def __init__(self, fairness: int | None = None) -> None:
        self.fairness = fairness
        self._heap: list[_Entry] = []
        self.live = 0
        """How many wait."""
        self._dead = 0
        self._admissions = 0
        """Of claims that have waited here: while nobody waits, nobody is passed over."""
        self._groups: OrderedDict[Group, None] = OrderedDict()
        """With fairness: those with waiting claims, the one that was served longest ago first."""

    def __iter__(self) -> Iterator[Claim]:
        """All that wait, in no order."""
        return (entry[4] for entry in self._heap if entry[4].phase is _WAITING)

    def push(self, claim: Claim) -> None:
        entry = (*claim.key, claim)
        heapq.heappush(self._heap, entry)
        self.live += 1
        if self.fairness is not None:
            group = claim.group
            heapq.heappush(group.heap, entry)
            group.waiting += 1
            if group.waiting == 1:
                group.since = self._admissions
                self._groups[group] = None

    def head(self) -> Claim | None:
        """The claim that is next, whether it can be admitted or not."""
        if not self.live:
            return None
        if self.fairness is not None:
            longest = next(iter(self._groups))
            if self._admissions - longest.since >= self.fairness:
                return _first_living(longest.heap)[4]
        heap = self._heap
        while (claim := heap[0][4]).phase is not _WAITING:
            heapq.heappop(heap)
            self._dead -= 1
        return claim

    def admitted(self, claim: Claim) -> None:
        """The head has left the queue, and is no longer `WAITING`."""
        self._admissions += 1
        if self._heap[0][4] is claim:
            heapq.heappop(self._heap)
            self.live -= 1
        else:
            self._buried()
        if self.fairness is not None:
            self._leave(claim.group)
            if claim.group.waiting:
                claim.group.since = self._admissions
                self._groups.move_to_end(claim.group)

    def withdrawn(self, claim: Claim) -> None:
        """A claim that waited does not any more, and was not admitted."""
        self._buried()
        if self.fairness is not None:
            self._leave(claim.group)

    def _leave(self, group: Group) -> None:
        group.waiting -= 1
        if not group.waiting:
            group.heap.clear()
            del self._groups[group]
        elif len(group.heap) > _FEW + 2 * group.waiting:
            group.heap = _living(group.heap)

    def _buried(self) -> None:
        self.live -= 1
        self._dead += 1
        if self._dead > _FEW and self._dead > self.live:
            self._heap = _living(self._heap)
            self._dead = 0


_WAITING = Phase.WAITING


def _living(heap: list[_Entry]) -> list[_Entry]:
    rest = [entry for entry in heap if entry[4].phase is _WAITING]
    heapq.heapify(rest)
    return rest


def _first_living(heap: list[_Entry]) -> _Entry:
    while heap[0][4].phase is not _WAITING:
        heapq.heappop(heap)
    return heap[0]
