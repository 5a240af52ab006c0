"""Texts and their vectors on disk, in blocks that are mapped into memory where they are needed.

    write_block(rows, folder)                                   # rows of positive_key, text, vector
    negatives_of(anchors, sorted(folder.glob("*.arrow")), answers, config.mining)      # [["a text", …], …]

A file holds up to some thousand texts by rising key: `key`, `text` and `vector`, uncompressed Arrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import Mining
from pipeline.index.choosing import Answers, Block, Keys, choose
from pipeline.index.columns import as_column, as_matrix
from pipeline.index.nearest import unit
from pipeline.storage.files import replacing

ANCHORS_AT_ONCE = 512  # with a block of 8,192 texts, 16 MB of scores


def write_block(rows: pa.Table, folder: Path) -> None:
    """Write `positive_key`, `text` and `vector` by rising key, the vectors at unit length."""
    rows = rows.select(["positive_key", "text", "vector"]).sort_by("positive_key").combine_chunks()
    vectors = unit(as_matrix(rows["vector"]))
    block = pa.table({"key": rows["positive_key"], "text": rows["text"], "vector": as_column(vectors)})
    with (
        replacing(folder / f"{rows['positive_key'][0].as_py():016x}.arrow") as temporary,
        pa.ipc.new_file(str(temporary), block.schema) as writer,
    ):
        writer.write_table(block.combine_chunks())


def open_block(path: Path) -> tuple[Block, pa.Array]:
    """A block and its texts, mapped into memory: read are the pages that are used."""
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    vectors = batch["vector"]
    values = vectors.flatten().to_numpy(zero_copy_only=True).reshape(len(batch), vectors.type.list_size)
    return Block(batch["key"].to_numpy(), values), batch["text"]


def negatives_of(
    rows: pa.Table,
    blocks: Sequence[Path],
    answers: Answers,
    wanted: Mining,
    report: Callable[[int], object] = lambda anchors: None,
) -> list[list[str]]:
    """The texts that are chosen for each row of `anchor_key`, `positive_key` and `vector`; reports rows as it goes."""
    vectors = unit(as_matrix(rows["vector"]))
    anchors, own = rows["anchor_key"].to_numpy(), rows["positive_key"].to_numpy()
    chosen: list[Keys] = []
    for start in range(0, len(rows), ANCHORS_AT_ONCE):
        here = slice(start, start + ANCHORS_AT_ONCE)
        opened = (open_block(path)[0] for path in blocks)
        chosen += choose(vectors[here], own[here], answers.to(anchors[here]), opened, wanted)
        report(len(anchors[here]))
    texts: dict[int, str] = {}
    needed = np.unique(np.concatenate([*chosen, np.empty(0, np.uint64)]))
    for path in blocks:
        block, column = open_block(path)
        places, there = block.places(needed)
        found = column.take(pa.array(places[there])).to_pylist()
        texts |= dict(zip(needed[there].tolist(), found, strict=True))
    return [[texts[key] for key in keys.tolist()] for keys in chosen]
