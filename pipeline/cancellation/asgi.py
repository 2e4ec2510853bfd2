"""An ASGI client that goes away as a reason to stop the work it asked for.

The rule kept here: a request's `receive()` has one reader. Whoever waits for the disconnect in it takes messages away
from the application, so this module reads, and hands everything on in order.

Nothing of a web framework is needed: it works below Starlette, FastAPI, Litestar, Quart, Django and bare ASGI.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any, Self, TypeAlias

from ..observe.logs import get_logger
from ..result import describe
from .ending import Ending, EndTrigger
from .reason import CancelReason, CancelType

__all__ = ["ClientConnection", "DisconnectMiddleware", "DisconnectTrigger"]

Message: TypeAlias = MutableMapping[str, Any]
"""`Any`: what is in a message depends on its type, as the ASGI specification says."""
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_KEY = "penstock.client"
"""Where the middleware puts the connection in the scope."""
_SMALLEST = 256
"""Bytes of memory for a message, at least."""
_STOP_PATIENCE = 1.0
"""Seconds for the server's `receive()` to take its cancellation."""


class ClientConnection:
    """The two ends of one request, watched: `async with ClientConnection(receive, send) as client:`.

    Inside the block use `client.receive` and `client.send` in place of those given. `client.gone` is true once the
    client has left before the response was complete; `DisconnectTrigger(client)` fires then. A stream that ends after
    the complete response is no disconnect.

    Up to `read_ahead` bytes of body are read before the application asks for them; while more than that waits, a
    disconnect is noticed only when the application has read on, or when sending fails. With `on_demand` nothing is read,
    and no disconnect noticed, before the application asks for the first time: for a client that waits for that
    ("Expect: 100-continue"). After the block the server's own `receive()` is asked.
    """

    def __init__(self, receive: Receive, send: Send, *, read_ahead: int = 1 << 20, on_demand: bool = False) -> None:
        self._receive = receive
        self._send = send
        self._read_ahead = read_ahead
        self._asked = not on_demand
        self._waiting: deque[Message] = deque()
        self._size = 0
        self._changed: list[asyncio.Future[None]] = []
        self._last: Message | None = None
        """The message with which the stream ended: the answer to every question from then on."""
        self._failure: Exception | None = None
        self._failure_told = False
        self._response = _Response()
        self._reader: asyncio.Task[None] | None = None
        self.ending = Ending()
        """For `EndTrigger` and `DisconnectTrigger`."""

    @property
    def gone(self) -> bool:
        """Whether the client has left before it had its response."""
        return self.ending.reason is not None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read(), name="ASGI receive")
        self._reader.add_done_callback(self._wake)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._reader is not None
        self._reader.cancel()
        await asyncio.wait([self._reader], timeout=_STOP_PATIENCE)
        if self._failure is not None and not self._failure_told:
            get_logger().warning("receiving from an ASGI client failed", error=describe(self._failure))

    async def receive(self) -> Message:
        """The next message, as the server's `receive()` would give it; raises what that has raised."""
        while True:
            if self._waiting:
                message = self._waiting.popleft()
                self._size -= _size(message)
                self._wake()
                return message
            if self._failure is not None:
                self._failure_told = True
                raise self._failure
            if self._last is not None:
                return self._last
            if self._reader is None or self._reader.done():
                return await self._receive()
            if not self._asked:
                self._asked = True
                self._wake()
            await self._change()

    async def send(self, message: Message) -> None:
        """As the server's `send()`."""
        self._response.advance(message)  # before it is sent: the disconnect that follows a complete response may be quick
        try:
            await self._send(message)
        except OSError as error:  # how a server says that the connection is closed
            self._client_left(f"the client has disconnected: {describe(error)}")
            await asyncio.sleep(0)  # a fence that waits for this interrupts here, and need not handle the error as well
            raise

    async def _read(self) -> None:
        while self._last is None:
            if self._size > self._read_ahead or not self._asked:
                await self._change()
                continue
            try:
                message = await self._receive()
            except Exception as error:  # a broken channel is the application's to hear of, when it reads
                self._failure = error
                return
            if message["type"] in ("http.disconnect", "websocket.disconnect"):
                self._last = message
                if not self._response.complete:
                    self._client_left("the client has disconnected")
            else:
                self._waiting.append(message)
                self._size += _size(message)
            self._wake()

    def _client_left(self, message: str) -> None:
        # Told before those who wait for a message are woken: a fence around such a wait interrupts it.
        if self.ending.reason is None:
            self.ending.tell(CancelReason(message, CancelType.DISCONNECT, "disconnect", origin="ClientConnection"))

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._changed.append(waiter)
        await waiter

    def _wake(self, *_: object) -> None:
        waiters, self._changed = self._changed, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class DisconnectTrigger(EndTrigger):
    """Fires when the client of an ASGI request has gone before it had its response; code "disconnect" if none is given.

    Takes a `ClientConnection`, or below `DisconnectMiddleware` the request's scope or anything with a `scope`, such as
    the `Request` of Starlette and FastAPI. Raises TypeError for others, LookupError when there is no middleware.
    """

    def __init__(self, client: ClientConnection | MutableMapping[str, Any] | Any, *, code: str | None = None) -> None:
        super().__init__(_connection(client), code=code)


class DisconnectMiddleware:
    """Wraps an ASGI application so that `DisconnectTrigger(request)` works in it: `app = DisconnectMiddleware(app)`.

    Put it outermost; a second one passes everything through. `read_ahead` is that of `ClientConnection`, in bytes.
    """

    def __init__(self, app: Application, *, read_ahead: int = 1 << 20) -> None:
        self.app = app
        self._read_ahead = read_ahead

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _KEY in scope:
            await self.app(scope, receive, send)
            return
        on_demand = _waits_for_continue(scope)
        async with ClientConnection(receive, send, read_ahead=self._read_ahead, on_demand=on_demand) as client:
            scope[_KEY] = client
            await self.app(scope, client.receive, client.send)


class _Response:
    """How far a response has got, to tell a client that leaves from a stream that has ended."""

    def __init__(self) -> None:
        self._trailers = False
        self.complete = False

    def advance(self, message: Message) -> None:
        kind = str(message["type"]).replace("websocket.http.", "http.")  # a handshake that is refused gets a response, too
        if kind == "http.response.start":
            self._trailers = bool(message.get("trailers"))
        elif kind in ("http.response.body", "http.response.pathsend", "http.response.zerocopysend"):
            self.complete = not message.get("more_body") and not self._trailers
        elif kind == "http.response.trailers":
            self.complete = not message.get("more_trailers")
        elif kind == "websocket.close":
            self.complete = True


def _waits_for_continue(scope: MutableMapping[str, Any]) -> bool:
    """Whether asking for the body tells the client to send it, which an application may want to refuse."""
    headers: Iterable[tuple[bytes, bytes]] = scope.get("headers") or ()
    return any(name.lower() == b"expect" for name, _ in headers)


def _connection(client: Any) -> ClientConnection:
    if isinstance(client, ClientConnection):
        return client
    scope = client if isinstance(client, MutableMapping) else getattr(client, "scope", None)
    if not isinstance(scope, MutableMapping):
        raise TypeError(
            f"DisconnectTrigger takes a ClientConnection, an ASGI scope or a request, got {client!r}; with a bare receive(): "
            "async with ClientConnection(receive, send) as client"
        )
    found: Any = scope.get(_KEY)
    if not isinstance(found, ClientConnection):
        raise LookupError("DisconnectTrigger finds no connection in this scope: wrap the application in DisconnectMiddleware(app)")
    return found


def _size(message: Message) -> int:
    """Bytes that a message is counted for; one without content takes memory, too."""
    return max(len(message.get("body") or message.get("bytes") or message.get("text") or b""), _SMALLEST)
