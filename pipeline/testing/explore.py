"""`explore`: a pipeline runs again and again, each time with one fault at the next step, until every step was a victim.

The rule kept here: a run that is not as it should be ends the exploration with an AssertionError that says what is
wrong, at which step, and how to see exactly that run again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import structlog

from .faults import Fault
from .judge import complaints
from .play import Make, Play, Victim
from .stepping import Ticks

__all__ = ["ALL_FAULTS", "Exploration", "explore", "replay"]

ALL_FAULTS = tuple(Fault)

_LIMIT = 20.0
"""Real seconds for one run."""
_STEPS = 20_000
"""Steps for the first run, which nothing is done to."""
_SLACK = 2_000
"""Steps that a stop may take on top of ten times those of the run."""
_SAMPLES = 12
"""Victims for each fault and schedule when threads or processes take part, unless told otherwise."""


@dataclass
class Exploration:
    """What was done. `steps`: of the undisturbed run in the first order; `injected`: faults that hit a run that went on."""

    steps: int = 0
    runs: int = 0
    schedules: int = 0
    injected: Counter[str] = field(default_factory=Counter[str])
    exact: bool = True
    """Every step was the victim of every fault that it can be the victim of, and every run can be replayed exactly."""
    seconds: float = 0.0

    def __str__(self) -> str:
        faults = ", ".join(f"{number} {name}" for name, number in sorted(self.injected.items()))
        return (
            f"{self.runs} runs in {self.seconds:.1f} s: {self.steps} steps, {self.schedules} schedules, "
            f"{'every step' if self.exact else 'a sample of steps'}; faults that took effect: {faults or 'none'}"
        )


def explore(
    make: Make,
    *,
    seed: int = 0,
    schedules: int = 1,
    faults: Iterable[Fault] = ALL_FAULTS,
    samples: int | None = None,
    compare: bool = True,
    limit: float = _LIMIT,
) -> Exploration:
    """Run what `make` returns with each of `faults` at every step, in `schedules` orders from `seed` on.

    `make` returns a fresh pipeline, which is then collected; or a pipeline and a coroutine that runs it; or these and
    a list to which that coroutine appends every output that it gets. It is called once a run, on the run's loop. The
    clock is virtual. Seed 0 is asyncio's own order, every other one another order of what asyncio leaves open.

    After every run: it has ended, within the pipeline's `Grace` (and within `limit` real seconds); every law of the
    ledger holds, by the report and by arithmetic on it; nothing is left behind; outcome and reasons are what the fault
    implies; no output came twice or from nowhere, and as many came as the ledger says were delivered; and the coroutine
    has raised nothing of its own, so that it may have `assert`s. `compare=False` is for stages whose outputs differ
    when an item is missing, such as sums.

    Where threads or processes take part, steps are not the same in each run: a fault comes at the n-th step of its
    own run, for `samples` n over the length of the run. `samples` also shortens the exploration of other pipelines.

    Raises AssertionError for the first run that is not as it should be; the message has the call of `replay`.
    """
    _refuse_running_loop()
    began, report, ticks = monotonic(), Exploration(), Ticks()
    for order in range(seed, seed + schedules):
        with _quiet():
            plain = _plain_run(make, order, ticks, limit, compare)
            report.runs += 1
            report.schedules += 1
            report.steps = report.steps or plain.steps
            with _measured(ticks, plain):
                for victim in _victims(plain, faults, samples):
                    play = _one_run(make, order, ticks, victim, plain, limit, compare)
                    report.runs += 1
                    report.injected[victim.fault.value] += play.took_effect
        report.exact = report.exact and not plain.real and samples is None
    report.seconds = monotonic() - began
    return report


def replay(
    make: Make, fault: Fault | str | None, step: int = 0, *, seed: int = 0, call: int = 0, compare: bool = True, limit: float = _LIMIT
) -> Play:
    """One run again, with that fault at that step (and, for RAISE, in that call of a handler within it); None for no fault.

    Raises the same AssertionError as `explore`; returns what happened when all is well.
    """
    _refuse_running_loop()
    with _quiet():
        ticks = Ticks()
        plain = _plain_run(make, seed, ticks, limit, compare)
        if fault is None:
            return plain
        with _measured(ticks, plain):
            return _one_run(make, seed, ticks, Victim(Fault(fault), step, call), plain, limit, compare)


# --- runs


def _plain_run(make: Make, seed: int, ticks: Ticks, limit: float, compare: bool) -> Play:
    """Nothing is done to it; but it says where what can be done."""
    with ticks.installed():
        play = _play(Play(make, seed, None, limit=limit, most_steps=_STEPS), ticks)
        missed = ticks.missed()
    if play.real:
        # Its clock was the explorer's, and threads have looked at it, too: once more, with the real one.
        play = _play(Play(make, seed, None, limit=limit, most_steps=_STEPS), ticks)
    elif missed:
        # A part of the library that is loaded when it is needed has looked at the real clock.
        with ticks.installed():
            play = _play(Play(make, seed, None, limit=limit, most_steps=_STEPS), ticks)
    _judge(play, play, compare)
    return play


def _one_run(make: Make, seed: int, ticks: Ticks, victim: Victim, plain: Play, limit: float, compare: bool) -> Play:
    play = Play(make, seed, victim, limit=limit, most_steps=plain.steps * 10 + _SLACK)
    _judge(_play(play, ticks), plain, compare)
    return play


def _measured(ticks: Ticks, plain: Play) -> AbstractContextManager[None]:
    return nullcontext() if plain.real else ticks.installed()


def _play(play: Play, ticks: Ticks) -> Play:
    state = random.getstate()
    random.seed(play.seed)  # the waits between attempts have some jitter
    ticks.restart(play.seed)
    try:
        play.run()
    finally:
        random.setstate(state)
    return play


def _judge(play: Play, plain: Play, compare: bool) -> None:
    found = complaints(play, plain, compare=compare)
    if not found:
        return
    victim = play.victim
    if victim is None:
        where, again = "without any fault", "None"
    else:
        where = f"with the fault {victim.fault.value!r} at step {victim.step} of {plain.steps}"
        where += f", before {play.victim_label}" if play.victim_label else ""
        again = f"{victim.fault.value!r}, {victim.step}" + (f", call={victim.call}" if victim.call else "")
    raise AssertionError(
        f"{where} (seed {play.seed}):\n"
        + "\n".join(f"  {text}" for text in found)
        + f"\nto see that run again: replay(make, {again}, seed={play.seed})"
        + (", as far as threads and processes let it be the same" if plain.real else "")
    )


def _victims(plain: Play, faults: Iterable[Fault], samples: int | None) -> Iterator[Victim]:
    if plain.real and samples is None:
        samples = _SAMPLES
    for fault in faults:
        if fault is Fault.RAISE:
            victims = [Victim(fault, step, call) for step, calls in plain.calls.items() for call in range(calls)]
        elif fault is Fault.TIME:
            victims = [Victim(fault, step) for step in sorted(plain.timed)]
        else:
            victims = [Victim(fault, step) for step in range(plain.steps)]
        yield from victims if samples is None else _spread(victims, samples)


def _spread(victims: list[Victim], number: int) -> list[Victim]:
    if len(victims) <= number:
        return victims
    return [victims[at * len(victims) // number] for at in range(number)]


# --- around


def _refuse_running_loop() -> None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        f"an exploration runs loops of its own, whose steps it can count, and cannot run inside of another ({type(loop).__qualname__}): "
        "call it from a plain function, not from a coroutine"
    )


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Thousands of failures that are meant are not thousands of lines."""
    configured, before = structlog.is_configured(), structlog.get_config()
    structlog.configure(processors=[_drop])
    try:
        yield
    finally:
        if configured:
            structlog.configure(**before)
        else:
            structlog.reset_defaults()


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


