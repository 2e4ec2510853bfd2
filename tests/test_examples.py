"""The examples run and say what they promise; the main one survives broken files, a second run and signals.

The rule kept here: every program runs in a process of its own with a hard time limit, and a signal is sent when the
program has said that it is at work, never after a while.
"""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, Finished, Program, alive, run_program, until

EXAMPLES = ROOT / "examples"
MAIN_JOB = "10_index_source.py"

TELLING = {
    "01_five_lines.py": r"\[0, 1, 4, 9, 16, 25, 36, 49, 64, 81\]",
    "02_async_stages.py": r"in order +\d\.\d\d s, 180 words; the first lines have \[4, 2, 3, 4, 2, 3, 4, 2, 3\]",
    "03_error_policies.py": r"RAISE stops the pipeline: .* in stage 'to_number'> after 3 items",
    "04_cancel_and_drain.py": r"cancelled, drained: True; all of \d+ accounted for, 0 not finished",
    "05_synchronous_iter.py": r"Methuselah cannot be 969; the cause is a ValueError",
    "06_processes_and_state.py": r"19 of 20 items survived a killed worker",
    "07_batches_and_operators.py": r"take: +\[0, 1, 4, 9\] and tap has seen \[0, 1, 2, 3\]",
    "08_snapshots.py": r"The limit was stage 'store'",
    "09_llm_service.py": r"long story': \d+ tokens saved: the client has disconnected",
    "11_program.py": r"\d+ primes among 200 odd numbers",
    "12_testing.py": r"a run of 101 seconds(.|\n)*every step; (.|\n)*the database is still locked\nto see that run again: replay\(make, 'cancel', \d+, seed=0\)",
    "13_scheduler.py": r"with_a_pool.*too much(.|\n)*needs 1 cpu, 0 free, held by (.|\n)*at most cpu 2 of 2, memory_mb 9 of 10, disk_mb (8|12) of 12\n",
    "14_http_task.py": r"task 1 was completed after 5 (.|\n)*Ann: task 2 was cancelled after \d+ progress events: {'message': 'Ann has pressed the button'(.|\n)*the client has left after \d+ of 100000 pieces",
    "15_service.py": r"their worker is killed with SIGKILL\n(.|\n)*has died; another one goes on\nattempt 2: \d+ of (\d+) files are in the index\ncompleted\nin the index: {'files': \2, (.|\n)*cancelled: it was the wrong folder\neverything has stopped",
    "16_django.py": r'Django says: <a href="/jobs/">(.|\n)*progress: some delivered\n(progress.*\n)*cancelled: that was enough\na page of another site gets 403',
}
ARGUMENTS = {"15_service.py": ["--demo"]}
LOGS_FAILURES = {"03_error_policies.py", "05_synchronous_iter.py", "06_processes_and_state.py", "12_testing.py"}


def test_every_example_is_tested_and_listed() -> None:
    examples = sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))
    listed = re.findall(r"`(\d+_\w+\.py)`", (EXAMPLES / "README.md").read_text())
    assert examples == sorted([*TELLING, MAIN_JOB]) == listed


@pytest.mark.parametrize("name", TELLING)
def test_an_example_runs_and_says_what_it_promises(name: str, tmp_path: Path) -> None:
    finished = run_program(tmp_path, "", *ARGUMENTS.get(name, []), interpreter=(str(EXAMPLES / name),))
    assert finished.code == 0, finished.err
    assert re.search(TELLING[name], finished.out), finished.out
    unexpected = [line for line in finished.err.splitlines() if name not in LOGS_FAILURES or "item failed" not in line]
    assert unexpected == []


def test_every_program_in_the_readme_runs(tmp_path: Path) -> None:
    programs = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(programs) >= 2
    for number, program in enumerate(programs):
        folder = tmp_path / str(number)
        folder.mkdir()
        finished = run_program(folder, program)
        assert finished.code == 0, f"{program}\n{finished.err}"


# --- the main job, on files made for it

GOOD = '''\
"""A module."""
import os, sys
import os.path as p
from sys import argv
from . import sibling


class Shape:
    "documented"

    def area(self):
        def inner():
            import json
        return inner

    async def load(self):
        """Documented too."""
'''

FILES = {
    "good.py": GOOD.encode(),
    "package/latin.py": "# -*- coding: latin-1 -*-\nimport os\nname = 'é'\n".encode("latin-1"),
    "package/marked.py": b"\xef\xbb\xbfimport os\r\n",
    "package/empty.py": b"",
    "notes.txt": b"not Python",
    ".hidden/good.py": b"import hidden",
    "venv/site-packages/good.py": b"import installed",
}
BROKEN = {
    "bad_bytes.py": ("read", b"name = '\xff'\n"),
    "unknown_encoding.py": ("read", b"# coding: klingon\n"),
    "wide.py": ("read", "x = 1\n".encode("utf-16")),
    "syntax.py": ("parse", b"def (:\n"),
    "null.py": ("parse", b"x = 1\0\n"),
    "parentheses.py": ("parse", b"(" * 5000 + b")" * 5000),
    "minuses.py": ("parse", b"-" * 100_000 + b"1"),
    "terms.py": ("parse", b"1" + b" + 1" * 100_000),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project with all kinds of files."""
    root = tmp_path / "project"
    for name, data in [*FILES.items(), *((name, data) for name, (_, data) in BROKEN.items())]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def main_job(folder: Path, *arguments: object) -> Finished:
    return run_program(folder, "", *map(str, arguments), interpreter=(str(EXAMPLES / MAIN_JOB),))


class Counts(NamedTuple):
    """What the program prints that the database says."""

    files: int
    functions: int
    classes: int

    @classmethod
    def printed(cls, out: str) -> Counts:
        found = re.search(r"In the database: ([\d,]+) files, ([\d,]+) functions, ([\d,]+) classes;", out)
        assert found is not None, out
        return cls(*(int(number.replace(",", "")) for number in found.groups()))

    @classmethod
    def stored(cls, database: Path) -> Counts:
        with closing(sqlite3.connect(database)) as db:
            return cls(
                *db.execute(
                    "SELECT (SELECT COUNT(*) FROM files), (SELECT COUNT(*) FROM definitions WHERE kind = 'function'),"
                    " (SELECT COUNT(*) FROM definitions WHERE kind = 'class')"
                ).fetchone()
            )


def assert_consistent(database: Path) -> None:
    """Sound, and every batch, and every file in it, is there as a whole."""
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute(
            "SELECT id FROM batches WHERE files <> (SELECT COUNT(*) FROM files WHERE files.batch = batches.id)"
        ).fetchall() == []
        assert db.execute(
            "SELECT path FROM files WHERE definitions <> (SELECT COUNT(*) FROM definitions d WHERE d.path = files.path)"
            " OR imports <> (SELECT COUNT(*) FROM imports i WHERE i.path = files.path)"
        ).fetchall() == []


def ledger_row(out: str, stage: str) -> dict[str, int]:
    """One line of the printed ledger."""
    titles = re.search(r"^stage +(\w.*) busy s$", out, re.MULTILINE)
    numbers = re.search(rf"^{stage} +(\d.*) [\d.]+$", out, re.MULTILINE)
    assert titles is not None, out
    assert numbers is not None, out
    values = [int(number.replace(",", "")) for number in numbers[1].split()]
    return dict(zip(titles[1].split(), values, strict=True))


def test_the_main_job_indexes_good_files_and_buries_broken_ones(tmp_path: Path, project: Path) -> None:
    database = tmp_path / "index.db"
    finished = main_job(tmp_path, project, "--database", database)
    assert finished.code == 0, finished.err
    assert re.sub(r"running: .*\n", "", finished.err) == ""
    assert "the ledger balances" in finished.out
    assert f"Dead letters: {len(BROKEN)}\n" in finished.out
    for name, (stage, _) in BROKEN.items():
        assert re.search(rf"{name}\n +{stage}: \w+Error: ", finished.out), f"{name}\n{finished.out}"
    assert ledger_row(finished.out, "read")["received"] == len(BROKEN) + 4
    assert ledger_row(finished.out, "write")["succeeded"] == ledger_row(finished.out, "batch")["emitted"]
    assert_consistent(database)
    assert Counts.printed(finished.out) == Counts.stored(database) == Counts(files=4, functions=3, classes=1)
    assert "37.5% with a docstring" in finished.out  # of 4 modules, 3 functions and a class: 3
    with closing(sqlite3.connect(database)) as db:
        stored = {Path(path).relative_to(project.resolve()).as_posix() for (path,) in db.execute("SELECT path FROM files")}
        assert stored == {"good.py", "package/latin.py", "package/marked.py", "package/empty.py"}
        assert db.execute("SELECT kind, name, line, documented FROM definitions ORDER BY line").fetchall() == [
            ("class", "Shape", 8, 1),
            ("function", "area", 11, 0),
            ("function", "inner", 12, 0),
            ("function", "load", 16, 1),
        ]
        imports = db.execute("SELECT module, COUNT(*) FROM imports GROUP BY module").fetchall()
        assert dict(imports) == {"os": 3, "os.path": 1, "sys": 1, "json": 1}
    assert re.search(r"^  os +3$", finished.out, re.MULTILINE)


def test_the_main_job_replaces_what_it_indexes_again(tmp_path: Path, project: Path) -> None:
    database = tmp_path / "index.db"
    main_job(tmp_path, project, "--database", database)
    (project / "package" / "empty.py").write_text("def added(): pass\n")
    finished = main_job(tmp_path, project, "--database", database)
    assert finished.code == 0, finished.err
    assert_consistent(database)
    assert Counts.printed(finished.out) == Counts.stored(database) == Counts(files=4, functions=4, classes=1)


def test_the_main_job_indexes_a_single_file_into_a_temporary_database(tmp_path: Path, project: Path) -> None:
    finished = main_job(tmp_path, project / "good.py")
    assert finished.code == 0, finished.err
    database = Path(finished.out.splitlines()[0].rpartition(" into ")[2])
    assert Counts.printed(finished.out) == Counts.stored(database) == Counts(files=1, functions=3, classes=1)
    assert "Dead letters: 0" in finished.out
    shutil.rmtree(database.parent)


@pytest.mark.parametrize("arguments", [("nowhere",), (".", "--database", ".")], ids=["path", "database"])
def test_the_main_job_refuses_what_cannot_work_before_it_starts(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    finished = main_job(tmp_path, *arguments)
    assert finished.code == 2
    assert "Traceback" not in finished.err
    assert "error: " in finished.err


# --- the main job, stopped by signals in the middle of the standard library


class Stopped(NamedTuple):
    """What is left of a program after its signals."""

    finished: Finished
    database: Path


def stop_main_job(folder: Path, *steps: tuple[str, signal.Signals], group: bool = False) -> Stopped:
    """Index the standard library, and send each signal when the progress lines say what it waits for."""
    database = folder / "index.db"
    with Program(folder, "", "--database", str(database), interpreter=(str(EXAMPLES / MAIN_JOB),)) as program:
        for text, signum in steps:
            until(lambda text=text: text in program.err() or program.process.poll() is not None)
            family = program.family()
            program.interrupt(signum, group=group)
        finished = program.finish()
        until(lambda: not alive(family))
    assert "Traceback" not in finished.err
    assert "the ledger balances" in finished.out
    assert_consistent(database)
    assert Counts.printed(finished.out) == Counts.stored(database)
    assert Counts.stored(database).files > 0
    return Stopped(finished, database)


AT_WORK = "running: "
"""A progress line is only written once a batch has been."""


@pytest.mark.parametrize("group", [False, True], ids=["the program alone", "the whole group, as a terminal does"])
def test_the_first_ctrl_c_finishes_what_was_taken(tmp_path: Path, group: bool) -> None:
    finished, database = stop_main_job(tmp_path, (AT_WORK, signal.SIGINT), group=group)
    assert finished.code == 130
    assert "Pipeline 'index' was drained" in finished.out
    assert "It stopped because: received SIGINT" in finished.out
    read, parse = ledger_row(finished.out, "read"), ledger_row(finished.out, "parse")
    assert read["received"] == read["succeeded"] + read["sided"]
    assert parse["received"] == parse["succeeded"] + parse["sided"]
    assert Counts.stored(database).files == parse["succeeded"]


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    finished, _ = stop_main_job(tmp_path, (AT_WORK, signal.SIGINT), ("draining", signal.SIGINT), group=True)
    assert finished.code == 130
    assert "Pipeline 'index' was cancelled" in finished.out
    assert "Then also: received SIGINT" in finished.out
    assert finished.seconds < 15


def test_sigterm_stops_at_once(tmp_path: Path) -> None:
    finished, _ = stop_main_job(tmp_path, (AT_WORK, signal.SIGTERM))
    assert finished.code == 143
    assert "Pipeline 'index' was cancelled" in finished.out
    assert "It stopped because: received SIGTERM" in finished.out
    assert finished.seconds < 15
