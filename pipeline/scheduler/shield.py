"""The shield: a Ctrl-C that comes in the middle of a turn waits until its end.

The rule kept here: a turn is done wholly or not at all. Python raises `KeyboardInterrupt` in the main thread between any two
steps, so half of an admission could be lost there, and with it what other threads have left for whoever has the turn.
Handlers of other signals that raise in the main thread are not kept back.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any

__all__ = ["lower_shield", "raise_shield"]

# Beneath `signal`, whose wrappers turn numbers into enums and take ten times as long.
_signal: Any = importlib.import_module("_signal")
_set: Callable[[int, Any], Any] = _signal.signal
_get: Callable[[int], Any] = _signal.getsignal
_SIGINT = int(signal.SIGINT)

_main = threading.main_thread().ident
_depth = 0
"""Turns within turns: the collector may run anybody's code in one."""
_handler: Any = None
"""Whose signal it is."""
_late: tuple[int, Any] | None = None
"""A signal that has come meanwhile."""


def raise_shield() -> None:
    """In the main thread, where Python handles Ctrl-C: keep it back, for 1 µs. Elsewhere nothing, at the price of a look."""
    global _depth, _handler, _late
    if get_ident() != _main:
        return
    if not _depth:
        handler = _get(_SIGINT)
        if handler is _keep or not callable(handler):  # being lowered just now; or ignored, deadly, not Python's
            return
        _late = None
        try:
            _handler = _set(_SIGINT, _keep)  # nothing is raised from here on
        except ValueError:  # the main thread of another interpreter
            return
    _depth += 1


def lower_shield() -> None:
    """Handle what has come meanwhile, as it would have been."""
    global _depth, _late
    if get_ident() != _main or not _depth:
        return
    _depth -= 1
    if not _depth:
        handler = _handler
        _set(_SIGINT, handler)
        late, _late = _late, None
        if late is not None:
            handler(*late)


def _keep(number: int, frame: Any) -> None:
    global _late
    _late = number, frame


def _forked() -> None:
    global _main
    _main = get_ident()


os.register_at_fork(after_in_child=_forked)
