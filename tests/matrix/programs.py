"""Faults of whole programs: signals, a parent that is killed, iterations that are left."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from helpers import Program, Tracked, alive, assert_balanced, until

from pipeline import Pipeline
from stages import stage

from .row import Row, fault, share
from .topologies import nap, rest

PROGRAM = """
import asyncio, json, signal, sys, time
from itertools import count
from pipeline import Pipeline, SignalTrigger, Err, Grace
from stages import stage, tap

def work(n):
    time.sleep(0.01)
    return n

def announce(n):
    if n == 20:
        print("at work", flush=True)

closed = []

def source():
    try:
        for n in count():
            yield n
    finally:
        closed.append("source")

async def stubborn(n):
    if n >= 25:  # whichever of them comes first
        print("in the long one", flush=True)
    try:
        await asyncio.sleep(0.001 if n < 25 else 30)
    finally:
        closed.append("handler")
        if sys.argv[2:] and n >= 25:
            print("cleaning up", flush=True)
            await asyncio.sleep(30)
    return n

async def main():
    drain = sys.argv[1] == "drain"
    triggers = [SignalTrigger(signal.SIGINT, signal.SIGTERM, drain=drain)]
    pipeline = Pipeline(source, cancel_on=triggers, grace=Grace(abort=10))
    pipeline = pipeline >> stage(run_in="process", concurrency=2)(work) >> tap(announce)
    if not drain:
        pipeline = pipeline >> stage(stubborn)
    result = await pipeline.run()
    report = result.report
    print(json.dumps({"outcome": report.outcome, "drained": report.drained, "balanced": report.balanced,
                      "reasons": [str(r) for r in result.reasons], "closed": closed,
                      "in_and_out": [report.pulled, report.delivered]}), flush=True)

if __name__ == "__main__":
    asyncio.run(main())
"""


@fault("F8", "the parent is killed with SIGKILL", "all children gone < 500 ms")
def killed_parent(row: Row) -> None:
    for _ in range(share(8)):
        with TemporaryDirectory() as folder, Program(Path(folder), PROGRAM, "abort") as program:
            program.says("at work")
            family = program.family()
            assert len(family) >= 2
            began = monotonic()
            program.process.kill()
            until(lambda family=family: not alive(family))
            row.closed(began)
            program.process.wait()
    row.within(0.5)


@fault("F9", "SIGINT or SIGTERM, once and twice", "once: drains or aborts; twice: killing in < 200 ms")
def signalled(row: Row) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        for mode in ("drain", "abort"):
            with TemporaryDirectory() as folder, Program(Path(folder), PROGRAM, mode) as program:
                program.says("at work")
                program.interrupt(signum, group=True)
                finished = program.finish()
                told = json.loads(finished.out.splitlines()[-1])
                assert finished.code == 0
                assert finished.err == ""
                assert told["outcome"] == "cancelled"
                assert told["balanced"]
                assert told["reasons"] == [f"received {signum.name}"]
                assert "source" in told["closed"], told
                assert told["drained"] is (mode == "drain"), told
                if mode == "drain":
                    assert told["in_and_out"][0] == told["in_and_out"][1], told
                else:
                    assert "handler" in told["closed"], told
                row.injected += 1
        with TemporaryDirectory() as folder, Program(Path(folder), PROGRAM, "abort", "stubborn") as program:
            program.says("in the long one")
            program.interrupt(signum, group=True)
            family = program.family()
            # The handler cleans up for 30 s, and is waited for: nothing but the second signal ends that.
            program.says("cleaning up")
            program.interrupt(signum, group=True)
            began = monotonic()
            finished = program.finish()
            row.closed(began)
            told = json.loads(finished.out.splitlines()[-1])
            assert len(told["reasons"]) == 2, told
            until(lambda family=family: not alive(family))
    row.within(0.2 + 0.5)  # and the interpreter's own end


class Stopping:
    """Leaves an iteration at its n-th item."""

    def __init__(self, at: int) -> None:
        self.at = at

    def take(self, outputs: Iterator[Any]) -> list[Any]:
        taken = list[Any]()
        for output in outputs:
            if len(taken) == self.at:
                break
            taken.append(output)
        return taken

    async def take_here(self, pipeline: Pipeline[Any]) -> list[Any]:
        taken = list[Any]()
        async with aclosing(pipeline.async_iter()) as outputs:
            async for output in outputs:
                if len(taken) == self.at:
                    break
                taken.append(output)
        return taken


def closed_source(pipeline: Pipeline[Any], source: Tracked) -> None:
    assert source.closes == 1
    assert pipeline.report is not None
    assert pipeline.report.outcome == "cancelled"
    assert [reason.code for reason in pipeline.report.reasons] == ["iter_closed"]
    assert_balanced(pipeline.report)


@fault("F12", "iter() and async_iter() are left at item 0, 1 and N", "source closed, thread gone < 200 ms")
def left_early(row: Row) -> None:
    for at in (0, 1, 50):
        for options in ({}, {"run_in": "thread", "concurrency": 2}):
            handler = rest if options else nap
            for how in ("iter", "async_iter", "never begun", "exception"):
                source = Tracked()
                pipeline = Pipeline(source) >> stage(nap) >> stage(**options)(handler)
                leaver, before = Stopping(at), set(threading.enumerate())
                if how == "never begun":
                    pipeline.iter().close()
                    assert source.pulled == 0
                    row.injected += 1
                    continue
                if how == "async_iter":
                    assert len(asyncio.run(leaver.take_here(pipeline))) == at
                    row.injected += 1
                else:
                    outputs = pipeline.iter()
                    assert len(leaver.take(outputs)) == at
                    began = monotonic()
                    if how == "iter":
                        outputs.close()
                    else:
                        try:
                            outputs.throw(KeyError("the consumer"))
                        except KeyError:
                            pass
                    until(lambda before=before: set(threading.enumerate()) <= before)
                    row.closed(began)
                closed_source(pipeline, source)
    row.within(0.2)
