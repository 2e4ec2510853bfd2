"""`run_subprocess`: a program that ends when its task is asked to, with everything that it has started.

The rule kept here: the program is the first of a process group of its own, and is not reaped before the whole group is
gone: until then its number cannot belong to anybody else, so no stranger is ever killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .context import TaskContext, working_on
from .errors import TerminatedError

__all__ = ["run_subprocess"]

_FIRST_LOOK, _LAST_LOOK = 0.001, 0.05
"""Seconds between looks at whether it has ended; they double from the first to the last."""


def run_subprocess(
    argv: Sequence[str | os.PathLike[str]], *, terminate_grace_seconds: float | None = 5.0, **options: Any
) -> int:
    """Run a program and return its exit code; negative, the signal that has ended it.

    When the task that calls this is asked to end, the program's process group gets SIGTERM and, if any of it is left
    after `terminate_grace_seconds` (None: however long it takes), SIGKILL; then `TerminatedError` is raised. The same
    happens, without the error, when this call is interrupted. `options` are those of `subprocess.Popen`, such as
    `cwd`, `env`, `stdout`; stdin is empty if they do not say otherwise. POSIX only. Ends are seen within 50 ms.
    """
    command = tuple(os.fspath(part) for part in argv)
    if not command:
        raise ValueError("argv is a program and its arguments, and is empty")
    if terminate_grace_seconds is not None and not terminate_grace_seconds >= 0:
        raise ValueError(f"terminate_grace_seconds is a number of seconds, 0 or more, or None; not {terminate_grace_seconds!r}")
    if not hasattr(os, "waitid"):
        raise NotImplementedError("run_subprocess needs process groups, which this system does not have")
    context = working_on.get() or TaskContext(None)
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL, **options, "start_new_session": True}
    program: subprocess.Popen[Any] = subprocess.Popen(command, **given)
    try:
        asked = _wait(program, context)
    except BaseException:
        _end_group(program, terminate_grace_seconds)
        raise
    if not asked:
        return program.wait()
    forced = _end_group(program, terminate_grace_seconds)
    raise TerminatedError(
        f"{command[0]} was ended because its task was asked to end" + (f": {context.reason}" if context.reason else ""),
        argv=command,
        pid=program.pid,
        returncode=program.returncode,
        forced_kill=forced,
    )


def _wait(program: subprocess.Popen[Any], context: TaskContext) -> bool:
    """Until the program has ended (False), or the task was asked to (True)."""
    pause = _FIRST_LOOK
    while not _ended(program):
        if context.wait(pause):
            return True
        pause = min(2 * pause, _LAST_LOOK)
    return False


def _ended(program: subprocess.Popen[Any]) -> bool:
    """Whether it has, without reaping it."""
    return os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(program: subprocess.Popen[Any], grace: float | None) -> bool:
    """End the whole group, gently, then for sure. True when it took force."""
    deadline = None if grace is None else time.monotonic() + grace
    os.killpg(program.pid, signal.SIGTERM)
    pause = _FIRST_LOOK
    while alive := _group_alive(program):
        if deadline is not None and time.monotonic() >= deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, _LAST_LOOK)
    if alive:
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()  # it has ended, or was killed just now
    return alive


def _group_alive(program: subprocess.Popen[Any]) -> bool:
    """Whether anybody in the group is more than a zombie. Without /proc only the program itself is looked at."""
    if not _ended(program):
        return True
    return any(_state_in_group(entry, program.pid) not in (None, "Z", "X") for entry in _processes())


def _processes() -> list[Path]:
    proc = Path("/proc")
    return [entry for entry in proc.iterdir() if entry.name.isdigit()] if (proc / "self/stat").exists() else []


def _state_in_group(entry: Path, group: int) -> str | None:
    """The state of a process, by its letter, if it is in that group."""
    try:
        _, _, rest = (entry / "stat").read_text().rpartition(")")
    except OSError:  # it has ended meanwhile
        return None
    state, _, its_group, *_ = rest.split()
    return state if int(its_group) == group else None
