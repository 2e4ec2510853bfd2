"""What README says under Security: no port, no shell, no file for others, no descriptor in the wrong hands.

The rule kept here: a program is watched from outside while its workers work, and from inside by an audit hook.
"""

from __future__ import annotations

import ast
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from helpers import Program, until

PROGRAM = """
import asyncio, json, os, subprocess, sys, threading
import numpy as np
from pipeline import Pipeline
from stages import stage

events = []
watched = ("os.system", "os.exec", "os.spawn", "os.startfile", "subprocess.Popen", "socket.bind", "socket.connect",
           "socket.sendto", "os.chmod", "urllib.Request", "ctypes.dlopen")
sys.addaudithook(lambda event, args: events.append((event, repr(args[:2]))) if event in watched else None)

def descriptors():
    "Of a program that a handler starts: it should have none of ours."
    found = subprocess.run([sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))"], capture_output=True, text=True)
    return found.stdout

def look(n):
    return descriptors() if n == 3 else n

def large(array):
    return array + 1

hold = threading.Event()

def wait(item):
    if item == "last":
        print("at work", flush=True)
        sys.stdin.read()
    return item

async def main():
    os.umask(0)
    before = len(events)
    found = [item for run_in in ("thread", "process")
             for item in await (Pipeline(range(6)) >> stage(run_in=run_in)(look)).collect() if isinstance(item, str)]
    arrays = await (Pipeline([np.zeros(500_000)] * 3) >> stage(run_in="process")(large)).collect()
    assert len(arrays) == 3
    pipeline = Pipeline(["first", "last"]) >> stage(run_in="process")(wait) >> stage(run_in="thread")(str)
    await pipeline.run()
    print(json.dumps({"found": found, "events": events[before:]}), flush=True)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where programs put their temporary files; it is open to everybody. Not pytest's: a socket's path must be short."""
    with TemporaryDirectory(prefix="penstock-") as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def told_by(program: Program) -> dict[str, Any]:
    with program:
        finished = program.finish()
    assert finished.code == 0, finished.err
    return json.loads(finished.out.splitlines()[-1])


@pytest.mark.usefixtures("files")
def test_the_library_starts_no_program_and_asks_nobody_but_the_fork_server(tmp_path: Path) -> None:
    told = told_by(Program(tmp_path, PROGRAM))
    started = [arguments for event, arguments in told["events"] if event == "subprocess.Popen"]
    assert len(started) == 1, "the handler in the thread starts one program, and the library none"
    others = [(event, arguments) for event, arguments in told["events"] if event != "subprocess.Popen"]
    # The interpreter's own fork server is asked over a socket in a private directory; nothing else is.
    assert all(event in ("socket.connect", "socket.bind", "os.chmod") for event, _ in others), others
    assert all("pymp-" in arguments or "listener-" in arguments for _, arguments in others), others


def test_while_workers_work_the_family_has_no_port_and_private_files_only(tmp_path: Path, files: Path) -> None:
    source = PROGRAM.replace("sys.stdin.read()", "import time; time.sleep(60)")
    with Program(tmp_path, source) as program:
        until(lambda: "at work" in program.err() + program.out())  # what workers print comes through the log
        family = [psutil.Process(program.process.pid), *program.family()]
        assert len(family) >= 3
        assert [member.net_connections(kind="inet") for member in family] == [[]] * len(family)
        assert [f"{path} {mode:o}" for path, mode in within_reach(files)] == []


def within_reach(folder: Path) -> Iterator[tuple[Path, int]]:
    """What another user could open: nothing inside a private directory is."""
    for path in folder.iterdir():
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode & 0o077:
            yield path, mode
            if path.is_dir():
                yield from within_reach(path)


@pytest.mark.usefixtures("files")
def test_programs_that_handlers_start_inherit_no_descriptor(tmp_path: Path) -> None:
    found = told_by(Program(tmp_path, PROGRAM))["found"]
    assert len(found) == 2
    for text in found:
        assert set(ast.literal_eval(text)) <= {"0", "1", "2", "3"}, text  # 3 is the directory that is being listed
