"""The page, in a real browser: what it shows, what it can be told, and that everybody can use it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from browsing import MISSING, Browsing, browsing, find_browser, in_browser
from helpers import Program
from playwright.async_api import Page, expect
from serving import CLI, served

SERVICE = """
    import asyncio
    from starlette.responses import JSONResponse
    from starlette.routing import Mount, Route
    from pipeline import ErrorPolicy, Pipeline
    from pipeline.tasks import TaskCoordinator, create_app
    from pipeline.tasks.web.sse import streams_of
    from stages import stage

    hub = TaskCoordinator(progress_interval=0.05)
    MARKUP = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"

    @stage(concurrency=4)
    async def fetch(n):
        await asyncio.sleep(0.002)
        return n

    @stage(concurrency=2, on_error=ErrorPolicy.SIDE, error_handler=lambda err: None)
    async def store(n):
        await asyncio.sleep(0.004)
        if n % 10 == 9:
            raise ValueError("every tenth")

    def endless():
        return Pipeline(iter(range(10**9)), name="books") >> fetch >> store

    async def waits():
        await asyncio.Event().wait()

    async def once():
        pass

    async def marked(context):
        await context.warning(MARKUP, more=MARKUP)
        await context.item({MARKUP: MARKUP})
        raise ValueError(MARKUP)

    async def stages(context):
        await context.send_event("started", {"stages": 3})
        await context.progress(1, 3, stages=[None], message="of my own")
        await waits()

    async def burst(context):
        for number in range(900):
            await context.item(number)

    async def counting(context):
        await context.progress(30, 120, message="reading lines")
        await waits()

    WORK = {"pipeline": endless, "waits": lambda: waits, "marked": lambda: marked, "stages": lambda: stages, "burst": lambda: burst,
            "once": lambda: once, "counting": lambda: counting}

    async def begin(request):
        name, id = request.path_params["name"], request.query_params["id"]
        for number in range(int(request.query_params.get("times", "1"))):
            hub.start_task("shop", name, id if number == 0 else f"{id} {number}", WORK[name]())
        return JSONResponse({})

    async def streams(request):
        return JSONResponse(len(streams_of(hub)))

    async def make():
        hub.start_task("shop", "pipeline", "first", endless())
        own = [Route("/begin/{name}", begin, methods=["POST"]), Route("/streams", streams)]
        return create_app(hub, title="Jobs", routes=[*own, Mount("/locked", create_app(hub, token="sesame"))], retry=0.05)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browsing]:
    executable = find_browser()
    if executable is None:
        pytest.skip(MISSING)
    with browsing(executable, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("service"), SERVICE, target="program:make") as (_, url):
        yield url


@pytest.fixture
def page(browser: Browsing) -> Iterator[Page]:
    with opened(browser) as page:
        yield page


@contextmanager
def opened(browser: Browsing, **options: object) -> Iterator[Page]:
    """A page; what its scripts or its policy complain about fails the test."""
    complaints: list[str] = []

    async def open() -> Page:
        page = await browser.tab(**options)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None)
        return page

    page = browser.run(open())
    yield page
    browser.run(page.context.close())
    assert complaints == []


def begin(url: str, name: str, id: str, times: int = 1) -> str:
    """Start a task; the address of its page."""
    httpx.post(f"{url}/begin/{name}", params={"id": id, "times": times}).raise_for_status()
    return f"{url}/#/shop/{name}/{id}"


# --- what it shows


@in_browser
async def test_a_running_pipeline_is_shown_and_its_numbers_move(page: Page, url: str) -> None:
    await page.goto(url)
    await page.get_by_role("link", name="pipeline first").click()
    await expect(page.get_by_role("heading", name="pipeline first")).to_be_visible()
    await expect(page.locator("#state")).to_have_text("running")
    await expect(page.locator("#chain .title")).to_have_text(["fetch", "store"])
    await expect(page.locator("#chain .where")).to_have_text(["event loop × 4", "event loop × 2"])
    row = page.get_by_role("row", name="store")
    received = row.get_by_role("cell").first
    before = await numbers(received)
    await page.wait_for_function("([cell, before]) => Number(cell.textContent.replaceAll(',', '')) > before + 50", arg=[await received.element_handle(), before])
    cells = await row.get_by_role("cell").all_text_contents()
    assert len(cells) == 9
    assert await numbers(row.get_by_role("cell").nth(4)) > 0  # failed
    assert "busy" in cells[-1]
    await expect(page.locator("#chain [data-limit=true] .title")).to_have_text("store")


async def numbers(cell: object) -> int:
    text = await cell.text_content()  # type: ignore[attr-defined]
    return int(text.replace(",", "")) if text and text != "–" else 0


@in_browser
async def test_progress_of_other_work_is_a_bar_with_words(page: Page, url: str) -> None:
    await page.goto(begin(url, "counting", "lines"))
    bar = page.get_by_role("progressbar", name="Progress")
    await expect(bar).to_have_attribute("value", "30")
    await expect(bar).to_have_attribute("max", "120")
    await expect(page.locator("#done")).to_have_text("30 of 120  reading lines")


@in_browser
async def test_markup_in_the_data_of_a_task_is_text(page: Page, url: str) -> None:
    await page.goto(begin(url, "marked", "<b>1<"))
    await expect(page.locator("#reasons strong")).to_have_text("<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>")
    await expect(page.locator("#events > li")).to_have_count(4)
    for summary in await page.locator("#events summary").all():
        await summary.click()
    await expect(page.locator("#events pre").first).to_contain_text("<script>window.hacked=1</script>")
    await expect(page.locator("#name")).to_have_text("marked <b>1<")
    assert await page.locator("#task img, #task script, nav img, nav script, nav b, #task b").count() == 0
    assert await page.evaluate("window.hacked") is None


@in_browser
async def test_data_that_only_looks_like_a_pipeline_is_shown_as_what_it_is(page: Page, url: str) -> None:
    await page.goto(begin(url, "stages", "own"))
    await expect(page.locator("#done")).to_contain_text("1 of 3 of my own")
    await expect(page.locator("#pipeline")).to_be_hidden()
    await expect(page.locator("#events > li")).to_have_count(2)
    await expect(page.locator("#events")).to_contain_text('{"stages":3}')


@in_browser
async def test_a_burst_of_events_is_drawn_now_and_then_and_kept_within_bounds(page: Page, url: str) -> None:
    await page.goto(url)
    await page.evaluate(
        """() => {
            window.draws = 0;
            new MutationObserver(() => { window.draws += 1; }).observe(document.getElementById("events"), { childList: true });
        }"""
    )
    await page.goto(begin(url, "burst", "1"))
    await expect(page.locator("#state")).to_have_text("completed")
    await expect(page.locator("#kept")).to_have_text("the newest 200 of 902")
    assert await page.locator("#events > li").count() == 200
    await expect(page.locator("#events > li").first).to_contain_text("completed")
    assert await page.evaluate("window.draws") < 60


# --- cancelling


@in_browser
async def test_a_task_is_cancelled_with_a_reason_by_keyboard_alone_and_everybody_sees_it(page: Page, url: str) -> None:
    begin(url, "waits", "keyboard")
    other = await page.context.new_page()
    await other.goto(f"{url}/#/shop/waits/keyboard")
    await page.goto(url)
    await expect(page.get_by_role("link", name="waits keyboard")).to_be_visible()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the task")).to_be_focused()
    await page.keyboard.press("Tab")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("searchbox", name="Find tasks")).to_be_focused()
    await page.keyboard.type("keyboard")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="waits keyboard")).to_be_focused()
    assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    await page.keyboard.press("Enter")
    await expect(page.locator("#state")).to_have_text("running")
    await expect(page.get_by_role("link", name="waits keyboard")).to_have_attribute("aria-current", "page")
    await page.keyboard.press("Tab")
    await expect(page.get_by_label("Reason")).to_be_focused()
    await page.keyboard.type("the wrong <b>file</b>")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("button", name="Cancel task")).to_be_focused()
    await page.keyboard.press("Enter")
    for tab in (page, other):
        await expect(tab.locator("#state")).to_have_text("cancelled")
        await expect(tab.get_by_role("region", name="Why it stopped")).to_contain_text("the wrong <b>file</b>")
        await expect(tab.get_by_role("status")).to_have_text("The task was cancelled.")
        await expect(tab.locator("#cancel")).to_be_hidden()


@in_browser
async def test_the_token_is_asked_for_where_one_is_needed(page: Page, url: str) -> None:
    begin(url, "waits", "locked")
    await page.goto(f"{url}/locked/#/shop/waits/locked")
    await page.get_by_label("Token").fill("wrong")
    await page.get_by_label("Reason").fill("enough")
    await page.get_by_role("button", name="Cancel task").click()
    await expect(page.get_by_role("status")).to_have_text("Not cancelled: this token is not the right one.")
    await expect(page.get_by_label("Token")).to_be_focused()
    await page.get_by_label("Token").fill("sesame")
    await page.keyboard.press("Enter")
    await expect(page.locator("#state")).to_have_text("cancelled")
    await expect(page.locator("#reasons")).to_contain_text("enough")
    begin(url, "waits", "locked too")
    await page.goto(f"{url}/locked/#/shop/waits/locked%20too")
    await expect(page.get_by_label("Token")).to_have_value("sesame")


# --- connections


@in_browser
async def test_a_task_that_is_started_again_is_followed_again(page: Page, url: str) -> None:
    await page.goto(begin(url, "once", "1"))
    await expect(page.locator("#state")).to_have_text("completed")
    begin(url, "once", "1")
    await expect(page.locator("#events > li")).to_have_count(4)
    await expect(page.locator("#events .seq")).to_have_text(["4", "3", "2", "1"])


@in_browser
async def test_a_page_that_nobody_looks_at_holds_no_connection_and_goes_on_later(page: Page, url: str) -> None:
    await page.goto(begin(url, "waits", "hidden"))
    await expect(page.locator("#events > li")).to_have_count(1)
    assert httpx.get(f"{url}/streams").json() == 1
    await page.evaluate("Object.defineProperty(document, 'hidden', { get: () => window.away, configurable: true })")
    await page.evaluate("window.away = true; document.dispatchEvent(new Event('visibilitychange'))")
    await drained(page, url)
    httpx.post(f"{url}/tasks/shop/waits/hidden/cancel", json={"reason": "meanwhile"})
    await page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator("#state")).to_have_text("cancelled")
    await expect(page.locator("#events .seq")).to_have_text(["2", "1"])


async def drained(page: Page, url: str) -> None:
    for _ in range(200):
        if httpx.get(f"{url}/streams").json() == 0:
            return
        await page.wait_for_timeout(10)
    raise AssertionError("the stream is still open")


def test_the_page_comes_back_when_the_server_does(browser: Browsing, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("restarted")
    with opened(browser) as page:
        with served(folder, SERVICE, target="program:make") as (program, url):
            browser.run(watch(page, f"{url}/#/shop/pipeline/first"))
            program.interrupt(signal.SIGKILL)
            browser.run(_expect(page, "connection lost, trying again"))
        port = str(urlsplit(url).port)
        with Program(folder, SERVICE, "serve", "program:make", "--port", port, interpreter=CLI) as program:
            program.says("serving")
            browser.run(_expect(page, "live"))
            browser.run(watch(page, None))


async def watch(page: Page, url: str | None) -> None:
    """See the numbers move."""
    if url is not None:
        await page.goto(url)
    cell = page.get_by_role("row", name="fetch").get_by_role("cell").first
    await expect(cell).not_to_have_text("–")
    text = await cell.text_content()
    await expect(cell).not_to_have_text(text or "")


async def _expect(page: Page, text: str) -> None:
    await expect(page.locator("#link")).to_have_text(text)


# --- everybody


@in_browser
async def test_everything_has_a_name_a_role_and_enough_contrast(page: Page, url: str) -> None:
    begin(url, "marked", "for all")
    for path in ("/", "/#/shop/pipeline/first", "/#/shop/marked/for%20all"):
        await page.goto(url + path)
        await expect(page.locator("#tasks > li").first).to_be_visible()
        if "#" in path:
            await expect(page.locator("#events > li").first).to_be_visible()
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await page.evaluate(AUDIT) == [], f"{scheme} {path}"


AUDIT = """() => {
  const found = [];
  const seen = (element) => element.checkVisibility({ visibilityProperty: true });
  const all = (selector) => [...document.querySelectorAll(selector)].filter(seen);
  const name = (element) => (element.getAttribute("aria-label")
    || (element.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join("")
    || [...(element.labels ?? [])].map((label) => label.textContent).join("") || (/^(INPUT|PROGRESS)$/.test(element.tagName) ? "" : element.textContent)).trim();
  if (!document.documentElement.lang) found.push("no language");
  if (!document.title) found.push("no title");
  for (const element of all("a, button, input, progress, summary, nav, section, [role=region]")) if (!name(element)) found.push(`no name: ${element.outerHTML.slice(0, 80)}`);
  if (all("h1").length !== 1 || all("main").length !== 1 || all("nav").length !== 1) found.push("not one h1, main and nav");
  let before = 0;
  for (const heading of all("h1, h2, h3, h4")) {
    const level = Number(heading.tagName[1]);
    if (level > before + 1) found.push(`a level left out at ${heading.textContent}`);
    before = level;
  }
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size !== ids.length) found.push("an id twice");
  for (const table of all("table")) if (table.querySelector("th:not([scope])")) found.push("a header without scope");
  for (const element of all("[tabindex]")) if (element.tabIndex > 0) found.push("an order of its own");
  for (const element of all("pre, .scroll")) if (element.tabIndex !== 0) found.push("cannot be scrolled by keyboard");

  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (color) => [...parts(color)].slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (parts(color)[3] === 255) return color;
    }
    return "white";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !seen(element) || /^(SCRIPT|STYLE|NOSCRIPT)$/.test(element.tagName)) continue;
    const [one, two] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (two + 0.05);
    if (contrast < 4.5) found.push(`contrast ${contrast.toFixed(2)}: ${walker.currentNode.textContent.slice(0, 40)}`);
  }
  return [...new Set(found)];
}"""


@in_browser
@pytest.mark.parametrize("path", ["../../streams", "%2e%2e/%2E./streams", "shop/waits", "shop/waits/../x", "//streams"])
async def test_an_address_leads_to_tasks_and_nowhere_else(page: Page, url: str, path: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    await page.goto(f"{url}/#/{path}")
    async with page.expect_response(lambda response: "/tasks?" in response.url):  # the next list, when all else was asked for
        pass
    await expect(page.locator("#blank")).to_be_visible()
    await expect(page.locator("#task")).to_be_hidden()
    assert [path for path in asked if path not in ("/", "/tasks") and not path.startswith("/static/")] == []


@in_browser
async def test_a_narrow_screen_shows_the_list_or_the_task(page: Page, url: str) -> None:
    await page.set_viewport_size({"width": 390, "height": 800})
    await page.goto(url)
    await page.get_by_role("link", name="pipeline first").click()
    await expect(page.get_by_role("heading", name="pipeline first")).to_be_visible()
    await expect(page.locator("#tasks")).to_be_hidden()
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await page.get_by_role("link", name="All tasks").click()
    await expect(page.locator("#tasks")).to_be_visible()
    await expect(page.locator("#task")).to_be_hidden()


@in_browser
async def test_the_newest_five_hundred_tasks_are_listed_and_found(page: Page, url: str) -> None:
    begin(url, "waits", "many", times=520)
    await page.goto(url)
    await expect(page.locator("#count")).to_have_text(re.compile(r"^the newest 500 tasks, \d+ not over$"))
    link = page.get_by_role("link", name="waits many 323")
    await link.focus()
    await page.evaluate("document.activeElement.dataset.mine = 'yes'")
    await page.get_by_role("searchbox", name="Find tasks").fill("many 323")
    await expect(page.locator("#tasks > li:visible")).to_have_count(1)
    await expect(page.locator("#count")).to_have_text("1 of the newest 500 shown")
    async with page.expect_response(lambda response: "/tasks?" in response.url):
        pass
    assert await link.get_attribute("data-mine") == "yes"  # a link stays the same element from one list to the next


def test_without_a_browser_the_tests_say_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", "nowhere")
    assert find_browser() is None
    assert "make browser" in MISSING
