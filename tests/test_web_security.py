"""Who may ask: the token, other sites, and hosts that are somebody else's names for this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from serving import HOST, app_for, http
from starlette.middleware.cors import CORSMiddleware
from tasking import Held

from pipeline.tasks import TaskCoordinator
from pipeline.tasks.web.guard import ADDRESSES, allowed_names, host_of

TOKEN = "kXr0-bQ_7c"
CANCEL = "/tasks/shop/Import/7/cancel"


@pytest.fixture
async def hub() -> AsyncIterator[TaskCoordinator]:
    async with TaskCoordinator() as hub:
        hub.start_task("shop", "Import", 7, Held())
        yield hub


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# --- the token


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(""), bearer("wrong"), bearer(TOKEN[:-1]), bearer(TOKEN + "x"), {"Authorization": f"Basic {TOKEN}"}, {"Authorization": TOKEN}],
    ids=["none", "empty", "wrong", "shorter", "longer", "basic", "bare"],
)
async def test_cancelling_needs_the_token_that_is_configured(hub: TaskCoordinator, headers: dict[str, str]) -> None:
    async with http(app_for(hub, token=TOKEN)) as web:
        answer = await web.post(CANCEL, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith('Bearer realm="tasks"')
    assert "Authorization: Bearer" in answer.json()["error"]
    assert TOKEN not in answer.text
    assert (await hub.get_task("shop", "Import", 7)).reasons == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_with_the_token_a_task_is_cancelled(hub: TaskCoordinator, scheme: str) -> None:
    async with http(app_for(hub, token=TOKEN)) as web:
        answer = await web.post(CANCEL, headers={"Authorization": f"{scheme} {TOKEN}"})
    assert answer.json() == {"cancelled": True}


async def test_a_token_in_other_bytes_than_ascii_is_a_wrong_one(hub: TaskCoordinator) -> None:
    async with http(app_for(hub, token=TOKEN)) as web:
        answer = await web.post(CANCEL, headers={b"Authorization": "Bearer ä€".encode()})
    assert answer.status_code == 401


async def test_who_has_no_token_does_not_learn_which_tasks_can_be_cancelled(hub: TaskCoordinator) -> None:
    async with http(app_for(hub, token=TOKEN)) as web:
        answers = [await web.post(CANCEL), await web.post(CANCEL.replace("7", "8"))]
    assert answers[0].status_code == answers[1].status_code == 401
    assert answers[0].text == answers[1].text


async def test_looking_needs_no_token_and_the_page_is_told_that_cancelling_does(hub: TaskCoordinator) -> None:
    for token in (TOKEN, None):
        async with http(app_for(hub, token=token)) as web:
            answer = await web.get("/tasks")
        assert answer.json()["token_required"] is (token is not None)


# --- other sites


def fetch(site: str, *, origin: str | None = None, mode: str = "cors", dest: str = "empty") -> dict[str, str]:
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
    return headers if origin is None else {**headers, "Origin": origin}


ELSEWHERE = [
    fetch("cross-site"),
    fetch("same-site"),
    fetch("cross-site", origin="https://evil.example"),
    fetch("cross-site", origin="null", mode="no-cors"),
    fetch("cross-site", mode="navigate", dest="document"),  # a form that posts
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": f"http://{HOST}:8080"},
    {"Origin": f"http://{HOST}.evil.example"},
    {"Origin": f"http://evil.example/{HOST}"},
    {"Origin": "http://["},
    {"Origin": ""},
]


@pytest.mark.parametrize("headers", ELSEWHERE)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
async def test_a_page_of_another_site_cancels_nothing(hub: TaskCoordinator, headers: dict[str, str], kind: str) -> None:
    async with http(app_for(hub)) as web:
        answer = await web.post(CANCEL, content=b'{"reason": "x"}', headers={**headers, "Content-Type": kind})
    assert answer.status_code == 403
    assert "allowed_origins" in answer.json()["error"]
    assert "access-control-allow-origin" not in answer.headers
    assert (await hub.get_task("shop", "Import", 7)).reasons == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("url", ["/tasks", "/tasks/shop/Import/7", "/tasks/shop/Import/7/events"])
async def test_a_page_of_another_site_reads_nothing(hub: TaskCoordinator, url: str) -> None:
    async with http(app_for(hub)) as web:
        for headers in (fetch("cross-site", origin="https://evil.example"), fetch("cross-site", mode="no-cors", dest="script")):
            assert (await web.get(url, headers=headers)).status_code == 403
        assert (await web.get("/", headers=fetch("cross-site", mode="navigate", dest="iframe"))).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [fetch("same-origin"), fetch("same-origin", origin=f"https://{HOST}"), fetch("none"), {"Origin": f"http://{HOST}"}, {"Origin": f"HTTP://{HOST}:80"}, {}],
)
async def test_the_page_itself_and_programs_may_cancel(hub: TaskCoordinator, headers: dict[str, str]) -> None:
    async with http(app_for(hub)) as web:
        assert (await web.post(CANCEL, headers=headers)).json() == {"cancelled": True}


async def test_a_link_on_another_site_leads_to_the_page(hub: TaskCoordinator) -> None:
    async with http(app_for(hub)) as web:
        answer = await web.get("/", headers=fetch("cross-site", mode="navigate", dest="document"))
    assert answer.status_code == 200


async def test_an_allowed_origin_may_cancel(hub: TaskCoordinator) -> None:
    async with http(app_for(hub, allowed_origins=["https://App.example.org"])) as web:
        answer = await web.post(CANCEL, headers=fetch("cross-site", origin="https://app.example.org"))
        refused = await web.post(CANCEL, headers=fetch("cross-site", origin="https://app.example.org.evil.example"))
    assert answer.json() == {"cancelled": True}
    assert refused.status_code == 403


async def test_a_page_of_an_allowed_site_reads_and_cancels_through_cors(hub: TaskCoordinator) -> None:
    site = "https://app.example.org"
    app = app_for(hub, token=TOKEN, allowed_origins=[site])
    allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["Authorization", "Content-Type"]}
    app.add_middleware(CORSMiddleware, allow_origins=[site], **allowed)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    async with http(app) as web:
        answers = [
            await web.options(CANCEL, headers=fetch("cross-site", origin=site) | asked),
            await web.get("/tasks", headers=fetch("cross-site", origin=site)),
            await web.post(CANCEL, json={}, headers=fetch("cross-site", origin=site) | bearer(TOKEN)),
        ]
    assert [(answer.status_code, answer.headers["Access-Control-Allow-Origin"]) for answer in answers] == [(200, site)] * 3


# --- hosts


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("tasks.example.org", 200),
        ("TASKS.example.org:8443", 200),
        ("tasks.example.org.", 200),
        ("a.b.internal", 200),
        ("internal", 421),
        ("xinternal", 421),
        ("localhost", 421),
        ("evil.example", 421),
        ("tasks.example.org.evil.example", 421),
        ("127.0.0.1:8000", 421),
        ("", 421),
        ("[::1]:8000", 421),
    ],
)
async def test_only_allowed_hosts_are_served(hub: TaskCoordinator, host: str, status: int) -> None:
    async with http(app_for(hub, allowed_hosts=["tasks.example.org", "*.internal"])) as web:
        answer = await web.get("/tasks", headers={"Host": host})
    assert answer.status_code == status
    if status == 421:
        assert "--allowed-host" in answer.json()["error"]


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("10.1.2.3", 200), ("rebound.evil.example", 421), ("127.0.0.1.evil.example", 421)])
async def test_an_address_cannot_be_rebound(hub: TaskCoordinator, host: str, status: int) -> None:
    async with http(app_for(hub, allowed_hosts=[ADDRESSES])) as web:
        assert (await web.get("/tasks", headers={"Host": host})).status_code == status


def test_hosts_are_read_as_browsers_write_them() -> None:
    assert [host_of(text) for text in ("A.b:80", "[::1]:80", "[::1]", "::1", "a.", "")] == ["a.b", "::1", "::1", "::1", "a", ""]
    assert allowed_names(["*", "a"]) is None
    assert allowed_names(["[::1]", "A.B"]) == {"::1", "a.b"}


async def test_every_answer_is_marked_as_what_it_is(hub: TaskCoordinator) -> None:
    async with http(app_for(hub)) as web:
        answers: list[httpx.Response] = [
            await web.get("/tasks"),
            await web.get("/nothing"),
            await web.get("/"),
            await web.get("/static/page.js"),
            await web.post(CANCEL, headers={"Origin": "null"}),
        ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.headers
