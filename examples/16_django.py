"""Tasks inside a Django project: started by a view, watched and cancelled in the browser under /jobs/.

Django has no `mount` for ASGI applications, so `application` below, the project's asgi.py, decides by the path. Everything
is in one file here; in a project the parts are where they always are.

    python examples/16_django.py                                  plays it through: starts, watches and cancels a task
    penstock serve 16_django:application                          for real (in examples/), then open http://127.0.0.1:8000
    uvicorn --app-dir examples --timeout-graceful-shutdown 5 16_django:application    under another ASGI server
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, JsonResponse
from django.urls import path

from pipeline import Pipeline
from pipeline.tasks import TaskCoordinator, create_app
from stages import stage

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

# --- settings.py

if not settings.configured:
    settings.configure(
        SECRET_KEY="only for this example",
        ALLOWED_HOSTS=["127.0.0.1", "localhost"],
        ROOT_URLCONF=__name__,
        MIDDLEWARE=["django.middleware.security.SecurityMiddleware"],  # a project has sessions, CSRF and logins here
    )
    django.setup()

# --- jobs.py: what is done, and who knows about it

coordinator = TaskCoordinator()


@stage(concurrency=8)
async def look_up(number: int) -> int:
    await asyncio.sleep(0.01)  # your database
    return number * number


def numbers() -> Pipeline[int]:
    return Pipeline(range(100_000), name="numbers") >> look_up


# --- views.py and urls.py


async def start(request: HttpRequest) -> HttpResponse:
    """An async view runs on the server's event loop, where tasks belong."""
    if request.method != "POST":
        return HttpResponseNotAllowed(["POST"])
    task = coordinator.start_task("django", "numbers", uuid4().hex[:8], numbers(), timeout=3600)
    return JsonResponse({"task": str(task.key), "watch": f"/jobs/#/{task.key}"}, status=202)


def home(_: HttpRequest) -> HttpResponse:
    return HttpResponse('<a href="/jobs/">Jobs</a>')


urlpatterns = [path("", home), path("start/", start)]

# --- asgi.py

django_application = get_asgi_application()
jobs = create_app(coordinator, title="Jobs", allowed_hosts=settings.ALLOWED_HOSTS)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """/jobs goes to the tasks, everything else to Django."""
    if scope["type"] == "http" and (scope["path"] + "/").startswith("/jobs/"):
        await jobs({**scope, "root_path": scope.get("root_path", "") + "/jobs"}, receive, send)
    else:
        await django_application(scope, receive, send)


application.state = SimpleNamespace(hub=coordinator)  # so that `penstock serve` shuts the tasks down, too


# --- a client that plays it through


async def main() -> None:
    import httpx
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application, lifespan="off", log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        print("Django says:", (await client.get("/")).text)
        task = (await client.post("/start/")).json()["task"]
        print("it has started", task.rpartition("/")[0])
        await follow(client, task)
        other_site = await client.post(f"/jobs/tasks/{task}/cancel", headers={"Origin": "https://elsewhere.example"})
        print("a page of another site gets", other_site.status_code)
    await coordinator.shutdown()
    server.should_exit = True
    await serving


async def follow(client: Any, task: str) -> None:
    """Print what is told, and cancel after the first numbers."""
    async with client.stream("GET", f"/jobs/tasks/{task}/events") as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["type"] == "progress" and event["data"]["state"] == "running":
                print("progress:", "some" if event["data"]["delivered"] else "nothing", "delivered")
                await client.post(f"/jobs/tasks/{task}/cancel", json={"reason": "that was enough"})
            elif event["type"] == "cancelled":
                print("cancelled:", event["data"]["message"])


if __name__ == "__main__":
    asyncio.run(main())
