"""`Crew`: the scheduler's own threads of one kind, and the jobs that they take in turn.

The rule kept here: a thread is started when there is a job and nobody idle, up to a limit, and stays until the crew is
dismissed. One that has ended a job takes the next one at once, so that a busy crew never waits for a wake-up.
"""

from __future__ import annotations

import threading
from collections import deque
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


class Crew:
    """Up to `size` threads, called `name` and a number."""

    def __init__(self, name: str, size: int, turn: Turn) -> None:
        self._name = name
        self._size = size
        self._turn = turn
        self._jobs: deque[CrewJob] = deque()
        self._idle: list[threading.Lock] = []
        """The bells of those that wait; the one that has worked last is called first."""
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
            self._called += 1
            self._idle.pop().release()

    def _call(self) -> None:
        if self._idle:
            self._called += 1
            self._idle.pop().release()
        elif len(self.threads) < self._size:
            try:
                self._start()
            except RuntimeError as error:  # the system has no more threads: those that are there will do it
                get_logger().warning("a scheduler's thread could not be started", name=self._name, error=str(error))

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self.threads)}", daemon=True)
        thread.start()
        self.threads.append(thread)
        self._called += 1

    # --- one thread

    def _work(self) -> None:
        turn, jobs = self._turn, self._jobs
        lock, left = turn.lock, turn.left
        bell = threading.Lock()
        bell.acquire()
        job: CrewJob | None = None
        called = True
        while True:
            with lock:
                if called:
                    self._called -= 1
                    called = False
                if job is not None:
                    self._here = True
                    job.end()
                    self._here = False
                    job = None
                while jobs and job is None:
                    job = jobs.popleft()
                    if not job.begin():
                        job = None
                if job is not None:
                    if jobs and not self._called:
                        self._call()
                elif self._dismissed:
                    break
                else:
                    self._idle.append(bell)
            if left:
                turn.catch_up()
            if job is not None:
                job.perform()
            else:
                bell.acquire()  # bounded by the scheduler's close, and the thread is a daemon
                called = True
        if left:
            turn.catch_up()
