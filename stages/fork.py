"""Every item to several handlers, and one output from all of theirs.

The rule kept here: the handlers of one item are called together, in one handler that contains them. Cohorts of
different items therefore cannot mix, and a failing branch fails its item and nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from pipeline.errors import StageConfigError
from pipeline.result import Err
from workers.base import Handler, HandlerKind, WorkerState

from .control import KillSwitch
from .definition import Stage, StageOptions

__all__ = ["forked"]


def forked(functions: Sequence[Callable[..., Any]], merge: Callable[[list[Any]], Any], options: StageOptions) -> Stage[Any, Any]:
    """A stage whose one handler calls all `functions` with the item and merges their outputs, in order."""
    if not callable(merge):
        raise StageConfigError(f"fork_merge must be a function that takes the list of outputs, not {merge!r}")
    branches = [Handler.of(function) for function in functions]
    return Stage([_Fork(branches, merge)], dataclasses.replace(options, ordered=True))


class _Fork:
    """The handler that contains the branches. An object, so that it can be pickled for processes."""

    def __init__(self, branches: Sequence[Handler], merge: Callable[[list[Any]], Any]) -> None:
        self._branches = branches
        self._merge = merge

    async def __call__(self, item: Any, state: WorkerState) -> Any:
        outputs = await self._outputs(item, state)
        for output in outputs:
            if isinstance(output, (Err, KillSwitch)):
                return output
        merged = self._merge(outputs)
        return await merged if inspect.isawaitable(merged) else merged

    async def _outputs(self, item: Any, state: WorkerState) -> list[Any]:
        """All outputs, in the handlers' order. Branches that wait, wait together; the first failure ends the others."""
        if all(branch.kind is HandlerKind.PLAIN for branch in self._branches):
            return [await _output(branch, item, state) for branch in self._branches]
        tasks = [state.start_task(_output(branch, item, state)) for branch in self._branches]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            return [task.result() for task in tasks if task.done()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _output(branch: Handler, item: Any, state: WorkerState) -> Any:
    """One branch's output; a generator branch gives the list of its outputs."""
    if branch.kind is HandlerKind.GENERATOR:
        iterator: Iterator[Any] = branch.call(item, state)
        return list(iterator)
    if branch.kind is HandlerKind.ASYNC_GENERATOR:
        outputs: AsyncIterator[Any] = branch.call(item, state)
        return [output async for output in outputs]
    result = branch.call(item, state)
    return await result if inspect.isawaitable(result) else result
