"""What becomes of an item that fails: four policies, a limit, and another try.

The library also logs failures, at most one record a second and stage; they are the lines on stderr.
"""

import asyncio

from pipeline import Err, ErrorPolicy, Pipeline, is_err
from stages import Retry, stage
from workers import WorkerState

WORDS = ["1", "2", "three", "4", "five"]


def to_number(word: str) -> int:
    return int(word)


async def main() -> None:
    drop = stage(on_error=ErrorPolicy.DROP)(to_number)
    print("DROP goes on without the item:  ", await (Pipeline(WORDS) >> drop).collect())

    emit = stage(on_error=ErrorPolicy.EMIT)(to_number)
    print("EMIT sends an Err in its place: ", await (Pipeline(WORDS) >> emit).collect())

    refused: list[Err] = []
    side = stage(on_error=ErrorPolicy.SIDE, error_handler=refused.append)(to_number)
    print("SIDE hands it to your function: ", await (Pipeline(WORDS) >> side).collect())
    print("                                ", [f"{err.item!r}: {err.value}" for err in refused])

    stop = stage(on_error=ErrorPolicy.RAISE)(to_number)
    result = await (Pipeline(WORDS) >> stop).run()
    assert is_err(result)
    assert result.report is not None
    print("RAISE stops the pipeline:       ", result, "after", result.report.pulled, "items")

    limited = stage(max_failures=1)(to_number)
    result = await (Pipeline(WORDS) >> limited).run()
    assert is_err(result)
    print("max_failures stops it later:    ", result.value)

    patient = stage(retry=Retry(attempts=3, wait=0.01))(third_time_lucky)
    report = await (Pipeline(WORDS) >> patient).run()
    assert not is_err(report)
    print(f"retry tries again:               {report.delivered} delivered, {report.stage('third_time_lucky').retried} retries")


async def third_time_lucky(word: str, state: WorkerState) -> str:
    if state.attempt < 3:
        raise ConnectionError("the server is busy")
    return word


if __name__ == "__main__":
    asyncio.run(main())
