"""`Crew`: the scheduler's own threads of one kind, and the jobs that they take in turn.

The rule kept here: a thread is started when there is a job and nobody idle, up to a limit, and stays until the crew is
dismissed. One that has ended a job takes the next one at once, so that a busy crew never waits for a wake-up.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import Protocol

from pipeline.observe.logs import get_logger

from .turn import Turn

__all__ = ["Crew", "CrewJob"]


class CrewJob(Protocol):
    """`begin` and `end` are called while the scheduler is locked, `perform` is not."""

    def begin(self) -> bool:
        """It starts now; False when it is not to start any more."""
        ...

    def perform(self) -> None:
        """Do it; raises nothing."""
        ...

    def end(self) -> None:
        """It has been done."""
        ...


class _Seat:
    """One thread's place in a crew."""

    __slots__ = ("bell", "called", "gone", "job")

    def __init__(self) -> None:
        self.bell = threading.Lock()
        self.bell.acquire()
        self.called = True
        """It is on its way: just started, or rung for."""
        self.job: CrewJob | None = None
        """Given to it while it waited."""
        self.gone = False


class Crew:
    """Up to `size` threads, called `name` and a number."""

    def __init__(self, name: str, size: int, turn: Turn) -> None:
        self._name = name
        self._size = size
        self._turn = turn
        self._jobs: deque[CrewJob] = deque()
        self._idle: list[_Seat] = []
        """Those that wait; the one that has worked last is called first."""
        self._called = 0
        """Threads that have been called or started and have not come yet."""
        self._here = False
        """One of them has the turn and is about to take a job anyway."""
        self._dismissed = False
        self.threads: list[threading.Thread] = []

    # --- while the scheduler is locked

    def hire(self) -> None:
        """Make sure that there is anybody; what keeps the first thread from starting is raised."""
        if not self.threads:
            self._start()

    def put(self, job: CrewJob) -> None:
        """A job for whoever comes first."""
        self._jobs.append(job)
        if not self._called and not self._here:
            self._call()

    def dismiss(self) -> None:
        """There will be no more jobs: let everybody go."""
        self._dismissed = True
        while self._idle:
            self._ring()

    def _call(self) -> None:
        if self._idle:
            self._ring()
        elif len(self.threads) < self._size:
            try:
                self._start()
            except RuntimeError as error:  # the system has no more threads: those that are there will do it
                get_logger().warning("a scheduler's thread could not be started", name=self._name, error=str(error))

    def _ring(self) -> None:
        seat = self._idle.pop()
        seat.called = True
        self._called += 1
        self._turn.ring(seat.bell)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self.threads)}", daemon=True)
        thread.start()
        self.threads.append(thread)
        self._called += 1

    def _next(self, seat: _Seat, done: CrewJob | None) -> CrewJob | None:
        """A thread comes, perhaps with a job that it has done: what it does next, or None, and it is to wait."""
        jobs = self._jobs
        if seat.called:
            seat.called = False
            self._called -= 1
        if done is not None:
            self._here = True
            done.end()
            self._here = False
        while jobs:
            job = jobs.popleft()
            if job.begin():
                if jobs and not self._called:
                    self._call()
                return job
        if self._dismissed:
            seat.gone = True
            self._turn.ring(seat.bell)
        else:
            self._idle.append(seat)
        return None

    def _serve(self, seat: _Seat, done: CrewJob | None) -> None:
        """The same, by somebody else: the thread waits at its bell."""
        seat.job = self._next(seat, done)
        if seat.job is not None:
            self._turn.ring(seat.bell)
        self._turn.drop(done)

    # --- one thread

    def _work(self) -> None:
        turn, seat = self._turn, _Seat()
        # Nothing is raised into these threads, so the lock may be taken by hand, and only if it is free.
        take, release = turn.lock.acquire, turn.lock.release
        job: CrewJob | None = None
        while not seat.gone:
            if take(False):
                try:
                    if turn.left:
                        turn.clear()  # what was left earlier is earlier
                    following = self._next(seat, job)
                finally:
                    release()
                job = following
                if turn.left or turn.after:
                    turn.catch_up()
            else:
                turn.leave(partial(self._serve, seat, job))
                job = following = None
            if job is None:
                seat.bell.acquire()  # bounded by the scheduler's close, and the thread is a daemon
                job, seat.job = seat.job, None
            if job is not None:
                job.perform()
