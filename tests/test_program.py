"""A pipeline as a program: every further signal is obeyed harder, the exit code says which came first, nothing is left."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import Finished, Program, alive, run_program, until

from pipeline import Err, Pipeline, RunReport, StageConfigError, run_until_signalled
from pipeline.cancellation import signals
from stages import stage

INT, TERM = signal.SIGINT, signal.SIGTERM

PROGRAM = """
    import asyncio, atexit, contextlib, itertools, os, signal, sys, threading, time
    from pipeline import ErrorPolicy, Grace, Pipeline, SignalTrigger, run_until_signalled
    from stages import KillSwitch, stage

    GRACE = Grace(drain={drain}, abort={abort}, terminate=0.2, kill=0.2)

    async def source():
        for n in itertools.count():
            yield n
            await asyncio.sleep(0)

    {body}

    if __name__ == "__main__":
        atexit.register(print, "atexit", flush=True)
        {first}
        pipeline = Pipeline({source}, name="demo", grace=GRACE) >> work
        result = run_until_signalled(pipeline{options})
        print("returned", type(result).__name__, flush=True)
"""


def program(folder: Path, body: str, **parts: object) -> Program:
    defaults = {"drain": 30, "abort": 30, "first": "pass", "source": "source", "options": ""}
    lines = "\n".join("    " + line if line else "" for line in body.strip("\n").splitlines())
    return Program(folder, PROGRAM.format(body=lines.lstrip(), **(defaults | parts)))


def spoken(finished: Finished) -> list[str]:
    """What the library has said: all of stderr, less the prefix and the times."""
    lines = finished.err.splitlines()
    assert all(line.startswith("penstock: ") for line in lines), finished.err
    return [re.sub(r"[\d.]+ (m|µ)?s\b", "N s", line.removeprefix("penstock: ")) for line in lines]


FINISHING = "{}: finishing what was taken, for N s at most; once more to stop at once"
STOPPING = "{}: stopping at once, within N s; once more to kill"

QUICK = """
@stage
async def work(item):
    if item == 3:
        print("working", flush=True)
    await asyncio.sleep(0.001)
"""

WAITS = """
@stage(concurrency=2)
async def work(item):
    print("working", flush=True)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        print("cleaning", flush=True)
        await asyncio.sleep({cleaning})
        raise
"""

BLOCKS = """
@stage
def work(item):
    print("working", flush=True)
    while True:
        time.sleep(60)
"""

SWALLOWS = """
@stage
async def work(item):
    print("working", flush=True)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        print("swallowed", flush=True)
"""


# --- once, twice, three times


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(("signum", "code"), [(INT, 130), (TERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_the_first_signal_drains_and_the_exit_code_tells_which_it_was(tmp_path: Path, signum: int, code: int, uvloop: bool) -> None:
    with program(tmp_path, QUICK, options=f", uvloop={uvloop}") as running:
        running.says("working")
        running.interrupt(signum)
        finished = running.finish()
    name = signal.Signals(signum).name
    said = spoken(finished)
    assert said[0] == FINISHING.format(name)
    assert said[1].startswith("Pipeline 'demo' was drained after N s: ")
    assert said[2].startswith(f"It stopped because: received {name} ")
    assert said[-1] == "Every item is accounted for; nothing was lost."
    assert (finished.code, finished.out) == (code, "working\natexit\n")


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(("second", "name"), [(INT, "SIGINT"), (TERM, "SIGTERM")], ids=["SIGINT", "SIGTERM"])
def test_the_second_signal_stops_at_once_whichever_it_is(tmp_path: Path, second: int, name: str, uvloop: bool) -> None:
    with program(tmp_path, WAITS.format(cleaning=0), options=f", uvloop={uvloop}") as running:
        running.says("working")
        running.interrupt(INT)
        until(lambda: "finishing" in running.err())
        running.interrupt(second)
        finished = running.finish()
    said = spoken(finished)
    assert said[:2] == [FINISHING.format("SIGINT"), STOPPING.format(name)]
    assert said[2].startswith("Pipeline 'demo' was cancelled after N s: ")
    assert said[3].startswith("It stopped because: received SIGINT ")
    assert said[4].startswith(f"Then also: received {name}")
    assert said[-1] == "Every item is accounted for."
    assert finished.code == 130
    assert "cleaning" in finished.out


def test_the_third_signal_does_not_wait_for_a_handler_that_cleans_up(tmp_path: Path) -> None:
    with program(tmp_path, WAITS.format(cleaning=60)) as running:
        running.says("working")
        for signum, answer in ((TERM, "finishing"), (INT, "stopping at once"), (TERM, "killing")):
            running.interrupt(signum)
            until(lambda answer=answer: answer in running.err())
        finished = running.finish()
    said = spoken(finished)
    assert said[:3] == [FINISHING.format("SIGTERM"), STOPPING.format("SIGINT"), "SIGTERM: killing"]
    assert finished.code == 143
    assert finished.seconds < 15
    assert "atexit" in finished.out


def test_a_fourth_signal_changes_nothing(tmp_path: Path) -> None:
    with program(tmp_path, BLOCKS) as running:
        running.says("working")
        for count in range(1, 5):
            running.interrupt(INT)
            until(lambda count=count: len(running.err().splitlines()) >= count)
        finished = running.finish()
    assert spoken(finished)[2:4] == ["SIGINT: killing", "SIGINT: killing, as asked"]
    assert finished.code == 130


def test_two_signals_at_the_same_moment_are_one_step_each(tmp_path: Path) -> None:
    with program(tmp_path, WAITS.format(cleaning=0)) as running:
        running.says("working")
        running.interrupt(INT)
        running.interrupt(TERM)
        finished = running.finish()
    said = spoken(finished)
    assert {said[0], said[1]} in (
        {FINISHING.format("SIGINT"), STOPPING.format("SIGTERM")},
        {FINISHING.format("SIGTERM"), STOPPING.format("SIGINT")},
    )
    assert finished.code in (130, 143)


# --- before the start, after the end


@pytest.mark.parametrize(("signum", "code"), [(INT, 130), (TERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_before_the_start_starts_nothing(tmp_path: Path, signum: int, code: int) -> None:
    first = f"asyncio.new_event_loop = lambda new=asyncio.new_event_loop: (signal.raise_signal({int(signum)}), new())[1]"
    with program(tmp_path, QUICK, first=first) as running:
        finished = running.finish()
    name = signal.Signals(signum).name
    assert spoken(finished) == [
        FINISHING.format(name),
        f"did not start: received {name}",
    ]
    assert (finished.code, finished.out) == (code, "atexit\n")


def test_a_signal_after_the_end_is_the_programs_own(tmp_path: Path) -> None:
    source = """
        import signal
        from pipeline import Pipeline, run_until_signalled
        signal.signal(signal.SIGTERM, lambda *_: print("mine"))
        run_until_signalled(Pipeline([1, 2]))
        signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """
    finished = run_program(tmp_path, source)
    assert (finished.code, finished.out, finished.err) == (0, "mine\ninterrupted\n", "")


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_a_signal_that_the_kernel_gives_to_another_thread_wakes_a_loop_that_sleeps(tmp_path: Path, uvloop: bool) -> None:
    body = """
    def deliver():
        while not os.path.exists("go"):
            time.sleep(0.001)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    @stage
    async def work(item):
        print("working", flush=True)
        await waits.wait()

    async def source():
        yield 1

    waits = asyncio.Event()
    SignalTrigger(signal.SIGUSR1).hold()
    threading.Thread(target=deliver, daemon=True).start()
    """
    body = "\n".join(line[4:] for line in body.splitlines())
    with program(tmp_path, body, drain=0, options=f", uvloop={uvloop}") as running:
        running.says("working")
        (tmp_path / "go").touch()
        finished = running.finish()
    assert finished.code == 130
    assert spoken(finished)[0] == FINISHING.format("SIGINT")


# --- code that does not want to stop


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("body", [BLOCKS, SWALLOWS], ids=["blocked loop", "swallowing handler"])
def test_three_signals_end_a_program_whatever_its_code_does(tmp_path: Path, body: str, uvloop: bool) -> None:
    with program(tmp_path, body, options=f", uvloop={uvloop}") as running:
        running.says("working")
        for signum, answer in ((INT, "finishing"), (TERM, "stopping at once"), (INT, "killing")):
            running.interrupt(signum)
            until(lambda answer=answer: answer in running.err())
        finished = running.finish()
    said = spoken(finished)
    assert said[:3] == [FINISHING.format("SIGINT"), STOPPING.format("SIGTERM"), "SIGINT: killing"]
    if body is BLOCKS:
        assert said[3:] == ["could not be stopped in time; the process ends now"]
    else:
        assert any("demo/" in line for line in said[3:]), "what was left behind has no name"
    assert finished.code == 130


def test_a_loop_blocked_by_a_handler_that_looks_at_its_state_stops_at_ctrl_c(tmp_path: Path) -> None:
    body = """
@stage
def work(item, state):
    print("working", flush=True)
    while not state.cancelled:
        time.sleep(0.001)
    print([str(reason) for reason in state.reasons], flush=True)
"""
    with program(tmp_path, body) as running:
        running.says("working")
        running.interrupt(INT)
        until(lambda: "finishing" in running.err())
        running.interrupt(INT)
        finished = running.finish()
    assert "['received SIGINT', 'received SIGINT (signal number 2 since armed)']" in finished.out
    assert finished.code == 130


STUCK = """
@stage
async def work(item):
    print("working", flush=True)
    await asyncio.to_thread(time.sleep, 60)
"""


def test_a_thread_of_to_thread_is_named_and_one_more_signal_ends_the_process(tmp_path: Path) -> None:
    with program(tmp_path, STUCK) as running:
        running.says("working")
        running.interrupt(INT)
        until(lambda: "finishing" in running.err())
        running.interrupt(INT)
        until(lambda: "without waiting" in running.err())
        running.interrupt(TERM)
        finished = running.finish()
    said = spoken(finished)
    assert said[-2:] == [
        "everything is closed but thread 'asyncio_0'; once more to end without waiting",
        "SIGTERM: the process ends now",
    ]
    assert finished.code == 130


def test_after_three_signals_a_thread_of_to_thread_is_left_behind(tmp_path: Path) -> None:
    with program(tmp_path, STUCK, options="", abort=0.1) as running:
        running.says("working")
        for answer in ("finishing", "stopping at once", ""):
            running.interrupt(INT)
            until(lambda answer=answer: answer in running.err())
        finished = running.finish()
    assert spoken(finished)[-1] == "leaving behind thread 'asyncio_0'"
    assert finished.code == 130
    assert "atexit" not in finished.out


# --- processes with children


@pytest.mark.parametrize("group", [False, True], ids=["the program alone", "the whole group, as a terminal does"])
@pytest.mark.parametrize("presses", [1, 2, 3])
def test_no_process_is_left_however_often_it_was_asked(tmp_path: Path, presses: int, group: bool) -> None:
    body = """
import subprocess

@stage(run_in="process", concurrency=2)
def work(item):
    open("working", "w").close()
    time.sleep(0.01 if {presses} == 1 else 60)
""".replace("{presses}", str(presses))
    with program(tmp_path, body, abort=0.2 if presses == 2 else 30) as running:
        until((tmp_path / "working").exists)
        family = running.family()
        answers = ("finishing", "stopping at once", "killing")[:presses]
        for answer in answers:
            running.interrupt(INT, group=group)
            until(lambda answer=answer: answer in running.err())
        finished = running.finish()
        until(lambda: not alive(family))
    assert finished.code == 130
    assert all(line.startswith("penstock: ") for line in finished.err.splitlines()), finished.err
    assert len(family) >= 3


# --- runs that fail, are refused, or are interrupted from inside


def test_a_failed_run_is_returned(tmp_path: Path) -> None:
    body = """
@stage(on_error=ErrorPolicy.RAISE)
def work(item):
    raise ValueError("boom")
"""
    with program(tmp_path, body) as running:
        finished = running.finish()
    assert (finished.code, finished.out) == (0, "returned Err\natexit\n")
    assert "Traceback" not in finished.err


def test_a_run_that_fails_while_it_drains_has_its_account_told(tmp_path: Path) -> None:
    body = """
@stage(on_error=ErrorPolicy.RAISE)
async def work(item):
    print("working", flush=True)
    while not pipeline.runtime.reasons:
        await asyncio.sleep(0)
    raise ValueError("boom")
"""
    with program(tmp_path, body) as running:
        running.says("working")
        running.interrupt(TERM)
        finished = running.finish()
    assert "penstock: SIGTERM: finishing what was taken" in finished.err
    assert "penstock: Error in 'work': ValueError: boom.\n" in finished.err
    assert finished.code == 143


@pytest.mark.parametrize("source", ["None", "iter(())"], ids=["no source", "a source that is used up"])
def test_a_refused_run_is_returned_or_runs(source: str) -> None:
    pipeline: Pipeline[Any] = Pipeline(None if source == "None" else iter(()))
    result = run_until_signalled(pipeline)
    assert isinstance(result, Err if source == "None" else RunReport)
    assert signals._SignalHub._hubs == {}


def test_a_stage_that_cannot_work_is_raised_and_the_handlers_are_put_back() -> None:
    stays = (n for n in [1])
    before = [signal.getsignal(signum) for signum in (INT, TERM)]
    pipeline = Pipeline([1]) >> stage(run_in="process")(lambda item: next(stays))
    with pytest.raises(StageConfigError, match="cannot be sent"):
        run_until_signalled(pipeline)
    assert [signal.getsignal(signum) for signum in (INT, TERM)] == before


@pytest.mark.parametrize("error", ["SystemExit(7)", "KeyboardInterrupt()"])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_an_exit_raised_by_a_handler_stops_the_run_and_goes_on(tmp_path: Path, error: str, kind: str) -> None:
    body = f"""
@stage
{kind} work(item):
    if item == 3:
        raise {error}
"""
    with program(tmp_path, body) as running:
        finished = running.finish()
    if "7" in error:
        assert (finished.code, finished.err) == (7, "")
    else:
        assert finished.code == -INT
        assert finished.err.rstrip().endswith("KeyboardInterrupt")
    assert finished.out == "atexit\n"


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_ctrl_c_that_is_not_among_the_signals_is_a_keyboard_interrupt_after_an_abort(tmp_path: Path, uvloop: bool) -> None:
    body = WAITS.format(cleaning=0.01)
    with program(tmp_path, body, options=f", signals=[signal.SIGTERM], uvloop={uvloop}") as running:
        running.says("working")
        running.interrupt(INT)
        finished = running.finish()
    assert finished.code == -INT
    assert "cleaning" in finished.out
    assert finished.err.rstrip().endswith("KeyboardInterrupt")
    assert "penstock" not in finished.err.splitlines()[0]


def test_a_second_ctrl_c_that_is_not_among_the_signals_interrupts_a_blocked_loop(tmp_path: Path) -> None:
    body = """
@stage
def work(item, state):
    print("working", flush=True)
    while not state.reasons:
        time.sleep(0.001)
    print(*state.reasons, flush=True)
    try:
        time.sleep(60)
    finally:
        print("interrupted", flush=True)
"""
    with program(tmp_path, body, options=", signals=[signal.SIGTERM]", abort=1) as running:
        running.says("working")
        running.interrupt(INT)
        running.says("interrupted by KeyboardInterrupt")
        running.interrupt(INT)
        finished = running.finish()
    assert finished.code == -INT
    assert finished.out.splitlines()[2:] == ["interrupted", "atexit"]


# --- who reads what it says


def test_nobody_reads_stderr_and_the_program_stops_all_the_same(tmp_path: Path) -> None:
    # `program 2>&1 | tee log`: Ctrl-C ends tee first.
    body = QUICK + "\nread, write = os.pipe(); os.dup2(write, 2); os.close(read); os.close(write)\n"
    with program(tmp_path, body) as running:
        running.says("working")
        running.interrupt(INT)
        finished = running.finish()
    assert (finished.code, finished.out) == (130, "working\natexit\n")


def test_stderr_is_closed_and_the_program_stops_all_the_same(tmp_path: Path) -> None:
    with program(tmp_path, QUICK + "\nos.close(2)\n") as running:
        running.says("working")
        running.interrupt(TERM)
        finished = running.finish()
    assert (finished.code, finished.out) == (143, "working\natexit\n")


def test_stderr_is_full_and_the_program_stops_all_the_same(tmp_path: Path) -> None:
    body = QUICK + """
read, write = os.pipe()
os.set_blocking(write, False)
with contextlib.suppress(BlockingIOError):
    while True:
        os.write(write, bytes(4096))
os.set_blocking(write, True)
os.dup2(write, 2)
"""
    with program(tmp_path, body) as running:
        running.says("working")
        running.interrupt(INT)
        finished = running.finish()
    assert (finished.code, finished.out) == (130, "working\natexit\n")


# --- how it is called


def test_without_a_signal_the_report_is_returned_and_nothing_is_said(tmp_path: Path) -> None:
    with program(tmp_path, "work = stage(abs)", source="range(5)") as running:
        finished = running.finish()
    assert (finished.code, finished.out, finished.err) == (0, "returned RunReport\natexit\n", "")


def test_a_pipeline_may_be_run_twice(handlers: list[Any]) -> None:
    pipeline = Pipeline([1, 2, 3]) >> stage(abs)
    for _ in range(2):
        result = run_until_signalled(pipeline)
        assert isinstance(result, RunReport)
        assert result.delivered == 3


@pytest.fixture
def handlers() -> Any:
    before = [signal.getsignal(signum) for signum in (INT, TERM)]
    yield before
    assert [signal.getsignal(signum) for signum in (INT, TERM)] == before
    assert signals._SignalHub._hubs == {}
    assert signals._Waker._wakers == {}


def test_a_signal_given_twice_counts_once(tmp_path: Path) -> None:
    with program(tmp_path, QUICK, options=", signals=[signal.SIGUSR1, signal.SIGUSR1, signal.SIGRTMIN + 1]") as running:
        running.says("working")
        running.interrupt(signal.SIGUSR1)
        finished = running.finish()
    assert spoken(finished)[1].startswith("Pipeline 'demo' was drained")
    assert finished.code == 128 + signal.SIGUSR1


def test_a_signal_without_a_name_will_do(tmp_path: Path) -> None:
    with program(tmp_path, QUICK, options=", signals=[signal.SIGRTMIN + 1]") as running:
        running.says("working")
        running.interrupt(signal.SIGRTMIN + 1)
        finished = running.finish()
    assert spoken(finished)[0] == FINISHING.format(f"signal {signal.SIGRTMIN + 1}")
    assert finished.code == 128 + signal.SIGRTMIN + 1


def test_it_works_in_the_main_thread_only(handlers: list[Any]) -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            run_until_signalled(Pipeline([1]))
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread only" in str(caught[0])


async def test_on_a_running_loop_it_is_an_error(handlers: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="run_until_signalled runs a loop of its own.*await pipeline"):
        run_until_signalled(Pipeline([1]))
