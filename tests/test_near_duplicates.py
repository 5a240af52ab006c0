"""Near-duplicates and evaluation texts taken out of record files, against brute force over all pairs."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Data, NearDuplicates
from pipeline.core.artifact import Artifact, Output
from pipeline.data import near_duplicates
from pipeline.data.manifest import RECORD_SCHEMA, REJECTED_SCHEMA
from pipeline.data.partitions import content_id, shard_of
from pipeline.data.similarity import Shingles, jaccard, shingles
from tests.conftest import progress
from tests.test_similarity import likeness, variants, word_tuples


def record_files(folder: Path, texts: Sequence[str], shards: int) -> list[Path]:
    rows: list[list[dict[str, Any]]] = [[] for _ in range(shards)]
    for i, text in enumerate(texts):
        anchor, positive = text.split(" ", 1)
        one = content_id([anchor, positive])
        row = {"id": one, "source": "ab"[i % 2], "source_id": f"{'ab'[i % 2]}:{i}"}
        rows[shard_of(one, shards)].append(row | {"anchor": anchor, "positive": positive})
    folder.mkdir(parents=True)
    files = [folder / f"{shard:05d}.parquet" for shard in range(shards)]
    for path, part in zip(files, rows, strict=True):
        pq.write_table(pa.Table.from_pylist(sorted(part, key=lambda row: str(row["id"])), RECORD_SCHEMA), path)
    return files


def distinct(folder: Path, files: list[Path], data: Data) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """What stays, what goes, and the counts of it."""
    stage = Artifact(folder, "distinct", [])
    near = near_duplicates.find_duplicates(stage, progress(), files, data)
    counts = near_duplicates.write_distinct(stage, progress(), files)
    clusters = near_duplicates.largest_clusters(stage)
    stage.finish({})
    stay, gone = (
        pa.concat_tables([pq.read_table(stage.folder / k / f.name) for f in files]) for k in ("records", "rejected")
    )
    assert sum(reason == "near_duplicate" for reason in gone["reason"].to_pylist()) == near
    assert sum(cluster["removed"] for cluster in clusters) <= near
    return stay, gone, counts


@pytest.mark.usefixtures("ray_cluster")
def test_what_goes_and_what_stays(tmp_path: Path) -> None:
    """Over files and sources: who goes is alike to one that stays, hardly two that stay are alike, nobody is lost."""
    texts = sorted(set(variants(900, 5)))
    data = Data(near_duplicates=NearDuplicates(threshold=0.7))
    stay, gone, counts = distinct(tmp_path / "3", record_files(tmp_path / "in3", texts, 3), data)
    oracle = {f"{'ab'[i % 2]}:{i}": word_tuples(text) for i, text in enumerate(texts)}
    true = {pair for pair in combinations(oracle, 2) if likeness(oracle[pair[0]], oracle[pair[1]]) >= 0.7}
    survivors = set(stay["source_id"].to_pylist())
    assert len(true) > 100
    assert gone.schema == REJECTED_SCHEMA
    assert sorted([*survivors, *gone["source_id"].to_pylist()]) == sorted(oracle)
    for row in gone.to_pylist():
        assert row["duplicate_of"] in survivors
        assert likeness(oracle[row["source_id"]], oracle[row["duplicate_of"]]) == row["similarity"] >= 0.7
        assert len(oracle[row["duplicate_of"]]) >= len(oracle[row["source_id"]])
    left = [pair for pair in true if set(pair) <= survivors]
    assert len(left) <= 0.05 * len(true)
    for table, outcome in ((stay, "kept"), (gone, "near_duplicate")):
        assert {source: count[outcome] for source, count in counts.items()} == Counter(table["source"].to_pylist())
    again, _, _ = distinct(tmp_path / "1", record_files(tmp_path / "in1", texts[::-1], 1), data)
    assert sorted(again["id"].to_pylist()) == sorted(stay["id"].to_pylist())  # one file, the other order


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("texts", [["a b c d e f", "g h i j k l"], ["x ?!"], []], ids=["none alike", "one", "empty"])
def test_nothing_to_remove(texts: list[str], tmp_path: Path) -> None:
    data = Data(near_duplicates=NearDuplicates(threshold=0.8))
    stay, gone, counts = distinct(tmp_path, record_files(tmp_path / "in", texts, 2), data)
    assert (len(stay), len(gone)) == (len(texts), 0)
    assert counts == {source: {"kept": 1} for source in "ab"[: len(texts)]}


def beir(folder: Path, documents: list[dict[str, str]], queries: list[str]) -> Path:
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    rows = [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.usefixtures("ray_cluster")
def test_evaluation_texts_go_first_and_take_nothing_along(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(60)]
    base = " ".join(words[:40])
    texts = [
        f"anchor {base}",  # equal to a document
        f"anchor {' '.join(words[:37])}",  # nearly equal to it
        f"anchor {' '.join(words[4:52])}",  # like the first record, not like the document
        f"query-one {' '.join(words[20:60])} and more",  # equal to a query
        "other text altogether, like nothing else",
    ]
    folder = beir(tmp_path / "set", [{"_id": "d1", "title": "A title", "text": base}], ["Query one!", "unused"])
    data = Data(near_duplicates=NearDuplicates(threshold=0.6), decontaminate=[str(folder)], decontaminate_threshold=0.8)
    stay, gone, _ = distinct(tmp_path, record_files(tmp_path / "in", texts, 2), data)
    assert sorted(stay["source_id"].to_pylist()) == ["a:2", "a:4"]
    found = {row["source_id"]: (row["reason"], row["duplicate_of"]) for row in gone.to_pylist()}
    assert found["a:0"] == found["b:1"] == ("contaminated", "set: document d1")
    assert found["b:3"] == ("contaminated", "set: query q0")
    with_negatives = Data(decontaminate=[str(folder)])
    rows = [
        {"id": f"{i:032x}", "source": "a", "source_id": f"a:{i}", "anchor": f"ask {i}", "positive": f"tell {i} {i}"}
        | {"negatives": negatives}
        for i, negatives in enumerate([["no words of it", base], ["no words of it"], [], None])
    ]
    file = tmp_path / "negatives.parquet"
    pq.write_table(pa.Table.from_pylist(rows, RECORD_SCHEMA), file)
    stay, gone, _ = distinct(tmp_path / "negatives", [file], with_negatives)
    assert stay["source_id"].to_pylist() == ["a:1", "a:2", "a:3"]
    assert gone["duplicate_of"].to_pylist() == ["set: document d1"]
    alone = Data(decontaminate=[str(folder)])
    stay, gone, _ = distinct(tmp_path / "alone", record_files(tmp_path / "in2", texts, 1), alone)
    assert len(gone) == 3


def test_text_that_all_share_does_not_make_them_all_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 records, half of each a footer: below the threshold, but alike enough to meet in a component."""
    chance = random.Random(2)
    footer = " ".join(f"footer{i}" for i in range(60))
    sets = [shingles(" ".join(f"w{chance.randrange(10**6)}" for _ in range(60)) + " " + footer) for _ in range(400)]
    rows = [{"component": 0, "record": i, "id": f"{i:03d}", "source_id": str(i)} for i in range(len(sets))]
    candidates = pa.Table.from_pylist(
        [{**row, "shingles": one.tolist()} for row, one in zip(rows, sets, strict=True)], near_duplicates._CANDIDATES
    )
    compared = Counter[str]()

    def counted(a: Shingles, b: Shingles) -> float:
        compared["pairs"] += 1
        return jaccard(a, b)

    monkeypatch.setattr("pipeline.data.similarity.jaccard", counted)
    assert len(near_duplicates._compare(candidates, 0.8)) == 0
    assert compared["pairs"] < len(sets)  # of 79,800


def test_components_are_those_of_all_links(tmp_path: Path) -> None:
    links = [np.array([[0, 5], [1, 6]]), np.array([[1, 8], [2, 9]]), np.zeros((2, 0), dtype=np.int64)]
    for i, pairs in enumerate(links):
        near_duplicates._save(pairs, Output(tmp_path), str(i))
    found = near_duplicates._components([tmp_path / str(i) for i in range(3)], 10)
    assert found[0] == found[1] == found[2] != near_duplicates.ALONE
    assert found[5] == found[6] != found[8] == found[9]
    assert (found[[3, 4, 7]] == near_duplicates.ALONE).all()


def test_a_slice_of_the_numbers_in_a_file(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << 60, 1000)
    near_duplicates._save(numbers, Output(tmp_path), "a")
    for start, stop in ((0, None), (2, 3), (1, 5), (3, 3)):
        assert (near_duplicates._load(tmp_path / "a", start, stop) == numbers[start:stop]).all()
