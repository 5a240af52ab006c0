"""The tokenizer, and record files turned into token shards.

Byte-level BPE trains to the same file every time; the file is then an input like any other, hashed and kept with the
prepared data, and never trained again on resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipeline.config import ConfigError
from pipeline.data.manifest import SPLITS, sha256
from pipeline.text.identity import is_validation

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROW_GROUP_ROWS = 1024  # of token ids, about half a megabyte: small enough to shuffle by, large enough to read fast
ENCODE_ROWS = 1024


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises ConfigError where it is none."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a missing or broken file alike
        raise ConfigError(f"tokenizer.load_path: {path} is no tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def train_bpe(texts: Iterable[str], *, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train byte-level BPE. Texts that differ in order of equal pieces give the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), normalizers.Lowercase()] if lowercase else [normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize_file(
    records: Path, folder: Path, fields: list[str], tokenizer: Tokenizer, validation_fraction: float
) -> list[dict[str, Any]]:
    """Write one record file's token shards, one a split. Returns each one's path, rows, row groups, hash, lengths."""
    parts: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
    for batch in pq.ParquetFile(records).iter_batches(ENCODE_ROWS, columns=["id", *fields]):
        columns: dict[str, Any] = {"id": batch["id"]}
        for field in fields:
            encoded = tokenizer.encode_batch_fast(batch[field].to_pylist(), add_special_tokens=False)
            columns[field] = pa.array([e.ids for e in encoded], pa.list_(pa.int32()))
        held_out = pa.array([is_validation(i, validation_fraction) for i in batch["id"].to_pylist()], pa.bool_())
        table = pa.table(columns)
        parts["validation"].append(table.filter(held_out))
        parts["train"].append(table.filter(pa.compute.invert(held_out)))
    return [_write_split(parts[split], folder, split, records.name, fields) for split in SPLITS if parts[split]]


def _write_split(parts: list[pa.Table], folder: Path, split: str, name: str, fields: list[str]) -> dict[str, Any]:
    table = pa.concat_tables(parts).combine_chunks()
    path = folder / split / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    temporary.rename(path)
    metadata = pq.ParquetFile(path).metadata
    lengths = {field: np.diff(table[field].combine_chunks().offsets.to_numpy()) for field in fields}
    return {
        "path": f"{split}/{name}",
        "split": split,
        "rows": len(table),
        "row_groups": [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)],
        "sha256": sha256(path),
        "lengths": {field: np.bincount(counts).tolist() for field, counts in lengths.items()},
    }


def length_summary(histograms: list[list[int]]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum of token counts, from histograms of them."""
    total = np.zeros(max(map(len, histograms)), dtype=np.int64)
    for histogram in histograms:
        total[: len(histogram)] += np.asarray(histogram, dtype=np.int64)
    share = total.cumsum() / max(total.sum(), 1)
    return {
        "mean": round(float((total * np.arange(len(total))).sum() / max(total.sum(), 1)), 2),
        "p50": int(np.searchsorted(share, 0.5)),
        "p95": int(np.searchsorted(share, 0.95)),
        "max": len(total) - 1,
    }
