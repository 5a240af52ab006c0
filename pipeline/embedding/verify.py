"""Whether a store is what the prepared records say: its rows counted, and a sample of them read back and compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.embedding.columns import as_matrix
from pipeline.embedding.encode import TextEncoder
from pipeline.embedding.ledger import with_digest
from pipeline.embedding.sync import Span, Sync
from pipeline.embedding.texts import EMBED
from pipeline.runtime.artifact import open_parquet

LEAST_COSINE = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.98}
"""Of a vector to that of the same text among others, by precision. MiniLM on Debian, 2026-11-26: 0.999999, 0.99999 and
0.988, for int8's scales follow from what else is in a batch."""


@dataclass(frozen=True)
class Findings:
    """What was found; `wrong` is a sentence for each thing that is not as it should be."""

    rows: int
    sampled: int
    least_cosine: float
    wrong: list[str]

    def __str__(self) -> str:
        compared = f", {self.sampled} of them read back, at cosine {self.least_cosine:.6f} or nearer"
        return f"{self.rows:,} rows in the store, as many as the ledger has{compared if self.sampled else ''}"


def verify(sync: Sync, files: list[Span], encoder: TextEncoder, sample: int, seed: int = 0) -> Findings:
    """Compare counts, and `sample` records of the files with their rows in the store, vectors embedded anew."""
    there, sending = sync.ledger.counts()
    rows, wrong = sync.store.count(), []
    if rows != there or sending:
        wrong.append(f"{rows:,} rows are in the store, and {there:,} in the ledger with {sending:,} that may be there")
    expected = _sample(sync, files, sample, seed)
    if not len(expected):
        return Findings(rows, 0, 1.0, wrong)
    ready = sync.reading.rows(expected, encoder.tokenizer, None)
    ready = sync.encoded(ready, encoder)
    found = sync.store.fetch(ready["id"].to_pylist())
    place = {row_id: i for i, row_id in enumerate(found["id"].to_pylist())}
    missing = [row_id for row_id in ready["id"].to_pylist() if row_id not in place]
    if missing:
        wrong.append(f"{len(missing):,} of {len(ready):,} sampled rows are not there, {missing[0]} among them")
    ready = ready.filter(pa.array([row_id in place for row_id in ready["id"].to_pylist()], pa.bool_()))
    found = found.take([place[row_id] for row_id in ready["id"].to_pylist()])
    ours, theirs = as_matrix(ready["vector"]), as_matrix(found["vector"])
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(axis=1) / np.maximum(lengths, 1e-12)
    least = LEAST_COSINE[encoder.precision]
    off = [row_id for row_id, cosine in zip(ready["id"].to_pylist(), cosines, strict=True) if not cosine >= least]
    if off:
        wrong.append(f"{len(off):,} sampled vectors are not those of their texts, that of {off[0]} among them")
    for name in ("source", "source_id"):
        differing = [a for a, b in zip(ready[name].to_pylist(), found[name].to_pylist(), strict=True) if a != b]
        if differing:
            wrong.append(f"{len(differing):,} sampled rows have another {name}, that of {differing[0]} among them")
    return Findings(rows, len(ready), float(cosines.min(initial=1.0)), wrong)


def _sample(sync: Sync, files: list[Span], size: int, seed: int) -> pa.Table:
    """Records from files drawn by chance, in the columns that `Sync.due` gives."""
    chance, tables = np.random.default_rng(seed), []
    drawn = chance.permutation(len(files))[: 8 if size else 0]
    for index in drawn:
        rows = open_parquet(files[index].file).read(columns=list(sync.columns.values()))
        share = min(len(rows), -(-size // len(drawn)))
        tables.append(rows.take(np.sort(chance.choice(len(rows), share, replace=False))))
    if not tables:
        return pa.table({})
    rows = with_digest(pa.concat_tables(tables).slice(0, size).rename_columns(list(sync.columns)))
    return rows.append_column("action", pa.array([EMBED] * len(rows)))
