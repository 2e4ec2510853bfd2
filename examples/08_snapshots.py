"""Watching: `snapshot()` tells where every item is while the pipeline runs, and `explain()` what became of them."""

import asyncio

from pipeline import Pipeline, PipelineSnapshot, is_err
from stages import batch, stage


@stage(concurrency=10)
async def fetch(n: int) -> int:
    await asyncio.sleep(0.01)
    return n


@stage(concurrency=2, buffer=20)
async def store(_numbers: list[int]) -> None:
    await asyncio.sleep(0.05)  # the slow one: watch the queue in front of it


def line(snapshot: PipelineSnapshot) -> str:
    stages = ", ".join(f"{s.name}: {s.queued} waiting, {s.in_flight} in work, {s.processed} done" for s in snapshot.stages)
    return f"{snapshot.elapsed:.1f} s  {snapshot.state.value:<8} {snapshot.pulled:>3} pulled; {stages}"


async def main() -> None:
    pipeline = Pipeline(range(600)) >> fetch >> batch(10) >> store
    running = asyncio.create_task(pipeline.run())
    while not running.done():
        print(line(pipeline.snapshot()))
        await asyncio.wait([running], timeout=0.2)

    report = await running
    assert not is_err(report)
    print(line(pipeline.snapshot()))
    print()
    print(report.explain())


if __name__ == "__main__":
    asyncio.run(main())
