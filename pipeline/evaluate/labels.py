"""Texts with labels: how well clusters of vectors follow the labels, and nearest neighbours predict them.

    texts, labels = read_labels(Path("topics/test.tsv"), "evaluation.clustering_file")
    v_measure(vectors, labels)                                    # 0.412
    neighbour_scores(train_vectors, train_labels, vectors, labels)     # {'accuracy': 0.91, 'macro_f1': 0.88}

Both as MTEB has them (Muennighoff et al. 2023, section 3.1, and its code): mini-batches of 500 for k-means with one
cluster a label, and the vote of the five nearest by cosine. Seeds are fixed, so the scores are the same on every run.
Cost: k-means wants all vectors of the file in memory; neighbours are found in blocks.
"""

from __future__ import annotations

import numpy as np

from pipeline.config import ConfigError
from pipeline.embedding.nearest import nearest, unit
from pipeline.evaluate.tsv import read_tsv
from pipeline.storage.path import StoragePath

COLUMNS = ("text", "label")
KMEANS_BATCH = 500
NEIGHBOURS = 5
BLOCK_ROWS = 8192  # training texts whose scores are in memory together


def read_labels(path: StoragePath, key: str) -> tuple[list[str], list[str]]:
    """Texts and their labels. Raises ConfigError naming the config `key` and the line that is not as it should be."""
    texts: list[str] = []
    labels: list[str] = []

    def take(cells: list[str]) -> None:
        texts.append(cells[0])
        labels.append(cells[1])

    read_tsv(path, COLUMNS, key, take)
    if len(set(labels)) < 2:
        raise ConfigError(f"{key}: {path} has {len(set(labels))} labels; allowed are two or more")
    return texts, labels


def read_classification(folder: StoragePath) -> tuple[list[str], list[str], list[str], list[str]]:
    """Training texts, their labels, test texts, theirs. Raises ConfigError."""
    key = "evaluation.classification_dir"
    return (*read_labels(folder / "train.tsv", key), *read_labels(folder / "test.tsv", key))


def v_measure(vectors: np.ndarray, labels: list[str]) -> float:
    """Harmonic mean of homogeneity and completeness of k-means clusters, 0 to 1; (N, D) vectors."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    count = len(set(labels))
    clusters = MiniBatchKMeans(count, batch_size=KMEANS_BATCH, n_init="auto", random_state=0).fit_predict(vectors)
    return float(v_measure_score(labels, clusters))


def neighbour_scores(
    train: np.ndarray, train_labels: list[str], test: np.ndarray, test_labels: list[str]
) -> dict[str, float]:
    """`accuracy` and `macro_f1` of the vote of the nearest training vectors by cosine; (N, D) and (M, D)."""
    from sklearn.metrics import accuracy_score, f1_score

    rows = (np.arange(start, min(start + BLOCK_ROWS, len(train))) for start in range(0, len(train), BLOCK_ROWS))
    blocks = ((some, unit(train[some])) for some in rows)
    near = nearest(unit(test), blocks, NEIGHBOURS).ids
    names, of_text = np.unique(train_labels, return_inverse=True)
    found = names[[np.bincount(votes).argmax() for votes in of_text[near]]]  # of as many votes, the first by name
    return {
        "accuracy": float(accuracy_score(test_labels, found)),
        "macro_f1": float(f1_score(test_labels, found, average="macro")),
    }
