"""What "module:attribute" names on a command line, and the hub behind what a program hands over.

The rule kept here: whatever is wrong with a target is said before anything starts, with what to write instead.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

from .status import TaskHub

__all__ = ["TargetError", "hub_of", "load_target", "make_target"]

_HUB = ("list_tasks", "get_task", "cancel_task", "subscribe")


class TargetError(ValueError):
    """What was named on the command line is not there, or is of no use. `__cause__` is what its own code has raised."""


def load_target(target: str) -> Any:
    """The object that "module:attribute" names. `Any`: it is whatever the user's module says.

    Modules of the current directory are found, too. Raises `TargetError` for what cannot be found or imported.
    """
    name, colon, path = target.partition(":")
    if not colon or not name or not path:
        raise TargetError(f"{target!r} is no target; write module:attribute, such as service:coordinator")
    value: Any = _import(name, target)
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise TargetError(_no_attribute(value, part, target)) from None
    return value


async def make_target(value: Any, *, is_done: Callable[[Any], bool]) -> Any:
    """`value` itself if it `is_done`; else what it gives when it is called, awaited if need be. `Any` as above."""
    if is_done(value) or not callable(value) or _required(value):
        return value
    try:
        made = value()
        return await made if inspect.isawaitable(made) else made
    except Exception as error:
        raise TargetError(f"{value!r} has raised {type(error).__name__}: {error}") from error


def hub_of(value: object) -> TaskHub:
    """The hub that this is, or that is its `hub`, as a backend's. Raises TypeError for what has none."""
    for candidate in (value, getattr(value, "hub", None)):
        if candidate is not None and not isinstance(candidate, type) and all(callable(getattr(candidate, name, None)) for name in _HUB):
            return cast("TaskHub", candidate)
    hint = f"an object of it, {value.__qualname__}(...)" if isinstance(value, type) else "a TaskCoordinator, or a backend"
    raise TypeError(f"{value!r} knows no tasks; pass {hint}")


def _import(name: str, target: str) -> ModuleType:
    if os.sep in name or name.endswith(".py"):
        module = name.removesuffix(".py").strip(os.sep).replace(os.sep, ".")
        raise TargetError(f"{name!r} is a path; write the module's name, such as {module}:{target.partition(':')[2]}")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    if not _exists(name):
        raise TargetError(f"there is no module {name!r} here in {directory}, nor among what is installed")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise TargetError(f"importing {name!r} has raised {type(error).__name__}: {error}") from error


def _exists(name: str) -> bool:
    if any(not part for part in name.split(".")):
        return False
    if name in sys.modules:
        return True
    package = name.rpartition(".")[0]
    if package and not _exists(package):
        return False
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # its parent is a module and no package
        return False
    except Exception:  # the package's own code: to be told when it is imported
        return True


def _no_attribute(value: object, part: str, target: str) -> str:
    names = [name for name in dir(value) if not name.startswith("_")]
    close = get_close_matches(part, names, 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    where = value.__name__ if isinstance(value, ModuleType) else repr(value)
    return f"{target!r}: {where} has no attribute {part!r}{hint}"


def _required(value: Callable[..., Any]) -> bool:
    """Whether it cannot be called without arguments."""
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return True
    return False
