"""Scores one model on all tasks of the config, at full width and truncated to each size it was trained for.

scores = score_tasks(config, prepared_folder, manifest, model_folder, session.progress)
# {"held-out": {"queries": 1000, "documents": 10000,
#               "model": {"ndcg@10": …}, "model@64": {…}, "bm25": {…}, "hybrid": {…}, "hybrid@64": {…}},
#  "sts": {"pairs": 1379, "model": {"spearman": …, "pearson": …}, "model@64": {…}}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.core.console import Stage, log
from pipeline.core.path import StoragePath, as_path
from pipeline.core.session import Progress
from pipeline.data.filtering import normaliser
from pipeline.data.manifest import Manifest
from pipeline.evaluation.examples import Details
from pipeline.evaluation.metrics import (
    Ranking,
    bm25_ranking,
    fused,
    neighbour_scores,
    retrieval_metrics,
    to_ranking,
    v_measure,
    without_own_documents,
)
from pipeline.evaluation.retrieval import TextVectors, nearest_documents
from pipeline.evaluation.tasks import (
    GENERAL,
    GENERAL_KEY,
    RetrievalTask,
    held_out_task,
    open_beir,
    read_classification,
    read_labels,
)
from pipeline.index.documents import tokens_fit
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.vectors import Floats, TopK, unit
from pipeline.model.folder import read_model_spec
from pipeline.model.scores import StsTask, pearson, read_sts, spearman

Scores = dict[str, Any]


def score_tasks(
    config: Config,
    folder: StoragePath,
    manifest: Manifest,
    recipe: EncoderRecipe,
    progress: Callable[[], Progress],
    details: Details | None = None,
) -> dict[str, Scores]:
    """Scores by task, in the order of the config's keys. `progress` starts Ray; it is called only to encode texts.

    Adds each query's NDCG@10, and examples of queries, to `details`.
    """
    settings, normalise = config.evaluation, normaliser(config.data)
    dimensions, vectors = read_model_spec(recipe.local).head.dimensions, TextVectors(recipe, progress)
    sizes = [recipe.width, *(size for size in dimensions if size < recipe.width)]
    scores: dict[str, Scores] = {}

    def vectors_of(texts: list[str], name: str) -> Floats:
        return vectors.of([normalise(text) for text in texts], name)

    for task in _retrieval_tasks(config, folder, manifest, recipe, normalise):
        if not task.queries:
            log.warning("evaluate: skipping %s, which has no queries", task.name)
            continue
        queries = vectors.of(list(task.queries.values()), f"queries of {task.name}", "query")
        found = nearest_documents(task, queries, sizes, recipe, progress())
        with Stage(f"evaluate: score {task.name}", len(task.queries), "queries") as stage:
            name = _unique(task.name, scores)
            scores[name], rankings = score_retrieval(task, found, bm25=settings.bm25)
            if details is not None:
                details.add(name, task, rankings)
            stage.advance(len(task.queries))
    for key, file in (("sts_file", settings.sts_file), ("general", settings.general)):
        if file is None or as_path(file).is_dir():
            continue
        pairs = read_sts(as_path(file), f"evaluation.{key}")
        name = f"{GENERAL}{pairs.name}" if key == "general" else pairs.name
        first, second = np.split(vectors_of(pairs.first + pairs.second, name), 2)
        scores[_unique(name, scores)] = score_sts(pairs, first, second, sizes)
    if settings.clustering_file:
        path = as_path(settings.clustering_file)
        texts, labels = read_labels(path, "evaluation.clustering_file")
        scores[_unique(path.stem, scores)] = score_clustering(vectors_of(texts, path.stem), labels, sizes)
    if settings.classification_dir:
        path = as_path(settings.classification_dir)
        train, train_labels, test, test_labels = read_classification(path)
        both = vectors_of(train + test, path.name)
        scores[_unique(path.name, scores)] = score_classification(
            both[: len(train)], train_labels, both[len(train) :], test_labels, sizes
        )
    if settings.mteb:
        from pipeline.evaluation.mteb_tasks import score_mteb

        scores |= score_mteb(settings.mteb, vectors, normalise)
    return scores


def _retrieval_tasks(
    config: Config, folder: StoragePath, manifest: Manifest, recipe: EncoderRecipe, normalise: Callable[[str], str]
) -> Iterator[RetrievalTask]:
    if config.evaluation.beir_dir:
        yield open_beir(as_path(config.evaluation.beir_dir)).normalised(normalise)
    if config.evaluation.general:
        general = as_path(config.evaluation.general)
        if general.is_dir():
            yield replace(open_beir(general, GENERAL_KEY).normalised(normalise), name=f"{GENERAL}{general.name}")
    if config.evaluation.held_out_queries and manifest.holds_pairs:
        prompt = read_model_spec(recipe.local).head.prompt("document")
        without_prompts = not any("positive" in source.prompts for source in manifest.sources)
        use_tokens = without_prompts and tokens_fit(config, folder, recipe, "positive", prompt)
        yield held_out_task(config, folder, use_tokens=use_tokens)


def _unique(name: str, scores: dict[str, Scores]) -> str:
    """The name, with a number if another task already has it."""
    names = (name if number == 1 else f"{name} {number}" for number in range(1, len(scores) + 2))
    return next(each for each in names if each not in scores)


def _system(name: str, size: int, sizes: list[int]) -> str:
    """`model` at full width, `model@64` for vectors truncated to 64 dimensions."""
    return name if size == sizes[0] else f"{name}@{size}"


def score_retrieval(task: RetrievalTask, found: dict[int, TopK], *, bm25: bool) -> tuple[Scores, dict[str, Ranking]]:
    """Metrics and rankings by system: the model at each size, full width first; with `bm25` also BM25, and both fused
    (hybrid)."""
    names, sizes = list(task.queries), list(found)
    rankings = {size: without_own_documents(to_ranking(names, result), task.qrels) for size, result in found.items()}
    systems = {_system("model", size, sizes): ranking for size, ranking in rankings.items()}
    if bm25:
        ids, texts = (list(column) for column in zip(*task.documents.items(), strict=True))
        ranked = bm25_ranking(names, list(task.queries.values()), ids, texts)
        lexical = without_own_documents(ranked, task.qrels)
        systems["bm25"] = lexical
        systems |= {_system("hybrid", size, sizes): fused(ranking, lexical) for size, ranking in rankings.items()}
    counts = {"queries": len(task.queries), "documents": len(task.documents)}
    metrics = {system: retrieval_metrics(task.qrels, ranking) for system, ranking in systems.items()}
    return counts | metrics, systems


def score_sts(task: StsTask, first: Floats, second: Floats, sizes: list[int]) -> Scores:
    """Correlations of cosines with human scores; (N, D) vectors of the first and the second sentences."""

    def correlations(size: int) -> dict[str, float]:
        cosines = (unit(first[:, :size]) * unit(second[:, :size])).sum(axis=1, dtype=np.float64).tolist()
        return {"spearman": spearman(task.scores, cosines), "pearson": pearson(task.scores, cosines)}

    return {"pairs": len(task.scores)} | _by_size(correlations, sizes)


def score_clustering(vectors: Floats, labels: list[str], sizes: list[int]) -> Scores:
    """V-measure of k-means clusters of (N, D) vectors."""
    counts = {"texts": len(labels), "labels": len(set(labels))}
    return counts | _by_size(lambda size: {"v_measure": v_measure(_cut(vectors, size), labels)}, sizes)


def score_classification(
    train: Floats, train_labels: list[str], test: Floats, test_labels: list[str], sizes: list[int]
) -> Scores:
    """Accuracy and macro F1 of nearest-neighbour classification; (N, D) and (M, D) vectors."""
    counts = {"texts": len(test), "training texts": len(train), "labels": len(set(train_labels))}
    return counts | _by_size(
        lambda size: neighbour_scores(_cut(train, size), train_labels, _cut(test, size), test_labels), sizes
    )


def _by_size(score: Callable[[int], dict[str, float]], sizes: list[int]) -> Scores:
    return {
        _system("model", size, sizes): {name: round(value, 4) for name, value in score(size).items()} for size in sizes
    }


def _cut(vectors: Floats, size: int) -> Floats:
    """Truncate vectors to `size` dimensions, at unit length; vectors of that size stay unchanged."""
    return vectors if size == vectors.shape[1] else unit(vectors[:, :size])
