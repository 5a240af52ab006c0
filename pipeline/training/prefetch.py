"""Prepare batches in a background thread while the device computes.

    with closing(Prefetch(feed.batches(start, stop), prepare, device)) as batches:
        for batch in batches: ...                  # prepare(table) for each table, in order
        batches.waited_s                           # total seconds that the loop has waited for batches

    def prepare(rows):                             # on a GPU, its copies run on a separate stream
        return to_device([learner.prepare(to_batch(rows), seed)], device)

At most `depth` batches are prepared ahead, and a table is read only when there is room for its batch. An error in the
feed or in `prepare` is raised when the loop asks for the next batch. Closing ends the thread and the feed. Cost: the
thread shares the interpreter with the loop, and on a GPU the batches ahead take memory.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.model.batch import EMPTY, Batch
from pipeline.model.packing import Packed
from pipeline.model.views import Views

CLOSING_S = 30.0
"""How long closing waits for a pending read. After that, the thread ends when the read does. Ours."""

FIELDS = ("anchor", "positive", "text")

T = TypeVar("T")


@dataclass(frozen=True)
class _Made(Generic[T]):
    batch: T
    copied: torch.cuda.Event | None


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None = None


class Prefetch(Iterator[T]):
    """Iterates over `prepare(table)` of each table, in order. Close it after use; garbage collection closes it too."""

    def __init__(
        self,
        batches: Iterator[pa.Table],
        prepare: Callable[[pa.Table], T],
        device: torch.device | str = "cpu",
        depth: int = 2,
    ) -> None:
        self.waited_s = 0.0
        self._device = torch.device(device)
        self._made: SimpleQueue[_Made[T] | _Ended] = SimpleQueue()
        self._room, self._stop = threading.Semaphore(depth), threading.Event()
        self._thread = threading.Thread(
            target=_work,
            args=(batches, prepare, self._device, self._made, self._room, self._stop),
            name="prefetch",
            daemon=True,
        )
        self.close = weakref.finalize(self, _end, self._thread, self._room, self._stop)
        """End the thread and the feed, and drop prepared batches. A second call does nothing."""
        self._thread.start()

    def __next__(self) -> T:
        if not self.close.alive:
            raise StopIteration
        began = time.monotonic()
        made = self._made.get()
        self.waited_s += time.monotonic() - began
        if isinstance(made, _Ended):
            self.close()
            if made.error is not None:
                raise made.error
            raise StopIteration
        self._room.release()
        if made.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(made.copied)
            _map(made.batch, lambda tensor: _used_on(stream, tensor))
        return made.batch


def _used_on(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Keep the allocator from reusing the memory on the copy stream while `stream` still reads it."""
    if tensor.is_cuda:
        tensor.record_stream(stream)
    return tensor


def _work(
    batches: Iterator[pa.Table],
    prepare: Callable[[pa.Table], T],
    device: torch.device,
    made: SimpleQueue[_Made[T] | _Ended],
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Run the thread. It holds no reference to its Prefetch, so that can be garbage collected."""
    end = _Ended()
    try:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream), _closing(batches):  # type: ignore[no-untyped-call]
            while room.acquire() and not stop.is_set():
                rows = next(batches, None)
                if rows is None:
                    break
                batch = prepare(rows)
                made.put(_Made(batch, None if stream is None else stream.record_event()))
    except BaseException as error:  # the loop raises it
        end = _Ended(error)
    made.put(end)


@contextmanager
def _closing(batches: Iterator[pa.Table]) -> Iterator[None]:
    """Close a generator in the thread that runs it; in another thread, closing a running generator fails."""
    try:
        yield
    finally:
        if isinstance(batches, Generator):
            batches.close()


def _end(thread: threading.Thread, room: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    room.release()
    if thread is not threading.current_thread():  # garbage collection may run in the thread itself
        thread.join(CLOSING_S)


def to_device(value: T, device: torch.device | str) -> T:
    """Copy the tensors in nested lists, tuples, dictionaries and dataclasses to `device`.

    Copies to a GPU are asynchronous, through pinned memory.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return _map(value, lambda tensor: tensor.to(device))
    return _map(value, lambda tensor: (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(each, change) for each in value)
    if isinstance(value, dict):
        return {name: _map(each, change) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in fields(value) if each.init]
        return replace(value, **{name: _map(getattr(value, name), change) for name in names})
    return value


def to_batch(rows: pa.Table, hard_negatives: int = 0, views: Views | None = None) -> Batch:
    """A batch from a table of `id` and token ids, with the first `hard_negatives` negatives of each row.

    Columns `teacher_<field>` hold the teacher's vectors, and `teacher_scores` given scores. `views` makes two views of
    each text in the rows' `epoch`; rows without that column always have the same ones.
    """
    fields = {name: packed(rows[name]) for name in FIELDS if name in rows.column_names}
    teacher = {name: _matrix(rows[column]) for name in FIELDS if (column := f"teacher_{name}") in rows.column_names}
    ids = rows["id"].to_pylist()
    if views is not None:
        epoch = rows["epoch"][0].as_py() if "epoch" in rows.column_names else 0
        return views.of(Batch(ids, fields, EMPTY, [0] * len(ids), teacher=teacher), rows["source"].to_pylist(), epoch)
    if not hard_negatives or "negatives" not in rows.column_names:
        return Batch(ids, fields, EMPTY, [0] * len(ids), teacher=teacher)
    lists = _first_of_each(rows["negatives"], hard_negatives)
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_pylist()
    if "teacher_scores" in rows.column_names:
        teacher["scores"] = _padded(rows["teacher_scores"], 1 + hard_negatives)
    if "teacher_negatives" in rows.column_names:
        vectors = _first_of_each(rows["teacher_negatives"], hard_negatives)
        teacher["negatives"] = _matrix(pa.chunked_array([vectors.drop_null().flatten()]))
    return Batch(ids, fields, packed(pa.chunked_array([lists.drop_null().flatten()])), counts, teacher=teacher)


def _first_of_each(column: pa.ChunkedArray, most: int) -> pa.ListArray:
    """The first `most` items of each list; null stays null."""
    return pc.list_slice(column.combine_chunks(), 0, most)


def _padded(column: pa.ChunkedArray, width: int) -> Tensor:
    """(n, width) from lists of numbers, with zeros after their end."""
    lists = _first_of_each(column, width)
    lengths = pc.list_value_length(lists).to_numpy()
    padded = np.zeros((len(lists), width), np.float32)
    padded[np.arange(width) < lengths[:, None]] = lists.flatten()
    return torch.from_numpy(padded)


def _matrix(column: pa.ChunkedArray) -> Tensor:
    """(n, E) from a column of vectors."""
    vectors = column.combine_chunks()
    return torch.from_numpy(np.array(vectors.flatten()).reshape(len(vectors), vectors.type.list_size))


def packed(column: pa.ChunkedArray) -> Packed:
    """A column of token id lists as packed sequences."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    return Packed.of(lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])
