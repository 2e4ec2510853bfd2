"""`Err`: a failure as a value, and small helpers to work with results that may be one."""

from __future__ import annotations

import functools
import inspect
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeGuard, TypeVar, cast

from .errors import PipelineError

if TYPE_CHECKING:
    from .cancellation.reason import CancelReason
    from .report import RunReport

__all__ = ["Err", "Result", "describe", "err_as_value", "get_err", "is_err", "is_ok", "unwrap", "unwrap_or"]

_FRAMES = 100
"""Entries of a traceback that are kept as text, from the outermost on."""
_RAISED_OFTEN = 5000
"""Entries after which a traceback is taken for one that will not stop growing, and is begun anew."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Err:
    """A failed item, or a run that did not complete.

    `value` is the exception, or the reason's text after a cancel. For an item: `item`, the `stage` it failed in, the
    number of `attempts`, and the traceback's text in `trace`. For a run: its `report` and every reason to stop, in order.
    """

    value: BaseException | str
    item: Any = None
    stage: str | None = None
    attempts: int = 1
    trace: str = ""
    reasons: tuple[CancelReason, ...] = ()
    report: RunReport | None = None

    @property
    def reason(self) -> str | None:
        """The primary reason as text, or None for an item's failure that stopped nothing."""
        return self.reasons[0].message if self.reasons else None

    @classmethod
    def of(cls, error: BaseException, *, item: Any = None, stage: str | None = None, attempts: int = 1) -> Err:
        """The `Err` of a caught exception. Costs one traceback formatting, tens of microseconds."""
        trace = "".join(traceback.format_exception(error, limit=_FRAMES))
        if _is_endless(error.__traceback__):
            error.__traceback__ = None
        return cls(error, item, stage, attempts, trace)

    def __repr__(self) -> str:
        where = f" in stage {self.stage!r}" if self.stage else ""
        return f"<Err {self.value!r}{where}>"


def _is_endless(trace: types.TracebackType | None) -> bool:
    """One exception object that is raised again and again gets a longer traceback each time."""
    for _ in range(_RAISED_OFTEN):
        if trace is None:
            return False
        trace = trace.tb_next
    return True


def describe(value: BaseException | str) -> str:
    """An exception in one line, with its type."""
    if isinstance(value, str):
        return value
    text = str(value)
    return f"{type(value).__name__}: {text}" if text else type(value).__name__


Result: TypeAlias = T | Err
"""Either a value or an `Err`."""


def is_err(result: Result[Any]) -> TypeGuard[Err]:
    """Whether `result` is an `Err`."""
    return isinstance(result, Err)


def is_ok(result: Result[T]) -> TypeGuard[T]:
    """Whether `result` is an ordinary value."""
    return not isinstance(result, Err)


def get_err(result: Result[Any]) -> str:
    """The failure as text; an empty string for an ordinary value."""
    return str(result.value) if isinstance(result, Err) else ""


def unwrap(result: Result[T]) -> T:
    """The value; an `Err` raises its exception, or `PipelineError` with its text when it has none."""
    if isinstance(result, Err):
        if isinstance(result.value, BaseException):
            raise result.value
        raise PipelineError(result.value)
    return result


def unwrap_or(result: Result[T], default: T) -> T:
    """The value, or `default` for an `Err`."""
    return default if isinstance(result, Err) else result


def err_as_value(function: Callable[P, T]) -> Callable[P, Result[T]]:
    """Wrap a function (plain or `async def`) so that an exception is returned as an `Err` instead of raised."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_later(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                return Err.of(error)

        # The wrapper of a coroutine function is one too: Callable[P, T] with T a coroutine. No type says that shortly.
        return cast("Callable[P, Result[T]]", call_later)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result[T]:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return Err.of(error)

    return call
