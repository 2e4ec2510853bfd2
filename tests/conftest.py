"""Proves after every test that nothing is left behind.

The rule kept here: what a test starts has ended when the test has. The library's own `assert_no_leaks` is around every
test, so tasks, threads, child processes of any depth and file descriptors are counted before and after, and the loop's
exception handler must stay silent; asyncio's own log must, too.

The fixture is the first to be set up and the last to be torn down, so the event loop of an async test is closed when it
looks. Tasks are looked at earlier, when somebody closes a loop: `asyncio.run` cancels what is left, which would hide it.

A test that leaves a thread or a task behind on purpose says so, `@pytest.mark.abandons("thread")`, and ends it itself:
a thread that waits for the fixture `release` ends when the test does.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import structlog
import uvloop

from pipeline import Pipeline
from pipeline.testing import assert_no_leaks
from pipeline.testing.census import Census
from stages import stage

_KINDS = ("task", "thread", "complaint")
_SETTLE = 5.0
"""Seconds for what is on its last line: a thread that has said goodbye, a zombie that the fork server still reaps."""
_ABANDONED = 10.0
"""Seconds for what a test has abandoned, and ended."""


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: every program below would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers",
        'abandons(*kinds): the test leaves a "thread" or "task" behind on purpose, and ends it itself; or a "complaint" of a loop',
    )


def pytest_collection_finish() -> None:
    """What is there before the first test stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of the fault matrix: the last word of each row, in the order of their numbers."""
    lines = {
        report.nodeid: str(dict(report.user_properties)["matrix"])
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and "matrix" in dict(report.user_properties)
    }
    if lines:
        terminalreporter.write_line(f"\n{'':4} {'fault':75} {'injected':>8}  {'worst':>8}  outcome")
        for line in sorted(lines.values(), key=lambda line: int(line.split()[0].removeprefix("F"))):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _keepers() -> None:
    """Start what the interpreter keeps, so that no test seems to: fork server, resource tracker, libuv's signal pipe."""
    uvloop.new_event_loop().close()
    assert asyncio.run((Pipeline([-1]) >> stage(run_in="process")(abs)).collect()) == [1]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event for threads that a test abandons; set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest, _keepers: None) -> Iterator[None]:
    abandoned, children, log = _declared(request.node), set(Census().children), _AsyncioLog()
    check = assert_no_leaks(settle=_ABANDONED if abandoned else _SETTLE, tasks="task" not in abandoned)
    check.start()
    with log:
        yield
    complaints = [*check.stop(), *log.records]
    if "complaint" in abandoned:
        complaints = [text for text in complaints if not text.startswith("the loop's exception handler was called")]
    _kill(pid for pid in Census().children if pid not in children)
    if complaints:
        pytest.fail("left behind:\n" + "\n".join(f"  {text}" for text in complaints), pytrace=False)


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """structlog's `capture_logs` leaves it configured, and the library then logs elsewhere."""
    yield
    structlog.reset_defaults()


def _declared(node: pytest.Item) -> set[str]:
    kinds = {kind for marker in node.iter_markers("abandons") for kind in marker.args}
    assert kinds <= set(_KINDS), f"abandons() takes {_KINDS}, not {sorted(kinds)}"
    return kinds


def _kill(pids: Iterator[int]) -> None:
    for pid in list(pids):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class _AsyncioLog(logging.Handler):
    """Hears what asyncio logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[str] = []

    def __enter__(self) -> None:
        logging.getLogger("asyncio").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("asyncio").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not message.startswith("Executing "):  # a callback that took long: it is the machine that did, as often as not
            self.records.append(f"asyncio has logged: {message}")
