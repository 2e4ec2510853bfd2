"""A scheduler: transcoding under limits of CPU, memory and disk, which a pool of threads cannot keep.

Each film is decoded (little CPU, much memory, leaves a large file) and encoded (both CPUs, little memory, removes the
file). A pool only knows how many jobs there are: one that is small enough for the largest job leaves the computer idle, a
larger one takes too much. The scheduler knows what each job takes, and finishes films that are begun.
"""

import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from pipeline.scheduler import Scheduler, StagedPipeline

MB = 2**20
LIMITS = {"cpu": 2, "memory_mb": 10, "disk_mb": 12}
FILMS = 8


class Meter:
    """What is really in use, at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = dict.fromkeys(LIMITS, 0.0)
        self.peak = dict.fromkeys(LIMITS, 0.0)

    def add(self, **amounts: float) -> None:
        with self._lock:
            for what, amount in amounts.items():
                self._now[what] += amount
                self.peak[what] = max(self.peak[what], self._now[what])

    @contextmanager
    def using(self, **amounts: float) -> Iterator[None]:
        self.add(**amounts)
        try:
            yield
        finally:
            self.add(**{what: -amount for what, amount in amounts.items()})


class Film:
    """Two steps; what they need is said once, for the scheduler, and taken for real, on the meter."""

    DECODE: ClassVar = {"cpu": 1, "memory_mb": 4.5, "disk_mb": 4}
    ENCODE: ClassVar = {"cpu": 2, "memory_mb": 1.5}

    def __init__(self, number: int, folder: Path, meter: Meter) -> None:
        self.raw = folder / f"{number}.raw"
        self.meter = meter

    def decode(self) -> None:
        with self.meter.using(cpu=1, memory_mb=4.5):
            frames = bytearray(4 * MB)
            time.sleep(0.06)  # your decoder
            self.meter.add(disk_mb=4)
            self.raw.write_bytes(frames)

    def encode(self) -> int:
        with self.meter.using(cpu=2, memory_mb=1.5):
            packed = zlib.compress(self.raw.read_bytes(), level=1)
            time.sleep(0.02)  # your encoder
            self.raw.unlink()
            self.meter.add(disk_mb=-4)
            return len(packed)


class Transcode(StagedPipeline):
    def __init__(self, film: Film) -> None:
        self.film = film

    def run(self) -> int:
        self.task(self.film.decode, resources=Film.DECODE).run().result()
        self.stage_forward()  # from here on, before any film that has not come so far
        return self.task(self.film.encode, resources=Film.ENCODE).run().result()


def decode_and_encode(film: Film) -> int:
    film.decode()
    return film.encode()


def with_a_pool(films: list[Film]) -> list[int]:
    """Four films at once, each from its beginning to its end."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(decode_and_encode, films))


def with_a_small_pool(films: list[Film]) -> list[int]:
    """One at a time: two that encode would need four CPUs."""
    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(decode_and_encode, films))


def with_the_scheduler(films: list[Film]) -> list[int]:
    # A task gives back what it needs when it ends, and its raw file stays on the disk. So what keeps that limit is how many
    # films are begun at once: three, with 4 MB each.
    with Scheduler(resources=LIMITS, pipeline_parallelism=3, task_parallelism=4) as scheduler:
        handles = [scheduler.run_pipeline(Transcode(film), name=film.raw.stem) for film in films]
        while not (blocked := scheduler.snapshot().blocked) and not handles[-1].done():
            time.sleep(0.001)
        for row in blocked[:1]:
            print(f"film {row.name}: {row.reason}")
        return [handle.result() for handle in handles]


def main() -> None:
    for run in (with_a_pool, with_a_small_pool, with_the_scheduler):
        meter = Meter()
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            sizes = run([Film(number, Path(folder), meter) for number in range(FILMS)])
            seconds = time.monotonic() - began
        peaks = [f"{what} {peak:g} of {LIMITS[what]}{' (too much)' if peak > LIMITS[what] else ''}" for what, peak in meter.peak.items()]
        print(f"{run.__name__}: {len(sizes)} films in {seconds:.2f} s; at most {', '.join(peaks)}")


if __name__ == "__main__":
    main()
