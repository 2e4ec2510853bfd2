"""Testing a pipeline of your own: waits that take no time, nothing left behind, and every step a victim."""

import asyncio
from collections.abc import Coroutine

from pipeline import Pipeline, RunReport, is_err
from pipeline.testing import assert_balanced, assert_no_leaks, explore, run_virtual
from stages import Retry, batch, stage

locked: list[str] = []


@stage(concurrency=2, timeout=60, retry=Retry(attempts=3, wait=10, jitter=0))
async def fetch(page: int) -> str:
    await asyncio.sleep(50 if page % 4 == 0 else 5)
    if page == 3:
        raise ConnectionError("page 3 is never there")
    return f"page {page}"


@stage
async def store(pages: list[str]) -> int:
    locked.append("the database")
    await asyncio.sleep(1)
    locked.remove("the database")  # not when the line above was cancelled: a fault, for the explorer to find
    return len(pages)


@stage
async def store_safely(pages: list[str]) -> int:
    locked.append("the database")
    try:
        await asyncio.sleep(1)
    finally:
        locked.remove("the database")
    return len(pages)


def job() -> Pipeline[int]:
    return Pipeline(range(6)) >> fetch >> batch(2, within=30) >> store


def safe_job() -> Pipeline[int]:
    return Pipeline(range(6)) >> fetch >> batch(2, within=30) >> store_safely


def test_a_minute_of_waits_and_retries() -> None:
    async def main() -> tuple[RunReport, float]:
        report = await safe_job().run()
        assert not is_err(report)
        return report, asyncio.get_running_loop().time()

    with assert_no_leaks():
        report, seconds = run_virtual(main())
    assert_balanced(report)
    assert report.stage("fetch").retried == 2
    print(f"a run of {seconds:.0f} seconds, waits and retries included, in no time")


def test_every_step() -> None:
    print("the safe one:", explore(lambda: checked(safe_job()), schedules=2))


def test_that_the_explorer_finds_the_fault() -> None:
    try:
        explore(lambda: checked(job()))
    except AssertionError as found:
        print("the other one:", found)
    else:
        raise AssertionError("nothing was found")


def checked(pipeline: Pipeline[int]) -> tuple[Pipeline[int], Coroutine[None, None, None]]:
    """A pipeline, and what runs it and then looks."""
    locked.clear()
    return pipeline, run_and_look(pipeline)


async def run_and_look(pipeline: Pipeline[int]) -> None:
    try:
        await pipeline.run()
    finally:
        assert not locked, f"{locked[0]} is still locked"


if __name__ == "__main__":
    test_a_minute_of_waits_and_retries()
    test_every_step()
    test_that_the_explorer_finds_the_fault()
