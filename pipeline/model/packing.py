"""Packed sequences: the tokens of a batch end to end, without padding.

A batch of N sequences is a vector of T token ids and N + 1 offsets; sequence i is `ids[offsets[i]:offsets[i + 1]]`.
Cost: linear layers and norms process only real tokens: texts of 2, 5 and 1 tokens are 8 rows instead of 15.

    >>> pack([[7, 8], [9], []])
    Packed(ids=tensor([7, 8, 9]), offsets=tensor([0, 2, 3, 3]))

Only attention treats sequences separately. It copies nothing if sequences of equal length are adjacent, so a backbone
runs its layers on the batch in that order (`Layout.by_length`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """`ids` (T,) int64 token ids; `offsets` (N + 1,) int64, from 0 to T."""

    ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, ids: np.ndarray, offsets: np.ndarray) -> Packed:
        """From (T,) and (N + 1,) integers of any type; int64 arrays are shared, not copied."""
        return cls(*(torch.from_numpy(np.asarray(each, np.int64)) for each in (ids, offsets)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens in each sequence."""
        return self.offsets.diff()

    def to(self, device: torch.device | str) -> Packed:
        return Packed(self.ids.to(device, non_blocking=True), self.offsets.to(device, non_blocking=True))

    def slice(self, start: int, stop: int) -> Packed:
        """Sequences `start` to `stop`, as views."""
        offsets = self.offsets[start : stop + 1]
        return Packed(self.ids[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Lay lists of token ids end to end."""
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(s) for s in sequences], out=offsets[1:])
    ids = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=int(offsets[-1]))
    return Packed.of(ids, offsets)


def join(first: Packed, second: Packed) -> Packed:
    """The sequences of `first`, then those of `second`."""
    offsets = torch.cat([first.offsets, second.offsets[1:] + first.offsets[-1]])
    return Packed(torch.cat([first.ids, second.ids]), offsets)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each packed token belongs. Computed lazily and cached, because a token table rarely needs it."""

    offsets: Tensor  # (N + 1,)
    num_tokens: int  # T
    _groups: WeakKeyDictionary[Layout, Groups] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    @classmethod
    def of(cls, batch: Packed) -> Layout:
        return cls(batch.offsets, len(batch.ids))

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) tokens in each sequence."""
        return self.offsets.diff()

    @cached_property
    def host_lengths(self) -> np.ndarray:
        """`lengths` on the host; on a GPU this synchronises."""
        return self.lengths.cpu().numpy()

    @cached_property
    def longest(self) -> int:
        """L, the length of the longest sequence; 0 for an empty batch."""
        return int(self.host_lengths.max(initial=0))

    @cached_property
    def sequence(self) -> Tensor:
        """(T,) the index of each token's sequence."""
        numbers = torch.arange(len(self.lengths), device=self.offsets.device)
        return torch.repeat_interleave(numbers, self.lengths, output_size=self.num_tokens)

    @cached_property
    def position(self) -> Tensor:
        """(T,) each token's position in its sequence, from 0."""
        return torch.arange(self.num_tokens, device=self.offsets.device) - self.offsets[self.sequence]

    @cached_property
    def mask(self) -> Tensor:
        """(N, L) bool: true where `pad` puts a token."""
        return torch.arange(self.longest, device=self.offsets.device)[None, :] < self.lengths[:, None]

    @cached_property
    def cells(self) -> Tensor:
        """(T,) each token's row among the N * L rows of padded sequences."""
        return self.sequence * self.longest + self.position

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) → (N, L, ...), zeros where there is no token."""
        shape = tuple(self.mask.shape)
        return scatter_rows(x, self.cells, shape[0] * shape[1]).unflatten(0, shape)

    def unpad(self, x: Tensor) -> Tensor:
        """(N, L, ...) → (T, ...)."""
        return gather_rows(x.flatten(0, 1), self.cells)

    @cached_property
    def by_length(self) -> tuple[Tensor, Layout] | None:
        """(T,) row indices that sort sequences by length, and the sorted layout.

        None if the batch is already sorted, and on a GPU, where attention takes any order.
        """
        lengths = self.host_lengths
        if self.offsets.is_cuda or (np.diff(lengths) >= 0).all():
            return None
        order = np.argsort(lengths, kind="stable")
        offsets = np.concatenate([[0], lengths[order].cumsum()])
        return torch.from_numpy(_rows(lengths, order)), Layout(torch.from_numpy(offsets), self.num_tokens)

    def groups(self, keys: Layout) -> Groups:
        """Sequences grouped for attention from these queries to `keys`. Cached, so layers share it."""
        if keys not in self._groups:
            self._groups[keys] = Groups.of(self.host_lengths, keys.host_lengths)
        return self._groups[keys]


@dataclass(frozen=True)
class Groups:
    """Groups of sequences with equal numbers of queries and of keys."""

    shapes: list[tuple[int, int, int]]
    """Per group: number of sequences, queries per sequence, keys per sequence."""
    query_rows: Tensor | None
    """(T,) row indices that make the sequences of a group adjacent; None if they already are."""
    key_rows: Tensor | None

    @classmethod
    def of(cls, queries: np.ndarray, keys: np.ndarray) -> Groups:
        """From the (N,) lengths of queries and of keys."""
        order = np.lexsort((keys, queries))
        pairs = zip(queries[order].tolist(), keys[order].tolist(), strict=True)
        shapes = [(len(list(same)), *pair) for pair, same in groupby(pairs)]
        rows = (_rows(lengths, order) for lengths in (queries, keys))
        return cls(shapes, *(None if (np.diff(r) == 1).all() else torch.from_numpy(r) for r in rows))


def _rows(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(T,) token rows of the sequences in `order`: lengths [2, 1], order [1, 0] → [2, 0, 1]."""
    starts, lengths = (lengths.cumsum() - lengths)[order], lengths[order]
    return np.repeat(starts - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` for distinct rows. The gradient is copied instead of accumulated, so it is deterministic."""
    return _GatherRows.apply(x, rows)  # type: ignore[no-any-return, no-untyped-call]


def scatter_rows(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """(size, ...): the rows of `x` at the distinct indices `rows`, zeros elsewhere."""
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, rows, x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(rows)
        ctx.size = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return scatter_rows(gradient, ctx.saved_tensors[0], ctx.size), None
