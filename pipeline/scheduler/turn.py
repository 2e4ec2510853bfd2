"""`Turn`: one at a time in the scheduler, and what is given back by those who must not wait for their turn.

The rule kept here: giving back never blocks. A coroutine may be closed by the garbage collector at any allocation, also
in a thread that has the turn just then; so what is given back is left in a line, and whoever has the turn clears it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from .claim import Claim

__all__ = ["Turn"]


class Turn:
    """A lock to use in `with`. `clear` is called, with the lock held, for each claim that was left."""

    __slots__ = ("_acquire", "_clear", "_left", "_release")

    def __init__(self, clear: Callable[[Claim], None]) -> None:
        lock = threading.Lock()
        self._acquire = lock.acquire
        self._release = lock.release
        self._left: deque[Claim] = deque()
        self._clear = clear

    def leave(self, claim: Claim) -> None:
        """A claim is over. Any thread, any moment."""
        self._left.append(claim)
        self._clear_left()

    def __enter__(self) -> None:
        self._acquire()

    def __exit__(self, *_: Any) -> None:
        self._release()
        if self._left:
            self._clear_left()

    def _clear_left(self) -> None:
        # Who does not get the lock need not wait: its holder looks here after it has let go.
        left = self._left
        while left and self._acquire(False):
            try:
                while left:
                    self._clear(left.popleft())
            finally:
                self._release()
