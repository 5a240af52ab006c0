"""Which texts are a record's hard negatives: near its anchor, and still clearly further than its positive.

    block = Block(keys=[3, 5, 9], vectors)                 # texts that may be chosen, by the hash of each
    chosen = choose(anchors, own, known, [block], Mining())
    # [array([5]), array([9, 3])]: by anchor, keys of texts, the most alike first

Texts that are known as right answers are out before anything is ranked; then the nearest are ranked by cosine, those
outside the window of ranks or beyond a bound are left out, and the first few stay. A tie goes to the larger key, so
what is chosen does not depend on how texts are cut into blocks. Cost: B x n products of D numbers a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import Mining
from pipeline.index.nearest import Floats, Found, Ints, merged, nearest_in_block

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Block:
    """Distinct texts by rising key, (n,), and their (n, D) unit vectors."""

    keys: Keys
    vectors: Floats

    def places(self, keys: Keys) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Where each key stands in the block, and whether it does."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return places, self.keys[places] == keys


@dataclass(frozen=True)
class Answers:
    """Which texts answer which anchor: pairs of keys, by rising anchor."""

    anchors: Keys
    texts: Keys

    @classmethod
    def of(cls, anchors: Keys, texts: Keys) -> Answers:
        order = np.argsort(anchors, kind="stable")
        return cls(anchors[order], texts[order])

    def to(self, anchors: Keys) -> tuple[Ints, Keys]:
        """All pairs of an anchor's row and the key of a text that answers it."""
        first, last = (np.searchsorted(self.anchors, anchors, side) for side in ("left", "right"))
        counts = last - first
        rows = np.repeat(np.arange(len(anchors)), counts)
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.texts[np.repeat(first, counts) + steps]


def choose(anchors: Floats, own: Keys, known: tuple[Ints, Keys], blocks: Iterable[Block], wanted: Mining) -> list[Keys]:
    """Keys of the negatives of each of B anchors, (B, D) unit vectors; `own` are (B,) keys of their positives.

    `known` are rows of anchors and keys of the texts that answer them; the positive's own counts as known.
    """
    rows, keys = np.concatenate([np.arange(len(anchors)), known[0]]), np.concatenate([own, known[1]])
    found, positive = Found.none(len(anchors)), np.full(len(anchors), -np.inf, dtype=np.float32)
    for block in blocks:
        places, there = block.places(own)
        right = block.vectors[places[there]].astype(np.float64)
        positive[there] = (anchors[there] * right).sum(axis=1)
        places, there = block.places(keys)
        excluded = rows[there], places[there]
        best = nearest_in_block(anchors, block.vectors, block.keys, wanted.range_max, excluded)
        found = merged(found, best, wanted.range_max)
    if not found.ids.shape[1]:
        return [np.empty(0, np.uint64) for _ in anchors]
    allowed = _allowed(found.scores, positive, wanted)
    allowed[:, : wanted.range_min] = False
    allowed &= allowed.cumsum(axis=1) <= wanted.num_negatives
    return [keys[kept] for keys, kept in zip(found.ids, allowed, strict=True)]


def _allowed(scores: Floats, positive: Floats, wanted: Mining) -> npt.NDArray[np.bool_]:
    """(B, k): whether a score is within all bounds."""
    allowed = np.isfinite(scores)
    if wanted.relative_margin is not None:
        # A share of the positive's score; where that is below zero, as far below it.
        below = positive - (1 - wanted.relative_margin) * np.abs(positive)
        allowed &= scores <= below[:, None]
    if wanted.min_score is not None:
        allowed &= scores >= wanted.min_score
    if wanted.max_score is not None:
        allowed &= scores <= wanted.max_score
    return allowed
