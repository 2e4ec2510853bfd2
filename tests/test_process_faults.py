"""Worker processes that die, stop, overrun, or never start: what each costs, and what it says."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT, Flag, Journal, assert_balanced, contention, eventually, run_program
from structlog.testing import capture_logs

from pipeline import Err, ErrorPolicy, Pipeline, RunReport, StageMetrics, WorkerLostError
from stages import InProcess, Retry, mix_pool, stage
from workers.process.staff import Budget

MANY = 60
"""Items of a run in which something happens to one of them."""


async def outputs(pipeline: Pipeline[Any]) -> list[Any]:
    """What a run gives that completes in time, its ledger checked."""
    result = await asyncio.wait_for(pipeline.collect(), LIMIT)
    assert isinstance(result, list), result
    assert_balanced(pipeline.snapshot())
    return result


async def failure(pipeline: Pipeline[Any]) -> Err:
    """How a run ends that fails in time, its ledger checked."""
    result = await asyncio.wait_for(pipeline.run(), LIMIT)
    assert isinstance(result, Err), result
    assert result.report is not None
    assert_balanced(result.report)
    return result


def of(pipeline: Pipeline[Any]) -> StageMetrics:
    return pipeline.snapshot().stages[0]


def pids(pipeline: Pipeline[Any]) -> list[int]:
    return [process.pid for process in pipeline.runtime.processes]  # type: ignore[attr-defined]


# --- ways to die


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def read_nowhere() -> None:
    ctypes.string_at(0)


def leave(code: int = 3) -> None:
    os._exit(code)


def leave_as_if_all_were_well() -> None:
    os._exit(0)


def close_every_descriptor() -> None:
    os.closerange(3, 4096)


def close_the_standard_streams_too() -> None:
    os.closerange(0, 4096)


def write_to_every_descriptor() -> None:
    for descriptor in range(3, 256):
        with contextlib.suppress(OSError):
            os.set_blocking(descriptor, False)
            os.write(descriptor, b"\x00\xff garbage " * 999 + b"\n")


WAYS = [
    be_killed,
    read_nowhere,
    os.abort,
    leave,
    leave_as_if_all_were_well,
    close_every_descriptor,
    close_the_standard_streams_too,
    write_to_every_descriptor,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("retry", [None, 2], ids=["in parcels", "as jobs"])
async def test_however_a_worker_dies_it_costs_the_item_that_it_was_at(way: Callable[[], None], retry: int | None) -> None:
    def dies(item: int) -> int:
        if item == 7:
            way()
            time.sleep(60)  # whoever can still do something does nothing more
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in="process", concurrency=2, ordered=True, retry=retry)(dies)
    assert await outputs(pipeline) == [item for item in range(MANY) if item != 7]
    assert (of(pipeline).lost, of(pipeline).failed) == (1, 1)


@pytest.mark.parametrize("way", [be_killed, close_every_descriptor, write_to_every_descriptor], ids=lambda way: way.__name__)
async def test_a_spawned_worker_that_dies_costs_its_item_as_well(way: Callable[[], None]) -> None:
    def dies(item: int) -> int:
        if item == 2:
            way()
            time.sleep(60)
        return item

    pipeline = Pipeline(range(6)) >> stage(run_in=InProcess(start_method="spawn"), ordered=True)(dies)
    assert await outputs(pipeline) == [0, 1, 3, 4, 5]
    assert of(pipeline).lost == 1


async def test_what_was_written_to_the_librarys_descriptors_is_said_to_be_the_cause() -> None:
    def writes(item: int) -> int:
        write_to_every_descriptor()
        time.sleep(60)
        return item

    pipeline = Pipeline([1], on_error=ErrorPolicy.EMIT) >> stage(run_in="process")(writes)
    (err,) = await outputs(pipeline)
    assert isinstance(err.value, WorkerLostError)
    assert "written to a descriptor" in str(err.value)


async def test_a_handler_that_closes_the_descriptors_and_returns_costs_no_more_than_two_items(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def closes(item: int) -> int:
        if item == 7:
            journal.write(item)
            close_every_descriptor()
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in="process", ordered=True)(closes)
    result = await outputs(pipeline)
    assert 1 <= of(pipeline).lost <= 2
    assert len(result) == MANY - of(pipeline).lost
    assert 7 not in result
    assert len(journal.lines()) <= 2


async def test_a_handlers_memory_error_is_an_ordinary_failure() -> None:
    def hungry(item: int) -> int:
        return len(bytearray(1 << 60)) if item == 3 else item

    pipeline = Pipeline(range(9), on_error=ErrorPolicy.EMIT) >> stage(run_in="process", ordered=True)(hungry)
    result = await outputs(pipeline)
    assert isinstance(result[3].value, MemoryError)
    assert (of(pipeline).failed, of(pipeline).lost) == (1, 0)


# --- when they die


class _Held:
    """A handler that says which worker is at which item, and goes on when it may."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "at work")
        self.go = Flag(folder / "go")

    def __call__(self, item: int) -> int:
        self.journal.write(f"{os.getpid()} {item}")
        self.go.wait()
        return item

    def at_work(self) -> dict[int, int]:
        """Which item each worker has begun last."""
        return {int(pid): int(item) for pid, item in map(str.split, self.journal.lines())}


@pytest.mark.parametrize("victims", [1, 2, 3], ids=["one", "two at once", "all at once"])
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped before"])
async def test_each_worker_that_is_killed_costs_its_own_item(victims: int, stopped: bool, tmp_path: Path) -> None:
    held = _Held(tmp_path)
    pipeline = Pipeline(range(12)) >> stage(run_in="process", concurrency=3)(held.__call__)
    run = asyncio.create_task(outputs(pipeline))
    await eventually(lambda: len(held.at_work()) == 3)
    killed = dict(list(held.at_work().items())[:victims])
    for pid in killed if stopped else ():
        os.kill(pid, signal.SIGSTOP)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: of(pipeline).lost == victims)
    held.go.set()
    assert sorted(await run) == sorted(set(range(12)) - set(killed.values()))
    assert of(pipeline).failed == victims


async def test_a_worker_killed_in_its_setup_is_replaced_and_costs_nothing(tmp_path: Path) -> None:
    first = Flag(tmp_path / "first")

    def opened(state: Any) -> None:
        if not first.is_set():
            first.set()
            be_killed()

    pipeline = Pipeline(range(9)) >> stage(run_in="process", ordered=True, setup=opened)(abs)
    assert await outputs(pipeline) == list(range(9))
    assert of(pipeline).failed == 0


@pytest.mark.parametrize("way", [be_killed, leave], ids=lambda way: way.__name__)
async def test_a_worker_that_dies_in_its_teardown_costs_nothing_and_is_named(way: Callable[[], None]) -> None:
    pipeline = Pipeline(range(9)) >> stage(run_in="process", ordered=True, teardown=lambda state: way())(abs)
    with capture_logs() as logs:
        assert await outputs(pipeline) == list(range(9))
    (record,) = [record for record in logs if "did not end by itself" in record["event"]]
    assert (record["worker"], record["exit_code"]) == (0, -9 if way is be_killed else 3)


async def test_a_death_is_noticed_within_50_ms(tmp_path: Path) -> None:
    held = _Held(tmp_path)
    pipeline = Pipeline(range(6)) >> stage(run_in="process")(held.__call__)
    run = asyncio.create_task(outputs(pipeline))
    seconds, others = list[float](), list[float]()
    for lost in range(1, 6):
        await eventually(lambda: pids(pipeline) and pids(pipeline)[0] in held.at_work())
        began = time.perf_counter()
        os.kill(pids(pipeline)[0], signal.SIGKILL)
        while of(pipeline).lost < lost:
            assert time.perf_counter() - began < LIMIT
            await asyncio.sleep(0)
        seconds.append(time.perf_counter() - began)
        others.append(contention())
    held.go.set()
    assert await run == [5]
    assert statistics.median(seconds) < 0.05 * statistics.median(others)


def test_the_death_of_the_fork_server_costs_what_is_in_work_and_leaves_nobody(tmp_path: Path) -> None:
    source = """
        import asyncio, os, signal
        from pathlib import Path
        from multiprocess import forkserver
        from helpers import Flag, Journal, eventually
        from pipeline import Pipeline
        from stages import stage

        journal, go = Journal(Path("journal")) if __name__ == "__main__" else None, Flag(Path("go"))

        @stage(run_in="process", concurrency=2)
        def work(item):
            with open("journal", "a") as file:
                print(os.getpid(), file=file)
            go.wait()
            return item

        async def main():
            pipeline = Pipeline(range(10)) >> work
            run = asyncio.create_task(pipeline.run())
            await eventually(lambda: len(journal.lines()) == 2)
            first = [int(pid) for pid in journal.lines()]
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
            await eventually(lambda: pipeline.snapshot().stages[0].lost == 2)
            await eventually(lambda: not any(alive(pid) for pid in first))
            go.set()
            report = await run
            print(report.outcome, report.balanced, report.delivered)

        def alive(pid):
            try:
                return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
            except OSError:
                return False

        if __name__ == "__main__":
            asyncio.run(main())
    """
    finished = run_program(tmp_path, source)
    assert (finished.code, finished.out) == (0, "completed True 8\n"), finished.err


# --- the budget


def test_replacements_come_after_growing_pauses_until_the_budget_is_used_up() -> None:
    budget = Budget(restarts=4, workers=2)
    assert [budget.spend() for _ in range(9)] == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, None]


def test_a_result_fills_the_budget_up_again() -> None:
    budget = Budget(restarts=1, workers=1)
    assert budget.spend() == 0.0
    budget.refill()
    assert [budget.spend(), budget.spend()] == [0.0, None]


@pytest.mark.parametrize("restarts", [0, 2])
async def test_when_the_budget_is_used_up_every_further_item_fails_by_the_policy(restarts: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def dies(item: int) -> int:
        journal.write(item)
        be_killed()
        return item

    fatal = stage(run_in=InProcess(restarts=restarts), ordered=True, on_error=ErrorPolicy.EMIT)(dies)
    pipeline = Pipeline(range(200)) >> fatal
    errors = await outputs(pipeline)
    assert [err.item for err in errors] == list(range(200))
    assert {type(err.value) for err in errors} == {WorkerLostError}
    assert (of(pipeline).lost, of(pipeline).emitted_errors) == (200, 200)
    assert len(journal.lines()) == restarts + 1
    assert "no more are started" in str(errors[-1].value)


async def test_under_raise_the_first_lost_item_fails_the_run() -> None:
    pipeline = Pipeline(range(50), on_error=ErrorPolicy.RAISE) >> stage(run_in="process")(lambda item: be_killed())
    err = await failure(pipeline)
    assert isinstance(err.value, WorkerLostError)


async def test_when_the_budget_is_used_up_workers_that_live_finish_what_they_have(tmp_path: Path) -> None:
    held = _Held(tmp_path)

    def mixed(item: int) -> int:
        if item:
            be_killed()
        return held(item)

    pipeline = Pipeline(range(9)) >> stage(run_in=InProcess(restarts=1), concurrency=2)(mixed)
    run = asyncio.create_task(outputs(pipeline))
    await eventually(lambda: of(pipeline).lost == 8)
    held.go.set()
    assert await run == [0]


async def test_workers_that_are_killed_for_their_items_timeout_use_up_nothing(tmp_path: Path) -> None:
    slow = stage(run_in=InProcess(restarts=0), timeout=0.05)(lambda item: time.sleep(60))
    pipeline = Pipeline(range(4)) >> slow
    assert await outputs(pipeline) == []
    assert (of(pipeline).timed_out, of(pipeline).lost) == (4, 0)


async def test_a_worker_is_replaced_by_one_with_the_same_handler(tmp_path: Path) -> None:
    died, back = Flag(tmp_path / "died"), Flag(tmp_path / "back")

    def left(item: int) -> str:
        if item:
            back.wait()  # nothing goes on unless the other handler has a worker again
        return "left"

    def right(item: int) -> str:
        if not died.is_set():
            died.set()
            be_killed()
        back.set()
        return "right"

    pipeline = Pipeline(range(40)) >> mix_pool(multi_proc=True)(lambda: [left, right])
    assert set(await outputs(pipeline)) == {"left", "right"}
    assert of(pipeline).lost == 1


# --- timeouts


def hold_the_lock_and_ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.PyDLL(None).pause()  # C code that never gives the interpreter's lock back


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
async def test_an_item_that_holds_the_interpreters_lock_is_ended_at_its_timeout(ordered: bool) -> None:
    def sticks(item: int) -> int:
        if item == 30:
            hold_the_lock_and_ignore_sigterm()
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in="process", concurrency=2, timeout=0.2, ordered=ordered)(sticks)
    result = await outputs(pipeline)
    assert (result if ordered else sorted(result)) == [item for item in range(MANY) if item != 30]
    assert (of(pipeline).timed_out, of(pipeline).failed, of(pipeline).lost) == (1, 1, 0)


async def test_a_worker_that_is_stopped_is_ended_at_its_items_timeout() -> None:
    def stops(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return item

    pipeline = Pipeline(range(9)) >> stage(run_in="process", timeout=0.2, ordered=True)(stops)
    assert await outputs(pipeline) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert of(pipeline).timed_out == 1


async def test_an_attempt_that_is_ended_at_its_timeout_is_tried_again_in_another_worker(tmp_path: Path) -> None:
    first = Flag(tmp_path / "first")

    def sticks(item: int) -> int:
        if item == 30 and not first.is_set():
            first.set()
            hold_the_lock_and_ignore_sigterm()
        return item

    pipeline = Pipeline(range(MANY)) >> stage(run_in="process", timeout=0.2, ordered=True, retry=Retry(attempts=2, wait=0.0))(sticks)
    assert await outputs(pipeline) == list(range(MANY))
    assert (of(pipeline).retried, of(pipeline).failed) == (1, 0)


async def test_a_generator_that_sticks_is_ended_and_what_it_gave_before_is_delivered() -> None:
    def sticks(item: int) -> Iterator[int]:
        yield item
        if item == 1:
            yield from range(100, 120)  # enough for a frame
            hold_the_lock_and_ignore_sigterm()
        yield -item

    pipeline = Pipeline([0, 1, 2]) >> stage(run_in="process", timeout=0.2, ordered=True)(sticks)
    result = await outputs(pipeline)
    assert (result[:2], result[-2:]) == ([0, 0], [2, -2])
    assert (of(pipeline).timed_out, of(pipeline).succeeded) == (1, 2)


# --- workers that cannot start


async def test_a_setup_that_raises_in_every_worker_is_one_error() -> None:
    def opened(state: Any) -> None:
        raise ConnectionError("the database is away")

    pipeline = Pipeline(range(99)) >> stage(run_in="process", concurrency=4, setup=opened)(abs)
    err = await failure(pipeline)
    assert isinstance(err.value, ConnectionError)


async def test_workers_that_crash_in_every_setup_are_one_error_after_a_few(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def opened(state: Any) -> None:
        journal.write("one more")
        read_nowhere()

    pipeline = Pipeline(range(99)) >> stage(run_in="process", setup=opened)(abs)
    err = await failure(pipeline)
    assert isinstance(err.value, WorkerLostError)
    assert "while they started (signal 11)" in str(err.value)
    assert len(journal.lines()) == 3


async def test_a_setup_that_leaves_the_process_is_one_error() -> None:
    pipeline = Pipeline(range(99)) >> stage(run_in="process", concurrency=2, setup=lambda state: leave(4))(abs)
    err = await failure(pipeline)
    assert "ended while it started (exit code 4)" in str(err.value)


async def test_a_module_that_a_worker_cannot_import_is_one_error_that_names_it() -> None:
    module = types.ModuleType("only_here")
    exec("def handler(item): return item", vars(module))
    sys.modules["only_here"] = module
    try:
        err = await failure(Pipeline(range(99)) >> stage(run_in="process", concurrency=2)(module.handler))
    finally:
        del sys.modules["only_here"]
    assert isinstance(err.value, ModuleNotFoundError)
    assert "only_here" in str(err.value)


RUN = """
if __name__ == "__main__":
    result = asyncio.run((Pipeline(range(9)) >> work).collect())
    print(result)
"""
HEAD = """
import asyncio, os, sys
from pathlib import Path
from pipeline import Pipeline
from stages import stage

@stage(run_in="process", concurrency=2, ordered=True)
def work(item):
    return item
"""


def test_an_import_that_fails_in_the_workers_only_is_one_error_that_names_it(tmp_path: Path) -> None:
    finished = run_program(tmp_path, HEAD + "if __name__ != '__main__':\n    import not_to_be_found\n" + RUN)
    assert finished.code == 0
    assert finished.out.startswith("<Err WorkerLostError(")
    assert "No module named 'not_to_be_found'" in finished.out
    assert finished.out.count("\n") == 1


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_program_without_a_main_guard_fails_and_its_workers_do_not_run_it(tmp_path: Path, method: str) -> None:
    source = f"""
import asyncio, os
from pathlib import Path
from pipeline import Pipeline
from stages import InProcess, stage
result = asyncio.run((Pipeline(range(9)) >> stage(run_in=InProcess(start_method={method!r}), concurrency=2)(abs)).collect())
with open("results", "a") as file:
    print(result, file=file)
"""
    finished = run_program(tmp_path, source)
    assert finished.code == 0
    (result,) = (tmp_path / "results").read_text().splitlines()
    assert result.startswith("<Err PipelineError('a worker process is importing the main program")
    assert 'if __name__ == "__main__":' in result


def test_a_program_that_crashes_its_workers_when_they_import_it_is_one_error(tmp_path: Path) -> None:
    finished = run_program(tmp_path, HEAD + "if __name__ != '__main__':\n    import ctypes\n    ctypes.string_at(0)\n" + RUN)
    assert finished.code == 0
    assert "died in a row while they started (signal 11)" in finished.out


@pytest.mark.parametrize("run_as", ["-c", "standard input", "an interactive session"])
def test_a_program_without_a_file_runs_in_processes(tmp_path: Path, run_as: str) -> None:
    source = HEAD + "\n" + RUN
    if run_as == "-c":
        finished = run_program(tmp_path, source, interpreter=("-c", source))
    else:
        flags = ("-i",) if "interactive" in run_as else ()
        shell = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, *{flags!r}, '-'], stdin=open('program.txt')).returncode)"
        (tmp_path / "program.txt").write_text(source)
        finished = run_program(tmp_path, source, interpreter=("-c", shell))
    assert finished.code == 0, finished.err
    assert "[0, 1, 2, 3, 4, 5, 6, 7, 8]" in finished.out


def test_a_program_whose_file_was_deleted_runs_in_processes(tmp_path: Path) -> None:
    finished = run_program(tmp_path, HEAD + RUN.replace("    result", "    os.remove(__file__)\n    result", 1))
    assert (finished.code, finished.out) == (0, "[0, 1, 2, 3, 4, 5, 6, 7, 8]\n"), finished.err


def test_a_program_whose_file_is_deleted_before_a_worker_is_replaced_ends_with_one_error(tmp_path: Path) -> None:
    source = HEAD.replace("    return item", "    if item == 3:\n        os.remove(sys.argv[0])\n        os._exit(1)\n    return item", 1) + RUN
    finished = run_program(tmp_path, source.replace("concurrency=2, ", ""))
    assert finished.code == 0, finished.err
    assert finished.out.startswith("<Err ")
    assert "file changed or gone" in finished.out


async def test_a_report_of_a_run_that_could_not_start_balances() -> None:
    pipeline = Pipeline(range(9)) >> stage(run_in="process", setup=lambda state: leave())(abs)
    err = await failure(pipeline)
    assert isinstance(err.report, RunReport)
    assert err.report.outcome == "failed"
    assert err.report.abandoned == ()
