"""`penstock serve`, as a process: under load, told to stop, told twice, and told wrong things.

The rule kept here: clients are real connections, signals are real, and nothing is sent before the server has said that it
is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from helpers import LIMIT, Program, alive, run_program, until
from serving import CLI, follow_over_http, served

from pipeline.tasks import TaskCoordinator, create_app
from pipeline.tasks.targets import TargetError
from pipeline.tasks.web.serve import add_arguments, application, token_of

TASKS = """
    import asyncio
    from pipeline.tasks import TaskCoordinator

    hub = TaskCoordinator()

    async def busy(context):
        number = 0
        try:
            while True:
                number += 1
                await (context.progress(number) if number % 3 else context.item(number))
                await asyncio.sleep(0.01)
        finally:
            await asyncio.sleep(0.2)
            await context.item("cleaned up")

    async def make():
        for number in range(10):
            hub.start_task("load", "busy", number, busy)
        return hub
"""


async def test_two_hundred_clients_get_every_terminal_event_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    with served(tmp_path, TASKS, target="program:make") as (program, url):
        started = asyncio.Semaphore(0)
        clients = [
            asyncio.create_task(follow_over_http(url, f"/tasks/load/busy/{number % 10}/events", started=started))
            for number in range(200)
        ]
        async with asyncio.timeout(LIMIT):
            for _ in clients:
                await started.acquire()
            program.interrupt(signal.SIGTERM)
            told = await asyncio.gather(*clients)
        finished = await asyncio.to_thread(program.finish)
    assert finished.code == 0, finished.err
    for events, complete in told:
        assert complete
        assert [event.type for event in events].count("cancelled") == 1
        assert events[-1].type == "cancelled"
        assert events[-2].data["data"] == {"item": "cleaned up"}
        assert [reason["code"] for reason in events[-1].data["data"]["reasons"]] == ["shutdown"]
        ids = [event.id for event in events]
        assert all(after - before - 1 == event.data.get("dropped", 0) for before, after, event in zip(ids, ids[1:], events[1:], strict=False))
        items = [event.id for event in events if event.type == "item"]
        assert len(items) == len(set(items))
    assert "Traceback" not in finished.err


def test_requests_are_answered_while_tasks_clean_up(tmp_path: Path) -> None:
    source = """
        import asyncio
        from pathlib import Path
        from pipeline.tasks import TaskCoordinator

        hub = TaskCoordinator()

        async def careful():
            try:
                await asyncio.Event().wait()
            finally:
                while not Path("enough").exists():
                    await asyncio.sleep(0.01)

        async def make():
            hub.start_task("a", "careful", 1, careful)
            return hub
    """
    with served(tmp_path, source, target="program:make") as (program, url), httpx.Client(base_url=url) as web:
        until(lambda: web.get("/tasks/a/careful/1").json()["state"] == "running")
        program.interrupt(signal.SIGTERM)
        until(lambda: web.get("/tasks/a/careful/1").json()["state"] == "cancelling")
        assert web.post("/tasks/a/careful/1/cancel", json={"reason": "me, too"}).json() == {"cancelled": True}
        reasons = web.get("/tasks/a/careful/1").json()["reasons"]
        (tmp_path / "enough").touch()
        finished = program.finish()
    assert [reason["code"] for reason in reasons] == ["shutdown", "web"]
    assert (finished.code, finished.err.count("Traceback")) == (0, 0)


def test_a_client_that_takes_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    source = """
        import asyncio
        from pathlib import Path
        from pipeline.tasks import TaskCoordinator

        hub = TaskCoordinator()

        async def talks(context):
            for number in range(900):
                await context.item("x" * 10_000)
            await asyncio.Event().wait()

        async def make():
            hub.start_task("a", "talks", 1, talks)
            return hub
    """
    with served(tmp_path, source, "--shutdown-timeout", "0.5", target="program:make") as (program, url):
        until(lambda: httpx.get(f"{url}/tasks/a/talks/1").json()["seq"] > 900)
        with open_stream(url, "/tasks/a/talks/1/events"):
            until(lambda: httpx.get(f"{url}/tasks").status_code == 200)
            program.interrupt(signal.SIGTERM)
            finished = program.finish()
    assert (finished.code, "Traceback" in finished.err) == (0, False)
    assert "a client that takes no events was let go" in finished.err
    assert finished.seconds < 15


STUCK = """
    import asyncio
    from pipeline.tasks import TaskCoordinator

    hub = TaskCoordinator()

    async def deaf():
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                print("deaf", flush=True)

    async def make():
        hub.start_task("a", "deaf", 1, deaf)
        return hub
"""


async def test_a_task_that_does_not_stop_is_named_and_does_not_stop_the_server_from_ending(tmp_path: Path) -> None:
    with served(tmp_path, STUCK, "--shutdown-timeout", "0.1", target="program:make") as (program, url):
        client = asyncio.create_task(follow_over_http(url, "/tasks/a/deaf/1/events"))
        await asyncio.to_thread(until, lambda: httpx.get(f"{url}/tasks/a/deaf/1").json()["state"] == "running")
        program.interrupt(signal.SIGTERM)
        events, complete = await client
        finished = await asyncio.to_thread(program.finish)
    assert complete
    assert events[-1].type == "cancelled"
    assert events[-1].data["data"]["stuck"] is True
    assert finished.code == 1
    assert "a/deaf/1" in finished.err
    assert finished.seconds < 20


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with served(tmp_path, STUCK, "--shutdown-timeout", "600", target="program:make") as (program, url):
        until(lambda: httpx.get(f"{url}/tasks/a/deaf/1").json()["state"] == "running")
        program.interrupt(signal.SIGTERM)
        program.says("deaf")
        program.interrupt(signal.SIGTERM)
        assert program.finish().code == 128 + signal.SIGTERM


def test_ctrl_c_ends_it_as_shells_expect(tmp_path: Path) -> None:
    with served(tmp_path, TASKS) as (program, _):
        program.interrupt(signal.SIGINT, group=True)
        finished = program.finish()
    assert (finished.code, "Traceback" in finished.err) == (130, False)


def test_a_thread_that_does_not_end_is_named_and_left_behind(tmp_path: Path) -> None:
    source = """
        import asyncio, threading
        from pipeline.tasks import TaskCoordinator

        hub = TaskCoordinator()

        async def make():
            hub.start_task("a", "thread", 1, lambda_)
            return hub

        async def lambda_():
            await asyncio.to_thread(threading.Event().wait)
    """
    with served(tmp_path, source, target="program:make") as (program, url):
        until(lambda: httpx.get(f"{url}/tasks/a/thread/1").json()["state"] == "running")
        program.interrupt(signal.SIGTERM)
        finished = program.finish()
    assert finished.code == 1
    assert "threads did not end and were left behind" in finished.err


def test_nothing_is_left_of_a_server_with_processes(tmp_path: Path) -> None:
    source = """
        from pipeline import Pipeline
        from pipeline.tasks import TaskCoordinator
        from stages import stage

        hub = TaskCoordinator()

        async def make():
            hub.start_task("a", "b", 1, Pipeline(iter(int, 1)) >> stage(run_in="process", concurrency=2)(abs))
            return hub
    """
    with served(tmp_path, source, target="program:make") as (program, url):
        until(lambda: (httpx.get(f"{url}/tasks/a/b/1").json()["progress"] or {}).get("delivered"))
        family = program.family()
        assert family
        program.interrupt(signal.SIGTERM, group=True)
        finished = program.finish()
        until(lambda: not alive(family))
    assert finished.code == 0, finished.err


# --- what is served


def test_a_backend_is_made_ready_and_what_is_in_flight_ends_within_the_time(tmp_path: Path) -> None:
    source = """
        import asyncio
        from pipeline.tasks import AsyncFireAndTrackBackend

        backend = AsyncFireAndTrackBackend(shutdown_timeout_seconds=600)

        async def executor(task):
            try:
                await asyncio.Event().wait()
            finally:
                print("cleaned up", flush=True)

        class Hub(AsyncFireAndTrackBackend):
            async def initialize(self):
                await super().initialize()
                self.set_executor(executor)
                await self.submit({"id": 1})

        hub = Hub(shutdown_timeout_seconds=600)
    """
    with served(tmp_path, source, "--shutdown-timeout", "0.2") as (program, url):
        until(lambda: httpx.get(f"{url}/tasks/tasks/task/1").json().get("state") == "running")
        program.interrupt(signal.SIGTERM)
        finished = program.finish()
    assert finished.code == 0, finished.err
    assert "cleaned up" in finished.out
    assert finished.seconds < 20


def test_a_hub_whose_shutdown_is_a_plain_function_ends_with_the_server(tmp_path: Path) -> None:
    source = """
        from pipeline.tasks import TaskCoordinator

        class Hub:
            def __init__(self):
                self.hub = TaskCoordinator()

            def initialize(self):
                print("ready", flush=True)

            def shutdown(self):
                print("shut down", flush=True)

        hub = Hub()
    """
    with served(tmp_path, source) as (program, _):
        program.interrupt(signal.SIGTERM)
        finished = program.finish()
    assert (finished.code, "Traceback" in finished.err) == (0, False), finished.err
    assert "ready" in finished.out
    assert "shut down" in finished.out


def test_an_application_of_ones_own_is_served_with_its_lifespan_and_its_hub_is_shut_down(tmp_path: Path) -> None:
    source = """
        import asyncio
        from contextlib import asynccontextmanager
        from starlette.applications import Starlette
        from starlette.routing import Mount
        from pipeline.tasks import TaskCoordinator, create_app

        hub = TaskCoordinator()

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                print("cleaned up", flush=True)

        @asynccontextmanager
        async def lifespan(app):
            print("begins", flush=True)
            hub.start_task("a", "b", 1, work)
            yield
            print("ends", flush=True)

        app = Starlette(routes=[Mount("/jobs", create_app(hub))], lifespan=lifespan)
        app.state.hub = hub
    """
    with served(tmp_path, source, target="program:app") as (program, url):
        until(lambda: httpx.get(f"{url}/jobs/tasks/a/b/1").json()["state"] == "running")
        program.interrupt(signal.SIGTERM)
        finished = program.finish()
    assert finished.code == 0, finished.err
    lines = [line for line in finished.out.splitlines() if not line.startswith("serving")]
    assert lines == ["begins", "cleaned up", "ends"]


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["program:it", *options])


async def app_without_hub(scope: object, receive: object, send: object) -> None: ...


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (17, "'program:it': 17 knows no tasks"),
        (None, "None knows no tasks"),
        (app_without_hub, "must have its hub as app.state.hub"),
        (TaskCoordinator, r"an object of it, TaskCoordinator\(\.\.\.\)"),
    ],
)
def test_what_cannot_be_served_is_explained(target: object, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        application(target, arguments(), None)


@pytest.mark.parametrize(
    ("options", "token", "said"),
    [
        ((), "\n", "token_urlsafe"),
        (("--allowed-host", "https://example.org"), None, "--allowed-host: .* without scheme and port"),
    ],
)
def test_options_that_cannot_be_meant_are_explained(options: tuple[str, ...], token: str | None, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        application(TaskCoordinator(), arguments(*options), token)


def test_a_token_for_an_application_of_ones_own_is_refused_and_not_forgotten(tmp_path: Path) -> None:
    app = create_app(TaskCoordinator())
    with pytest.raises(TargetError, match=r"create_app\(token=…\)"):
        application(app, arguments("--token-file", str(tmp_path)), "sesame")


def test_a_token_comes_from_where_it_was_said_and_one_that_is_missing_is_no_open_door(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame\n")
    (tmp_path / "empty").write_text("\n")
    assert token_of(arguments("--token-file", str(tmp_path / "token")), {"PENSTOCK_TOKEN": "other"}) == "sesame"
    assert token_of(arguments("--token-env", "MINE"), {"MINE": "sesame", "PENSTOCK_TOKEN": "other"}) == "sesame"
    assert token_of(arguments(), {"PENSTOCK_TOKEN": "sesame"}) == "sesame"
    assert token_of(arguments(), {}) is None
    for options in (("--token-file", str(tmp_path / "nowhere")), ("--token-file", str(tmp_path / "empty")), ("--token-env", "MINE")):
        with pytest.raises(TargetError, match=options[0]):
            token_of(arguments(*options), {"MINE": ""})


def test_a_hub_that_cannot_be_made_ready_ends_the_command(tmp_path: Path) -> None:
    source = """
        from pipeline.tasks import AsyncFireAndTrackBackend

        class Broken(AsyncFireAndTrackBackend):
            async def initialize(self):
                raise ConnectionError("the database is away")

        hub = Broken()
    """
    finished = run_program(tmp_path, source, "serve", "program:hub", "--port", "0", interpreter=CLI)
    assert finished.code == 1
    assert "the database is away" in finished.err


def test_a_lifespan_that_fails_ends_the_command(tmp_path: Path) -> None:
    source = """
        from contextlib import asynccontextmanager
        from pipeline.tasks import TaskCoordinator, create_app

        @asynccontextmanager
        async def lifespan(app):
            raise ValueError("no settings")
            yield

        app = create_app(TaskCoordinator(), lifespan=lifespan)
    """
    finished = run_program(tmp_path, source, "serve", "program:app", "--port", "0", interpreter=CLI)
    assert finished.code == 1
    assert "no settings" in finished.err
    assert "serving" not in finished.out


@pytest.mark.parametrize("target", ["hub", "app"])
def test_a_signal_while_the_hub_is_made_ready_ends_the_command(tmp_path: Path, target: str) -> None:
    source = """
        import asyncio
        from pipeline.tasks import AsyncFireAndTrackBackend, create_app

        class Slow(AsyncFireAndTrackBackend):
            async def initialize(self):
                print("waiting", flush=True)
                try:
                    await asyncio.Event().wait()
                finally:
                    print("given up", flush=True)

        hub = Slow()
        app = create_app(hub)
    """
    with Program(tmp_path, source, "serve", f"program:{target}", "--port", "0", interpreter=CLI) as program:
        program.says("waiting")
        program.interrupt(signal.SIGTERM)
        finished = program.finish()
    assert finished.code == 0
    assert "given up" in finished.out
    assert ("Traceback" in finished.err) == (target == "app")  # Starlette tells where it was


# --- options


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        finished = run_program(tmp_path, TASKS, "serve", "program:hub", "--port", port, interpreter=CLI)
    assert finished.code == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in finished.err
    assert "--port" in finished.err


def test_names_are_served_that_are_allowed_and_the_token_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", "sesame")
    with served(tmp_path, TASKS, "--allowed-host", "tasks.example.org", target="program:make") as (program, url):
        hosts = ["localhost", "a.localhost", "127.0.0.1", "tasks.example.org", "evil.example"]
        codes = [httpx.get(f"{url}/tasks", headers={"Host": host}).status_code for host in hosts]
        cancel = f"{url}/tasks/load/busy/1/cancel"
        answers = [httpx.post(cancel).status_code, httpx.post(cancel, headers={"Authorization": "Bearer sesame"}).status_code]
        program.interrupt(signal.SIGTERM)
        assert program.finish().code == 0
    assert codes == [200, 200, 200, 200, 421]
    assert answers == [401, 200]


def test_it_listens_on_every_address_of_a_host(tmp_path: Path) -> None:
    with served(tmp_path, TASKS, "--host", "localhost") as (program, url):
        port = urlsplit(url).port
        found = {entry[4][0] for entry in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
        for address in found:
            with socket.create_connection((address, port), LIMIT):
                pass
        program.interrupt(signal.SIGTERM)
        assert program.finish().code == 0


def test_a_server_that_others_can_reach_without_a_token_says_so(tmp_path: Path) -> None:
    with served(tmp_path, TASKS, "--host", "0.0.0.0") as (program, _):
        until(lambda: "whoever reaches this can cancel tasks" in program.err())


def test_a_client_that_leaves_costs_the_server_nothing_more(tmp_path: Path) -> None:
    source = TASKS + """
    async def make_app():
        from starlette.responses import JSONResponse
        from starlette.routing import Route
        from pipeline.tasks import create_app
        from pipeline.tasks.web.sse import streams_of

        async def open_streams(request):
            return JSONResponse([len(streams_of(hub)), len(asyncio.all_tasks())])

        return create_app(await make(), routes=[Route("/open", open_streams)])
    """
    with served(tmp_path, source, target="program:make_app") as (program, url):
        with httpx.Client(base_url=url) as web:
            _, before = web.get("/open").json()
            connections = [open_stream(url) for _ in range(20)]
            until(lambda: web.get("/open").json()[0] == 20)
            for connection in connections:
                connection.close()
            until(lambda: web.get("/open").json() == [0, before])
        process = psutil.Process(program.process.pid)
        until(lambda: len(process.net_connections()) <= 2)


def open_stream(url: str, path: str = "/tasks/load/busy/1/events") -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), LIMIT)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


BLOCKED = """
    import time
    from pipeline.tasks import TaskCoordinator

    hub = TaskCoordinator()

    async def block():
        print("blocked", flush=True)
        time.sleep(600)

    async def make():
        hub.start_task("a", "blocks", 1, block)
        return hub
"""


def test_signals_end_a_server_whose_loop_a_task_blocks(tmp_path: Path) -> None:
    with Program(tmp_path, BLOCKED, "serve", "program:make", "--port", "0", "--shutdown-timeout", "1", interpreter=CLI) as program:
        program.says("blocked")
        finished = program.insist(signal.SIGTERM)  # it takes those of the first two seconds for impatience
    assert finished.code in (128 + signal.SIGTERM, -signal.SIGTERM)  # the last may come when it does not listen any more
    assert "the event loop is blocked and hears no signals" in finished.err
