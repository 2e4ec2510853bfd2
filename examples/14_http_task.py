"""A task that fetches over HTTP: cancelling it closes the request, and tells everybody who watches why.

Needs httpx (`pip install httpx`), and no network: the server, which sends a piece every hundredth of a second, is in
here, too, and says what it sees of its client.
"""

import asyncio

import httpx

from pipeline.tasks import EventType, StreamTask, TaskCoordinator, TaskEvent

PIECE = b"x" * 1_000


class Fetch(StreamTask):
    """Your task: what it sends goes to all who follow it. Nothing in it is about cancelling but what it wants to add."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.received = 0

    async def process(self) -> int:
        try:
            async with httpx.AsyncClient() as client, client.stream("GET", self.url) as response:
                total = int(response.headers["Content-Length"])
                async for piece in response.aiter_raw():
                    self.received += len(piece)
                    await self.context.progress(self.received, total)
        except asyncio.CancelledError:
            await self.send_event("cancelled", {"url": self.url, "received": self.received})
            raise
        except httpx.HTTPError as error:
            await self.mark_failed(f"{self.url}: {type(error).__name__}")
        return self.received


class Server:
    """Just enough HTTP: `GET /5` gets five pieces."""

    def __init__(self) -> None:
        self.address = ""
        self.seen: asyncio.Queue[str] = asyncio.Queue()

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        pieces = int(request.split(b" ")[1].strip(b"/"))
        gone = asyncio.create_task(reader.read())  # ends when the client closes its end
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (pieces * len(PIECE)))
        for sent in range(pieces):
            if gone.done():
                self.seen.put_nowait(f"server: the client has left after {sent} of {pieces} pieces")
                break
            writer.write(PIECE)
            await asyncio.wait([gone], timeout=0.01)
        else:
            self.seen.put_nowait(f"server: all {pieces} pieces were sent")
        gone.cancel()
        writer.close()


async def watch(name: str, coordinator: TaskCoordinator, id: int) -> TaskEvent:
    """A browser would do this over server-sent events."""
    seen = 0
    async for event in coordinator.subscribe("shop", "Fetch", id):
        seen += event.type is EventType.PROGRESS
        if event.terminal:
            print(f"{name}: task {id} was {event.type} after {seen} progress events: {event.data}")
            return event
    raise AssertionError("a task has an end")


async def main() -> None:
    async with Server() as server, TaskCoordinator() as coordinator:
        coordinator.start_task("shop", "Fetch", 1, Fetch(f"{server.address}/5"))
        await watch("Ann", coordinator, 1)
        print(await server.seen.get())

        coordinator.start_task("shop", "Fetch", 2, Fetch(f"{server.address}/100000"), timeout=60)
        watching = [asyncio.create_task(watch(name, coordinator, 2)) for name in ("Ann", "Ben")]
        async for event in coordinator.subscribe("shop", "Fetch", 2):
            if event.data.get("done", 0) >= 3 * len(PIECE):
                break
        print("cancelled:", await coordinator.cancel_task("shop", "Fetch", 2, "Ann has pressed the button"))
        await asyncio.gather(*watching)
        print(await server.seen.get())


if __name__ == "__main__":
    asyncio.run(main())
