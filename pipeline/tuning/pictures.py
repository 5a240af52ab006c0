"""A sweep in three pictures: which values went with which score, which keys mattered, and how each trial learned.

draw_curves(sweep, folder / "curves.png")             # False, and no file, where there is nothing to show
"""

from __future__ import annotations

import math
from typing import Any

from pipeline.storage.files import replacing
from pipeline.storage.path import StoragePath
from pipeline.tuning.sweep import Row, Sweep

EARLY = "0.7"  # grey, of trials that were stopped early
COLOURS = "viridis"


def draw_coordinates(sweep: Sweep, png: StoragePath) -> bool:
    """A line a trial through its values, a column a key, the score last and as the line's colour."""
    rows = [row for row in sweep.rows if row.value is not None]
    if not rows:
        return False
    figure, axes = _figure(2.2 * (len(sweep.space.dimensions) + 1) + 1.5, 4.5)
    columns = [_column(key, rows, sweep) for key in sweep.space.dimensions]
    scores = [row.value or 0.0 for row in rows]
    columns.append((sweep.terms.metric, [_share(score, scores) for score in scores], _ends(scores)))
    import matplotlib

    colours = matplotlib.colormaps[COLOURS]
    best = sweep.best
    for index, row in sorted(enumerate(rows), key=lambda pair: sweep.terms.sign * (pair[1].value or 0.0)):
        heights = [heights[index] for _, heights, _ in columns]
        colour = colours(heights[-1] if sweep.terms.sign > 0 else 1 - heights[-1])
        axes.plot(heights, color=colour, linewidth=3 if row == best else 1.2, alpha=1.0 if row.state == "done" else 0.6)
    axes.set_xticks(range(len(columns)), [name for name, _, _ in columns], fontsize=8)
    for place, (_, _, marks) in enumerate(columns):
        axes.axvline(place, color="0.8", linewidth=0.8, zorder=0)
        for height, text in marks:
            axes.annotate(text, (place, height), xytext=(3, 2), textcoords="offset points", fontsize=7)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.set_title(f"{len(rows)} trials; the thick line is the best, pale ones were stopped early", fontsize=10)
    return _save(figure, png)


def draw_importance(sweep: Sweep, png: StoragePath) -> bool:
    """Bars: the share of the score's variance that goes with each key."""
    shares = sweep.importance()
    if not shares:
        return False
    figure, axes = _figure(6.5, 1.2 + 0.45 * len(shares))
    names = sorted(shares, key=lambda name: shares[name])
    bars = axes.barh(names, [shares[name] for name in names], height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(0, 1.1)
    axes.tick_params(labelsize=8)
    step, trials = sweep.common_step
    axes.set_title(
        f"share of the variance of {sweep.terms.metric} at step {step:,}, {trials} trials (fANOVA)", fontsize=9
    )
    return _save(figure, png)


def draw_curves(sweep: Sweep, png: StoragePath) -> bool:
    """The metric by step: trials that went to their end in colour, the best one thick, the others grey."""
    rows, best = [row for row in sweep.rows if row.curve], sweep.best
    if not rows:
        return False
    figure, axes = _figure(8, 4.5)
    for row in sorted(rows, key=lambda row: row.state == "done"):
        steps, values = zip(*row.curve.items(), strict=True)
        whole = row.state == "done"
        axes.plot(
            steps,
            values,
            marker="o",
            markersize=3,
            color=None if whole else EARLY,
            linewidth=2.5 if row == best else 1.2,
            label=f"trial {row.number}" if whole else None,
        )
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(sweep.terms.metric, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.set_title(f"{len(rows)} trials; grey ones were stopped early", fontsize=10)
    if any(row.state == "done" for row in rows):
        axes.legend(fontsize=7, ncols=2)
    return _save(figure, png)


Column = tuple[str, list[float], list[tuple[float, str]]]
"""A name, a height in 0..1 for each trial, and the marks on its axis."""


def _column(key: str, rows: list[Row], sweep: Sweep) -> Column:
    """Numbers by their size, by their order of magnitude where that is how they were drawn; choices in their order."""
    dimension, values = sweep.space.dimensions[key], [row.values[key] for row in rows]
    name = key.replace(".", ".\n")
    if dimension.choice is not None:
        places = [dimension.choice.index(value) / max(len(dimension.choice) - 1, 1) for value in values]
        marks = [(i / max(len(dimension.choice) - 1, 1), str(each)) for i, each in enumerate(dimension.choice)]
        return name, places, marks
    scaled = [math.log(value) for value in values] if dimension.loguniform else values
    low, high = (min(values), max(values))
    return name, [_share(value, scaled) for value in scaled], _ends([low, high])


def _share(value: float, among: list[Any]) -> float:
    low, high = min(among), max(among)
    return (value - low) / (high - low) if high > low else 0.5


def _ends(values: list[float]) -> list[tuple[float, str]]:
    low, high = min(values), max(values)
    return [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")] if high > low else [(0.5, f"{low:.3g}")]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, png: StoragePath) -> bool:
    with replacing(png) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
