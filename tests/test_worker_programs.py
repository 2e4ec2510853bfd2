"""Programs that stages run: `run_subprocess` in a thread or a worker process ends with the run, and leaves nobody behind."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import LIMIT, Program, alive, assert_balanced, eventually, until

from pipeline import Grace, Pipeline, RunReport, is_err
from pipeline.scheduler import TerminatedError, raise_if_terminate_requested, run_subprocess, terminate_requested
from stages import Stage, stage

SLEEPS = "import sys, os, time; open(sys.argv[1], 'w').write(str(os.getpid()) + '.'); time.sleep(600)"
IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS


def program(source: str, pid: Path, **options: Any) -> Callable[[Any], int]:
    """A handler that runs a program of Python, which says who it is."""
    return lambda item: run_subprocess([sys.executable, "-c", source, str(pid)], **options)


def has_started(pid: Path) -> bool:
    return pid.exists() and pid.read_text().endswith(".")


def process_of(pid: Path) -> psutil.Process:
    return psutil.Process(int(pid.read_text().rstrip(".")))


async def cancelled(handler: Stage[Any, Any], pid: Path, grace: Grace) -> RunReport:
    """Cancel a run whose handler has started its program, which ends with it."""
    pipeline = Pipeline([1], grace=grace) >> handler
    running = asyncio.create_task(pipeline.run())
    await eventually(lambda: has_started(pid))
    process = process_of(pid)
    pipeline.cancel("enough")
    result = await asyncio.wait_for(running, LIMIT)
    await eventually(lambda: not alive([process]))  # a signal is sent in the run, and takes effect a moment later
    assert is_err(result)
    assert result.report is not None
    assert_balanced(pipeline.snapshot())
    return result.report


@pytest.mark.parametrize("where", ["thread", "process"])
async def test_a_program_ends_with_the_run_that_its_handler_works_for(tmp_path: Path, where: Any) -> None:
    pid = tmp_path / "pid"
    report = await cancelled(stage(run_in=where)(program(SLEEPS, pid)), pid, Grace(abort=LIMIT))
    assert not report.abandoned


@pytest.mark.parametrize("where", ["thread", "process"])
async def test_a_program_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path, where: Any) -> None:
    pid = tmp_path / "pid"
    handler = program(IGNORES, pid, terminate_grace_seconds=0.05)
    report = await cancelled(stage(run_in=where)(handler), pid, Grace(abort=LIMIT))
    assert not report.abandoned


async def test_a_worker_process_that_is_ended_takes_its_programs_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    handler = program(IGNORES, pid, terminate_grace_seconds=None)
    await cancelled(stage(run_in="process")(handler), pid, Grace(abort=0.05, terminate=LIMIT))


async def test_a_program_ends_with_the_attempt_that_its_thread_has_overrun(tmp_path: Path) -> None:
    ends: list[TerminatedError] = []
    sleeps = program(SLEEPS, tmp_path / "pid")

    @stage(run_in="thread", timeout=0.5)
    def film(item: int) -> None:
        try:
            sleeps(item)
        except TerminatedError as error:
            ends.append(error)

    pipeline = Pipeline([1]) >> film
    await asyncio.wait_for(pipeline.run(), LIMIT)
    assert pipeline.snapshot().stages[0].failed == 1
    await eventually(lambda: ends)
    assert ends[0].pid is not None
    assert not psutil.pid_exists(ends[0].pid)


@pytest.mark.parametrize("where", ["thread", "process"])
async def test_a_handler_can_ask_whether_it_is_to_end(tmp_path: Path, where: Any) -> None:
    up, told = tmp_path / "up", tmp_path / "told"

    def handler(item: int) -> None:
        assert not terminate_requested()
        up.touch()
        until(terminate_requested)
        try:
            raise_if_terminate_requested()
        except TerminatedError as error:
            told.write_text(str(error))

    def teardown(state: Any) -> None:
        with open(told, "a") as file:
            run_subprocess(["echo", f" asked at the end: {terminate_requested()}"], stdout=file)

    pipeline = Pipeline([1], grace=Grace(abort=LIMIT)) >> stage(run_in=where, name="film", teardown=teardown)(handler)
    running = asyncio.create_task(pipeline.run())
    await eventually(up.exists)
    pipeline.cancel("enough")
    await asyncio.wait_for(running, LIMIT)
    first, _, last = told.read_text().rpartition(" asked ")
    assert (first, last) == ("the work of stage film was asked to end: enough", "at the end: False\n")


def test_no_program_outlives_a_run_whose_process_is_killed(tmp_path: Path) -> None:
    source = """
        import asyncio, sys
        from pathlib import Path
        from pipeline import Pipeline
        from stages import stage
        from test_worker_programs import IGNORES, program

        async def main():
            await (Pipeline([1]) >> stage(run_in="process")(program(IGNORES, Path("pid")))).run()

        if __name__ == "__main__":
            asyncio.run(main())
    """
    with Program(tmp_path, source) as parent:
        until(lambda: has_started(tmp_path / "pid"))
        family = parent.family()
        assert process_of(tmp_path / "pid") in family
        parent.interrupt(signal.SIGKILL)
        until(lambda: not alive(family))


def test_no_program_outlives_an_interpreter_that_ends_under_its_thread(tmp_path: Path) -> None:
    source = """
        import threading
        from pathlib import Path
        from helpers import until
        from test_worker_programs import IGNORES, has_started, program

        threading.Thread(target=program(IGNORES, Path("pid")), args=(1,), daemon=True).start()
        until(lambda: has_started(Path("pid")))
    """
    with Program(tmp_path, source) as parent:
        assert parent.finish().code == 0
        pid = int((tmp_path / "pid").read_text().rstrip("."))
        until(lambda: not psutil.pid_exists(pid))


def test_a_child_that_forks_away_does_not_answer_for_its_parents_programs(tmp_path: Path) -> None:
    source = """
        import os, sys, threading
        from pathlib import Path
        from helpers import until
        from test_worker_programs import IGNORES, has_started, process_of, program

        threading.Thread(target=program(IGNORES, Path("pid")), args=(1,), daemon=True).start()
        until(lambda: has_started(Path("pid")))
        child = os.fork()
        if child == 0:
            sys.exit(0)  # as it were a program of its own, with all that is done at exit
        os.waitpid(child, 0)
        print("alive", process_of(Path("pid")).is_running(), flush=True)
    """
    with Program(tmp_path, source) as parent:
        assert parent.finish().out == "alive True\n"
