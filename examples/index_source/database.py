"""The index in SQLite. It is consistent at every moment: a batch of files is one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from index_source.parsing import Module

__all__ = ["Index", "Summary", "summarize"]

_SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    PRAGMA foreign_keys = ON;

    CREATE TABLE IF NOT EXISTS batches (id INTEGER PRIMARY KEY, files INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS files (
        path TEXT PRIMARY KEY,
        batch INTEGER NOT NULL REFERENCES batches,
        lines INTEGER NOT NULL,
        documented INTEGER NOT NULL,
        definitions INTEGER NOT NULL,
        imports INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS definitions (
        path TEXT NOT NULL REFERENCES files ON DELETE CASCADE,
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        line INTEGER NOT NULL,
        documented INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS imports (
        path TEXT NOT NULL REFERENCES files ON DELETE CASCADE,
        module TEXT NOT NULL
    );
    CREATE INDEX IF NOT EXISTS definitions_of_file ON definitions (path);
    CREATE INDEX IF NOT EXISTS imports_of_file ON imports (path);
    -- A file that is indexed again leaves its old batch, and `batches` still tells how many files each one has.
    CREATE TRIGGER IF NOT EXISTS leave_batch AFTER DELETE ON files
        BEGIN UPDATE batches SET files = files - 1 WHERE id = old.batch; END;
"""


class Index:
    """An open database. It belongs to the thread that made it, as SQLite connections do."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path)
        self._connection.executescript(_SCHEMA)

    def write(self, modules: Sequence[Module]) -> None:
        """Write a batch, all of it or nothing. A file that is in the index already is replaced."""
        with self._connection as db:
            db.executemany("DELETE FROM files WHERE path = ?", [(module.path,) for module in modules])
            batch = db.execute("INSERT INTO batches (files) VALUES (?)", (len(modules),)).lastrowid
            db.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)",
                [(m.path, batch, m.lines, m.documented, len(m.definitions), len(m.imports)) for m in modules],
            )
            db.executemany(
                "INSERT INTO definitions VALUES (?, ?, ?, ?, ?)",
                [(module.path, *definition) for module in modules for definition in module.definitions],
            )
            db.executemany(
                "INSERT INTO imports VALUES (?, ?)",
                [(module.path, name) for module in modules for name in module.imports],
            )

    def close(self) -> None:
        """Nothing is pending between two batches, so there is nothing to commit."""
        self._connection.close()


class Summary(NamedTuple):
    """What the database says. `documented` counts modules, functions and classes with a docstring."""

    files: int
    functions: int
    classes: int
    documented: int
    most_imported: list[tuple[str, int]]

    @property
    def coverage(self) -> float:
        """The share of modules, functions and classes with a docstring."""
        return self.documented / max(self.files + self.functions + self.classes, 1)


def summarize(path: Path) -> Summary:
    """Read the index back."""
    with closing(sqlite3.connect(path)) as db:
        files, documented_files = db.execute("SELECT COUNT(*), TOTAL(documented) FROM files").fetchone()
        counts = dict(db.execute("SELECT kind, COUNT(*) FROM definitions GROUP BY kind"))
        (documented,) = db.execute("SELECT TOTAL(documented) FROM definitions").fetchone()
        top = db.execute("SELECT module, COUNT(*) AS n FROM imports GROUP BY module ORDER BY n DESC, module LIMIT 10")
        return Summary(
            files, counts.get("function", 0), counts.get("class", 0), int(documented_files + documented), top.fetchall()
        )
