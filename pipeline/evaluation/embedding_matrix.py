"""Exports the vectors as a matrix that another model can use as an embedding layer; row i belongs to the i-th id.

    embeddings.safetensors    `weight`, (N, D) float32 or float16
    ids.parquet               row, id, source_id; sorted by id, so the same vectors give the same files
    embeddings.json           version, dtype, rows, width, model fingerprint, size and hash of the two files

    save_embeddings_for_model(folder, table.scan, model=fingerprint, dtype="float16")
    layer, ids = load_embeddings(folder)              # torch.nn.Embedding; row ids.index("9f0c…") is that text's vector

Rows arrive in any order and are written to a memory-mapped file, so memory holds only the ids and one batch of vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from pipeline.core.artifact import entries_of
from pipeline.evaluation.export import exporting
from pipeline.index.vectors import as_matrix

VERSION = 1
WEIGHTS, IDS, MARKER = "embeddings.safetensors", "ids.parquet", "embeddings.json"
IDS_SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string()), ("source_id", pa.string())])
CHANGED = "the vectors changed during the export; run it again when no job writes to the table"
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16"}

Scan = Callable[[Sequence[str]], Iterable[pa.RecordBatch]]
"""Yields batches of the requested columns out of `id`, `source_id` and `vector`: `VectorTable.scan`, or for a table in
memory `lambda columns: table.select(columns).to_batches()`."""


def save_embeddings_for_model(
    folder: Path, scan: Scan, *, model: str, dtype: Literal["float32", "float16"] = "float32"
) -> int:
    """Write the three files atomically, as one folder. Returns the number of rows.

    `scan` is called twice, for the ids and for the vectors; ids must be ASCII. `model` is the model's fingerprint.
    Raises ValueError if there are no rows, an id is duplicated, or the rows change between the two calls.
    """
    described: dict[str, Any] = {"version": VERSION, "dtype": dtype, "model": model}
    with exporting(folder, MARKER, described) as temporary:
        ids = _write_ids(temporary / IDS, scan)
        described |= {"rows": len(ids), "width": _write_vectors(temporary / WEIGHTS, scan, ids, dtype)}
    return len(ids)


def load_embeddings(folder: Path) -> tuple[torch.nn.Embedding, list[str]]:
    """Load the matrix as a frozen layer, and the id of each row. Reads both files twice, once to check their hashes.

    Raises ValueError if the version is unknown, or if a file is missing or has changed.
    """
    try:
        described: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        version, hashes = described["version"], described["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} holds no embedding matrix: its {MARKER} is missing or broken") from None
    if version != VERSION:
        raise ValueError(f"{folder / MARKER} has version {version}; this reader supports version {VERSION}")
    files = entries_of(folder)
    for name in (WEIGHTS, IDS):
        if name not in files or files[name] != hashes.get(name):
            raise ValueError(f"{folder / name} is missing or does not match {MARKER}; export it again")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        weight = file.get_tensor("weight")
    return torch.nn.Embedding.from_pretrained(weight), pq.read_table(folder / IDS, columns=["id"])["id"].to_pylist()


def _write_ids(path: Path, scan: Scan) -> np.ndarray:
    """Write the table of ids, sorted. Returns the sorted ids, (N,) bytes."""
    batches = list(scan(["id", "source_id"]))
    if not sum(len(batch) for batch in batches):
        raise ValueError("there are no vectors to write")
    table = pa.Table.from_batches(batches).sort_by("id")
    ids = table["id"].to_numpy(zero_copy_only=False).astype(bytes)
    duplicates = np.flatnonzero(ids[1:] == ids[:-1])
    if len(duplicates):
        raise ValueError(f"duplicate id {ids[duplicates[0]].decode()} among the vectors")
    table = table.select(["id", "source_id"]).add_column(0, "row", pa.array(range(len(ids)), pa.int64()))
    table = table.cast(IDS_SCHEMA)  # so that nullability in the input does not change the file's bytes
    pq.write_table(table.combine_chunks(), path, compression="zstd")
    return ids


def _write_vectors(path: Path, scan: Scan, ids: np.ndarray, dtype: str) -> int:
    """Write a safetensors file with one (N, D) tensor. Returns D."""
    matrix, filled = None, 0
    for batch in scan(["id", "vector"]):
        if not len(batch):
            continue
        vectors = as_matrix(batch["vector"])
        batch_ids = batch["id"].to_numpy(zero_copy_only=False).astype(bytes)
        if matrix is None:
            matrix = _new_matrix(path, (len(ids), vectors.shape[1]), dtype)
        rows = np.searchsorted(ids, batch_ids).clip(max=len(ids) - 1)
        if not (ids[rows] == batch_ids).all():
            raise ValueError(CHANGED)
        with np.errstate(over="ignore"):
            matrix[rows] = vectors
        if not np.isfinite(matrix[rows]).all():
            raise ValueError(f"found vectors that are not finite in {dtype}")
        filled += len(rows)
    if matrix is None or filled != len(ids):
        raise ValueError(CHANGED)
    matrix.flush()
    return int(matrix.shape[1])


def _new_matrix(path: Path, shape: tuple[int, int], dtype: str) -> np.memmap:
    """Write safetensors' header (8 bytes of length, then JSON padded to 8 bytes), and map the matrix after it."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    header = {"weight": {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r+", offset=8 + len(text), shape=shape)
