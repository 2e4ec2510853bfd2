"""How a worker process is started.

The rules kept here: what starting a process changes in this one (signal mask, environment, the main program's name) is
set back at once, and one process starts at a time. What the new process prints goes to its pipes before it imports the
main program, wherever that can be had.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from typing import Any

import multiprocess
from multiprocess import reduction, resource_tracker

from pipeline.errors import PipelineError
from pipeline.runtime import PipelineRuntime

from . import entry, voice
from .handlers import main_is_importable

__all__ = ["explained", "is_importing_main", "launch"]

_SAFE_PATH = "PYTHONSAFEPATH"
_PRELOAD = ["workers.process.entry", "asyncio", "dill", "multiprocess.connection", "multiprocess.reduction"]
"""Imported once by the fork server, so that a worker starts in a few milliseconds."""

_multiprocess: Any = multiprocess  # its functions are made at import, out of a type checker's sight
_starting = threading.Lock()
"""Starting a process changes the signal mask and, the first time, starts the fork server: one at a time."""


def launch(runtime: PipelineRuntime, method: str, arguments: tuple[Any, ...], *, name: str, voices: tuple[int, ...]) -> Any:
    """Start a worker process, from a thread, for that may take a while. `voices`: where it prints and logs to."""
    context = _multiprocess.get_context(method)
    with _starting, _signals_blocked(), _main_hidden():
        if method == "forkserver":
            context.set_forkserver_preload(_PRELOAD)
        with _safe_path():
            if method == "forkserver":
                context = _Context(context, voices)
            return runtime.start_process(context, entry.main, arguments, name=name)


def is_importing_main() -> bool:
    """Whether this is a process that is being started, and imports the main program."""
    return getattr(_multiprocess.current_process(), "_inheriting", False)


class _Context:
    """Makes processes that speak through their own pipes from the beginning."""

    def __init__(self, context: Any, voices: tuple[int, ...]) -> None:
        self._context = context
        self._voices = voices

    def Process(self, **options: Any) -> Any:
        process = self._context.Process(**options)
        process._name = _SpeakingName(process._name, self._voices)
        return process


_BEGIN = f"(voice := __import__('sys').modules.get({voice.__name__!r})) and voice.begin([end.detach() for end in ends], levels), name"
"""Evaluated in the new process; its last element is the name."""


class _SpeakingName(str):
    """The name of a process that is being started.

    It is the first thing that the process reads, before it imports the main program, which may print, log and fail. So
    what redirects the output travels with it. A process that has nothing of this library yet (a spawned one, or one of a
    fork server that others have started) could not import it here; its output is redirected when it gets to `entry.main`.
    """

    _voices: tuple[int, ...] = ()

    def __new__(cls, name: str, voices: tuple[int, ...]) -> _SpeakingName:
        self = super().__new__(cls, name)
        self._voices = voices
        return self

    def __reduce__(self) -> Any:
        voices, self._voices = self._voices, ()
        if not voices:
            return (str, (str(self),))
        known = {"name": str(self), "ends": tuple(map(reduction.DupFd, voices)), "levels": voice.levels()}
        return (eval, (f"({_BEGIN})[-1]", known))


def explained(error: BaseException) -> BaseException:
    """The error that a start has raised, with what to do where the cause is known."""
    if isinstance(error, OSError) and "AF_UNIX path too long" in str(error):
        return PipelineError(
            f"the fork server's socket cannot be made: the path of the directory for temporary files, {tempfile.gettempdir()!r}, "
            'is too long; set TMPDIR to a shorter one, or use run_in=InProcess(start_method="spawn")'
        )
    return error


@contextlib.contextmanager
def _signals_blocked() -> Any:
    # Inherited by the fork server and its children, until they have set their own handling: a Ctrl-C that reaches a
    # worker while it starts must not print a traceback there, and a SIGTERM to the whole group must not end the fork
    # server, which tells how its children fare.
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # first, for its start ends with unblocking SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _safe_path() -> Any:
    # The fork server imports this package by name; a folder in the current directory must not take its place.
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


@contextlib.contextmanager
def _main_hidden() -> Any:
    # A program read from standard input has a `__file__` that does not exist, and starting a process would try to
    # import it. What such a program defines travels by value instead.
    main = sys.modules["__main__"]
    if main_is_importable() or "__file__" not in vars(main):
        yield
        return
    path = vars(main).pop("__file__")
    try:
        yield
    finally:
        vars(main)["__file__"] = path
