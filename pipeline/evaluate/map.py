"""Vectors on a plane: a sample of a store, projected so that neighbours stay neighbours, and sorted into groups.

    points = sample(store.scan(COLUMNS), 5000)
    plane = project(points.vectors)                    # (5000, 2)
    groups = group(points, clusters=12)                # ["2: python, module, library", …], or sources

Projected is by principal components to 50 numbers, then by t-SNE (van der Maaten & Hinton 2008), as its authors advise.
What is near on the plane is near in space; distances between clumps, and their sizes, mean little. Seeds are fixed.
Cost: about 30 s for 5,000 points on two cores; memory that of the sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.embedding.columns import as_matrix
from pipeline.embedding.nearest import Floats, unit

COLUMNS = ("id", "source", "source_id", "text", "vector")
COMPONENTS = 50  # van der Maaten & Hinton 2008, section 4.1: 30 to 50
PERPLEXITY = 30.0
WORDS_A_CLUSTER = 3
FEWEST = 4


@dataclass(frozen=True)
class Points:
    """N records of a store, in the order of their ids; `vectors` are (N, D) at unit length."""

    sources: list[str]
    source_ids: list[str]
    texts: list[str]
    vectors: Floats


def sample(batches: Iterable[pa.RecordBatch], count: int) -> Points:
    """The `count` records first by id, which is a hash: the same ones in whatever order they come."""
    kept: pa.Table | None = None
    for batch in batches:
        here = pa.Table.from_batches([batch]).select(COLUMNS)
        kept = here if kept is None else pa.concat_tables([kept, here])
        kept = kept.sort_by("id").slice(0, count).combine_chunks()
    if kept is None or not len(kept):
        return Points([], [], [], np.empty((0, 0), np.float32))
    sources, source_ids, texts = (kept[name].to_pylist() for name in ("source", "source_id", "text"))
    return Points(sources, source_ids, texts, unit(as_matrix(kept["vector"])))


def project(vectors: Floats) -> Floats:
    """(N, 2) places of (N, D) vectors; N is at least FEWEST."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(COMPONENTS, *vectors.shape), random_state=0).fit_transform(vectors)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    plane: Floats = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    return plane


def group(points: Points, clusters: int) -> list[str]:
    """Each point's source, where there are several, else the name of its cluster by k-means."""
    if len(set(points.sources)) > 1:
        return points.sources
    from sklearn.cluster import KMeans

    labels = KMeans(min(clusters, len(points.texts)), n_init=4, random_state=0).fit_predict(points.vectors)
    names = _names(points.texts, labels)
    return [names[label] for label in labels.tolist()]


def _names(texts: list[str], labels: np.ndarray) -> dict[int, str]:
    """A number a cluster, the largest first, and the words that stand out in its texts by mean TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    order = [label for label, _ in Counter(labels.tolist()).most_common()]
    numbers = {label: str(number) for number, label in enumerate(order, 1)}
    try:
        vectorizer = TfidfVectorizer(stop_words="english", max_features=20_000, token_pattern=r"(?u)\b[^\W\d]\w+\b")
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # no words at all
        return numbers
    words, everywhere = vectorizer.get_feature_names_out(), np.asarray(weights.mean(axis=0)).ravel()
    for label in order:
        here = np.asarray(weights[labels == label].mean(axis=0)).ravel() - everywhere
        best = [words[i] for i in np.argsort(-here, kind="stable")[:WORDS_A_CLUSTER] if here[i] > 0]
        numbers[label] = ": ".join([numbers[label], ", ".join(best)] if best else [numbers[label]])
    return numbers
