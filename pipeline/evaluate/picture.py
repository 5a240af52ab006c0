"""Points on a plane as a PNG, and as one HTML page that shows a point's text under the pointer and needs no network."""

from __future__ import annotations

import html
import textwrap

from pipeline.embedding.nearest import Floats
from pipeline.evaluate.map import Points
from pipeline.storage.files import replacing, write_atomically
from pipeline.storage.path import StoragePath

SHOWN_CHARS = 400  # of a text
LINE_CHARS = 80


def draw_png(plane: Floats, groups: list[str], title: str, path: StoragePath) -> None:
    """A point a record, a colour a group."""
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
    """The same to look into: hovering shows where a record is from and how it begins, the legend hides groups."""
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
    """What stands under the pointer: lines of text in which nothing is markup."""
    lines = [_cut(source_id, LINE_CHARS), *textwrap.wrap(_cut(text, SHOWN_CHARS), LINE_CHARS)]
    first, *rest = map(html.escape, lines)
    return "<br>".join([f"<b>{first}</b>", *rest])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
