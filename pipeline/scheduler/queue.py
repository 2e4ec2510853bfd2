"""`WaitingQueue`: the claims that wait, best first.

The rule kept here: there is one head, and nobody passes it. Taking costs O(1), adding and removing O(log n) at most; what was
removed stays where it is, dead, until it comes up, or until the dead are the majority.
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
_Rank = tuple[int, int, int]
"""A key without its number. Claims of one rank come in the order of their numbers, so they need no sorting."""


class _Line:
    """The claims of one rank. Each knows the one behind it, and there is always one."""

    __slots__ = ("first", "last")

    def __init__(self, claim: Claim) -> None:
        self.first = self.last = claim


class WaitingQueue:
    """By key. With `fairness`, a group that waits is passed over by so many admissions of others and then goes first.

    Groups come first in the order in which they were last served, so of `g` waiting groups each is served at least once
    in `fairness + g` admissions. It costs a heap for each group, with its own claims.
    """

    def __init__(self, fairness: int | None = None) -> None:
        self.fairness = fairness
        self._lines: dict[_Rank, _Line] = {}
        self._ranks: list[_Rank] = []
        """A heap."""
        self.live = 0
        """How many wait."""
        self._dead = 0
        self._admissions = 0
        """Of claims that have waited here: while nobody waits, nobody is passed over."""
        self._groups: OrderedDict[Group, None] = OrderedDict()
        """With fairness: those with waiting claims, the one that was served longest ago first."""

    def __iter__(self) -> Iterator[Claim]:
        """All that wait, in no order."""
        for line in self._lines.values():
            claim: Claim | None = line.first
            while claim is not None:
                if claim.phase is _WAITING:
                    yield claim
                claim = claim.behind

    def first(self, most: int) -> list[Claim]:
        """The next ones, in order, without regard to fairness. O(most), whatever else waits; but all ranks are copied."""
        found: list[Claim] = []
        ranks = self._ranks.copy()
        while ranks and len(found) < most:
            claim: Claim | None = self._lines[heapq.heappop(ranks)].first
            while claim is not None and len(found) < most:
                if claim.phase is _WAITING:
                    found.append(claim)
                claim = claim.behind
        return found

    def push(self, claim: Claim) -> None:
        self._enqueue(claim)
        self.live += 1
        if self.fairness is not None:
            group = claim.group
            heapq.heappush(group.heap, (*claim.key, claim))
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
        while True:
            claim = self._lines[self._ranks[0]].first
            if claim.phase is _WAITING:
                return claim
            self._dead -= 1
            self._advance(claim)

    def admitted(self, claim: Claim) -> None:
        """The head has left the queue, and is no longer `WAITING`."""
        self._admissions += 1
        if self._lines[self._ranks[0]].first is claim:
            self._advance(claim)
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

    def _enqueue(self, claim: Claim) -> None:
        rank = claim.key[:3]
        line = self._lines.get(rank)
        if line is None:
            self._lines[rank] = _Line(claim)
            heapq.heappush(self._ranks, rank)
        else:
            line.last.behind = line.last = claim

    def _advance(self, claim: Claim) -> None:
        """The first claim of the best rank goes."""
        behind = claim.behind
        if behind is None:
            del self._lines[heapq.heappop(self._ranks)]
        else:
            self._lines[self._ranks[0]].first = behind
            claim.behind = None  # whoever keeps it does not keep the others

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
            self._sweep()

    def _sweep(self) -> None:
        """Take out the dead."""
        lines = list(self._lines.values())
        self._lines.clear()
        self._ranks.clear()
        self._dead = 0
        for line in lines:
            claim: Claim | None = line.first
            while claim is not None:
                behind, claim.behind = claim.behind, None
                if claim.phase is _WAITING:
                    self._enqueue(claim)
                claim = behind


_WAITING = Phase.WAITING


def _living(heap: list[_Entry]) -> list[_Entry]:
    rest = [entry for entry in heap if entry[4].phase is _WAITING]
    heapq.heapify(rest)
    return rest


def _first_living(heap: list[_Entry]) -> _Entry:
    while heap[0][4].phase is not _WAITING:
        heapq.heappop(heap)
    return heap[0]
