"""ASGI clients that leave: noticed at once, told from those that are served, and no message is lost on the way."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from helpers import LIMIT, Gate, turns, until
from structlog.testing import capture_logs

from pipeline import (
    CancelType,
    ClientConnection,
    DisconnectMiddleware,
    DisconnectTrigger,
    Err,
    Fence,
    Pipeline,
)
from stages import stage

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def body(data: bytes = b"", *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def request(data: bytes = b"", *, more: bool = False) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


DISCONNECT: Message = {"type": "http.disconnect"}


class Server:
    """A server without a network: gives what it is told to, and counts what is taken."""

    def __init__(self, *messages: Message | BaseException) -> None:
        self.taken = 0
        self.sent: list[Message] = []
        self.broken: OSError | None = None
        self._messages: asyncio.Queue[Message | BaseException] = asyncio.Queue()
        for message in messages:
            self.give(message)

    def give(self, message: Message | BaseException) -> None:
        self._messages.put_nowait(message)

    async def receive(self) -> Message:
        message = await self._messages.get()
        self.taken += 1
        if isinstance(message, BaseException):
            raise message
        return message

    async def send(self, message: Message) -> None:
        if self.broken is not None:
            raise self.broken
        self.sent.append(message)

    def client(self, **options: Any) -> ClientConnection:
        return ClientConnection(self.receive, self.send, **options)


# --- messages go through, in order


async def test_messages_go_through_in_order_and_the_last_answers_every_further_question() -> None:
    server = Server(request(b"a", more=True), request(b"b"), DISCONNECT)
    async with server.client() as client:
        got = [await client.receive() for _ in range(5)]
    assert got == [request(b"a", more=True), request(b"b"), DISCONNECT, DISCONNECT, DISCONNECT]


async def test_reading_ahead_stops_when_enough_waits_and_goes_on_when_some_is_taken() -> None:
    server = Server(*(request(bytes(1000), more=True) for _ in range(50)), DISCONNECT)
    async with server.client(read_ahead=10_000) as client:
        await turns(200)
        assert server.taken == 11
        assert not client.gone
        for taken in range(12, 20):
            await client.receive()
            await turns()
            assert server.taken == taken
        while (await client.receive())["type"] == "http.request":
            pass
        assert client.gone


async def test_messages_without_content_are_not_read_without_bound() -> None:
    server = Server(*(request(more=True) for _ in range(500)), DISCONNECT)
    async with server.client(read_ahead=10_000):
        await turns(1000)
        assert server.taken < 100


async def test_a_broken_channel_is_told_to_the_application_that_reads() -> None:
    async with Server(request(more=True), OSError("broken")).client() as client:
        await client.receive()
        with pytest.raises(OSError, match="broken"):
            await client.receive()
    assert not client.gone


async def test_a_broken_channel_that_nobody_reads_is_logged() -> None:
    with capture_logs() as logs:
        async with Server(OSError("broken")).client():
            await turns()
    assert [(entry["event"], entry["error"]) for entry in logs] == [("receiving from an ASGI client failed", "OSError: broken")]


async def test_a_channel_that_cancels_its_reader_leaves_nobody_waiting() -> None:
    server = Server(asyncio.CancelledError(), request(b"late"))
    async with server.client() as client:
        assert await asyncio.wait_for(client.receive(), LIMIT) == request(b"late")


async def test_a_task_that_outlives_the_block_reads_from_the_server_itself() -> None:
    server = Server()
    async with server.client() as client:
        reading = asyncio.create_task(client.receive())
        await turns()
    server.give(DISCONNECT)
    assert await asyncio.wait_for(reading, LIMIT) == DISCONNECT


async def test_an_error_of_the_application_goes_through_and_the_reader_ends() -> None:
    with pytest.raises(ValueError, match="boom"):
        async with Server().client():
            raise ValueError("boom")
    assert len(asyncio.all_tasks()) == 1


async def test_a_client_that_waits_to_be_asked_is_asked_when_the_application_reads() -> None:
    server = Server(request(b"a"), DISCONNECT)
    async with server.client(on_demand=True) as client:
        await turns()
        assert server.taken == 0
        assert await client.receive() == request(b"a")
        await turns()
        assert client.gone


# --- who has left, and who was served


async def test_a_disconnect_interrupts_a_fence_at_once_and_says_why() -> None:
    server = Server(request())
    async with server.client() as client:
        with Fence(DisconnectTrigger(client)) as fence:
            asyncio.get_running_loop().call_soon(server.give, DISCONNECT)
            await asyncio.Event().wait()
    assert fence.cancelled_caught
    assert fence.cancelled_by("disconnect")
    reason = fence.reasons[0]
    assert (reason.message, reason.cancel_type) == ("the client has disconnected", CancelType.DISCONNECT)
    assert client.ending._watchers == {}


async def test_a_fence_around_a_read_is_interrupted_rather_than_told_of_the_disconnect() -> None:
    server = Server(request(more=True), DISCONNECT)
    got: list[Message] = []
    async with server.client() as client:
        with Fence(DisconnectTrigger(client, code="left")) as fence:
            while True:
                got.append(await client.receive())
                await asyncio.sleep(0)
    assert fence.cancelled_by("left")
    assert got[0] == request(more=True)


async def test_a_client_that_has_left_before_the_fence_has_fired_already() -> None:
    async with Server(DISCONNECT).client() as client:
        await turns()
        with Fence(DisconnectTrigger(client)) as fence:
            await asyncio.Event().wait()
    assert fence.cancelled_by("disconnect")


RESPONSES: dict[str, tuple[list[Message], bool]] = {
    "nothing": ([], False),
    "a start": ([START], False),
    "a part": ([START, body(b"a", more=True)], False),
    "all": ([START, body(b"a", more=True), body()], True),
    "a body of which trailers are missing": ([{**START, "trailers": True}, body()], False),
    "a body and trailers": ([{**START, "trailers": True}, body(), {"type": "http.response.trailers", "more_trailers": False}], True),
    "a file": ([START, {"type": "http.response.pathsend", "path": "/x"}], True),
    "accept": ([{"type": "websocket.accept"}, {"type": "websocket.send", "text": "hello"}], False),
    "close": ([{"type": "websocket.accept"}, {"type": "websocket.close"}], True),
    "a part of a refusal": (
        [{"type": "websocket.http.response.start", "status": 403}, {"type": "websocket.http.response.body", "more_body": True}],
        False,
    ),
    "a refusal": ([{"type": "websocket.http.response.start", "status": 403}, {"type": "websocket.http.response.body"}], True),
}


@pytest.mark.parametrize("sent", RESPONSES)
async def test_who_leaves_after_the_whole_response_is_not_gone(sent: str) -> None:
    messages, complete = RESPONSES[sent]
    server = Server()
    kind = "websocket" if "websocket" in str(messages) else "http"
    async with server.client() as client:
        for message in messages:
            await client.send(message)
        server.give({"type": f"{kind}.disconnect"})
        await client.receive()
    assert client.gone is not complete
    assert server.sent == messages


async def test_a_send_that_fails_tells_that_the_client_has_gone() -> None:
    server = Server()
    async with server.client() as client:
        server.broken = BrokenPipeError("no reader")
        with pytest.raises(BrokenPipeError):
            await client.send(START)
        assert client.gone
        with Fence(DisconnectTrigger(client)) as fence:
            await client.send(START)
    assert "no reader" in fence.reasons[0].message
    assert fence.cancelled_caught


async def test_a_pipeline_is_stopped_when_its_client_leaves() -> None:
    server, gate = Server(request()), Gate()
    async with server.client() as client:
        pipeline = Pipeline([1], cancel_on=DisconnectTrigger(client)) >> stage(gate.__call__)
        run = asyncio.create_task(pipeline.run())
        await gate.entered.wait()
        server.give(DISCONNECT)
        result = await run
    assert isinstance(result, Err)
    assert [reason.code for reason in result.reasons] == ["disconnect"]
    assert gate.cancelled == 1


# --- the middleware


async def test_the_trigger_finds_its_connection_by_scope_or_request() -> None:
    class Request:
        def __init__(self, scope: Message) -> None:
            self.scope = scope

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        inner = dict(scope)  # as routers hand it on
        for client in (scope, inner, Request(inner)):
            with Fence(DisconnectTrigger(client)) as fence:
                await asyncio.Event().wait()
            codes.append(fence.reasons[0].code)

    codes: list[Any] = []
    server = Server(DISCONNECT)
    await DisconnectMiddleware(DisconnectMiddleware(app))({"type": "http"}, server.receive, server.send)
    assert codes == ["disconnect"] * 3


async def test_without_the_middleware_the_trigger_says_what_to_do() -> None:
    with pytest.raises(LookupError, match=r"DisconnectMiddleware\(app\)"):
        DisconnectTrigger({"type": "http"})
    with pytest.raises(TypeError, match="ClientConnection"):
        DisconnectTrigger(object())


async def test_a_lifespan_passes_through_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        seen.append((receive, send))

    server = Server()
    receive, send = server.receive, server.send
    await DisconnectMiddleware(app)({"type": "lifespan"}, receive, send)
    assert seen == [(receive, send)]


async def test_a_websocket_client_that_leaves_is_noticed() -> None:
    server = Server({"type": "websocket.connect"})

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        with Fence(DisconnectTrigger(scope)) as fence:
            server.give({"type": "websocket.receive", "text": "hello"})
            assert (await receive())["text"] == "hello"
            server.give({"type": "websocket.disconnect", "code": 1006})
            await asyncio.Event().wait()
        stopped.append(fence.reasons[0].code)
        stopped.append((await receive())["code"])

    stopped: list[Any] = []
    await DisconnectMiddleware(app)({"type": "websocket"}, server.receive, server.send)
    assert stopped == ["disconnect", 1006]


# --- a real server


class Service:
    """An application with one fence around the whole answer, and what became of it."""

    def __init__(self, answer: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.fences: list[Fence] = []
        self.over = threading.Semaphore(0)
        self._answer = answer

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            with Fence(DisconnectTrigger(scope)) as fence:
                await self._answer(scope, receive, send)
        finally:
            self.fences.append(fence)
            self.over.release()

    def ended(self) -> Fence:
        """Wait until one request is over."""
        assert self.over.acquire(timeout=LIMIT)
        return self.fences[-1]


@contextmanager
def serving(app: Any) -> Iterator[tuple[str, int]]:
    """A uvicorn in a thread; the address to connect to."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, http="h11", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(LIMIT)


@contextmanager
def connected(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, LIMIT) as client:
        yield client


def read_until(client: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        piece = client.recv(1 << 16)
        if not piece:
            raise AssertionError(f"closed after {data!r}")
        data += piece
    return data


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


async def endless_answer(scope: Message, receive: Receive, send: Send) -> None:
    await send(START)
    while True:
        await send(body(b"token ", more=True))
        await asyncio.sleep(0.001)


def test_a_client_that_closes_in_the_middle_of_a_long_answer_stops_it() -> None:
    service = Service(endless_answer)
    with serving(DisconnectMiddleware(service)) as address:
        with connected(address) as client:
            client.sendall(GET)
            read_until(client, b"token")
        fence = service.ended()
    assert fence.cancelled_caught
    assert fence.cancelled_by("disconnect")


def test_a_client_that_closes_while_nothing_is_sent_stops_the_work() -> None:
    begun = threading.Event()

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        begun.set()
        await asyncio.Event().wait()

    service = Service(answer)
    with serving(DisconnectMiddleware(service)) as address:
        with connected(address) as client:
            client.sendall(GET)
            assert begun.wait(LIMIT)
        assert service.ended().cancelled_caught


def test_a_client_that_closes_during_its_upload_stops_the_reading() -> None:
    got = bytearray()
    some = threading.Event()

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            got.extend(message.get("body", b""))
            some.set()
            more = message.get("more_body", False)
        await asyncio.Event().wait()

    service = Service(answer)
    with serving(DisconnectMiddleware(service)) as address:
        with connected(address) as client:
            client.sendall(POST + b"Content-Length: 100000\r\n\r\n" + bytes(1000))
            assert some.wait(LIMIT)
        assert service.ended().cancelled_by("disconnect")
    assert len(got) == 1000


def test_a_client_that_closes_after_the_complete_response_is_not_gone() -> None:
    last: list[Message] = []

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({**START, "headers": [(b"content-length", b"2")]})
        await send(body(b"ok"))
        last.append(await receive())
        await asyncio.sleep(0)

    service = Service(answer)
    with serving(DisconnectMiddleware(service)) as address:
        with connected(address) as client:
            client.sendall(GET)
            read_until(client, b"ok")
        fence = service.ended()
    assert last == [DISCONNECT]
    assert not fence.cancelled


@pytest.mark.parametrize("read_ahead", [0, 5_000, 1 << 20])
def test_a_chunked_body_arrives_whole_however_slowly_it_is_read(read_ahead: int) -> None:
    digests: list[str] = []

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        digest, more, number = hashlib.sha256(), True, 0
        while more:
            message = await receive()
            digest.update(message["body"])
            more, number = message["more_body"], number + 1
            if number % 10 == 0:
                await asyncio.sleep(0.001)
        digests.append(digest.hexdigest())
        await send({**START, "headers": [(b"content-length", b"2")]})
        await send(body(b"ok"))

    pieces = [bytes([n % 251]) * (1 + n * 37 % 5000) for n in range(200)]
    service = Service(answer)
    with serving(DisconnectMiddleware(service, read_ahead=read_ahead)) as address, connected(address) as client:
        for _ in range(2):  # twice on one connection
            client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            for piece in pieces:
                client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            client.sendall(b"0\r\n\r\n")
            read_until(client, b"ok")
            assert not service.ended().cancelled
    assert digests == [hashlib.sha256(b"".join(pieces)).hexdigest()] * 2


def test_a_client_that_does_not_read_and_then_leaves_interrupts_the_send_that_waits_for_it() -> None:
    blocked = threading.Event()

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        await send(START)
        while True:
            asyncio.get_running_loop().call_later(0.05, blocked.set)
            sending = asyncio.ensure_future(send(body(bytes(1 << 20), more=True)))
            await sending

    service = Service(answer)
    with serving(DisconnectMiddleware(service)) as address:
        with connected(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(GET)
            assert blocked.wait(LIMIT)
        assert service.ended().cancelled_caught


def test_a_slow_reader_gets_everything() -> None:
    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        await send(START)
        for n in range(50):
            await send(body(bytes([n]) * 50_000, more=True))
        await send(body())

    service = Service(answer)
    with serving(DisconnectMiddleware(service)) as address, connected(address) as client:
        client.sendall(GET[:-2] + b"Connection: close\r\n\r\n")
        data, piece = b"", b"x"
        while piece:
            piece = client.recv(20_000)
            data += piece
        assert not service.ended().cancelled
    assert all(data.count(bytes([n])) >= 50_000 for n in range(20, 50))


def test_a_client_that_expects_to_be_asked_for_its_body_may_be_refused_without() -> None:
    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.01)
        await send({**START, "status": 413, "headers": [(b"content-length", b"4")]})
        await send(body(b"full"))

    service = Service(answer)
    with serving(DisconnectMiddleware(service)) as address, connected(address) as client:
        client.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
        answered = read_until(client, b"full")
        service.ended()
    assert answered.startswith(b"HTTP/1.1 413")


def test_many_clients_that_leave_leave_no_task() -> None:
    counts: list[int] = []

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        if scope["path"] == "/count":
            await send({**START, "headers": [(b"content-length", b"2")]})
            counts.append(sum("ASGI receive" in task.get_name() for task in asyncio.all_tasks()))
            await send(body(b"ok"))
        else:
            await endless_answer(scope, receive, send)

    service = Service(answer)
    with serving(DisconnectMiddleware(service)) as address:
        for _ in range(20):
            with connected(address) as client:
                client.sendall(GET)
                read_until(client, b"token")
            assert service.ended().cancelled_caught
        with connected(address) as client:
            client.sendall(GET.replace(b"/ ", b"/count ", 1))
            read_until(client, b"ok")
        service.ended()
    assert counts == [1]
