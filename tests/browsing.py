"""A headless Chromium for tests of the page, one for a whole module.

The rule kept here: the tests' own leak check stays as it is. The browser starts processes whenever it likes, so it belongs
to a keeper that is no child of ours: the keeper ends the browser when we close a pipe, or when we die. Playwright, with
which pages are driven, is a child that has none, on a loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import functools
import glob
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from helpers import LIMIT, until
from playwright.async_api import Browser, Page, async_playwright

T = TypeVar("T")

MISSING = "no Chromium is installed; to install one: make browser"

_OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--hide-scrollbars",
    "about:blank",
)

_KEEPER = """
import os, signal, subprocess, sys
pipe, profile, log, *command = sys.argv[1:]
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
with open(log, "wb") as output:
    browser = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    for number in (0, 1, 2):
        os.dup2(output.fileno(), number)
while os.read(int(pipe), 1):
    pass
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
try:
    browser.wait(5)
except subprocess.TimeoutExpired:
    pass
os.unlink(profile + "/DevToolsActivePort") if os.path.exists(profile + "/DevToolsActivePort") else None
os.killpg(0, signal.SIGKILL)
"""


def find_browser() -> str | None:
    """The browser of this machine, or Playwright's own."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path is not None:
            return path
    folder = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or str(Path.home() / ".cache" / "ms-playwright")
    own = sorted(glob.glob(f"{folder}/chromium-*/chrome-linux*/chrome"))
    return own[-1] if own else None


class Browsing:
    """A browser, and the loop on which it is driven."""

    current: ClassVar[Browsing | None] = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.browser: Browser | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do this on the browser's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, LIMIT), self.loop).result(LIMIT + 5)

    async def tab(self, **options: Any) -> Page:
        """A fresh page, with nothing of others."""
        assert self.browser is not None
        context = await self.browser.new_context(**options)
        context.set_default_timeout(LIMIT * 1000)
        return await context.new_page()


def in_browser(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test on the browser's loop."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        assert Browsing.current is not None
        Browsing.current.run(_coroutine(test(**fixtures)))

    return run


@contextmanager
def browsing(executable: str, folder: Path) -> Iterator[Browsing]:
    """A browser and its thread, until the block is left."""
    with _kept(executable, folder) as endpoint, _loop() as loop:
        found = Browsing(loop)
        stop: asyncio.Event | None = None
        ready = threading.Event()

        async def hold() -> None:
            nonlocal stop
            stop = asyncio.Event()
            async with async_playwright() as playwright:
                found.browser = await playwright.chromium.connect_over_cdp(endpoint)
                ready.set()
                await stop.wait()
                await found.browser.close()

        holding = asyncio.run_coroutine_threadsafe(hold(), loop)
        try:
            until(lambda: ready.is_set() or holding.done())
            if holding.done():
                holding.result()
            Browsing.current = found
            yield found
        finally:
            Browsing.current = None
            if stop is not None and not holding.done():
                loop.call_soon_threadsafe(stop.set)
            holding.result(LIMIT)


@contextmanager
def _kept(executable: str, folder: Path) -> Iterator[str]:
    """A browser with its keeper; the address at which it can be driven."""
    theirs, ours = os.pipe()
    port = folder / "DevToolsActivePort"
    try:
        command = (executable, *_OPTIONS[:-1], f"--user-data-dir={folder}", _OPTIONS[-1])
        subprocess.run(
            [sys.executable, "-c", _KEEPER, str(theirs), str(folder), str(folder / "log"), *command],
            pass_fds=(theirs,),
            check=True,
            timeout=LIMIT,
        )
        until(lambda: port.exists() and port.read_text().count("\n"))
        number, path = port.read_text().split()[:2]
        yield f"ws://127.0.0.1:{number}{path}"
    finally:
        os.close(theirs)
        os.close(ours)
        until(lambda: not port.exists())


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="browsing")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LIMIT)
        loop.close()


async def _coroutine(work: Awaitable[T]) -> T:
    return await work
