"""Draws a map of a sample of the vectors, projected to two dimensions and coloured by source or cluster.

    draw_map(config, model, config.run_dir, sample_size=5000, clusters=12)   # map.png and map.html

    points = sample(table.scan(COLUMNS), 5000)
    plane = project(points.vectors)                    # (5000, 2)
    groups = group(points, clusters=12)                # ["2: python, module, library", …], or sources

PCA reduces the vectors to 50 dimensions, then t-SNE to two, as its authors advise (van der Maaten & Hinton 2008).
Points close together have similar vectors; the distances between clusters and their sizes mean little. Seeds are fixed.
Cost: about 30 s for 5,000 points on two cores; memory for the sample only.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import Config, ConfigError
from pipeline.core.console import Stage
from pipeline.core.files import replacing, write_atomically
from pipeline.core.outcome import JobError, Result, command
from pipeline.core.path import StoragePath
from pipeline.index.vectors import Floats, as_matrix, unit

COLUMNS = ("id", "source", "source_id", "text", "vector")
COMPONENTS = 50  # van der Maaten & Hinton 2008, section 4.1: 30 to 50
PERPLEXITY = 30.0
ITERATIONS = 1000  # of t-SNE at most: scikit-learn's default
WORDS_PER_CLUSTER = 3
MIN_POINTS = 4
SHOWN_CHARS, LINE_CHARS = 400, 80  # of the text in a tooltip


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
    with Stage("map: project", ITERATIONS, "iterations") as stage:
        plane = project(points.vectors, stage.advance)
        stage.advance(ITERATIONS - stage.done)  # t-SNE ends early if it has converged
    groups = group(points, clusters)
    title = f"{table.name}: {count:,} of {total:,} vectors"
    draw_png(plane, groups, title, folder / "map.png")
    write_page(plane, groups, points, title, folder / "map.html")
    paths = {"picture": str(folder / "map.png"), "page": str(folder / "map.html")}
    return Result({"points": count, "groups": len(set(groups))}, paths)


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

    reduced = PCA(min(COMPONENTS, *vectors.shape), random_state=0).fit_transform(vectors)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=ITERATIONS, verbose=2)
    with redirect_stdout(_Iterations(advance)):
        plane: Floats = tsne.fit_transform(reduced)
    return plane


def group(points: Points, clusters: int) -> list[str]:
    """Each point's source if there are several, else the name of its k-means cluster."""
    if len(set(points.sources)) > 1:
        return points.sources
    from sklearn.cluster import KMeans

    labels = KMeans(min(clusters, len(points.texts)), n_init=4, random_state=0).fit_predict(points.vectors)
    names = _names(points.texts, labels)
    return [names[label] for label in labels.tolist()]


def _names(texts: list[str], labels: np.ndarray) -> dict[int, str]:
    """Name each cluster: its rank by size, and the words whose mean TF-IDF exceeds the overall mean the most."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    order = [label for label, _ in Counter(labels.tolist()).most_common()]
    numbers = {label: str(number) for number, label in enumerate(order, 1)}
    try:
        vectorizer = TfidfVectorizer(stop_words="english", max_features=20_000, token_pattern=r"(?u)\b[^\W\d]\w+\b")
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # the texts have no words
        return numbers
    words, overall = vectorizer.get_feature_names_out(), np.asarray(weights.mean(axis=0)).ravel()
    for label in order:
        excess = np.asarray(weights[labels == label].mean(axis=0)).ravel() - overall
        best = [words[i] for i in np.argsort(-excess, kind="stable")[:WORDS_PER_CLUSTER] if excess[i] > 0]
        numbers[label] = ": ".join([numbers[label], ", ".join(best)] if best else [numbers[label]])
    return numbers


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


def write_page(plane: Floats, groups: list[str], points: Points, title: str, path: StoragePath) -> None:
    """Write the map as a self-contained HTML page: hovering shows a record, and the legend toggles groups."""
    import plotly.colors
    import plotly.graph_objects as graph

    palette = plotly.colors.qualitative.Dark24
    traces = [
        graph.Scattergl(
            x=plane[rows, 0],
            y=plane[rows, 1],
            mode="markers",
            name=html.escape(_cut(name, 40)),
            marker={"size": 5, "color": palette[number % len(palette)], "opacity": 0.8},
            text=[_shown(points.source_ids[row], points.texts[row]) for row in rows],
            hovertemplate="%{text}<extra></extra>",
        )
        for number, (name, rows) in enumerate(_by_group(groups).items())
    ]
    axis = {"showticklabels": False, "showgrid": False, "zeroline": False}
    figure = graph.Figure(traces).update_layout(
        title=html.escape(title),
        xaxis=axis,
        yaxis=axis | {"scaleanchor": "x"},
        template="plotly_white",
        hoverlabel={"align": "left"},
        legend={"itemsizing": "constant"},
    )
    page = figure.to_html(include_plotlyjs=True, config={"displaylogo": False}, default_height="97vh")
    write_atomically(path, page.encode())


def _by_group(groups: list[str]) -> dict[str, list[int]]:
    """Rows by group, the largest first."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        rows.setdefault(name, []).append(row)
    return dict(sorted(rows.items(), key=lambda item: (-len(item[1]), item[0])))


def _shown(source_id: str, text: str) -> str:
    """A record's tooltip in HTML: its source id and the beginning of its text."""
    lines = [_cut(source_id, LINE_CHARS), *textwrap.wrap(_cut(text, SHOWN_CHARS), LINE_CHARS)]
    first, *rest = map(html.escape, lines)
    return "<br>".join([f"<b>{first}</b>", *rest])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
