"""An LLM-like service: stop the costly call when nobody wants its answer any more, and always save what there is.

Most code here does not know that it can be cancelled. Only the costly call is inside a `Fence`; saving comes after it,
so it always happens, and needs no shield.

    python examples/09_llm_service.py                     four clients, without a network
    uvicorn --app-dir examples 09_llm_service:app         for real (pip install uvicorn), then:
    curl -N localhost:8000 -d "Why is the sky blue?"      and leave with Ctrl-C before the answer is complete
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline import (
    CancelReason,
    CancelType,
    DisconnectMiddleware,
    DisconnectTrigger,
    Fence,
    TimeoutTrigger,
    TriggerHandle,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


# --- a trigger of one's own: `check` looks, `arm` listens, the handle ends that


@dataclass
class Bill:
    """What an answer has cost so far."""

    limit: int = 40
    spent: int = 0
    when_used_up: list[Callable[[], None]] = field(default_factory=list)

    def add(self, tokens: int) -> None:
        self.spent += tokens
        if self.spent == self.limit:
            for call in tuple(self.when_used_up):
                call()


class BudgetTrigger:
    """Fires when a bill has reached its limit."""

    def __init__(self, bill: Bill) -> None:
        self.bill = bill
        self.reason = CancelReason(f"the budget of {bill.limit} tokens is used up", CancelType.EVENT, code="budget")

    def check(self) -> CancelReason | None:
        return self.reason if self.bill.spent >= self.bill.limit else None

    def arm(self, callback: Callable[[CancelReason], None]) -> TriggerHandle:
        call = partial(callback, self.reason)
        self.bill.when_used_up.append(call)
        return TriggerHandle(partial(self.bill.when_used_up.remove, call))


# --- the service


class Model:
    """Stands for something that burns money for every token, whether somebody reads it or not."""

    def __init__(self) -> None:
        self.computed = 0

    async def generate(self, prompt: str) -> AsyncIterator[str]:
        for n in range(10 * len(prompt.split())):
            await asyncio.sleep(0.2 if "slowly" in prompt else 0.002)
            self.computed += 1
            yield f"token{n} "


@dataclass
class Record:
    """What the archive keeps of one answer."""

    prompt: str
    tokens: list[str]
    stopped_by: tuple[CancelReason, ...]


class Service:
    """A bare ASGI application; below any framework it looks the same."""

    def __init__(self) -> None:
        self.model = Model()
        self.archive: list[Record] = []

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        prompt = await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        tokens, bill = list[str](), Bill()
        with Fence(DisconnectTrigger(scope), TimeoutTrigger(1, code="too slow"), BudgetTrigger(bill)) as fence:
            async for token in self.model.generate(prompt):
                tokens.append(token)
                bill.add(1)
                await send({"type": "http.response.body", "body": token.encode(), "more_body": True})
        await self.save(Record(prompt, tokens, fence.reasons))
        if not fence.cancelled_by("disconnect"):
            why = f"\n({fence.reasons[0]})\n" if fence.cancelled else "\n"
            await send({"type": "http.response.body", "body": why.encode()})

    async def save(self, record: Record) -> None:
        await asyncio.sleep(0.001)  # the database
        self.archive.append(record)


async def read_body(receive: Receive) -> str:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body.decode()


service = Service()
app = DisconnectMiddleware(service)


# --- clients without a network: what a server would do


class Client:
    """Asks one question, and leaves after some chunks of the answer, if it is told to."""

    def __init__(self, prompt: str, *, leaves_after: int | None = None) -> None:
        self.prompt = prompt
        self.chunks = 0
        self._leaves_after = leaves_after
        self._asked = False
        self._left = asyncio.Event()

    async def receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self.prompt.encode(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.chunks += 1
        if self.chunks == self._leaves_after:
            self._left.set()

    async def ask(self) -> None:
        await app({"type": "http"}, self.receive, self.send)


async def main() -> None:
    clients = [
        Client("Why is it?"),
        Client("Tell me a long story", leaves_after=10),
        Client("Write the whole history of all the world"),
        Client("Answer slowly"),
    ]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.ask())
    for record in service.archive:
        why = ", ".join(f"{reason} [{reason.code}]" for reason in record.stopped_by) or "complete"
        print(f"{record.prompt!r}: {len(record.tokens)} tokens saved: {why}")
    saved = sum(len(record.tokens) for record in service.archive)
    print(f"the model has computed {service.model.computed} tokens; {saved} are saved")


if __name__ == "__main__":
    asyncio.run(main())
