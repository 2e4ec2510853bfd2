"""`run_subprocess`: programs of tasks, which end with everything that they have started when the task is asked to.

The rule kept here: real programs, seen from outside; what they have started is found by the files that it writes.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import LIMIT, Flag, Program, alive, run_program, settled, until
from staging import run_body

from pipeline.scheduler import StagedPipeline, TerminatedError, run_subprocess, terminate_requested

FAMILY = """
    import os, signal, sys, time
    folder, stubborn = sys.argv[1], sys.argv[2]
    if os.fork() == 0:  # the child
        if stubborn == "child":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(os.path.join(folder, "child"), "w").write(str(os.getpid()))
    else:
        if stubborn == "parent":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(os.path.join(folder, "parent"), "w").write(str(os.getpid()))
    while True:
        time.sleep(10)
"""


def test_a_program_returns_its_exit_code() -> None:
    assert run_subprocess([sys.executable, "-c", "raise SystemExit(3)"]) == 3

    def body(pipeline: StagedPipeline) -> Any:
        return pipeline.task(run_subprocess, args=([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"],)).run().result()

    assert run_body(body) == -9


@pytest.mark.parametrize("stubborn", ["nobody", "parent", "child"])
def test_a_program_whose_task_is_asked_ends_with_its_whole_group(tmp_path: Path, stubborn: str) -> None:
    script = tmp_path / "family.py"
    script.write_text(textwrap.dedent(FAMILY))
    command = [sys.executable, str(script), str(tmp_path), stubborn]

    def body(pipeline: StagedPipeline) -> list[psutil.Process]:
        grace = LIMIT if stubborn == "nobody" else 0.3
        task = pipeline.task(run_subprocess, args=(command,), kwargs={"terminate_grace_seconds": grace}).run()
        names = [tmp_path / "parent", tmp_path / "child"]
        until(lambda: all(Flag(name).is_set() and name.read_text() for name in names))
        family = [psutil.Process(int(name.read_text())) for name in names]
        assert task.request_terminate()
        error = task.exception()
        assert isinstance(error, TerminatedError)
        assert error.argv == tuple(command)
        assert error.pid == family[0].pid
        assert error.forced_kill is (stubborn != "nobody")
        assert error.returncode == (-9 if stubborn == "parent" else -15)
        return family

    family = run_body(body)
    until(lambda: not alive(family))


def _ask(tmp_path: Path, source: str, **options: Any) -> TerminatedError:
    """Run a program that says "up" in a file, ask its task to end, and return how that went."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(source))
    up = Flag(tmp_path / "up")

    def body(pipeline: StagedPipeline) -> Any:
        task = pipeline.task(run_subprocess, args=([sys.executable, str(script), up.path],), kwargs=options).run()
        up.wait()
        assert task.request_terminate("enough")
        return task.exception(LIMIT)

    error = run_body(body)
    assert isinstance(error, TerminatedError)
    assert str(error).endswith("was ended because its task was asked to end: enough")
    return error


def test_a_program_that_forks_and_exits_again_and_again_does_not_get_away(tmp_path: Path) -> None:
    source = """
        import os, signal, sys, time
        def hop(*_):
            last = time.monotonic() + 60
            while time.monotonic() < last:
                if os.fork():
                    os._exit(0)
                with open(sys.argv[1] + "-hops", "a") as hops:
                    hops.write(".")
        signal.signal(signal.SIGTERM, hop)
        open(sys.argv[1], "w").close()
        time.sleep(60)
    """
    _ask(tmp_path, source, terminate_grace_seconds=0.05)
    hops = tmp_path / "up-hops"
    asyncio.run(settled(lambda: hops.exists() and hops.stat().st_size))  # one that hops is never where one looks, but leaves a trace


def test_a_program_that_is_stopped_hears_that_it_is_to_end(tmp_path: Path) -> None:
    source = """
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGSTOP)
    """
    error = _ask(tmp_path, source, terminate_grace_seconds=LIMIT)
    assert (error.returncode, error.forced_kill) == (7, False)


def test_a_program_may_have_all_the_time_it_wants(tmp_path: Path) -> None:
    source = """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.1), os._exit(7)))
        open(sys.argv[1], "w").close()
        time.sleep(60)
    """
    error = _ask(tmp_path, source, terminate_grace_seconds=None)
    assert (error.returncode, error.forced_kill) == (7, False)


def test_a_task_that_was_asked_before_starts_no_program(tmp_path: Path) -> None:
    begun = threading.Event()

    def work() -> int:
        begun.set()
        until(terminate_requested)
        return run_subprocess(["touch", str(tmp_path / "started")])

    def body(pipeline: StagedPipeline) -> Any:
        task = pipeline.task(work).run()
        assert begun.wait(LIMIT)
        task.request_terminate()
        return task.exception(LIMIT)

    error = run_body(body)
    assert isinstance(error, TerminatedError)
    assert (error.pid, error.returncode, error.argv[0]) == (None, None, "touch")
    assert "was not started" in str(error)
    assert not (tmp_path / "started").exists()


def test_output_goes_where_it_is_told_to(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        assert run_subprocess(["sh", "-c", "pwd; echo $WHO >&2; cat"], stdout=out, stderr=subprocess.STDOUT, cwd="/", env={"WHO": "me"}) == 0
    assert (tmp_path / "out").read_text() == "/\nme\n"


def test_an_interrupted_call_ends_its_program_and_a_second_interruption_ends_the_grace(tmp_path: Path) -> None:
    source = """
        import signal, sys
        from pipeline.scheduler import run_subprocess
        program = "import os, signal, time; signal.signal(15, lambda *_: os.write(1, b'asked\\\\n')); os.write(1, b'up\\\\n')\\nwhile True: time.sleep(9)"
        try:
            run_subprocess([sys.executable, "-c", program], terminate_grace_seconds=None)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with Program(tmp_path, source) as program:
        program.says("up")
        family = program.family()
        program.interrupt(signal.SIGINT)
        program.says("asked")
        program.interrupt(signal.SIGINT)
        assert program.finish().out.splitlines()[-1] == "interrupted"
    assert not alive(family)


def test_where_children_are_waited_for_by_others_the_end_is_an_error_and_no_success(tmp_path: Path) -> None:
    source = """
        import signal, sys
        from pipeline.scheduler import run_subprocess
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            run_subprocess(["false"])
        except RuntimeError as error:
            print(error)
    """
    assert "ignores SIGCHLD" in run_program(tmp_path, source).out


@pytest.mark.parametrize(
    ("argv", "options", "error", "text"),
    [
        ([], {}, ValueError, "argv"),
        ("true", {}, TypeError, "not the text 'true'"),
        ([3], {}, TypeError, "PathLike"),
        (["true"], {"terminate_grace_seconds": -1}, ValueError, "terminate_grace_seconds"),
        (["true"], {"terminate_grace_seconds": float("nan")}, ValueError, "terminate_grace_seconds"),
        (["yes"], {"stdout": subprocess.PIPE}, ValueError, "stdout=PIPE has nobody"),
        (["cat"], {"stdin": subprocess.PIPE}, ValueError, "stdin=PIPE has nobody"),
        (["true"], {"process_group": 0}, ValueError, "a group of its own"),
        (["true"], {"start_new_session": False}, ValueError, "a group of its own"),
        (["/no/such/program"], {}, FileNotFoundError, "no/such/program"),
        (["true"], {"cwd": "/no/such/folder"}, FileNotFoundError, "no/such/folder"),
    ],
)
def test_a_program_is_checked_before_it_starts(argv: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run_subprocess(argv, **options)
