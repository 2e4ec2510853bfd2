"""A run whose outputs somebody iterates over: on the loop that he is on, or from synchronous code.

The rule kept here: whoever leaves the iteration early, and however, ends the run and takes nothing more from it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack
from typing import Any

from .assembly import Sink
from .bridge import BridgeSink
from .cancellation.reason import CancelReason, CancelType
from .errors import PipelineCancelled, PipelineFailed
from .host import run_in_thread
from .loops import LoopFactory
from .pace import Pacer
from .result import Err
from .run import Run
from .runtime import StopLevel, StopRequest
from .sink import BufferSink

__all__ = ["check_buffer", "iterate", "iterate_in_thread", "stopped"]

OpenRun = Callable[[Sink], Run]
"""Makes the run that fills a sink, or raises what keeps it from starting."""
CloseRun = Callable[[Run], None]
"""Lets go of a run that is over."""


async def iterate(open_run: OpenRun, close_run: CloseRun, sink: BufferSink) -> AsyncGenerator[Any, None]:
    """Run on the consumer's own loop. `Any`: a sink does not know the type of its items, the pipeline does."""
    run = open_run(sink)
    try:
        run.start()
    except BaseException:
        close_run(run)
        raise
    pace = Pacer()
    try:
        while (outputs := sink.take()) is not None or await sink.wait_items():
            if outputs is not None:
                for output in outputs:
                    yield output
                if pace.due():
                    await pace.rest()
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError):
            run.parent_cancelled()
        else:
            run.runtime.request_stop(_iteration_left())
        sink.discard()  # the consumer has left: what waits for it goes nowhere
        raise
    finally:
        try:
            result = await run.watch()
        finally:
            close_run(run)
    while (outputs := sink.take()) is not None:
        for output in outputs:
            yield output
    if isinstance(result, Err):
        raise stopped(result) from _cause(result)


def iterate_in_thread(
    open_run: OpenRun,
    close_run: CloseRun,
    sink: BridgeSink,
    factory: LoopFactory,
) -> Generator[Any, None, None]:
    """Run on a loop of its own, in a thread of its own."""
    run = open_run(sink)
    runtime = run.runtime
    with ExitStack() as listening:
        try:
            if threading.current_thread() is threading.main_thread():
                run.listen_here(listening)
            host = run_in_thread(run, factory)
        except BaseException as error:
            run.could_not_start(error)
            close_run(run)
            raise
        try:
            yield from sink.take()
        except BaseException:
            sink.leave()
            runtime.request_stop(_iteration_left())
            sink.discard()
            raise
        finally:
            try:
                host.join(on_interrupt=lambda: runtime.request_stop(_iteration_left(StopLevel.KILL)))
            finally:
                close_run(run)
    result = runtime.closed.result()
    if isinstance(result, Err):
        raise stopped(result) from _cause(result)


def check_buffer(max_buffer: int) -> int:
    """The number itself, or `ValueError`."""
    if isinstance(max_buffer, bool) or not isinstance(max_buffer, int) or max_buffer < 1:
        raise ValueError(f"max_buffer must be a whole number of items, 1 or more, not {max_buffer!r}")
    return max_buffer


def stopped(err: Err) -> BaseException:
    """The exception that an iteration raises for a run that did not complete, or could not start."""
    if isinstance(err.value, BaseException) and err.report is None:
        return err.value
    if err.report is not None and err.report.outcome == "failed":
        return PipelineFailed(f"the pipeline failed: {err.reason}", report=err.report, reasons=err.reasons)
    return PipelineCancelled(f"the pipeline was cancelled: {err.reason}", report=err.report, reasons=err.reasons)


def _iteration_left(level: StopLevel = StopLevel.ABORT) -> StopRequest:
    return StopRequest(CancelReason("the iteration was left early", CancelType.MANUAL, code="iter_closed"), level)


def _cause(err: Err) -> BaseException | None:
    return err.value if isinstance(err.value, BaseException) and err.report is not None else None
