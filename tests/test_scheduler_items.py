"""Which items of a stage hold resources: those that are at work, no fewer and no more.

The rule kept here: handlers stand at a gate while a snapshot is looked at.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT, Flag, eventually, settled

from pipeline import Pipeline
from pipeline.scheduler import Scheduler
from pipeline.testing import run_virtual
from stages import Retry, stage


@pytest.mark.parametrize("place", ["loop", "thread", "process"])
async def test_items_that_wait_for_a_worker_hold_nothing_however_much_is_free(place: str, tmp_path: Path) -> None:
    scheduler, opened = Scheduler(resources={"gpu": 5}), Flag(tmp_path / "opened")

    async def in_loop(item: int) -> int:
        await eventually(opened.is_set)
        return item

    def elsewhere(item: int) -> int:
        opened.wait(LIMIT)
        return item

    options: dict[str, Any] = {"run_in": place, "concurrency": 2, "buffer": 4, "resources": {"gpu": 1}}
    pipeline = Pipeline(range(20), scheduler=scheduler) >> stage(**options)(in_loop if place == "loop" else elsewhere)
    run = asyncio.create_task(pipeline.collect())
    await eventually(lambda: scheduler.snapshot().resource("gpu").in_use == 2)
    assert await settled(lambda: scheduler.snapshot().resource("gpu").in_use) == 2
    opened.set()
    result = await run
    assert isinstance(result, list)
    assert sorted(result) == list(range(20))
    assert scheduler.snapshot().resource("gpu").free == 5


def test_an_item_that_waits_for_its_next_attempt_keeps_what_it_holds() -> None:
    scheduler, held = Scheduler(resources={"gpu": 1}), []

    async def fail_once(item: int, state: Any) -> int:
        if state.attempt == 1:
            asyncio.get_running_loop().call_later(5, lambda: held.append(scheduler.snapshot().resource("gpu").in_use))
            raise ValueError(item)
        return item

    work = stage(resources={"gpu": 1}, retry=Retry(2, wait=10, jitter=0))(fail_once)
    assert run_virtual((Pipeline([7], scheduler=scheduler) >> work).collect()) == [7]
    assert held == [1]
    assert scheduler.snapshot().resource("gpu").free == 1


def test_a_scheduler_that_is_closed_leaves_running_pipelines_what_they_need() -> None:
    scheduler, seen = Scheduler(resources={"gpu": 1}), []

    async def close(item: int) -> int:
        if item == 1:
            closer = threading.Thread(target=scheduler.close)
            closer.start()
            await eventually(lambda: not closer.is_alive())
            seen.append(scheduler.closed())
        return item

    work = stage(concurrency=3, resources={"gpu": 1})(close)
    assert asyncio.run((Pipeline(range(4), scheduler=scheduler) >> work).collect()) == [0, 1, 2, 3]
    assert seen == [True]
    assert scheduler.snapshot().resource("gpu").free == 1
