"""Ends of fences and pipelines as triggers: heard wherever they happen, once, and forgotten afterwards."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from helpers import LIMIT, Gate, Heard, eventually, turns

from pipeline import (
    CancelReason,
    CancelType,
    EndTrigger,
    Err,
    ErrorPolicy,
    EventTrigger,
    Fence,
    Pipeline,
    PipelineError,
    RunReport,
    StageConfigError,
    TimeoutTrigger,
    Trigger,
)
from stages import stage

factories = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


def left(*triggers: Trigger) -> Fence:
    """A fence that was left; call it in a task."""
    with Fence(*triggers) as fence:
        pass
    return fence


async def forever() -> None:
    await asyncio.Event().wait()


# --- what can be watched


@pytest.mark.parametrize("thing", [None, 3, asyncio.Event(), Fence, "fence"], ids=["None", "3", "event", "class", "text"])
def test_only_fences_and_pipelines_have_ends(thing: Any) -> None:
    with pytest.raises(TypeError, match="Fence or a Pipeline"):
        EndTrigger(thing)


def test_it_is_a_trigger_and_cannot_be_armed_without_a_loop() -> None:
    trigger = EndTrigger(Fence())
    assert isinstance(trigger, Trigger)
    with pytest.raises(RuntimeError, match="no running event loop"):
        trigger.arm(lambda reason: None)
    assert trigger.watched.ending._watchers == {}


async def test_an_end_gives_its_reason_with_the_code_that_was_asked_for_and_the_causes_behind_it() -> None:
    fence = left(TimeoutTrigger(0, code="slow"))
    plain, coded = EndTrigger(fence).check(), EndTrigger(fence, code="other").check()
    assert plain is not None
    assert coded is not None
    assert (plain.cancel_type, plain.code, coded.code) == (CancelType.FENCE, None, "other")
    assert [cause.code for cause in plain.causes] == [cause.code for cause in coded.causes] == ["slow"]
    assert coded.to_dict()["causes"][0]["code"] == "slow"
    first, second = coded.lines()
    assert first.endswith("was left (fence, code 'other')")
    assert second == "  because: timed out after 0s (timeout, code 'slow')"


# --- fences


@factories
def test_the_end_of_a_sibling_interrupts(factory: Callable[[], Any]) -> None:
    async def main() -> None:
        entered, go_on, watched = asyncio.Event(), asyncio.Event(), list[Fence]()

        async def sibling() -> None:
            with Fence() as fence:
                watched.append(fence)
                entered.set()
                await go_on.wait()

        task = asyncio.create_task(sibling())
        await entered.wait()
        with Fence(EndTrigger(watched[0], code="alone")) as fence:
            go_on.set()
            await forever()
        assert fence.cancelled_caught
        assert fence.cancelled_by("alone")
        assert watched[0].ending._watchers == {}
        await task

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


async def test_the_end_of_a_fence_inside_interrupts_the_very_next_await() -> None:
    inner = Fence()
    passed = list[str]()
    with Fence(EndTrigger(inner)) as outer:
        with inner:
            await asyncio.sleep(0)
            passed.append("inside")
        await asyncio.sleep(0)
        passed.append("behind")
    assert passed == ["inside"]
    assert outer.cancelled_caught


async def test_the_end_of_a_fence_inside_is_recorded_when_no_await_follows() -> None:
    inner = Fence()
    with Fence(EndTrigger(inner, code="end")) as outer, inner:
        pass
    assert [reason.code for reason in outer.reasons] == ["end"]
    assert not outer.cancelled_caught


async def test_the_end_of_the_fence_around_never_comes_inside_it() -> None:
    outer = Fence()
    with outer:
        with Fence(EndTrigger(outer)) as inner:
            await turns()
        assert not inner.cancelled
        child = asyncio.create_task(_watches(outer))
        await turns()
    assert [reason.cancel_type for reason in (await asyncio.wait_for(child, LIMIT)).reasons] == [CancelType.FENCE]


async def _watches(watched: Any) -> Fence:
    with Fence(EndTrigger(watched)) as fence:
        await forever()
    return fence


async def test_a_fence_that_watches_itself_just_ends() -> None:
    fence = Fence()
    fence._triggers = (EndTrigger(fence),)
    with fence:
        await turns()
    assert not fence.cancelled
    assert fence.ending._watchers == {}


async def test_a_fence_that_was_left_has_fired_already_and_one_not_entered_has_not() -> None:
    with Fence(EndTrigger(left()), EndTrigger(Fence())) as fence:
        await forever()
    assert len(fence.reasons) == 1


async def test_a_fence_whose_triggers_cannot_be_armed_has_ended() -> None:
    class Broken:
        def check(self) -> None:
            return None

        def arm(self, callback: Any) -> Any:
            raise OSError("cannot be armed")

    fence = Fence(Broken())
    with pytest.raises(OSError, match="cannot be armed"), fence:
        pass
    assert EndTrigger(fence).check() is not None


async def test_an_end_by_exception_or_cancellation_is_an_end() -> None:
    fences = [Fence(), Fence()]
    with pytest.raises(ValueError, match="boom"), fences[0]:
        raise ValueError("boom")
    with pytest.raises(asyncio.CancelledError), fences[1]:
        raise asyncio.CancelledError
    assert all(EndTrigger(fence).check() for fence in fences)


async def test_a_chain_of_ends_tells_the_whole_story() -> None:
    first, second = Fence(TimeoutTrigger(0, code="budget")), Fence()
    third = Fence(EndTrigger(second))
    second._triggers = (EndTrigger(first),)
    tasks = [asyncio.create_task(_enter(fence)) for fence in (third, second, first)]
    await asyncio.gather(*tasks)
    lines = third.explain().splitlines()
    assert len(lines) == 3
    assert "budget" in lines[2]
    assert lines[1].lstrip().startswith("because: a fence in task")


async def _enter(fence: Fence) -> None:
    with fence:
        await forever()


async def test_all_who_watch_one_end_are_told_and_those_who_left_are_not() -> None:
    watched, heard = Fence(), [Heard() for _ in range(5)]
    with watched:
        handles = [EndTrigger(watched).arm(each) for each in heard]
        handles[1].disarm()
        handles[1].disarm()
    handles[3].disarm()  # between the end and the callback
    await turns()
    assert [len(each.reasons) for each in heard] == [1, 0, 1, 0, 1]
    for handle in handles:
        handle.disarm()
    assert watched.ending._watchers == {}


async def test_an_end_that_comes_between_the_look_and_the_arming_is_heard() -> None:
    watched, heard = Fence(), Heard()
    trigger = EndTrigger(watched)
    assert trigger.check() is None
    with watched:
        pass
    handle = trigger.arm(heard)
    assert heard.reasons == []
    await heard.next()
    handle.disarm()


def test_an_end_in_another_thread_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    fences: list[Fence] = []
    entered, leave = threading.Event(), threading.Event()

    async def over_there() -> None:
        with Fence() as fence:
            fences.append(fence)
            entered.set()
            assert await asyncio.to_thread(leave.wait, LIMIT)

    async def here() -> Fence:
        asyncio.get_running_loop().set_debug(True)
        with Fence(EndTrigger(fences[0])) as fence:
            leave.set()
            await forever()
        return fence

    thread = threading.Thread(target=asyncio.run, args=(over_there(),))
    thread.start()
    assert entered.wait(LIMIT)
    assert asyncio.run(here()).cancelled_caught
    thread.join(LIMIT)
    assert fences[0].ending._watchers == {}


def test_an_end_heard_when_the_loop_is_closed_is_harmless() -> None:
    watched = Fence()

    async def arm() -> Any:
        return EndTrigger(watched).arm(lambda reason: None)

    async def enter() -> None:
        with watched:
            pass

    handle = asyncio.run(arm())
    asyncio.run(enter())
    handle.disarm()
    assert watched.ending._watchers == {}


async def test_what_was_watched_is_not_kept_by_who_has_left() -> None:
    watched = Fence()
    gone = weakref.ref(watched)
    with Fence(EndTrigger(watched)) as fence:
        with watched:
            pass
        await turns()
    del fence, watched
    gc.collect()
    assert gone() is None


# --- pipelines


async def fails(item: int) -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("how", ["completed", "failed", "was cancelled", "could not start", "was cancelled before it started"])
async def test_however_a_pipeline_ends_it_is_told_and_how(how: str) -> None:
    class Broken(EventTrigger):
        def arm(self, callback: Any, /) -> Any:
            raise OSError("cannot be armed")

    pipeline: Pipeline[Any]
    trigger = EventTrigger(asyncio.Event())
    if how == "failed":
        pipeline = Pipeline([1], name="other", on_error=ErrorPolicy.RAISE) >> stage(fails)
    elif how == "was cancelled":
        pipeline = Pipeline([1], name="other", cancel_on=TimeoutTrigger(0, code="late")) >> stage(abs)
    elif how == "could not start":
        pipeline = Pipeline([1], name="other", cancel_on=[trigger, Broken(asyncio.Event())]) >> stage(abs)
    else:
        pipeline = Pipeline([1], name="other") >> stage(abs)
    heard = Heard()
    handle = EndTrigger(pipeline, code="end").arm(heard)
    if how == "was cancelled before it started":
        pipeline.cancel("never")
    elif how == "could not start":
        with pytest.raises(OSError, match="cannot be armed"):
            await pipeline.run()
    else:
        await pipeline.run()
    reason = await asyncio.wait_for(heard.next(), LIMIT)
    handle.disarm()
    assert (reason.message, reason.code, reason.cancel_type) == (f"pipeline 'other' {how}", "end", CancelType.PIPELINE)
    assert [str(cause) for cause in reason.causes] == {
        "failed": ["fails: ValueError: boom"],
        "was cancelled": ["timed out after 0s"],
        "was cancelled before it started": ["never"],
    }.get(how, [])
    assert EndTrigger(pipeline).check() == CancelReason(reason.message, CancelType.PIPELINE)


async def test_a_run_that_is_refused_is_no_end() -> None:
    pipeline: Pipeline[int] = Pipeline(name="empty")
    assert isinstance(await pipeline.run(), Err)
    assert EndTrigger(pipeline).check() is None
    stays = (n for n in [1])
    wrong = Pipeline([1]) >> stage(run_in="process")(lambda item: next(stays))
    with pytest.raises(StageConfigError):
        await wrong.run()
    assert EndTrigger(wrong).check() is None


async def test_a_pipeline_that_runs_again_has_not_ended_until_it_ends_again() -> None:
    gate = Gate()
    pipeline = Pipeline([1]) >> stage(gate.__call__)
    trigger = EndTrigger(pipeline)
    assert trigger.check() is None
    gate.opened.set()
    await pipeline.run()
    assert trigger.check() is not None
    gate.opened.clear()
    gate.entered.clear()
    run = asyncio.create_task(pipeline.run())
    await gate.entered.wait()
    assert trigger.check() is None
    with pytest.raises(PipelineError, match="running already"):
        await pipeline.run()
    assert trigger.check() is None
    with Fence(trigger) as fence:
        gate.opened.set()
        await forever()
    assert fence.cancelled_caught
    assert isinstance(await run, RunReport)


async def test_gen_makes_an_ended_pipeline_one_that_has_not_ended() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    await pipeline.run()
    assert EndTrigger(pipeline.gen([2])).check() is None


async def test_a_copy_has_an_end_of_its_own() -> None:
    pipeline = Pipeline([1]) >> stage(abs)
    longer = pipeline >> stage(abs)
    await longer.run()
    assert EndTrigger(longer).check() is not None
    assert EndTrigger(pipeline).check() is None


async def test_a_pipeline_inside_another_ends_with_it() -> None:
    inner = Pipeline([1], name="inner") >> stage(abs)
    heard = Heard()
    handle = EndTrigger(inner).arm(heard)
    await (Pipeline(inner, name="outer") >> stage(abs)).run()
    assert (await heard.next()).message == "pipeline 'inner' completed"
    handle.disarm()


async def test_an_iteration_left_early_is_an_end() -> None:
    pipeline = Pipeline(range(100)) >> stage(abs)
    heard = Heard()
    handle = EndTrigger(pipeline).arm(heard)
    items = pipeline.async_iter()
    await anext(items)
    await items.aclose()
    reason = await asyncio.wait_for(heard.next(), LIMIT)
    handle.disarm()
    assert [cause.code for cause in reason.causes] == ["iter_closed"]


async def test_the_end_of_a_run_whose_task_was_cancelled_is_told() -> None:
    gate = Gate()
    pipeline = Pipeline([1]) >> stage(gate.__call__)
    run = asyncio.create_task(pipeline.run())
    await gate.entered.wait()
    with Fence(EndTrigger(pipeline)) as fence:
        run.cancel()
        await forever()
    assert [cause.code for cause in fence.reasons[0].causes] == ["parent_cancelled"]
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_two_pipelines_that_watch_each_other_end_together() -> None:
    gate = Gate()
    first = Pipeline([1], name="first")
    second = Pipeline([1], name="second", cancel_on=EndTrigger(first, code="first ended")) >> stage(gate.__call__)
    first._cancel_on = (EndTrigger(second, code="second ended"),)
    waits = Gate()
    first.stage(stage(waits.__call__))
    runs = [asyncio.create_task(pipeline.run()) for pipeline in (first, second)]
    await gate.entered.wait()
    await waits.entered.wait()
    first.cancel("enough")
    results = await asyncio.wait_for(asyncio.gather(*runs), LIMIT)
    assert [[reason.code for reason in result.reasons] for result in results if isinstance(result, Err)][1] == ["first ended"]
    assert first.ending._watchers == second.ending._watchers == {}


async def test_many_runs_leave_no_watcher_behind() -> None:
    watched = Pipeline([1]) >> stage(abs)
    pipeline = Pipeline([1], cancel_on=EndTrigger(watched)) >> stage(abs)
    for _ in range(20):
        assert isinstance(await pipeline.run(), RunReport)
    assert watched.ending._watchers == {}


def test_the_end_of_an_iteration_in_another_thread_is_heard_on_the_loop() -> None:
    other = Pipeline([1, 2, 3]) >> stage(abs)

    async def main() -> Fence:
        asyncio.get_running_loop().set_debug(True)
        with Fence(EndTrigger(other)) as fence:
            thread = asyncio.create_task(asyncio.to_thread(list, other.iter()))
            await forever()
        assert await thread == [1, 2, 3]
        return fence

    assert asyncio.run(main()).reasons[0].message == "pipeline 'pipeline' completed"


async def test_ends_and_arms_in_many_threads_lose_nobody() -> None:
    for _ in range(50):
        watched, heard = Fence(), [Heard() for _ in range(3)]
        gates = [threading.Barrier(4) for _ in range(1)]

        def arm(each: Heard, barrier: threading.Barrier, fence: Fence) -> None:
            async def main() -> None:
                barrier.wait(LIMIT)
                handle = EndTrigger(fence).arm(each)
                await asyncio.wait_for(each.next(), LIMIT)
                handle.disarm()

            asyncio.run(main())

        threads = [threading.Thread(target=arm, args=(each, gates[0], watched)) for each in heard]
        for thread in threads:
            thread.start()
        with watched:
            gates[0].wait(LIMIT)
        await eventually(lambda threads=threads: not any(thread.is_alive() for thread in threads))
        assert [len(each.reasons) for each in heard] == [1, 1, 1]
        assert watched.ending._watchers == {}
