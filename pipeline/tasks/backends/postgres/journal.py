"""What one attempt tells, on its way into the table.

The rules kept here:

- Events are written in the order in which they were sent, many at once. Work that tells more than the database takes
  waits, and so does work whose database is away: nothing is lost but old progress.
- `save` has saved when it returns, and with it all that was told before.
- Once another attempt has begun, or the database refuses what is written, nothing is written any more, and the owner is
  told.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from ....cancellation.reason import CancelReason, CancelType
from ...errors import TaskOverError
from ...events import EventType
from .store import Claim, Store, Written, as_json

__all__ = ["Journal", "superseded"]

_DELAY = 0.02
"""Seconds that an event waits for others."""
_EVENTS = 1_000
"""Events that wait for the database, at most."""
_BYTES = 8 << 20
"""What these take, at most, unless one alone takes more."""
_PROGRESS = 100
"""Progress events that are kept while a task runs; others: `_EVENTS`."""


class Journal:
    """Between `open` and `end`. `lost` is called, with a reason to stop, when nothing can be written any more."""

    def __init__(self, store: Store, claim: Claim, lost: Callable[[CancelReason], None]) -> None:
        self._store = store
        self._claim = claim
        self._lost = lost
        self._seq = claim.seq
        self._waiting: deque[tuple[str, float, str]] = deque()
        self._bytes = 0
        self._saved: str | None = None
        self._closed = False
        self._ending = asyncio.Event()
        self._writing = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._told = self._written = 0  # counts what was to be written, and what was
        self._task: asyncio.Task[None] | None = None
        self._progress: deque[int] = deque()
        self._others = 0

    def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"journal of {self._claim.key}")

    async def publish(self, type: EventType, data: Mapping[str, Any]) -> None:
        """Have an event written, soon."""
        text = as_json(data)
        if type is EventType.PROGRESS and self._is_full():
            self._drop_progress()
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or not self._is_full())
            if self._closed:
                raise TaskOverError(self._claim.key)
            self._waiting.append((type.value, time.time(), text))
            self._bytes += len(text)
            self._told += 1
            self._changed.notify_all()

    async def keep(self, state: Any) -> None:
        """Save a state, now, with all that was told before. `Any`: JSON."""
        self._saved = as_json(state)
        self._told += 1
        told = self._told
        await self.write_waiting()
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._written >= told)
        if self._written < told:
            raise TaskOverError(self._claim.key)

    async def end(self, type: EventType, data: Mapping[str, Any], *, heard: int, status: str) -> Written:
        """Write what is left, and the terminal event, in one transaction; see `Store.write`. Then the journal is closed,
        unless there are reasons to stop that were not heard: then call it again."""
        async with self._writing:
            if self._closed:
                return Written("superseded", ())
            events = [*self._waiting, (type.value, time.time(), as_json(data))]
            written = await self._store.write(
                self._claim, self._seq, events, saved=self._saved, heard=heard, status=status
            )
            if written.outcome != "reasons":
                await self._close()
        await self._stop()
        return written

    async def flush(self) -> None:
        """Write what is left, and close: what becomes of the task is another's to say."""
        await self.write_waiting()
        await self.close()

    async def close(self) -> None:
        """Write nothing any more. Idempotent."""
        await self._close()
        await self._stop()

    # --- writing

    async def _run(self) -> None:
        try:
            while not self._closed:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                try:
                    async with asyncio.timeout(_DELAY):
                        await self._ending.wait()
                except TimeoutError:
                    await self.write_waiting()
        except (
            Exception
        ) as error:  # nobody cancels this task; the work must not wait for a journal that does not write any more
            await self._lose(CancelReason(f"its events cannot be written: {error!r}", CancelType.ERROR, "not_written"))

    async def write_waiting(self) -> None:
        """Write what waits, now."""
        async with self._writing:
            events, saved, told = list(self._waiting), self._saved, self._told
            if self._closed or not (events or saved is not None):
                return
            try:
                written = await self._store.write(self._claim, self._seq, events, saved=saved)
            except psycopg.Error as error:
                await self._lose(
                    CancelReason(f"its events cannot be written: {error}", CancelType.ERROR, "not_written")
                )
                return
            if written.outcome == "superseded":
                await self._lose(superseded(self._claim))
                return
            self._saved = None if self._saved is saved else self._saved
            for _ in events:
                self._bytes -= len(self._waiting.popleft()[2])
            await self._forget(events)
            async with self._changed:
                self._written = told
                self._changed.notify_all()

    async def _forget(self, events: list[tuple[str, float, str]]) -> None:
        """Keep the table bounded: of progress, and of all others, the newest stay."""
        for type, _, _ in events:
            self._seq += 1
            if type == EventType.PROGRESS.value:
                self._progress.append(self._seq)
            else:
                self._others += 1
        if len(self._progress) > 2 * _PROGRESS:
            while len(self._progress) > _PROGRESS:
                self._progress.popleft()
            await self._store.forget_progress(self._claim.task, self._progress[0] - 1)
        if self._others > 2 * _EVENTS:
            self._others = _EVENTS
            await self._store.forget_events(self._claim.task, keep=_EVENTS)

    # --- room

    def _is_full(self) -> bool:
        return len(self._waiting) >= _EVENTS or self._bytes >= _BYTES

    def _drop_progress(self) -> None:
        """Make room by leaving out the oldest progress that no write has in hand."""
        if self._writing.locked():
            return
        for index, (type, _, text) in enumerate(self._waiting):
            if type == EventType.PROGRESS.value:
                del self._waiting[index]
                self._bytes -= len(text)
                return

    async def _lose(self, reason: CancelReason) -> None:
        await self._close()
        self._lost(reason)

    async def _close(self) -> None:
        self._closed = True
        self._ending.set()
        async with self._changed:
            self._changed.notify_all()

    async def _stop(self) -> None:
        if self._closed and self._task is not None:
            await asyncio.wait([self._task])


def superseded(claim: Claim) -> CancelReason:
    """Why the work of an attempt is stopped when another has begun: its worker was taken for dead."""
    return CancelReason(
        f"attempt {claim.attempt} was superseded: its worker was not heard of in time, and another one goes on",
        CancelType.PARENT,
        "superseded",
        origin="PostgresTaskBackend",
    )
