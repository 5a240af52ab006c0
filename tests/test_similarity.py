"""Near-duplicates against brute force: sets of word tuples, every pair compared."""

from __future__ import annotations

import random
import re
import sysconfig
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.read_text import docstring_pairs
from pipeline.data.similarity import SimilarityIndex, band_keys, bands_of, drop_similar, jaccard, shingles


def word_tuples(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, min(len(words), 1)))}


def likeness(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a & b else 0.0


def variants(count: int, seed: int) -> list[str]:
    """Texts in families: a member is its family's text with some words changed, added or taken."""
    chance = random.Random(seed)
    words = [f"w{i}" for i in range(400)]
    texts: list[str] = []
    while len(texts) < count:
        base = chance.choices(words, k=chance.randrange(8, 60))
        for _ in range(chance.choice([1, 1, 2, 3, 6])):
            changed = list(base)
            for _ in range(chance.choice([0, 1, 1, 2, 8])):
                changed[chance.randrange(len(changed))] = chance.choice(words)
            texts.append(" ".join(changed + chance.choices(words, k=chance.choice([0, 0, 1, 3]))))
    return texts[:count]


def test_jaccard_by_hand() -> None:
    for a, b, expected in (
        ("the quick brown fox jumps over", "The quick, brown fox JUMPS again", 1 / 3),
        ("one two three four", "One, two; three-four!", 1.0),  # fewer than five words are one shingle
        ("one two three four", "one two three four five", 0.0),
        ("", "", 0.0),
        ("?!", "?!", 0.0),
        ("日本語 テキスト", "日本語 テキスト", 1.0),
        ("\ud800 x", "\ud800 x", 1.0),
    ):
        assert jaccard(shingles(a), shingles(b)) == pytest.approx(expected), (a, b)


def test_jaccard_against_sets_of_word_tuples() -> None:
    texts = variants(150, 0)
    sets, oracle = [shingles(text) for text in texts], [word_tuples(text) for text in texts]
    assert [len(one) for one in sets] == [len(one) for one in oracle]
    for i, j in combinations(range(len(texts)), 2):
        assert jaccard(sets[i], sets[j]) == likeness(oracle[i], oracle[j])


def test_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, rows = bands_of(threshold, 256)
        assert bands * rows <= 256
        assert 1 - (1 - threshold**rows) ** bands >= 0.99
        assert 1 - (1 - threshold ** (rows + 1)) ** (256 // (rows + 1)) < 0.99  # longer bands would miss more


def test_recall_and_precision_over_pairs() -> None:
    """On made-up families of texts and on this Python's own library, against every pair compared."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-i]*.py"))[:60]
    library = [pair.code for file in files for pair in docstring_pairs(file.read_text("utf-8"))]
    texts = variants(700, 1) + library[:700]
    oracle, sets = [word_tuples(text) for text in texts], [shingles(text) for text in texts]
    every_pair = combinations(range(len(texts)), 2)
    alike = {(i, j): same for i, j in every_pair if (same := likeness(oracle[i], oracle[j])) >= 0.6}
    for threshold in (0.6, 0.8):
        true = {pair for pair, same in alike.items() if same >= threshold}
        keys = band_keys(sets, threshold, 256)
        shared = (((keys[i + 1 :] == keys[i]) & (keys[i] != 0)).any(axis=1) for i in range(len(texts)))
        proposed = ((i, i + 1 + j) for i, others in enumerate(shared) for j in np.flatnonzero(others).tolist())
        found = {(i, j) for i, j in proposed if jaccard(sets[i], sets[j]) >= threshold}
        assert len(true) > 50
        assert len(found & true) / len(true) >= 0.95
        assert found <= true


def test_signatures_do_not_depend_on_their_neighbours() -> None:
    sets = [shingles(text) for text in [*variants(40, 2), "", "one"]]
    together = band_keys(sets, 0.8, 128)
    assert np.array_equal(together, np.concatenate([band_keys([one], 0.8, 128) for one in sets]))
    assert not together[-2].any()
    assert together[-1].all()


def test_each_dropped_text_is_similar_to_a_kept_one_and_no_two_kept_ones_are_similar() -> None:
    texts = variants(400, 3)
    oracle, sets = [word_tuples(text) for text in texts], [shingles(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: (-len(sets[i]), i))
    for threshold in (0.3, 0.8, 1.0):
        dropped = drop_similar(sets, order, threshold)
        assert dropped
        for place, (kept, similarity) in dropped.items():
            assert kept not in dropped
            assert likeness(oracle[place], oracle[kept]) == similarity >= threshold
        stay = [place for place in range(len(texts)) if place not in dropped]
        assert all(likeness(oracle[i], oracle[j]) < threshold for i, j in combinations(stay, 2))


def test_a_chain_of_similar_texts_keeps_its_ends() -> None:
    """Each text is similar to the next, but the first is not similar to the last."""
    words = [f"w{i}" for i in range(60)]
    chain = [shingles(" ".join(words[i : i + 40])) for i in range(0, 20, 4)]
    assert jaccard(chain[0], chain[1]) >= 0.7
    assert jaccard(chain[0], chain[-1]) < 0.4
    assert set(drop_similar(chain, range(len(chain)), 0.7)) == {1, 3}


def test_nearest_takes_the_most_similar() -> None:
    index = SimilarityIndex(0.5)
    words = [f"w{i}" for i in range(40)]
    for count in (28, 36, 32):
        index.add(shingles(" ".join(words[:count])))
    assert index.nearest(shingles(" ".join(words[:35]))) == (1, 31 / 32)
    assert index.nearest(shingles("nothing of the kind is here")) is None
    assert index.nearest(shingles("")) is None
