"""The application inside others, over real HTTP: Django's project, and the server that ends with its tasks."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import httpx
from helpers import LIMIT, ROOT, Program
from serving import events_in, served

DJANGO = f"""
    import sys
    from importlib import import_module

    sys.path.insert(0, {str(ROOT / "examples")!r})
    application = import_module("16_django").application
"""


def test_in_a_django_project_tasks_are_started_by_a_view_and_end_with_the_server(tmp_path: Path) -> None:
    with (
        served(tmp_path, DJANGO, target="program:application") as (program, url),
        httpx.Client(base_url=url, timeout=LIMIT) as web,
    ):
        assert web.get("/").text == '<a href="/jobs/">Jobs</a>'
        assert web.get("/nothing").status_code == 404
        assert web.get("/jobsite").status_code == 404  # Django's, which begins alike
        page = web.get("/jobs", follow_redirects=True)
        assert (page.status_code, page.url.path) == (200, "/jobs/")
        for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text):
            assert web.get(f"/jobs/{name}").status_code == 200
        task = web.post("/start/").json()["task"]
        text = ""
        with web.stream("GET", f"/jobs/tasks/{task}/events") as response:
            for chunk in response.iter_text():
                text += chunk
                if text.count("event: progress") == 1:
                    program.interrupt(signal.SIGTERM)
        finished = program.finish()
    *_, last = events_in(text)
    assert last.type == "cancelled"
    assert last.data["data"]["reasons"][0]["code"] == "shutdown"
    assert (finished.code, "Traceback" in finished.err) == (0, False)


def test_under_another_server_the_shutdown_of_the_coordinator_ends_the_streams(tmp_path: Path) -> None:
    source = """
        import asyncio
        import uvicorn
        from pipeline.tasks import TaskCoordinator, create_app

        hub = TaskCoordinator()

        async def work():
            await asyncio.Event().wait()

        async def main():
            server = uvicorn.Server(uvicorn.Config(create_app(hub), port=0, log_level="warning"))
            server.handle_exit = lambda *_: asyncio.get_running_loop().create_task(stop(server))
            hub.start_task("a", "b", 1, work)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            print("serving tasks on http://127.0.0.1:%d" % server.servers[0].sockets[0].getsockname()[1], flush=True)
            await serving

        async def stop(server):
            await hub.shutdown(timeout=5)
            server.should_exit = True

        asyncio.run(main())
    """
    with Program(tmp_path, source) as program:
        program.says("serving tasks on ")
        url = program.out().split()[3]
        with httpx.stream("GET", f"{url}/tasks/a/b/1/events", timeout=LIMIT) as response:
            text = ""
            for chunk in response.iter_text():
                text += chunk
                if "started" in text and "cancelled" not in text:
                    program.interrupt(signal.SIGTERM)
        assert events_in(text)[-1].type == "cancelled"
        program.finish()
