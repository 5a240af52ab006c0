"""How long texts are in tokens: counts that add up over tasks, the figures that the manifest has, and a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]


@dataclass
class LengthCounts:
    """Of one text field: rows by stored length, texts by their own length, and the tokens among them."""

    stored: Counter[int] = field(default_factory=Counter)  # tokens of a row, special ones included → rows
    whole: Counter[int] = field(default_factory=Counter)  # tokens of a text before it was cut → texts
    too_long: int = 0  # texts of more tokens than fit in one row
    unknown: int = 0  # tokens outside the vocabulary
    tokens: int = 0  # of whole texts

    def add(self, whole: Ints, stored: Ints, room: int, unknown: int) -> None:
        """Count texts by their lengths, the rows that they became by theirs, and the unknown tokens of the texts."""
        for counter, lengths in ((self.whole, whole), (self.stored, stored)):
            values, texts = np.unique(lengths, return_counts=True)
            counter.update(dict(zip(values.tolist(), texts.tolist(), strict=True)))
        self.too_long += int(np.count_nonzero(whole > room))
        self.tokens += int(whole.sum())
        self.unknown += unknown

    def merge(self, other: dict[str, Any]) -> None:
        """Add counts that `to_json` gave."""
        self.stored.update({int(length): rows for length, rows in other["stored"].items()})
        self.whole.update({int(length): texts for length, texts in other["whole"].items()})
        self.too_long += other["too_long"]
        self.unknown += other["unknown"]
        self.tokens += other["tokens"]

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    def summary(self) -> dict[str, float]:
        """Figures over rows as stored; `whole_*` over texts before they were cut; rates over texts and tokens."""
        texts = max(sum(self.whole.values()), 1)
        return {
            **_figures(self.stored),
            **{f"whole_{name}": value for name, value in _figures(self.whole).items() if name in ("mean", "max")},
            "rows": sum(self.stored.values()),
            "tokens": sum(length * rows for length, rows in self.stored.items()),
            "truncation_rate": round(self.too_long / texts, 6),
            "unknown_rate": round(self.unknown / max(self.tokens, 1), 6),
        }


def _figures(counts: Counter[int]) -> dict[str, float]:
    """Mean, standard deviation, minimum, percentiles and maximum of numbers given as number → how often."""
    if not counts:
        return dict.fromkeys(("mean", "std", "min", "p50", "p90", "p95", "p99", "max"), 0)
    values = np.array(sorted(counts), dtype=np.int64)
    weights = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    share = weights.cumsum() / weights.sum()
    mean = float(np.average(values, weights=weights))
    percentiles = {f"p{p}": int(values[np.searchsorted(share, p / 100)]) for p in (50, 90, 95, 99)}
    return {
        "mean": round(mean, 2),
        "std": round(float(np.sqrt(np.average((values - mean) ** 2, weights=weights))), 2),
        "min": int(values[0]),
        **percentiles,
        "max": int(values[-1]),
    }


def draw(counts: dict[str, LengthCounts], max_length: int, path: Path) -> None:
    """A histogram a field of texts by their whole length, with a line where they are cut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(counts)), layout="constrained")
    axes = figure.subplots(len(counts), squeeze=False)[:, 0]
    for axis, (name, count) in zip(axes, counts.items(), strict=True):
        lengths, texts = list(count.whole), list(count.whole.values())
        longest = max(_figures(count.whole)["p99"] * 1.1, max_length * 1.1)
        axis.hist([min(length, longest) for length in lengths], bins=60, range=(0, longest), weights=texts)
        axis.axvline(max_length, color="black", linestyle="--", linewidth=1)
        summary = count.summary()
        axis.set_title(
            f"{name}: {sum(texts):,} texts, mean {summary['whole_mean']:,.0f} tokens, "
            f"{summary['truncation_rate']:.1%} longer than {max_length}",
            fontsize=10,
        )
        axis.set_ylabel("texts")
    axes[-1].set_xlabel("tokens before cutting; the last bar holds all that are longer still")
    figure.savefig(path, format="png", dpi=110)
