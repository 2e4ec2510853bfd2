"""`Scheduler`: pipelines in the order of their submission, and their tasks when there is enough for them.

The rule kept here: whatever happens to a piece of work, what it held is free again in the same step in which it is over,
and whoever can start then is started in that step, too. There is no dispatcher: everybody who changes something admits.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any

from .alarms import Alarms
from .amounts import as_capacity, as_needs, check_needs, read_needs
from .claim import Claim, Group, check_name, check_rank
from .crew import Crew
from .engine import Engine
from .handles import PipelineHandle, State, TaskHandle
from .reserve import Reservation
from .share import Share
from .snapshot import SchedulerSnapshot, read_snapshot
from .staged import StagedPipeline, TaskBuilder
from .turn import Turn
from .waiting import ALL_COMPLETED, wait_for

if TYPE_CHECKING:
    from pipeline.runtime import PipelineRuntime

__all__ = ["Scheduler"]


class Scheduler:
    """Admits work by the resources that it says it needs. They are names and numbers, nothing that is measured.

    `resources`: how much there is, such as `{"cpu": 8, "mem_gb": 31.5}`. `pipeline_parallelism`: staged pipelines that may
    run at once. `task_parallelism`: tasks that may be admitted at once, each in a thread; 1 if it is None.
    `fairness`: how often a pipeline whose work waits may be passed over by others, in admissions; None is no bound:
    what is further along always goes first.

    Threads start when they are needed. Leaving the `with` block closes it. `reserve` and `Pipeline(scheduler=...)`
    use the same resources from event loops, any number of them.
    """

    def __init__(
        self,
        *,
        resources: Mapping[str, Any] | None = None,
        pipeline_parallelism: int = 1,
        task_parallelism: int | None = None,
        fairness: int | None = None,
        name: str = "scheduler",
    ) -> None:
        check_name(name)
        self.name = name
        self.pipeline_parallelism = _positive(pipeline_parallelism, "pipeline_parallelism")
        self.task_parallelism = _positive(1 if task_parallelism is None else task_parallelism, "task_parallelism")
        fair = None if fairness is None else _positive(fairness, "fairness")
        self.turn = turn = Turn()
        self.engine = Engine(as_capacity(resources), self.task_parallelism, fair)
        self.workers = Crew(f"{name}-worker", self.task_parallelism, turn)
        self.alarms = Alarms(f"{name}-alarms")
        self.totals: Counter[str] = Counter()
        """How many "succeeded tasks", "cancelled pipelines" and so on there have been."""
        self._coordinators = Crew(f"{name}-coordinator", self.pipeline_parallelism, turn)
        self._numbers = count(1)
        self._queued: dict[PipelineHandle, None] = {}
        self._running: dict[PipelineHandle, None] = {}
        self._shares: dict[PipelineRuntime, Share] = {}
        self._tasks = 0
        """Those that are not over."""
        self._shut = False
        self._closing = False
        self._all_over = threading.Event()
        self._closed = False

    # --- pipelines

    def run_pipeline(self, pipeline: StagedPipeline, *, name: str | None = None, priority: int = 0) -> PipelineHandle:
        """Submit a pipeline. It starts when those before it have, and one of the coordinators is free.

        `name` is for snapshots. `priority` is that of its tasks: higher goes first. Raises `TypeError` for anything but a
        `StagedPipeline`, and `RuntimeError` after a shutdown or for an instance that was submitted before.
        """
        if not isinstance(pipeline, StagedPipeline):
            raise TypeError(f"only an instance of a StagedPipeline can be run, not {pipeline!r}")
        check_name(name)
        check_rank(priority=priority)
        turn = self.turn
        with turn, turn.lock:
            self._refuse_shut()
            self._coordinators.hire()
            number = next(self._numbers)
            group = Group(number, name or f"{type(pipeline).__name__}-{number}", priority)
            handle = PipelineHandle(self, pipeline, group, monotonic())
            if vars(pipeline).setdefault("_submission", handle) is not handle:  # atomic: another scheduler may have it
                raise RuntimeError(f"this {type(pipeline).__name__} was submitted before; make a new one for every run")
            self._coordinators.put(handle)
            self._queued[handle] = None  # now it counts; a Ctrl-C before this line has submitted nothing
        return handle

    def wait_pipelines(
        self, handles: Iterable[PipelineHandle], timeout: float | None = None, return_when: str = ALL_COMPLETED
    ) -> tuple[set[PipelineHandle], set[PipelineHandle]]:
        """Wait for pipelines of this scheduler; returns those that are done, and the others.

        When `timeout` seconds are over it returns what there is. What pipelines have raised is not raised here.
        """
        return wait_for(handles, PipelineHandle, self, "scheduler", timeout, return_when)

    # --- work in event loops

    def reserve(
        self,
        resources: Mapping[str, Any] | None = None,
        /,
        *,
        name: str | None = None,
        priority: int = 0,
        stage: int = 0,
        timeout: float | None = None,
        **amounts: Any,
    ) -> Reservation:
        """`async with scheduler.reserve(cpu=2):` waits until that is free, and holds it for the block.

        In the queue it is one with tasks and items of pipelines: `priority`, then `stage`, then who came first. `timeout`:
        seconds of waiting, then `TimeoutError`. Resources whose names are none go into a mapping. Every `async with`
        needs a reservation of its own.
        """
        needs = as_needs(_merged(resources, amounts))
        check_name(name)
        check_rank(priority=priority, stage=stage)
        title = name or "a reservation"
        return Reservation(self, check_needs(needs, self.engine.capacity, title), title, priority, stage, timeout)

    def share_of(self, runtime: PipelineRuntime) -> Share:
        """A streaming run's part in this scheduler."""
        share = self._shares.get(runtime)
        if share is None:
            share = self._shares[runtime] = Share(self, runtime, self.new_group(runtime.name))
        return share

    def end_share(self, runtime: PipelineRuntime) -> None:
        """The run is over."""
        self._shares.pop(runtime, None)

    # --- what those who need something do

    def new_group(self, name: str, priority: int = 0) -> Group:
        return Group(next(self._numbers), name, priority)

    def next_number(self) -> int:
        """One for each piece of work, in the order of their submission."""
        return next(self._numbers)

    def enter(self, claim: Claim) -> None:
        """Somebody asks for resources, and will be told that they are granted, perhaps at once. While it is locked."""
        if self.engine.submit(claim):
            claim.granted()
            self._admit()

    def give_back(self, claim: Claim) -> None:
        """A claim is over, whether it was granted or not. Any thread, any moment; never waits; once is enough."""
        self.turn.leave(partial(self._drop, claim))

    def why(self, claim: Claim) -> str:
        """Why a claim waits. While the scheduler is locked."""
        return self.engine.why(claim)

    def refuse_closed(self) -> None:
        if self._shut:
            self._refuse_shut()

    def _drop(self, claim: Claim) -> None:
        engine = self.engine
        if engine.drop(claim) and engine.queue.live:
            self._admit()

    def _admit(self) -> None:
        self._begin_all(self.engine.admit())

    def _begin_all(self, claims: list[Claim]) -> None:
        for claim in claims:
            claim.at = monotonic()
            claim.granted()

    def submit_task(self, submission: PipelineHandle, task: TaskBuilder) -> TaskHandle:
        """For `TaskBuilder.run`, which knows that the pipeline is running."""
        needs = read_needs(task.resources, self.engine.capacity, task.name)
        turn, limited = self.turn, task.timeout is not None or task.start_within is not None
        if limited or not self.workers.threads:
            with turn, turn.lock:
                self.workers.hire()
                if limited:
                    self.alarms.hire()
        handle = TaskHandle(submission, task, needs, next(self._numbers))
        # In a coordinator's thread nothing is raised in between, so the lock may be taken by hand, and only if it is free.
        if turn.lock.acquire(False):
            try:
                if turn.left:
                    turn.clear()  # what was left earlier is earlier
                self._begin_task(handle, task.start_within)
            finally:
                turn.lock.release()
            if turn.left or turn.after:
                turn.catch_up()
        else:
            turn.leave(partial(self._begin_task, handle, task.start_within))
        return handle

    def _begin_task(self, handle: TaskHandle, start_within: float | None) -> None:
        self._tasks += 1
        self.totals["submitted tasks"] += 1
        engine = self.engine
        if engine.submit(handle):
            handle.granted()
            if engine.queue.fairness is not None:
                self._admit()
        elif start_within is not None:
            handle.expire_within(start_within)

    def task_ended(self, task: TaskHandle, state: State) -> None:
        self.totals[_TASKS[state]] += 1
        engine = self.engine
        if engine.queue.live:
            self._begin_all(engine.hand_over(task))
        else:
            engine.drop(task)
        self._tasks -= 1
        if self._closing:
            self._end_if_over()

    def pipeline_begins(self, handle: PipelineHandle) -> bool:
        """False when it is not to."""
        if handle not in self._queued:
            return False
        self._running[handle] = None
        del self._queued[handle]
        return True

    def pipeline_ended(self, handle: PipelineHandle, state: State) -> None:
        self._queued.pop(handle, None)
        self._running.pop(handle, None)
        self.totals[_PIPELINES[state]] += 1
        if self._closing:
            self._end_if_over()

    # --- the end

    def shutdown(self, cancel_pending_pipelines: bool = False) -> None:
        """Take no more pipelines; with `cancel_pending_pipelines`, cancel those that have not started. Does not wait.

        What runs goes on, and may submit tasks. May be called again, to cancel what the first call has left.
        """
        turn = self.turn
        with turn, turn.lock:
            self._shut = True
            queued = list(self._queued) if cancel_pending_pipelines else []
            kept = [handle.pipeline for handle in queued]
            for handle in queued:
                handle.call_off()
        del kept  # what goes with them may do anything, so not while the scheduler is locked

    def close(self, cancel_pending_pipelines: bool = False) -> None:
        """Shut down, wait until every pipeline and task has ended, and end the threads. May be called again.

        Reservations and items of streaming pipelines are their holders' own; nobody waits for them here. Raises
        `RuntimeError` in a pipeline or a task of this scheduler, which would wait for itself.
        """
        if threading.current_thread() in self._threads():
            raise RuntimeError("close() waits for every pipeline and task, so it cannot be called from one; use shutdown()")
        self.shutdown(cancel_pending_pipelines)
        turn = self.turn
        with turn, turn.lock:
            self._closing = True
            self._end_if_over()
        self._all_over.wait()  # as long as the work takes; whoever cannot wait calls shutdown()
        for thread in self._threads():
            thread.join()
        self._closed = True

    def shutdown_started(self) -> bool:
        """Whether no more pipelines are taken."""
        return self._shut

    def closed(self) -> bool:
        """Whether everything has ended, threads included."""
        return self._closed

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_if_over(self) -> None:
        if self._tasks or self._queued or self._running:
            return
        self._coordinators.dismiss()
        self.workers.dismiss()
        self.alarms.close()
        self._all_over.set()

    def _threads(self) -> list[threading.Thread]:
        alarms = [self.alarms.thread] if self.alarms.thread is not None else []
        return [*self._coordinators.threads, *self.workers.threads, *alarms]

    def _refuse_shut(self) -> None:
        if self._shut:
            raise RuntimeError(f"the scheduler {self.name!r} is shutting down and takes nothing new")

    # --- watching

    def snapshot(self, most: int = 1000) -> SchedulerSnapshot:
        """What runs, what is about to, and what waits for what: at one moment, from any thread.

        At most `most` of those that wait are described, the next ones first; all are counted. What it costs depends on
        what holds and what is described, not on how much waits.
        """
        return read_snapshot(self, most)

    @property
    def pipelines(self) -> tuple[PipelineHandle, ...]:
        """Those that run, then those that wait. While the scheduler is locked."""
        return (*self._running, *self._queued)

    def __repr__(self) -> str:
        return f"<Scheduler {self.name!r}: {dict(self.engine.capacity)}>"


_TASKS = [f"{state.name.lower()} tasks" for state in State]
_PIPELINES = [f"{state.name.lower()} pipelines" for state in State]
"""By state: their place in the totals. Lists, for the hash of an enum is computed in Python."""


def _merged(resources: Any, amounts: Mapping[str, Any]) -> Any:
    """What is given by name, beside what a mapping has."""
    if not amounts or not isinstance(resources, Mapping):
        return amounts if resources is None else resources
    both = resources.keys() & amounts.keys()
    if both:
        raise ValueError(f"the need of {', '.join(map(repr, sorted(both)))} is given twice, in the mapping and by name")
    return {**resources, **amounts}


def _positive(value: Any, option: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{option} is a whole number, 1 or more, not {value!r}")
    return value
