"""A pipeline as a whole program: run it, let Ctrl-C and SIGTERM stop it as users expect, and end with the right exit code.

The rule kept here: every further signal is obeyed harder, and after the third the program ends whatever its code does.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from .cancellation.reason import CancelReason, CancelType
from .cancellation.signals import SignalTrigger, running_loop, signal_name
from .loops import LoopFactory, loop_factory, run_on
from .report import RunReport
from .result import Err, describe

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["run_until_signalled"]

_SLACK = 1.0
"""Seconds beyond the graces of a kill, after which the program is ended from outside of its own code."""
_PATIENCE = 1.0
"""Seconds to wait for somebody to read the account from stderr."""
_PIECE = 512
"""Bytes that can be written at once to whatever can be written to, without a wait: what POSIX promises for pipes."""


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
    if (loop := running_loop()) is not None:
        raise RuntimeError(f"run_until_signalled runs a loop of its own, and {loop!r} is running here; use await pipeline.run()")
    factory = loop_factory(uvloop=uvloop)
    return _Program(pipeline, signals).run(factory)


class _Program:
    def __init__(self, pipeline: Pipeline[Any], signals: Sequence[int]) -> None:
        self._pipeline = pipeline
        self._triggers = [SignalTrigger(signum, code=signal_name(signum)) for signum in dict.fromkeys(signals)]
        self._numbers = {trigger.code: trigger.signals[0] for trigger in self._triggers}
        self._nth = count(1)
        self._received: list[CancelReason] = []
        self._interrupt: BaseException | None = None
        self._over = False
        self._on_last_call = False

    def run(self, factory: LoopFactory) -> RunReport | Err:
        with ExitStack() as listening:
            for trigger in self._triggers:
                listening.callback(trigger.listen(self._signalled).disarm)
            if signal.SIGINT not in self._numbers.values() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                listening.callback(SignalTrigger(signal.SIGINT).listen(self._ctrl_c).disarm)
            result = run_on(factory, self._main(), on_interrupt=self._interrupted)
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

    async def _main(self) -> RunReport | Err:
        with ExitStack() as holding:
            for trigger in self._triggers:  # once more, for now there is a loop that is to wake up for them
                holding.callback(trigger.hold().disarm)
            return await self._pipeline.run()

    def _signalled(self, reason: CancelReason) -> None:
        # Inside the signal handler, which another signal may interrupt: no locks, no buffered output, no `threading`.
        # First the stop, then the words: nobody may be there to read them.
        self._received.append(reason)
        name, grace = reason.code, self._pipeline.runtime.grace
        if self._on_last_call:
            _say(f"{name}: the process ends now")
            os._exit(self._exit_code)
        if self._over:
            return
        match next(self._nth):
            case 1:
                self._pipeline.cancel(reason, drain=True)
                _say(f"{name}: finishing what was taken, for {grace.drain:g} s at most; once more to stop at once")
            case 2:
                self._pipeline.cancel(reason)
                _say(f"{name}: stopping at once, within {grace.abort:g} s; once more to kill")
            case 3:
                self._pipeline.cancel(reason, force=True)
                start_new_thread(self._make_sure, (grace.terminate + grace.kill + _SLACK,))
                _say(f"{name}: killing")
            case _:
                _say(f"{name}: killing, as asked")

    def _ctrl_c(self, _reason: CancelReason) -> None:
        """SIGINT when it is not among the signals, as `asyncio.run` has it: one that interrupts our own code would break it."""
        again = self._interrupt is not None
        self._interrupted(KeyboardInterrupt())
        if again:
            raise KeyboardInterrupt

    def _interrupted(self, error: BaseException) -> None:
        """Ctrl-C when that is not among the signals, or a handler's SystemExit: stop, then raise it."""
        force = self._interrupt is not None
        self._interrupt = self._interrupt or error
        reason = CancelReason(f"interrupted by {describe(error)}", CancelType.ERROR, code="interrupted")
        self._pipeline.cancel(reason, force=force)

    def _make_sure(self, seconds: float) -> None:
        time.sleep(seconds)
        if not self._over:
            _say("could not be stopped in time; the process ends now")
            os._exit(self._exit_code)

    @property
    def _exit_code(self) -> int:
        return 128 + self._numbers[self._received[0].code]

    def _account(self, result: RunReport | Err) -> None:
        if isinstance(result, Err) and result.report is None:
            text = f"did not start: {result.reason or result.value}"
        else:
            report = result.report if isinstance(result, Err) else result
            assert report is not None
            text = report.explain()
        _say(text, patience=_PATIENCE)

    def _last_call(self, stuck: str) -> None:
        if len(self._received) > 2:
            _say(f"leaving behind {stuck}", patience=_PATIENCE)
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(self._exit_code)
        self._on_last_call = True
        _say(f"everything is closed but {stuck}; once more to end without waiting", patience=_PATIENCE)


def _threads_that_hold_the_process() -> str:
    """The interpreter waits at its end for threads that are no daemons."""
    return ", ".join(
        f"thread {thread.name!r}"
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.main_thread() and "_do_shutdown" not in thread.name
    )  # asyncio's own thread of that name waits for the others


def _say(text: str, *, patience: float = 0.0) -> None:
    """Write to stderr, unless it is closed or nobody reads it: Ctrl-C also ends the `tee` or `head` behind a program."""
    data = "".join(f"penstock: {line}\n" for line in text.splitlines()).encode(errors="backslashreplace")
    with suppress(OSError, ValueError):
        while data and select.select([], [2], [], patience)[1]:
            data = data[os.write(2, data[:_PIECE]) :]
