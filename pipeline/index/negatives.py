"""Which texts are a record's hard negatives: near its anchor, and still clearly further than its positive.

    Block.write(rows, folder)                              # rows of positive_key, text, vector
    blocks = sorted(folder.glob("*.arrow"))
    negatives_of(anchors, blocks, answers, config.mining)  # [["a text", …], …]: by anchor, the most alike first

A text is known by its key, the first 64 bits of its hash. Known right answers are excluded before anything is ranked;
then the nearest are ranked by cosine, those outside the window of ranks or beyond a bound are left out, and the first
few stay. A tie goes to the larger key, so the choice does not depend on how texts are cut into blocks.

A block is an uncompressed Arrow file of up to some thousand texts by rising key. It is mapped into memory, so only
pages that are used are read. Cost: B x n products of D numbers a block, and some 60 bytes a record for its keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Mining
from pipeline.core.artifact import Artifact, Output, open_parquet
from pipeline.core.files import replacing, sizes
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.partitions import content_id, is_validation
from pipeline.index.vectors import Floats, Found, Ints, as_column, as_matrix, merged, nearest_in_block, unit

ANCHORS_AT_ONCE = 512  # with a block of 8,192 texts, 16 MB of scores
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class TextKeys:
    """Of every record in the order of the files: keys of its two texts, and whether it trains. (N,) each."""

    anchors: Keys
    positives: Keys
    trains: npt.NDArray[np.bool_]
    file_starts: list[int]

    def first_of_each_positive(self) -> npt.NDArray[np.bool_]:
        """(N,): whether a record trains and none before it that does has the same positive."""
        rows = np.flatnonzero(self.trains)
        first = np.zeros(len(self.trains), dtype=bool)
        first[rows[np.unique(self.positives[rows], return_index=True)[1]]] = True
        return first


def text_key(text: str) -> int:
    """Equal for equal texts. Among 5 million texts, two others share one with a chance of one in a million."""
    return int(content_id([text])[:16], 16)


def text_keys(mined: Artifact, files: Sequence[StoragePath], fraction: float, progress: Progress) -> TextKeys:
    """Hash the texts of record files, into files in the scratch folder; `fraction` of the records are held out."""

    def hash_texts(index: int, output: Output) -> None:
        rows = open_parquet(files[index]).read(columns=["id", "anchor", "positive"]).to_pylist()
        found = [(text_key(r["anchor"]), text_key(r["positive"]), not is_validation(r["id"], fraction)) for r in rows]
        with output.writing(f"scratch/keys/{files[index].stem}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, np.array(found, dtype=np.uint64).reshape(-1, 3))

    mined.tasks(progress, "mine: hash texts", [size or 0 for size in sizes(files)], hash_texts)
    found = []
    for path in files:
        with (mined.scratch / "keys" / f"{path.stem}.npy").open("rb") as file:
            found.append(np.load(file))
    anchors, positives, trains = np.concatenate(found).T
    return TextKeys(anchors, positives, trains.astype(bool), [*itertools.accumulate(map(len, found), initial=0)])


@dataclass(frozen=True)
class Block:
    """Distinct texts by rising key: (n,) keys, (n, D) unit vectors, and the n texts where they are needed."""

    keys: Keys
    vectors: Floats
    texts: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))

    @staticmethod
    def write(rows: pa.Table, folder: Path) -> None:
        """Write rows of `positive_key`, `text` and `vector` as a file of the folder, the vectors at unit length."""
        rows = rows.select(["positive_key", "text", "vector"]).sort_by("positive_key").combine_chunks()
        vectors = as_column(unit(as_matrix(rows["vector"])))
        block = pa.table({"key": rows["positive_key"], "text": rows["text"], "vector": vectors}).combine_chunks()
        with (
            replacing(folder / f"{rows['positive_key'][0].as_py():016x}.arrow") as temporary,
            pa.ipc.new_file(str(temporary), block.schema) as writer,
        ):
            writer.write_table(block)

    @classmethod
    def open(cls, path: Path) -> Block:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        return cls(batch["key"].to_numpy(), as_matrix(batch["vector"]), batch["text"])

    def places(self, keys: Keys) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Where each key stands in the block, and whether it does."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return places, self.keys[places] == keys


@dataclass(frozen=True)
class Answers:
    """Which texts answer which anchor: pairs of keys, by rising anchor."""

    anchors: Keys
    texts: Keys

    @classmethod
    def of(cls, anchors: Keys, texts: Keys) -> Answers:
        order = np.argsort(anchors, kind="stable")
        return cls(anchors[order], texts[order])

    def to(self, anchors: Keys) -> tuple[Ints, Keys]:
        """All pairs of an anchor's row and the key of a text that answers it."""
        first, last = (np.searchsorted(self.anchors, anchors, side) for side in ("left", "right"))
        counts = last - first
        rows = np.repeat(np.arange(len(anchors)), counts)
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.texts[np.repeat(first, counts) + steps]


def negatives_of(
    rows: pa.Table,
    blocks: Sequence[Path],
    answers: Answers,
    wanted: Mining,
    report: Callable[[int], object] = lambda anchors: None,
) -> list[list[str]]:
    """The texts chosen for each row of `anchor_key`, `positive_key` and `vector`; reports rows as it goes."""
    vectors = unit(as_matrix(rows["vector"]))
    anchors, own = rows["anchor_key"].to_numpy(), rows["positive_key"].to_numpy()
    chosen: list[Keys] = []
    for start in range(0, len(rows), ANCHORS_AT_ONCE):
        here = slice(start, start + ANCHORS_AT_ONCE)
        chosen += choose(vectors[here], own[here], answers.to(anchors[here]), map(Block.open, blocks), wanted)
        report(len(anchors[here]))
    texts: dict[int, str] = {}
    needed = np.unique(np.concatenate([*chosen, np.empty(0, np.uint64)]))
    for block in map(Block.open, blocks):
        places, there = block.places(needed)
        texts |= dict(zip(needed[there].tolist(), block.texts.take(pa.array(places[there])).to_pylist(), strict=True))
    return [[texts[key] for key in keys.tolist()] for keys in chosen]


def choose(anchors: Floats, own: Keys, known: tuple[Ints, Keys], blocks: Iterable[Block], wanted: Mining) -> list[Keys]:
    """Keys of the negatives of each of B anchors, (B, D) unit vectors; `own` are (B,) keys of their positives.

    `known` are rows of anchors and keys of the texts that answer them; the positive's own counts as known.
    """
    rows, keys = np.concatenate([np.arange(len(anchors)), known[0]]), np.concatenate([own, known[1]])
    found, positive = Found.none(len(anchors)), np.full(len(anchors), -np.inf, dtype=np.float32)
    for block in blocks:
        places, there = block.places(own)
        right = block.vectors[places[there]].astype(np.float64)
        positive[there] = (anchors[there] * right).sum(axis=1)
        places, there = block.places(keys)
        best = nearest_in_block(anchors, block.vectors, block.keys, wanted.range_max, (rows[there], places[there]))
        found = merged(found, best, wanted.range_max)
    if not found.ids.shape[1]:
        return [np.empty(0, np.uint64) for _ in anchors]
    allowed = _allowed(found.scores, positive, wanted)
    allowed[:, : wanted.range_min] = False
    allowed &= allowed.cumsum(axis=1) <= wanted.num_negatives
    return [keys[kept] for keys, kept in zip(found.ids, allowed, strict=True)]


def _allowed(scores: Floats, positive: Floats, wanted: Mining) -> npt.NDArray[np.bool_]:
    """(B, k): whether a score is within all bounds."""
    allowed = np.isfinite(scores)
    if wanted.relative_margin is not None:
        # A share of the positive's score; where that is below zero, as far below it.
        below = positive - (1 - wanted.relative_margin) * np.abs(positive)
        allowed &= scores <= below[:, None]
    if wanted.min_score is not None:
        allowed &= scores >= wanted.min_score
    if wanted.max_score is not None:
        allowed &= scores <= wanted.max_score
    return allowed
