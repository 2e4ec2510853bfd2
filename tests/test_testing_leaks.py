"""`assert_no_leaks` finds what is planted, names it, and lets everything else pass.

The rule kept here: what a test plants it takes away again, so that the suite's own check has nothing to find.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from helpers import run_program

from pipeline import Pipeline
from pipeline.testing import assert_no_leaks
from stages import stage

BRIEF = 0.02
"""Seconds to settle where something is known to be left."""


async def forever() -> None:
    await asyncio.Event().wait()


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


@pytest.fixture
def waiting() -> Iterator[threading.Thread]:
    """A thread that waits, not started yet."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="forgotten", daemon=True)
    yield thread
    over.set()
    thread.join()


class TestWhatIsLeft:
    async def test_a_task_is_named_with_the_place_where_it_waits(self) -> None:
        with pytest.raises(AssertionError, match=r"left behind:\n  task 'lost' at .*locks\.py:\d+ in Event\.wait"):
            async with assert_no_leaks(settle=BRIEF):
                task = asyncio.create_task(forever(), name="lost")
        await ended(task)

    async def test_a_plain_with_sees_tasks_too(self) -> None:
        with pytest.raises(AssertionError, match="task 'lost'"):
            with assert_no_leaks(settle=BRIEF):
                task = asyncio.create_task(forever(), name="lost")
        await ended(task)

    @pytest.mark.abandons("task")
    def test_a_task_that_asyncio_run_had_to_cut_short_is_named(self) -> None:
        async def main() -> None:
            main.task = asyncio.create_task(forever(), name="lost")  # type: ignore[attr-defined]
            await asyncio.sleep(0)

        with pytest.raises(AssertionError, match="task 'lost'"):
            with assert_no_leaks(settle=BRIEF):
                asyncio.run(main())

    @pytest.mark.abandons("task")
    def test_a_task_that_was_there_when_its_loop_was_closed_is_named(self) -> None:
        with pytest.raises(AssertionError, match="task 'lost'"):
            with assert_no_leaks(settle=BRIEF):
                loop = asyncio.new_event_loop()
                task = loop.create_task(forever(), name="lost")
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                loop.run_until_complete(asyncio.sleep(0))
                loop.close()
        task.get_coro().close()  # type: ignore[union-attr]

    def test_a_thread_is_named_with_the_place_where_it_is(self, waiting: threading.Thread) -> None:
        with pytest.raises(AssertionError, match=r"thread 'forgotten' at .*threading\.py:\d+ in "):
            with assert_no_leaks(settle=BRIEF):
                waiting.start()

    def test_a_descriptor_is_named_with_what_it_leads_to(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match=r"descriptor \d+: .*/left\.txt"):
            with assert_no_leaks(settle=BRIEF):
                left = os.open(tmp_path / "left.txt", os.O_CREAT)
        os.close(left)

    def test_a_descriptor_in_the_place_of_another_is_seen(self, tmp_path: Path) -> None:
        first = os.open(tmp_path / "first.txt", os.O_CREAT)
        with pytest.raises(AssertionError, match=rf"descriptor {first}: .*/second\.txt"):
            with assert_no_leaks(settle=BRIEF):
                os.close(first)
                assert os.open(tmp_path / "second.txt", os.O_CREAT) == first
        os.close(first)

    def test_a_child_process_is_named_with_its_command(self) -> None:
        with pytest.raises(AssertionError, match=r"process \d+: .*import sys"):
            with assert_no_leaks(settle=BRIEF):
                child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        child.communicate()

    def test_a_child_of_a_child_is_seen(self) -> None:
        program = (
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read(); # the grandchild'])\n"
            "print('started', flush=True)\n"
            "child.wait()"
        )
        with pytest.raises(AssertionError, match="the grandchild"):
            with assert_no_leaks(settle=BRIEF):
                child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert child.stdout is not None
                child.stdout.readline()
        child.communicate()

    def test_everything_is_listed_at_once(self, waiting: threading.Thread, tmp_path: Path) -> None:
        with pytest.raises(AssertionError) as caught:
            with assert_no_leaks(settle=BRIEF):
                waiting.start()
                left = os.open(tmp_path / "left.txt", os.O_CREAT)
        os.close(left)
        assert len(str(caught.value).splitlines()) == 3

    @pytest.mark.abandons("complaint")
    def test_a_call_of_the_loops_exception_handler_counts_also_when_it_is_the_programs_own(self) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda *_: None)
            loop.call_exception_handler({"message": "something is wrong", "exception": ValueError("bad")})

        with pytest.raises(AssertionError, match=r"exception handler was called: something is wrong .*ValueError\('bad'\)"):
            with assert_no_leaks(settle=BRIEF):
                asyncio.run(main())

    def test_on_uvloop_tasks_and_the_exception_handler_are_seen_from_inside(self) -> None:
        async def main() -> None:
            task = asyncio.create_task(forever(), name="lost")
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            with pytest.raises(AssertionError, match=r"called: wrong(.|\n)*task 'another'"):
                async with assert_no_leaks(settle=BRIEF):
                    asyncio.get_running_loop().call_exception_handler({"message": "wrong"})
                    another = asyncio.create_task(forever(), name="another")
            await ended(task)
            await ended(another)

        uvloop.run(main())


class TestWhatPasses:
    async def test_nothing_is_nothing(self) -> None:
        async with assert_no_leaks():
            pass

    async def test_what_was_there_before_is_nobodys_leak(self, waiting: threading.Thread) -> None:
        waiting.start()
        task = asyncio.create_task(forever())
        async with assert_no_leaks(settle=BRIEF):
            await asyncio.sleep(0)
        await ended(task)

    async def test_what_is_about_to_end_is_waited_for(self) -> None:
        async with assert_no_leaks():
            asyncio.create_task(asyncio.sleep(0.01)).add_done_callback(lambda _: None)

    def test_a_thread_that_is_about_to_end_is_waited_for(self) -> None:
        with assert_no_leaks():
            threading.Thread(target=lambda: None).start()

    async def test_a_descriptor_that_was_closed_is_no_leak(self, tmp_path: Path) -> None:
        first = os.open(tmp_path / "first.txt", os.O_CREAT)
        async with assert_no_leaks():
            os.close(first)

    async def test_the_idle_threads_of_the_loops_own_executor_are_not_the_blocks(self) -> None:
        async with assert_no_leaks(settle=BRIEF):
            assert await asyncio.to_thread(abs, -1) == 1

    def test_asyncio_run_as_a_whole(self) -> None:
        with assert_no_leaks():
            asyncio.run(asyncio.to_thread(abs, -1))

    @pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
    def test_a_pipeline_leaves_nothing(self, run_in: str) -> None:
        with assert_no_leaks():
            assert asyncio.run((Pipeline([-1, -2]) >> stage(run_in=run_in)(abs)).collect()) == [1, 2]  # type: ignore[call-overload]

    def test_tasks_may_be_left_out(self) -> None:
        async def main() -> None:
            with assert_no_leaks(settle=BRIEF, tasks=False):
                task = asyncio.create_task(forever())
            await ended(task)

        asyncio.run(main())


class TestHow:
    def test_an_error_of_the_block_goes_on_with_what_is_left_as_a_note(self, waiting: threading.Thread) -> None:
        with pytest.raises(ValueError, match="of the block") as caught:
            with assert_no_leaks(settle=BRIEF):
                waiting.start()
                raise ValueError("of the block")
        assert "thread 'forgotten'" in caught.value.__notes__[0]

    @pytest.mark.abandons("complaint")
    def test_checks_may_be_inside_each_other(self) -> None:
        outer, inner = assert_no_leaks(settle=BRIEF), assert_no_leaks(settle=BRIEF)
        outer.start()
        inner.start()
        asyncio.run(complain())
        assert len(inner.stop()) == 1
        asyncio.run(complain())
        assert len(outer.stop()) == 2

    def test_asyncio_is_as_it_was_afterwards(self) -> None:
        program = (
            "import asyncio, asyncio.runners\n"
            "from pipeline.testing import assert_no_leaks\n"
            "names = [(asyncio.BaseEventLoop, 'close'), (asyncio.BaseEventLoop, 'call_exception_handler'), "
            "(asyncio.runners, '_cancel_all_tasks')]\n"
            "before = [getattr(*name) for name in names]\n"
            "with assert_no_leaks():\n"
            "    assert before != [getattr(*name) for name in names]\n"
            "assert before == [getattr(*name) for name in names]\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=200)

    def test_pytest_is_not_needed(self, tmp_path: Path) -> None:
        finished = run_program(
            tmp_path,
            """
            import sys
            import pipeline.testing
            assert not {"pytest", "_pytest", "psutil", "uvloop", "stages", "workers"} & set(sys.modules), sys.modules
            """,
        )
        assert finished.code == 0, finished.err

    def test_the_first_process_stage_of_a_program_is_no_leak(self, tmp_path: Path) -> None:
        """It starts the fork server and the resource tracker, which stay."""
        finished = run_program(
            tmp_path,
            """
            import asyncio
            from pipeline import Pipeline
            from pipeline.testing import assert_no_leaks
            from stages import stage

            if __name__ == "__main__":
                with assert_no_leaks():
                    assert asyncio.run((Pipeline([-1]) >> stage(run_in="process")(abs)).collect()) == [1]
            """,
        )
        assert finished.code == 0, finished.err


async def complain() -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    asyncio.get_running_loop().call_exception_handler({"message": "wrong"})
