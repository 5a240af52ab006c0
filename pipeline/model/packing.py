"""Packed sequences: token rows laid end to end, with no padding between them.

A batch of N sequences is one vector of T token ids and N+1 offsets; sequence i is `ids[offsets[i]:offsets[i + 1]]`.
Linear layers and norms run on the T real tokens; only attention needs sequences side by side, so only there are
they padded. Embedding three texts of 2, 5 and 1 tokens costs 8 token rows in the linear layers, not 15.

    >>> pack([[7, 8], [9], []])
    Packed(ids=tensor([7, 8, 9]), offsets=tensor([0, 2, 3, 3]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """`ids` (T,) int64 token ids; `offsets` (N + 1,) int64, from 0 to T."""

    ids: Tensor
    offsets: Tensor

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
    return Packed(torch.from_numpy(ids), torch.from_numpy(offsets))


def join(first: Packed, second: Packed) -> Packed:
    """The sequences of both, one after the other."""
    offsets = torch.cat([first.offsets, second.offsets[1:] + first.offsets[-1]])
    return Packed(torch.cat([first.ids, second.ids]), offsets)


@dataclass(frozen=True)
class Layout:
    """Where each packed token sits: its sequence, its position there, and the (N, L) mask of real tokens."""

    lengths: Tensor  # (N,)
    sequence: Tensor  # (T,)
    position: Tensor  # (T,)
    mask: Tensor  # (N, L) bool

    @classmethod
    def of(cls, batch: Packed) -> Layout:
        lengths = batch.lengths
        sequence = torch.repeat_interleave(torch.arange(len(batch), device=lengths.device), lengths)
        position = torch.arange(len(batch.ids), device=lengths.device) - batch.offsets[:-1][sequence]
        longest = int(lengths.max()) if len(batch) else 0
        mask = torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]
        return cls(lengths, sequence, position, mask)

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) → (N, L, ...), zeros where there is no token."""
        padded = x.new_zeros(*self.mask.shape, *x.shape[1:])
        padded[self.sequence, self.position] = x
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        """(N, L, ...) → (T, ...)."""
        return x[self.sequence, self.position]
