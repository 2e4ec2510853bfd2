"""Where a worker process begins.

The rule kept here: before anything of the handler is touched, the process has its own output, its own descriptors and
its own handling of signals; nothing that it could do to its siblings is left in its hands.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from multiprocess import forkserver as mp_forkserver
from multiprocess import process as mp_process

from . import voice
from .arena import Arena
from .child import Child
from .limit import MemoryLimit
from .shared import ChildEnd, SharedWords

__all__ = ["main"]


def main(
    pipes: tuple[ChildEnd, ChildEnd],
    voices: tuple[ChildEnd, ...],
    levels: dict[str, int],
    words: SharedWords,
    arenas: tuple[Arena | None, Arena | None],
    handler: bytes,
    stage: str,
    number: int,
    max_memory: int | None,
) -> None:
    """The process's whole life. Of `pipes` and `arenas` the first leads down to it, the second up to its parent."""
    _close_alive()
    for pipe in pipes:
        pipe.keep()
    voice.begin([end.number for end in voices], levels)
    os.environ.pop("PYTHONSAFEPATH", None)  # it was for this process's start, not for what a handler starts
    # Ctrl-C in a terminal reaches the whole group; what it means is the parent's decision.
    # SIGTERM may be meant for the whole group as well, and a drain shall lose nothing: it counts once the parent has
    # told this process to stop.
    child = Child(pipes, words, arenas, stage, number, None if max_memory is None else MemoryLimit(max_memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, child.terminate)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    # A daemon process may not have children; a handler may.
    config: dict[str, Any] = mp_process.current_process()._config
    config["daemon"] = False
    child.live(handler)


def _close_alive() -> None:
    # Every child of the fork server could end it, and with it the news of all others' ends, by one byte to this
    # descriptor. It is not needed here: a worker does not outlive its parent, which keeps the fork server alive.
    server: Any = mp_forkserver._forkserver
    if server._forkserver_pid is None and server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
