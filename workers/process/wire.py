"""What travels between the parent and a worker process: frames, pickles, and a few shared words.

The rules kept here:

- A pickling error belongs to one item. Plain scalars travel in the frame's own pickle; anything else is pickled for
  itself, so that one bad item is one failed item.
- What is unpickled comes from the library's own children, over descriptors that nobody else has.
- The shared words are written by the worker before and after each item. They survive its death and tell exactly which
  item it was at.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import struct
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import Any, cast

import dill
from multiprocess import reduction

from pipeline.errors import PipelineError, StageConfigError

from ..base import Handler

__all__ = ["ChildEnd", "Frame", "FrameReader", "RemoteError", "SharedWords", "frame", "main_is_importable", "pack", "pack_handler", "unpack", "unpack_handler"]


# --- frames


class Frame(IntEnum):
    """Kinds of frames. Down: to the worker; up: from it."""

    JOBS = 1
    """Down: [(id, attempt, packed item), ...]"""
    CREDIT = 2
    """Down: how many outputs of the generator at work have left."""
    CANCEL = 3
    """Down: the reasons to stop."""
    READY = 4
    """Up: `setup` is done."""
    RESULTS = 5
    """Up: [(id, packed outcome), ...]"""
    OUTPUTS = 6
    """Up: (id, [packed output, ...]) of a generator that is still at work."""
    UNREADABLE = 7
    """Up: (id, text): the item could not be unpickled."""
    BROKEN = 8
    """Up: (what, packed error): `setup`, `teardown`, or the handler could not be loaded."""


_HEADER = struct.Struct("<QB")


def frame(kind: Frame, content: Any) -> bytes:
    """One frame, ready to write. `content` is made of packed values and scalars only, so this cannot fail."""
    body = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body), kind) + body


class FrameReader:
    """Puts frames together from the chunks that a pipe gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[tuple[Frame, Any]]:
        """The frames that this chunk completes."""
        buffer = self._buffer
        buffer += chunk
        frames: list[tuple[Frame, Any]] = []
        start = 0
        while len(buffer) - start >= _HEADER.size:
            length, kind = _HEADER.unpack_from(buffer, start)
            end = start + _HEADER.size + length
            if len(buffer) < end:
                break
            with memoryview(buffer)[start + _HEADER.size : end] as body:
                frames.append((Frame(kind), pickle.loads(body)))
            start = end
        if start:
            del buffer[:start]
        return frames


# --- values

_SCALARS = frozenset({int, float, str, bytes, bool, complex, type(None)})
Packed = tuple[bool, Any]
"""(pickled, data): a scalar as it is, anything else as a pickle of its own."""


def pack(value: Any, *, by_value: bool = False) -> Packed:
    """Make a value ready for a frame; raises whatever its pickling raises.

    The C pickler does most things 10 to 30 times faster than dill, which takes what the former refuses: lambdas,
    closures, classes defined in a function. `by_value` goes to dill at once.
    """
    if type(value) in _SCALARS:
        return (False, value)
    if not by_value:
        with contextlib.suppress(Exception):  # whatever the reason, dill has a say before the item fails
            return (True, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    return (True, dill.dumps(value, recurse=True))


def unpack(packed: Packed) -> Any:
    """The value again; raises whatever its unpickling raises."""
    pickled, data = packed
    return pickle.loads(data) if pickled else data


class RemoteError(PipelineError):
    """Stands for an exception of a worker process that could not be pickled; keeps its type's name and its text."""


def portable(error: BaseException) -> BaseException:
    """The exception itself if it survives the way to the parent, else a `RemoteError` that describes it."""
    with contextlib.suppress(Exception):  # its own pickling code may raise anything
        if type(pickle.loads(pickle.dumps(error, pickle.HIGHEST_PROTOCOL))) is type(error):
            return error
    return RemoteError(f"{type(error).__name__}: {error}")


# --- handlers


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
        self._handler = Handler(
            _refer(handler.function),
            handler.kind,
            handler.takes_state,
            handler.retry,
            handler.timeout,
            _refer(handler.setup),
            _refer(handler.teardown),
        )

    def restore(self) -> Handler:
        handler = self._handler
        return Handler(
            _resolve(handler.function),
            handler.kind,
            handler.takes_state,
            handler.retry,
            handler.timeout,
            _resolve(handler.setup),
            _resolve(handler.teardown),
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
        found = self.find()
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


# --- shared words


class SharedWords:
    """Three 64-bit numbers that both processes see: the item at work (its id + 1, or 0), its attempt, and its start.

    Backed by anonymous memory where the system has it, else by an unlinked private file. The start is in nanoseconds of
    the monotonic clock, which all processes of a machine share.
    """

    ITEM, ATTEMPT, BEGAN = range(3)
    _SIZE = mmap.PAGESIZE

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, self._SIZE)
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, self._SIZE)
        self.words = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Let the memory and the descriptor go."""
        self.words.release()
        self._map.close()
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Callable[[Any], SharedWords], tuple[Any]]:
        # Only while a process is being started: the descriptor travels with it.
        return (_attach_words, (reduction.DupFd(self._descriptor),))


def _attach_words(duplicate: Any) -> SharedWords:
    return SharedWords(duplicate.detach())


class ChildEnd:
    """A descriptor that travels to the process being started; there it is `number` again."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        os.close(self.number)

    def __reduce__(self) -> tuple[Callable[[Any], ChildEnd], tuple[Any]]:
        return (_attach_end, (reduction.DupFd(self.number),))


def _attach_end(duplicate: Any) -> ChildEnd:
    return ChildEnd(duplicate.detach())


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("penstock", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


