"""Signals: who hears them, what is put back, and that none is lost at any line where one may arrive."""

from __future__ import annotations

import asyncio
import linecache
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from types import FrameType, ModuleType
from typing import Any

import pytest
import uvloop
from helpers import LIMIT, Heard, assert_balanced, eventually, turns, until

from pipeline import Grace, Pipeline, PipelineCancelled, assembly, bridge, host, iteration, run, runtime, shutdown
from pipeline import pipeline as definition
from pipeline.cancellation import CancelReason, CancelType, SignalTrigger, TriggerHandle, signals
from stages import stage

USR1, USR2 = signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture
def handler() -> Iterator[Callable[..., None]]:
    """A handler of the program's own for SIGUSR1 and SIGUSR2, which must be in place again at the end."""

    def own(_signum: int, _frame: object) -> None:
        pass

    before = {signum: signal.signal(signum, own) for signum in (USR1, USR2)}
    yield own
    assert signals._SignalHub._hubs == {}
    assert signals._Waker._wakers == {}
    found = [signal.signal(signum, previous) for signum, previous in before.items()]
    assert found == [own, own]


# --- arriving and disarming


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_signal_calls_back_at_every_arrival_and_the_reasons_tell_them_apart() -> None:
    heard = Heard()
    trigger = SignalTrigger(USR1, USR2, code="stop")
    handle = trigger.arm(heard)
    for signum in (USR1, USR1, USR2):
        signal.raise_signal(signum)
        await heard.next()
    handle.disarm()
    assert [reason.message for reason in heard.reasons] == [
        "received SIGUSR1",
        "received SIGUSR1 (signal number 2 since armed)",
        "received SIGUSR2 (signal number 3 since armed)",
    ]
    assert {(reason.cancel_type, reason.code) for reason in heard.reasons} == {(CancelType.SIGNAL, "stop")}
    assert trigger.check() is None


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_signal_wakes_a_loop_that_sleeps() -> None:
    heard = Heard()
    handle = SignalTrigger(USR1).arm(heard)
    killer = threading.Thread(target=os.kill, args=(os.getpid(), USR1))
    asyncio.get_running_loop().call_soon(killer.start)
    await heard.next()
    killer.join()
    handle.disarm()


@pytest.mark.asyncio
async def test_all_triggers_on_one_signal_fire_and_the_last_to_disarm_restores(handler: Callable[..., None]) -> None:
    first, second = Heard(), Heard()
    one, two = SignalTrigger(USR1).arm(first), SignalTrigger(USR1, USR2).arm(second)
    signal.raise_signal(USR1)
    await first.next()
    await second.next()

    one.disarm()
    assert signal.getsignal(USR1) is not handler
    signal.raise_signal(USR1)
    await second.next()

    two.disarm()
    two.disarm()
    assert signal.getsignal(USR1) is handler
    assert (len(first.reasons), len(second.reasons)) == (1, 2)


@pytest.mark.asyncio
async def test_each_arming_counts_its_own_arrivals(handler: Callable[..., None]) -> None:
    trigger, early, late = SignalTrigger(USR1), Heard(), Heard()
    one = trigger.arm(early)
    signal.raise_signal(USR1)
    await early.next()
    two = trigger.arm(late)
    signal.raise_signal(USR1)
    await late.next()
    one.disarm()
    two.disarm()
    assert late.reasons == [early.reasons[0]]


@pytest.mark.asyncio
async def test_ctrl_c_is_a_keyboard_interrupt_again_after_the_disarm() -> None:
    before, heard = signal.getsignal(signal.SIGINT), Heard()
    handle = SignalTrigger(signal.SIGINT).arm(heard)
    signal.raise_signal(signal.SIGINT)
    await heard.next()
    handle.disarm()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_listener_may_disarm_another_that_is_then_not_called() -> None:
    second = Heard()

    def disarm_second(_reason: CancelReason) -> None:
        two.disarm()
        told.set()

    told = asyncio.Event()
    one = SignalTrigger(USR1).arm(disarm_second)
    two = SignalTrigger(USR1).arm(second)
    signal.raise_signal(USR1)
    await told.wait()
    await turns()
    one.disarm()
    assert second.reasons == []


@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_signal_that_came_before_the_disarm_is_not_reported_after_it() -> None:
    heard = Heard()
    handle = SignalTrigger(USR1).arm(heard)
    signal.raise_signal(USR1)
    handle.disarm()
    await turns(5)
    assert heard.reasons == []


@pytest.mark.abandons("complaint")
@pytest.mark.asyncio
@pytest.mark.usefixtures("handler")
async def test_a_listener_that_raises_is_reported_and_keeps_the_signal_from_nobody() -> None:
    def fail(_reason: CancelReason) -> None:
        raise ValueError("boom")

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
    heard = Heard()
    one, two = SignalTrigger(USR1).arm(fail), SignalTrigger(USR1).arm(heard)
    signal.raise_signal(USR1)
    await heard.next()
    one.disarm()
    two.disarm()
    assert [str(context["exception"]) for context in reported] == ["boom"]


@pytest.mark.asyncio
async def test_the_loops_own_signal_handler_is_called_beside_ours_and_survives_it(handler: Callable[..., None]) -> None:
    loop, own, heard = asyncio.get_running_loop(), asyncio.Event(), Heard()
    loop.add_signal_handler(USR1, own.set)
    handle = SignalTrigger(USR1).arm(heard)
    signal.raise_signal(USR1)
    await heard.next()
    await own.wait()

    handle.disarm()
    own.clear()
    signal.raise_signal(USR1)
    await own.wait()
    assert len(heard.reasons) == 1
    loop.remove_signal_handler(USR1)
    signal.signal(USR1, handler)


@pytest.mark.asyncio
async def test_a_handler_put_over_ours_stays(handler: Callable[..., None]) -> None:
    def theirs(_signum: int, _frame: object) -> None:
        pass

    handle = SignalTrigger(USR1).arm(lambda reason: None)
    signal.signal(USR1, theirs)
    handle.disarm()
    assert signal.signal(USR1, handler) is theirs


class WithoutReaders(asyncio.SelectorEventLoop):
    """A loop like those of other systems."""

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
        raise NotImplementedError

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        raise NotImplementedError


def test_signals_arrive_where_the_loop_can_do_nothing_for_them(handler: Callable[..., None]) -> None:
    async def main() -> None:
        heard = Heard()
        handle = SignalTrigger(USR1, USR2).arm(heard)
        for signum in (USR1, USR2):
            killer = threading.Thread(target=os.kill, args=(os.getpid(), signum))
            asyncio.get_running_loop().call_soon(killer.start)
            await heard.next()
            killer.join()
        handle.disarm()
        assert len(heard.reasons) == 2
        assert signal.getsignal(USR1) is handler

    with asyncio.Runner(loop_factory=WithoutReaders) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop_factory", [asyncio.SelectorEventLoop, WithoutReaders])
@pytest.mark.usefixtures("handler")
def test_a_handle_may_outlive_its_loop_and_still_restores(loop_factory: Callable[[], Any]) -> None:
    async def main() -> TriggerHandle:
        return SignalTrigger(USR1).arm(lambda reason: None)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        handle = runner.run(main())
    signal.raise_signal(USR1)  # nobody is there to hear it, and nothing is raised
    handle.disarm()


@pytest.mark.asyncio
async def test_when_one_of_the_signals_cannot_be_had_the_others_are_given_back(
    handler: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = signal.signal

    def choosy(signum: int, to: Any) -> Any:
        if signum == USR2:
            raise OSError("not this one")
        return original(signum, to)

    monkeypatch.setattr(signal, "signal", choosy)
    with pytest.raises(OSError, match="not this one"):
        SignalTrigger(USR1, USR2).arm(lambda reason: None)
    monkeypatch.undo()
    assert signal.getsignal(USR1) is handler


@pytest.mark.asyncio
async def test_arming_a_signal_outside_the_main_thread_is_an_error_that_says_what_to_do() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"main thread.*EventTrigger"):
            SignalTrigger(USR1).arm(lambda reason: None)

    await asyncio.to_thread(asyncio.run, main())


# --- at any line


class AtLine:
    """Does something just before the nth line of some modules runs, and knows whether it came to that."""

    def __init__(self, nth: int, action: Callable[[], object], *modules: ModuleType) -> None:
        self.reached = False
        self._files = {module.__file__ for module in modules or (signals,)}
        self._left = nth
        self._action = action

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        # Python handles no signal between the body of a `with` and its `__exit__`; a trace function is called there.
        if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            self._left -= 1
            if self._left == 0:
                self.reached = True
                self._action()
        return self._line


def raise_usr1() -> None:
    signal.raise_signal(USR1)


@pytest.fixture
def counted(handler: Callable[..., None]) -> Iterator[list[int]]:
    """What the program's own handler was told."""
    heard: list[int] = []

    def own(signum: int, _frame: object) -> None:
        heard.append(signum)

    for signum in (USR1, USR2):
        signal.signal(signum, own)
    yield heard
    assert [signal.getsignal(signum) for signum in (USR1, USR2)] == [own, own]
    for signum in (USR1, USR2):
        signal.signal(signum, handler)


async def test_a_signal_at_any_line_of_arming_and_disarming_is_heard_once_and_ends_nothing(counted: list[int]) -> None:
    for nth in count(1):
        counted.clear()
        heard: list[CancelReason] = []
        with AtLine(nth, raise_usr1) as at_line:
            handle = SignalTrigger(USR2, USR1).listen(heard.append)
            handle.disarm()
        if not at_line.reached:
            break
        assert len(heard) + len(counted) == 1, nth
        assert signals._SignalHub._hubs == {}
        signal.raise_signal(USR1)
        assert len(heard) + len(counted) == 2, nth
    assert nth > 20


async def test_a_signal_at_any_line_reaches_a_trigger_that_stays_armed(counted: list[int]) -> None:
    for nth in count(1):
        counted.clear()
        stays, goes = list[CancelReason](), list[CancelReason]()
        first = SignalTrigger(USR1).listen(stays.append)
        with AtLine(nth, raise_usr1) as at_line:
            SignalTrigger(USR1).listen(goes.append).disarm()
        signal.raise_signal(USR1)
        assert (len(stays), counted) == (1 + at_line.reached, []), nth
        first.disarm()
        if not at_line.reached:
            break
    assert nth > 20


def test_a_thread_that_begins_to_listen_at_any_line_of_a_disarm_hears_or_is_refused(counted: list[int]) -> None:
    refused = listened = 0
    for nth in count(1):
        counted.clear()
        heard: list[CancelReason] = []
        results: list[Any] = []

        def listen() -> None:
            try:
                results.append(SignalTrigger(USR1).listen(heard.append))  # noqa: B023
            except RuntimeError as error:
                results.append(error)  # noqa: B023

        def in_a_thread() -> None:
            thread = threading.Thread(target=listen)
            thread.start()
            thread.join()

        holding = SignalTrigger(USR1).hold()
        with AtLine(nth, in_a_thread) as at_line:
            holding.disarm()
        if not at_line.reached:
            break
        signal.raise_signal(USR1)
        if isinstance(results[0], RuntimeError):
            refused += 1
            assert (heard, counted) == ([], [USR1])
        else:
            listened += 1
            assert (len(heard), counted) == (1, [])
            results[0].disarm()
    assert refused
    assert listened


async def pass_on(item: int) -> int:
    await asyncio.sleep(0)
    return item


RUN = (run, runtime, shutdown, assembly, definition, signals)
ITERATION = (iteration, bridge, host, definition, run, signals)
STRIDE = 3
"""Of the lines of a run every so many are tried."""


def told(pipeline: Pipeline[Any]) -> int:
    """How often the run was told of a signal."""
    if pipeline.report is None:
        return 0
    assert_balanced(pipeline.report)
    return len(pipeline.report.reasons)


@pytest.mark.parametrize("drain", [False, True])
def test_a_signal_at_any_line_of_a_run_stops_it_or_goes_to_the_program(counted: list[int], drain: bool) -> None:
    async def main(pipeline: Pipeline[int], nth: int) -> bool:
        with AtLine(nth, raise_usr1, *RUN) as at_line:
            await asyncio.wait_for(pipeline.run(), LIMIT)
        return at_line.reached

    for nth in count(1, STRIDE):
        counted.clear()
        pipeline = Pipeline([1, 2], cancel_on=SignalTrigger(USR1, drain=drain)) >> stage(concurrency=2)(pass_on) >> stage(abs)
        if not asyncio.run(main(pipeline, nth)):
            break
        assert told(pipeline) + len(counted) == 1, nth
        assert signals._SignalHub._hubs == {}
    assert nth > 300


def test_a_run_that_ends_in_another_thread_at_any_line_of_a_request_to_stop_tells_it_or_refuses_it() -> None:
    answers: list[bool] = []
    for nth in count(1):
        ending = runtime.PipelineRuntime("run", Grace())
        request = runtime.StopRequest(CancelReason("late", CancelType.MANUAL), runtime.StopLevel.ABORT)
        with AtLine(nth, ending.conclude, runtime) as at_line:
            answers.append(ending.request_stop(request))
        if not at_line.reached:
            break
        assert answers[-1] is (request in ending.requests) is (request.reason in ending.reasons) is (ending.reason == "late")
        assert ending.cancelled is answers[-1]
    assert answers[0] is False
    assert answers[-1] is True
    assert answers == sorted(answers)


@pytest.mark.parametrize("drain", [False, True])
def test_a_cancel_from_another_thread_at_any_line_of_a_run_is_told_or_refused(drain: bool) -> None:
    answers: list[bool] = []

    async def main(pipeline: Pipeline[int], nth: int) -> bool:
        def cancel() -> None:
            thread = threading.Thread(target=lambda: answers.append(bool(pipeline.cancel("late", drain=drain))))
            thread.start()
            thread.join()

        with AtLine(nth, cancel, run, runtime) as at_line:
            await asyncio.wait_for(pipeline.run(), LIMIT)
        return at_line.reached

    for nth in count(1, STRIDE):
        pipeline = Pipeline([1, 2]) >> stage(concurrency=2)(pass_on)
        if not asyncio.run(main(pipeline, nth)):
            break
        assert told(pipeline) == answers[-1], nth
    assert set(answers) == {True, False}


def test_a_signal_at_any_line_of_an_iteration_stops_it_or_goes_to_the_program(counted: list[int]) -> None:
    for nth in count(1, STRIDE):
        counted.clear()
        pipeline = Pipeline([1, 2, 3], cancel_on=SignalTrigger(USR1, drain=True)) >> stage(concurrency=2)(pass_on)
        with AtLine(nth, raise_usr1, *ITERATION) as at_line, suppress(PipelineCancelled):
            list(pipeline.iter(max_buffer=1))
        if not at_line.reached:
            break
        assert told(pipeline) + len(counted) == 1, nth
        assert signals._SignalHub._hubs == {}
    assert nth > 100


def test_ctrl_c_at_any_line_where_outputs_change_hands_leaves_the_ledger_whole() -> None:
    for nth in count(1):
        pipeline = Pipeline(list(range(5))) >> stage(concurrency=2)(pass_on)
        items = pipeline.iter(max_buffer=2)
        interrupted = False
        try:
            next(items)
            with AtLine(nth, lambda: signal.raise_signal(signal.SIGINT), bridge) as at_line:
                next(items)
                next(items)
                next(items)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            items.close()
        assert interrupted is at_line.reached
        assert told(pipeline) == 1
        if not at_line.reached:
            break
    assert nth > 20


def test_whoever_waits_for_the_cancel_event_is_woken_at_whatever_line_of_his_wait_the_signal_comes(counted: list[int]) -> None:
    async def main(nth: int) -> bool:
        pipeline = Pipeline([1], cancel_on=SignalTrigger(USR1)) >> stage(lambda item: asyncio.Event().wait())
        stopping = asyncio.create_task(pipeline.run())
        await eventually(lambda: pipeline.runtime.tasks)
        with AtLine(nth, raise_usr1, asyncio.locks) as at_line:
            waiting = asyncio.create_task(pipeline.runtime.cancel_event.wait())
            await asyncio.sleep(0)
        if not at_line.reached:
            pipeline.cancel()
        await asyncio.wait_for(waiting, LIMIT)
        await stopping
        return at_line.reached

    for nth in count(1):
        if not asyncio.run(main(nth)):
            break
    assert nth > 3


# --- loops that sleep, and that end


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.usefixtures("handler")
def test_a_signal_that_another_thread_gets_wakes_the_loop(factory: Callable[[], Any]) -> None:
    # As does one that arrives just before the loop goes to sleep: no system call of the main thread is interrupted.
    async def main() -> None:
        heard = Heard()
        handle = SignalTrigger(USR1).arm(heard)
        killer = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), USR1))
        asyncio.get_running_loop().call_soon(killer.start)
        await asyncio.wait_for(heard.next(), LIMIT)
        killer.join()
        handle.disarm()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.usefixtures("handler")
def test_the_loops_own_handlers_for_other_signals_are_woken_while_ours_come_and_go(factory: Callable[[], Any]) -> None:
    async def main() -> None:
        loop, own = asyncio.get_running_loop(), asyncio.Event()
        early = SignalTrigger(USR1).arm(lambda reason: None)
        loop.add_signal_handler(USR2, own.set)
        SignalTrigger(USR1).arm(lambda reason: None).disarm()
        early.disarm()
        killer = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), USR2))
        loop.call_soon(killer.start)
        await asyncio.wait_for(own.wait(), LIMIT)
        killer.join()
        loop.remove_signal_handler(USR2)

    before = signal.getsignal(USR2)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
    signal.signal(USR2, before)


@pytest.mark.usefixtures("handler")
def test_the_wake_up_descriptor_of_the_program_is_put_back() -> None:
    async def main() -> None:
        SignalTrigger(USR1).arm(lambda reason: None).disarm()

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    asyncio.run(main())
    assert signal.set_wakeup_fd(before) == writing
    os.close(reading)
    os.close(writing)


def test_a_signal_between_two_loops_of_one_trigger_ends_nothing(handler: Callable[..., None]) -> None:
    async def arm() -> TriggerHandle:
        return SignalTrigger(USR1).arm(lambda reason: None)

    handles = [asyncio.run(arm())]
    signal.raise_signal(USR1)
    handles.append(asyncio.run(arm()))
    signal.raise_signal(USR1)
    for handle in handles:
        handle.disarm()
    assert signal.getsignal(USR1) is handler


def test_a_handler_that_ignores_is_put_back(handler: Callable[..., None]) -> None:
    signal.signal(USR1, signal.SIG_IGN)
    SignalTrigger(USR1).hold().disarm()
    assert signal.signal(USR1, handler) is signal.SIG_IGN


# --- held for other threads


@pytest.mark.usefixtures("handler")
async def test_a_held_signal_can_be_armed_in_another_thread() -> None:
    async def main() -> None:
        heard = Heard()
        handle = SignalTrigger(USR1).arm(heard)
        armed.set()
        await asyncio.wait_for(heard.next(), LIMIT)
        handle.disarm()

    armed = threading.Event()
    holding = SignalTrigger(USR1).hold()
    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, main()))
    while not armed.is_set():
        await asyncio.sleep(0)
    signal.raise_signal(USR1)
    await thread
    holding.disarm()


def test_a_hold_let_go_in_another_thread_gives_the_next_signal_to_who_was_there_before(counted: list[int]) -> None:
    holding = SignalTrigger(USR1).hold()
    thread = threading.Thread(target=holding.disarm)
    thread.start()
    thread.join()
    signal.raise_signal(USR1)
    assert counted == [USR1]


def test_two_runs_in_two_threads_hear_one_held_trigger(counted: list[int]) -> None:
    trigger = SignalTrigger(USR1, code="stop")
    results: list[Any] = []

    async def main(entered: threading.Event) -> None:
        async def work(item: int) -> None:
            entered.set()
            await asyncio.Event().wait()

        results.append(await (Pipeline([1, 2], cancel_on=trigger) >> stage(work)).run())

    holding = trigger.hold()
    entered = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=lambda event=event: asyncio.run(main(event))) for event in entered]
    for thread in threads:
        thread.start()
    until(lambda: all(event.is_set() for event in entered))
    signal.raise_signal(USR1)
    for thread in threads:
        thread.join(LIMIT)
    holding.disarm()
    assert [result.reasons[0].code for result in results] == ["stop", "stop"]
    signal.raise_signal(USR1)
    assert counted == [USR1]


# --- what a trigger is made of


def test_no_signals_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least one signal"):
        SignalTrigger()


@pytest.mark.parametrize("signum", ["SIGTERM", None, True])
def test_something_that_is_no_signal_is_a_type_error(signum: Any) -> None:
    with pytest.raises(TypeError, match=r"signal\.SIGTERM"):
        SignalTrigger(signum)


@pytest.mark.parametrize(("signum", "advice"), [(0, "signal.Signals"), (signal.SIGKILL, "use SIGTERM or SIGINT")])
def test_a_signal_that_cannot_be_caught_is_a_value_error(signum: int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        SignalTrigger(signum)


def test_a_signal_trigger_shows_how_it_was_made() -> None:
    trigger = SignalTrigger(USR1, USR1, USR2, code="stop", drain=True)
    assert trigger.signals == (USR1, USR2)
    assert trigger.drain
    assert repr(trigger) == "SignalTrigger(SIGUSR1, SIGUSR2, code='stop', drain=True)"
