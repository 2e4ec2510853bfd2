"""Stopping: at once or after what was taken, from wherever you like, and always with the reasons."""

import asyncio
from itertools import count

from pipeline import Err, Pipeline, RunReport, TimeoutTrigger
from stages import KillSwitch, stage, tap


@stage(concurrency=4)
async def work(n: int) -> int:
    await asyncio.sleep(0.01 * (1 + n % 4))  # the first of four is done while the others are at work
    return n


@stage
def stop_at_fifty(n: int) -> int | KillSwitch:
    return KillSwitch("fifty is enough") if n == 50 else n


async def main() -> None:
    # Every pipeline here has a source without an end.
    tell("cancel() stops at once", await started_and_stopped(drain=False))
    tell("cancel(drain=True) finishes what was taken", await started_and_stopped(drain=True))

    pipeline = Pipeline(count(), cancel_on=[TimeoutTrigger(0.1)]) >> work
    tell("a trigger", await pipeline.run())

    tell("a handler that returns KillSwitch", await (Pipeline(count()) >> work >> stop_at_fifty).run())

    pipeline = Pipeline(count()) >> work
    pipeline.cancel("changed my mind")
    tell("a cancel before the start", await pipeline.run())


async def started_and_stopped(*, drain: bool) -> RunReport | Err:
    """Start a run in the background, and stop it when the first item has come through."""
    first = asyncio.Event()
    pipeline = Pipeline(count()) >> work >> tap(lambda _: first.set())
    running = asyncio.create_task(pipeline.run())
    await first.wait()
    result = await pipeline.cancel("seen enough", code="demo", drain=drain)  # resolves when everything is closed
    assert result is await running
    assert not pipeline.cancel("too late")  # falsy: it is over, and the result stays as it is
    return result


def tell(title: str, result: RunReport | Err) -> None:
    assert isinstance(result, Err)
    print(f"{title}: {', '.join(str(reason) for reason in result.reasons)}")
    if (report := result.report) is not None:
        lost = report.pulled - report.delivered
        print(f"    {report.outcome}, drained: {report.drained}; all of {report.pulled} accounted for, {lost} not finished")


if __name__ == "__main__":
    asyncio.run(main())
