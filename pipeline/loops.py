"""Which event loop a private loop is. Nothing else in the library asks what kind of loop it runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib import import_module
from typing import cast

__all__ = ["loop_factory"]


def loop_factory(*, uvloop: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes a new loop; `ImportError` says what to install when uvloop is asked for and missing."""
    if not uvloop:
        return asyncio.new_event_loop
    try:
        module = import_module("uvloop")
    except ImportError as error:
        raise ImportError("uvloop=True needs uvloop: pip install 'penstock[uvloop]'") from error
    return cast("Callable[[], asyncio.AbstractEventLoop]", module.new_event_loop)
