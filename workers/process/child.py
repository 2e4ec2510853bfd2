"""The worker process: takes items from its pipe, calls the handler, sends results.

The rules kept here:

- A reader thread always reads, so that a stop is seen while the handler works, and the parent never blocks.
- The process ends when its parent does, whatever ends that: the reader watches the parent's sentinel.
- A finished result leaves before the next item begins, unless another has just left; then within milliseconds, however
  long the next item takes. A worker that is killed takes little with it, and the shared words say what.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import threading
from time import monotonic_ns, perf_counter
from typing import Any

from multiprocess import process as mp_process

from pipeline.cancellation.reason import CancelReason

from ..base import Outcome, WorkerState
from ..performer import Performer, WorkerStopped
from ..pooled import PARTIAL_LIMIT
from .wire import ChildEnd, Frame, FrameReader, Packed, SharedWords, frame, pack, portable, unpack, unpack_handler

__all__ = ["main"]

_FLUSH = 0.0002
"""Seconds after which finished results are sent before the next item begins."""
_CHUNK = 1 << 16
_OUTPUTS = 16
"""Outputs of a generator in one frame, at most."""

_LOOK = 5
"""Milliseconds between two looks, while there is work, at whether finished results wait behind a long item."""


class _HungUp(Exception):
    """The parent has closed its end."""


JobEntry = tuple[int, int, Packed]


def main(down: ChildEnd, up: ChildEnd, words: SharedWords, handler: bytes, stage: str, number: int) -> None:
    """The process's whole life. `down` and `up` are its ends of the pipes, `words` the shared memory."""
    os.environ.pop("PYTHONSAFEPATH", None)  # it was for this process's start, not for what a handler starts
    # Ctrl-C in a terminal reaches the whole group; what it means is the parent's decision.
    # SIGTERM may be meant for the whole group as well, and a drain shall lose nothing: it counts once the parent has
    # told this process to stop.
    child = _Child(down, up, words, stage, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, child.terminate)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    # A daemon process may not have children; a handler may.
    config: dict[str, Any] = mp_process.current_process()._config
    config["daemon"] = False
    child.live(handler)


class _Child:
    def __init__(self, down: ChildEnd, up: ChildEnd, words: SharedWords, stage: str, number: int) -> None:
        self._down = down.number
        self._up = up.number
        self._words = words.words
        self._shared = words
        self._jobs: queue.SimpleQueue[list[JobEntry] | None] = queue.SimpleQueue()
        self._credits: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._credit = 0
        self._outputs: list[Packed] = []
        self._results: list[tuple[int, Any]] = []
        self._flushed = 0.0
        self._writing = threading.RLock()
        self._let_go = False
        self._batches_in = self._batches_done = 0
        self._job = 0
        self._performer: Performer | None = None
        self.cancelled = False
        self.reasons: tuple[CancelReason, ...] = ()
        self._state = WorkerState(stage, number, self)

    # --- the main thread

    def terminate(self, *_: object) -> None:
        """SIGTERM: end at once, if the parent has let go of this process."""
        if self.cancelled or self._let_go:
            os._exit(128 + signal.SIGTERM)

    def live(self, handler: bytes) -> None:
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        what = "handler"
        try:
            loaded = unpack_handler(handler)
            self._performer = performer = Performer(loaded, self._state, self)
            what = "setup"
            performer.open()
            self._write(frame(Frame.READY, None))
            self._work(performer)
            what = "teardown"
            performer.close()
        except _HungUp:
            return  # leave quietly
        except BaseException as error:
            with contextlib.suppress(_HungUp):
                self._write(frame(Frame.BROKEN, (what, pack(portable(error)))))

    def _work(self, performer: Performer) -> None:
        words = self._words
        while not self.cancelled:
            batch = self._jobs.get()
            if batch is None:
                return
            for job, attempt, packed in batch:
                if self.cancelled:
                    return
                self._job = job
                words[SharedWords.ITEM] = job + 1
                outcome = self._handle(performer, attempt, packed)  # may flush, and so replace the list below
                self._results.append((job, outcome))
                if perf_counter() - self._flushed > _FLUSH:
                    self._flush()
            self._flush()
            self._batches_done += 1
            words[SharedWords.ITEM] = 0

    def _handle(self, performer: Performer, attempt: int, packed: Packed) -> Any:
        """The outcome of one item as a tuple; for an item that cannot be unpickled, None in place of the outcome."""
        try:
            item = unpack(packed)
        except Exception as error:  # an item's own unpickling code may raise anything
            return (Frame.UNREADABLE, f"{type(error).__name__}: {error}")
        self._credit, self._credits = PARTIAL_LIMIT, queue.SimpleQueue()
        outcome = performer.perform(item, attempt)
        if outcome.error is None and not outcome.many:
            try:
                return (Frame.RESULTS, pack(outcome.value), outcome.attempts, outcome.retried, outcome.seconds)
            except Exception as error:  # likewise when it is pickled
                outcome.error = TypeError(f"the result cannot be sent back from the worker process: {type(error).__name__}: {error}")
        self._flush_outputs()
        return (Frame.BROKEN, _packed_outcome(outcome))

    def _flush(self) -> None:
        """Send what is finished. Also from the reader's thread, when an item takes long."""
        with self._writing:
            results, self._results = self._results, []
            if results:
                self._write(frame(Frame.RESULTS, results))
        self._flushed = perf_counter()

    # --- what the performer asks

    def attempt_begins(self, attempt: int) -> None:
        self._words[SharedWords.ATTEMPT] = attempt
        self._words[SharedWords.BEGAN] = monotonic_ns()

    def attempt_ends(self) -> None:
        self._words[SharedWords.BEGAN] = 0

    def send(self, output: Any) -> None:
        """One output of a generator; waits, off the attempt's clock, while too many have not left downstream."""
        self._outputs.append(pack(output))
        self._credit -= 1
        if len(self._outputs) >= _OUTPUTS or self._credit <= 0 or perf_counter() - self._flushed > _FLUSH:
            self._flush_outputs()
        if self._credit <= 0:
            spent = monotonic_ns() - self._words[SharedWords.BEGAN]
            self._words[SharedWords.BEGAN] = 0
            while self._credit <= 0 and not self.cancelled:
                self._credit += self._credits.get()
            self._words[SharedWords.BEGAN] = monotonic_ns() - spent
        if self.cancelled:
            raise WorkerStopped

    def _flush_outputs(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._flush()  # results of earlier items first
            self._write(frame(Frame.OUTPUTS, (self._job, outputs)))
            self._flushed = perf_counter()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        with self._writing:
            try:
                while view:
                    view = view[os.write(self._up, view) :]
            except BrokenPipeError:
                raise _HungUp from None

    # --- the reader thread

    def _read(self) -> None:
        parent = mp_process.parent_process()
        poll = select.poll()
        poll.register(self._down, select.POLLIN | select.POLLHUP)
        if parent is not None:
            poll.register(parent.sentinel, select.POLLIN | select.POLLHUP)
        reader = FrameReader()
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(_LOOK if self._batches_in != self._batches_done else None)}
            if not ready:
                with contextlib.suppress(_HungUp):
                    self._flush()  # an item takes long: what was finished before it does not wait for it
                continue
            if self._down not in ready:
                os._exit(1)  # the parent is gone: nobody wants what this process could still do
            chunk = os.read(self._down, _CHUNK)
            if not chunk:
                self._let_go = True
                break
            for kind, content in reader.feed(chunk):
                self._obey(kind, content)
        self._jobs.put(None)
        if parent is not None:
            poll.unregister(self._down)
            poll.poll()
            os._exit(1)

    def _obey(self, kind: Frame, content: Any) -> None:
        if kind is Frame.JOBS:
            self._batches_in += 1
            self._jobs.put(content)
        elif kind is Frame.CREDIT:
            self._credits.put(content)
        elif kind is Frame.CANCEL:
            self.reasons, self.cancelled = content, True
            self._credits.put(0)
            self._jobs.put(None)
            if self._performer is not None:
                self._performer.interrupt()


def _packed_outcome(outcome: Outcome) -> tuple[Any, ...]:
    error = None if outcome.error is None else pack(portable(outcome.error))
    return (error, outcome.trace, outcome.attempts, outcome.retried, outcome.seconds, outcome.timed_out, outcome.many)
