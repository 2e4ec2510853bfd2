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

from pipeline.cancellation.programs import groups
from pipeline.cancellation.work import Request, working_on

from .context import TaskContext
from .errors import TerminatedError

__all__ = ["run_subprocess"]

_FIRST_LOOK, _LAST_LOOK = 0.001, 0.05
"""Seconds between looks at whether it has ended; they double from the first to the last."""


def run_subprocess(
    argv: Sequence[str | os.PathLike[str]], *, terminate_grace_seconds: float | None = 5.0, **options: Any
) -> int:
    """Run a program and return its exit code; negative, the signal that has ended it.

    When the work that calls this is asked to end (a task; or a handler in a thread or a process, see `terminate_requested`), the program's process group gets SIGTERM and, if any of it is left
    after `terminate_grace_seconds` (None: however long it takes), SIGKILL; then `TerminatedError` is raised. The same
    happens, without the error, when this call is interrupted; a second interruption ends the grace. A task that was asked
    before starts no program. What leaves the group (a daemon, `setsid`) is not found, and what is still in it when the
    program has ended by itself goes on. When the interpreter, or a stage's worker process, ends during the call, the group
    gets SIGKILL; only who is killed with SIGKILL leaves it behind: stages with a `timeout` run programs in threads.
    `options` are those of `subprocess.Popen`, such as `cwd`, `env`, `stdout`; stdin is empty if they do not say otherwise.
    POSIX only. Ends are seen within 50 ms.
    """
    command = _check(argv, terminate_grace_seconds, options)
    work = working_on.get()
    context: Request = TaskContext("") if work is None else work.context()
    if context.requested:
        raise _terminated(command, context, "was not started")
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL, **options, "start_new_session": True}
    program: subprocess.Popen[Any] = subprocess.Popen(command, **given)
    groups.add(program.pid)
    try:
        return _see_through(program, command, context, terminate_grace_seconds)
    finally:
        groups.discard(program.pid)


def _see_through(program: subprocess.Popen[Any], command: tuple[str, ...], context: Request, grace: float | None) -> int:
    try:
        asked = _wait(program, context)
    except ChildProcessError:  # its number may belong to anybody by now
        raise RuntimeError(
            f"{command[0]} has ended, and how is unknown, for somebody else has asked the system for it: this program "
            "ignores SIGCHLD, or waits for all of its children with os.wait() or os.waitpid(-1)"
        ) from None
    except BaseException:
        _end_group(program, grace)
        raise
    if not asked:
        return _reap(program)
    forced = _end_group(program, grace)
    raise _terminated(command, context, "was ended", pid=program.pid, returncode=program.returncode, forced_kill=forced)


def _check(argv: Any, grace: float | None, options: dict[str, Any]) -> tuple[str, ...]:
    if isinstance(argv, (str, bytes)):
        raise TypeError(f"argv is a program and its arguments, such as ['ls', '-l'], not the text {argv!r}")
    command = tuple(os.fspath(part) for part in argv)
    if not command:
        raise ValueError("argv is a program and its arguments, and is empty")
    if grace is not None and not grace >= 0:
        raise ValueError(f"terminate_grace_seconds is a number of seconds, 0 or more, or None; not {grace!r}")
    for stream in ("stdin", "stdout", "stderr"):
        if options.get(stream) == subprocess.PIPE:
            raise ValueError(f"{stream}=PIPE has nobody at its other end, and the program would wait for ever; give it a file")
    for option in ("process_group", "start_new_session"):
        if option in options:
            raise ValueError(f"{option} is not an option here: the program always gets a session and a group of its own")
    if not hasattr(os, "waitid"):
        raise NotImplementedError("run_subprocess needs process groups, which this system does not have")
    return command


def _terminated(command: tuple[str, ...], context: Request, what: str, **found: Any) -> TerminatedError:
    why = f": {context.reason}" if context.reason else ""
    return TerminatedError(f"{command[0]} {what} because its task was asked to end{why}", argv=command, **found)


def _wait(program: subprocess.Popen[Any], context: Request) -> bool:
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
    pause = _FIRST_LOOK
    alive = True
    try:
        os.killpg(program.pid, signal.SIGTERM)
        os.killpg(program.pid, signal.SIGCONT)  # one that is stopped would sleep through it
        while (alive := _group_alive(program)) and (deadline is None or time.monotonic() < deadline):
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)
    finally:
        # Also when nobody was seen: one that forks and exits again and again is never where one looks. The system gives a
        # signal to all of a group at once, so nobody slips through here.
        os.killpg(program.pid, signal.SIGKILL)
        _reap(program)  # it has ended, or was killed just now
    return alive


def _reap(program: subprocess.Popen[Any]) -> int:
    groups.discard(program.pid)  # first: from now on its number may be anybody's
    return program.wait()


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
