"""Nearest neighbours block by block against Python's own sort of everything, and memory as documents grow."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from pipeline.index.vectors import TopK, as_column, best, nearest, nearest_in_block, nearest_rows, unit


def by_sorting_everything(queries: np.ndarray, vectors: np.ndarray, ids: list[bytes], k: int) -> list[list[bytes]]:
    """trec_eval's order: by score, then by id, both falling."""
    scores = (queries.astype(object) @ vectors.T.astype(object)).tolist()  # Python's integers
    return [[name for _, name in sorted(zip(row, ids, strict=True), reverse=True)][:k] for row in scores]


def in_blocks(queries: np.ndarray, vectors: np.ndarray, ids: list[bytes], k: int, bounds: list[int]) -> TopK:
    slices = itertools.starmap(slice, itertools.pairwise(bounds))
    return nearest(queries, ((np.array(ids[here], dtype=np.bytes_), vectors[here]) for here in slices), k)


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


def test_pairs_that_are_excluded_come_last() -> None:
    chance = np.random.default_rng(0)
    queries, vectors, ids = unit(chance.normal(size=(300, 4))), unit(chance.normal(size=(9, 4))), np.arange(9)
    pairs = {(int(pair) // 9, int(pair) % 9) for pair in chance.integers(0, 2700, 900)}
    rows, columns = np.array(sorted(pairs)).T
    found = nearest_in_block(queries, vectors, ids, 9, (rows, columns))
    for row, (names, scores) in enumerate(zip(found.ids.tolist(), found.scores.tolist(), strict=True)):
        allowed = [i for i in np.argsort(-(vectors @ queries[row])).tolist() if (row, i) not in pairs]
        assert names[: len(allowed)] == allowed
        assert set(scores[len(allowed) :]) <= {-np.inf}


@pytest.mark.parametrize("seed", range(10))
def test_rows_against_a_sort_of_everything(seed: int) -> None:
    chance = np.random.default_rng(seed)
    count, k = int(chance.integers(1, 200)), int(chance.integers(1, 30))
    vectors = np.array([(3, 4), (4, 3), (0, 5), (-5, 0)], np.float32)[chance.integers(0, 4, count)]  # of length 5
    ids = [f"d{number}" for number in chance.permutation(10 * count)[:count].tolist()]
    table = pa.table({"id": ids, "size": range(count), "vector": as_column(vectors)})
    expected = sorted(zip((vectors @ (0, 10) / 50).tolist(), ids, range(count), strict=True), reverse=True)
    for keep in (None, lambda batch: [size % 3 > 0 for size in batch["size"].to_pylist()]):
        for order in ([*range(count)], chance.permutation(count).tolist()):
            batches = table.take(order).to_batches(int(chance.integers(1, 60)))
            found = nearest_rows(batches, np.array([0, 10], np.float32), k, keep)
            assert [row.keys() for row in found] == [{"id", "size", "score"}] * len(found)
            wanted = [one for one in expected if keep is None or one[2] % 3 > 0][:k]
            assert [(row["id"], row["size"]) for row in found] == [one[1:] for one in wanted]
            assert [row["score"] for row in found] == pytest.approx([one[0] for one in wanted])
    assert nearest_rows([], np.array([0, 10], np.float32), k) == []


def test_rows_whose_scores_differ_by_rounding_alone() -> None:
    """In single precision 512 numbers are summed in another order in blocks of other sizes; the result is the same."""
    chance = np.random.default_rng(0)
    vector = chance.normal(size=512).astype(np.float32)
    vectors = np.repeat((vector + 0.01 * chance.normal(size=(10, 512))).astype(np.float32), 30, axis=0)
    vectors *= np.exp2(chance.integers(-3, 4, size=(300, 1))).astype(np.float32)  # of other lengths, to the last bit
    table = pa.table({"id": [f"{i:03}" for i in range(300)], "vector": as_column(vectors)})
    groups = (unit(vectors[::30]).astype(float) @ unit(vector[None])[0].astype(float)).argsort()[::-1].tolist()
    expected = [f"{30 * group + 29 - i:03}" for group in groups for i in range(30)]
    for size in (1, 7, 64, 300):
        for k in (1, 20, 45, 300):
            found = nearest_rows(table.to_batches(size), vector, k)
            assert [row["id"] for row in found] == expected[:k]


def test_unit() -> None:
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


def test_memory_is_flat_in_the_number_of_documents() -> None:
    chance = np.random.default_rng(0)
    queries = unit(chance.normal(size=(60, 16)))

    def peak_bytes(blocks: int) -> int:
        tracemalloc.start()

        def block(number: int) -> tuple[np.ndarray, np.ndarray]:
            vectors = unit(np.random.default_rng(number).normal(size=(500, 16)))
            return np.array([f"{number}-{i}".encode() for i in range(500)], dtype="S16"), vectors

        nearest(queries, map(block, range(blocks)), 10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak_bytes(3), peak_bytes(60)
    assert many < 1.1 * few
    assert few < 60 * 500 * 8 * 8  # some times a block's scores
