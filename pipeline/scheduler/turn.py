"""`Turn`: one at a time in the scheduler, and what is left for whoever has the turn by those who must not wait for it.

The rule kept here: leaving something never blocks. A coroutine may be closed by the garbage collector at any allocation, also
in a thread that has the turn just then. And tasks are quick: a thread that waits for a lock gets it while it has no GIL, the
next one runs into it, and from then on every task costs a switch of threads. So tasks are left, too, when the lock is taken.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from .shield import lower_shield, raise_shield

__all__ = ["Turn"]


class Turn:
    """`with turn, turn.lock:` is a turn; the lock goes first, then what was left meanwhile is done.

    In the main thread a Ctrl-C waits until the turn is over. Who only looks, or adds what can stay behind without harm,
    is quicker with `with turn.glance, turn.lock:`, which does not keep it back.
    """

    __slots__ = ("after", "glance", "left", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.left: deque[Callable[[], object]] = deque()
        """What is to be done with the lock held. Whoever takes it for something that depends on order clears this first."""
        self.after: deque[Callable[[], object]] = deque()
        """What is to be done when it is free again, in any thread."""
        self.glance = _Glance(self)

    def __enter__(self) -> None:
        raise_shield()

    def __exit__(self, *_: object) -> None:
        self.catch_up()
        lower_shield()

    def leave(self, work: Callable[[], object]) -> None:
        """To be done in a turn, this one or another's; it raises nothing. Any thread, any moment."""
        with self:
            self.left.append(work)

    def catch_up(self) -> None:
        """After a turn: do what was left, if nobody else is about to; then what comes after it."""
        if not self.left and not self.after:
            return
        raise_shield()  # it is others' work, and gone if it is lost
        # Who finds the lock taken need not wait: its holder looks here after it has let go. It may be this very thread.
        while self.left and not self.lock.locked():
            with self.lock:
                self.clear()
        after = self.after
        while after:
            try:
                work = after.popleft()
            except IndexError:  # another thread was quicker
                break
            work()
        lower_shield()

    # --- in a turn

    def clear(self) -> None:
        """Do what was left, in the order in which it was."""
        left = self.left
        if left:
            raise_shield()
            while left:
                left.popleft()()
            lower_shield()

    def ring(self, bell: threading.Lock) -> None:
        """Wake somebody, after the turn: who is woken earlier would only run into the lock."""
        self.after.append(bell.release)

    def drop(self, value: object) -> None:
        """Let go of something after the turn, for whatever goes with it may do anything."""
        self.after.append(partial(id, value))


class _Glance:
    """A turn without the shield."""

    __slots__ = ("_turn",)

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._turn.catch_up()
