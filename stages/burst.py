"""The inner loop of fused stages, written out for each row of them.

The rule kept here: an ordinary item pays for the user's functions and for nothing else that can be paid per burst. So
the `try` is outside of the loop, counts are derived from how far the iterator got, and a step that fails is found
afterwards, from the line that raised.

A step's result is looked at by type, because `SKIP`, `Err`, a coroutine and the like are not outputs. Functions whose
bytecode only computes (operators on the argument, constants and variables: no call, no attribute) cannot return such a
thing, nor cancel the pipeline, nor wait; they are called without a look, each inside of the call of the next.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Callable
from functools import cache, lru_cache
from time import perf_counter
from typing import Any, NamedTuple

__all__ = ["SIMPLE", "Burst", "Loops", "StepKind", "as_raised", "compile_loops", "only_computes"]

_FILE = "<fused stages>"

_HARMLESS = frozenset(
    ["RESUME", "NOP", "CACHE", "POP_TOP", "SWAP", "COPY", "LOAD_CONST", "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW", "STORE_FAST", "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "RETURN_VALUE", "RETURN_CONST", "BINARY_OP", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "UNARY_POSITIVE", "TO_BOOL", "BUILD_TUPLE", "BUILD_LIST", "BUILD_STRING", "BUILD_MAP", "FORMAT_VALUE", "FORMAT_SIMPLE", "CONVERT_VALUE", "POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE", "POP_JUMP_FORWARD_IF_FALSE", "POP_JUMP_FORWARD_IF_TRUE", "JUMP_FORWARD"]
)
_OPERATORS = frozenset(
    ["BINARY_OP", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "UNARY_POSITIVE", "BUILD_STRING"]
)
"""What makes a value of its own."""
_GROWING = frozenset(["**", "<<"])
"""What turns a small number into one that takes seconds to compute with."""
_VARIABLES = frozenset(["LOAD_GLOBAL", "LOAD_DEREF", "COPY_FREE_VARS", "PUSH_NULL"])
"""Operands from outside. They are nothing to worry about as long as they are never the result itself."""
_OF_COROUTINES = frozenset(["RETURN_GENERATOR", "CALL_INTRINSIC_1", "RERAISE"])
"""What the compiler adds to every `async def`; without an `await` in it, none of this waits."""


class StepKind(NamedTuple):
    """What the loop must know of a step."""

    trusted: bool
    """It only computes; see `only_computes`."""
    awaited: bool
    """It is a coroutine function."""


SIMPLE: frozenset[type] = frozenset({int, float, bool, str, bytes, complex, type(None)})
"""Types whose operators compute, and do nothing else."""


def only_computes(function: Any) -> bool:
    """Whether the function does nothing but operators on its one argument, on constants and on variables.

    With an argument of a `SIMPLE` type, it then neither waits nor returns anything but an output.
    """
    if not isinstance(function, types.FunctionType) or not _only_computes(function.__code__):
        return False
    code = function.__code__
    variables = [function.__globals__.get(name, function) for name in code.co_names]
    variables += [_contents(cell) for cell in function.__closure__ or ()]
    return SIMPLE.issuperset(map(type, variables))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return cell


@lru_cache(1024)
def _only_computes(code: types.CodeType) -> bool:
    if code.co_argcount != 1 or code.co_cellvars or code.co_kwonlyargcount:
        return False
    allowed = _HARMLESS | _OF_COROUTINES if code.co_flags & inspect.CO_COROUTINE else _HARMLESS
    argument = code.co_varnames[0]
    before, jumps, variables = "", False, False
    texts = any(isinstance(constant, (str, bytes, tuple)) for constant in code.co_consts)
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in _VARIABLES:
            variables = True
        elif name not in allowed:
            return False
        if name == "BINARY_OP" and (instruction.argrepr.rstrip("=") in _GROWING or (texts and "*" in instruction.argrepr)):
            return False
        jumps = jumps or "JUMP" in name
        if "STORE_FAST" in name:
            jumps = True  # a variable may be the result by way of a local one
            if argument in (instruction.argval, *_as_tuple(instruction.argval)):
                return False  # the argument is needed as it came, should this fail
        if name == "RETURN_VALUE" and before not in _OPERATORS:
            jumps = jumps or before in _VARIABLES
        before = name
    return not (variables and jumps)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


class Burst:
    """A compiled loop. `run(items, put, stop, left, known, skip, skipped, note, until, *functions)`, awaited if `awaits`.

    None: through. Otherwise (step, its input, its result): the rest is the caller's. `left` makes it return after the
    await that it is in; `note` is called before the first and after each step, when timed. It returns after the first
    item that ends later than `until`, a moment of `perf_counter`, unless all its steps are trusted.
    """

    __slots__ = ("_steps", "awaits", "run")

    def __init__(self, run: Callable[..., Any], steps: dict[int, int], *, awaits: bool) -> None:
        self.run = run
        self.awaits = awaits
        self._steps = steps
        """Which step's call stands in a line."""

    def failed_step(self, error: BaseException) -> tuple[int, Any] | None:
        """Which step's call raised, and its input; None when it was not raised by a step (but by the iterator, say)."""
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != _FILE:
            trace = trace.tb_next
        step = self._steps.get(trace.tb_lineno) if trace is not None else None
        if trace is None or step is None:
            return None
        known = trace.tb_frame.f_locals
        if f"v{step}" in known:
            return step, known[f"v{step}"]
        # A call inside of another's: its argument is in its own frame.
        inner = trace.tb_next
        if inner is not None and inner.tb_frame.f_code.co_argcount == 1:
            return step, inner.tb_frame.f_locals.get(inner.tb_frame.f_code.co_varnames[0])
        return step, None

    def step_at_work(self, waiting: types.FrameType | None = None) -> int | None:
        """Which step's call the caller is in, seen from inside of it; or that of a suspended loop, given its frame."""
        frame = waiting or sys._getframe()
        while frame.f_code.co_filename != _FILE:
            if frame.f_back is None:
                return None
            frame = frame.f_back
        return self._steps.get(frame.f_lineno)


class Loops(NamedTuple):
    """The ways to run one row of steps."""

    fast: Burst
    timed: Burst
    """Notes the time before the first and after each step."""
    pulled: Burst | None
    """A generator; only for steps that all compute."""
    prompt: bool
    """Whether no step ever suspends."""
    wary: Burst
    """For items that are not `SIMPLE`: every result is looked at."""


@cache
def compile_loops(kinds: tuple[StepKind, ...], emits: bool) -> Loops:
    """The loops for such a row of steps; `emits` says whether somebody wants the outputs."""
    plain = all(kind.trusted and not kind.awaited for kind in kinds)
    prompt = all(kind.trusted or not kind.awaited for kind in kinds)
    fast = _compile(kinds, emits, False)
    wary = tuple(StepKind(False, kind.awaited) for kind in kinds)
    return Loops(
        fast=fast,
        timed=_compile(wary, emits, True),
        pulled=_compile_pull(len(kinds)) if plain else None,
        prompt=prompt,
        wary=fast if wary == kinds else _compile(wary, emits, False),
    )


def _compile(kinds: tuple[StepKind, ...], emits: bool, timed: bool) -> Burst:
    writer = _Writer(kinds, emits, timed)
    return _made(writer.text(), writer.steps, awaits=any(kind.awaited for kind in kinds))


def _made(text: str, steps: dict[int, int], *, awaits: bool) -> Burst:
    space: dict[str, Any] = {"clock": perf_counter}
    exec(compile(text, _FILE, "exec"), space)
    return Burst(space["burst"], steps, awaits=awaits)


def _compile_pull(steps: int) -> Burst:
    """The same loop as a generator, for so many steps that only compute: each output is made when it is asked for.

    `run(items, stop, gone, failed, *functions)`; it ends when one of `stop` and `gone` is not empty, and when `failed`
    does not say True to an exception.
    """
    names = ", ".join(f"f{step}" for step in range(steps))
    lines = [f"def burst(items, stop, gone, failed, {names}):", " try:", "  for v0 in items:"]
    where: dict[int, int] = {}
    for step in range(steps - 1, -1, -1):
        lines.append(f"   {f'v{steps} = ' if step == steps - 1 else ''}f{step}(")
        where[len(lines)] = step
    lines[-1] += "v0" + ")" * steps
    lines += [f"   yield v{steps}", "   if stop or gone: return", " except BaseException as error:", "  if failed(error): raise"]
    return _made("\n".join(lines), where, awaits=False)


class _Writer:
    """Writes the loop, and remembers in which line each step's call stands."""

    def __init__(self, kinds: tuple[StepKind, ...], emits: bool, timed: bool) -> None:
        self._kinds = kinds
        self._emits = emits
        self._timed = timed
        self._lines: list[str] = []
        self.steps: dict[int, int] = {}

    def text(self) -> str:
        kinds, count = self._kinds, len(self._kinds)
        head = "async def" if any(kind.awaited for kind in kinds) else "def"
        names = ", ".join(f"f{step}" for step in range(count))
        self._line(f"{head} burst(items, put, stop, left, known, skip, skipped, note, until, {names}, type=type, clock=clock):")
        for step, kind in enumerate(kinds):
            if not kind.trusted:
                self._line(f" k{step} = None")
        self._line(" for v0 in items:")
        if self._timed:
            self._line("  note()")
        step = 0
        while step < count:
            last = step
            while not self._timed and kinds[last].trusted and last + 1 < count and kinds[last + 1].trusted:
                last += 1
            self._calls(step, last)
            if not kinds[last].trusted:
                self._look(last)
            step = last + 1
        if self._emits:
            self._line(f"  put(v{count})")
        if not all(kind.trusted for kind in kinds):
            self._line("  if stop or clock() > until: return None")
        self._line(" return None")
        return "\n".join(self._lines)

    def _line(self, text: str) -> None:
        self._lines.append(text)

    def _calls(self, first: int, last: int) -> None:
        """Steps `first` to `last`, each in the call of the next, each on a line of its own."""
        used = self._emits or last + 1 < len(self._kinds) or not self._kinds[last].trusted
        for step in range(last, first - 1, -1):
            call = f"{'await ' if self._kinds[step].awaited else ''}f{step}("
            self._line(f"  v{last + 1} = {call}" if step == last and used else f"  {call}")
            self.steps[len(self._lines)] = step
        self._lines[-1] += f"v{first}" + ")" * (last - first + 1)
        if self._timed:
            self._line("  note()")

    def _look(self, step: int) -> None:
        value = f"v{step + 1}"
        if self._kinds[step].awaited:
            self._line(f"  if left: return {step}, v{step}, {value}")
        self._line(f"  if type({value}) is not k{step}:")
        self._line(f"   if type({value}) not in known:")
        self._line(f"    if {value} is not skip: return {step}, v{step}, {value}")
        self._line(f"    skipped[{step}] += 1")
        self._line("    if stop: return None")
        self._line("    continue")
        self._line(f"   k{step} = type({value})")


def as_raised(error: BaseException) -> BaseException:
    """A step's `StopIteration`, which Python has turned into a `RuntimeError` at the edge of the loop's coroutine."""
    moved = isinstance(error, RuntimeError) and isinstance(error.__cause__, (StopIteration, StopAsyncIteration))
    if moved and (error.__traceback__ is None or error.__traceback__.tb_next is None):  # nothing further in has raised it
        return error.__cause__ or error
    return error
