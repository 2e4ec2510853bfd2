"""`create_app`: tasks over HTTP, for one hub. To be mounted anywhere, or served by itself.

The rule kept here: it knows a `TaskHub` and nothing behind it, and keeps nothing about tasks.

    GET   /                              the page
    GET   /tasks                         JSON: the newest tasks in short, ?limit=100
    GET   /tasks/{app}/{name}/{id}       JSON: one task, with its graph, metrics and result
    GET   /tasks/{app}/{name}/{id}/events    server-sent events; Last-Event-ID or ?last_event_id= goes on after that one
    POST  /tasks/{app}/{name}/{id}/cancel    {"reason": …} as JSON or form; {"cancelled": true} if it was running
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, cast

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute, Route
except ImportError as error:
    raise ImportError("create_app needs Starlette: pip install 'penstock[web]'") from error

from ...cancellation.reason import CancelReason
from ..events import TaskKey
from ..status import TaskHub, TaskStatus
from ..targets import hub_of
from .answers import PageFiles, answer, refuse, tagged
from .bodies import read_reason
from .guard import Guard, Refusal, Token, allowed_names, allowed_origins
from .sse import Encoder, EventStream, streams_of
from .stopping import initialize, shut_down

__all__ = ["create_app"]

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[Any]]
"""As Starlette's. `Any`: what it yields is its own."""

_LIMIT = 1_000
"""Tasks in one list, at most."""


def create_app(
    hub: object,
    *,
    token: str | None = None,
    title: str = "Tasks",
    routes: Sequence[BaseRoute] = (),
    lifespan: Lifespan | None = None,
    manage: bool = True,
    allowed_hosts: Iterable[str] | None = None,
    allowed_origins: Iterable[str] = (),
    heartbeat: float = 15.0,
    retry: float = 2.0,
) -> Starlette:
    """An ASGI application for the tasks of `hub`: a `TaskCoordinator`, a backend, or any `TaskHub`.

    With a `token`, cancelling needs it (`Authorization: Bearer …`); to look needs none. Requests of pages of other sites
    are refused, for your own `routes` too, which come before ours; `allowed_origins` may send some, and read the
    answers if you add Starlette's `CORSMiddleware` to what this returns. `allowed_hosts` are the names that it is served
    under, "*.example.org" for all below one; None, for an application that is mounted, leaves that to the outer one.
    Events are followed by a comment after `heartbeat` seconds of silence; browsers that lost the connection come back after
    `retry` seconds.

    Run by itself, it initializes the hub when it starts and shuts it down when it ends, around your `lifespan`, unless
    `manage` is False. Mounted, nobody runs that: do both yourself. uvicorn ends an application only when its connections
    are closed, and who follows a task holds one: give it `--timeout-graceful-shutdown`. `penstock serve` needs none.
    """
    _check_seconds(heartbeat=heartbeat, retry=retry)
    views = _Views(hub_of(hub), Token(token), heartbeat=heartbeat, retry=retry)
    page = PageFiles(title)
    task = "/tasks/{app}/{name}/{id}"
    app = Starlette(
        routes=[
            *routes,
            Route("/", page.index),
            Route("/static/{file}", page.file),
            Route("/tasks", views.list),
            Route(task, views.status),
            Route(f"{task}/events", views.events),
            Route(f"{task}/cancel", views.cancel, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, allowed_names(allowed_hosts), _origins(allowed_origins))],
        exception_handlers={Refusal: _refused, HTTPException: _no_such_thing},
        lifespan=_lifespan(hub, lifespan) if manage else lifespan,
    )
    app.state.hub = hub
    return app


class _Views:
    """The requests about tasks."""

    def __init__(self, hub: TaskHub, token: Token, *, heartbeat: float, retry: float) -> None:
        self._hub = hub
        self._streams = streams_of(hub)
        self._token = token
        self._heartbeat = heartbeat
        self._retry = retry
        self._encoder = Encoder()

    async def list(self, request: Request) -> Response:
        limit = _number(request.query_params.get("limit", "100"), "limit", most=_LIMIT)
        rows = [_summary(status) for status in await self._hub.list_tasks(limit=limit)]
        response = tagged(request, answer({"tasks": rows, "token_required": self._token.required}))
        response.headers["X-Time"] = f"{time.time():.3f}"
        return response

    async def status(self, request: Request) -> Response:
        return answer((await self._known(request)).to_dict())

    async def events(self, request: Request) -> Response:
        given = request.headers.get("last-event-id") or request.query_params.get("last_event_id") or None
        last = None if given is None else _number(given, "Last-Event-ID", most=10**18)
        status = await self._known(request)
        if status.state.over and last == status.seq:
            return Response(status_code=204)  # there is nothing more, and a browser does not come again
        subscription = self._hub.subscribe(*status.task, last_event_id=last)
        return EventStream(subscription, self._streams, self._encoder.encode, heartbeat=self._heartbeat, retry=self._retry)

    async def cancel(self, request: Request) -> Response:
        self._token.check(request.headers)
        status = await self._known(request)
        message = await read_reason(request) or "cancelled over HTTP, without a reason"
        origin = request.client.host if request.client is not None else None
        reason = CancelReason(message, code="web", origin=origin)
        return answer({"cancelled": await self._hub.cancel_task(*status.task, reason)})

    async def _known(self, request: Request) -> TaskStatus:
        parts = request.path_params
        try:
            key = TaskKey.of(parts["app"], parts["name"], parts["id"])
        except ValueError as error:
            raise Refusal(404, f"there is no such task: {error}") from None
        status = await self._hub.get_task(*key)
        if status is None:
            raise Refusal(404, f"no task {key} is known here; it was never started, or was over long ago")
        return status


def _summary(status: TaskStatus) -> dict[str, Any]:
    """What a list shows of a task, in some 300 bytes: each may have megabytes of metrics and results. `Any`: JSON."""
    progress, result = status.progress or {}, status.result or {}
    message = status.reasons[0].message if status.reasons else result.get("message", progress.get("message"))
    numbers = {name: progress.get(name) for name in ("done", "total", "pulled", "delivered")}
    return {
        "app": status.task.app,
        "name": status.task.name,
        "id": status.task.id,
        "state": status.state.value,
        "attempt": status.attempt,
        "seq": status.seq,
        "created": status.created,
        "started": status.started,
        "ended": status.ended,
        "worker": status.worker,
        "progress": {name: number for name, number in numbers.items() if isinstance(number, (int, float))},
        "message": message[:200] if isinstance(message, str) else None,
    }


def _number(text: str, what: str, *, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) > most:
        raise Refusal(400, f"{what} is {text[:50]!r}; send a whole number from 0 to {most:,}, or leave it out")
    return int(text)


def _lifespan(hub: object, inner: Lifespan | None) -> Lifespan:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[Any]:
        async with AsyncExitStack() as stack:
            await initialize(hub)
            stack.push_async_callback(shut_down, hub)
            yield None if inner is None else await stack.enter_async_context(inner(app))

    return lifespan


async def _refused(_: Request, error: Exception) -> Response:
    refusal = cast("Refusal", error)
    return refuse(refusal.status, str(refusal), refusal.headers)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    wrong = cast("HTTPException", error)
    return refuse(wrong.status_code, f"{request.method} {request.url.path}: {wrong.detail}", wrong.headers)


def _origins(origins: Iterable[str]) -> frozenset[str]:
    return allowed_origins(origins)


def _check_seconds(**seconds: object) -> None:
    for name, value in seconds.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise ValueError(f"{name} is a number of seconds, more than 0, not {value!r}")
