"""Batches made ready in a thread: in order, not too early, and with nothing left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.model.batch import Batch
from pipeline.training.prefetch import Prefetch, to_batch, to_device


class Source:
    """Tables of one number each; notes how many were asked for, by whom, and whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.asked = 0
        self.closed_by: str | None = None

    def __iter__(self) -> Iterator[pa.Table]:
        try:
            for number in range(self.count):
                self.asked += 1
                if number == self.fails_at:
                    raise OSError(f"table {number} cannot be read")
                yield pa.table({"step": [number]})
        finally:
            self.closed_by = threading.current_thread().name


def number(rows: pa.Table) -> int:
    return int(rows["step"][0].as_py())


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if thread.name == "prefetch"] == []


@pytest.mark.parametrize("count", [0, 1, 7])
def test_all_tables_in_order(count: int) -> None:
    for depth in (1, 2, 5):
        source = Source(count)
        batches = Prefetch(iter(source), number, depth=depth)
        assert list(batches) == list(range(count))
        assert source.asked == count
        assert next(batches, None) is None
        assert batches.waited_s > 0


@pytest.mark.parametrize("depth", [1, 3])
def test_nothing_is_read_beyond_the_depth(depth: int) -> None:
    """The thread waits before it asks for a table, not with one in its hands."""
    source, made = Source(100), threading.Semaphore(0)

    with closing(Prefetch(iter(source), lambda rows: made.release() or number(rows), depth=depth)) as batches:
        for taken in range(5):
            for _ in range(depth if taken == 0 else 1):
                assert made.acquire(timeout=10)
            assert not made.acquire(timeout=0.02)
            assert source.asked == taken + depth
            assert next(batches) == taken


def test_preparing_runs_beside_the_loop() -> None:
    """The next batch is prepared while this one is worked on: each side waits here for the other to have begun."""
    begun = [threading.Event() for _ in range(4)]

    def prepare(rows: pa.Table) -> int:
        begun[number(rows)].set()
        return number(rows)

    with closing(Prefetch(iter(Source(4)), prepare, depth=1)) as batches:
        for batch in batches:
            assert batch == 3 or begun[batch + 1].wait(10)


@pytest.mark.parametrize("where", ["source", "prepare"])
def test_what_the_thread_raises_is_raised_in_the_loop(where: str) -> None:
    """After the batches before it, with the traceback of where it came from."""

    def prepare(rows: pa.Table) -> int:
        if where == "prepare" and number(rows) == 3:
            raise OSError("table 3 cannot be read")
        return number(rows)

    source = Source(10, fails_at=3 if where == "source" else None)
    batches = Prefetch(iter(source), prepare)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="table 3 cannot be read") as raised:
        next(batches)
    assert raised.traceback[-1].name == ("prepare" if where == "prepare" else "__iter__")
    assert source.closed_by == "prefetch"
    assert next(batches, None) is None


class Interrupt(BaseException):
    """As a Ctrl-C is one, which no `except Exception` catches."""


@pytest.mark.parametrize("how", [None, ValueError, Interrupt])
def test_leaving_the_loop_closes_the_feed(how: type[BaseException] | None) -> None:
    source = Source(1_000_000)
    with pytest.raises(how) if how else nullcontext(), closing(Prefetch(iter(source), number)) as batches:
        for batch in batches:
            if batch == 5 and how:
                raise how
            if batch == 5:
                break
    assert source.closed_by == "prefetch"
    assert source.asked <= 8


def test_closing_before_the_first_batch_twice_and_while_it_waits() -> None:
    source, go = Source(10), threading.Event()

    def slow(rows: pa.Table) -> int:
        go.wait(10)
        return number(rows)

    batches = Prefetch(iter(source), slow)
    threading.Timer(0.05, go.set).start()
    batches.close()
    batches.close()
    assert source.closed_by == "prefetch"
    assert source.asked <= 1
    assert list(batches) == []


def test_what_nobody_refers_to_is_closed_and_a_list_s_iterator_has_nothing_to_close() -> None:
    source = Source(1_000_000)
    batches = Prefetch(iter(source), number)
    assert next(batches) == 0
    del batches
    gc.collect()
    assert source.closed_by == "prefetch"
    with closing(Prefetch(iter([pa.table({"step": [4]})]), number)) as batches:
        assert list(batches) == [4]


@dataclass(frozen=True)
class Nested:
    name: str
    tensors: list[torch.Tensor]
    by_name: dict[str, torch.Tensor | None]
    pair: tuple[int, torch.Tensor]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, Nested):
        return [*value.tensors, *(each for each in value.by_name.values() if each is not None), value.pair[1]]
    assert isinstance(value, Batch)
    return [part for each in (*value.fields.values(), value.negatives) for part in (each.ids, each.offsets)]


def nested() -> Nested:
    return Nested("n", [torch.arange(3)], {"a": torch.ones(2), "b": None}, (7, torch.zeros(1)))


def test_to_device_keeps_the_shape_of_things() -> None:
    """`meta` stands for a device that is not the host's."""
    moved = to_device(nested(), "meta")
    assert (moved.name, moved.by_name["b"], moved.pair[0]) == ("n", None, 7)
    assert all(each.device.type == "meta" for each in tensors(moved))
    tokens = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
    batch = to_device(to_batch(pa.table({"id": ["x", "y"], "anchor": tokens, "positive": tokens})), "meta")
    assert batch.ids == ["x", "y"]
    assert all(each.device.type == "meta" for each in tensors(batch))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies on a stream of their own need a GPU")
def test_copies_to_a_gpu_are_whole_when_they_are_used() -> None:
    """Each batch is summed on the device while the next are copied; memory is given back and used again throughout."""

    def prepare(rows: pa.Table) -> list[torch.Tensor]:
        return to_device([torch.full((1 << 22,), number(rows), dtype=torch.int64)], "cuda")

    with closing(Prefetch(iter(Source(50)), prepare, "cuda")) as batches:
        for expected, (each,) in enumerate(batches):
            assert each.is_cuda
            assert torch.equal(each.sum().cpu(), torch.tensor(expected << 22))
