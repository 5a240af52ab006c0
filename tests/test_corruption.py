"""Corruption: the same for a record wherever it is, special tokens untouched, and the ratios that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise

import numpy as np
import pytest

from pipeline.model.corruption import Tokens, delete_tokens, mask_spans, mask_tokens

CLS, SEP, MASK, VOCAB = 2, 3, 4, 60
SPECIAL = {CLS, SEP}


def tokens(rows: list[list[int]]) -> Tokens:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return Tokens(np.array([token for row in rows for token in row], dtype=np.int64), offsets)


def rows_of(texts: Tokens) -> list[list[int]]:
    return [row.tolist() for row in np.split(texts.ids, texts.offsets[1:-1])] if len(texts.offsets) > 1 else []


def random_rows(count: int, longest: int = 40) -> tuple[list[list[int]], np.ndarray]:
    """Framed texts of distinct words of 0 to `longest` tokens, and their keys."""
    chance = np.random.default_rng(0)
    rows = [
        [CLS, *(10 + chance.permutation(longest)[: chance.integers(longest + 1)]).tolist(), SEP] for _ in range(count)
    ]
    return rows, chance.integers(-(2**63), 2**63, count)


def deleted(rows: list[list[int]], keys: np.ndarray, seed: int = 0) -> list[object]:
    return list(rows_of(delete_tokens(tokens(rows), keys, seed, special=SPECIAL)))


def spans(rows: list[list[int]], keys: np.ndarray, seed: int = 0) -> list[object]:
    inputs, targets = mask_spans(tokens(rows), keys, seed, mask_id=MASK, special=SPECIAL)
    return list(zip(rows_of(inputs), rows_of(targets), strict=True))


def masked(rows: list[list[int]], keys: np.ndarray, seed: int = 0) -> list[object]:
    texts, positions, labels = mask_tokens(tokens(rows), keys, seed, mask_id=MASK, vocab_size=VOCAB, special=SPECIAL)
    asked = np.full(len(texts.ids), -1)
    asked[positions] = labels
    return list(zip(rows_of(texts), rows_of(Tokens(asked, texts.offsets)), strict=True))


Corrupt = Callable[[list[list[int]], np.ndarray, int], list[object]]
every = pytest.mark.parametrize("corrupt", [deleted, spans, masked])


def test_the_examples_of_the_module() -> None:
    texts, keys = tokens([[CLS, 10, 11, 12, 13, SEP], [CLS, 14, SEP]]), np.array([1, 2])
    assert rows_of(delete_tokens(texts, keys, 7, special=SPECIAL)) == [[CLS, 11, 12, SEP], [CLS, 14, SEP]]
    inputs, targets = mask_spans(texts, keys, 7, mask_id=MASK, special=SPECIAL, density=0.5)
    assert rows_of(inputs) == [[CLS, 10, MASK, 13, SEP], [CLS, 14, SEP]]
    assert rows_of(targets) == [[MASK, 11, 12], []]
    guess = mask_tokens(texts, keys, 7, mask_id=MASK, special=SPECIAL, vocab_size=20)
    assert rows_of(guess.tokens) == [[CLS, 10, 11, 12, MASK, SEP], [CLS, 14, SEP]]
    assert (guess.positions.tolist(), guess.labels.tolist()) == ([4], [13])


@every
def test_a_record_is_corrupted_the_same_way_in_any_batch_and_order(corrupt: Corrupt) -> None:
    rows, keys = random_rows(300)
    whole = corrupt(rows, keys, 5)
    order = np.random.default_rng(1).permutation(len(rows))
    assert corrupt([rows[i] for i in order], keys[order], 5) == [whole[i] for i in order]
    parts = [corrupt(rows[a:b], keys[a:b], 5) for a, b in ((0, 1), (1, 120), (120, 300))]
    assert [row for part in parts for row in part] == whole
    assert corrupt([*rows, []], np.append(keys, 0), 5)[:-1] == whole


@every
def test_another_seed_or_record_is_corrupted_another_way(corrupt: Corrupt) -> None:
    rows, keys = random_rows(300)
    assert sum(a != b for a, b in zip(corrupt(rows, keys, 0), corrupt(rows, keys, 1), strict=True)) > 250
    same = [rows[np.argmax([len(row) for row in rows])]] * len(rows)
    assert len({str(row) for row in corrupt(same, keys, 0)}) > 250


@every
def test_texts_without_content_and_empty_batches(corrupt: Corrupt) -> None:
    assert corrupt([], np.array([], dtype=np.int64), 0) == []
    empty = corrupt([[], [CLS, SEP], [CLS, 9, SEP], []], np.arange(4), 0)
    as_they_were = corrupt([[], [CLS, SEP], []], np.arange(3), 0)
    assert [empty[0], empty[1], empty[3]] == as_they_were
    assert [row[0] if isinstance(row, tuple) else row for row in as_they_were] == [[], [CLS, SEP], []]


def test_deletion_leaves_a_row_of_the_text_and_at_least_one_token_of_it() -> None:
    rows, keys = random_rows(2000)
    kept = rows_of(delete_tokens(tokens(rows), keys, 0, special=SPECIAL))
    for row, left in zip(rows, kept, strict=True):
        assert (left[0], left[-1]) == (CLS, SEP)
        assert [token for token in row if token in set(left)] == left
        assert len(left) > 2 or len(row) == 2
    alone = [[CLS, 9, SEP], [9]] * 500
    assert rows_of(delete_tokens(tokens(alone), np.arange(1000), 0, special=SPECIAL)) == alone


def test_the_share_that_is_deleted() -> None:
    """Within four standard deviations of a binomial's, over 100,000 tokens; every position alike."""
    texts = tokens([list(range(10, 110))] * 1000)
    for ratio in (0.1, 0.6):
        left = delete_tokens(texts, np.arange(1000), 3, special=SPECIAL, ratio=ratio)
        deviation = (ratio * (1 - ratio) / 100_000) ** 0.5
        assert abs(1 - len(left.ids) / 100_000 - ratio) < 4 * deviation
        by_position = np.bincount(left.ids, minlength=110)[10:] / 1000
        assert np.abs(by_position - (1 - ratio)).max() < 5 * (ratio * (1 - ratio) / 1000) ** 0.5


def test_spans_can_be_put_back() -> None:
    """The n-th mask of the inputs stands for what follows the n-th mask of the targets."""
    rows, keys = random_rows(2000)
    inputs, targets = mask_spans(tokens(rows), keys, 0, mask_id=MASK, special=SPECIAL)
    for row, short, target in zip(rows, rows_of(inputs), rows_of(targets), strict=True):
        pieces: list[list[int]] = []
        for token in target:
            if token == MASK:
                pieces.append([])
            else:
                pieces[-1].append(token)
        assert all(pieces)
        assert (MASK, MASK) not in set(pairwise(short))  # spans do not touch
        left = iter(pieces)
        assert [t for token in short for t in (next(left) if token == MASK else [token])] == row
        assert next(left, None) is None


def test_numbers_of_noise_tokens_and_spans_are_those_of_t5() -> None:
    """round(0.15 x length), at least one and not all; round(noise / 3), at least one."""
    numbers = {1: (0, 0), 2: (1, 1), 3: (1, 1), 9: (1, 1), 11: (2, 1), 20: (3, 1), 40: (6, 2), 100: (15, 5)}
    for length, (noise, spans) in {**numbers, 512: (77, 26)}.items():
        texts = tokens([[CLS, *range(10, 10 + length), SEP]] * 50)
        _, targets = mask_spans(texts, np.arange(50), 0, mask_id=MASK, special=SPECIAL)
        for target in rows_of(targets):
            assert (target.count(MASK), len(target) - target.count(MASK)) == (spans, noise), length


def test_a_lone_span_stands_at_any_place_equally_often() -> None:
    inputs, _ = mask_spans(tokens([list(range(10, 20))] * 9000), np.arange(9000), 0, mask_id=MASK, special=SPECIAL)
    starts = np.bincount([row.index(MASK) for row in rows_of(inputs)])
    assert len(starts) == 9  # of the two tokens of a tenth and a half, rounded to even
    assert np.abs(starts - 1000).max() < 5 * 1000**0.5


def test_lengths_of_spans_vary() -> None:
    """15 noise tokens in 5 spans: 14 choose 4 ways to part them, in which lone tokens are 4 of 14."""
    _, targets = mask_spans(tokens([list(range(10, 110))] * 1000), np.arange(1000), 0, mask_id=MASK, special=SPECIAL)
    lengths = [len(list(run)) for is_mask, run in groupby(targets.ids == MASK) if not is_mask]
    assert len(lengths) == 5000
    assert np.mean(lengths) == 3
    assert lengths.count(1) / 5000 == pytest.approx(4 / 14, abs=0.03)


def test_a_special_token_within_a_span_parts_it() -> None:
    texts = tokens([[10, SEP, 11]] * 100)
    inputs, targets = mask_spans(texts, np.arange(100), 0, mask_id=MASK, special=SPECIAL, density=0.9)
    assert {tuple(row) for row in rows_of(inputs)} == {(MASK, SEP, 11), (10, SEP, MASK)}
    long = tokens([[10, 11, SEP, 12, 13]] * 100)
    inputs, targets = mask_spans(long, np.arange(100), 0, mask_id=MASK, special=SPECIAL, density=0.5)
    assert (10, MASK, SEP, MASK, 13) in {tuple(row) for row in rows_of(inputs)}
    assert (MASK, 11, MASK, 12) in {tuple(row) for row in rows_of(targets)}


def test_what_becomes_of_tokens_that_are_to_be_guessed() -> None:
    texts = tokens([[CLS, *([50] * 100), SEP]] * 1000)
    guess = mask_tokens(texts, np.arange(1000), 0, mask_id=MASK, vocab_size=VOCAB, special=SPECIAL)
    assert len(guess.positions) / 100_000 == pytest.approx(0.3, abs=0.006)
    assert set(guess.labels.tolist()) == {50}
    new = guess.tokens.ids[guess.positions]
    share = np.bincount(new, minlength=VOCAB) / len(new)
    assert share[MASK] == pytest.approx(0.8, abs=0.01)
    assert share[50] == pytest.approx(0.1 + 0.1 / 57, abs=0.01)  # kept, or drawn among the 57 that are not special
    others = np.delete(share, [MASK, 50, CLS, SEP])
    assert share[CLS] == share[SEP] == 0
    assert others.sum() == pytest.approx(0.1 * 56 / 57, abs=0.01)
    assert others.min() > 0
    untouched = np.delete(np.arange(len(texts.ids)), guess.positions)
    assert (guess.tokens.ids[untouched] == texts.ids[untouched]).all()


def test_the_texts_given_stay_as_they_are() -> None:
    texts = tokens([[CLS, 10, 11, 12, SEP]] * 20)
    before = texts.ids.copy()
    mask_tokens(texts, np.arange(20), 0, mask_id=MASK, vocab_size=VOCAB, special=SPECIAL)
    mask_spans(texts, np.arange(20), 0, mask_id=MASK, special=SPECIAL)
    assert (texts.ids == before).all()
