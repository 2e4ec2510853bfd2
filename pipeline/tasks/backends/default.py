"""The backend that a program has chosen, for code that only wants something done."""

from __future__ import annotations

from .base import TaskBackend
from .inline import SyncTaskBackend

__all__ = ["get_default_task_backend", "set_default_task_backend"]

_default: TaskBackend | None = None


def get_default_task_backend() -> TaskBackend:
    """The backend that was set, or else a `SyncTaskBackend`, always the same, so that tests and scripts need none."""
    global _default
    if _default is None:
        _default = SyncTaskBackend()
    return _default


def set_default_task_backend(backend: TaskBackend | None) -> None:
    """Choose the backend for the whole program, once, at its start; None goes back to none chosen."""
    global _default
    if backend is not None and not isinstance(backend, TaskBackend):
        raise TypeError(f"a default backend is a TaskBackend, not {backend!r}")
    _default = backend
