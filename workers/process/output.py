"""What a worker process prints and logs, as records of the parent's log. The parent's side of `voice`.

The rules kept here:

- One record a line, in the order of its stream, as soon as the line is complete, with the stage, the worker's number and
  pid, and the stream. What a worker had written before it died is read before it is declared gone.
- A flood drowns nobody: a worker has so many lines a second, what is beyond is counted and not shown, and the loop gives
  it a few milliseconds at a time. Reading goes on all the while, so that the worker does not wait for ever.
- Nothing waits for the end of a stream: programs that a handler has started may keep it open for as long as they like.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections import deque
from time import monotonic
from typing import Any

from pipeline.observe.logs import get_logger

from .shared import ChildEnd
from .voice import STREAMS

__all__ = ["WorkerOutput"]

_CHUNK = 1 << 10
"""Bytes read at once while lines are shown: a record costs some 50 µs, and the loop has others to serve."""
_PIPE = 1 << 14
"""Bytes that a pipe holds: so much, at most, is shown in one piece, when the worker has ended."""
_FLOOD = 1 << 16
"""Bytes read at once while they are only counted."""
_REST = 0.001
"""Seconds between two such readings."""
_LAST = 1 << 20
"""Bytes read of each stream, at most, when the worker has ended: somebody else may go on writing."""
_LONGEST = 1 << 16
"""Bytes of one line; a longer one comes in pieces."""
_BURST = 5000
_PER_SECOND = 1000
"""Lines that one worker may have at once, and regains in a second."""
_WORDS = 20
"""Lines of stderr that are kept for the error that a failed start becomes."""


_RESERVED = frozenset({"event", "self", "method_name", "exc_info", "stack_info", "stack_level"})
"""Fields that mean something else to a logger."""


class WorkerOutput:
    """The pipes of one worker for what it prints and logs. Made and used on the run's loop."""

    def __init__(self, pipeline: str, stage: str, number: int) -> None:
        self._tags: dict[str, Any] = {"pipeline": pipeline, "stage": stage, "worker": number}
        self._streams: list[_Stream] = []
        self._child_ends: list[ChildEnd] = []
        self._lines = float(_BURST)
        self._filled = monotonic()
        self._unshown = 0
        self._muted = False
        self.last_words: deque[str] = deque(maxlen=_WORDS)
        """The last lines of its stderr."""
        try:
            for name in STREAMS:
                reading, writing = os.pipe()
                with contextlib.suppress(OSError, AttributeError):
                    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE)
                self._child_ends.append(ChildEnd(writing))
                self._streams.append(_Stream(self, name, reading))
        except BaseException:
            self.close()
            raise

    @property
    def child_ends(self) -> tuple[ChildEnd, ...]:
        """The ends that the worker writes to."""
        return tuple(self._child_ends)

    def listen(self, pid: int) -> None:
        """The worker has been started: read what it says from now on."""
        self._tags["pid"] = pid
        self.close_child_ends()
        for stream in self._streams:
            stream.listen()

    def mute(self) -> None:
        """Show nothing more: the run fails already for what this worker is about to complain of, too."""
        self._muted = True

    def close_child_ends(self) -> None:
        """Only the worker has these from now on. Idempotent."""
        ends, self._child_ends = self._child_ends, []
        for end in ends:
            end.close()

    def finish(self) -> None:
        """The worker has ended: read what is left, and close."""
        for stream in self._streams:
            stream.read_last()
        self._tell_unshown()
        self.close()

    def close(self) -> None:
        """Close every end. Idempotent."""
        self.close_child_ends()
        for stream in self._streams:
            stream.close()

    # --- what the streams say

    @property
    def flooded(self) -> bool:
        """Whether there is nothing left of what this worker may say for now."""
        now = monotonic()
        self._lines = min(self._lines + (now - self._filled) * _PER_SECOND, _BURST)
        self._filled = now
        return self._lines < 1

    def say(self, stream: str, lines: list[bytes]) -> None:
        """Show these lines, as many as there may be."""
        log = get_logger()
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if stream == "stderr":
                self.last_words.append(text)
            if self._muted:
                continue
            if self.flooded:
                self._unshown += 1
                continue
            self._lines -= 1
            self._tell_unshown()
            level, event, fields = _record(text) if stream == "log" else ("warning" if stream == "stderr" else "info", text, {})
            getattr(log, level)(event, **{**fields, **self._tags, "stream": stream})

    def pass_over(self, lines: int) -> None:
        """So many lines are not shown."""
        self._unshown += lines

    def _tell_unshown(self) -> None:
        if self._unshown and not self._muted:
            lines, self._unshown = self._unshown, 0
            get_logger().warning("a worker has printed more than is shown", lines=lines, **self._tags)


class _Stream:
    """The reading end of one pipe."""

    def __init__(self, output: WorkerOutput, name: str, descriptor: int) -> None:
        self._output = output
        self._name = name
        self._descriptor: int | None = descriptor
        self._partial = b""
        self._listening = False
        self._resting: asyncio.TimerHandle | None = None
        os.set_blocking(descriptor, False)

    def listen(self) -> None:
        """Read whenever there is something."""
        self._resting = None
        if self._descriptor is not None:
            asyncio.get_running_loop().add_reader(self._descriptor, self._read)
            self._listening = True

    def read_last(self) -> None:
        """Read what is there."""
        left = _LAST
        while left > 0 and (size := self._take(_FLOOD)):
            left -= size
        if self._partial:
            self._output.say(self._name, [self._partial])
            self._partial = b""

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._pause()
        if self._resting is not None:
            self._resting.cancel()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self) -> None:
        flooded = self._output.flooded
        size = self._take(_FLOOD if flooded else _CHUNK)
        if size == 0:
            self._pause()  # nobody can write any more
        elif flooded:
            self._pause()
            self._resting = asyncio.get_running_loop().call_later(_REST, self.listen)

    def _take(self, size: int) -> int | None:
        """Read so many bytes, at most; how many there were, or None if there is nothing now."""
        if self._descriptor is None:
            return 0
        try:
            chunk = os.read(self._descriptor, size)
        except BlockingIOError:
            return None
        if not chunk:
            return 0
        *lines, rest = (self._partial + chunk).split(b"\n")
        if len(rest) > _LONGEST:
            lines.append(rest)
            rest = b""
        self._partial = rest
        if max(map(len, lines), default=0) > _LONGEST:
            lines = [line[at : at + _LONGEST] for line in lines for at in range(0, max(len(line), 1), _LONGEST)]
        if len(lines) > _BURST:
            self._output.pass_over(len(lines) - _BURST)
            del lines[_BURST:]
        self._output.say(self._name, lines)
        return len(chunk)

    def _pause(self) -> None:
        if self._listening and self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._listening = False


def _record(line: str) -> tuple[str, str, dict[str, Any]]:
    """Level, event and fields of one log record. The handler has the descriptor, so it may be anything."""
    with contextlib.suppress(ValueError, TypeError):
        level, event, fields = json.loads(line)
        if isinstance(level, int) and isinstance(event, str) and isinstance(fields, dict):
            return _level(level), event, {key: value for key, value in fields.items() if key not in _RESERVED}
    return "info", line, {}


def _level(number: int) -> str:
    for name, least in (("critical", 50), ("error", 40), ("warning", 30), ("info", 20)):
        if number >= least:
            return name
    return "debug"
