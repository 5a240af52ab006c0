"""Draws a map of a sample of the vectors, projected to two dimensions and coloured by cluster or source.

    draw_map(config, model, config.run_dir, sample_size=5000, clusters=12)   # map.png, map.html, map.json

    points = sample(table.scan(COLUMNS), 5000)
    plane = project(points.vectors)                    # (5000, 2)
    numbers, names = cluster(points, clusters=12)      # (5000,), ["python, module, library", …]

map.json is what the run's report shows.

PCA reduces the vectors to 50 dimensions, then t-SNE to two, as its authors advise (van der Maaten & Hinton 2008).
Points close together have similar vectors; the distances between clusters and their sizes mean little. Seeds are fixed.
Cost: about 30 s for 5,000 points on two cores; memory for the sample only.
"""

from __future__ import annotations

import html
import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config, ConfigError
from pipeline.core.console import Stage
from pipeline.core.files import replacing, write_atomically
from pipeline.core.outcome import JobError, Result, command
from pipeline.core.path import StoragePath
from pipeline.index.vectors import Floats, as_matrix, unit
from pipeline.report.facts import MAP
from pipeline.report.page import Page, Section, one_line, render
from pipeline.report.sections import map_content

TSNE_STEPS = 500  # trustworthiness 0.924, and 0.925 after 1,000, for 5,000 points of the quickstart. Ours, measured
COLUMNS = ("id", "source", "source_id", "text", "vector")
COMPONENTS = 50  # van der Maaten & Hinton 2008, section 4.1: 30 to 50
PERPLEXITY = 30.0
WORDS_PER_CLUSTER = 3
MIN_POINTS = 4
SHOWN_CHARS, LINE_CHARS = 300, 70  # of the text in a tooltip
NAME_CHARS = 60
WORD_CHARS = 2_000  # of each text, when clusters are named


@dataclass(frozen=True)
class Points:
    """N records sorted by id; `vectors` are (N, D), unit length."""

    sources: list[str]
    source_ids: list[str]
    texts: list[str]
    vectors: Floats


def draw_map(
    config: Config, model: StoragePath, folder: StoragePath, *, sample_size: int = 5000, clusters: int = 12
) -> Result:
    """Draw a model's vectors in the run's table as `map.png` and `map.html` in a folder.

    Raises ConfigError if an argument is too small, JobError if there are too few vectors.
    """
    for option, value, least in (("--sample", sample_size, MIN_POINTS), ("--clusters", clusters, 1)):
        if value < least:
            raise ConfigError(f"{option}: found {value}; allowed is {least} or more")
    from pipeline.index.published import encoder_recipe, table_of

    table = table_of(config, encoder_recipe(config, model))
    if not table.exists():
        raise JobError(f"no vectors yet for the model in {model}; run {command('embed')} first")
    points = sample(table.scan(COLUMNS), sample_size)
    count, total = len(points.texts), table.count()
    if count < MIN_POINTS:
        raise JobError(f"{table.name} holds {count} vectors; a map needs at least {MIN_POINTS}")
    with Stage("map: project", TSNE_STEPS, "steps") as stage:
        plane = project(points.vectors, stage.advance)
        stage.advance(TSNE_STEPS - stage.done)  # t-SNE ends early if it has converged
    numbers, names = cluster(points, clusters)
    drawn = described(plane, numbers, names, points, f"{table.name}: {count:,} of {total:,} vectors")
    groups = points.sources if len(drawn["sources"]) > 1 else [names[number] for number in numbers.tolist()]
    draw_png(plane, groups, drawn["title"], folder / "map.png")
    write_page(drawn, folder / "map.html")
    write_atomically(folder / MAP, json.dumps(drawn).encode())
    paths = {"picture": str(folder / "map.png"), "page": str(folder / "map.html"), "data": str(folder / MAP)}
    return Result({"points": count, "clusters": len(names), "sources": len(drawn["sources"])}, paths)


def sample(batches: Iterable[pa.RecordBatch], count: int) -> Points:
    """The first `count` records by id: a random sample, as ids are hashes, and independent of the batches' order."""
    kept: pa.Table | None = None
    for batch in batches:
        rows = pa.Table.from_batches([batch]).select(COLUMNS)
        kept = rows if kept is None else pa.concat_tables([kept, rows])
        kept = kept.sort_by("id").slice(0, count).combine_chunks()
    if kept is None or not len(kept):
        return Points([], [], [], np.empty((0, 0), np.float32))
    sources, source_ids, texts = (kept[name].to_pylist() for name in ("source", "source_id", "text"))
    return Points(sources, source_ids, texts, unit(as_matrix(kept["vector"])))


class _Iterations(io.StringIO):
    """Where t-SNE prints its iterations, every 50; reports how many there are since the last line."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        super().__init__()
        self.advance, self.done = advance, 0

    def write(self, text: str) -> int:
        for found in re.findall(r"Iteration (\d+):", text):
            self.advance(int(found) - self.done)
            self.done = int(found)
        return len(text)


def project(vectors: Floats, advance: Callable[[int], object] = lambda iterations: None) -> Floats:
    """Project (N, D) vectors to (N, 2) coordinates; N is at least MIN_POINTS. Calls `advance` with new iterations."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    reduced = PCA(min(COMPONENTS, *vectors.shape), random_state=0).fit_transform(vectors)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=TSNE_STEPS, verbose=2)
    with (
        threadpool_limits(1),
        redirect_stdout(_Iterations(advance)),
    ):  # threads that wait for each other take twice the time, and many times on a busy machine
        plane: Floats = tsne.fit_transform(reduced)
    return plane


def cluster(points: Points, clusters: int) -> tuple[np.ndarray, list[str]]:
    """The cluster of each point by k-means, and each cluster's name; the largest cluster has number 0."""
    from sklearn.cluster import KMeans

    labels = KMeans(min(clusters, len(points.texts)), n_init=4, random_state=0).fit_predict(points.vectors)
    order = [label for label, _ in Counter(labels.tolist()).most_common()]
    numbers = np.argsort(order)[labels]
    return numbers, characteristic_words(points.texts, numbers)


def characteristic_words(texts: list[str], numbers: np.ndarray) -> list[str]:
    """A name for each cluster: its most characteristic words by c-TF-IDF, or its number if it has none.

    A word's weight in a cluster is the root of its share of the cluster's words, times log(1 + (A - f + 0.5) / (f +
    0.5)): A is the mean number of words in a cluster, f how often the word occurs in all of them (Grootendorst 2022,
    BERTopic, section 3.3, with the package's options bm25_weighting and reduce_frequent_words).
    """
    from sklearn.feature_extraction.text import CountVectorizer

    count = int(numbers.max()) + 1
    joined = [
        "\n".join(texts[row][:WORD_CHARS] for row in np.flatnonzero(numbers == number)) for number in range(count)
    ]
    try:
        vectorizer = CountVectorizer(stop_words="english", max_features=20_000, token_pattern=r"(?u)\b[^\W\d]\w+\b")
        counts = vectorizer.fit_transform(joined).toarray().astype(np.float64)  # (clusters, words)
    except ValueError:  # the texts have no words
        return [str(number) for number in range(1, count + 1)]
    words, of_cluster = vectorizer.get_feature_names_out(), counts.sum(axis=1, keepdims=True)
    often = counts.sum(axis=0)
    rarity = np.log1p(np.maximum(of_cluster.mean() - often + 0.5, 0) / (often + 0.5))
    weights = np.sqrt(counts / np.maximum(of_cluster, 1)) * rarity
    best = np.argsort(-weights, axis=1, kind="stable")[:, :WORDS_PER_CLUSTER]
    return [
        ", ".join(words[word] for word in best[number] if weights[number, word] > 0) or str(number + 1)
        for number in range(count)
    ]


def draw_png(plane: Floats, groups: list[str], title: str, path: StoragePath) -> None:
    """Draw one point per record, in its group's colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    axis = figure.subplots()
    for number, (name, rows) in enumerate(_by_group(groups).items()):
        colour = colormaps["tab20"](number % 20)
        axis.scatter(plane[rows, 0], plane[rows, 1], s=7, linewidths=0, alpha=0.8, color=colour, label=_cut(name, 40))
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3, fontsize=9, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def described(plane: Floats, numbers: np.ndarray, names: list[str], points: Points, title: str) -> dict[str, Any]:
    """The map as JSON, for pages: points from 0 to 1 with tooltips, names of clusters and sources, and centres."""
    low, high = plane.min(axis=0), plane.max(axis=0)
    places = np.round((plane - low) / np.maximum(high - low, 1e-9), 4)
    sources = sorted(set(points.sources))
    centres = [np.median(places[numbers == number], axis=0).tolist() for number in range(len(names))]
    return {
        "title": title,
        "clusters": [_cut(name, NAME_CHARS) for name in names],
        "sources": [_cut(source, NAME_CHARS) for source in sources],
        "centres": [{"x": x, "y": y} for x, y in centres],
        "points": [
            {
                "x": x,
                "y": y,
                "cluster": number,
                "source": sources.index(source),
                "hover": _shown(source_id, text),
                "search": one_line(f"{source_id} {text}", SHOWN_CHARS).lower(),
            }
            for (x, y), number, source, source_id, text in zip(
                places.tolist(), numbers.tolist(), points.sources, points.source_ids, points.texts, strict=True
            )
        ],
    }


def write_page(drawn: dict[str, Any], path: StoragePath) -> None:
    """Write the map as a self-contained HTML page: hovering shows a record, the legend toggles groups."""
    page = Page(str(drawn["title"]), "", [Section("map", "", map=map_content(drawn))])
    write_atomically(path, render(page).encode())


def _by_group(groups: list[str]) -> dict[str, list[int]]:
    """Rows by group, the largest first."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        rows.setdefault(name, []).append(row)
    return dict(sorted(rows.items(), key=lambda item: (-len(item[1]), item[0])))


def _shown(source_id: str, text: str) -> str:
    """A record's tooltip in plotly's HTML: its source id and the beginning of its text."""
    lines = [one_line(source_id, LINE_CHARS), *textwrap.wrap(one_line(text, SHOWN_CHARS), LINE_CHARS)]
    first, *rest = map(html.escape, lines)
    return "<br>".join([f"<b>{first}</b>", *rest])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
