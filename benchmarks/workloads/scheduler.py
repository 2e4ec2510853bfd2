"""Staged pipelines under a scheduler: tasks that do nothing, with resources.

`waves` is how stagegate's guide says that a pipeline is written ("The Core Mental Model"): a wave of tasks, a wait, the next
stage. `pairs` is the example of its README: two tasks, a wait, one that combines them. It ships no benchmark of its own.
`stream` is the second of its use cases: results are taken as they come. `wide` and `chain` are the two ends: a thousand tasks
that nothing holds up but the workers, and tasks that each wait for the one before, where threads change places twice a task.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED
from functools import partial
from typing import Any

from ..measure import Tally, Timed
from ..model import Bar, Workload

__all__ = ["WORKLOADS"]

_STAGES, _WIDTH, _MANY = 3, 20, 1000


def _ours() -> tuple[type[Any], type[Any]]:
    from pipeline.scheduler import Scheduler, StagedPipeline

    return Scheduler, StagedPipeline


def _stagegate() -> tuple[type[Any], type[Any]]:
    import stagegate

    return stagegate.Scheduler, stagegate.Pipeline


def _one(value: int = 1) -> int:
    return value


def _sum(*values: int) -> int:
    return sum(values)


def _waves(pipeline: Any) -> int:
    total = 0
    for _ in range(_STAGES):
        handles = [pipeline.task(_one, resources={"cpu": 1, "mem": 2}).run() for _ in range(_WIDTH)]
        pipeline.wait(handles)
        total += sum(handle.result() for handle in handles)
        pipeline.stage_forward()
    return total


def _pairs(pipeline: Any) -> int:
    first = pipeline.task(_one, resources={"cpu": 1}).run()
    second = pipeline.task(_one, resources={"cpu": 1}).run()
    pipeline.wait([first, second])
    values = first.result(), second.result()
    pipeline.stage_forward()
    return pipeline.task(_sum, resources={"cpu": 4, "mem": 16}, args=(*values, 1)).run().result()


def _stream(pipeline: Any) -> int:
    pending = {pipeline.task(_one, resources={"cpu": 2}).run() for _ in range(_WIDTH)}
    total = 0
    while pending:
        done, pending = pipeline.wait(pending, return_when=FIRST_COMPLETED)  # the same text in both libraries
        total += sum(handle.result() for handle in done)
    return total


def _wide(pipeline: Any) -> int:
    handles = [pipeline.task(_one, resources={"cpu": 1}).run() for _ in range(_MANY)]
    pipeline.wait(handles)
    return sum(handle.result() for handle in handles)


def _chain(pipeline: Any) -> int:
    total = 0
    for _ in range(_WIDTH):
        total += pipeline.task(_one, resources={"cpu": 1}).run().result()
        pipeline.stage_forward()
    return total


def _run(library: Any, body: Any, tasks: int, n: int) -> Tally:
    scheduler_type, pipeline_type = library()
    kind = type("Measured", (pipeline_type,), {"run": body})
    with scheduler_type(resources={"cpu": 8, "mem": 32}, pipeline_parallelism=2, task_parallelism=4) as scheduler:
        handles = [scheduler.run_pipeline(kind()) for _ in range(n // tasks)]
        total = sum(handle.result() for handle in handles)
    return Tally(total)


def _cells(body: Any, tasks: int, base: int = 4) -> dict[str, Timed]:
    return {
        name: Timed(run=partial(_run, library, body, tasks), expected=Tally, base=base * tasks, step=tasks, seconds=0.2)
        for name, library in {"penstock": _ours, "stagegate": _stagegate}.items()
    }


WORKLOADS = [
    Workload(
        name="scheduler-waves",
        title="staged pipelines: three waves of 20 tasks, cpu and memory, 4 workers",
        cells=_cells(_waves, _STAGES * _WIDTH),
        bars=(Bar(against="stagegate", required=5.0),),
        loop=False,
    ),
    Workload(
        name="scheduler-pairs",
        title="staged pipelines: two tasks, a wait, one that combines them, 4 workers",
        cells=_cells(_pairs, 3),
        bars=(Bar(against="stagegate", required=5.0),),
        loop=False,
    ),
    Workload(
        name="scheduler-stream",
        title="staged pipelines: 20 tasks, results as they come, 4 workers",
        cells=_cells(_stream, _WIDTH),
        loop=False,
    ),
    Workload(
        name="scheduler-wide",
        title="staged pipelines: 1,000 tasks at once, 4 workers",
        cells=_cells(_wide, _MANY, base=1),
        loop=False,
    ),
    Workload(
        name="scheduler-chain",
        title="staged pipelines: 20 tasks one after the other, 4 workers",
        cells=_cells(_chain, _WIDTH),
        loop=False,
    ),
]
