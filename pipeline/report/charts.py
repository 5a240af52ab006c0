"""The report's charts, as figures of plotly.js: dicts with `data` and `layout`. The page adds colours and fonts.

    figures = training_charts([facts])        # [{"title": "loss", "figure": {"data": [line, …], "layout": {…}}}, …]

With several runs, each has a colour, validation is dotted and BM25 dashed. BM25 is a line among the validation scores:
its NDCG@10 and recall@1 on the texts that validation ranks. NaN and infinity are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipeline.core.tokenizer_files import encoding, parse_tokenizer
from pipeline.evaluation.metrics import bm25_ranking, ndcg_by_query, retrieval_metrics
from pipeline.report.facts import Facts
from pipeline.training.history import LOG_FROM_RATIO, PANELS, VALIDATION, Panel, series_of

Chart = dict[str, Any]
"""`title`, `figure` and, if the chart needs one, a `note`."""

MAX_POINTS = 1_500  # of a line; longer ones are thinned
NARROW_PX = 250  # height of a chart that stands beside others


def training_charts(runs: Sequence[Facts]) -> list[Chart]:
    """A chart for each of PANELS that has data: loss, scores, learning rate, gradient norm, throughput, memory, …"""
    found = []
    for panel in PANELS:
        lines, values = [], []
        for run in runs:
            for name, points in sorted(series_of(_numbers(run.metrics), panel).items()):
                label = name.removeprefix(VALIDATION) if panel.title == "validation scores" else name.replace("_", " ")
                lines.append(_line(label, points, run.name if len(runs) > 1 else "", name.startswith(VALIDATION)))
                values += [value for _, value in points]
        if panel.title == "validation scores":
            lines += [line for run in runs for line in _bm25_lines(run, lines, several=len(runs) > 1)]
        if lines:
            found.append({"title": panel.title, "figure": {"data": lines, "layout": _axes(panel, values)}})
    return found


def _numbers(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what are numbers in them: a tracker of the user's may have written anything."""
    kept = ({name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows)
    return [row for row in kept if "step" in row]


def _line(name: str, points: Sequence[tuple[int, float]], run: str, is_validation: bool) -> dict[str, Any]:
    every = -(-len(points) // MAX_POINTS)
    steps, values = zip(*[*points[:-1:every], points[-1]], strict=True)
    return {
        "type": "scatter",
        "x": steps,
        "y": values,
        "run": run,
        "name": f"{run}: {name}" if run else name,
        "mode": "lines+markers" if is_validation or len(points) == 1 else "lines",
        "line": {"width": 1.8, "dash": "dot" if run and is_validation else "solid"},
    }


def _axes(panel: Panel, values: Sequence[float]) -> dict[str, Any]:
    axis: dict[str, Any] = {"rangemode": "tozero" if panel.axis == "from zero" else "normal"}
    if panel.axis == "log" and values and 0 < LOG_FROM_RATIO * min(values) <= max(values):
        axis |= {"type": "log", "dtick": "D2" if max(values) < 300 * min(values) else 1, "tickformat": "~g"}
    return {"xaxis": {"title": {"text": "step"}}, "yaxis": axis, "height": NARROW_PX}


def _bm25_lines(run: Facts, others: Sequence[dict[str, Any]], several: bool) -> list[dict[str, Any]]:
    """BM25's scores on the texts of validation, as level lines over all steps, in the colours of the model's."""
    steps, names = [row["step"] for row in _numbers(run.metrics)], [line["name"] for line in others]
    lines = []
    for name, value in bm25_of_validation(run).items() if steps else ():
        line: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines",
            "x": [min(steps), max(steps)],
            "y": [value, value],
            "run": run.name,
        }
        line |= {
            "name": f"{run.name}: BM25's {name}" if several else f"BM25's {name}",
            "line": {"width": 1.5, "dash": "dash"},
        }
        lines.append(
            line if several else line | {"like": names.index(name) if name in names else len(names), "run": ""}
        )
    return lines


def bm25_of_validation(run: Facts) -> dict[str, float]:
    """BM25's NDCG@10 and recall@1 of the pairs that are ranked at each validation; empty if there are none.

    The texts are those of the token shards: as the model sees them, cut at its maximum length.
    """
    manifest, limit = run.manifest, run.settings.get("training", {}).get("validation_pairs", 0)
    if manifest is None or run.prepared is None or not manifest.holds_pairs or not limit:
        return {}
    from pipeline.data.feed import validation_rows  # and Ray

    rows, file = validation_rows(run.prepared, manifest, limit), run.prepared / "tokenizer.json"
    tokenizer = parse_tokenizer(file.read_text(encoding="utf-8"), file)
    with encoding(tokenizer):
        anchors, positives = (tokenizer.decode_batch(rows[name].to_pylist()) for name in ("anchor", "positive"))
    right: dict[str, dict[str, int]] = {}
    for anchor, positive in zip(anchors, positives, strict=True):
        right.setdefault(anchor, {})[positive] = 1
    queries, documents = list(right), list(dict.fromkeys(positives))
    if not queries:
        return {}
    ranking = bm25_ranking(queries, queries, documents, documents)
    ndcg = ndcg_by_query(right, ranking)
    return {
        "ndcg@10": round(float(np.mean(list(ndcg.values()))), 4),
        "recall@1": retrieval_metrics(right, ranking)["recall@1"],
    }


def funnel_chart(run: Facts) -> Chart | None:
    """How many records came in, were rejected for each reason, and were kept."""
    if run.manifest is None:
        return None
    sources = run.manifest.sources
    reasons: dict[str, int] = {}
    for source in sources:
        for reason, rows in source.rejected.items():
            reasons[reason] = reasons.get(reason, 0) + rows
    steps = [("in", sum(source.rows_in for source in sources))]
    steps += [(reason, rows) for reason, rows in sorted(reasons.items(), key=lambda item: -item[1])]
    steps += [("kept", sum(source.rows_kept for source in sources))]
    names, counts = zip(*steps, strict=True)
    most = max(*counts, 1)
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": counts,
        "y": names,
        "text": [f"{count:,}" + (f" ({count / counts[0]:.1%})" if counts[0] else "") for count in counts],
        "textposition": "outside",
        "cliponaxis": False,
        "kinds": ["in", *["rejected"] * (len(steps) - 2), "kept"],
        "hoverinfo": "skip",
    }
    layout = {
        "height": 90 + 26 * len(steps),
        "xaxis": {"range": [0, 1.45 * most], "title": {"text": "records"}},
        "yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
        "showlegend": False,
    }
    return {"title": "records", "figure": {"data": [bars], "layout": layout}}


def length_charts(run: Facts) -> list[Chart]:
    """A histogram of each text field's lengths in tokens, with a line where texts are cut."""
    found = []
    limit = run.settings.get("tokenizer", {}).get("max_length")
    for name, histogram in (run.manifest.histograms if run.manifest else {}).items():
        texts, width = histogram["texts"], histogram["longest"] / max(len(histogram["texts"]), 1)
        bars = {
            "type": "bar",
            "x": [round((i + 0.5) * width, 2) for i in range(len(texts))],
            "y": texts,
            "width": width,
            "hovertemplate": "%{y:,} texts of about %{x:.0f} tokens<extra></extra>",
        }
        layout: dict[str, Any] = {
            "height": NARROW_PX,
            "bargap": 0,
            "xaxis": {"title": {"text": "tokens before truncation; the last bar has all longer texts"}},
            "yaxis": {"title": {"text": "texts"}},
            "showlegend": False,
        }
        if limit:
            line = {"color": "gray", "dash": "dash", "width": 1}
            layout["shapes"] = [
                {"type": "line", "x0": limit, "x1": limit, "y0": 0, "y1": 1, "yref": "paper", "line": line}
            ]
        summary = run.manifest.lengths[name] if run.manifest else {}
        note = f"mean {summary['whole_mean']:,.0f} tokens, {summary['truncation_rate']:.1%} of the texts cut at {limit}"
        found.append({"title": f"lengths of {name}", "figure": {"data": [bars], "layout": layout}, "note": note})
    return found


def score_chart(runs: Sequence[Facts]) -> Chart | None:
    """NDCG@10 of each retrieval task, a bar for each system, or with several runs for each run and for BM25."""
    bars: dict[str, dict[str, float]] = {}
    for run in runs:
        for task, result in run.scores.items():
            for system, values in result.items():
                if isinstance(values, dict) and _is_number(values.get("ndcg@10")):
                    own = system == "model"
                    if len(runs) > 1 and not own and system != "bm25":
                        continue
                    bars.setdefault(run.name if own and len(runs) > 1 else system, {})[task] = values["ndcg@10"]
    if not bars:
        return None
    data = [
        {
            "type": "bar",
            "name": name,
            "x": list(values),
            "y": list(values.values()),
            "text": [f"{value:.3f}" for value in values.values()],
            "textposition": "outside",
            "cliponaxis": False,
        }
        for name, values in bars.items()
    ]
    layout = {"barmode": "group", "height": 320, "yaxis": {"title": {"text": "NDCG@10"}, "rangemode": "tozero"}}
    layout["xaxis"] = {"type": "category"}
    return {"title": "NDCG@10", "figure": {"data": data, "layout": layout}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
