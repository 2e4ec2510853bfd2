"""What a worker process prints and logs, sent to its parent. The child's side of `output`.

The rules kept here:

- Descriptors 1 and 2 are pipes to the parent: what C code, the interpreter's last words and programs that the handler
  starts print goes the same way as `print`. A line leaves when it is complete.
- Log records of `logging`, `structlog` and `warnings` go as one line of JSON each. A program that has configured one of
  them in the worker is left alone: then its records go wherever it has sent them.
- Nothing here fails an item: what cannot be sent is not sent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import sys
import threading
from collections.abc import MutableMapping, Sequence
from typing import Any

import structlog

__all__ = ["STREAMS", "begin", "has_begun", "levels"]

STREAMS = ("stdout", "stderr", "log")
"""What the pipes are for, in their order."""

_LONGEST = 1 << 15
"""Bytes of one log record; of a longer one only the beginning is sent."""

_began = False


def levels() -> dict[str, int]:
    """In the parent: the levels of its loggers, which are those of the worker's; "" is the root's."""
    named = {name: each.level for name, each in list(logging.root.manager.loggerDict.items()) if isinstance(each, logging.Logger) and each.level}
    return {"": logging.root.level, **named}


def has_begun() -> bool:
    """Whether this is a worker process, and its parent hears what it says."""
    return _began


def begin(ends: Sequence[int], loggers: dict[str, int]) -> None:
    """Send everything to the parent from now on. The second call only closes its ends, which are duplicates."""
    global _began
    if _began:
        for end in ends:
            os.close(end)
        return
    _began = True
    # A program may run with its standard streams closed; then other descriptors may have their numbers.
    out, err, log = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends)
    for end in ends:
        os.close(end)
    sys.stdout = sys.__stdout__ = _redirected(1, out)
    sys.stderr = sys.__stderr__ = _redirected(2, err)
    faulthandler.enable(all_threads=False)
    sender = _Sender(log)
    if not logging.root.handlers:
        logging.root.addHandler(_LogHandler(sender))
        logging.captureWarnings(True)
    for name, level in loggers.items():
        logging.getLogger(name or None).setLevel(level)
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.StackInfoRenderer(),
                structlog.processors.format_exc_info,
                sender.take_event,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(0),
        )


def _redirected(number: int, end: int) -> Any:
    os.dup2(end, number)
    os.close(end)
    # In UTF-8 whatever the locale, for that is what the parent reads; nothing that is printed can fail an item.
    return open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


class _Sender:
    """Writes log records to their pipe, one line each, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.RLock()  # a signal's handler may log, too

    def send(self, level: int, event: str, fields: dict[str, Any]) -> None:
        """Send one record."""
        line = json.dumps([level, event, fields], default=repr)
        if len(line) > _LONGEST:
            line = json.dumps([level, event[: _LONGEST // 8], {"truncated": len(line)}])
        data = line.encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):  # the parent is gone, or the handler has closed all it found
            while data:
                data = data[os.write(self._descriptor, data) :]

    def take_event(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        """The last of structlog's processors: nothing is left to be printed."""
        level = logging.ERROR if method == "exception" else getattr(logging, method.upper(), logging.INFO)
        text = event.pop("event", "")
        with contextlib.suppress(Exception):  # a field's own representation may raise anything
            self.send(level if isinstance(level, int) else logging.INFO, str(text), dict(event))
        raise structlog.DropEvent


class _LogHandler(logging.Handler):
    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {"logger": record.name}
            if record.exc_info:
                fields["exception"] = logging.Formatter().formatException(record.exc_info)
            self._sender.send(record.levelno, record.getMessage().rstrip(), fields)
        except Exception:  # as every handler of `logging`: a record that cannot be made is told about, not raised
            self.handleError(record)
