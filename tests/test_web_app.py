"""The application: the list, the status, cancelling, and what is said to requests that cannot be answered."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from serving import Client, app_for, http
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from tasking import Held

from pipeline import Pipeline
from pipeline.tasks import AsyncFireAndTrackBackend, RunningTask, TaskContext, TaskCoordinator, create_app
from stages import map


@pytest.fixture
async def hub() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator() as hub:
        yield hub


@pytest.fixture
async def web(hub: TaskCoordinator) -> AsyncIterator[httpx.AsyncClient]:
    async with http(app_for(hub)) as web:
        yield web


def start(hub: TaskCoordinator, work: Any, *, id: object = 7) -> RunningTask:
    return hub.start_task("shop", "Import", id, work)


def error(answer: httpx.Response) -> str:
    return answer.json()["error"]


# --- the list and the status


async def test_the_status_of_a_task_is_all_that_is_known(hub: TaskCoordinator, web: httpx.AsyncClient) -> None:
    task = start(hub, Pipeline(range(5), name="squares") >> map(lambda n: n * n, name="square"))
    await task.wait()
    answer = await web.get("/tasks/shop/Import/7")
    assert answer.json() == task.status().to_dict()
    assert answer.json()["about"]["stages"][0]["name"] == "square"
    assert answer.headers["content-type"] == "application/json"


async def test_the_list_has_every_task_in_short(hub: TaskCoordinator, web: httpx.AsyncClient) -> None:
    for number in range(3):
        await start(hub, Pipeline(range(5)) >> map(str), id=number).wait()
    rows = (await web.get("/tasks")).json()["tasks"]
    assert [row["id"] for row in rows] == ["2", "1", "0"]
    assert rows[0]["progress"] == {"pulled": 5, "delivered": 5}
    assert not {"about", "result", "reasons"} & set(rows[0])


async def test_tasks_with_much_to_say_do_not_make_the_list_long(hub: TaskCoordinator, web: httpx.AsyncClient) -> None:
    async def talks(context: TaskContext) -> str:
        await context.send_event("progress", {"done": "x" * 500_000, "message": "y" * 400_000})
        return "z" * 900_000

    for number in range(5):
        await start(hub, talks, id=number).wait()
    assert len((await web.get("/tasks")).content) < 5_000


async def test_the_list_says_why_a_task_ended(hub: TaskCoordinator, web: httpx.AsyncClient) -> None:
    async def fails() -> None:
        raise ValueError("no such file" * 100)

    await start(hub, fails, id=1).wait()
    held = start(hub, Held(), id=2)
    held.cancel("wrong \ud800 file")
    await held.wait()
    rows = (await web.get("/tasks")).json()["tasks"]
    assert [row["state"] for row in rows] == ["cancelled", "error"]
    assert rows[0]["message"] == "wrong ? file"
    assert rows[1]["message"].startswith("no such file")
    assert len(rows[1]["message"]) == 200


async def test_the_list_is_sent_again_only_if_it_has_changed(hub: TaskCoordinator, web: httpx.AsyncClient) -> None:
    first = await web.get("/tasks")
    same = await web.get("/tasks", headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    assert "x-time" in same.headers
    start(hub, Held())
    other = await web.get("/tasks", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200


@pytest.mark.parametrize("limit", ["0", "1", "2", "1000"])
async def test_the_list_has_a_limit(hub: TaskCoordinator, web: httpx.AsyncClient, limit: str) -> None:
    for number in range(2):
        start(hub, Held(), id=number)
    assert len((await web.get("/tasks", params={"limit": limit})).json()["tasks"]) == min(int(limit), 2)


@pytest.mark.parametrize("limit", ["-1", "x", "1001", "", "1e2"])
async def test_a_wrong_limit_is_refused_in_words(web: httpx.AsyncClient, limit: str) -> None:
    answer = await web.get("/tasks", params={"limit": limit})
    assert answer.status_code == 400
    assert "limit is" in error(answer)


# --- keys


@pytest.mark.parametrize(
    "id", ["ä b", "100%", "a&b=c", "?", "#", "<script>alert(1)</script>".replace("/", ""), "...", "a\\b", "日本", "%2F", "'\";"]
)
async def test_ids_with_odd_characters_are_found_watched_and_cancelled(
    hub: TaskCoordinator, web: httpx.AsyncClient, id: str
) -> None:
    task = start(hub, Held(), id=id)
    url = str(httpx.URL(f"/tasks/shop/Import/{quoted(id)}"))
    assert (await web.get(url)).json()["id"] == id
    client = Client(web._transport.app, f"{url}/events")  # type: ignore[attr-defined]
    assert (await web.post(f"{url}/cancel")).json() == {"cancelled": True}
    assert [event.data["task"][2] for event in await client.end()][-1] == id
    await task.wait()


@pytest.mark.parametrize("path", ["a%2Fb", "..%2F..%2Fetc", "%00", "%0A", "x" * 201, "%2e%2e", "%ff"])
async def test_ids_that_no_task_can_have_are_not_found(web: httpx.AsyncClient, path: str) -> None:
    for url in (f"/tasks/shop/Import/{path}", f"/tasks/shop/Import/{path}/events"):
        answer = await web.get(url)
        assert answer.status_code == 404, url
        assert error(answer)
    assert (await web.post(f"/tasks/shop/Import/{path}/cancel")).status_code == 404


async def test_an_unknown_task_is_404_everywhere(web: httpx.AsyncClient) -> None:
    answers = [
        await web.get("/tasks/shop/Import/8"),
        await web.get("/tasks/shop/Import/8/events"),
        await web.post("/tasks/shop/Import/8/cancel", json={"reason": "x"}),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert all("no task shop/Import/8 is known here" in error(answer) for answer in answers)


@pytest.mark.parametrize(("method", "url", "status"), [("GET", "/nothing", 404), ("DELETE", "/tasks", 405), ("GET", "/tasks/a/b/c/cancel", 405), ("GET", "/static/..%2Fapp.py", 404), ("GET", "/static/index.html", 404)])
async def test_what_cannot_be_asked_is_said_as_json(web: httpx.AsyncClient, method: str, url: str, status: int) -> None:
    answer = await web.request(method, url)
    assert answer.status_code == status
    assert error(answer)


def quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


# --- cancelling


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b'{"reason": "wrong file"}', {"Content-Type": "application/json"}, "wrong file"),
        (b'{"reason": "a \\ud800 \\u0000 b"}', {"Content-Type": "application/json; charset=utf-8"}, "a     b"),
        (b"reason=falsch+%C3%A4", {"Content-Type": "application/x-www-form-urlencoded"}, "falsch ä"),
        (b"reason=%ff", {"Content-Type": "application/x-www-form-urlencoded"}, "\ufffd"),
        (b"", {}, "cancelled over HTTP, without a reason"),
        (b"{}", {"Content-Type": "application/json"}, "cancelled over HTTP, without a reason"),
        (b'{"reason": null}', {"Content-Type": "application/json"}, "cancelled over HTTP, without a reason"),
        (b'{"reason": "  "}', {"Content-Type": "application/json"}, "cancelled over HTTP, without a reason"),
    ],
)
async def test_a_reason_comes_as_json_or_as_a_form_or_not_at_all(
    hub: TaskCoordinator, web: httpx.AsyncClient, content: bytes, headers: dict[str, str], message: str
) -> None:
    task = start(hub, Held())
    answer = await web.post("/tasks/shop/Import/7/cancel", content=content, headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"cancelled": True})
    terminal = await task.wait()
    assert terminal.data["message"] == message
    (reason,) = terminal.data["reasons"]
    assert (reason["code"], reason["origin"]) == ("web", "127.0.0.1")


async def test_a_task_that_is_over_is_not_cancelled(hub: TaskCoordinator, web: httpx.AsyncClient) -> None:
    held = Held()
    held.opened.set()
    await start(hub, held).wait()
    answer = await web.post("/tasks/shop/Import/7/cancel", json={"reason": "late"})
    assert (answer.status_code, answer.json()) == (200, {"cancelled": False})


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "is no JSON"),
        (b"\xff", "application/json", 400, "is no JSON"),
        (b"[" * 10_000, "application/json", 400, "is no JSON"),
        (b"[]", "application/json", 400, "send an object"),
        (b'{"reason": 7}', "application/json", 400, "a reason is a text"),
        (b'{"reason": "' + b"x" * 1_001 + b'"}', "application/json", 400, "1,000 characters, not 1,001"),
        (b'{"reason": "' + b"x" * 20_000 + b'"}', "application/json", 413, "16,384 bytes"),
        (b"&".join([b"a=b"] * 100), "application/x-www-form-urlencoded", 400, "the form cannot be read"),
        (b"reason=\xff", "application/x-www-form-urlencoded", 400, "the form cannot be read"),
        (b'{"reason": "x"}', "text/plain", 415, "as application/json, or a form"),
        (b"reason=x", "multipart/form-data", 415, "as application/json, or a form"),
    ],
)
async def test_a_reason_that_cannot_be_read_cancels_nothing(
    hub: TaskCoordinator, web: httpx.AsyncClient, content: bytes, kind: str, status: int, said: str
) -> None:
    task = start(hub, Held())
    answer = await web.post("/tasks/shop/Import/7/cancel", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert said in error(answer)
    assert not task.reasons


async def test_a_body_that_never_comes_is_not_waited_for(
    hub: TaskCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tasks.web.bodies._TIMEOUT", 0.02)
    start(hub, Held())

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with http(app_for(hub)) as web:
        answer = await web.post("/tasks/shop/Import/7/cancel", content=endless())
    assert answer.status_code == 408


# --- the page


async def test_the_page_is_strict_about_what_a_browser_may_do(web: httpx.AsyncClient) -> None:
    page = await web.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in page.text
    assert "style=" not in page.text
    assert "://" not in page.text


async def test_all_that_the_page_asks_for_is_there_and_relative(web: httpx.AsyncClient) -> None:
    page = (await web.get("/")).text
    names = set(re.findall(r'(?:src|href)="(static/[^"]+)"', page))
    scripts = [name for name in names if name.endswith(".js")]
    while scripts:
        text = (await web.get(f"/{scripts.pop()}")).text
        found = {f"static/{name}" for name in re.findall(r'from "\./([^"]+)"', text)} - names
        names |= found
        scripts += found
    assert len(names) == 7
    for name in names:
        answer = await web.get(f"/{name}")
        assert answer.status_code == 200
        again = await web.get(f"/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304


async def test_the_title_is_text(hub: TaskCoordinator) -> None:
    async with http(app_for(hub, title="<b>Jobs</b> & co")) as web:
        page = (await web.get("/")).text
    assert page.count("&lt;b&gt;Jobs&lt;/b&gt; &amp; co") == 2
    assert "<b>" not in page


# --- mounting, routes and lifespans


async def test_it_can_be_mounted_below_any_path(hub: TaskCoordinator) -> None:
    start(hub, Held())
    outer = Starlette(routes=[Mount("/deep/down", app_for(hub))])
    async with http(outer) as web:
        assert (await web.get("/deep/down/")).status_code == 200
        assert (await web.get("/deep/down/static/page.js")).status_code == 200
        assert (await web.get("/deep/down/tasks/shop/Import/7")).json()["state"] in ("queued", "running")
        redirect = await web.get("/deep/down")
        assert redirect.status_code == 307
        assert redirect.headers["location"].endswith("/deep/down/")
    client = Client(outer, "/deep/down/tasks/shop/Import/7/events")
    await client.until(lambda client: client.types == ["started"])
    await client.leave()


async def test_own_routes_come_first_and_are_guarded_too(hub: TaskCoordinator) -> None:
    async def begin(request: Request) -> Response:
        return JSONResponse(list(start(hub, Held(), id=9).key))

    app = app_for(hub, routes=[Route("/begin", begin, methods=["POST"])])
    async with http(app) as web:
        assert (await web.post("/begin", headers={"Origin": "https://evil.example"})).status_code == 403
        assert not hub.is_task_running("shop", "Import", 9)
        assert (await web.post("/begin")).json() == ["shop", "Import", "9"]


async def test_run_by_itself_it_readies_a_backend_and_shuts_it_down_around_the_lifespan_within() -> None:
    backend = AsyncFireAndTrackBackend(shutdown_timeout_seconds=0)
    said: list[object] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
        said.append(backend._ready)
        yield {"own": "state"}
        said.append(backend._ready)

    app = create_app(backend, lifespan=lifespan)
    assert app.state.hub is backend
    async with app.router.lifespan_context(app) as state:
        assert state == {"own": "state"}
        backend.set_executor(idle)
        key = await backend.submit({"type": "wait"})
        assert key is not None
        async with http(app) as web:
            assert (await web.get(f"/tasks/{key}")).json()["app"] == "tasks"
    assert said == [True, True]
    assert not backend._ready
    assert backend.inflight_count == 0


async def idle(task: dict[str, Any]) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"token": ""}, ValueError, "token_urlsafe"),
        ({"token": "ä"}, ValueError, "visible ASCII"),
        ({"token": "two words"}, ValueError, "visible ASCII"),
        ({"token": 7}, ValueError, "visible ASCII"),
        ({"heartbeat": 0}, ValueError, "heartbeat is a number of seconds"),
        ({"retry": True}, ValueError, "retry is a number of seconds"),
        ({"allowed_hosts": "example.org"}, TypeError, r"\['example.org'\]"),
        ({"allowed_hosts": ["https://example.org"]}, ValueError, "without scheme and port"),
        ({"allowed_hosts": ["example.org:80"]}, ValueError, "without scheme and port"),
        ({"allowed_origins": ["example.org"]}, ValueError, "scheme and host"),
        ({"allowed_origins": ["https://example.org/path"]}, ValueError, "scheme and host"),
        ({"allowed_origins": "https://example.org"}, TypeError, r"\['https://example.org'\]"),
    ],
)
async def test_bad_options_are_refused_in_words(
    hub: TaskCoordinator, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        create_app(hub, **options)


def test_what_knows_no_tasks_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match="knows no tasks"):
        create_app(object())
    with pytest.raises(TypeError, match=r"an object of it, TaskCoordinator\(\.\.\.\)"):
        create_app(TaskCoordinator)


def test_a_hub_that_cannot_be_a_key_is_refused_when_the_application_is_made() -> None:
    class Equal(TaskCoordinator):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

    with pytest.raises(TypeError, match="cannot be served: unhashable type"):
        create_app(Equal())


async def test_a_hub_that_fails_is_no_secret_and_no_page_of_a_traceback(
    hub: TaskCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object, **__: object) -> None:
        raise ConnectionError("postgres://user:password@host")

    monkeypatch.setattr(hub, "list_tasks", fails)
    transport = httpx.ASGITransport(app=app_for(hub), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as web:
        answer = await web.get("/tasks")
    assert answer.status_code == 500
    assert "password" not in answer.text


async def test_progress_of_any_work_is_in_the_list(hub: TaskCoordinator, web: httpx.AsyncClient) -> None:
    async def counts(context: TaskContext) -> None:
        await context.progress(3, 10, message="reading")

    await start(hub, counts).wait()
    (row,) = (await web.get("/tasks")).json()["tasks"]
    assert row["progress"] == {"done": 3, "total": 10}
    assert row["message"] == "reading"
