"""The inner loop of fused stages, written out for each number of them.

The rule kept here: an ordinary item pays for the user's functions and for nothing else that can be paid per burst. So
the `try` is outside of the loop, counts are derived from how far the iterator got, and a step that fails is found
afterwards, from the line that raised.

A step's result is looked at by type, because `SKIP`, `Err`, a coroutine and the like are not outputs. Functions whose
bytecode only computes (operators on the argument and on constants: no call, no name, no attribute) cannot return such a
thing, nor cancel the pipeline, and are called without a look.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["Burst", "compile_burst", "failed_step", "only_computes", "step_at_work"]

Burst = Callable[..., "tuple[int, Any, Any] | None"]
"""Takes (items, put, stop, known, skip, skipped, *functions). None: through. Else (step, its input, its result)."""

_FILE = "<fused stages>"
_FIRST_CALL = 3
"""The line of the first step's call."""

_HARMLESS = frozenset(
    ["RESUME", "NOP", "CACHE", "POP_TOP", "SWAP", "COPY", "LOAD_CONST", "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW", "STORE_FAST", "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "RETURN_VALUE", "RETURN_CONST", "BINARY_OP", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "UNARY_POSITIVE", "TO_BOOL", "BUILD_TUPLE", "BUILD_LIST", "BUILD_STRING", "BUILD_MAP", "FORMAT_VALUE", "FORMAT_SIMPLE", "CONVERT_VALUE", "POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE", "POP_JUMP_FORWARD_IF_FALSE", "POP_JUMP_FORWARD_IF_TRUE", "JUMP_FORWARD"]
)


def only_computes(function: Any) -> bool:
    """Whether the function's code does nothing but operators on its one argument and on constants."""
    if not isinstance(function, types.FunctionType):
        return False
    code = function.__code__
    if code.co_argcount != 1 or code.co_freevars or code.co_cellvars or code.co_names or code.co_kwonlyargcount:
        return False
    return all(instruction.opname in _HARMLESS for instruction in dis.get_instructions(code))


@cache
def compile_burst(trusted: tuple[bool, ...], emits: bool) -> Burst:
    """The loop for so many steps; `trusted` steps are called without a look at their result."""
    steps = len(trusted)
    names = ", ".join(f"f{step}" for step in range(steps))
    lines = [f"def burst(items, put, stop, known, skip, skipped, {names}, type=type):", " for v0 in items:"]
    for step, sure in enumerate(trusted):
        lines.append(f"  v{step + 1} = f{step}(v{step})")
        if not sure:
            lines += _look(step)
    if emits:
        lines.append(f"  put(v{steps})")
    if not all(trusted):
        lines.append("  if stop: return None")
    lines.append(" return None")
    space: dict[str, Any] = {}
    exec(compile("\n".join(lines), _FILE, "exec"), space)
    return space["burst"]


def _look(step: int) -> list[str]:
    return [
        f"  if type(v{step + 1}) not in known:",
        f"   if v{step + 1} is not skip: return {step}, v{step}, v{step + 1}",
        f"   skipped[{step}] += 1",
        "   if stop: return None",
        "   continue",
    ]


def failed_step(error: BaseException, trusted: tuple[bool, ...]) -> tuple[int, Any] | None:
    """Which step's call raised, and its input; None when it was not raised by a step (but by the iterator, say)."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != _FILE:
        trace = trace.tb_next
    if trace is None:
        return None
    step = _step_of(trace.tb_lineno, trusted)
    return None if step is None else (step, trace.tb_frame.f_locals[f"v{step}"])


def step_at_work(trusted: tuple[bool, ...]) -> int | None:
    """Which step's call the caller is in, seen from inside of it."""
    frame = sys._getframe()
    while frame.f_code.co_filename != _FILE:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return _step_of(frame.f_lineno, trusted)


def _step_of(line: int | None, trusted: tuple[bool, ...]) -> int | None:
    call = _FIRST_CALL
    for step, sure in enumerate(trusted):
        if line == call:
            return step
        call += 1 if sure else 1 + len(_look(step))
    return None


