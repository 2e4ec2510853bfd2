"""Waiting for several handles at once.

The rule kept here: whoever waits is woken once, when what it waits for is true, and not for every handle that is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .ending import Handle

__all__ = ["ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION", "Waiter", "check_timeout", "wait_for"]

_CONDITIONS = (FIRST_COMPLETED, FIRST_EXCEPTION, ALL_COMPLETED)

H = TypeVar("H", bound="Handle")


class Waiter:
    """Somebody who waits until `left` handles are done; or, with `on_failure`, until one of them has failed."""

    __slots__ = ("_left", "_on_failure", "_rung", "bell")

    def __init__(self, left: int, on_failure: bool = False) -> None:
        self._left = left
        self._on_failure = on_failure
        self._rung = False
        self.bell = threading.Lock()
        self.bell.acquire()

    def told(self, *, failed: bool) -> bool:
        """One is done. True when the bell is to be rung. While the scheduler is locked."""
        self._left -= 1
        if self._rung or (self._left and not (failed and self._on_failure)):
            return False
        self._rung = True
        return True

    def wait(self, timeout: float | None) -> None:
        """Until it has been told enough, or the time is up."""
        if timeout is None or timeout > threading.TIMEOUT_MAX:
            self.bell.acquire()
        elif timeout > 0:
            self.bell.acquire(timeout=timeout)


def check_timeout(timeout: Any) -> float | None:
    """Seconds of any kind of number, as a float; `ValueError` for what is none, or negative, or no number at all."""
    if timeout is None:
        return None
    try:
        if timeout >= 0:  # nan is not, either; and a text cannot be compared
            return float(timeout)
    except OverflowError:
        return inf
    except (TypeError, ValueError):
        pass
    raise ValueError(f"timeout is a number of seconds, 0 or more, or None to wait as long as it takes; not {timeout!r}")


def wait_for(
    handles: Iterable[Any], kind: type[H], owner: Any, where: str, timeout: float | None, return_when: str
) -> tuple[set[H], set[H]]:
    """Check what was asked for, wait, and split the handles into those that are done and the others.

    Runs out of time without an error. Only handles of `owner` can be waited for; `where` says what that is.
    """
    timeout = check_timeout(timeout)
    if return_when not in _CONDITIONS:
        raise ValueError(f"return_when is FIRST_COMPLETED, FIRST_EXCEPTION or ALL_COMPLETED, not {return_when!r}")
    given = list(handles)
    for handle in given:
        if type(handle) is not kind and not isinstance(handle, kind):
            raise TypeError(f"only a {kind.__name__} can be waited for here, not {handle!r}")
        if handle.owner is not owner:
            raise ValueError(f"{handle!r} belongs to another {where}, and can be waited for only there")
    if not given:
        raise ValueError("there is nothing to wait for: no handles were given")
    wanted: set[H] = set(given)
    pending = _wait(wanted, timeout, return_when)
    return (wanted - pending if pending else wanted), pending


def _pending(wanted: set[H]) -> set[H]:
    return {handle for handle in wanted if not handle.done()}


def _enough(wanted: set[H], pending: set[H], return_when: str) -> bool:
    """Whether nobody needs to wait."""
    if not pending or (return_when == FIRST_COMPLETED and len(pending) < len(wanted)):
        return True
    return return_when == FIRST_EXCEPTION and any(handle.failed for handle in wanted)


def _wait(wanted: set[H], timeout: float | None, return_when: str) -> set[H]:
    """Those that are not done then."""
    turn = next(iter(wanted)).turn
    with turn.glance, turn.lock:
        pending = _pending(wanted)
        if timeout == 0 or _enough(wanted, pending, return_when):
            return pending
        waiter = Waiter(1 if return_when == FIRST_COMPLETED else len(pending), return_when == FIRST_EXCEPTION)
        for handle in pending:
            handle.watch(waiter)
    try:
        waiter.wait(timeout)
    finally:
        if timeout is not None or return_when != ALL_COMPLETED:
            with turn.glance, turn.lock:
                for handle in pending:
                    handle.unwatch(waiter)
    return _pending(pending)
