"""What is said about prepared data: what is wrong with it, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow.compute as pc

from pipeline.config import Data
from pipeline.data.manifest import Manifest, SourceCount
from pipeline.runtime.artifact import open_parquet
from pipeline.runtime.console import log, table
from pipeline.runtime.outcome import JobError
from pipeline.storage.files import matching
from pipeline.storage.path import StoragePath

BAD_REASONS = (  # what cannot be read, as against what is not wanted; counted by data.max_bad_fraction
    *("broken_csv", "broken_json", "broken_python", "invalid_utf8", "wrong_cell_count"),
    *(
        "file_too_long",
        "line_too_long",
        "paragraph_too_long",
        "unreadable_file",
        "unreadable_row_group",
        "unreadable_value",
    ),
    *("missing_field", "null_field", "wrong_type"),
)
DUPLICATES = ("duplicate", "near_duplicate")
NOT_ITS_FAULT = (*DUPLICATES, "contaminated")  # a source may lose all its records to these
EXAMPLES = 3


def check_sources(sources: Sequence[SourceCount], data: Data, folder: StoragePath) -> None:
    """The books must balance, no more may be broken than the user allows, and something must be kept."""
    for source in sources:
        found = source.rows_kept + sum(source.rejected.values())
        if source.rows_in != found:
            raise JobError(f"source {source.name}: {source.rows_in} records were read but {found} accounted for")
        bad = {reason: rows for reason, rows in source.rejected.items() if reason in BAD_REASONS}
        if sum(bad.values()) > data.max_bad_fraction * source.rows_in:
            raise JobError(
                f"source {source.name}: {_listed(bad)} of {source.rows_in} records are more than "
                f"data.max_bad_fraction={data.max_bad_fraction} allows; {folder / 'rejected'} names them"
            )
        spared = sum(source.rejected.get(reason, 0) for reason in NOT_ITS_FAULT)
        if source.rows_in and source.rows_kept + spared == 0:
            raise JobError(
                f"source {source.name}: none of its {source.rows_in} records was kept ({_listed(source.rejected)}); "
                f"{folder / 'rejected'} holds them with their reasons"
            )
    if not any(source.rows_kept for source in sources):
        what = "; ".join(f"{source.name}: {_listed(source.rejected) or 'it is empty'}" for source in sources)
        raise JobError(f"data.sources: no record was kept ({what})")


def check_duplicates(sources: Sequence[SourceCount], allowed: float, more: int = 0) -> None:
    """Raise JobError where duplicates, `more` not counted yet, are too large a share of what passed the rules."""
    duplicates = sum(source.rejected.get(reason, 0) for source in sources for reason in DUPLICATES)
    passed = sum(source.rows_kept for source in sources) + duplicates
    if (duplicates + more) > allowed * passed:
        raise JobError(
            f"{duplicates + more} of {passed} records are duplicates, "
            f"more than data.max_removed_fraction={allowed} allows; nothing was removed"
        )


def warn_of_bad_input(sources: Sequence[SourceCount], folder: StoragePath) -> None:
    """Say which sources are empty, and name some of what could not be read."""
    for source in sources:
        if not source.rows_in:
            log.warning("source %s: it is empty", source.name)
        for reason in BAD_REASONS:
            if rows := source.rejected.get(reason, 0):
                examples = ", ".join(islice(_rejected(folder, source.name, reason), EXAMPLES))
                log.warning("source %s: %s %s, such as %s", source.name, f"{rows:,}", reason, examples)


def _rejected(folder: StoragePath, source: str, reason: str) -> Iterator[str]:
    """The source_id of each record that was rejected for a reason."""
    for path in matching(folder / "rejected", "*.parquet"):
        rows = open_parquet(path).read(columns=["source", "reason", "source_id"])
        yield from rows.filter((pc.field("source") == source) & (pc.field("reason") == reason))["source_id"].to_pylist()


def log_clusters(clusters: Sequence[dict[str, Any]]) -> None:
    """The records that stand for the most near-duplicates."""
    if clusters:
        listed = ", ".join(f"{cluster['source_id']} ({cluster['removed']:,})" for cluster in clusters)
        log.info("prepare: the most near-duplicates went for %s", listed)


def summary_table(manifest: Manifest, seconds: dict[str, float]) -> str:
    """What came in, what was kept, and why the rest was not; tokens; the time of each stage."""
    sources = manifest.sources
    reasons = sorted({reason for source in sources for reason in source.rejected})
    rows: list[tuple[str, list[int]]] = [
        ("in", [source.rows_in for source in sources]),
        ("kept", [source.rows_kept for source in sources]),
        *((reason, [source.rejected.get(reason, 0) for source in sources]) for reason in reasons),
    ]
    sums = [[name, *cells, sum(cells)] if len(sources) > 1 else [name, *cells] for name, cells in rows]
    counts = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in sums]
    header = ("records", *(source.name for source in sources), *(["all"] if len(sources) > 1 else []))
    tokens = [
        [
            name,
            *(f"{length[key]:,.0f}" for key in ("rows", "tokens", "mean", "p50", "p95", "max")),
            f"{length['truncation_rate']:.1%}",
            f"{length['unknown_rate']:.2%}",
        ]
        for name, length in manifest.lengths.items()
    ]
    return "\n\n".join(
        [
            table(counts, header),
            table(tokens, ("field", "rows", "tokens", "mean", "p50", "p95", "max", "longer", "unknown")),
            table([[name, f"{value:,.1f}"] for name, value in seconds.items()], ("stage", "seconds")),
        ]
    )


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{rows} {reason}" for reason, rows in reasons.items())
