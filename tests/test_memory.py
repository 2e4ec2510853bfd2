"""Memory stays flat however long the stream is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import asyncio, json, sys
import psutil
from pipeline import Pipeline
from stages import stage, map, filter, batch, flat_map

KIND, LENGTH = sys.argv[1], int(sys.argv[2])

async def main():
    plus = [stage(lambda item: item + 1) for _ in range(3)]
    @stage
    async def later(item):
        return item
    @stage(concurrency=4, ordered=True)
    async def later_in_order(item):
        return item
    chains = {
        "plain": plus,
        "coroutines": [later, later_in_order, later],
        "thread": [plus[0], stage(run_in="thread")(lambda item: item), plus[1]],
        "mixed": [plus[0], batch(100), flat_map(lambda some: some)],
        "failing": [plus[0], stage(lambda item: 1 // (item % 2)), plus[1]],
        "skipping": [filter(lambda item: item % 2), plus[0], plus[1]],
    }
    def chain(length):
        def numbers():
            yield from range(length)
        pipeline = Pipeline(numbers if KIND == "thread" else range(length))
        for one in chains[KIND]:
            pipeline = pipeline >> one
        return pipeline
    await chain(LENGTH // 20).run()  # imports, caches, arenas of the allocator
    pipeline = chain(LENGTH)
    me = psutil.Process()
    start, peak = me.memory_info().rss, 0
    running = asyncio.ensure_future(pipeline.run())
    while not running.done():
        await asyncio.wait((running,), timeout=0.02)
        peak = max(peak, me.memory_info().rss)
    print(json.dumps({"grown": peak - start, "pulled": running.result().pulled}))

import structlog
structlog.configure(processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.ReturnLoggerFactory())
asyncio.run(main())
"""


def grown(kind: str, length: int) -> float:
    """By how many MB a process of its own has grown at most during a run."""
    command = [sys.executable, "-c", PROGRAM, kind, str(length)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["pulled"] == length
    return answer["grown"] / 1e6


def test_two_million_ints_through_three_stages_stay_within_5_mb() -> None:
    assert grown("plain", 2_000_000) < 5


@pytest.mark.parametrize("kind", ["coroutines", "thread", "mixed", "failing", "skipping"])
def test_other_chains_stay_within_10_mb(kind: str) -> None:
    lengths = {"coroutines": 100_000, "failing": 15_000, "thread": 200_000}
    assert grown(kind, lengths.get(kind, 200_000)) < 10
