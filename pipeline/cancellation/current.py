"""The scopes around a piece of code, innermost first: what `get_current_reasons()` asks.

The rule kept here: the chain is never changed, only grown at its inner end, in a context variable. So every task and
thread sees the scopes around the place where it was started, and leaving a scope in one task changes no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar, Token
from typing import NamedTuple, Protocol, TypeAlias

from .reason import CancelReason

__all__ = ["ReasonsProvider", "Scope", "Stopped", "Story", "get_current_reasons", "pop_reasons", "push_reasons", "tell_who_stopped"]

ReasonsProvider: TypeAlias = Callable[[], tuple[CancelReason, ...]]
"""Gives the reasons known by now; called at any time, from any thread, and must not block."""

Story: TypeAlias = Callable[[], Iterable[str]]
"""What became of something that was stopped, in lines; asked when somebody reads the tree."""


_SAMPLE = 100
"""Scopes inside another of which it keeps the story when they are stopped; of more, the number."""


class Stopped:
    """What was stopped inside a scope, from within or from outside."""

    def __init__(self) -> None:
        self._stories: list[Story] = []
        self._more = 0

    def add(self, story: Story) -> None:
        """One scope more."""
        if len(self._stories) < _SAMPLE:
            self._stories.append(story)
        else:
            self._more += 1

    def lines(self) -> Iterator[str]:
        """In words, indented."""
        for story in self._stories:
            first, *rest = story()
            yield f"  stopped with it: {first}"
            yield from (f"  {line}" for line in rest)
        if self._more:
            yield f"  stopped with it: {self._more:,} more"


class Scope(Protocol):
    """Something that may stop the code inside it."""

    stopped: Stopped

    @property
    def interrupting(self) -> bool:
        """Whether it has begun to."""
        ...


class Link(NamedTuple):
    """One scope, and the ones around it."""

    provider: ReasonsProvider
    outer: Link | None
    scope: Scope | None = None


_current: ContextVar[Link | None] = ContextVar("penstock_reasons", default=None)


def get_current_reasons() -> tuple[CancelReason, ...]:
    """Why the code that asks is being stopped: the reasons of the fences and pipelines around it, innermost first.

    Empty as long as nothing fired; a reason that a fence has given to a pipeline inside it comes once. Tasks inherit what surrounded the place where they were created; a thread does so
    if it was started with a copy of the context, as `asyncio.to_thread` does. In a worker process it gives the
    pipeline's reasons.
    """
    found = {id(reason): reason for link in _outwards(_current.get()) for reason in link.provider()}
    return tuple(found.values())


def push_reasons(provider: ReasonsProvider, scope: Scope | None = None) -> Token[Link | None]:
    """Let `get_current_reasons()` ask `provider` as well, here and in every task created from here on."""
    return _current.set(Link(provider, _current.get(), scope))


def pop_reasons(token: Token[Link | None]) -> None:
    """Undo a `push_reasons`. In another context than that of the push there is nothing to undo, and nothing is done."""
    with suppress(ValueError):  # a generator closed by another task, or by the garbage collector
        _current.reset(token)


def tell_who_stopped(story: Story) -> None:
    """If a scope around this code is stopping its inside: tell the innermost scope, whose tree is part of that one's."""
    scopes = [link.scope for link in _outwards(_current.get()) if link.scope is not None]
    if any(scope.interrupting for scope in scopes):
        scopes[0].stopped.add(story)


def _outwards(link: Link | None) -> Iterator[Link]:
    while link is not None:
        yield link
        link = link.outer
