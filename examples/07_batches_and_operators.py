"""Ready-made stages: map, filter, flat_map, batch, take, tap, and any aiostream operator."""

import asyncio
from collections.abc import AsyncIterator

import aiostream

from pipeline import Pipeline
from stages import batch, filter, flat_map, map, pipe, take, tap

POEM = ["Whose woods these are I think I know", "His house is in the village though"]


async def readings() -> AsyncIterator[int]:
    """A sensor: five values in a burst, then a pause, again and again."""
    for n in range(15):
        if n % 5 == 0:
            await asyncio.sleep(0.1)
        yield n


async def main() -> None:
    words = Pipeline(POEM) >> flat_map(str.split) >> map(str.lower) >> filter(lambda word: len(word) > 4)
    print("map, filter, flat_map: ", await words.collect())

    print("batch by number:       ", await (Pipeline(range(10)) >> batch(4)).collect())
    print("batch by time too:     ", await (Pipeline(readings) >> batch(100, within=0.05)).collect())

    seen: list[int] = []
    squares = Pipeline(range(1_000_000)) >> tap(seen.append) >> map(lambda n: n * n) >> take(4)
    print("take:                  ", await squares.collect(), "and tap has seen", seen)

    sums = Pipeline(range(6)) >> pipe(aiostream.pipe.accumulate())
    print("aiostream's accumulate:", await sums.collect())

    # A chain without a source is a pipeline too, and can be a part of others.
    shout = Pipeline() >> map(str.upper) >> map(lambda word: word + "!")
    print("a part for others:     ", await (Pipeline(["hey", "you"]) >> shout).collect())


if __name__ == "__main__":
    asyncio.run(main())
