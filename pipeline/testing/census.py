"""What a program holds at one moment: its threads, child processes and file descriptors, each with a name for people.

The rule kept here: looking changes nothing and needs nothing but the standard library. What the interpreter keeps for
itself (fork server, resource tracker, the idle threads of a loop's default executor) is not counted.

Everything is read from /proc. Where there is none, children are those that `multiprocessing` and `multiprocess` know,
and descriptors are those in /dev/fd, by number alone; without that, no descriptor is seen.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Census", "place"]

_PACKAGES = ("multiprocess", "multiprocessing")
_LONG = 120
"""Characters of a command line in a message, at most."""


class Census:
    """One count. `since(earlier)` says what has come."""

    def __init__(self) -> None:
        self.threads = {thread for thread in threading.enumerate() if thread not in _executor_threads()}
        self.children = _children()
        self.descriptors = _descriptors()

    def since(self, earlier: Census) -> list[str]:
        """What is there now and was not then, in words."""
        found = [f"thread {_thread(thread)}" for thread in self.threads - earlier.threads if thread.is_alive()]
        found += [f"process {pid}: {what}" for pid, what in self.children.items() if pid not in earlier.children]
        known = earlier.descriptors
        return found + [f"descriptor {fd}: {what}" for fd, what in self.descriptors.items() if known.get(fd) != what]


def place(frame: FrameType | None) -> str:
    """Where a frame is, as `file:line in function`."""
    if frame is None:
        return "nowhere"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


# --- threads


def _thread(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread.name!r} at {place(frame)}" if frame is not None else f"{thread.name!r}"


def _executor_threads() -> set[threading.Thread]:
    """Those that the running loop keeps for `asyncio.to_thread` until it closes."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return set()
    # Private, in every loop of the standard library; elsewhere these threads count, which is strict but not wrong.
    return set(getattr(getattr(loop, "_default_executor", None), "_threads", ()))


# --- processes


def _children() -> dict[int, str]:
    """Every descendant. Those of a keeper count, the keeper does not."""
    if not os.path.isdir("/proc/self/task"):
        return _registered_children()
    kept, found = _keepers(), dict[int, str]()
    for pid in _descendants(os.getpid()):
        if pid not in kept and (what := _command(pid)) is not None:
            found[pid] = what
    return found


def _descendants(pid: int) -> Iterator[int]:
    for child in _children_of(pid):
        yield child
        yield from _descendants(child)


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        text = _read(f"/proc/{pid}/task/{thread}/children")
        if text is None and not os.path.exists("/proc/self/task/" + str(threading.get_native_id()) + "/children"):
            return _children_by_parent(pid)  # a kernel that does not list them
        found += map(int, (text or "").split())
    return found


def _children_by_parent(parent: int) -> list[int]:
    found: list[int] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        # The command's name is in parentheses and may hold any character: the parent's id is the second field after it.
        fields = (_read(f"/proc/{name}/stat") or "").rpartition(")")[2].split()
        if len(fields) > 1 and int(fields[1]) == parent:
            found.append(int(name))
    return found


def _command(pid: int) -> str | None:
    """What a process is; None when it is gone since."""
    stat = _read(f"/proc/{pid}/stat")
    if stat is None:
        return None
    state = stat.rpartition(")")[2].split()[0]
    command = " ".join((_read(f"/proc/{pid}/cmdline") or "").split("\0")).strip()
    return f"{command[:_LONG] or stat.partition('(')[2].rpartition(')')[0]}{' (zombie)' if state == 'Z' else ''}"


def _registered_children() -> dict[int, str]:
    found: dict[int, str] = {}
    for package in _PACKAGES:
        module: Any = sys.modules.get(package)
        for child in module.active_children() if module is not None else ():
            found[child.pid] = child.name
    return found


def _keepers() -> set[int]:
    """The processes that an interpreter starts once, for itself. Both packages call them the same."""
    pids = {getattr(keeper, name, None) for keeper in _kept() for name in ("_forkserver_pid", "_pid")}
    return {pid for pid in pids if isinstance(pid, int)}


def _kept() -> Iterator[Any]:
    for package in _PACKAGES:
        yield getattr(sys.modules.get(f"{package}.forkserver"), "_forkserver", None)
        yield getattr(sys.modules.get(f"{package}.resource_tracker"), "_resource_tracker", None)


# --- descriptors


def _descriptors() -> dict[int, str]:
    folder = next((path for path in ("/proc/self/fd", "/dev/fd") if os.path.isdir(path)), None)
    if folder is None:
        return {}
    kept = {getattr(keeper, name, None) for keeper in _kept() for name in ("_forkserver_alive_fd", "_fd")}
    found: dict[int, str] = {}
    for name in os.listdir(folder):
        number = int(name)
        if number not in kept and (target := _target(folder, name)) is not None:
            found[number] = target
    return found


def _target(folder: str, name: str) -> str | None:
    """What a descriptor leads to; None for the one that has just listed the folder."""
    if folder == "/proc/self/fd":
        try:
            return os.readlink(f"{folder}/{name}").removesuffix(" (deleted)")
        except OSError:
            return None
    try:
        os.fstat(int(name))
    except OSError:
        return None
    return "open"


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None
