"""How a handler travels to a worker process.

The rule kept here: what a name leads to goes by that name, so that classes stay the ones they are; everything else goes
by value.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from dataclasses import replace
from typing import Any, cast

import dill

from pipeline.errors import PipelineError, StageConfigError

from ..base import Handler

__all__ = ["main_is_importable", "pack_handler", "unpack_handler"]


def pack_handler(stage: str, handler: Handler) -> bytes:
    """A handler as bytes; `StageConfigError` when it cannot travel to a process."""
    sendable = _Sendable(handler)
    try:
        with warnings.catch_warnings():
            # dill warns that a class of `__main__` goes by name; the worker has that module.
            warnings.simplefilter("ignore", dill.PicklingWarning)
            return dill.dumps(sendable, byref=main_is_importable(), recurse=True)
    except Exception as error:
        raise StageConfigError(
            f"the handler of stage {stage!r} cannot be sent to a worker process: {type(error).__name__}: {error}. "
            "It, or a variable that it uses, holds something that cannot be pickled (a lock, a connection, an open file); "
            'open that in setup(state) instead, or use run_in="thread"'
        ) from error


def unpack_handler(data: bytes) -> Handler:
    """The handler in the worker process; raises whatever importing or unpickling it raises."""
    handler = cast("_Sendable", dill.loads(data)).restore()
    for function in (handler.function, handler.setup, handler.teardown):
        _settle_in(function, set())
    return handler


def _settle_in(function: Any, seen: set[int]) -> None:
    """Give the classes and functions that came by value with a function their place in this process's `__main__`.

    A program without a file cannot be imported here. What it defines came with the handler, and is put where its name
    says, so that its instances are pickled by name and are in the parent what they were.
    """
    if not isinstance(function, types.FunctionType) or function.__module__ != "__main__" or id(function) in seen:
        return
    seen.add(id(function))
    home = vars(sys.modules["__main__"])
    for name, value in function.__globals__.items():
        if isinstance(value, (type, types.FunctionType)) and value.__module__ == "__main__":
            home.setdefault(name, value)
            _settle_in(value, seen)


class _Sendable:
    """A handler with its functions replaced by references where they can be found by name.

    A decorated function's name means the stage, not the function, so pickling by name fails and pickling by value would
    copy the classes that the function uses: their instances would come back as strangers. So it is looked up as
    "what this stage wraps".
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = replace(
            handler, function=_refer(handler.function), setup=_refer(handler.setup), teardown=_refer(handler.teardown)
        )

    def restore(self) -> Handler:
        handler = self._handler
        return replace(
            handler, function=_resolve(handler.function), setup=_resolve(handler.setup), teardown=_resolve(handler.teardown)
        )


class _Reference:
    """A function by module and name, or what the stage of that name wraps."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def find(self) -> Any:
        if self.module not in sys.modules:
            __import__(self.module)
        found: Any = sys.modules[self.module]
        for part in self.name.split("."):
            found = getattr(found, part)
        return found

    def resolve(self) -> Any:
        try:
            found = self.find()
        except AttributeError:
            raise PipelineError(
                f"a worker process has imported {self.module!r} and finds no {self.name!r} in it; is it defined only under "
                '`if __name__ == "__main__":`, or has the program\'s file changed or gone since the program was started?'
            ) from None
        return getattr(found, "__wrapped__", found)


def _refer(function: Any) -> Any:
    if not isinstance(function, types.FunctionType) or "<" in function.__qualname__:
        return function
    if function.__module__ == "__main__" and not main_is_importable():
        return function
    reference = _Reference(function.__module__, function.__qualname__)
    try:
        found = reference.find()
    except (AttributeError, ImportError, KeyError):
        return function
    return reference if found is function or getattr(found, "__wrapped__", None) is function else function


def _resolve(function: Any) -> Any:
    return function.resolve() if isinstance(function, _Reference) else function


def main_is_importable() -> bool:
    """Whether worker processes import the main program again, as `multiprocess` does for a program in a file."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    name: str | None = getattr(spec, "name", None)
    if name is not None:
        return name != "__main__" and not name.endswith(".__main__")
    path: str | None = getattr(main, "__file__", None)
    return path is not None and os.path.exists(path)
