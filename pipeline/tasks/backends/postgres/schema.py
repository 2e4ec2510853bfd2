"""Makes the tables: procrastinate's and ours.

The rule kept here: any number of processes may begin at once, with an empty database or with one that is in use. One of
them makes what is missing, in one transaction, and the others wait for it.
"""

from __future__ import annotations

from importlib import resources
from typing import LiteralString, cast

import psycopg
from procrastinate.schema import SchemaManager

from .database import Connection, in_one_line

__all__ = ["VERSION", "apply_schema"]

VERSION = 1
"""Of our own tables."""
OLDEST_SERVER = 130000
"""PostgreSQL 13: what procrastinate asks for."""
_LOCK = 0x70656E73_00000001
_NEEDED = "procrastinate_fetch_job_v2(varchar[],bigint)", "procrastinate_cancel_job_v1(bigint,boolean,boolean)"
"""Functions of procrastinate that an older schema of it has not."""


async def apply_schema(connection: Connection) -> None:
    """Make what is missing. Raises RuntimeError for a server or tables that are too old, or too new, and for a role
    without the rights to them."""
    version = connection.info.server_version
    if version < OLDEST_SERVER:
        raise RuntimeError(f"this PostgreSQL is version {version // 10000}; use {OLDEST_SERVER // 10000} or newer")
    try:
        await _make(connection)
    except psycopg.errors.InsufficientPrivilege as error:
        raise RuntimeError(
            f"this role may not do what is needed here: {in_one_line(error)}; initialize() once as a role that may make "
            "tables, and grant this one to select, insert, update and delete in them"
        ) from None


async def _make(connection: Connection) -> None:
    async with connection.transaction():
        await connection.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
        if not await _exists(connection, "select to_regclass('procrastinate_jobs') is not null as answer"):
            await connection.execute(SchemaManager.get_schema().encode())
        for function in _NEEDED:
            if not await _exists(connection, "select to_regprocedure(%s) is not null as answer", function):
                raise RuntimeError(
                    "the tables of procrastinate in this database are of an older version of it; "
                    "apply its migrations, see `procrastinate schema --migrations-path`"
                )
        if not await _exists(connection, "select to_regclass('penstock_schema') is not null as answer"):
            await connection.execute((resources.files("pipeline.tasks.backends.postgres") / "schema.sql").read_bytes())
        cursor = await connection.execute("select version from penstock_schema")
        row = await cursor.fetchone()
        if row is None or row["version"] != VERSION:
            raise RuntimeError(
                f"the tables of penstock in this database are version {row['version'] if row else None}, and this penstock "
                f"knows version {VERSION}; use the version of penstock that made them, or a newer one"
            )


async def _exists(connection: Connection, query: str, *values: str) -> bool:
    cursor = await connection.execute(cast("LiteralString", query), values)
    row = await cursor.fetchone()
    return row is not None and bool(row["answer"])
