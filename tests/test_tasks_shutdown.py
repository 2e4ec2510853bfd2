"""The end of all tasks: by a call, by signals to a real process, and in bounded time whatever the work does."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from helpers import Program, turns
from tasking import KEY, Deaf, Held, all_of, everything, messages, types

from pipeline import CancelReason, CancelType
from pipeline.tasks import (
    CoordinatorClosedError,
    EventType,
    TaskContext,
    TaskCoordinator,
    TaskKey,
    TaskOverError,
)


async def nothing() -> None:
    pass


async def test_a_shutdown_cancels_everything_with_one_reason_and_waits_for_the_cleanup() -> None:
    coordinator, began, cleaned = TaskCoordinator(), asyncio.Barrier(4), list[str]()

    async def work(context: TaskContext) -> None:
        await began.wait()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(context.key.id)

    for n in range(3):
        coordinator.start_task("shop", "Import", n, work)
    clients = [all_of(coordinator, ("shop", "Import", n)) for n in range(3)]
    await began.wait()
    await turns()
    report = await coordinator.shutdown(timeout=5)
    assert sorted(cleaned) == ["0", "1", "2"]
    assert sorted(key.id for key in report.ended) == ["0", "1", "2"]
    assert (report.stuck, report.seconds < 5) == ((), True)
    for events in await asyncio.gather(*clients):
        assert types(events) == ["started", "cancelled"]
        assert messages(events[-1]) == ["the service is shutting down"]
        assert events[-1].data["reasons"][0]["code"] == "shutdown"
        assert "stuck" not in events[-1].data


async def test_nothing_is_started_after_a_shutdown() -> None:
    coordinator = TaskCoordinator()
    await coordinator.shutdown()
    with pytest.raises(CoordinatorClosedError, match="was shut down, and does not start shop/Import/7"):
        coordinator.start_task(*KEY, nothing)


async def test_a_shutdown_says_why() -> None:
    coordinator = TaskCoordinator()
    running = coordinator.start_task(*KEY, Held())
    await coordinator.shutdown(reason=CancelReason("received SIGTERM", CancelType.SIGNAL))
    end = await running.wait()
    assert [(r["message"], r["cancel_type"], r["code"]) for r in end.data["reasons"]] == [("received SIGTERM", "signal", "shutdown")]


async def test_what_does_not_stop_is_named_and_left_behind_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    coordinator, deaf, held = TaskCoordinator(), Deaf(), Held()
    stuck = coordinator.start_task(*KEY, deaf)
    coordinator.start_task("shop", "Export", 1, held)
    await deaf.began.wait()
    client = all_of(coordinator)
    report = await coordinator.shutdown(timeout=0.05)
    assert report.stuck == (TaskKey("shop", "Import", "7"),)
    assert report.ended == (TaskKey("shop", "Export", "1"),)
    events = await client
    assert types(events) == ["started", "cancelled"]
    assert events[-1].data["stuck"] is True
    assert messages(events[-1]) == ["the service is shutting down"]
    assert "shop/Import/7" in capsys.readouterr().err
    assert not coordinator.is_task_running(*KEY)
    # What it does from now on is nobody's business.
    assert deaf.context is not None
    with pytest.raises(TaskOverError, match="task shop/Import/7 is over"):
        await deaf.context.progress(1)
    with pytest.raises(TaskOverError):
        await deaf.context.save({"at": 5})
    deaf.opened.set()
    await asyncio.wait([stuck.task])
    assert types(await everything(coordinator)) == ["started", "cancelled"]
    assert (await stuck.wait()).data["stuck"] is True
    assert "a task that was given up has ended" in capsys.readouterr().err


async def test_a_second_call_without_patience_ends_the_waiting_of_the_first() -> None:
    coordinator, deaf = TaskCoordinator(), Deaf()
    running = coordinator.start_task(*KEY, deaf)
    await deaf.began.wait()
    first = asyncio.create_task(coordinator.shutdown(timeout=60))
    await deaf.heard.wait()
    report = await coordinator.shutdown(timeout=0)
    assert (await first).stuck == report.stuck == (running.key,)
    deaf.opened.set()
    await asyncio.wait([running.task])


async def test_a_shutdown_that_is_cancelled_has_asked_all_to_stop() -> None:
    coordinator, deaf = TaskCoordinator(), Deaf()
    running = coordinator.start_task(*KEY, deaf)
    await deaf.began.wait()
    stopping = asyncio.create_task(coordinator.shutdown(timeout=60))
    await deaf.heard.wait()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    deaf.opened.set()
    assert messages(await running.wait()) == ["the service is shutting down"]


async def test_nothing_that_a_task_does_is_raised_by_a_shutdown() -> None:
    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            raise LookupError("in the end")

    began = asyncio.Event()
    async with TaskCoordinator() as coordinator:
        running = coordinator.start_task(*KEY, work)
        await began.wait()
    assert (await running.wait()).data["error"]["message"] == "in the end"


async def test_a_task_cannot_wait_for_the_shutdown_that_waits_for_it() -> None:
    async with TaskCoordinator() as coordinator:
        event = await coordinator.start_task(*KEY, coordinator.shutdown).wait()
    assert event.type is EventType.ERROR
    assert "cannot wait for the shutdown that waits for it" in event.data["message"]


async def test_a_shutdown_without_tasks_is_quick() -> None:
    report = await TaskCoordinator().shutdown(timeout=60)
    assert (report.ended, report.stuck) == ((), ())


async def test_a_block_without_a_signal_shuts_nothing_down() -> None:
    async with TaskCoordinator() as coordinator:
        async with coordinator.shutting_down_on(signal.SIGUSR1) as stopping:
            held = Held()
            coordinator.start_task(*KEY, held)
            await held.began.wait()
        assert (stopping.report, stopping.reasons) == (None, [])
        assert coordinator.is_task_running(*KEY)


async def test_a_block_that_is_entered_twice_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    block = TaskCoordinator().shutting_down_on(signal.SIGUSR1)
    async with block:
        pass
    with pytest.raises(RuntimeError, match="has been entered before"):
        await block.__aenter__()
    assert signal.getsignal(signal.SIGUSR1) is before


async def test_a_signal_shuts_down_and_ends_the_block() -> None:
    coordinator, held = TaskCoordinator(), Held()
    async with coordinator.shutting_down_on(signal.SIGUSR1, timeout=5) as stopping:
        running = coordinator.start_task(*KEY, held)
        await held.began.wait()
        signal.raise_signal(signal.SIGUSR1)
        await asyncio.Event().wait()
    assert stopping.report is not None
    assert stopping.report.ended == (running.key,)
    assert [reason.message for reason in stopping.reasons] == ["received SIGUSR1"]
    end = await running.wait()
    assert end.data["reasons"][0]["cancel_type"] == "signal"
    assert end.data["reasons"][0]["code"] == "shutdown"


async def test_a_block_that_ends_while_it_is_shut_down_waits_for_that() -> None:
    coordinator, deaf = TaskCoordinator(), Deaf()
    async with coordinator.shutting_down_on(signal.SIGUSR1, timeout=5) as stopping:
        running = coordinator.start_task(*KEY, deaf)
        await deaf.began.wait()
        signal.raise_signal(signal.SIGUSR1)
        await deaf.heard.wait()
        asyncio.get_running_loop().call_later(0.01, deaf.opened.set)
    assert stopping.report is not None
    assert stopping.report.ended == (running.key,)


async def test_an_error_in_the_block_goes_through() -> None:
    with pytest.raises(LookupError, match="in the block"):
        async with TaskCoordinator().shutting_down_on(signal.SIGUSR1):
            raise LookupError("in the block")


SERVICE = """
    import asyncio, json, signal, sys
    from pipeline.tasks import TaskCoordinator

    began = []

    async def work(context):
        try:
            began.append(context.key.id)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            print("cleaned", context.key.id, flush=True)

    async def deaf():
        while True:
            try:
                began.append("deaf")
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                print("deaf", flush=True)

    async def follow(coordinator, id):
        async for event in coordinator.subscribe("shop", "Import", id):
            if event.terminal:
                print("told", id, event.type, event.data["reasons"][0]["message"], event.data.get("stuck", False), flush=True)

    async def main():
        coordinator = TaskCoordinator()
        async with coordinator.shutting_down_on(signal.SIGTERM, signal.SIGINT, timeout=float(sys.argv[1])) as stopping:
            for n in range(3):
                coordinator.start_task("shop", "Import", n, work)
            if sys.argv[2] == "deaf":
                coordinator.start_task("shop", "Import", 3, deaf)
            async with asyncio.TaskGroup() as group:
                for n in range(4 if sys.argv[2] == "deaf" else 3):
                    group.create_task(follow(coordinator, n))
                while len(began) < (4 if sys.argv[2] == "deaf" else 3):
                    await asyncio.sleep(0)
                print("ready", flush=True)
                await asyncio.Event().wait()
        print("stopped by", [reason.message for reason in stopping.reasons], "stuck", [str(key) for key in stopping.report.stuck], flush=True)
        if sys.argv[2] == "deaf":
            import os
            os._exit(7)  # asyncio.run would wait for ever for what does not stop

    asyncio.run(main())
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_service_lets_its_tasks_clean_up_and_tells_their_clients(tmp_path: Path, signum: signal.Signals) -> None:
    with Program(tmp_path, SERVICE, "10", "kind") as program:
        program.says("ready")
        program.interrupt(signum)
        finished = program.finish()
    assert (finished.code, finished.err) == (0, "")
    lines = finished.out.splitlines()
    for n in range(3):
        assert lines.index(f"cleaned {n}") < lines.index(f"told {n} cancelled received {signum.name} False")
    assert lines[-1] == f"stopped by ['received {signum.name}'] stuck []"


def test_the_second_signal_does_not_wait_for_what_is_stuck(tmp_path: Path) -> None:
    with Program(tmp_path, SERVICE, "600", "deaf") as program:
        program.says("ready")
        program.interrupt(signal.SIGTERM)
        program.says("cleaned 2")
        program.says("deaf")
        program.interrupt(signal.SIGINT)
        finished = program.finish()
    assert finished.code == 7
    assert "told 3 cancelled received SIGTERM True" in finished.out
    assert "stopped by ['received SIGTERM', 'received SIGINT (signal number 2 since armed)'] stuck ['shop/Import/3']" in finished.out
    assert "tasks did not stop and were left behind" in finished.err


BLOCKED = """
    import asyncio, signal, time
    from pipeline.tasks import TaskCoordinator

    async def work():
        print("blocked", flush=True)
        try:
            time.sleep(600)
        finally:
            print("interrupted", flush=True)

    async def main():
        coordinator = TaskCoordinator()
        async with coordinator.shutting_down_on(signal.SIGTERM, signal.SIGINT, timeout=600):
            await coordinator.start_task("shop", "Import", 1, work).wait()

    asyncio.run(main())
"""


def test_signals_end_a_program_whose_loop_is_blocked(tmp_path: Path) -> None:
    with Program(tmp_path, BLOCKED) as program:
        program.says("blocked")
        finished = program.insist(signal.SIGTERM)  # it takes those of the first two seconds for impatience
    assert finished.code == 128 + signal.SIGTERM
    assert "interrupted" in finished.out
    assert "the event loop is blocked and hears no signals" in finished.err
