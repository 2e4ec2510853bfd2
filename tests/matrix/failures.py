"""Faults of handlers, and of everything else that users write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from helpers import assert_balanced

from pipeline import Err, ErrorPolicy, Pipeline, RunReport
from stages import mix_pool, stage

from .row import Row, fault


@fault("F14", "a merge branch fails", "cohorts aligned")
async def broken_branch(row: Row) -> None:
    async def late(n: int) -> int:
        await asyncio.sleep(0.0005 * (n % 3))
        return n * 10

    def picky(n: int) -> int:
        if n % 7 == 3:
            raise ValueError(n)
        return n

    for multi_proc in (False, True):
        fork = mix_pool(buffer=4, multi_proc=multi_proc, fork_merge=tuple)(lambda: [picky, late, picky])
        pipeline = Pipeline(range(300)) >> fork
        outputs = await pipeline.collect()
        assert isinstance(outputs, list)
        assert sorted(outputs) == [(n, n * 10, n) for n in range(300) if n % 7 != 3]
        assert pipeline.report is not None
        failed = pipeline.report.stages[0].failed
        assert failed == 300 - len(outputs)
        assert_balanced(pipeline.report)
        row.injected += failed


class Broken(Exception):
    """Raised on purpose."""


def raising(name: str) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise Broken(name)

    return fail


def broken_source() -> Iterator[int]:
    yield 1
    raise Broken("source")


async def broken_async_source() -> AsyncIterator[int]:
    yield 1
    raise Broken("async source")


def names(result: Any) -> set[str]:
    """The names of all that was raised, wherever it is recorded."""
    assert isinstance(result, Err), result
    assert result.report is not None
    assert_balanced(result.report)
    found = {str(result.value)} | {str(err.value) for err in result.report.errors}
    found |= {str(note) for reason in result.reasons for note in [reason.message]}
    causes = [result.value, *(err.value for err in result.report.errors)]
    while causes:
        error = causes.pop()
        if isinstance(error, BaseException):
            found.add(str(error))
            causes += [e for e in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())) if e is not None]
    return found


def recorded(name: str, found: set[str]) -> bool:
    return any(name in text for text in found)


@fault("F15", "raise in handler, error handler, merge, source, setup, teardown", "all recorded, none masks another")
async def raise_everywhere(row: Row) -> None:
    for run_in in ("loop", "thread", "process"):
        fail = {"handler": raising("the handler"), "setup": raising("the setup"), "teardown": raising("the teardown")}
        found = names(await (Pipeline(range(9)) >> stage(run_in=run_in, on_error=ErrorPolicy.RAISE)(fail["handler"])).run())
        assert recorded("the handler", found), found

        sided = stage(run_in=run_in, error_handler=raising("the error handler"))(fail["handler"])
        found = names(await (Pipeline(range(9)) >> sided).run())
        assert recorded("the handler", found), found
        assert recorded("the error handler", found), found

        found = names(await (Pipeline(range(9)) >> stage(run_in=run_in, setup=fail["setup"])(abs)).run())
        assert recorded("the setup", found), found

        found = names(await (Pipeline(range(9)) >> stage(run_in=run_in, teardown=fail["teardown"])(abs)).run())
        assert recorded("the teardown", found), found

        both = stage(run_in=run_in, on_error=ErrorPolicy.RAISE, teardown=fail["teardown"])(fail["handler"])
        found = names(await (Pipeline(range(9)) >> both).run())
        assert recorded("the handler", found), found
        assert recorded("the teardown", found), found
        row.injected += 7

    for source, name in ((broken_source, "source"), (broken_async_source, "async source")):
        found = names(await (Pipeline(source) >> stage(abs)).run())
        assert recorded(name, found), found
        row.injected += 1

    merged = mix_pool(fork_merge=raising("the merge"), error_policy=ErrorPolicy.RAISE)(lambda: [abs, abs])
    found = names(await (Pipeline(range(9)) >> merged).run())
    assert recorded("the merge", found), found
    row.injected += 1

    dropped = await (Pipeline(range(9)) >> stage(raising("dropped"))).run()
    assert isinstance(dropped, RunReport)
    assert (dropped.failed, dropped.delivered) == (9, 0)
    row.injected += 9
