"""Metrics against values worked out by hand, and BEIR folders that are not as they should be."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytrec_eval

from pipeline.config import Config, ConfigError, Data, Embedding, Sanitize, Source
from pipeline.data.fields import RawRecord
from pipeline.data.filtering import Filter, normaliser
from pipeline.data.manifest import Manifest
from pipeline.data.partitions import content_id, is_validation
from pipeline.evaluation.metrics import bm25_ranking, fused, neighbour_scores, retrieval_metrics, without_own_documents
from pipeline.evaluation.report import hybrid_verdict, score_table
from pipeline.evaluation.retrieval import FEW_TEXTS, TextVectors, best_of_block, merge_levels, merged_rows, to_table
from pipeline.evaluation.scoring import score_classification, score_clustering, score_retrieval, score_sts
from pipeline.evaluation.tasks import (
    BLOCK_ROWS,
    Corpus,
    RetrievalTask,
    held_out_task,
    open_beir,
    read_beir,
    read_classification,
    read_labels,
)
from pipeline.index.vectors import TopK, as_column
from pipeline.model.scores import StsTask
from tests.conftest import make_pairs, no_progress, progress


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
        "map@100": round((1 + (1 / 2 + 2 / 12) / 2) / 3, 4),
        "recall@1": round(1 / 3, 4),
        "recall@10": round((1 + 1 / 2) / 3, 4),
        "recall@100": round(2 / 3, 4),
    }


def test_fusion_by_hand() -> None:
    vectors = {"q": {"a": 0.9, "b": 0.8, "c": 0.8}, "r": {}}  # of c and b, trec_eval has c first
    lexical = {"q": {"d": 12.0, "b": 3.0}, "r": {"a": 1.0}}
    expected = {"b": 1 / 63 + 1 / 62, "d": 1 / 61, "a": 1 / 61, "c": 1 / 62}
    assert fused(vectors, lexical) == {"q": pytest.approx(expected), "r": {"a": 1 / 61}}
    assert list(fused(vectors, lexical, depth=2)["q"]) == ["d", "a"]  # b and c are not among a list's first two
    assert list(fused(vectors, lexical)["q"]) == ["b", "d", "a", "c"]


def test_a_query_does_not_find_itself() -> None:
    """trec_eval's measures of the rankings without the query's own document, as BEIR gives them."""
    chance = np.random.default_rng(0)
    names = [f"d{i}" for i in range(120)]
    ranking = {
        name: dict(sorted(zip(names, chance.random(120).tolist(), strict=True), key=lambda item: -item[1]))
        for name in names
    }
    qrels = {name: {f"d{j}": 1 for j in chance.choice(120, 4, replace=False) if f"d{j}" != name} for name in names}
    found = without_own_documents(ranking, qrels)
    beir = {query: {name: score for name, score in one.items() if name != query} for query, one in ranking.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.100", "recall.1,100"})
    own, theirs = evaluator.evaluate(found), evaluator.evaluate(beir)
    assert own == theirs
    assert {len(one) for one in found.values()} == {100}  # and not 99, which would lose the last document
    qrels["d7"]["d7"] = 1  # judged relevant, so it is not the query itself
    assert "d7" in without_own_documents({"d7": {"d7": 0.9, "d8": 0.8}}, qrels)["d7"]


@pytest.mark.usefixtures("ray_cluster")
def test_queries_that_are_documents(tmp_path: Path) -> None:
    """As in ArguAna: each query is a document of the corpus. The oracle is one matrix of scores without those pairs."""
    from pipeline.config import load
    from pipeline.evaluation.scoring import score_tasks
    from pipeline.index.encoder import TextEncoder
    from pipeline.index.published import encoder_recipe

    model = small_model(tmp_path / "model")
    texts = {
        f"{i}-{side}": f"{side} {row['anchor']} {row['anchor']}"
        for i, row in enumerate(make_pairs(60, seed=5))
        for side in ("supports", "refutes")
    }
    asked = [name for name in texts if name.endswith("supports")]
    corpus = "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in texts.items())
    queries = "".join(json.dumps({"_id": name, "text": texts[name]}) + "\n" for name in asked)
    qrels = {name: {name.replace("supports", "refutes"): 1} for name in asked}
    judged = "".join(f"{query}\t{document}\t1\n" for query, right in qrels.items() for document in right)
    folder = write_beir(tmp_path / "set", corpus, queries, "h\n" + judged)
    config = load(
        Path(__file__).parents[1] / "configs" / "pairs.yaml",
        [f"embedding.model={model}", f"evaluation.beir_dir={folder}"],
    )
    recipe = encoder_recipe(config, model)
    scores = score_tasks(config, tmp_path, Manifest("", [], {}, [], {}, [], {}), recipe, progress)["set"]
    vectors = unit(TextEncoder(model, device="cpu").encode(list(texts.values())).astype(np.float64))
    cosines = {
        query: {name: float(vectors[i] @ vectors[j]) for j, name in enumerate(texts) if name != query}
        for i, query in enumerate(texts)
        if query in qrels
    }
    assert scores["model"] == pytest.approx(retrieval_metrics(qrels, cosines), abs=2e-3)
    assert scores["bm25"]["recall@1"] == scores["bm25"]["ndcg@10"] == 1
    assert scores["hybrid"]["recall@1"] > max(scores["model"]["recall@1"], 0.5)


def test_bm25_with_nothing_to_index() -> None:
    assert bm25_ranking(["q"], ["words"], ["d"], ["the"]) == {"q": {}}
    found = bm25_ranking(["q"], ["blue whale"], ["d1", "d2"], ["the whale is blue", "a red fox"])
    assert set(found["q"]) == {"d1"}


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_beir(folder: Path, corpus: str, queries: str, qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def test_a_corpus_stays_on_disk(tmp_path: Path) -> None:
    count = 2 * BLOCK_ROWS + 7
    lines = [json.dumps({"_id": f"é{i}", "title": "" if i % 2 else "T", "text": f"text {i}"}) for i in range(count)]
    lines[5:5] = ["", "  "]  # blank lines count as lines, not as documents
    folder = write_beir(tmp_path / "set", "\n".join(lines), QUERIES, "h\nq\té3\t1\n")
    documents = open_beir(folder).normalised(str.upper).documents
    assert isinstance(documents, Corpus)
    expected = {f"é{i}": f"{'' if i % 2 else 'T '}TEXT {i}" for i in range(count)}
    assert dict(documents.items()) == expected
    assert len(documents) == count
    blocks = [documents.block(i) for i in range(len(documents.starts))]
    assert [len(block) for block in blocks] == [BLOCK_ROWS, BLOCK_ROWS, 7]
    assert [row for block in blocks for row in block] == list(expected.items())


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
        (
            (CORPUS, '{"_id": 1, "text": "x"}', QRELS),
            "queries.jsonl line 1: found no _id and text; ",
        ),
        ((CORPUS, QUERIES, "h\nq 1\n"), "test.tsv line 2"),
        ((CORPUS, QUERIES, "h\n"), "no query with a relevant document"),
        ((CORPUS + CORPUS, QUERIES, QRELS), "documents [12] and [34] have the same _id"),
        (('{"_id": "\\ud800", "text": "x"}', QUERIES, QRELS), "corpus.jsonl line 1: .*surrogates"),
    ],
)
def test_a_broken_beir_folder_is_refused(parts: tuple[str, str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_beir(write_beir(tmp_path / "set", *parts))
    with pytest.raises(ConfigError, match="No such file"):
        read_beir(tmp_path)


@pytest.mark.parametrize(("quality", "whitespace"), [("none", "auto"), ("code", "auto"), ("none", "keep")])
def test_texts_from_elsewhere_become_what_records_are(quality: str, whitespace: str) -> None:
    raw = "schÃ¶n\r\n    if a:\u200b  b   \n\n\n\n        c\n"
    source = Source(name="s", type="json", path="x", quality=quality)  # type: ignore[arg-type]
    data = Data(sources=[source], sanitize=Sanitize(whitespace=whitespace))  # type: ignore[arg-type]
    record = Filter(source, data)(RawRecord("1", {"text": raw}))
    assert normaliser(data)(raw) == record["text"] != raw
    task = RetrievalTask("t", {"q": raw}, {"d": raw}, {"q": {"d": 1}}).normalised(normaliser(data))
    assert (task.queries, task.documents) == ({"q": record["text"]}, {"d": record["text"]})


class GivenVectors:
    """Stands in for a SentenceTransformer in its own evaluators: texts have vectors already."""

    similarity_fn_name = "cosine"
    similarity_fn_names = ("cosine",)

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        from sentence_transformers.util import cos_sim, pairwise_cos_sim

        self.vectors, self.similarity, self.similarity_pairwise = vectors, cos_sim, pairwise_cos_sim
        self.model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_: None)

    def encode(self, texts: list[str], truncate_dim: int | None = None, **_: object) -> object:
        import torch

        return torch.tensor(np.array([self.vectors[text][:truncate_dim] for text in texts]))

    encode_query = encode_document = encode


SIZES = [12, 5]


def random_task() -> tuple[RetrievalTask, dict[str, np.ndarray]]:
    """A task of queries with several right answers, some of which are nowhere near, and its texts' vectors."""
    chance = np.random.default_rng(0)
    documents = {f"d{i}": f"document {i}" for i in range(400)}
    queries = {f"q{i}": f"query {i}" for i in range(60)}
    vectors = {text: chance.normal(size=12).astype(np.float32) for text in [*documents.values(), *queries.values()]}
    qrels: dict[str, dict[str, int]] = {}
    for query, text in queries.items():
        right = chance.choice(400, size=int(chance.integers(1, 8)), replace=False)
        qrels[query] = {f"d{i}": 1 for i in right}
        vectors[text] = vectors[text] + 1.5 * vectors[f"document {right[0]}"]
    return RetrievalTask("task", queries, documents, qrels), vectors


def own_scores(task: RetrievalTask, vectors: dict[str, np.ndarray], bounds: list[int]) -> dict[str, Any]:
    """Our scores, the documents cut into blocks and sent as they are between processes."""
    queries = np.array([vectors[text] for text in task.queries.values()])
    names, texts = np.array([name.encode() for name in task.documents]), list(task.documents.values())
    parts = [
        to_table(best_of_block(queries, np.array([vectors[t] for t in texts[start:stop]]), names[start:stop], SIZES))
        for start, stop in itertools.pairwise(bounds)
    ]
    return score_retrieval(task, merged_rows(parts, len(queries)), bm25=True)[0]


def test_retrieval_scores_are_those_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    task, vectors = random_task()
    scores = own_scores(task, vectors, [0, 30, 31, 250, 400])
    assert list(scores) == ["queries", "documents", "model", "model@5", "bm25", "hybrid", "hybrid@5"]
    for system, size in (("model", None), ("model@5", 5)):
        data = task.queries, dict(task.documents.items()), {query: set(right) for query, right in task.qrels.items()}
        settings: dict[str, Any] = {"precision_recall_at_k": [1, 10, 100], "truncate_dim": size, "write_csv": False}
        evaluator = InformationRetrievalEvaluator(*data, **settings)
        theirs = evaluator(GivenVectors(vectors))  # type: ignore[arg-type]
        assert 0.1 < scores[system]["ndcg@10"] < 0.9
        for name, value in scores[system].items():
            assert value == pytest.approx(theirs[f"cosine_{name}"], abs=6e-5), (system, name)


def test_sts_scores_are_those_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    chance = np.random.default_rng(0)
    first, second = chance.normal(size=(80, 12)), chance.normal(size=(80, 12))
    gold = np.round((first * second).sum(axis=1) + chance.normal(size=80), 1)
    texts = ([f"{side}{i}" for i in range(80)] for side in "ab")
    task = StsTask("sts", *texts, gold.tolist())
    vectors = dict(zip([*task.first, *task.second], np.concatenate([first, second]).astype(np.float32), strict=True))
    scores = score_sts(task, *(np.array([vectors[t] for t in each]) for each in (task.first, task.second)), SIZES)
    for system, size in (("model", None), ("model@5", 5)):
        pairs = (task.first, task.second, task.scores)
        evaluator = EmbeddingSimilarityEvaluator(*pairs, truncate_dim=size, write_csv=False)
        theirs = evaluator(GivenVectors(vectors))  # type: ignore[arg-type]
        expected = {name: theirs[f"{name}_cosine"] for name in ("spearman", "pearson")}
        assert scores[system] == pytest.approx(expected, abs=6e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_scores_over_the_cluster_are_those_of_one_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BEIR folder, labels and pairs through Ray, the documents in blocks of 700, against one matrix of all scores."""
    from pipeline.config import load
    from pipeline.evaluation.scoring import score_tasks
    from pipeline.index.encoder import TextEncoder
    from pipeline.index.published import encoder_recipe

    model = small_model(tmp_path / "model")
    rows = make_pairs(2500, seed=3)
    corpus = "".join(json.dumps({"_id": row["id"], "text": row["positive"]}) + "\n" for row in rows)
    queries = "".join(json.dumps({"_id": f"q{i}", "text": row["anchor"]}) + "\n" for i, row in enumerate(rows[:50]))
    judged = "".join(f"q{i}\tdoc{i}\t1\nq{i}\tdoc{i + 1000}\t1\n" for i in range(50))
    folder = write_beir(tmp_path / "beir", corpus, queries, "h\n" + judged)
    labels, topics = [str(row["anchor"]).split()[2] for row in rows[:300]], tmp_path / "topics"
    topics.mkdir()
    labelled = "".join(f"{row['positive']}\t{label}\n" for row, label in zip(rows, labels, strict=False))
    for name in ("train", "test"):
        (topics / f"{name}.tsv").write_text("text\tlabel\n" + labelled)
    paths = {"beir_dir": folder, "clustering_file": topics / "test.tsv", "classification_dir": topics}
    config = load(
        Path(__file__).parents[1] / "configs" / "pairs.yaml",
        [f"embedding.model={model}", *(f"evaluation.{name}={path}" for name, path in paths.items())],
    )
    monkeypatch.setattr("pipeline.evaluation.retrieval.RANK_ROWS", 700)
    manifest = Manifest("", [], {}, [], {}, [], {})
    scores = score_tasks(config, tmp_path, manifest, encoder_recipe(config, model), progress)

    encoder = TextEncoder(model, device="cpu")
    texts = [str(row["positive"]) for row in rows]
    documents, asked = encoder.encode(texts), encoder.encode([str(row["anchor"]) for row in rows[:50]])
    for system, size in (("model", 16), ("model@4", 4)):
        table = (unit(asked[:, :size]) @ unit(documents[:, :size]).T).tolist()
        all_of_it = {f"q{i}": {f"doc{j}": score for j, score in enumerate(row)} for i, row in enumerate(table)}
        expected = retrieval_metrics({f"q{i}": {f"doc{i}": 1, f"doc{i + 1000}": 1} for i in range(50)}, all_of_it)
        assert {name: scores["beir"][system][name] for name in expected} == pytest.approx(expected, abs=2e-3)
    votes = neighbour_scores(documents[:300], labels, documents[:300], labels)
    assert scores["topics"]["model"] == pytest.approx(votes, abs=0.02)
    assert votes["accuracy"] > 0.5  # by chance 0.1
    assert scores["test"].keys() == {"texts", "labels", "model", "model@4"}


@pytest.mark.usefixtures("ray_cluster")
def test_partial_results_are_merged_in_tasks_as_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 partial results of two sizes, merged three at a time on three levels, against a sort of all documents."""
    from pipeline.evaluation import retrieval

    chance = np.random.default_rng(0)
    corners = chance.integers(0, 2, size=(1000 + 40, 16)) / 2 - 0.25  # of length 1, and every product is exact
    names = [f"d{number}" for number in chance.permutation(5000)[:1000]]
    texts = [" ".join(map(str, row)) for row in corners[:1000].tolist()]
    queries = corners[1000:].astype(np.float32)

    def add_vectors(rows: pa.Table) -> pa.Table:
        return rows.append_column(
            "vector", as_column(np.array([text.split() for text in rows["text"].to_pylist()], float))
        )

    def encoded(dataset: Any, *_: object) -> Any:
        return dataset.map_batches(add_vectors, batch_size=37, batch_format="pyarrow", num_cpus=1)

    for_driver: list[int] = []

    def merged_rows(partial: Any, queries: int) -> dict[int, TopK]:
        blocks = list(partial)
        for_driver.append(sum(map(len, blocks)))
        return in_tasks(blocks, queries)

    in_tasks = retrieval.merged_rows
    for name, value in {"RANK_ROWS": 37, "MERGED_TOGETHER": 3, "CANDIDATES": 30, "BLOCK_ROWS": 37}.items():
        monkeypatch.setattr(retrieval, name, value)
    monkeypatch.setattr(retrieval, "merged_rows", merged_rows)
    monkeypatch.setattr("pipeline.index.pool.encoded", encoded)
    task = RetrievalTask("tree", {}, dict(zip(names, texts, strict=True)), {})
    assert retrieval.merge_levels(1000) == 3
    found = retrieval.nearest_documents(task, queries, [16, 4], None, progress())  # type: ignore[arg-type]
    for size in (16, 4):
        scores = corners[1000:, :size] @ corners[:1000, :size].T * 16 / size
        for row, ids in enumerate(found[size].ids.tolist()):
            expected = sorted(zip(scores[row].tolist(), names, strict=True), reverse=True)[:30]
            assert ids == [name.encode() for _, name in expected]
            assert found[size].scores[row].tolist() == [score for score, _ in expected]
    assert sum(for_driver) <= 2 * 3


@pytest.mark.usefixtures("ray_cluster")
def test_many_texts_are_encoded_by_the_pool_and_few_here(tmp_path: Path) -> None:
    from pipeline.index.encoder import EncoderRecipe, TextEncoder

    model = small_model(tmp_path / "model", prompts=(("query", "find: "),))
    recipe = EncoderRecipe(model, Embedding(), tmp_path)
    texts = [str(row["anchor"]) for row in make_pairs(FEW_TEXTS + 1)]
    few, many = TextVectors(recipe, no_progress), TextVectors(recipe, progress)
    for name, prompt in (("query", "find: "), ("", "")):
        expected = TextEncoder(model, device="cpu").encode([prompt + text for text in texts])
        np.testing.assert_allclose(many.of(texts, "texts", name), expected, atol=1e-6)
        np.testing.assert_allclose(few.of(texts[:-1], "texts", name), expected[:-1], atol=1e-6)
        with pytest.raises(AssertionError, match="Ray was asked for"):
            few.of(texts, "texts", name)


def test_levels_of_merging() -> None:
    assert [merge_levels(documents) for documents in (1, 65_536, 65_537, 1_000_000, 10**8)] == [0, 0, 1, 2, 4]


def small_model(folder: Path, prompts: tuple[tuple[str, str], ...] = ()) -> Path:
    """A random table of tokens, trained for 4 of its 16 numbers too."""
    import torch

    from pipeline.data.tokenizer import train_tokenizer
    from pipeline.model.embedding_model import EmbeddingModel
    from pipeline.model.folder import Head, save_model
    from pipeline.model.transformer import Encoder, EncoderShape

    torch.manual_seed(0)
    texts = (str(row["positive"]) for row in make_pairs(200))
    tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=600, lowercase=True)
    shape = EncoderShape(vocab_size=600, d_model=16, num_layers=0, num_heads=2, d_ff=16, norm_eps=1.0)
    folder.mkdir()
    save_model(folder, EmbeddingModel(Encoder(shape), Head(dimensions=(4,), prompts=prompts)), tokenizer.to_str(), 32)
    return folder


def blobs(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Three directions in the first two of six numbers, with noise in the others, and their labels."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 3, size=count)
    centres = np.array([[1, 0], [-0.5, 0.87], [-0.5, -0.87]])
    vectors = np.hstack([centres[labels], 0.1 * chance.normal(size=(count, 4))]).astype(np.float32)
    return vectors, [f"label {i}" for i in labels]


def test_clusters_that_follow_the_labels() -> None:
    vectors, labels = blobs(300, 0)
    scores = score_clustering(vectors, labels, [6, 2])
    assert scores == {"texts": 300, "labels": 3, "model": {"v_measure": 1.0}, "model@2": {"v_measure": 1.0}}
    noise = score_clustering(np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32), labels, [6])
    assert noise["model"]["v_measure"] < 0.1


def test_neighbours_vote_as_counted_by_hand() -> None:
    train, train_labels = blobs(90, 1)
    test, test_labels = blobs(40, 2)
    test_labels[:10] = ["label 0"] * 10
    scores = score_classification(train, train_labels, 5 * test, test_labels, [6, 4])
    for system, size in (("model", 6), ("model@4", 4)):
        rows, columns = unit(test[:, :size].astype(float)), unit(train[:, :size].astype(float))
        votes = [Counter(train_labels[i] for i in np.argsort(-(columns @ row))[:5]) for row in rows]
        found = [max(sorted(vote), key=vote.__getitem__) for vote in votes]
        right = [one == other for one, other in zip(found, test_labels, strict=True)]
        f1 = []
        for label in sorted(set(test_labels) | set(found)):
            hits = sum(a == b == label for a, b in zip(found, test_labels, strict=True))
            f1.append(2 * hits / (found.count(label) + test_labels.count(label)))
        assert scores[system] == {"accuracy": round(np.mean(right), 4), "macro_f1": round(np.mean(f1), 4)}
    assert scores["training texts"] == 90


def test_labels(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.tsv").write_text(f'text\tlabel\na "{name}\tx\nb\ty\n')
    assert read_labels(tmp_path / "test.tsv", "key") == (['a "test', "b"], ["x", "y"])
    assert read_classification(tmp_path) == (['a "train', "b"], ["x", "y"], ['a "test', "b"], ["x", "y"])
    with pytest.raises(ConfigError, match=r"key: .*No such file or directory; give a TSV of text, label"):
        read_labels(tmp_path / "other.tsv", "key")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a\tb\n", "line 1: the header must be text, label"),
        ("text\tlabel\na\tb\tc\n", "line 2: too many values; each row must have text, label"),
        ("text\tlabel\na\tx\nb\tx\n", "has 1 labels; allowed are two or more"),
    ],
)
def test_files_of_labels_that_are_none(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(ConfigError, match=f"^evaluation.classification_dir: .*{sentence}"):
        read_classification(tmp_path)


def test_the_table_has_a_line_for_each_system() -> None:
    metrics = dict.fromkeys(("ndcg@10", "mrr@10", "map@100", "recall@1", "recall@10", "recall@100"), 0.5)
    beir = {"queries": 2000, "documents": 3, **dict.fromkeys(("model", "model@64", "hybrid"), metrics)}
    shown = score_table({"beir": beir, "sts": {"pairs": 7, "model": {"spearman": 0.25, "pearson": 0.5}}})
    lines = [line.split("  ")[0] for line in shown.splitlines()]
    assert lines.count("beir (2,000 queries, 3 documents)") == 3
    assert "sts (7 pairs)  model  Spearman 0.2500, Pearson 0.5000" in shown
    assert "hybrid: the rankings of model and bm25, fused by reciprocal rank, 1 / (60 + rank)" in shown
    assert "hybrid" not in score_table({"beir": {"queries": 1, "documents": 3, "model": metrics}})
    assert score_table({}) == ""


def test_a_verdict_on_hybrid_search() -> None:
    def task(model: float, hybrid: float) -> dict[str, Any]:
        return {"queries": 9, "model": {"ndcg@10": model}, "bm25": {"ndcg@10": 0.1}, "hybrid": {"ndcg@10": hybrid}}

    begin = "hybrid search was worse than the model alone in this run's evaluation: "
    worse = hybrid_verdict({"held-out": task(0.7041, 0.512), "sts": {"pairs": 7, "model": {"spearman": 0.25}}})
    assert worse == begin + "NDCG@10 0.512 against 0.704 (held-out)"
    both = hybrid_verdict({"beir": task(0.5, 0.4), "held-out": task(0.7041, 0.7), "other": task(0.2, 0.3)})
    assert both == begin + "NDCG@10 0.400 against 0.500 (beir), NDCG@10 0.700 against 0.704 (held-out)"
    assert hybrid_verdict({"held-out": task(0.5, 0.5)}) is None
    assert hybrid_verdict({"held-out": {"queries": 9, "model": {"ndcg@10": 0.5}}}) is None
    assert hybrid_verdict({}) is None


def test_held_out_documents_are_distinct_texts(tmp_path: Path) -> None:
    """Twenty questions about each of 50 passages; some of both are held out."""
    rows = [
        {"id": content_id([f"question {i}"]), "anchor": f"question {i}", "positive": f"passage {i % 50}"}
        for i in range(1000)
    ]
    rows.sort(key=lambda row: row["id"])
    (tmp_path / "records").mkdir()
    for number, start in enumerate(range(0, 1000, 300)):
        part = pa.Table.from_pylist(rows[start : start + 300])
        pq.write_table(part, tmp_path / "records" / f"{number}.parquet")
    held_out = [row for row in rows if is_validation(row["id"], 0.1)]
    for documents in (20, 45, 100):
        wanted = {"evaluation": {"held_out_queries": 30, "held_out_documents": documents}}
        config = Config.model_validate(wanted | {"data": {"validation_fraction": 0.1}})
        task = held_out_task(config, tmp_path)
        assert list(task.queries.values()) == [row["anchor"] for row in held_out[:30]]
        texts = list(task.documents.values())
        answers = {row["positive"] for row in held_out[:30]}
        assert len(texts) == len(set(texts)) == max(len(answers), min(documents, 50))
        assert answers <= set(texts)
        for row in held_out[:30]:
            assert [task.documents[key] for key in task.qrels[row["id"]]] == [row["positive"]]
    two = [{**row, "anchor": row["anchor"].replace("question 7", "question 6")} for row in rows]
    (tmp_path / "two" / "records").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(two), tmp_path / "two" / "records" / "0.parquet")
    task = held_out_task(config, tmp_path / "two")
    assert len(set(task.queries.values())) == len(task.queries) == 30
    for query, anchor in task.queries.items():  # an anchor with two passages has two answers
        answers = {row["positive"] for row in two if row["anchor"] == anchor} & set(task.documents.values())
        assert {task.documents[key] for key in task.qrels[query]} == answers
    assert max(map(len, task.qrels.values())) == 2
    for split in ("train", "validation"):  # token shards in which a text's tokens are its characters
        (tmp_path / split).mkdir()
        for file in (tmp_path / "records").iterdir():
            own = [
                row for row in pq.read_table(file).to_pylist() if is_validation(row["id"], 0.1) == (split != "train")
            ]
            tokens = [[ord(letter) for letter in row["positive"]] for row in own]
            shard = pa.table({"id": [row["id"] for row in own], "positive": pa.array(tokens, pa.list_(pa.int32()))})
            pq.write_table(shard, tmp_path / split / file.name)
    task = held_out_task(config, tmp_path, use_tokens=True)
    assert task.tokens is not None
    assert ["".join(map(chr, tokens)) for tokens in task.tokens.to_pylist()] == list(task.documents.values())
