"""The end of a fence or of a pipeline's run as a reason to stop something else.

The rule kept here: whoever ends does not wait for those who listen. They are told on the thread where the end happens,
and a trigger hands over to its own loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, runtime_checkable

from .reason import CancelReason, check_code
from .triggers import Trigger, TriggerHandle

__all__ = ["EndTrigger", "Ending", "HasEnding"]


class Ending:
    """Lets others know when something has ended, which may begin again and end again."""

    def __init__(self) -> None:
        self.reason: CancelReason | None = None
        """What its end gives as a reason; None while it has not ended, or is under way again."""
        self._watchers: dict[object, Callable[[CancelReason], object]] = {}

    def begin(self) -> None:
        """It is under way again."""
        self.reason = None

    def tell(self, reason: CancelReason) -> None:
        """It has ended. From any thread."""
        self.reason = reason
        for watcher in tuple(self._watchers.values()):
            watcher(reason)

    def watch(self, watcher: Callable[[CancelReason], object]) -> Callable[[], object]:
        """Call `watcher` at every end from now on, on the thread where it happens; the function returned ends that."""
        key = object()
        self._watchers[key] = watcher
        return partial(self._watchers.pop, key, None)


@runtime_checkable
class HasEnding(Protocol):
    """What `EndTrigger` can watch: a `Fence` or a `Pipeline`."""

    @property
    def ending(self) -> Ending: ...


@dataclass(frozen=True, eq=False)
class EndTrigger(Trigger):
    """Fires when another fence is left, or another pipeline's run is closed, however that came about.

    One that has ended by the time of arming has fired already; one that has not begun is waited for. A pipeline that
    runs again counts as not ended from its start on. The reason's `causes` are those of what has ended.
    Raises TypeError for anything but a `Fence` or a `Pipeline`.
    """

    watched: HasEnding
    code: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.watched, type) or not isinstance(self.watched, HasEnding):
            raise TypeError(f"EndTrigger watches a Fence or a Pipeline, got {self.watched!r}")
        check_code(self.code, f"the trigger {type(self).__name__}")

    def check(self) -> CancelReason | None:
        reason = self.watched.ending.reason
        return None if reason is None else self._coded(reason)

    def arm(self, callback: Callable[[CancelReason], None], /) -> TriggerHandle:
        return TriggerHandle(_Watch(self.watched.ending, callback, self._coded).stop)

    def _coded(self, reason: CancelReason) -> CancelReason:
        return reason if self.code is None else replace(reason, code=self.code)


class _Watch:
    """One armed trigger: hears on any thread, and calls back on its own loop, once."""

    def __init__(
        self,
        ending: Ending,
        callback: Callable[[CancelReason], None],
        coded: Callable[[CancelReason], CancelReason],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback: Callable[[CancelReason], None] | None = callback
        self._coded = coded
        self._unwatch = ending.watch(self._heard)
        if ending.reason is not None:  # between `check` and now, in another thread
            self._heard(ending.reason)

    def stop(self) -> None:
        self._callback = None
        self._unwatch()

    def _heard(self, reason: CancelReason) -> None:
        try:
            self._loop.call_soon_threadsafe(self._fire, reason)
        except RuntimeError:  # the loop was closed while armed: there is nobody to tell
            if not self._loop.is_closed():
                raise

    def _fire(self, reason: CancelReason) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback(self._coded(reason))
