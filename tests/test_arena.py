"""Large buffers between processes: they go through shared memory, arrive as they were, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LIMIT, Flag, assert_balanced
from hypothesis import given
from hypothesis import strategies as st

from pipeline import Pipeline
from stages import stage
from workers.process import arena as arena_module
from workers.process import link as link_module
from workers.process.arena import LARGE, Arena
from workers.process.memory import Memory
from workers.process.packer import Packer
from workers.process.wire import FrameReader

MB = 1 << 20


async def through(items: Any, handler: Any, **options: Any) -> list[Any]:
    """What a process stage makes of items, in order."""
    pipeline = Pipeline(items) >> stage(run_in="process", ordered=True, name="it", **options)(handler)
    result = await asyncio.wait_for(pipeline.collect(), LIMIT)
    assert isinstance(result, list), result
    assert_balanced(pipeline.snapshot())
    assert pipeline.snapshot().stages[0].failed == 0
    return result


@pytest.fixture
def in_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of everything that goes through the pipes, either way."""
    sizes: list[int] = []
    make, feed = link_module.frame, FrameReader.feed

    def made(kind: Any, content: Any) -> bytes:
        data = make(kind, content)
        sizes.append(len(data))
        return data

    def fed(self: FrameReader, chunk: bytes) -> list[Any]:
        sizes.append(len(chunk))
        return feed(self, chunk)

    monkeypatch.setattr(link_module, "frame", made)
    monkeypatch.setattr(FrameReader, "feed", fed)
    return sizes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Arenas in which there is room for two arrays of one megabyte."""
    monkeypatch.setattr(arena_module, "_SIZE", 2 * MB)
    return 2 * MB


# --- what goes where


async def test_arrays_do_not_go_through_the_pipe(in_pipe: list[int]) -> None:
    arrays = [np.full(MB, n, dtype=np.uint8) for n in range(20)]
    for n, got in enumerate(await through(arrays, lambda array: array + 1)):
        np.testing.assert_array_equal(got, arrays[n] + 1)
    assert sum(in_pipe) < 100_000


@pytest.mark.parametrize("size", [LARGE - 1, LARGE, MB])
async def test_large_bytes_do_not_go_through_the_pipe(in_pipe: list[int], size: int) -> None:
    items = [bytes([n]) * size for n in range(5)]
    assert await through(items, lambda item: item[:1] + item[1:]) == items
    assert (sum(in_pipe) < 20_000) == (size >= LARGE)


@dataclasses.dataclass
class Frame:
    pixels: Any
    label: str


ARRAYS: dict[str, Any] = {
    "vector": np.arange(MB // 8),
    "matrix": np.arange(MB // 8).reshape(64, -1),
    "Fortran order": np.asfortranarray(np.arange(MB // 8).reshape(64, -1)),
    "every other": np.arange(MB // 4)[::2],
    "backwards": np.arange(MB // 8)[::-1],
    "transposed part": np.arange(MB // 4).reshape(512, -1)[3:, ::3].T,
    "bytes": np.frombuffer(bytes(range(256)) * 512, dtype=np.uint8),
    "objects": np.array([str(n) for n in range(40_000)], dtype=object),
    "records": np.zeros(40_000, dtype=[("x", "f8"), ("name", "U4")]),
    "large number of dimensions": np.zeros((2,) * 17),
    "nothing": np.zeros((0, 5)),
    "one number": np.float64(1.5),
    "in a list, twice": [np.ones(MB // 8), np.zeros(MB // 8)],
    "the same, twice": [ARRAY := np.ones(MB // 8), ARRAY],
    "in a dataclass": Frame(np.ones(MB // 8), "one"),
    "in a dict with small ones": {"large": np.ones(MB // 8), "small": np.ones(3), "text": "x"},
}


def _leaves(value: Any) -> list[Any]:
    match value:
        case list():
            return [leaf for each in value for leaf in _leaves(each)]
        case dict():
            return [leaf for each in value.values() for leaf in _leaves(each)]
        case Frame():
            return [value.pixels, value.label]
    return [value]


@pytest.mark.parametrize("name", ARRAYS)
async def test_arrays_of_every_kind_arrive_as_they_were_sent(name: str) -> None:
    item = ARRAYS[name]
    for got in await through([item] * 3, lambda item: item):
        assert type(got) is type(item)
        for one, other in zip(_leaves(got), _leaves(item), strict=True):
            np.testing.assert_array_equal(one, other)
            if isinstance(other, np.ndarray):
                assert (one.dtype, one.shape, one.flags.writeable) == (other.dtype, other.shape, other.flags.writeable)


@pytest.mark.parametrize("size", [10, MB])
@pytest.mark.parametrize("kind", [bytes, bytearray])
async def test_a_bare_buffer_arrives_as_what_it_is_a_buffer_of(kind: type, size: int) -> None:
    data = kind(b"\x07" * size)
    (got,) = await through([pickle.PickleBuffer(data)], lambda item: (type(item), item))
    assert got == (kind, data)


@pytest.mark.parametrize("size", [10, MB])
async def test_a_bare_buffer_comes_back_as_what_it_is_a_buffer_of(size: int) -> None:
    outputs = await through([1, 2], lambda n: pickle.PickleBuffer(bytearray(size) if n == 1 else bytes(size)))
    assert [type(output) for output in outputs] == [bytearray, bytes]
    assert outputs == [bytes(size)] * 2


# --- who owns what


async def test_a_worker_may_write_into_what_it_gets_and_the_sender_does_not_see_it() -> None:
    arrays = [np.zeros(MB // 8) for _ in range(10)]

    def fill(array: Any) -> Any:
        array += 1
        return array

    for got in await through(arrays, fill):
        np.testing.assert_array_equal(got, np.ones(MB // 8))
        got += 1  # and the output is the consumer's own
    assert all(not array.any() for array in arrays)


async def test_arrays_that_are_read_only_stay_so() -> None:
    array = np.ones(MB // 8)
    array.flags.writeable = False
    assert await through([array], lambda array: array.flags.writeable) == [False]


async def test_what_a_worker_keeps_stays_as_it_was() -> None:
    def keep(array: Any, state: Any) -> list[int]:
        state.values.setdefault("kept", []).append(array[1:-1])  # a part keeps the whole
        del array
        gc.collect()
        return [int(kept[0]) for kept in state.values["kept"]]

    outputs = await through([np.full(MB, n, dtype=np.uint8) for n in range(30)], keep)
    assert outputs[-1] == list(range(30))


async def test_outputs_stay_as_they_were_while_others_arrive_and_after_the_run() -> None:
    outputs = await through(range(300), lambda n: np.full(100_000, n % 251, dtype=np.uint8))
    kept = outputs[::2]
    del outputs
    again = await through(range(100), lambda n: np.full(100_000, 255, dtype=np.uint8))
    assert [int(array.max()) for array in kept] == [n % 251 for n in range(0, 300, 2)]
    assert [int(array.min()) for array in kept] == [n % 251 for n in range(0, 300, 2)]
    assert len(again) == 100


async def test_generators_send_arrays_too(in_pipe: list[int]) -> None:
    def slices(array: Any) -> Iterator[Any]:
        for row in range(4):
            yield array[row]

    matrix = np.arange(MB).reshape(4, -1)
    outputs = await through([matrix, matrix], slices)
    np.testing.assert_array_equal(np.array(outputs), np.concatenate([matrix, matrix]))
    assert sum(in_pipe) < 100_000


# --- no room, no memory, no worker


@pytest.mark.parametrize("size", [MB, 5 * MB])
async def test_what_there_is_no_room_for_goes_through_the_pipe(small: int, in_pipe: list[int], size: int) -> None:
    arrays = [np.full(size, n, dtype=np.uint8) for n in range(20)]
    for array, got in zip(arrays, await through(arrays, lambda array: array + 1), strict=True):
        np.testing.assert_array_equal(got, array + 1)
    if size > small:
        assert sum(in_pipe) > 2 * 20 * size


async def test_a_worker_that_keeps_everything_fills_its_arena_and_goes_on(small: int) -> None:
    def keep(array: Any, state: Any) -> int:
        state.values.setdefault("kept", []).append(array)
        return sum(int(kept[0]) for kept in state.values["kept"])

    assert (await through([np.ones(MB, dtype=np.uint8)] * 12, keep))[-1] == 12


async def test_without_shared_memory_everything_goes_through_the_pipe(monkeypatch: pytest.MonkeyPatch, in_pipe: list[int]) -> None:
    monkeypatch.setattr(Arena, "make", classmethod(lambda _: None))
    (got,) = await through([np.ones(MB, dtype=np.uint8)], lambda array: array + 1)
    assert int(got.sum()) == 2 * MB
    assert sum(in_pipe) > 2 * MB


async def test_a_worker_that_cannot_map_the_memory_is_sent_everything_through_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Arena.make

    def too_large_for_the_worker(_: Any) -> Arena | None:
        arena = make()
        assert arena is not None
        assert arena._descriptor is not None
        os.ftruncate(arena._descriptor, 0)  # an empty file cannot be mapped
        return arena

    monkeypatch.setattr(Arena, "make", classmethod(too_large_for_the_worker))
    (got,) = await through([np.ones(MB, dtype=np.uint8)], lambda array: array + 1)
    assert int(got.sum()) == 2 * MB


async def test_a_worker_killed_with_blocks_in_its_hands_costs_its_item_and_leaves_nothing(tmp_path: Path) -> None:
    died = Flag(tmp_path / "died")

    def dies_once(array: Any, state: Any) -> int:
        state.values.setdefault("kept", []).append(array)
        if array[0] == 10 and not died.is_set():
            died.set()
            os.kill(os.getpid(), signal.SIGKILL)
        return int(array[0])

    arrays = [np.full(MB, n, dtype=np.uint8) for n in range(40)]
    pipeline = Pipeline(arrays) >> stage(run_in="process", ordered=True, concurrency=2)(dies_once)
    assert await asyncio.wait_for(pipeline.collect(), LIMIT) == [n for n in range(40) if n != 10]
    assert pipeline.snapshot().stages[0].lost == 1


async def test_blocks_of_items_that_are_called_back_are_used_again(small: int, tmp_path: Path) -> None:
    go = Flag(tmp_path / "go")

    def waits(array: Any) -> int:
        if array[0] == 100:
            go.wait()
        elif array[0] == 199:
            go.set()
        return int(array[0])

    arrays = [np.full(LARGE, n, dtype=np.uint8) for n in range(200)]
    outputs = await through(arrays, waits, concurrency=2, buffer=500)
    assert outputs == list(range(200))


# --- the pieces


def _write(arena: Arena, size: int, fill: int) -> Any:
    return arena.lend(memoryview(bytes([fill]) * size))


def test_blocks_that_are_lent_do_not_overlap_and_come_back_in_any_order() -> None:
    @given(st.lists(st.tuples(st.integers(1, 3 * MB), st.integers(0, 30)), max_size=40))
    def check(steps: list[tuple[int, int]]) -> None:
        arena = Arena.make()
        assert arena is not None
        total = list(arena._free)
        lent: list[tuple[Any, int]] = []
        for number, (size, victim) in enumerate(steps):
            block = _write(arena, size, number)
            if block is not None:
                lent.append((block, number))
            if lent and victim < len(lent):
                arena.give_back(lent.pop(victim)[0])
            for kept, fill in lent:
                with arena.read(kept) as data:
                    assert data[0] == data[-1] == fill
        for block, _ in lent:
            arena.give_back(block)
        arena._take_back_all()
        assert arena._free == total
        arena.close()

    check()


def test_the_lowest_place_is_lent_first() -> None:
    arena = Arena.make()
    assert arena is not None
    first, second = _write(arena, MB, 1), _write(arena, MB, 2)
    arena.give_back(first)
    assert _write(arena, MB, 3)[1] == first[1]
    arena.give_back(second)
    arena.close()


def test_a_view_gives_its_block_back_when_nothing_refers_to_it() -> None:
    arena = Arena.make()
    assert arena is not None
    block = _write(arena, MB, 1)
    view = arena.view(block)
    array = np.frombuffer(view, dtype=np.uint8)
    part = memoryview(view)[10:20].toreadonly()
    del view
    assert not arena._bytes[block[0]]
    del array
    assert not arena._bytes[block[0]]
    del part
    assert arena._bytes[block[0]]
    arena.close()


def test_a_pickle_that_fails_keeps_no_block() -> None:
    arena = Arena.make()
    assert arena is not None
    packer = Packer(arena, None)
    with pytest.raises(Exception, match="pickle"):
        packer.box([np.ones(MB), (n for n in ())])
    arena._take_back_all()
    assert not arena._lent
    arena.close()


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    memory = Memory()
    first = np.frombuffer(memory.copy(memoryview(b"a" * MB)), dtype=np.uint8)
    second = np.frombuffer(memory.copy(memoryview(b"b" * MB)), dtype=np.uint8)
    place = first.ctypes.data
    part = first[5:6]
    del first
    third = np.frombuffer(memory.copy(memoryview(b"c" * MB)), dtype=np.uint8)
    assert third.ctypes.data != place
    del part
    fourth = np.frombuffer(memory.copy(memoryview(b"d" * MB)), dtype=np.uint8)
    assert fourth.ctypes.data == place
    assert [chr(array[0]) for array in (second, third, fourth)] == ["b", "c", "d"]


def test_memory_that_is_closed_keeps_nothing() -> None:
    memory = Memory()
    copy = memory.copy(memoryview(b"a" * MB))
    memory.close()
    assert bytes(copy[:3]) == b"aaa"
    del copy
    assert not memory._free
