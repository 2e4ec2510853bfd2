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
    """A lock to use in `with`. `clear` is called, with the lock held, for each claim that was left.

    Where a task passes it is twice as quick to use `lock` itself, and then, if there is something in `left`, `catch_up`.
    """

    __slots__ = ("_acquire", "_clear", "_release", "left", "lock")

    def __init__(self, clear: Callable[[Claim], None]) -> None:
        self.lock = lock = threading.Lock()
        self._acquire = lock.acquire
        self._release = lock.release
        self.left: deque[Claim] = deque()
        self._clear = clear

    def leave(self, claim: Claim) -> None:
        """A claim is over. Any thread, any moment."""
        self.left.append(claim)
        self.catch_up()

    def __enter__(self) -> None:
        self._acquire()

    def __exit__(self, *_: Any) -> None:
        self._release()
        if self.left:
            self.catch_up()

    def catch_up(self) -> None:
        """Clear what is left, if nobody else is about to."""
        # Who does not get the lock need not wait: its holder looks here after it has let go.
        left = self.left
        while left and self._acquire(False):
            try:
                while left:
                    self._clear(left.popleft())
            finally:
                self._release()
