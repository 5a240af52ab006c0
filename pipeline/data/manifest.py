"""A prepared data set: token shards, the records they came from, and `manifest.json`, written last.

<root>/prepared/<fingerprint>/
    tokenizer.json
    records/00000.parquet             kept records, text and metadata, by hash of id
    rejected/00000.parquet            rejected records: id, source, source_id, reason, excerpt, duplicate_of, similarity
    train/00000.parquet               token shards: id, source, and each text field as a list of token ids
    validation/00000.parquet
    lengths.png                       histograms of text lengths in tokens
    manifest.json                     the fields of `Manifest`

The files are hard links to the outputs of the stages in <root>/stages/; in a bucket they are copies.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.artifact import Files, read_manifest
from pipeline.core.files import digest_of
from pipeline.core.path import StoragePath
from pipeline.data.fields import EXCERPT_CHARS, TEXT_FIELDS

SPLITS = ("train", "validation")
BARS = 60  # of a histogram of lengths

RECORD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("source_id", pa.string()),
        ("text", pa.string()),
        ("anchor", pa.string()),
        ("positive", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("metadata", pa.string()),  # a JSON object of the columns in the source's `metadata`
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "source_id", "reason", "excerpt")),
        ("duplicate_of", pa.string()),  # source_id of the record that was kept, or id of the evaluation text
        ("similarity", pa.float64()),  # Jaccard, of near-duplicates and contaminated records
    ]
)


@dataclass(frozen=True)
class SourceCount:
    """Record counts of a source. Every run checks that `rows_in == rows_kept + sum(rejected.values())`."""

    name: str
    rows_in: int
    rows_kept: int
    rejected: dict[str, int]
    weight: float | None = None  # share of training batches, relative to the other sources' weights
    prompts: dict[str, str] = field(default_factory=dict)  # by text field; the token shards include them
    lost_fraction: float = 0.0  # estimated share of its rows in files that could not be read to their end


@dataclass(frozen=True)
class Shard:
    """A file of one split: the number of rows in each row group and, in train, the source of those rows."""

    path: str  # relative to the data set's folder
    split: str
    rows: int
    row_groups: list[int]
    row_group_sources: list[str | None]
    sha256: str


@dataclass(frozen=True)
class TeacherVectors:
    """A teacher's vectors of a data set's texts, in files of the shards' names, with the same rows and row groups.

    A file has a column `teacher_<field>` for each text field.
    """

    folder: str
    width: int


@dataclass(frozen=True)
class Manifest:
    fingerprint: str
    sources: list[SourceCount]
    splits: dict[str, int]
    shards: list[Shard]
    lengths: dict[str, dict[str, float]]  # by text field: LengthCounts.summary
    clusters: list[dict[str, Any]]  # records with the most near-duplicates
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)  # config keys that the shards depend on
    files: Files = field(default_factory=dict)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)  # by text field: LengthCounts.histogram
    held_out_fraction: float | None = None  # None in data sets of earlier versions: as in `settings`
    # Only in memory; training adds them.
    teacher: TeacherVectors | None = None
    initial_table: str | None = None  # a .npy file, see index/static_table.py

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    @property
    def holds_pairs(self) -> bool:
        return "anchor" in self.lengths

    @property
    def unit(self) -> str:
        """What its records are called in messages."""
        return "pairs" if self.holds_pairs else "texts"

    @property
    def text_fields(self) -> list[str]:
        return [name for name in TEXT_FIELDS if name in self.lengths]


def read_prepared(folder: StoragePath) -> Manifest | None:
    """The manifest of a complete data set, or None."""
    content = read_manifest(folder)
    if content is None:
        return None
    try:
        content["sources"] = [SourceCount(**source) for source in content["sources"]]
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return Manifest(**content)
    except (KeyError, TypeError):
        return None


def rejections(rows: pa.Table, reason: str, similarity: pa.Array | None) -> pa.Table:
    """Rows with a `duplicate_of`, in REJECTED_SCHEMA. Fills in a missing `reason` and excerpt."""
    excerpt = pc.utf8_slice_codeunits(pc.coalesce(rows["anchor"], rows["text"]), 0, EXCERPT_CHARS)
    columns = {name: rows[name] for name in ("id", "source", "source_id")}
    columns["reason"] = pc.fill_null(rows["reason"], reason) if "reason" in rows.column_names else [reason] * len(rows)
    columns["excerpt"] = pc.coalesce(rows["excerpt"], excerpt) if "excerpt" in rows.column_names else excerpt
    columns["duplicate_of"] = rows["duplicate_of"]
    columns["similarity"] = pa.nulls(len(rows), pa.float64()) if similarity is None else similarity
    return pa.table(columns).cast(REJECTED_SCHEMA)


def count_outcomes(kept: pa.Table, rejected: pa.Table) -> dict[str, Counter[str]]:
    """Source → outcome (`kept` or a reason) → rows."""
    outcomes: dict[str, Counter[str]] = {}
    for source in kept["source"].to_pylist():
        outcomes.setdefault(source, Counter())["kept"] += 1
    for source, reason in zip(rejected["source"].to_pylist(), rejected["reason"].to_pylist(), strict=True):
        outcomes.setdefault(source, Counter())[reason] += 1
    return outcomes


def sha256(path: StoragePath) -> str:
    return digest_of(path, hashlib.sha256())


@dataclass
class LengthCounts:
    """Token lengths of one text field, as counts that can be merged across tasks."""

    stored: Counter[int] = field(default_factory=Counter)  # tokens of a row, including special tokens → rows
    whole: Counter[int] = field(default_factory=Counter)  # tokens of a text before truncation → texts
    too_long: int = 0  # texts that do not fit in one row
    unknown: int = 0  # tokens outside the vocabulary
    tokens: int = 0  # of all texts, before truncation

    def add(self, whole: npt.NDArray[np.integer], stored: npt.NDArray[np.integer], room: int, unknown: int) -> None:
        """Count texts by their `whole` length and rows by their `stored` length; `room` tokens fit in a row."""
        self.whole.update(whole.tolist())
        self.stored.update(stored.tolist())
        self.too_long += int(np.count_nonzero(whole > room))
        self.tokens += int(whole.sum())
        self.unknown += unknown

    def merge(self, other: dict[str, Any]) -> None:
        """Add another task's counts, given as the JSON of `vars`."""
        self.stored.update({int(length): rows for length, rows in other["stored"].items()})
        self.whole.update({int(length): texts for length, texts in other["whole"].items()})
        self.too_long += other["too_long"]
        self.unknown += other["unknown"]
        self.tokens += other["tokens"]

    def summary(self) -> dict[str, float]:
        """Statistics of stored rows, of texts before truncation (`whole_*`), and rates."""
        texts = max(sum(self.whole.values()), 1)
        return {
            **_figures(self.stored),
            **{f"whole_{name}": value for name, value in _figures(self.whole).items() if name in ("mean", "max")},
            "rows": sum(self.stored.values()),
            "tokens": sum(length * rows for length, rows in self.stored.items()),
            "truncation_rate": round(self.too_long / texts, 6),
            "unknown_rate": round(self.unknown / max(self.tokens, 1), 6),
        }

    def histogram(self, max_length: int) -> dict[str, Any]:
        """Texts by length before truncation: `texts` in bars of equal width from 0 to `longest`.

        The last bar includes all longer texts.
        """
        longest = int(1.1 * max(_figures(self.whole)["p99"], max_length))
        lengths, texts = list(self.whole), list(self.whole.values())
        bars, _ = np.histogram([min(length, longest) for length in lengths], BARS, (0, longest), weights=texts)
        return {"longest": longest, "texts": bars.astype(int).tolist()}


def _figures(counts: Counter[int]) -> dict[str, float]:
    """Mean, standard deviation, minimum, percentiles and maximum of a histogram, number → count."""
    if not counts:
        return dict.fromkeys(("mean", "std", "min", "p50", "p90", "p95", "p99", "max"), 0)
    values, weights = np.array(sorted(counts.items()), dtype=np.int64).T
    mean = float(np.average(values, weights=weights))
    percentiles = (50, 90, 95, 99)
    found = np.percentile(values, percentiles, weights=weights, method="inverted_cdf").tolist()
    return {
        "mean": round(mean, 2),
        "std": round(float(np.sqrt(np.average((values - mean) ** 2, weights=weights))), 2),
        "min": int(values[0]),
        **{f"p{p}": int(value) for p, value in zip(percentiles, found, strict=True)},
        "max": int(values[-1]),
    }


def draw_lengths(counts: dict[str, LengthCounts], max_length: int, path: Path) -> None:
    """Plot a histogram of text lengths for each field, with a line at `max_length`, where texts are cut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(counts)), layout="constrained")
    axes = figure.subplots(len(counts), squeeze=False)[:, 0]
    for axis, (name, count) in zip(axes, counts.items(), strict=True):
        histogram = count.histogram(max_length)
        axis.stairs(histogram["texts"], np.linspace(0, histogram["longest"], BARS + 1), fill=True)
        axis.axvline(max_length, color="black", linestyle="--", linewidth=1)
        summary = count.summary()
        axis.set_title(
            f"{name}: {sum(histogram['texts']):,} texts, mean {summary['whole_mean']:,.0f} tokens, "
            f"{summary['truncation_rate']:.1%} longer than {max_length}",
            fontsize=10,
        )
        axis.set_ylabel("texts")
    axes[-1].set_xlabel("tokens before truncation; the last bar includes all longer texts")
    figure.savefig(path, format="png", dpi=110)
