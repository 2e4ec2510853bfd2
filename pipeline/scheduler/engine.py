"""`Engine`: who may begin, given what is free. No threads, no loops, no clock: decisions only.

The rule kept here: what is free and what is held add up to the capacity, exactly, after every call. Admission is strict:
when the head of the queue does not fit, nothing behind it is looked at, so a large claim is never starved by small ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from .amounts import Amount, words
from .claim import Claim, Phase
from .queue import WaitingQueue

__all__ = ["Engine", "Holders", "Shortage", "reason", "shortages"]

Holders: TypeAlias = Mapping[str, tuple[tuple[str, Amount], ...]]
"""By label: names and amounts, the largest first."""
_HOLDERS = 3
"""Holders that a reason names, for each resource."""
_WAITING, _HELD, _OVER = Phase.WAITING, Phase.HELD, Phase.OVER


@dataclass(frozen=True, slots=True)
class Shortage:
    """One resource that the head of the queue waits for, and who has it: names and amounts, the largest first."""

    label: str
    needed: Amount
    free: Amount
    holders: tuple[tuple[str, Amount], ...]

    def __str__(self) -> str:
        text = f"needs {words(self.needed)} {self.label}, {words(self.free)} free"
        if not self.holders:
            return text
        named = ", ".join(f"{name} ({words(amount)})" for name, amount in self.holders[:_HOLDERS])
        more = len(self.holders) - _HOLDERS
        return f"{text}, held by {named}" + (f" and {more} more" if more > 0 else "")


class Engine:
    """The resources, the claims that hold some, and the queue of those that wait.

    `threads` is how many claims that need a thread may hold at once.
    """

    def __init__(self, capacity: Mapping[str, Amount], threads: int, fairness: int | None = None) -> None:
        self.capacity = dict(capacity)
        self.free = dict(capacity)
        self.threads = threads
        self.free_threads = threads
        self.queue = WaitingQueue(fairness)
        self.holding: dict[Claim, None] = {}
        """In the order of admission."""

    def submit(self, claim: Claim) -> bool:
        """A new claim. True when it holds at once; otherwise it waits for an `admit`.

        It lets nobody else begin, for the head waits for something that it does not bring; but with fairness it may make
        another one the head, and an `admit` is needed after every one that holds.
        """
        queue = self.queue
        if not queue.live:
            if self._take(claim):
                return True
            queue.push(claim)
            return False
        queue.push(claim)
        if queue.head() is claim and self._take(claim):
            queue.admitted(claim)
            return True
        return False

    def admit(self) -> list[Claim]:
        """Those whose turn it is and for whom there is enough; they hold from now on."""
        admitted: list[Claim] = []
        queue = self.queue
        while (head := queue.head()) is not None and self._take(head):
            queue.admitted(head)
            admitted.append(head)
        return admitted

    def drop(self, claim: Claim) -> bool:
        """A claim is over, whether it waits or holds: what it held is free again. False when it was over already."""
        if claim.phase is _HELD:
            free = self.free
            for label, amount in claim.needs:
                free[label] += amount
            if claim.threaded:
                self.free_threads += 1
            del self.holding[claim]
            claim.phase = _OVER
            return True
        if claim.phase is _WAITING:
            claim.phase = _OVER
            self.queue.withdrawn(claim)
            return True
        return False

    def hand_over(self, claim: Claim) -> list[Claim]:
        """A `drop` and an `admit` in one, and half as much work where all need the same: nothing is given back and taken."""
        queue = self.queue
        head = queue.head()
        if (
            head is None
            or head.needs != claim.needs
            or head.threaded is not claim.threaded
            or claim.phase is not _HELD
            or queue.fairness is not None
        ):
            self.drop(claim)
            return self.admit()
        del self.holding[claim]
        claim.phase = _OVER
        head.phase = _HELD
        self.holding[head] = None
        queue.admitted(head)
        following = queue.head()
        if following is None or (following.needs == head.needs and following.threaded is head.threaded):
            return [head]  # the head could not begin with what is free now, so nor can one that needs the same
        return [head, *self.admit()]

    def _take(self, claim: Claim) -> bool:
        """Let it have what it needs, if there is enough."""
        threaded, free, needs = claim.threaded, self.free, claim.needs
        if threaded and not self.free_threads:
            return False
        for label, amount in needs:
            if amount > free[label]:
                return False
        for label, amount in needs:
            free[label] -= amount
        if threaded:
            self.free_threads -= 1
        claim.phase = _HELD
        self.holding[claim] = None
        return True

    # --- why

    def why(self, claim: Claim) -> str:
        """Why a claim waits, at this moment. O(claims that hold)."""
        return reason(shortages(claim, self.free, self.holders()), claim, self.queue.head(), self.threads_taken)

    def holders(self) -> Holders:
        """Who has what, by label."""
        found: dict[str, list[tuple[str, Amount]]] = {}
        for claim in self.holding:
            for label, amount in claim.needs:
                found.setdefault(label, []).append((claim.title, amount))
        return {label: tuple(sorted(holders, key=_by_amount)) for label, holders in found.items()}

    @property
    def threads_taken(self) -> int:
        """How many threads there are, when all of them are taken; else 0."""
        return 0 if self.free_threads else self.threads


def shortages(claim: Claim, free: Mapping[str, Amount], holders: Holders) -> tuple[Shortage, ...]:
    """What a waiting claim would lack if it were its turn."""
    return tuple([Shortage(of, need, free[of], holders.get(of, ())) for of, need in claim.needs if need > free[of]])


def reason(lacks: tuple[Shortage, ...], claim: Claim, head: Claim | None, threads_taken: int) -> str:
    """Why a claim waits, in words: what it lacks itself, then who goes before it."""
    reasons = [str(shortage) for shortage in lacks]
    if claim.threaded and threads_taken:
        reasons.append(f"needs a worker thread, all {threads_taken} are taken")
    if head is not None and head is not claim:
        reasons.append(f"behind {head.title}, which goes first")
    return "; ".join(reasons)


def _by_amount(holder: tuple[str, Amount]) -> Amount:
    return -holder[1]
