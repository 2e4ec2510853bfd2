"""Many items at once: `concurrency` coroutines wait together; `ordered` keeps the input's order all the same."""

import asyncio
import random
from time import perf_counter

from pipeline import Pipeline
from stages import stage

LINES = ["the quick brown fox", "jumps over", "the lazy dog"] * 20


async def count_words(line: str) -> int:
    await asyncio.sleep(random.uniform(0.005, 0.015))  # a server that takes its time
    return len(line.split())


async def main() -> None:
    one_by_one = Pipeline(LINES) >> stage(count_words)
    together = Pipeline(LINES) >> stage(concurrency=20)(count_words)
    in_order = Pipeline(LINES) >> stage(concurrency=20, ordered=True)(count_words)

    for title, pipeline in {"one by one": one_by_one, "together": together, "in order": in_order}.items():
        began = perf_counter()
        counts = [count async for count in pipeline]
        print(f"{title:<11} {perf_counter() - began:.2f} s, {sum(counts)} words; the first lines have {counts[:9]}")


if __name__ == "__main__":
    asyncio.run(main())
