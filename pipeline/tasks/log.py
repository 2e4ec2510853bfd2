"""The history of one task in memory, and those who follow it.

The rules kept here:

- A run's events are kept once, however many follow them. A subscription is a position in that history, so ten thousand of
  them are ten thousand positions, and leaving is forgetting one.
- What is left out is the oldest, and progress first. A terminal event is never left out, and nothing follows it.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from typing import Any

from ..cancellation.signals import running_loop
from .errors import TaskOverError, UnknownTaskError
from .events import TERMINAL, EventType, TaskEvent, TaskKey
from .status import Subscription

__all__ = ["HistorySubscription", "RunHistory", "TaskLog", "check_place"]

_EVENTS = 1_000
"""Events other than progress that are kept of one run."""
_PROGRESS = 100
"""Progress events that are kept of one run."""
_BYTES = 16 << 20
"""What the events that are kept of one run may take: their data as JSON, and so much for each event besides:"""
_EVENT = 500


class RunHistory:
    """What is told about one run of a task, from `first` on, in the order of `seq`."""

    def __init__(self, key: TaskKey, first: int) -> None:
        self.key = key
        self.first = first
        self.seq = first - 1
        """That of the newest event."""
        self.began: TaskEvent | None = None
        """The first `started` event."""
        self.terminal: TaskEvent | None = None
        self.newest: dict[EventType, TaskEvent] = {}
        """Of each type; also of those that are no longer kept."""
        self._seqs: list[int] = []  # sorted, and of one length with the next two
        self._events: list[TaskEvent] = []
        self._sizes: list[int] = []
        self.bytes = 0
        """What the events that are kept take, about."""
        self._progress: deque[int] = deque()
        self._others: deque[int] = deque()
        self._waiters: set[asyncio.Future[None]] = set()
        self._loop = running_loop()
        """That of the task, which wakes those who wait."""

    def publish(self, type: EventType, data: Mapping[str, Any]) -> TaskEvent:
        """Add an event, and wake all who wait for it. On the loop; raises `TaskOverError` after the terminal one."""
        if self.terminal is not None:
            raise TaskOverError(self.key)
        event = TaskEvent(self.key, self.seq + 1, type, data)
        self.add(event)
        return event

    def add(self, event: TaskEvent) -> None:
        """The same for an event that has its number already, from a history that is kept elsewhere."""
        self.seq, type = event.seq, event.type
        if type in TERMINAL:
            self.terminal = event
        elif type is EventType.STARTED and self.began is None:
            self.began = event
        self.newest[type] = event
        self._keep(event)
        self._wake()

    def after(self, seq: int, buffer: int) -> TaskEvent | None:
        """The next event after `seq` for somebody for whom `buffer` may wait; None when there is none yet.

        Of what waits beyond that the oldest progress is passed over.
        """
        index = bisect_right(self._seqs, seq)
        skippable = len(self._events) - index - buffer
        while skippable > 0 and self._events[index].type is EventType.PROGRESS:
            index += 1
            skippable -= 1
        return self._events[index] if index < len(self._events) else None

    def waiter(self) -> asyncio.Future[None]:
        """A future that is done at the next event."""
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.is_closed():
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError(f"task {self.key} runs in another event loop: follow it there, or over HTTP")
        waiter = loop.create_future()
        self._waiters.add(waiter)
        return waiter

    def dismiss(self, waiter: asyncio.Future[None]) -> None:
        """Nobody waits for this one any more."""
        self._waiters.discard(waiter)

    @property
    def followers(self) -> int:
        """How many wait for the next event at this moment."""
        return len(self._waiters)

    def place(self, last_event_id: int | None) -> tuple[RunHistory, int]:
        """Where somebody goes on in this run who has seen this event; at its beginning, if that was none of this run's."""
        if last_event_id is None or not self.first <= last_event_id <= self.seq:
            return self, self.first - 1
        return self, last_event_id

    def _keep(self, event: TaskEvent) -> None:
        size = len(json.dumps(event.data, ensure_ascii=False)) + _EVENT
        self.bytes += size
        self._seqs.append(event.seq)
        self._events.append(event)
        self._sizes.append(size)
        kept, most = (self._progress, _PROGRESS) if event.type is EventType.PROGRESS else (self._others, _EVENTS)
        kept.append(event.seq)
        if len(kept) > most:
            self._forget(kept)
        while self.bytes > _BYTES:
            self._forget(self._progress or self._others)

    def _forget(self, kept: deque[int]) -> None:
        index = bisect_right(self._seqs, kept.popleft()) - 1
        self.bytes -= self._sizes[index]
        del self._seqs[index], self._events[index], self._sizes[index]

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class TaskLog:
    """The histories of a task: that of its current or last run, and that of the one before."""

    def __init__(self, key: TaskKey) -> None:
        self.key = key
        self.current: RunHistory | None = None
        self._before: RunHistory | None = None

    @property
    def seq(self) -> int:
        return 0 if self.current is None else self.current.seq

    @property
    def bytes(self) -> int:
        """What the events that are kept take, about."""
        return sum(history.bytes for history in (self.current, self._before) if history is not None)

    def begin(self) -> RunHistory:
        """A history for the next run, which goes on counting."""
        self._before, self.current = self.current, RunHistory(self.key, self.seq + 1)
        return self.current

    def place(self, last_event_id: int | None) -> tuple[RunHistory | None, int]:
        """Where somebody goes on who has seen this event: in which run, and after which number.

        Somebody who knows of events that never were has followed a task of the same name in an earlier life.
        """
        current, before = self.current, self._before
        if current is None:
            return None, 0
        if last_event_id is None or last_event_id > current.seq:
            return current, current.first - 1
        if before is not None and last_event_id < before.seq and last_event_id >= before.first - 1:
            return before, last_event_id
        return current, last_event_id


class HistorySubscription(Subscription):
    """One follower of one run: a position in its history."""

    def __init__(self, log: TaskLog | RunHistory, *, last_event_id: int | None, buffer: int) -> None:
        check_place(last_event_id, buffer)
        self.dropped = 0
        self._key = log.key
        self._history, self._seen = log.place(last_event_id)
        self._buffer = buffer
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    async def __anext__(self) -> TaskEvent:
        history = self._history
        if history is None:
            raise UnknownTaskError(self._key)
        while not self._closed:
            event = history.after(self._seen, self._buffer)
            if event is not None:
                return self._take(event)
            if history.terminal is not None:
                break
            await self._wait(history)
        raise StopAsyncIteration

    def _take(self, event: TaskEvent) -> TaskEvent:
        missed = event.seq - self._seen - 1
        self._seen = event.seq
        self.dropped += missed
        return event.after(missed)

    async def _wait(self, history: RunHistory) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks wait in one subscription: give each its own")
        self._waiter = waiter = history.waiter()
        try:
            await waiter
        finally:
            self._waiter = None
            history.dismiss(waiter)

    async def aclose(self) -> None:
        """No more events; whoever waits for one is told that there is none. Idempotent."""
        self._closed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def check_place(last_event_id: int | None, buffer: int) -> None:
    """Raises ValueError for what is no place in a history, or no size of a buffer."""
    for name, value, least in (("last_event_id", 0 if last_event_id is None else last_event_id, 0), ("buffer", buffer, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is a whole number, {least} or more, not {value!r}")
