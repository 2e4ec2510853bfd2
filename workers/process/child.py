"""The worker process: takes items from its pipe, calls the handler, sends results.

The rules kept here:

- A reader thread always reads, so that a stop is seen while the handler works, and the parent never blocks.
- The process ends when its parent does, whatever ends that: the reader watches the parent's sentinel.
- A finished result leaves before the next item begins, unless others have just left; then within milliseconds, however
  long the next item takes. A worker that is killed takes little with it, and the shared words say what.
- A result is pickled before the next item begins: what a handler keeps and changes later does not change it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from operator import length_hint
from time import monotonic_ns, perf_counter
from typing import Any

from multiprocess import process as mp_process

from pipeline.cancellation.current import push_reasons
from pipeline.cancellation.programs import kill_programs
from pipeline.cancellation.reason import CancelReason

from ..base import Outcome, WorkerState
from ..performer import Performer, WorkerStopped
from ..pooled import PARTIAL_LIMIT
from .arena import Arena
from .faults import Exit
from .handlers import unpack_handler
from .limit import MemoryLimit
from .packer import SCALARS, Packer, RefusedError, UnreadableError, portable
from .shared import ChildEnd, SharedWords
from .wire import Frame, FrameReader, frame

__all__ = ["Child"]

_FLUSH = 0.002
"""Seconds after which finished results are sent before the next item begins; the last ones of a run are sent at once."""
_STRIDE = 256
"""Items between two looks at the clock, at most; fewer as soon as items turn out to be slow."""
_CHUNK = 1 << 16
_OUTPUTS = 16
"""Outputs of a generator in one frame, at most."""

_LOOK = 5
"""Milliseconds between two looks, while there is work, at whether finished results wait behind a long item."""


class _HungUp(Exception):
    """The parent has closed its end."""


Run = tuple[int, list[Any], bool]
"""The number of the first item, the items, and whether some are in boxes."""


_BOXES: frozenset[type] = frozenset({tuple})
"""What comes of jobs."""


class Child:
    """One worker's end of everything. Made and used on the process's main thread, but for what `_read` calls."""

    def __init__(
        self,
        pipes: tuple[ChildEnd, ChildEnd],
        words: SharedWords,
        arenas: tuple[Arena | None, Arena | None],
        stage: str,
        number: int,
        limit: MemoryLimit | None,
    ) -> None:
        self._limit = limit
        self._recalled = threading.Event()
        self._down, self._up = (end.number for end in pipes)
        down, up = arenas
        self._packer = Packer(up, down)
        self._takes_blocks = down is not None
        self._words = words.words
        self._shared = words
        self._runs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._runs_in = self._runs_done = 0
        self._at_work: tuple[Iterator[Any], int] = (iter(()), 0)
        """What has not begun of the run at work, which the reader may take away, and the number behind its last item."""
        self._stride = 1
        self._results: list[Any] = []
        self._boxed = False
        """There are boxes among the results of this run."""
        self._sent = 0
        """The number of the first result that has not been sent."""
        self._seconds = 0.0
        self._flushed = 0.0
        self._writing = threading.RLock()
        self._let_go = False
        self._credits: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._credit = 0
        self._outputs: list[Any] = []
        self._performer: Performer | None = None
        self._call: Callable[[Any], Any] = abs
        self._simple = True
        self.requests: list[CancelReason | None] = []
        self.cancelled = False
        self.reasons: tuple[CancelReason, ...] = ()
        self._state = WorkerState(stage, number, self)

    # --- the main thread

    def terminate(self, *_: object) -> None:
        """SIGTERM: end at once, if the parent has let go of this process."""
        if self.cancelled or self._let_go:
            _leave(128 + signal.SIGTERM)

    def live(self, handler: bytes) -> None:
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        what = "handler"
        push_reasons(lambda: self.reasons)  # for good: code deep inside a handler can ask why, as it can in the loop
        try:
            loaded = unpack_handler(handler)
            self._performer = performer = Performer(loaded, self._state, self)
            self._call, self._simple = loaded.bound(self._state), loaded.simple
            what = "setup"
            performer.open()
            if self._limit is not None:
                self._limit.hold()
            self._write(frame(Frame.READY, self._takes_blocks))
            what = "worker"
            self._work(performer)
            self.out_of_memory()  # what follows is not an item's
            what = "teardown"
            performer.close()
        except _HungUp:
            return  # leave quietly
        except BaseException as error:
            if what == "worker" and isinstance(error, MemoryError):
                os._exit(Exit.OUT_OF_MEMORY)
            self.out_of_memory()
            with contextlib.suppress(_HungUp):
                self._write(frame(Frame.BROKEN, (what, self._packer.box(portable(error)))))

    def _work(self, performer: Performer) -> None:
        while not self.cancelled:
            run = self._runs.get()
            if run is None:
                return
            first, items, boxed = run
            if self._simple:
                self._do(performer, first, items, self._open_and_call if boxed else self._call, SCALARS)
            else:
                self._do(performer, first, items, self._perform, _BOXES)
            self._runs_done += 1

    def _do(self, performer: Performer, first: int, items: list[Any], call: Callable[[Any], Any], known: Collection[type]) -> None:
        """One run of items, with a look at the clock now and then."""
        source = iter(items)
        self._sent, self._boxed = first, known is _BOXES
        self._at_work = (source, first + len(items))
        numbered = self._numbered(source, first)
        began = perf_counter()
        while length_hint(source) and not self.cancelled:
            performer.run(islice(numbered, self._stride), call, known, self._box, self._results)
            now = perf_counter()
            spent, began = now - began, now
            self._seconds += spent
            self._stride = max(self._stride // 4, 1) if spent > _FLUSH / 2 else min(self._stride * 2, _STRIDE)
            if now - self._flushed > _FLUSH:
                self._flush()
            if self._limit is not None and self._limit.worn() and not self.cancelled:
                self._retire()
        self._flush()
        self._words[SharedWords.ITEM] = 0

    def _retire(self) -> None:
        """Another worker shall take this one's place: begin nothing more, and wait until the rest is given back."""
        self._recalled.clear()
        if self._let_go or self.cancelled:  # looked at after the clearing, which may have come after the last word
            return
        self._flush()
        self._write(frame(Frame.WORN, None))
        self._recalled.wait()  # bounded by the parent, which answers, hangs up, or is dead

    def _numbered(self, items: Iterator[Any], first: int) -> Iterator[Any]:
        """The items, each one's number written down before it begins."""
        words, at = self._words, SharedWords.ITEM
        for words[at], item in enumerate(items, first + 1):  # one store an item
            yield item

    def _open_and_call(self, boxed: Any) -> Any:
        try:
            item = self._packer.open(boxed)
        except RefusedError as error:
            raise TypeError(str(error)) from None
        except MemoryError:
            raise
        except Exception as error:  # an item's own unpickling code may raise anything
            raise UnreadableError(f"{type(error).__name__}: {error}") from None
        return self._call(item)

    def _perform(self, entry: tuple[int, Any]) -> Any:
        """A job: everything that an item may need, to a box with its outcome."""
        attempt, boxed = entry
        assert self._performer is not None
        try:
            item = self._packer.open(boxed)
        except RefusedError as error:
            return self._packer.box_outcome(Outcome(error=TypeError(str(error)), attempts=attempt))
        except MemoryError as error:
            self.out_of_memory()
            return self._packer.box_outcome(Outcome(error=error, attempts=attempt))
        except Exception as error:  # likewise
            return self._packer.box_outcome(Outcome(error=UnreadableError(f"{type(error).__name__}: {error}")))
        self._credit, self._credits = PARTIAL_LIMIT, queue.SimpleQueue()
        outcome = self._performer.perform(item, attempt)
        self._flush_outputs()
        return self._packer.box_outcome(outcome)

    def _box(self, result: Any) -> Any:
        """A result that is not a plain scalar: await what is to be awaited, and pickle it at once."""
        if not isinstance(result, Outcome):
            assert self._performer is not None
            result = self._performer.finish(result)
            if type(result) in SCALARS:
                return result
        self._boxed = True
        if not isinstance(result, Outcome):
            try:
                return self._packer.box(result)
            except MemoryError as error:
                self.out_of_memory()
                return self._packer.box_outcome(Outcome(error=error))
            except Exception:  # a result's own pickling code may raise anything; once more, to say what
                result = Outcome(result)
        return self._packer.box_outcome(result)

    def _flush(self) -> None:
        """Send what is finished. Also from the reader's thread, when an item takes long."""
        with self._writing:
            count = len(self._results)
            if count:
                results = self._results[:count]
                del self._results[:count]
                first, self._sent = self._sent, self._sent + count
                seconds = 0.0
                if threading.current_thread() is threading.main_thread():
                    seconds, self._seconds = self._seconds, 0.0
                self._write(frame(Frame.RESULTS, (first, results, self._boxed, seconds)))
        self._flushed = perf_counter()

    # --- what the performer asks

    def attempt_begins(self, attempt: int) -> None:
        if self._limit is not None and attempt > 1:
            self._limit.worn()  # an earlier attempt may have reached it
        self._words[SharedWords.ATTEMPT] = attempt
        self._words[SharedWords.BEGAN] = monotonic_ns()

    def attempt_ends(self) -> None:
        self._words[SharedWords.BEGAN] = 0

    def out_of_memory(self) -> None:
        """An item has reached the limit, or the items are over: what is to be done now may take what it needs."""
        if self._limit is not None:
            self._limit.lift()

    def send(self, output: Any) -> None:
        """One output of a generator; waits, off the attempt's clock, while too many have not left downstream."""
        self._outputs.append(self._packer.box(output))
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
            self._write(frame(Frame.OUTPUTS, (self._words[SharedWords.ITEM] - 1, outputs)))
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
        """Without this thread the process would hear of nothing, so it ends when this does, whatever the reason."""
        try:
            self._listen()
        except MemoryError:
            _leave(Exit.OUT_OF_MEMORY)
        except BaseException:  # the handler has closed descriptors that are not its own
            _leave(1)

    def _listen(self) -> None:
        parent = mp_process.parent_process()
        poll = select.poll()
        poll.register(self._down, select.POLLIN | select.POLLHUP)
        if parent is not None:
            poll.register(parent.sentinel, select.POLLIN | select.POLLHUP)
        reader = FrameReader()
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(_LOOK if self._runs_in != self._runs_done else None)}
            if not ready:
                with contextlib.suppress(_HungUp):
                    self._flush()  # an item takes long: what was finished before it does not wait for it
                continue
            if self._down not in ready:
                _leave(1)  # the parent is gone: nobody wants what this process could still do
            chunk = os.read(self._down, _CHUNK)
            if not chunk:
                self._let_go = True
                self._recalled.set()
                break
            for kind, content in reader.feed(chunk):
                self._obey(kind, content)
        self._runs.put(None)
        if parent is not None:
            poll.unregister(self._down)
            poll.poll()
            _leave(1)

    def _obey(self, kind: Frame, content: Any) -> None:
        if kind is Frame.ITEMS:
            self._runs_in += 1
            self._runs.put(content)
        elif kind is Frame.CREDIT:
            self._credits.put(content)
        elif kind is Frame.RECALL:
            self._return()
            self._recalled.set()
        elif kind is Frame.CANCEL:
            self.reasons, self.cancelled = content, True
            self._recalled.set()
            self.requests.append(None)
            self._credits.put(0)
            self._runs.put(None)
            if self._performer is not None:
                self._performer.interrupt()

    def _return(self) -> None:
        """Another worker is idle: give back what has not begun."""
        number: int | None = None
        waiting: list[Run] = []
        with contextlib.suppress(queue.Empty):
            while (run := self._runs.get_nowait()) is not None:
                waiting.append(run)
            self._runs.put(None)  # the end stays the end
        if waiting:
            number = waiting[0][0]
            self._runs_in -= len(waiting)
        source, end = self._at_work
        rest = list(source)
        if rest:
            number = end - len(rest)
        for _, items, _ in [(0, rest, True), *waiting]:
            for item in items:
                self._packer.drop(item if self._simple else item[1])
        with contextlib.suppress(_HungUp):
            self._write(frame(Frame.RETURNED, number))


def _leave(code: int) -> None:
    """End at once, in any thread."""
    kill_programs()
    os._exit(code)
