"""A source at work in one run that may wait: pulled in a task, or in a thread. (`prompt` has those that never wait.)

The rules kept here:

- Nothing is pulled that there is no room for: beyond the buffers, at most one item is in the source's hand.
- What was opened is closed, on the thread that drove it.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import sys
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from .channel import Channel
from .protocols import Inlet
from .result import Err
from .runtime import PipelineRuntime

if TYPE_CHECKING:
    from aiostream.core import Streamer

__all__ = ["Feed", "WaitingFeed"]

class Feed(Protocol):
    """A source at work in one run."""

    inlet: Inlet

    @property
    def done(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self) -> None:
        """Pull nothing more; what has been pulled goes on."""
        ...

    def abort(self) -> None:
        """Stop at once."""
        ...

    def settle(self) -> None:
        """After the run: book as discarded what was pulled and could not be passed on."""
        ...


class WaitingFeed:
    """Drives an iterator that may wait: an async one in a task, any other in a thread."""

    def __init__(self, origin: Any, runtime: PipelineRuntime, channel: Channel) -> None:
        self._origin = origin
        self._runtime = runtime
        self._channel = channel
        self.inlet: Inlet = channel
        self._stopping = False
        self._pulling = True
        self._hand: _Hand | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        return self._task is not None and self._task.done()

    def start(self) -> None:
        self._task = self._runtime.start_task(self._run(), name="source", group=-1, on_end=lambda _: self._channel.finish())

    def stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        if self._hand is not None:
            self._hand.stop()  # the thread still hands over what it has pulled
        elif self._pulling and self._task is not None:
            self._runtime.cancel_task(self._task)  # only out of the wait for an item: closing the iterator is left in peace

    def abort(self) -> None:
        self._stopping = True
        if self._hand is not None:
            self._hand.stop()
        self._channel.abort()

    @property
    def outside(self) -> bool:
        return self._hand is not None and self._hand.pulling

    def settle(self) -> None:
        if self._hand is not None:
            self._discard(self._hand.leftover())

    def _discard(self, items: int) -> None:
        self._channel.up.emitted += items
        self._channel.down.discarded += items

    async def _run(self) -> None:
        try:
            iterable = await self._open()
            if isinstance(iterable, AsyncIterable):
                await self._pull_async(iterable)
            else:
                await self._pull_in_thread(iterable)
        except Exception as error:
            self._fail(error)

    async def _open(self) -> AsyncIterable[Any] | Iterable[Any]:
        """The iterable itself, or what the source function returns for this run."""
        made = self._origin
        if isinstance(made, (AsyncIterable, Iterable)):
            return cast("Any", made)
        made = made()
        if inspect.isawaitable(made) and not isinstance(made, AsyncIterable):  # an aiostream stream is both
            made = await made
        if not isinstance(made, (AsyncIterable, Iterable)):
            raise TypeError(f"the source function returned {type(made).__name__}, which cannot be iterated")
        return cast("Any", made)

    def _fail(self, error: BaseException) -> None:
        self._runtime.fail(Err.of(error, stage="source"), origin="source", code="source_error")

    # --- async iterables, in this task

    async def _pull_async(self, iterable: AsyncIterable[Any]) -> None:
        iterator: AsyncIterator[Any]
        context = _context_of(iterable)
        if context is not None:
            iterator = context
            await iterator.__aenter__()
            close: Callable[[], Any] | None = partial(iterator.__aexit__, None, None, None)
        else:
            iterator = aiter(iterable)
            close = getattr(iterator, "aclose", None)
        try:
            await self._forward(iterator)
        finally:
            if close is not None:
                await close()

    async def _forward(self, iterator: AsyncIterator[Any]) -> None:
        channel = self._channel
        try:
            while not self._stopping and await channel.wait_room():
                item = await anext(iterator)
                if channel.closed:
                    self._discard(1)
                    return
                channel.put_nowait(item)
        except StopAsyncIteration:
            return
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            # The drain's own cancellation, spent here: the iterator is closed by the caller, in peace.
        finally:
            self._pulling = False

    # --- everything else, in a thread

    async def _pull_in_thread(self, iterable: Iterable[Any]) -> None:
        self._hand = hand = _Hand(iterable, self._runtime)
        self._runtime.at_end.append(partial(self._report_error, hand))  # of closing the iterator, after this task's end
        if self._stopping:
            hand.stop()
        self._runtime.start_thread(hand.pull, name="source")
        channel = self._channel
        while not hand.finished:
            if self._stopping:
                # A thread that is blocked inside next() is not waited for: it is named in the report if it stays so.
                if not await hand.wait_arrival(self._runtime.grace.abort):
                    return
            elif hand.outstanding == 0 and channel.room() <= 0:
                if not await channel.wait_room():
                    return
                continue
            else:
                hand.allow(channel.room())
                await hand.wait_arrival(None)
            while hand.items:
                if not await channel.wait_room():
                    return
                channel.put_many(hand.take(channel.room()))
        self._report_error(hand)

    def _report_error(self, hand: _Hand) -> None:
        error, hand.error = hand.error, None
        if error is not None:
            self._fail(error)


class _Hand:
    """The thread that pulls, and what it holds for the loop.

    The loop grants a number of items; the thread pulls that many without asking again and appends them to a deque. The
    loop is woken only when it waits: many items cost one wake-up, and a lone item is never held back.
    """

    def __init__(self, iterable: Iterable[Any], runtime: PipelineRuntime) -> None:
        self._iterable = iterable
        self._runtime = runtime
        self._grants: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._granted = 0
        self._arrived = 0
        self._stopped = False
        self._ended = False
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._counted = False
        self.items: deque[Any] = deque()
        self.error: BaseException | None = None

    # the loop's side

    def allow(self, room: int) -> None:
        """Let the thread pull as many items as there is room for, beyond those it may already."""
        outstanding = self.outstanding
        if room > outstanding and (outstanding == 0 or (room - outstanding) * 2 >= room):
            self._granted += room - outstanding
            self._grants.put(room - outstanding)

    @property
    def outstanding(self) -> int:
        """Items granted that have not been passed on yet."""
        return self._granted - self._arrived

    @property
    def pulling(self) -> bool:
        """Whether the thread is inside the iterator, to pull or to close, and not waiting for room."""
        return not self._ended and (self._stopped or self.outstanding > len(self.items))

    def take(self, limit: int) -> list[Any]:
        """What has arrived, up to so many."""
        items = self.items
        taken = [items.popleft() for _ in range(min(limit, len(items)))]
        self._arrived += len(taken)
        return taken

    def stop(self) -> None:
        self._stopped = True
        self._grants.put(0)

    @property
    def finished(self) -> bool:
        return self._ended and not self.items

    async def wait_arrival(self, seconds: float | None) -> bool:
        """Until there is an item, or the thread has ended; False when time is up. A stop cancels this task."""
        assert self._runtime.loop is not None
        while not self.items and not self._ended:
            waiter: asyncio.Future[None] = self._runtime.loop.create_future()
            self._waiters.append(waiter)
            if not self.items and not self._ended:  # looked at again: the thread may have passed in between
                if seconds is None:
                    await waiter
                else:
                    await asyncio.wait((waiter,), timeout=seconds)
                if not waiter.done():
                    return False
            self._waiters.clear()
        return True

    def leftover(self) -> int:
        """How many items the thread has pulled that went nowhere; counted once."""
        count = 0 if self._counted else len(self.items)
        self._counted = True
        return count

    def _wake(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            waiter.set_result(None)

    # the thread's side

    def pull(self) -> None:
        """Pull as granted, close what was opened, and say that it is over."""
        try:
            iterator = iter(self._iterable)
            try:
                self._pull_granted(iterator)
            finally:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
        except Exception as error:
            self.error = error
        finally:
            self._ended = True
            self._ring()

    def _pull_granted(self, iterator: Iterator[Any]) -> None:
        items = self.items
        while not self._stopped:
            for _ in range(self._grants.get()):
                if self._stopped:
                    return
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                items.append(item)
                if self._waiters:
                    self._ring()

    def _ring(self) -> None:
        # Taking the waiter out is atomic, so that one wait costs one call across threads, however many items follow.
        try:
            waiter = self._waiters.pop()
        except IndexError:
            return
        self._runtime.call_soon_threadsafe(self._wake, waiter)


def _context_of(iterable: AsyncIterable[Any]) -> Streamer[Any] | None:
    """What an aiostream stream is iterated in, so that it is closed; None for anything else."""
    if "aiostream" not in sys.modules:  # who has a stream has imported it
        return None
    from aiostream.core import BaseStream, Streamer, streamcontext

    return streamcontext(iterable) if isinstance(iterable, BaseStream) and not isinstance(iterable, Streamer) else None
