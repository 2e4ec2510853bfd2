"""A pipeline as a whole program: run it, let Ctrl-C and SIGTERM stop it as users expect, and end with the right exit code.

The rule kept here: every further signal is obeyed harder, and after the third the program ends whatever its code does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .cancellation.reason import CancelReason, CancelType
from .cancellation.signals import SignalTrigger
from .loops import LoopFactory, loop_factory, run_on
from .report import RunReport
from .result import Err, describe

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["run_until_signalled"]

_SLACK = 1.0
"""Seconds beyond the graces of a kill, after which the program is ended from outside of its own code."""


def run_until_signalled(
    pipeline: Pipeline[Any], *, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM), uvloop: bool = False
) -> RunReport | Err:
    """Run a pipeline as `asyncio.run(pipeline.run())` does, with signals that stop it in steps. For the main thread.

        if __name__ == "__main__":
            run_until_signalled(pipeline)

    The first signal drains, the second aborts, the third kills; each says so on stderr, and the account follows when
    everything is closed. Then `SystemExit` is raised with 128 and the number of the first signal: 130 for SIGINT, 143
    for SIGTERM. Without a signal the result of `run()` is returned, whatever it is.

    After the third signal the process ends within `Grace.terminate` + `Grace.kill` + 1 s, even when a handler blocks the
    loop or a thread that is no daemon does not return; `atexit` functions are then left out. Such threads (those of
    `asyncio.to_thread` are) keep a process as they do after `asyncio.run`: they are named, and one more signal ends it.
    Raises RuntimeError in other threads and on a running loop, ImportError when uvloop is asked for and missing.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "run_until_signalled works in the main thread only, where Python delivers signals; elsewhere use await pipeline.run()"
        )
    factory = loop_factory(uvloop=uvloop)
    return _Program(pipeline, signals).run(factory)


class _Program:
    def __init__(self, pipeline: Pipeline[Any], signals: Sequence[int]) -> None:
        self._pipeline = pipeline
        self._triggers = [SignalTrigger(signum, code=signal.Signals(signum).name) for signum in signals]
        self._received: list[CancelReason] = []
        self._interrupt: BaseException | None = None
        self._over = False

    def run(self, factory: LoopFactory) -> RunReport | Err:
        with ExitStack() as listening:
            for trigger in self._triggers:
                listening.callback(trigger.listen(self._signalled).disarm)
            result = run_on(factory, self._pipeline.run(), on_interrupt=self._interrupted)
            self._over = True
            if self._received:
                self._account(result)
                if stuck := _threads_that_hold_the_process():
                    self._last_call(stuck)
                    listening.pop_all()  # still listening: the next signal ends the process
        if self._received:
            raise SystemExit(self._exit_code)
        if self._interrupt is not None:
            raise self._interrupt
        return result

    def _signalled(self, reason: CancelReason) -> None:
        # Inside the signal handler: no locks, no buffered output, no `threading`.
        self._received.append(reason)
        name, grace = reason.code, self._pipeline.runtime.grace
        if self._over:
            _say(f"{name}: the process ends now")
            os._exit(self._exit_code)
        match len(self._received):
            case 1:
                _say(f"{name}: finishing what was taken, for {grace.drain:g} s at most; once more to stop at once")
                self._pipeline.cancel(reason, drain=True)
            case 2:
                _say(f"{name}: stopping at once, within {grace.abort:g} s; once more to kill")
                self._pipeline.cancel(reason)
            case 3:
                _say(f"{name}: killing")
                self._pipeline.cancel(reason, force=True)
                start_new_thread(self._make_sure, (grace.terminate + grace.kill + _SLACK,))
            case _:
                _say(f"{name}: killing, as asked")

    def _interrupted(self, error: BaseException) -> None:
        """A handler's SystemExit, or a KeyboardInterrupt when SIGINT is not among the signals: stop, then raise it."""
        self._interrupt = error
        self._pipeline.cancel(CancelReason(f"interrupted by {describe(error)}", CancelType.ERROR, code="interrupted"))

    def _make_sure(self, seconds: float) -> None:
        time.sleep(seconds)
        if not self._over:
            _say("could not be stopped in time; the process ends now")
            os._exit(self._exit_code)

    @property
    def _exit_code(self) -> int:
        return 128 + signal.Signals[self._received[0].code or ""]

    def _account(self, result: RunReport | Err) -> None:
        report = result.report if isinstance(result, Err) else result
        _say(report.explain() if report is not None else f"did not start: {result}")

    def _last_call(self, stuck: str) -> None:
        if len(self._received) > 2:
            _say(f"leaving behind {stuck}")
            sys.stdout.flush()
            os._exit(self._exit_code)
        _say(f"everything is closed but {stuck}; once more to end without waiting")


def _threads_that_hold_the_process() -> str:
    """The interpreter waits at its end for threads that are no daemons."""
    return ", ".join(
        f"thread {thread.name!r}"
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.main_thread()
    )


def _say(text: str) -> None:
    os.write(2, "".join(f"penstock: {line}\n" for line in text.splitlines()).encode(errors="backslashreplace"))
