"""Nearest neighbours block by block against Python's own sort of everything, and memory as documents grow."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from pipeline.embedding.nearest import Found, best, merged, nearest_in_block, unit


def by_sorting_everything(queries: np.ndarray, vectors: np.ndarray, ids: list[bytes], k: int) -> list[list[bytes]]:
    """trec_eval's order: by score, then by id, both falling."""
    scores = (queries.astype(object) @ vectors.T.astype(object)).tolist()  # Python's integers
    return [[name for _, name in sorted(zip(row, ids, strict=True), reverse=True)][:k] for row in scores]


def in_blocks(queries: np.ndarray, vectors: np.ndarray, ids: list[bytes], k: int, bounds: list[int]) -> Found:
    found = None
    for start, stop in itertools.pairwise(bounds):
        block = nearest_in_block(queries, vectors[start:stop], np.array(ids[start:stop], dtype=np.bytes_), k)
        found = merged(found, block, k)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(20))
def test_blocks_against_a_sort_of_everything(seed: int) -> None:
    chance = np.random.default_rng(seed)
    count, k = int(chance.integers(1, 400)), int(chance.integers(1, 60))
    # Few small numbers, so that most scores are tied and every product is exact.
    vectors = chance.integers(-1, 2, size=(count, 3)).astype(np.float32)
    queries = chance.integers(-1, 2, size=(int(chance.integers(1, 300)), 3)).astype(np.float32)
    ids = [f"d{number}".encode() for number in chance.permutation(10 * count)[:count].tolist()]
    bounds = [0, *sorted(chance.integers(0, count + 1, size=5).tolist()), count]  # empty blocks too
    found = in_blocks(queries, vectors, ids, k, bounds)
    assert found.ids.tolist() == by_sorting_everything(queries, vectors, ids, k)
    assert found.ids.shape == (len(queries), min(k, count))  # k beyond N gives all
    shuffled = chance.permutation(count)
    again = in_blocks(queries, vectors[shuffled], [ids[i] for i in shuffled], k, [0, count // 3, count])
    assert again.ids.tolist() == found.ids.tolist()
    assert again.scores.tolist() == found.scores.tolist()


def test_equal_vectors_have_equal_scores_in_whatever_block() -> None:
    chance = np.random.default_rng(0)
    vectors = unit(chance.normal(size=(1000, 96)))
    vectors[777] = vectors[3]
    queries = unit(chance.normal(size=(50, 96)))
    ids = [f"{i:04}".encode() for i in range(1000)]
    found = in_blocks(queries, vectors, ids, 1000, [0, 5, 778, 1000])
    for names, scores in zip(found.ids.tolist(), found.scores.tolist(), strict=True):
        by_id = dict(zip(names, scores, strict=True))
        assert by_id[b"0777"] == by_id[b"0003"]
        assert names.index(b"0777") + 1 == names.index(b"0003")


def test_a_score_that_is_no_number_comes_last() -> None:
    found = best(np.array([[np.nan, 0.5, -2.0]], dtype=np.float32), np.array([b"a", b"b", b"c"]), 3)
    assert found.ids.tolist() == [[b"b", b"c", b"a"]]


def test_unit() -> None:
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


def test_memory_is_flat_in_the_number_of_documents() -> None:
    chance = np.random.default_rng(0)
    queries = unit(chance.normal(size=(60, 16)))

    def peak_bytes(blocks: int) -> int:
        tracemalloc.start()
        found = None
        for number in range(blocks):
            vectors = unit(np.random.default_rng(number).normal(size=(500, 16)))
            ids = np.array([f"{number}-{i}".encode() for i in range(500)], dtype="S16")
            found = merged(found, nearest_in_block(queries, vectors, ids, 10), 10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak_bytes(3), peak_bytes(60)
    assert many < 1.1 * few
    assert few < 60 * 500 * 8 * 8  # some times a block's scores
