"""Ctrl-C in the main thread, at every step of what it may be doing with a scheduler.

The rule kept here: the interrupt is raised, once; and whatever was going on then is done wholly or not at all, so the
scheduler goes on, closes, and has everything back.
"""

from __future__ import annotations

import dis
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT, Program
from staging import Latch, nothing, submit

import pipeline.scheduler
from pipeline.scheduler import Scheduler, StagedPipeline

PACKAGE = str(Path(pipeline.scheduler.__file__).parent)


@pytest.fixture(autouse=True)
def _ctrl_c() -> Any:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


class InterruptAt:
    """Calls a function and interrupts it at one of the steps of the scheduler's code at which Python looks for signals.

    Those are the start of a function, the end of a round, and after a call of a function in C.
    """

    def __init__(self, step: int) -> None:
        self.left = step
        self._called_c: Any = None
        """The frame that has called something last, which may be in C."""

    def __call__(self, function: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            function()
        finally:
            sys.settrace(before)

    def _called(self, frame: Any, event: str, arg: Any) -> Any:
        self._called_c = None
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._look()
        return self._step

    def _step(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if self._called_c is frame or name.startswith("JUMP_BACKWARD"):
                self._look()
            self._called_c = frame if name.startswith("CALL") else None
        return self._step

    def _look(self) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)


def _cancel_all(scheduler: Scheduler, tasks: list[Any]) -> None:
    for task in tasks:
        task.cancel()


WAYS: dict[str, Callable[[Scheduler, list[Any]], Any]] = {
    "cancelling": _cancel_all,
    "submitting": lambda scheduler, _: submit(scheduler, nothing).cancel(),
    "watching": lambda scheduler, _: scheduler.snapshot(),
    "waiting": lambda scheduler, tasks: scheduler.wait_pipelines([tasks[0].owner], timeout=1e-6),
    "asking": lambda _, tasks: tasks[0].exception(timeout=1e-6),
    "shutting down": lambda scheduler, _: scheduler.shutdown(cancel_pending_pipelines=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_wherever_it_comes_the_scheduler_goes_on_and_has_everything_back(way: str) -> None:
    step, finished = 1, False
    while not finished:
        interrupt = InterruptAt(step)
        finished = _interrupted(interrupt, WAYS[way])
        step += max(1, step // 40)  # each of the first, where most that matters is, and many of those in long loops
    assert step > 5


def _interrupted(interrupt: InterruptAt, way: Callable[[Scheduler, list[Any]], Any]) -> bool:
    """True when it was over before it could be interrupted."""
    latch = Latch()
    with Scheduler(resources={"cpu": 2}, task_parallelism=2) as scheduler:
        made: list[Any] = []
        ready = threading.Event()

        def body(pipeline: StagedPipeline) -> None:
            made.append(pipeline.task(latch, resources={"cpu": 1}).run())
            latch.wait_begun()
            made.extend(pipeline.task(nothing, resources={"cpu": need}).run() for need in (2, 1, 0))
            ready.set()
            pipeline.wait(made)

        handle = submit(scheduler, body)
        assert ready.wait(LIMIT)
        over = True
        try:
            interrupt(lambda: way(scheduler, made))
        except KeyboardInterrupt:
            over = False
        except TimeoutError:  # of `asking`, which is not interrupted any more
            pass
        assert over is (interrupt.left > 0)
        assert not scheduler.turn.lock.locked()
        latch.let_go.set()
        assert handle.result(LIMIT) is None
        assert all(task.done() for task in made)
    assert scheduler.closed()
    assert scheduler.engine.free == scheduler.engine.capacity
    assert scheduler.engine.free_threads == 2
    return over


def test_it_comes_once_and_after_the_turn_in_which_it_was() -> None:
    scheduler, steps = Scheduler(), []
    turn = scheduler.turn
    with pytest.raises(KeyboardInterrupt):
        with turn, turn.lock:
            signal.raise_signal(signal.SIGINT)
            with Scheduler().turn:  # a turn in a turn, as when the collector runs somebody's code
                signal.raise_signal(signal.SIGINT)
            steps.append("went on")
    assert steps == ["went on"]
    assert not turn.lock.locked()
    with turn, turn.lock:
        steps.append("no second one")
    scheduler.close()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_python_does_not_handle_it_nothing_is_changed(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    turn = Scheduler().turn
    with turn, turn.lock:
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.signal(signal.SIGINT, before) is handler


def test_a_handler_of_ones_own_is_called_with_what_it_would_have_got() -> None:
    heard: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame.f_code.co_name)))
    turn = Scheduler().turn
    with turn, turn.lock:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 0)  # time for it to be delivered
        assert heard == []
    assert [number for number, _ in heard] == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupted_wait_leaves_the_block_which_closes(tmp_path: Path) -> None:
    source = """
        import os, threading
        from pipeline.scheduler import Scheduler
        from staging import Latch, submit

        latch = Latch("the end")
        try:
            with Scheduler(resources={"cpu": 1}) as scheduler:
                handle = submit(scheduler, lambda pipeline: pipeline.task(latch, resources={"cpu": 1}).run().result())
                latch.wait_begun()
                try:
                    os.write(1, b"waits\\n")
                    scheduler.wait_pipelines([handle])
                finally:
                    latch.let_go.set()
        except KeyboardInterrupt:
            print(handle.result(0), scheduler.closed(), threading.active_count())
    """
    with Program(tmp_path, source) as program:
        program.says("waits")
        program.interrupt(signal.SIGINT)
        assert program.finish().out.splitlines()[-1] == "the end True 1"


def test_a_close_that_takes_too_long_can_be_interrupted_too(tmp_path: Path) -> None:
    source = """
        import os
        from pipeline.scheduler import Scheduler
        from staging import Latch, submit

        latch = Latch()
        scheduler = Scheduler(resources={"cpu": 1})
        handle = submit(scheduler, latch)
        latch.wait_begun()
        try:
            os.write(1, b"closes\\n")
            scheduler.close()
        except KeyboardInterrupt:
            print(scheduler.shutdown_started(), scheduler.closed(), handle.done())
    """
    with Program(tmp_path, source) as program:
        program.says("closes")
        program.interrupt(signal.SIGINT)
        assert program.finish().out.splitlines()[-1] == "True False False"
