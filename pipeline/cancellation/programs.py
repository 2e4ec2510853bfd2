"""The process groups of the programs that this process has started and answers for.

The rule kept here: a process that ends without a word to its threads takes them with it. A number is in `groups` only
while its leader is not reaped, so that it belongs to nobody else.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal

__all__ = ["groups", "kill_programs"]

groups: set[int] = set()


def kill_programs() -> None:
    """End them at once. In a signal handler, in any thread, and when the interpreter ends under a thread that waits."""
    for group in tuple(groups):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


atexit.register(kill_programs)
os.register_at_fork(after_in_child=groups.clear)  # they stay the parent's
