"""One worker process and the parent's ends of its two pipes.

The rule kept here: what was opened for a worker is closed when it has ended, however it ended; and its last words are
read before it is declared gone.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from pipeline.observe.logs import get_logger
from pipeline.registers import ProcessLike
from pipeline.runtime import PipelineRuntime

from . import faults, voice
from .arena import Arena
from .launch import explained, is_importing_main, launch
from .memory import Memory
from .output import WorkerOutput
from .packer import Packer
from .shared import ChildEnd, SharedWords
from .wire import Frame, FrameReader, frame

__all__ = ["WorkerLink", "program_is_ending"]

_CHUNK = 1 << 18
_PIPE_SIZE = 1 << 20
_NOT_YET: Any = object()
_REAP = 1.0
"""Seconds for a killed process to be reaped."""

_UNKNOWN = 255
"""The exit code of a process whose fork server has died, and which may still be alive: nobody can tell."""

_ending = threading.Event()
_alive: weakref.WeakSet[WorkerLink] = weakref.WeakSet()


def _end_with_program() -> None:
    # A run that nobody has closed. Its workers would take the SIGTERM that multiprocess sends now for one to the whole
    # group, and multiprocess would wait for them for ever.
    _ending.set()
    for link in list(_alive):
        link.kill()


atexit.register(_end_with_program)  # after multiprocess has registered its own, and so run before it


def program_is_ending() -> bool:
    """Whether the interpreter is on its way out, and workers that end are not to be replaced."""
    return _ending.is_set()


class WorkerLink:
    """A worker process. Made and used on the run's loop; the process is started from a thread, for that takes time."""

    def __init__(
        self,
        runtime: PipelineRuntime,
        stage: str,
        number: int,
        method: str,
        handler: bytes,
        max_memory: int | None,
        memory: Memory,
        *,
        on_frame: Callable[[WorkerLink, Frame, Any], None],
        on_end: Callable[[WorkerLink, int | None, BaseException | None], None],
    ) -> None:
        self._runtime = runtime
        self.number = number
        self._name = f"{stage}:worker-{number}"
        self._on_frame = on_frame
        self._on_end = on_end
        self.ready = False
        """Its `setup` is done."""
        self.last_item = self.last_attempt = 0
        """Of the shared words, when it ended."""
        self.garbled = False
        """It was killed because something else than frames came from it."""
        self._method = method
        self._arguments = (handler, stage, number, max_memory)
        self._process: Any = None
        self._out: deque[memoryview] = deque()
        self._writing = False
        self._hanging_up = False
        self._reader = FrameReader()
        self._words = SharedWords()
        self._arenas = (Arena.make(), Arena.make())
        self.packer = Packer(None, self._arenas[1], memory)
        child_in, self._down = _pipe()
        self._up, child_out = _pipe()
        self._child_ends = (ChildEnd(child_in), ChildEnd(child_out))
        self._open = {self._down, self._up}
        self.output = WorkerOutput(runtime.name, stage, number)
        self._reading = False
        self._lock = threading.Lock()
        self._launched: Any = _NOT_YET
        self._taken = self._disowned = False

    @property
    def words(self) -> memoryview:
        return self._words.words

    def is_ready(self, *, takes_blocks: bool) -> None:
        """Its `setup` is done; large buffers may go through shared memory if it has that."""
        self.ready = True
        if takes_blocks:
            self.packer.out = self._arenas[0]

    # --- starting

    def start(self) -> None:
        """Start the process; `on_end` tells if that fails."""
        if is_importing_main():
            _refuse()
        self._runtime.at_end.append(self._disown)
        self._runtime.start_thread(self._launch, name=f"{self._name}:start", starting=True)

    def _launch(self) -> None:
        try:
            voices = self.output.child_ends
            process = launch(
                self._runtime,
                self._method,
                (self._child_ends, voices, voice.levels(), self._words, self._arenas, *self._arguments),
                name=self._name,
                voices=tuple(end.number for end in voices),
            )
        except BaseException as error:
            self._hand_over(None, partial(self._start_failed, explained(error)))
        else:
            self._hand_over(process, partial(self._started, process))

    def _hand_over(self, process: Any, callback: Callable[[], None]) -> None:
        """From the starting thread to the loop; if the run has ended without it, everything is given back here."""
        with self._lock:
            self._launched = process
            if not self._disowned and self._runtime.call_soon_threadsafe(callback):
                return
            self._disowned = True
        self._give_back()

    def _disown(self) -> None:
        """The run is over. A process that was started for it and has not been taken over belongs to nobody."""
        with self._lock:
            if self._taken or self._disowned:
                return
            self._disowned = True
            if self._launched is _NOT_YET:
                return  # the starting thread will see it
        self._give_back()

    def _give_back(self) -> None:
        if self._launched not in (None, _NOT_YET):
            _discard(self._launched)
        self._close_child_ends()
        for descriptor in list(self._open):
            self._close(descriptor)
        self.output.close()
        self._close_memory()

    def _take_over(self) -> bool:
        with self._lock:
            self._taken = not self._disowned
            return self._taken

    def _start_failed(self, error: BaseException) -> None:
        if self._take_over():
            self._close_child_ends()
            self._release()
            asyncio.get_running_loop().call_soon(self._on_end, self, None, error)

    def _started(self, process: Any) -> None:
        if not self._take_over():
            return
        self._process = process
        _alive.add(self)
        # Only the worker has these now: when it dies, our reading end sees the end.
        self._close_child_ends()
        os.set_blocking(self._down, False)
        os.set_blocking(self._up, False)
        self._runtime.register_process(cast("ProcessLike", process), on_end=self._ended)
        self.output.listen(process.pid)
        asyncio.get_running_loop().add_reader(self._up, self._read)
        self._reading = True
        self._write()

    # --- talking

    def send(self, kind: Frame, content: Any) -> None:
        """Send a frame as soon as the pipe takes it. Nothing is sent after `hang_up`."""
        if self._hanging_up or self._down not in self._open:
            return
        self._out.append(memoryview(frame(kind, content)))
        if not self._writing and self._process is not None:
            self._write()

    def hang_up(self) -> None:
        """Tell the worker that nothing more will come, once everything is sent: it finishes and ends."""
        self._hanging_up = True
        if not self._writing and self._process is not None:
            self._write()

    def kill(self) -> None:
        """End the process without asking it."""
        if self._process is not None and self in _alive:
            self._process.kill()

    def _write(self) -> None:
        if self._down not in self._open:
            return
        descriptor = self._down
        try:
            while self._out:
                written = os.write(descriptor, self._out[0])
                if written < len(self._out[0]):
                    self._out[0] = self._out[0][written:]
                else:
                    self._out.popleft()
        except BlockingIOError:
            if not self._writing:
                asyncio.get_running_loop().add_writer(descriptor, self._write)
                self._writing = True
            return
        except BrokenPipeError:  # it is dying; its sentinel tells the rest
            self._out.clear()
        self._stop_writing()
        if self._hanging_up:
            self._close(self._down)

    def _stop_writing(self) -> None:
        if self._writing:
            asyncio.get_running_loop().remove_writer(self._down)
            self._writing = False

    def _read(self) -> None:
        try:
            chunk = os.read(self._up, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            # It is ending; or its handler has closed what it found, and nothing that it does can come here any more.
            self._stop_reading()
            self.kill()
            return
        self._take(chunk)

    def _take(self, chunk: bytes) -> None:
        try:
            frames = self._reader.feed(chunk)
        except Exception:  # whatever it is that the handler has written to a descriptor that is not its own
            self.garbled = True
            self._stop_reading()
            self.kill()
            return
        for kind, content in frames:
            self._on_frame(self, kind, content)

    def _stop_reading(self) -> None:
        if self._reading:
            asyncio.get_running_loop().remove_reader(self._up)
            self._reading = False

    # --- the end

    def _ended(self) -> None:
        if self._process.exitcode is None:  # its sentinel is a pipe, and the handler may have closed that
            self._process.kill()
            self._process.join(_REAP)
        while self._reading:  # its last words: what it had written before it ended
            try:
                chunk = os.read(self._up, _CHUNK)
            except BlockingIOError:
                break
            if not chunk:
                break
            self._take(chunk)
        if self._reading and self._process.exitcode == _UNKNOWN:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        self.output.finish()
        self.last_item, self.last_attempt = self.words[SharedWords.ITEM], self.words[SharedWords.ATTEMPT]
        exit_code: int | None = self._process.exitcode
        _alive.discard(self)
        self._release()
        if exit_code is not None:
            self._process.close()
        self._on_end(self, exit_code, None)

    def _release(self) -> None:
        self._stop_reading()
        self._stop_writing()
        self._out.clear()
        self._close(self._up)
        self._close(self._down)
        self.output.close()
        self._close_memory()

    def _close_child_ends(self) -> None:
        for end in self._child_ends:
            end.close()
        self._words.close_descriptor()
        for arena in self._arenas:
            if arena is not None:
                arena.close_descriptor()

    def _close_memory(self) -> None:
        self.packer.out = None
        self._words.close()
        for arena in self._arenas:
            if arena is not None:
                arena.close()

    def _close(self, descriptor: int) -> None:
        if descriptor in self._open:
            self._open.discard(descriptor)
            os.close(descriptor)


def _refuse() -> None:
    # This is a worker itself, and the program that it imports goes on as if it were the first. It must not: what that
    # program does would be done once for each worker.
    if not voice.has_begun():  # else the parent says it, once
        get_logger().error(str(faults.no_guard()))
    with contextlib.suppress(Exception):  # whatever stands for stdout
        sys.stdout.flush()
    os._exit(faults.Exit.NO_GUARD)


def _discard(process: Any) -> None:
    """End a process that was started for a run that is over."""
    process.kill()
    process.join(_REAP)
    if process.exitcode is not None:
        process.close()


def _pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    with contextlib.suppress(OSError, AttributeError):  # a larger pipe is faster; the default one works
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return reading, writing
