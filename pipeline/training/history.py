"""A run's history: metrics.jsonl and alerts.jsonl, one line per report in order of step, with a table and a plot.

    lines = JsonLines(run_dir / "metrics.jsonl", resumed_step=40, kind=metrics_kind)     # keeps steps up to 40
    lines.write({"step": 50, "loss": 1.9})
    lines.write({"step": 60, "loss": 1.8})
    lines.write({"step": 50, "loss": 1.9})       # workers restarted at 40: replaces both lines from 50 on

Writing a line appends to the file; a restart of the workers rewrites the file once.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.console import duration, number, table
from pipeline.core.files import replacing, write_atomically
from pipeline.core.path import StoragePath
from pipeline.training.stopping import LOWER_IS_BETTER

Metrics = dict[str, float]
"""`step`, and metrics of either training or validation at that step; validation metrics are named `validation_*`."""

VALIDATION = "validation_"


class Tracker(ABC):
    """Takes metrics in order of step until it is closed. After a restart of workers, steps are repeated.

    Any method may raise: `Trackers` then removes the tracker and continues.
    """

    name = "tracker"

    @abstractmethod
    def log(self, metrics: Metrics) -> None: ...

    def alert(self, row: dict[str, Any]) -> None:  # noqa: B027
        """Record an alert with `step`, `title` and `text`. Most trackers ignore it."""

    def close(self, failed: bool) -> None:  # noqa: B027
        """Flush. `failed`: the run ends with an error."""


def grouped(metrics: Metrics) -> Metrics:
    """The metrics under names that TensorBoard and wandb group: `train/loss`, `validation/ndcg@10`."""
    return {
        f"validation/{name.removeprefix(VALIDATION)}" if name.startswith(VALIDATION) else f"train/{name}": value
        for name, value in metrics.items()
        if name != "step"
    }


Row = dict[str, Any]
"""A line of a JSON Lines file, with an integer `step`."""


class JsonLines:
    """A JSON Lines file of rows in order of step, with at most one row per step and `kind`."""

    def __init__(self, path: Path, resumed_step: int, kind: Callable[[Row], str]) -> None:
        self.path, self.kind = path, kind
        self._rewrite(lambda row: row["step"] <= resumed_step)

    def write(self, row: Row) -> None:
        """Append a row. Rows of later steps, and of the same step and kind, are removed."""
        if row["step"] < self.step or (row["step"] == self.step and self.kind(row) in self.kinds):
            self._rewrite(lambda old: old["step"] < row["step"] or self._is_another_of_its_step(old, row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._note(row)

    def _is_another_of_its_step(self, old: Row, row: Row) -> bool:
        return bool(old["step"] == row["step"] and self.kind(old) != self.kind(row))

    def _rewrite(self, keep: Callable[[Row], bool]) -> None:
        rows = [row for row in read_rows(self.path) if keep(row)]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.step: int = -1
        self.kinds: set[str] = set()
        for row in rows:
            self._note(row)

    def _note(self, row: Row) -> None:
        """Track the last step and the kinds of its rows."""
        if row["step"] != self.step:
            self.step, self.kinds = row["step"], set()
        self.kinds.add(self.kind(row))


class History(Tracker):
    """Writes metrics.jsonl and alerts.jsonl."""

    name = "metrics.jsonl"

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self.metrics = JsonLines(run_dir / "metrics.jsonl", resumed_step, metrics_kind)
        self.alerts = JsonLines(run_dir / "alerts.jsonl", resumed_step, lambda row: row["title"])

    def log(self, metrics: Metrics) -> None:
        self.metrics.write(metrics)

    def alert(self, row: Row) -> None:
        self.alerts.write(row)


def metrics_kind(row: Row) -> str:
    """Training rows have a `loss`, validation rows do not."""
    return "training" if "loss" in row else "validation"


def read_rows(path: StoragePath) -> list[Row]:
    """All rows of a file; none if it is missing. Invalid lines are skipped: a kill may leave half a line."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [row for line in lines if (row := _parsed(line)) is not None]


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


COLUMNS = 3
LOG_FROM_RATIO = 10  # largest / smallest value; within one decade a linear axis shows more. Ours


@dataclass(frozen=True)
class Panel:
    """One plot: the metrics whose full names match the pattern `names`, divided by `unit`."""

    title: str
    names: str
    axis: Literal["close", "log", "from zero"] = "close"
    """Fit the values, use a log scale if they span more than a decade, or start at zero so that noise looks small."""
    unit: float = 1.0


PANELS = (
    Panel("loss", r"(validation_)?loss", axis="log"),
    Panel("perplexity of a token", r".*perplexity", axis="log"),
    Panel("training pairs", r"accuracy|mrr"),
    Panel("validation scores", rf"{VALIDATION}(?!.*({'|'.join(LOWER_IS_BETTER)}|bleu)$).*"),
    Panel("BLEU", r".*bleu"),
    Panel("learning rate", r"learning_rate"),
    Panel("gradient norm", r"grad_norm", axis="log"),
    Panel("pairs per second", r"pairs_per_s", axis="from zero"),
    Panel("tokens per second", r"tokens_per_s", axis="from zero"),
    Panel("shares", r"mfu|data_wait_share|real_token_share|memory_share", axis="from zero"),
    Panel("memory, GB", r"memory_.*bytes", axis="from zero", unit=1e9),
)


def plot_history(history: StoragePath, png: StoragePath) -> None:
    """Plot a metrics.jsonl, with a panel for each of PANELS that has data. Writes nothing if none has."""
    from matplotlib.figure import Figure

    rows = read_rows(history)
    drawn = [(panel, series) for panel in PANELS if (series := series_of(rows, panel))]
    if not drawn:
        return
    lines = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for axis, (panel, series) in zip(axes, drawn, strict=False):
        _draw(axis, panel, series)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    with replacing(png) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def series_of(rows: Sequence[Row], panel: Panel) -> dict[str, list[tuple[int, float]]]:
    """The finite (step, value) points of the panel's metrics, by name."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if re.fullmatch(panel.names, name) and math.isfinite(value):
                series.setdefault(name, []).append((row["step"], value / panel.unit))
    return series


def _draw(axis: Any, panel: Panel, series: dict[str, list[tuple[int, float]]]) -> None:
    """Draw lines, with a dot for each validation, because there are few."""
    for name, points in sorted(series.items()):
        steps, values = zip(*points, strict=True)
        is_validation = name.startswith(VALIDATION)
        marker = "o" if is_validation or len(points) == 1 else None
        axis.plot(steps, values, marker=marker, markersize=3, linewidth=1.2, label=name, zorder=2 + is_validation)
    _scale(axis, panel, [value for points in series.values() for _, value in points])
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(which="both", labelsize=8)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=7)


def _scale(axis: Any, panel: Panel, values: list[float]) -> None:
    from matplotlib.ticker import LogLocator

    if panel.axis == "from zero":
        axis.set_ylim(bottom=0)
    elif panel.axis == "log" and 0 < LOG_FROM_RATIO * min(values) <= max(values):
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
        axis.yaxis.set_minor_formatter("{x:g}")


def final_table(history: Sequence[Row], unit: str = "pairs") -> str:
    """A table of the last training metrics, and of each validation metric's last and best value with its step.

    `unit`: what the records are called.
    """
    training = [row for row in history if metrics_kind(row) == "training"]
    validations = [row for row in history if metrics_kind(row) == "validation"]
    tables = []
    if training:
        last = training[-1]
        rows = [_measured(name, value, unit) for name, value in last.items() if _is_shown(name, value)]
        tables.append(table(rows, ("training", f"step {last['step']:,}")))
    if validations:
        last = validations[-1]
        names = [name for name in last if name.startswith(VALIDATION)]
        rows_ = [(name.removeprefix(VALIDATION), number(last[name]), *_best(name, validations)) for name in names]
        tables.append(table(rows_, ("validation", f"step {last['step']:,}", "best", "at step")))
    return "\n\n".join(tables)


def _is_shown(name: str, value: float) -> bool:
    return name not in ("step", "eta_s") and (name != "skipped_steps" or value > 0)


def _measured(name: str, value: float, unit: str) -> tuple[str, str]:
    """A training metric and its value with a unit."""
    if name.endswith("_per_s"):
        kind = name.removesuffix("_per_s")
        return "speed", f"{value:,.0f} {unit if kind == 'pairs' else kind}/s"
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes"), f"{value / 1e9:.2f} GB"
    if name.endswith("_seconds"):
        return "time", duration(value)
    if name.endswith("_share") or name in ("accuracy", "mfu", "device_utilisation"):
        return name.removesuffix("_share"), f"{value if name == 'device_utilisation' else 100 * value:.1f}%"
    return name, number(value)


def _best(name: str, rows: Sequence[Row]) -> tuple[str, str]:
    """The best value and its earliest step. Lower is better for losses, likelihoods and perplexities."""
    sign = 1 if name.endswith(LOWER_IS_BETTER) else -1
    points = [(sign * row[name], row["step"]) for row in rows if math.isfinite(row.get(name, math.nan))]
    if not points:
        return "–", "–"
    value, step = min(points)
    return number(sign * value), f"{step:,}"
