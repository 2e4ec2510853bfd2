"""The connections to one database: where it is, a pool, and what to do while it is away.

The rule kept here: no message and no log has the password, and nothing waits for a server longer than it says.
"""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from ....observe.logs import get_logger

__all__ = ["AWAY", "Backoff", "Connection", "Database", "check_dsn", "in_one_line", "is_away", "pass_cancellation"]

T = TypeVar("T")

_IDLE = 0.5
"""Seconds for which a connection that was found alive is taken to be so."""
Connection: TypeAlias = psycopg.AsyncConnection[Any]
"""`Any`: its rows are dicts."""

_STALLED = 5.0
"""Seconds between two statements of a transaction after which the server ends it: its process is frozen, and others wait for
what it has locked, the sweepers first of all."""

AWAY = (psycopg.OperationalError, psycopg.InterfaceError, TimeoutError, psycopg.errors.IdleInTransactionSessionTimeout)
"""What is raised while the server cannot be reached, is starting, or has ended a connection."""


def check_dsn(dsn: object) -> str:
    """A connection string as libpq takes it. Raises TypeError and ValueError, which do not repeat it."""
    if not isinstance(dsn, str):
        raise TypeError(f"a DSN is a text such as 'postgresql://user@host/database', not {type(dsn).__qualname__}")
    try:
        told = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
        if not told or _is_cut_wrongly(told):
            raise ValueError
    except (psycopg.ProgrammingError, ValueError):
        raise ValueError(
            "this DSN cannot be read (it is not repeated here, for it may have a password); "
            "write 'postgresql://user:password@host:5432/database', with %2F for a '/' and %40 for an '@' in the password, "
            "or 'host=... dbname=... user=...'"
        ) from None
    return dsn


def _is_cut_wrongly(told: dict[str, str]) -> bool:
    """Whether a part of the password, with a "/" or "@" in it, was taken for the host, the port or the database."""
    port, host, database = (told.get(name, "") for name in ("port", "host", "dbname"))
    return not (port.replace(",", "") or "0").isdecimal() or "@" in host[1:] + database


def place_of(dsn: str) -> str:
    """Where the database is, without the password."""
    told = conninfo_to_dict(dsn)
    host = told.get("host") or told.get("hostaddr") or "localhost"
    return f"{told.get('dbname') or told.get('user') or 'the default database'} at {host}:{told.get('port') or 5432}"


class Backoff:
    """How long to wait for a server that is away: 0.05 s at first, then twice as long each time, up to 1 s."""

    def __init__(self) -> None:
        self._delay = 0.05

    async def wait(self) -> None:
        await asyncio.sleep(self._delay)
        self._delay = min(1.0, 2 * self._delay)


class Database:
    """A pool of connections in autocommit mode, with rows as dicts.

    `connect_timeout` is in seconds, from 2 on, and bounds every wait for a connection. Between `open` and `close`.
    """

    def __init__(self, dsn: str, *, name: str, connect_timeout: float, max_size: int) -> None:
        self.place = place_of(dsn)
        self._dsn = make_conninfo(
            dsn,
            application_name=name,
            client_encoding="utf8",
            connect_timeout=max(2, math.ceil(connect_timeout)),  # libpq's least
            keepalives_idle=15,
            keepalives_interval=5,
            keepalives_count=3,
        )
        self._timeout = connect_timeout
        self._deadline: float | None = None
        self._checked = WeakKeyDictionary[Connection, float]()
        self.pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            self._dsn,
            connection_class=psycopg.AsyncConnection[Any],
            kwargs={"row_factory": dict_row},
            configure=_configure,
            check=self._check,
            min_size=1,
            max_size=max_size,
            timeout=connect_timeout,
            reconnect_timeout=1.0,  # after that, whoever asks next tries again; the pool's own waits double without end
            open=False,
            name=name,
        )

    async def open(self) -> None:
        """Reach the server. Raises ConnectionError, which says where it was looked for and what it said."""
        problem = await self._problem()
        if problem is not None:  # raised here, for psycopg's errors keep the socket
            raise ConnectionError(f"cannot reach PostgreSQL, {self.place}: {problem}")
        await self.pool.open()

    async def _check(self, connection: Connection) -> None:
        """Whether a connection that was idle for a while is still one: a restart of the server ends it."""
        now = time.monotonic()
        if now - self._checked.get(connection, 0.0) > _IDLE:
            await AsyncConnectionPool.check_connection(connection)
            self._checked[connection] = now

    async def _problem(self) -> str | None:
        try:
            await (await self.connect()).close()
        except AWAY as error:
            return in_one_line(error)
        return None

    async def close(self) -> None:
        await self.pool.close(timeout=self._timeout)

    async def connect(self) -> Connection:
        """A connection that is not of the pool, in autocommit mode; for its caller to close."""
        connecting = asyncio.create_task(
            psycopg.AsyncConnection[Any].connect(self._dsn, autocommit=True, row_factory=dict_row)
        )
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:  # psycopg would leave the socket to the garbage collector
            await asyncio.wait([connecting], timeout=1.0)
            if not connecting.done():
                connecting.cancel()
            elif not connecting.cancelled() and connecting.exception() is None:
                await connecting.result().close()
            raise
        except AWAY as error:  # so would a cycle of frames that ends here
            traceback.clear_frames(error.__traceback__)
            raise

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Connection]:
        """A connection in a transaction, which is committed unless the block raises."""
        async with self.pool.connection() as connection, connection.transaction():
            yield connection

    async def rows(self, query: Any, values: Any = ()) -> list[dict[str, Any]]:
        """The result of one statement, in a transaction of its own. `Any`: psycopg's queries and values."""
        async with self.pool.connection() as connection:
            cursor = await connection.execute(query, values)
            return await cursor.fetchall() if cursor.description else []

    async def row(self, query: Any, values: Any = ()) -> dict[str, Any] | None:
        """The first row of it, if there is one."""
        rows = await self.rows(query, values)
        return rows[0] if rows else None

    def hurry(self, seconds: float | None) -> None:
        """From now on `persist` gives up after so long; None: never."""
        self._deadline = None if seconds is None else time.monotonic() + seconds

    async def persist(self, act: Callable[[], Awaitable[T]], away: tuple[type[Exception], ...] = AWAY) -> T:
        """Do what may be done twice until the server has answered, however long it is away."""
        backoff = Backoff()
        told = False
        while True:
            pass_cancellation()
            try:
                return await act()
            except away as error:
                if not is_away(error) or (self._deadline is not None and time.monotonic() > self._deadline):
                    raise
                if not told:
                    get_logger().warning(
                        "the database is away; trying again", database=self.place, error=in_one_line(error)
                    )
                    told = True
            await backoff.wait()


def is_away(error: BaseException) -> bool:
    """Whether an error, or what is behind it, says that the server could not be reached."""
    if isinstance(error, (psycopg.errors.UndefinedTable, psycopg.errors.QueryCanceled, psycopg.errors.DiskFull)):
        return False
    return isinstance(error, AWAY) or (error.__cause__ is not None and is_away(error.__cause__))


def pass_cancellation() -> None:
    """Raise CancelledError in a task that was cancelled, and has not noticed. Every loop around statements begins with it.

    Before Python 3.12, `asyncio.wait_for` forgets a cancellation that comes together with what it waits for, and the pool
    waits by it for a free connection. A loop that was cancelled then would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _configure(connection: Connection) -> None:
    """What is relied on here, whatever a role or a database has for its defaults."""
    await connection.set_autocommit(True)
    await connection.execute(
        """select set_config('default_transaction_isolation', 'read committed', false), set_config('datestyle', 'ISO', false),
             set_config('idle_in_transaction_session_timeout', %s, false)""",
        (f"{_STALLED * 1e3:.0f}ms",),
    )


def in_one_line(error: BaseException) -> str:
    """What an error says, for a line of a log; procrastinate's say nothing, and what is behind them does."""
    error = error.__cause__ or error
    return " ".join(str(error).split()) or f"no answer in time ({type(error).__name__})"
