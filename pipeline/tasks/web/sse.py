"""Server-sent events: one client that follows one task.

The rules kept here:

- A client holds a subscription and at most 64 kB of what it has not taken yet, beside what the server and the kernel hold.
  One that is slow loses what its subscription says, and is told how much (`dropped`).
- A client that leaves is forgotten at once, wherever its task is.
- The response ends after the terminal event, and not before it is sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...observe.logs import get_logger
from ...result import describe
from ..events import TaskEvent, TaskKey
from ..status import Subscription, TaskHub
from .answers import SAFETY

__all__ = ["Encoder", "EventStream", "OpenStreams", "streams_of"]

_ROOM = 65_536
"""Bytes that wait for the client at most, plus one event."""
_SEND_TIMEOUT = 60.0
"""Seconds after which a client that takes nothing is let go: its machine sleeps, or a cable is cut."""
_RECENT = 256
"""Encoded events that are kept, for the other followers of the same task."""


class Encoder:
    """Events as bytes, each encoded once however many follow its task."""

    def __init__(self) -> None:
        self._recent: dict[tuple[TaskKey, int], tuple[object, bytes]] = {}

    def encode(self, event: TaskEvent) -> bytes:
        """`id`, `event` and `data`: the whole event as JSON, on one line."""
        if event.dropped:
            return _encode(event)
        key = (event.task, event.seq)
        known = self._recent.get(key)
        if known is not None and known[0] is event.data:
            return known[1]
        encoded = _encode(event)
        if len(encoded) < _ROOM:
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = (event.data, encoded)
        return encoded


class OpenStreams:
    """The clients that follow the tasks of one hub, to be ended together."""

    def __init__(self) -> None:
        self._streams: set[EventStream] = set()
        self._empty: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: EventStream) -> None:
        self._streams.add(stream)

    def discard(self, stream: EventStream) -> None:
        self._streams.discard(stream)
        if not self._streams and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    async def finished(self, timeout: float) -> bool:
        """Wait for up to `timeout` seconds until nobody follows any more."""
        if self._streams:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._empty], timeout=timeout)
        return not self._streams

    def close(self) -> None:
        """End all that are open, after what has happened so far. Browsers come back, and go on after the last event."""
        for stream in self._streams:
            stream.leave()

    def abandon(self) -> None:
        """Wait no longer for clients that do not take what they are sent."""
        for stream in self._streams:
            stream.give_up()


_open: WeakKeyDictionary[TaskHub, OpenStreams] = WeakKeyDictionary()


def streams_of(hub: TaskHub) -> OpenStreams:
    """The clients of this hub in this process, whichever application they came through.

    Raises TypeError for a hub that has no hash or no weak references.
    """
    try:
        return _open.setdefault(hub, OpenStreams())
    except TypeError as error:
        raise TypeError(f"{type(hub).__qualname__} cannot be served: {error}; make it a plain class") from None


class EventStream(Response):
    """The response. The task of the request writes; one more reads the subscription, and one waits for the client to leave.

    sse-starlette's response was left aside: importing it replaces a method of uvicorn's server, a task of its own polls for
    a shutdown until the process ends, and when that comes all streams are cancelled, before their tasks could say why
    they stopped. It has five tasks a client and sends each event by itself; here what is ready is sent together.
    """

    def __init__(
        self,
        subscription: Subscription,
        streams: OpenStreams,
        encode: Callable[[TaskEvent], bytes],
        *,
        heartbeat: float,
        retry: float,
        send_timeout: float = _SEND_TIMEOUT,
    ) -> None:
        super().__init__(None, 200, {**SAFETY, "X-Accel-Buffering": "no"}, "text/event-stream")
        del self.headers["content-length"]
        self._subscription = subscription
        self._streams = streams
        self._encode = encode
        self._heartbeat = heartbeat
        self._send_timeout = send_timeout
        self._waiting: list[bytes] = [b"retry: %d\n\n" % (retry * 1000)]
        self._size = 0
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._room = asyncio.Event()
        self._ended = False
        """Nothing will be added to what waits."""
        self._leaving = False
        self._sending: asyncio.Timeout | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        self._streams.add(self)
        helpers = [asyncio.create_task(self._read()), asyncio.create_task(self._await_departure(receive))]
        try:
            await self._write(send)
        finally:
            self._streams.discard(self)
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)  # neither has anything to say; see `_await_departure`
            await self._subscription.aclose()

    def leave(self) -> None:
        """End the response as soon as everything is sent that has happened."""
        self._leaving = True
        self._wanted.set()

    def give_up(self) -> None:
        """End the response now, if the client does not take what it is sent."""
        if self._sending is not None and not self._sending.expired():
            self._sending.reschedule(0.0)

    def _end(self) -> None:
        self._ended = True
        self._wanted.set()

    async def _read(self) -> None:
        """Take events as they come, as long as there is room for them."""
        try:
            async for event in self._subscription:
                encoded = self._encode(event)
                self._waiting.append(encoded)
                self._size += len(encoded)
                self._wanted.set()
                while self._size > _ROOM:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:  # the hub's, whose database may be away: the client comes back, and goes on from there
            get_logger().warning("a stream of events has ended early", error=describe(error))
        finally:
            self._end()

    async def _await_departure(self, receive: Receive) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except Exception as error:  # servers and middleware tell of it in ways of their own
            get_logger().debug("a client has left", error=describe(error))
        self._waiting.clear()
        self._end()

    async def _write(self, send: Send) -> None:
        """Send what waits, as one piece; a comment when there was nothing for a while."""
        while self._waiting or not self._ended:
            if not self._waiting and not await self._something_to_send():
                self._waiting.append(b": still here\n\n")
            body = b"".join(self._waiting)
            self._waiting.clear()
            self._size = 0
            self._wanted.clear()
            self._room.set()
            if body and not await self._sent(send, {"type": "http.response.body", "body": body, "more_body": True}):
                return
        await self._sent(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _something_to_send(self) -> bool:
        if self._leaving:
            await asyncio.sleep(0)  # the reader, if it had to wait for room, or for an event that is there now
            await asyncio.sleep(0)
            self._ended = not self._waiting
        elif not self._ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat):
                    await self._wanted.wait()
        return bool(self._waiting) or self._ended or self._leaving

    async def _sent(self, send: Send, message: MutableMapping[str, Any]) -> bool:
        try:
            async with asyncio.timeout(self._send_timeout) as self._sending:
                await send(message)
        except TimeoutError:
            get_logger().info("a client that takes no events was let go")
            return False
        except OSError:  # servers that tell of a lost connection in this way
            return False
        finally:
            self._sending = None
        return True


def _encode(event: TaskEvent) -> bytes:
    data = json.dumps(event.to_dict(), ensure_ascii=False, separators=(",", ":"))
    return f"id: {event.seq}\nevent: {event.type.value}\ndata: {data}\n\n".encode("utf-8", "replace")
