"""Corrupts packed token rows in numpy: deletes tokens, masks spans, or masks tokens.

    texts = Tokens(ids=[2 10 11 12 13 3 | 2 14 3], offsets=[0 6 9])        # [CLS] is 2, [SEP] 3, [MASK] 4
    delete_tokens(texts, keys=[1 2], seed=7, special={2, 3})               # 2 11 12 3 | 2 14 3
    mask_spans(texts, keys, 7, mask_id=4, special={2, 3}, density=0.5)     # inputs   2 10 4 13 3 | 2 14 3
                                                                           # targets  4 11 12 |
    mask_tokens(texts, keys, 7, mask_id=4, special={2, 3}, vocab_size=20)  # tokens   2 10 11 12 4 3 | 2 14 3
                                                                           # positions 4, labels 13

A token's corruption depends only on its row's key, the seed and its position, not on the batch, row or worker. Pass the
step as the seed to corrupt a record differently each time, and give each window of a record its own key. `special`
tokens never change.

Cost: about ten passes over the tokens; `mask_spans` also sorts them, about 0.5 s per million tokens.
"""

# Shapes: N rows, T tokens, C of them content tokens (not special).
from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

DELETION_RATIO = 0.6  # TSDAE (Wang et al. 2021), section 3
NOISE_DENSITY = 0.15  # T5 (Raffel et al. 2020), section 3.3.4, also for the next one
MEAN_SPAN_TOKENS = 3.0
MASKING_RATIO = 0.3  # ModernBERT (Warner et al. 2024); more than 15% helps (Wettig et al. 2023, section 3)
KEPT, RANDOM = 0.1, 0.1  # shares of the predicted tokens; the others are masked (BERT, Devlin et al. 2019, section 3.1)

Array = npt.NDArray[Any]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step, 2^64 over the golden ratio
KEEP, KIND, WORD, SPAN, GAP, CROP = range(6)
"""Random decisions; each uses its own sequence of random numbers."""


class Tokens(NamedTuple):
    """Rows of token ids end to end: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Array  # (T,)
    offsets: Array  # (N + 1,)


class Spans(NamedTuple):
    """Rows with each span replaced by a mask, and the spans of each row, each preceded by a mask."""

    inputs: Tokens
    targets: Tokens


class Masked(NamedTuple):
    """Rows with masked tokens, and the positions (among all T) and labels of the tokens to predict."""

    tokens: Tokens
    positions: Array  # (P,)
    labels: Array  # (P,)


def delete_tokens(
    texts: Tokens, keys: Array, seed: int, *, special: Collection[int], ratio: float = DELETION_RATIO
) -> Tokens:
    """Delete each token with probability `ratio`, but keep at least one content token per row.

    `keys`: (N,) 64-bit integers, one per row.
    """
    row, position = _places(texts.offsets)
    content = _content(texts.ids, special)
    chance = np.where(content, uniform(keys, seed, KEEP, row, position), -1.0)
    luckiest = np.full(len(texts.offsets) - 1, -1.0)
    np.maximum.at(luckiest, row, chance)
    return _chosen(texts, ~content | (chance >= ratio) | (chance == luckiest[row]))


def mask_spans(
    texts: Tokens,
    keys: Array,
    seed: int,
    *,
    mask_id: int,
    special: Collection[int],
    density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN_TOKENS,
) -> Spans:
    """T5's span corruption: masks `density` of the content, in spans of `mean_span` tokens on average.

    As in T5, a row's length determines its number of noise tokens and of spans, spans do not touch, and a row of one
    token has none. Two things differ. Spans may be anywhere, whereas T5's rows always end with a span, so short texts
    would lose their end in every epoch. And all sentinels are `mask_id`, whereas T5 has one per span: the n-th mask of
    the inputs stands for the tokens after the n-th mask of the targets. A special token within a span splits it. If
    texts can contain `mask_id`, include it in `special`.
    """
    row, _ = _places(texts.offsets)
    content = np.flatnonzero(_content(texts.ids, special))
    noise = np.zeros(len(texts.ids), dtype=bool)
    noise[content] = _noise(row[content], len(texts.offsets) - 1, keys, seed, density, mean_span)
    begins = noise.copy()
    begins[1:] &= ~noise[:-1] | (row[1:] != row[:-1])
    inputs = Tokens(np.where(begins, mask_id, texts.ids), texts.offsets)
    repeats = noise.astype(np.int64) + begins
    targets = np.repeat(texts.ids, repeats)
    targets[(np.cumsum(repeats) - repeats)[begins]] = mask_id
    return Spans(_chosen(inputs, ~noise | begins), Tokens(targets, _total_before(repeats)[texts.offsets]))


def mask_tokens(
    texts: Tokens,
    keys: Array,
    seed: int,
    *,
    mask_id: int,
    vocab_size: int,
    special: Collection[int],
    ratio: float = MASKING_RATIO,
) -> Masked:
    """Select each token with probability `ratio`; of these, 80% are masked, 10% kept and 10% replaced at random."""
    row, position = _places(texts.offsets)
    chosen = _content(texts.ids, special) & (uniform(keys, seed, KEEP, row, position) < ratio)
    positions = np.flatnonzero(chosen)
    places = row[positions], position[positions]
    kind = uniform(keys, seed, KIND, *places)
    words = np.setdiff1d(np.arange(vocab_size), [*special, mask_id])
    word = words[(uniform(keys, seed, WORD, *places) * len(words)).astype(np.int64)]
    labels = texts.ids[positions]
    ids = texts.ids.copy()
    ids[positions] = np.where(kind < KEPT, labels, np.where(kind < KEPT + RANDOM, word, mask_id))
    return Masked(Tokens(ids, texts.offsets), positions, labels)


def _noise(row: Array, rows: int, keys: Array, seed: int, density: float, mean_span: float) -> Array:
    """(C,) bool: whether each content token is noise.

    A row has n noise tokens and m others. Draw s - 1 of the n - 1 places between noise tokens to split them into s
    spans, and s of the m + 1 gaps around the others to hold one span each.
    """
    length = np.bincount(row, minlength=rows)
    noise = np.clip(np.round(length * density).astype(np.int64), 1, np.maximum(length - 1, 0))
    others = length - noise
    spans = np.minimum(np.maximum(np.round(noise / mean_span).astype(np.int64), 1), np.minimum(noise, others + 1))

    of, place = _places(_total_before(noise))
    lot = uniform(keys, seed, SPAN, of, place)
    lot[place == 0] = -1.0  # a row's first noise token always starts a span
    begins = _lowest(lot, of, place, spans)
    gap_of, gap = _places(_total_before(others + 1))
    taken = gap[_lowest(uniform(keys, seed, GAP, gap_of, gap), gap_of, gap, spans)]

    other_of, other = _places(_total_before(others))
    key = np.concatenate([2 * other + 1, 2 * taken[np.cumsum(begins) - 1]])  # gap i is before the i-th other token
    return np.lexsort((key, np.concatenate([other_of, of]))) >= len(other)  # type: ignore[no-any-return]


def _lowest(lot: Array, row: Array, place: Array, counts: Array) -> Array:
    """(len(row),) bool: the `counts[row]` entries of each row with the lowest lots; `place` is the index in the row."""
    lowest = np.zeros(len(row), dtype=bool)
    lowest[np.lexsort((lot, row))] = place < counts[row]  # sorted by row, so `place` there is the rank
    return lowest


def _places(offsets: Array) -> tuple[Array, Array]:
    """(T,) each: the tokens' rows, and their positions in the row."""
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return row, np.arange(len(row)) - offsets[row]


def _content(ids: Array, special: Collection[int]) -> Array:
    return ~np.isin(ids, list(special))


def _chosen(texts: Tokens, keep: Array) -> Tokens:
    return Tokens(texts.ids[keep], _total_before(keep)[texts.offsets])


def _total_before(counts: Array) -> Array:
    """(n + 1,) cumulative sums, from 0 to the total."""
    return np.concatenate([[0], np.cumsum(counts)])


def uniform(keys: Array, seed: int, decision: int, row: Array, position: Array) -> Array:
    """(len(row),) numbers in [0, 1), from one SplitMix64 sequence per row (Steele et al. 2014, figure 17)."""
    salt = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(decision))
    state = _mix(keys.astype(np.uint64) ^ salt)
    bits = _mix(state[row] + (position.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53  # type: ignore[no-any-return]


def _mix(bits: Array) -> Array:
    """SplitMix64's finaliser: every output bit depends on every input bit. The overflow is intended."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))  # type: ignore[no-any-return]
