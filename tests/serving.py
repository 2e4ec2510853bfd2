"""What the tests of the web share: clients of an application in this process, servers in processes, and event streams.

The rule kept here: a client is as honest as a browser's connection. It takes what it is sent when it has room, and leaving
is all that it ever does besides.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
from helpers import LIMIT, Program

from pipeline.tasks import TaskCoordinator, create_app

CLI = ("-m", "pipeline.cli")
HOST = "testserver"


@dataclass(frozen=True)
class Sent:
    """One server-sent event."""

    id: int
    type: str
    data: dict[str, Any]


def events_in(text: str) -> list[Sent]:
    """The events of a stream, other than its comments and its `retry`."""
    found: list[Sent] = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith((":", "retry")))
        if lines:
            assert list(lines) == ["id", "event", "data"]
            found.append(Sent(int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return found


class Client:
    """One request to an ASGI application, whose response may go on for ever."""

    def __init__(self, app: Any, url: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.finished = False
        self.pieces = 0
        self.room = asyncio.Event()
        self.room.set()
        self._asked = False
        self._gone = asyncio.Event()
        self._news = asyncio.Event()
        parts = urlsplit(url)
        given = {"host": HOST, **(headers or {})}
        scope: MutableMapping[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(parts.path),
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": (HOST, 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def events(self) -> list[Sent]:
        return events_in(self.body.decode())

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.events]

    async def until(self, condition: Callable[[Client], Any]) -> None:
        """Wait for what it is sent, until that is so."""
        async with asyncio.timeout(LIMIT):
            while not condition(self):
                self._news.clear()
                await self._news.wait()

    async def end(self) -> list[Sent]:
        """Wait for the end of the response; its events."""
        async with asyncio.timeout(LIMIT):
            await self.task
        return self.events

    async def leave(self) -> None:
        """Close the connection; what was on its way is lost."""
        self._gone.set()
        self.room.set()
        async with asyncio.timeout(LIMIT):
            await self.task

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            await self.room.wait()
            if not self._gone.is_set():
                self.body += message["body"]
                self.pieces += 1
            self.finished = not message.get("more_body", False)
        self._news.set()


def http(app: Any, **options: Any) -> httpx.AsyncClient:
    """A client for requests that end."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=f"http://{HOST}", **options)


def app_for(hub: TaskCoordinator, **options: Any) -> Any:
    return create_app(hub, **options)


@contextmanager
def served(folder: Path, source: str, *args: str, target: str = "program:hub") -> Iterator[tuple[Program, str]]:
    """`penstock serve` for a program, with its address."""
    with Program(folder, source, "serve", target, "--port", "0", *args, interpreter=CLI) as program:
        program.says("serving tasks on ")
        found = re.search(r"serving tasks on (http://\S+)", program.out())
        assert found is not None
        yield program, found[1]


async def follow_over_http(
    url: str, path: str, *, started: asyncio.Semaphore | None = None, last: int | None = None
) -> tuple[list[Sent], bool]:
    """The events of a stream over a connection of its own, and whether its end came as it should."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        since = "" if last is None else f"Last-Event-ID: {last}\r\n"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{since}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert b"transfer-encoding: chunked" in head.lower()
        body = b""
        while size := int(await reader.readline() or b"0", 16):
            body += await reader.readexactly(size)
            await reader.readline()
            if started is not None and b"event: item" in body:
                started.release()
                started = None
        complete = await reader.readline() == b"\r\n"
        return events_in(body.decode()), complete
    finally:
        writer.close()
        await writer.wait_closed()
