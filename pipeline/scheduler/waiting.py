"""Waiting for several handles at once.

The rule kept here: whoever waits is woken once, when what it waits for is true, and not for every handle that is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .handles import Handle

__all__ = ["ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION", "Waiter", "check_timeout", "wait_for"]

_CONDITIONS = (FIRST_COMPLETED, FIRST_EXCEPTION, ALL_COMPLETED)

H = TypeVar("H", bound="Handle")


class Waiter:
    """Somebody who waits until `left` handles are done; or, with `on_failure`, until one of them has failed."""

    __slots__ = ("_bell", "_left", "_on_failure", "_rung")

    def __init__(self, left: int, *, on_failure: bool = False) -> None:
        self._left = left
        self._on_failure = on_failure
        self._rung = False
        self._bell = threading.Lock()
        self._bell.acquire()

    def tell(self, *, failed: bool) -> None:
        """One is done. While the scheduler is locked."""
        self._left -= 1
        if not self._rung and (not self._left or (failed and self._on_failure)):
            self._rung = True
            self._bell.release()

    def wait(self, timeout: float | None) -> None:
        """Until it has been told enough, or the time is up."""
        if timeout is None or timeout > threading.TIMEOUT_MAX:
            self._bell.acquire()
        elif timeout > 0:
            self._bell.acquire(timeout=timeout)


def check_timeout(timeout: float | None) -> None:
    if timeout is not None and not timeout >= 0:  # nan is not, either
        raise ValueError(f"timeout is a number of seconds, 0 or more, or None to wait as long as it takes; not {timeout!r}")


def wait_for(
    handles: Iterable[Any], kind: type[H], owns: Callable[[H], bool], owner: str, timeout: float | None, return_when: str
) -> tuple[set[H], set[H]]:
    """Check what was asked for, wait, and split the handles into those that are done and the others.

    Runs out of time without an error. `owns`: whether a handle may be waited for here; `owner` says where that is.
    """
    check_timeout(timeout)
    if return_when not in _CONDITIONS:
        raise ValueError(f"return_when is FIRST_COMPLETED, FIRST_EXCEPTION or ALL_COMPLETED, not {return_when!r}")
    wanted: set[H] = set()
    for handle in handles:
        if not isinstance(handle, kind):
            raise TypeError(f"only a {kind.__name__} can be waited for here, not {handle!r}")
        if not owns(handle):
            raise ValueError(f"{handle!r} belongs to another {owner}, and can be waited for only there")
        wanted.add(handle)
    if not wanted:
        raise ValueError("there is nothing to wait for: no handles were given")
    _wait(wanted, timeout, return_when)
    pending = {handle for handle in wanted if not handle.done()}
    return wanted - pending, pending


def _wait(wanted: set[H], timeout: float | None, return_when: str) -> None:
    turn = next(iter(wanted)).turn
    with turn:
        pending = [handle for handle in wanted if not handle.done()]
        if not pending or (return_when == FIRST_COMPLETED and len(pending) < len(wanted)):
            return
        on_failure = return_when == FIRST_EXCEPTION
        if on_failure and any(handle.failed for handle in wanted):
            return
        if timeout == 0:
            return
        waiter = Waiter(1 if return_when == FIRST_COMPLETED else len(pending), on_failure=on_failure)
        for handle in pending:
            handle.watch(waiter)
    try:
        waiter.wait(timeout)
    finally:
        with turn:
            for handle in pending:
                handle.unwatch(waiter)


