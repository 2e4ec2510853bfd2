"""What worker processes print and log: it arrives, tagged, in order, and never in the way."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog
from helpers import LIMIT, Flag, assert_balanced, eventually, run_program
from structlog.testing import capture_logs

from pipeline import Pipeline
from stages import InProcess, stage


async def said(pipeline: Pipeline[Any], stream: str) -> list[dict[str, Any]]:
    """The records of one stream of a run that completes in time."""
    with capture_logs() as logs:
        result = await asyncio.wait_for(pipeline.collect(), LIMIT)
    assert isinstance(result, list), result
    assert_balanced(pipeline.snapshot())
    return [dict(record) for record in logs if record.get("stream") == stream]


@pytest.fixture
def root_level() -> Iterator[Callable[[int], None]]:
    """Sets the level of the root logger for one test."""
    before = logging.root.level
    yield logging.root.setLevel
    logging.root.setLevel(before)


# --- lines


async def test_what_is_printed_arrives_with_stage_worker_pid_and_stream() -> None:
    def prints(item: int) -> int:
        print("item", item)
        return os.getpid()

    pipeline = Pipeline(range(3), name="demo") >> stage(run_in="process", name="printer")(prints)
    with capture_logs() as logs:
        pids = await pipeline.collect()
    assert isinstance(pids, list)
    assert logs == [
        {
            "event": f"item {item}",
            "log_level": "info",
            "pipeline": "demo",
            "stage": "printer",
            "worker": 0,
            "pid": pids[0],
            "stream": "stdout",
        }
        for item in range(3)
    ]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
async def test_every_way_to_write_to_the_standard_streams_is_heard(method: str) -> None:
    def writes(item: int) -> int:
        print("print")
        sys.stdout.write("write\n")
        os.write(1, b"descriptor\n")
        os.system("echo shell")
        subprocess.run([sys.executable, "-c", "print('program')"], check=True)
        print("no end of line", end="")
        return item

    records = await said(Pipeline([1]) >> stage(run_in=InProcess(start_method=method))(writes), "stdout")
    assert [record["event"] for record in records] == ["print", "write", "descriptor", "shell", "program", "no end of line"]


async def test_stderr_is_a_stream_of_its_own_and_warns() -> None:
    def writes(item: int) -> int:
        print("oh", file=sys.stderr)
        os.write(2, b"no\n")
        return item

    records = await said(Pipeline([1]) >> stage(run_in="process")(writes), "stderr")
    assert [(record["event"], record["log_level"]) for record in records] == [("oh", "warning"), ("no", "warning")]


async def test_a_line_arrives_while_the_item_is_still_at_work(tmp_path: Path) -> None:
    go = Flag(tmp_path / "go")

    def prints(item: int) -> int:
        print("in the middle")
        go.wait()
        return item

    pipeline = Pipeline([1]) >> stage(run_in="process")(prints)
    with capture_logs() as logs:
        run = asyncio.create_task(pipeline.collect())
        await eventually(lambda: any(record["event"] == "in the middle" for record in logs))
        assert not run.done()
        go.set()
        assert await run == [1]


async def test_lines_keep_their_order_and_are_all_there() -> None:
    def prints(item: int) -> int:
        for line in range(100):
            print(item * 100 + line)
        return item

    records = await said(Pipeline(range(20)) >> stage(run_in="process")(prints), "stdout")
    assert [int(record["event"]) for record in records] == list(range(2000))


async def test_what_setup_and_teardown_print_is_heard() -> None:
    far = stage(run_in="process", setup=lambda state: print("hello"), teardown=lambda state: print("goodbye"))
    records = await said(Pipeline([1]) >> far(abs), "stdout")
    assert [record["event"] for record in records] == ["hello", "goodbye"]


async def test_bytes_that_are_no_text_arrive_as_well_as_they_can() -> None:
    def writes(item: int) -> int:
        os.write(1, b"caf\xc3\xa9 \xff\r\n")
        print("\ud800")
        return item

    records = await said(Pipeline([1]) >> stage(run_in="process")(writes), "stdout")
    assert [record["event"] for record in records] == ["café \ufffd", "\\ud800"]


async def test_a_line_without_an_end_comes_in_pieces() -> None:
    records = await said(Pipeline([1]) >> stage(run_in="process")(lambda item: print("x" * 200_000)), "stdout")
    assert "".join(record["event"] for record in records) == "x" * 200_000
    assert max(len(record["event"]) for record in records) <= 1 << 16


# --- last words


async def test_what_a_worker_printed_just_before_it_was_killed_arrives() -> None:
    def dies(item: int) -> int:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    records = await said(Pipeline([1]) >> stage(run_in="process")(dies), "stdout")
    assert [record["event"] for record in records] == ["last words"]


async def test_a_crash_tells_where_it_happened() -> None:
    def crashes(item: int) -> int:
        return len(ctypes.string_at(0))

    records = await said(Pipeline([1]) >> stage(run_in="process")(crashes), "stderr")
    text = "\n".join(record["event"] for record in records)
    assert "Segmentation fault" in text
    assert "in crashes" in text


# --- log records


async def test_records_of_logging_come_with_level_logger_and_traceback(root_level: Callable[[int], None]) -> None:
    root_level(logging.INFO)

    def logs_(item: int) -> int:
        logger = logging.getLogger("mine")
        logger.debug("too much")
        logger.info("%d things", 3)
        try:
            raise ValueError("bad")
        except ValueError:
            logger.exception("failed")
        return item

    records = await said(Pipeline([1]) >> stage(run_in="process")(logs_), "log")
    assert [(record["event"], record["log_level"], record["logger"]) for record in records] == [
        ("3 things", "info", "mine"),
        ("failed", "error", "mine"),
    ]
    assert "ValueError: bad" in records[1]["exception"]
    assert records[0]["worker"] == 0


async def test_levels_of_single_loggers_are_those_of_the_parent() -> None:
    def logs_(item: int) -> int:
        logging.getLogger("talkative").debug("heard")
        logging.getLogger("silent").warning("not heard")
        return item

    loud, silent = logging.getLogger("talkative"), logging.getLogger("silent")
    loud.setLevel(logging.DEBUG)
    silent.setLevel(logging.ERROR)
    try:
        records = await said(Pipeline([1]) >> stage(run_in="process")(logs_), "log")
    finally:
        loud.setLevel(logging.NOTSET)
        silent.setLevel(logging.NOTSET)
    assert [(record["event"], record["log_level"]) for record in records] == [("heard", "debug")]


async def test_records_of_structlog_keep_their_fields_but_not_the_tags() -> None:
    def logs_(item: int) -> int:
        structlog.get_logger().warning("strange", item=item, thing=Path("a"), stage="mine", pid=0)
        return os.getpid()

    pipeline = Pipeline([7]) >> stage(run_in="process", name="far")(logs_)
    with capture_logs() as logs:
        result = await pipeline.collect()
    assert isinstance(result, list)
    (record,) = logs
    assert (record["event"], record["log_level"], record["item"], record["thing"]) == ("strange", "warning", 7, "PosixPath('a')")
    assert (record["stage"], record["pid"]) == ("far", result[0])


async def test_warnings_are_records() -> None:
    records = await said(Pipeline([1]) >> stage(run_in="process")(lambda item: warnings.warn("old", stacklevel=1)), "log")
    assert [(record["logger"], record["log_level"]) for record in records] == [("py.warnings", "warning")]
    assert "UserWarning: old" in records[0]["event"]


async def test_records_that_cannot_be_sent_fail_no_item() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    def logs_(item: int) -> int:
        structlog.get_logger().info("odd", thing=Odd())
        structlog.get_logger().info("large", thing="x" * 10_000_000)
        logging.getLogger().error("%d", "no number")
        return item

    pipeline = Pipeline([1]) >> stage(run_in="process")(logs_)
    records = await said(pipeline, "log")
    assert [record["event"] for record in records] == ["large"]
    assert pipeline.snapshot().stages[0].succeeded == 1


def test_a_program_gets_what_workers_say_where_it_wants_its_log(tmp_path: Path) -> None:
    finished = run_program(
        tmp_path,
        """
        import asyncio, logging, structlog
        from pipeline import Pipeline
        from stages import stage

        print("imported")

        @stage(run_in="process")
        def work(item):
            print("printed")
            logging.info("logged")
            structlog.get_logger().info("structured", item=item)
            return item

        if __name__ == "__main__":
            structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()])
            logging.basicConfig(level=logging.INFO)
            asyncio.run((Pipeline([1]) >> work).run())
        """,
    )
    assert finished.err == ""
    own, *records = finished.out.splitlines()
    assert own == "imported"
    assert sorted((record["event"], record["stream"]) for record in map(json.loads, records)) == [
        ("imported", "stdout"),
        ("logged", "log"),
        ("printed", "stdout"),
        ("structured", "log"),
    ]


# --- floods


async def test_a_flood_is_counted_and_not_shown() -> None:
    def floods(item: int) -> int:
        for line in range(100_000):
            print(line)
        return item

    pipeline = Pipeline([1]) >> stage(run_in="process")(floods)
    with capture_logs() as logs:
        assert await asyncio.wait_for(pipeline.collect(), LIMIT) == [1]
    shown = [record for record in logs if record.get("stream") == "stdout"]
    counted = sum(record["lines"] for record in logs if record["event"] == "a worker has printed more than is shown")
    assert len(shown) + counted == 100_000
    assert 5000 <= len(shown) < 50_000
    assert [int(record["event"]) for record in shown[:5000]] == list(range(5000))


async def test_other_tasks_run_while_a_worker_floods_its_output(tmp_path: Path) -> None:
    stop = Flag(tmp_path / "stop")

    def floods(item: int) -> int:
        while not stop.is_set():
            os.write(1, b"one more line\n" * 4000)
        return item

    pipeline = Pipeline([1]) >> stage(run_in="process")(floods)
    memory = psutil.Process()
    with capture_logs() as logs:
        run = asyncio.create_task(pipeline.collect())
        await eventually(lambda: len(logs) > 5000)  # the loop serves this task, too
        before = memory.memory_info().rss
        for _ in range(100):
            await asyncio.sleep(0.001)
        assert memory.memory_info().rss - before < 50_000_000
        stop.set()
        assert await asyncio.wait_for(run, LIMIT) == [1]


async def test_a_flood_without_lines_takes_no_memory() -> None:
    def floods(item: int) -> int:
        for _ in range(2000):
            os.write(2, b"x" * 10_000)
        return item

    records = await said(Pipeline([1]) >> stage(run_in="process")(floods), "stderr")
    assert sum(len(record["event"]) for record in records) == 20_000_000


# --- others that hold the pipe


async def test_a_program_that_outlives_its_worker_does_not_keep_the_run(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def starts(item: int) -> int:
        # Its own session, all of the worker's descriptors: a daemon that keeps the pipes open.
        daemon = subprocess.Popen(
            [sys.executable, "-c", "import time; print('daemon', flush=True); time.sleep(60)"], start_new_session=True, close_fds=False
        )
        pid_file.write_text(str(daemon.pid))
        return item

    began = time.monotonic()
    try:
        await said(Pipeline([1]) >> stage(run_in="process")(starts), "stdout")
        assert time.monotonic() - began < LIMIT
    finally:
        daemon = int(pid_file.read_text())
        os.kill(daemon, signal.SIGKILL)
        await eventually(lambda: not psutil.pid_exists(daemon))


async def test_a_handler_that_closes_or_replaces_its_streams_harms_nobody() -> None:
    def closes(item: int) -> int:
        sys.stdout.close()
        sys.stderr = None  # type: ignore[assignment]
        os.close(1)
        os.close(2)
        return item

    pipeline = Pipeline(range(20)) >> stage(run_in="process", ordered=True, max_items=1)(closes)
    assert await asyncio.wait_for(pipeline.collect(), LIMIT) == list(range(20))


def test_a_program_whose_own_streams_are_closed_runs_in_processes(tmp_path: Path) -> None:
    finished = run_program(
        tmp_path,
        """
        import asyncio, os
        from pathlib import Path
        from pipeline import Pipeline
        from stages import stage

        @stage(run_in="process", ordered=True)
        def work(item):
            print("hello")
            return item

        if __name__ == "__main__":
            os.closerange(0, 3)
            Path("result").write_text(str(asyncio.run((Pipeline(range(5)) >> work).collect())))
        """,
    )
    assert finished.code in (0, 120)  # 120: the interpreter could not flush its own stdout
    assert (tmp_path / "result").read_text() == "[0, 1, 2, 3, 4]"
