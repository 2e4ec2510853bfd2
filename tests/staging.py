"""What the tests of the scheduler share: pipelines written as one function, and functions that wait until they are let go.

The rule kept here: nothing waits without a deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from helpers import LIMIT

from pipeline.scheduler import PipelineHandle, Scheduler, StagedPipeline
from pipeline.scheduler.claim import Claim, Group, Phase


class Body(StagedPipeline):
    """A pipeline whose `run()` is the function it was given; that gets the pipeline."""

    def __init__(self, body: Callable[[StagedPipeline], Any]) -> None:
        self.body = body

    def run(self) -> Any:
        return self.body(self)


class Latch:
    """A function that says when it has begun, and returns `value` when it is let go."""

    def __init__(self, value: Any = None) -> None:
        self.value = value
        self.began = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, *_: Any) -> Any:
        self.began.set()
        assert self.let_go.wait(LIMIT)
        return self.value

    def wait_begun(self) -> None:
        assert self.began.wait(LIMIT)


class Work(Claim):
    """Work for an engine, without anything to it."""

    title, group = "work", None  # type: ignore[assignment]

    def __init__(self, group: Group, needs: Any, key: Any, threaded: bool = False) -> None:
        self.group, self.needs, self.key, self.threaded = group, needs, key, threaded
        self.phase, self.behind = Phase.WAITING, None

    def granted(self) -> None:
        raise AssertionError("an engine tells nobody")


def run_body(body: Callable[[StagedPipeline], Any], **options: Any) -> Any:
    """The result of one pipeline in a scheduler of its own."""
    with Scheduler(**{"resources": {"cpu": 4, "mem": 8}, "task_parallelism": 4, **options}) as scheduler:
        return submit(scheduler, body).result(LIMIT)


def submit(scheduler: Scheduler, body: Callable[[StagedPipeline], Any], **options: Any) -> PipelineHandle:
    return scheduler.run_pipeline(Body(body), **options)


def boom(*_: Any) -> None:
    raise LookupError("boom")


def nothing() -> None:
    pass
