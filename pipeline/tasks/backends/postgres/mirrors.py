"""The events of watched tasks, as they come into the table, for all who watch them in this process.

The rule kept here: what is told to subscribers is what stands in the table, in its order, so it is the same in every
process. A task that ten thousand watch is read once, and one that nobody watches not at all.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from weakref import WeakSet

from ....observe.logs import get_logger
from ...errors import UnknownTaskError
from ...events import TaskEvent, TaskKey
from ...log import HistorySubscription, RunHistory, TaskLog
from ...status import Subscription
from .database import Backoff, is_away, pass_cancellation
from .store import Store, event_of

__all__ = ["Mirrors", "TableSubscription"]

_PAGE = 1_000
"""Events of one task that are read at once."""
_LOOK = 5.0
"""Seconds after which all watched tasks are looked at, whatever was heard."""


class Mirrors:
    """The histories of the tasks that are watched here. `run()` it as a task."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._mirrors: dict[int, _Mirror] = {}
        self._dirty: set[int] = set()
        self._news = asyncio.Event()
        self._reading = asyncio.Lock()
        self._subscriptions = WeakSet[TableSubscription]()

    @property
    def watched(self) -> int:
        """Tasks that somebody follows."""
        return sum(bool(mirror.users) for mirror in self._mirrors.values())

    def subscribe(self, key: TaskKey, last_event_id: int | None, buffer: int) -> TableSubscription:
        return TableSubscription(self, key, last_event_id, buffer)

    def heard(self, payload: str) -> None:
        """Something was added to a task."""
        task = payload.partition(" ")[0]
        if task.isdecimal() and len(task) < 20 and int(task) in self._mirrors:  # anybody may call on this channel
            self._dirty.add(int(task))
            self._news.set()

    def look(self) -> None:
        """Something may have been added to any."""
        for task in [task for task, mirror in self._mirrors.items() if not mirror.users]:
            del self._mirrors[task]  # left without a word, and collected
        self._dirty.update(self._mirrors)
        self._news.set()

    async def run(self) -> None:
        backoff, loop = Backoff(), asyncio.get_running_loop()
        next_look = loop.time() + _LOOK
        while True:
            pass_cancellation()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_look):
                    await self._news.wait()
            looking = loop.time() >= next_look
            if looking:
                self.look()
                next_look = loop.time() + _LOOK
            self._news.clear()
            dirty, self._dirty = self._dirty, set()
            try:
                async with self._reading:
                    await self._read([self._mirrors[task] for task in dirty if task in self._mirrors])
                    if looking:
                        await self._end_forgotten()
                backoff = Backoff()
            except Exception as error:  # all who watch wait for this task, so it goes on whatever it was
                if not is_away(error):
                    get_logger().error("events could not be read; trying again", error=repr(error))
                self._dirty |= dirty
                await backoff.wait()
                self._news.set()

    async def close(self) -> None:
        """End all subscriptions."""
        for subscription in list(self._subscriptions):
            await subscription.aclose()

    async def attach(self, subscription: TableSubscription) -> _Mirror:
        """The history of a task, up to date; it is kept as long as somebody is attached to it."""
        self._subscriptions.add(subscription)
        row = await self._store.find(subscription.key)
        if row is None:
            raise UnknownTaskError(subscription.key)
        async with self._reading:
            mirror = self._mirrors.get(row["id"])
            if mirror is None:
                mirror = self._mirrors[row["id"]] = _Mirror(row["id"], subscription.key, row["run"] - 2)
            mirror.users.add(subscription)
            try:
                await self._store.persist(lambda: self._read([mirror]))
            except BaseException:
                self.detach(subscription, mirror)
                raise
            mirror.enter(row["run"], row["first_seq"])
        return mirror

    def detach(self, subscription: TableSubscription, mirror: _Mirror | None) -> None:
        self._subscriptions.discard(subscription)
        if mirror is not None:
            mirror.users.discard(subscription)
            if not mirror.users and self._mirrors.get(mirror.task) is mirror:
                del self._mirrors[mirror.task]

    async def _end_forgotten(self) -> None:
        """End the subscriptions to tasks that were deleted: nobody will tell how these have ended."""
        there = await self._store.existing(list(self._mirrors))
        for task, mirror in list(self._mirrors.items()):
            if task not in there and (mirror.current is None or mirror.current.terminal is None):
                for subscription in list(mirror.users):
                    await subscription.aclose()

    async def _read(self, mirrors: list[_Mirror]) -> None:
        waiting = {mirror.task: mirror for mirror in mirrors}
        while waiting:
            rows = await self._store.events({task: mirror.seen for task, mirror in waiting.items()}, limit=_PAGE)
            counts = dict.fromkeys(waiting, 0)
            for row in rows:
                mirror = waiting[row["task"]]
                mirror.take(row["run"], event_of(mirror.key, row))
                counts[mirror.task] += 1
            waiting = {task: mirror for task, mirror in waiting.items() if counts[task] == _PAGE}


class _Mirror(TaskLog):
    """The history of one task, as far as it was read."""

    def __init__(self, task: int, key: TaskKey, run: int) -> None:
        super().__init__(key)
        self.task = task
        self.run = run
        self.seen = 0
        self.users = WeakSet[TableSubscription]()

    def take(self, run: int, event: TaskEvent) -> None:
        self.enter(run, event.seq)
        self.seen = event.seq
        if self.current is not None and run == self.run:
            self.current.add(event)

    def enter(self, run: int, first: int) -> None:
        """From here on events are of this run, whose first has this number."""
        if run > self.run:
            self._before, self.current, self.run = self.current, RunHistory(self.key, first), run


class TableSubscription(Subscription):
    """One follower of one task. Nothing is read before it is asked for its first event."""

    def __init__(self, mirrors: Mirrors, key: TaskKey, last_event_id: int | None, buffer: int) -> None:
        self.key = key
        self.dropped = 0
        self._mirrors = mirrors
        self._last = last_event_id
        self._buffer = buffer
        self._mirror: _Mirror | None = None
        self._inner: HistorySubscription | None = None
        self._closed = False

    async def __anext__(self) -> TaskEvent:
        if self._closed:
            raise StopAsyncIteration
        try:
            inner = self._inner or await self._begin()
            event = await anext(inner)
            self.dropped = inner.dropped
            return event
        except (StopAsyncIteration, UnknownTaskError):
            await self.aclose()
            raise

    async def _begin(self) -> HistorySubscription:
        self._mirror = await self._mirrors.attach(self)
        self._inner = HistorySubscription(self._mirror, last_event_id=self._last, buffer=self._buffer)
        if self._closed:  # meanwhile
            await self.aclose()
        return self._inner

    async def aclose(self) -> None:
        """No more events. Idempotent."""
        self._closed = True
        self._mirrors.detach(self, self._mirror)
        if self._inner is not None:
            await self._inner.aclose()
