"""Metrics against values worked out by hand, and BEIR folders that are not as they should be."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError, Data, Sanitize, Source
from pipeline.data.judging import Judge, normaliser
from pipeline.evaluation.beir import RetrievalTask, read_beir
from pipeline.evaluation.metrics import bm25_ranking, nearest, retrieval_metrics
from pipeline.evaluation.sts import read_sts, spearman
from pipeline.sources.fields import RawRecord


def test_metrics_by_hand() -> None:
    qrels = {"a": {"d1": 1}, "b": {"d2": 1, "d3": 1}, "c": {"d4": 1}}
    ranking = {
        "a": {"d1": 0.9, "d2": 0.8},  # at rank 1
        "b": {"x": 0.9, "d3": 0.5, **{f"y{i}": 0.4 - i / 100 for i in range(9)}, "d2": 0.1},  # at 2 and 12
    }  # c found nothing
    ideal = 1 + 1 / math.log2(3)
    assert retrieval_metrics(qrels, ranking) == {
        "ndcg@10": round((1 + (1 / math.log2(3)) / ideal) / 3, 4),
        "mrr@10": round((1 + 1 / 2) / 3, 4),
        "recall@1": round(1 / 3, 4),
        "recall@10": round((1 + 1 / 2) / 3, 4),
        "recall@100": round(2 / 3, 4),
    }


def test_nearest_against_a_full_sort() -> None:
    chance = np.random.default_rng(0)
    queries, documents = chance.normal(size=(300, 8)), chance.normal(size=(50, 8))
    ranking = nearest([str(i) for i in range(300)], queries, [str(i) for i in range(50)], documents, k=7)
    for i in (0, 255, 256, 299):
        scores = documents @ queries[i]
        assert set(ranking[str(i)]) == {str(j) for j in np.argsort(-scores)[:7]}
    assert len(nearest(["q"], queries[:1], ["d"], documents[:1])["q"]) == 1


def test_bm25_with_nothing_to_index() -> None:
    assert bm25_ranking(["q"], ["words"], ["d"], ["the"]) == {"q": {}}
    found = bm25_ranking(["q"], ["blue whale"], ["d1", "d2"], ["the whale is blue", "a red fox"])
    assert set(found["q"]) == {"d1"}


def write_beir(folder: Path, corpus: str, queries: str, qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


CORPUS = '{"_id": "1", "title": "T", "text": "x"}\n{"_id": "2", "text": "y"}\n'
QUERIES = '{"_id": "q", "text": "find"}\n{"_id": "r", "text": "unjudged"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq\t1\t1\nq\t2\t0\n"


def test_beir(tmp_path: Path) -> None:
    task = read_beir(write_beir(tmp_path / "set", CORPUS, QUERIES, QRELS))
    assert task.documents == {"1": "T x", "2": "y"}
    assert (task.queries, task.qrels, task.name) == ({"q": "find"}, {"q": {"1": 1}}, "set")


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (("{", QUERIES, QRELS), "corpus.jsonl line 1"),
        ((CORPUS, '{"_id": 1, "text": "x"}', QRELS), "queries.jsonl line 1: text fields _id and text"),
        ((CORPUS, QUERIES, "h\nq 1 1\n"), "test.tsv line 2"),
        ((CORPUS, QUERIES, "h\n"), "no query with a relevant document"),
    ],
)
def test_a_broken_beir_folder_is_refused_by_file_and_line(
    parts: tuple[str, str, str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_beir(write_beir(tmp_path / "set", *parts))
    with pytest.raises(ConfigError, match="No such file"):
        read_beir(tmp_path)


@pytest.mark.parametrize(("quality", "whitespace"), [("none", "auto"), ("code", "auto"), ("none", "keep")])
def test_texts_from_elsewhere_become_what_records_are(quality: str, whitespace: str) -> None:
    raw = "schÃ¶n\r\n    if a:\u200b  b   \n\n\n\n        c\n"
    source = Source(name="s", type="json", path="x", quality=quality)  # type: ignore[arg-type]
    data = Data(sources=[source], sanitize=Sanitize(whitespace=whitespace))  # type: ignore[arg-type]
    record = Judge(source, data)(RawRecord("1", {"text": raw}))
    assert normaliser(data)(raw) == record["text"] != raw
    task = RetrievalTask("t", {"q": raw}, {"d": raw}, {"q": {"d": 1}}).normalised(normaliser(data))
    assert (task.queries, task.documents) == ({"q": record["text"]}, {"d": record["text"]})


def test_sts(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text('score\tsentence1\tsentence2\n1.5\ta "quoted\tb\n3\tc\td\n')
    task = read_sts(file)
    assert (task.name, task.first, task.second, task.scores) == ("pairs", ['a "quoted', "c"], ["b", "d"], [1.5, 3.0])
    assert spearman([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 2], [0.5, 0.5]) == 0
    assert spearman([1, 2, 3], [0.1, math.nan, 0.2]) == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a\tb\tc\n", "line 1: a header of score, sentence1, sentence2 is wanted"),
        ("", "a header of score, sentence1, sentence2 is wanted"),
        ("score\tsentence1\tsentence2\nx\ta\tb\n", "line 2: could not convert"),
        ("score\tsentence1\tsentence2\n1\ta\tb\n2\ta\n", "line 3: not enough values"),
        ("score\tsentence1\tsentence2\nnan\ta\tb\n", "line 2: nan is no score"),
        ("score\tsentence1\tsentence2\n1\ta\tb\n1\tc\td\n", "fewer than two scores"),
    ],
)
def test_sts_files_that_are_none(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "sts.tsv"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        read_sts(file)
