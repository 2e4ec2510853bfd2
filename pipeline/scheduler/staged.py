"""`StagedPipeline`: what a pipeline does, written as one method that submits tasks and waits for them.

The rule kept here: a pipeline is controlled from one thread, the one that executes its `run()`, and only while it does. An
instance is submitted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from threading import get_ident
from typing import Any, cast

from .claim import check_name, check_rank
from .handles import PipelineHandle, TaskHandle
from .waiting import ALL_COMPLETED, wait_for

__all__ = ["StagedPipeline", "TaskBuilder"]


class StagedPipeline:
    """Subclass it, and write `run()`. `Scheduler.run_pipeline` executes it in a thread of its own."""

    _submission: PipelineHandle | None = None

    def run(self) -> Any:
        """What the pipeline does; what it returns or raises is what its handle has in the end."""
        raise NotImplementedError(f"{type(self).__name__} has no run(): write one, it is what the pipeline does")

    def task(
        self,
        fn: Callable[..., Any],
        *,
        resources: Mapping[str, Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        start_within: float | None = None,
    ) -> TaskBuilder:
        """Describe a call of `fn(*args, **kwargs)` that needs `resources`; `.run()` of what this returns submits it.

        `name` is for snapshots. A task with a higher `priority` goes before every task with a lower one, whatever their
        stages. `timeout`: seconds that it may run, then it is asked to end (`terminate_requested`). `start_within`:
        seconds in which it must have started; else it fails with `TimeoutError`.
        """
        if not callable(fn):
            raise TypeError(f"a task is a function and what it is called with, not {fn!r}")
        if name is not None:
            check_name(name)
        if type(priority) is not int:
            check_rank(priority=priority)
        if timeout is not None or start_within is not None:
            _check_limits(timeout=timeout, start_within=start_within)
        return TaskBuilder(
            self,
            fn,
            dict(resources) if type(resources) is dict else _copy_of(resources, "resources is a mapping such as {'cpu': 1}"),
            args if type(args) is tuple else _tuple(args),
            _copy_of(kwargs, "kwargs is a mapping of names to arguments") if kwargs is not None else None,
            name,
            priority,
            timeout,
            start_within,
        )

    def stage_forward(self) -> None:
        """Tasks that are submitted from now on belong to the next stage, and go before those of this one."""
        self._control().stage += 1

    def wait(
        self, handles: Iterable[TaskHandle], timeout: float | None = None, return_when: str = ALL_COMPLETED
    ) -> tuple[set[TaskHandle], set[TaskHandle]]:
        """Wait for tasks of this pipeline; returns those that are done, and the others.

        When `timeout` seconds are over it returns what there is. What tasks have raised is not raised here.
        """
        submission = self._control()
        return wait_for(handles, TaskHandle, submission, "pipeline", timeout, return_when)

    def _control(self) -> PipelineHandle:
        submission = self._submission
        if submission is None or submission.thread is None:
            raise RuntimeError(
                f"{type(self).__name__} is not running; a pipeline is controlled from its run(), which a scheduler calls"
            )
        if submission.thread != get_ident():
            raise RuntimeError(
                f"{type(self).__name__} is controlled only from the thread that executes its run(), not from a task or "
                "another thread"
            )
        return submission


def _copy_of(given: Any, what: str) -> dict[Any, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}, not {given!r}")
    return dict(cast("Mapping[Any, Any]", given))


def _tuple(args: Any) -> tuple[Any, ...]:
    try:
        return tuple(args)
    except TypeError as error:
        raise TypeError(f"args are the arguments of the call, in a tuple, not {args!r}") from error


def _check_limits(**limits: Any) -> None:
    for option, seconds in limits.items():
        if seconds is None:
            continue
        try:
            good = isfinite(seconds) and seconds >= 0
        except (TypeError, OverflowError):
            good = False
        if not good:
            raise ValueError(f"{option} is a number of seconds, 0 or more, not {seconds!r}")


@dataclass(slots=True)  # not frozen: that would cost as much as all the rest of a submission's first half
class TaskBuilder:
    """A task that has been described. Each `run()` submits it once."""

    pipeline: StagedPipeline
    fn: Callable[..., Any]
    resources: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] | None
    name: str | None
    priority: int
    timeout: float | None
    start_within: float | None

    def run(self) -> TaskHandle:
        """Submit it, for the stage that the pipeline has reached. It starts when its turn has come.

        Raises `RuntimeError` outside of the pipeline's `run()`, `ValueError` for amounts that are none,
        `UnknownResourceError`, and `UnschedulableTaskError` for more than the scheduler has.
        """
        submission = self.pipeline._submission
        if submission is None or submission.thread != get_ident():
            submission = self.pipeline._control()  # which says what is wrong
        return submission.owner.submit_task(submission, self)
