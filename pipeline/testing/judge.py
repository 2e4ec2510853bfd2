"""Whether a run under an explorer's eyes is as it should be.

The rule kept here: what is asked holds for every pipeline and every moment. It is compared with the run to which
nothing was done where there is something to compare.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

from ..errors import PipelineCancelled, PipelineFailed
from ..result import Err
from .faults import Fault
from .laws import broken_laws
from .play import CODE, Play

__all__ = ["complaints"]

_ON_TOP = 0.5
"""Seconds that a stop may take beyond the phases that it enters."""


def complaints(play: Play, plain: Play, *, compare: bool) -> list[str]:
    """Everything that is wrong with a run, in words. `plain` is the same run without a fault."""
    if play.stuck is not None:
        return [str(play.stuck)]
    found = [f"when the fault came: {law}" for law in play.seen]
    found += _raised(play, plain)
    found += _account(play)
    found += _end(play, plain)
    if play.outputs is not None and plain.outputs is not None:
        found += _outputs(play, plain, compare=compare)
    found += [f"left behind: {what}" for what in play.leaks if not _let_go(play, what)]
    if not plain.real:
        found += _same_so_far(play, plain)
    return found


def _raised(play: Play, plain: Play) -> Iterator[str]:
    """What the coroutine itself raised: how a pipeline tells of its end, a cancellation, or something of its own."""
    error = play.error
    if error is None or isinstance(error, (asyncio.CancelledError, PipelineCancelled, PipelineFailed)):
        return
    if play is plain or type(error) is not type(plain.error):
        yield f"the coroutine raised {type(error).__name__}: {error}"


def _account(play: Play) -> Iterator[str]:
    report = play.report
    if report is None:
        return
    yield from broken_laws(report)
    if report.abandoned and not _is(play, Fault.FORCE):
        yield f"abandoned: {', '.join(report.abandoned)}"
    if (report.outcome == "completed") != (not report.reasons):
        yield f"the outcome is {report.outcome!r}, and the reasons are {report.reasons}"


def _end(play: Play, plain: Play) -> Iterator[str]:
    """What the fault implies."""
    victim = play.victim
    if victim is None or not play.took_effect:
        if type(play.error) is not type(plain.error):
            yield f"nothing was done to it, and yet it ended with {play.error!r} and not with {plain.error!r}"
        return
    for rule in _RULES[victim.fault]:
        broken = rule(play, plain)
        if broken is not None:
            yield broken


def _told(play: Play, _: Play) -> str | None:
    codes = _codes(play)
    if codes is None:
        return None
    if CODE not in codes:
        return f"a cancel took effect, and its reason is not among the reasons {codes}"
    if codes[0] == CODE and play.report is not None and play.report.outcome != "cancelled":
        return f"a cancel came first, and the outcome is {play.report.outcome!r}"
    return None


def _in_time(play: Play, _: Play) -> str | None:
    grace = play.grace
    limit = grace.drain + grace.abort + grace.terminate + grace.kill
    if play.real or play.stop_took is None or play.stop_took <= limit + _ON_TOP:
        return None
    return f"the stop took {play.stop_took:g} s, and all phases together may take {limit:g} s"


def _nothing_lost(play: Play, plain: Play) -> str | None:
    report = play.report
    if report is None or _codes(play) != [CODE] or _loses(plain):
        return None
    if play.stop_took is not None and play.stop_took >= play.grace.drain:
        return None  # its time was up
    lost = {row.name: (row.cancelled, row.discarded) for row in report.stages if row.cancelled or row.discarded}
    return None if report.drained and not lost else f"a drain has lost items: drained={report.drained}, cancelled and discarded: {lost}"


def _goes_on(play: Play, _: Play) -> str | None:
    if isinstance(play.error, asyncio.CancelledError):
        return None
    return f"the cancellation of the awaiting task was swallowed: it ended with {play.error or play.result!r}"


def _unmoved(play: Play, plain: Play) -> str | None:
    if play.report is None or plain.report is None or play.report.outcome == plain.report.outcome:
        return None
    return f"to be looked at has changed its outcome to {play.report.outcome!r}"


def _noticed(play: Play, _: Play) -> str | None:
    report = play.report
    if report is None or report.outcome != "completed" or any(row.failed or row.retried or row.cancelled for row in report.stages):
        return None
    return "a handler has raised, and no item has failed"


_Rule = Callable[[Play, Play], str | None]

_RULES: dict[Fault, tuple[_Rule, ...]] = {
    Fault.LOOK: (_unmoved,),
    Fault.CANCEL: (_told, _in_time),
    Fault.DRAIN: (_told, _in_time, _nothing_lost),
    Fault.FORCE: (_told, _in_time),
    Fault.TASK: (_goes_on, _in_time),
    Fault.RAISE: (_noticed,),
    Fault.TIME: (),
}


def _codes(play: Play) -> list[str | None] | None:
    return None if play.reasons is None else [reason.code for reason in play.reasons]


def _is(play: Play, *faults: Fault) -> bool:
    return play.victim is not None and play.victim.fault in faults


def _let_go(play: Play, leak: str) -> bool:
    """Whether a kill has left a task that was still cleaning up: it has no grace for that, and the report names it."""
    names = play.report.abandoned if play.report is not None and _is(play, Fault.FORCE) else ()
    return any(leak.startswith(f"task {name!r} ") for name in names)


def _loses(plain: Play) -> bool:
    """Whether the run loses items by itself: `take`, a failure, an iteration that is left."""
    report = plain.report
    return report is None or report.outcome != "completed" or any(row.cancelled or row.discarded for row in report.stages)


def _outputs(play: Play, plain: Play, *, compare: bool) -> Iterator[str]:
    outputs = play.outputs or []
    if play.report is not None and len(outputs) != play.report.delivered:
        yield f"{len(outputs)} outputs came, and the ledger says {play.report.delivered}"
    if compare:
        known = Counter(_names(plain.outputs or []))
        if _is(play, Fault.RAISE, Fault.TIME) or _loses(plain):  # another item may take the place of one that is lost
            known |= Counter(set(_names(outputs)))
        surplus = Counter(_names(outputs)) - known
        if surplus:
            yield f"outputs that came twice, or from nowhere: {', '.join(surplus)}"


def _names(outputs: list[Any]) -> Iterator[str]:
    """Outputs as text; lists element by element, for a batch may be cut elsewhere; errors left out."""
    for output in outputs:
        if isinstance(output, list):
            yield from _names(cast("list[Any]", output))
        elif not isinstance(output, Err):
            yield repr(output)


def _same_so_far(play: Play, plain: Play) -> Iterator[str]:
    for at, (step, expected) in enumerate(zip(play.trace, plain.trace, strict=False)):
        if step != expected:
            yield f"the run is not the same each time: step {at} was {step}, and without a fault {expected}; make() must return the same"
            return
