"""Chooses a record's hard negatives: texts close to its anchor, but clearly less similar than its positive.

    Block.write(rows, folder)                              # rows of positive_key, text, vector
    blocks = sorted(folder.glob("*.arrow"))
    negatives_of(anchors, blocks, answers, config.mining)  # [["a text", …], …]: per anchor, the most similar first

A text's key is the first 64 bits of its hash. Known answers are excluded first; then the nearest texts are ranked by
cosine, texts outside the range of ranks or beyond a bound are dropped, and the first few are kept. A guide, a second
model, then drops those that it places nearer to the anchor than the positive, and further ones take their place. Ties
go to the larger key, so the result does not depend on how texts are split into blocks.

A block is an uncompressed Arrow file with up to some thousand texts, sorted by key. It is memory-mapped, so only used
pages are read. Cost: B x n dot products of size D per block, and about 60 bytes per record for the keys.
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
from pipeline.core.files import file_sizes, replacing
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.partitions import content_id, is_validation
from pipeline.index.vectors import Floats, Ints, TopK, as_column, as_matrix, merged, nearest_in_block, unit

ANCHORS_AT_ONCE = 512  # with a block of 8,192 texts, 16 MB of scores
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class TextKeys:
    """Keys of each record's two texts, and whether it is in the training split; (N,) each, in file order."""

    anchors: Keys
    positives: Keys
    trains: npt.NDArray[np.bool_]
    file_starts: list[int]

    def first_of_each_positive(self) -> npt.NDArray[np.bool_]:
        """(N,) mask of the first training record with each distinct positive."""
        rows = np.flatnonzero(self.trains)
        first = np.zeros(len(self.trains), dtype=bool)
        first[rows[np.unique(self.positives[rows], return_index=True)[1]]] = True
        return first


def text_key(text: str) -> int:
    """The first 64 bits of the text's hash. Two of 5 million texts collide with a probability of 1e-6."""
    return int(content_id([text])[:16], 16)


def text_keys(mined: Artifact, files: Sequence[StoragePath], fraction: float, progress: Progress) -> TextKeys:
    """Hash the texts of record files to files in the scratch folder; `fraction` of the records are held out."""

    def hash_texts(index: int, output: Output) -> None:
        rows = open_parquet(files[index]).read(columns=["id", "anchor", "positive"]).to_pylist()
        keys = [(text_key(r["anchor"]), text_key(r["positive"]), not is_validation(r["id"], fraction)) for r in rows]
        with output.writing(f"scratch/keys/{files[index].stem}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, np.array(keys, dtype=np.uint64).reshape(-1, 3))

    mined.tasks(progress, "mine: hash texts", [size or 0 for size in file_sizes(files)], hash_texts)
    parts = []
    for path in files:
        with (mined.scratch / "keys" / f"{path.stem}.npy").open("rb") as file:
            parts.append(np.load(file))
    anchors, positives, trains = np.concatenate(parts).T
    return TextKeys(anchors, positives, trains.astype(bool), [*itertools.accumulate(map(len, parts), initial=0)])


@dataclass(frozen=True)
class Block:
    """Distinct texts, sorted by key: (n,) keys, (n, D) unit vectors, and optionally the texts and a guide's vectors."""

    keys: Keys
    vectors: Floats
    texts: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    guide: Floats | None = None

    @staticmethod
    def write(rows: pa.Table, folder: Path) -> None:
        """Write rows of `positive_key`, `text`, `vector` and perhaps `guide` to a file in the folder, normalised."""
        names = [name for name in ("vector", "guide") if name in rows.column_names]
        rows = rows.select(["positive_key", "text", *names]).sort_by("positive_key").combine_chunks()
        vectors = {name: as_column(unit(as_matrix(rows[name]))) for name in names}
        block = pa.table({"key": rows["positive_key"], "text": rows["text"], **vectors}).combine_chunks()
        with (
            replacing(folder / f"{rows['positive_key'][0].as_py():016x}.arrow") as temporary,
            pa.ipc.new_file(str(temporary), block.schema) as writer,
        ):
            writer.write_table(block)

    @classmethod
    def open(cls, path: Path) -> Block:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        guide = as_matrix(batch["guide"]) if "guide" in batch.schema.names else None
        return cls(batch["key"].to_numpy(), as_matrix(batch["vector"]), batch["text"], guide)

    def find(self, keys: Keys) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """The row of each key, and whether the block has the key."""
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return rows, self.keys[rows] == keys


@dataclass(frozen=True)
class Answers:
    """Pairs of an anchor's key and the key of a text that answers it, sorted by anchor."""

    anchors: Keys
    texts: Keys

    @classmethod
    def of(cls, anchors: Keys, texts: Keys) -> Answers:
        order = np.argsort(anchors, kind="stable")
        return cls(anchors[order], texts[order])

    def of_anchors(self, anchors: Keys) -> tuple[Ints, Keys]:
        """All answers to these anchors, as pairs of the anchor's row and the answer's key."""
        first, last = (np.searchsorted(self.anchors, anchors, side) for side in ("left", "right"))
        counts = last - first
        rows = np.repeat(np.arange(len(anchors)), counts)
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.texts[np.repeat(first, counts) + steps]


@dataclass
class Judged:
    """How many negatives the guide judged, and how many of them it found false."""

    seen: int = 0
    false: int = 0


def negatives_of(
    rows: pa.Table,
    blocks: Sequence[Path],
    answers: Answers,
    settings: Mining,
    report: Callable[[int], object] = lambda anchors: None,
    judged: Judged | None = None,
) -> list[list[str]]:
    """Negatives for each row of `anchor_key`, `positive_key`, `vector` and, with a guide, `guide`.

    Calls `report` with finished row counts, and counts in `judged`.
    """
    vectors = unit(as_matrix(rows["vector"]))
    guide = unit(as_matrix(rows["guide"])) if "guide" in rows.column_names else None
    anchors, positives = rows["anchor_key"].to_numpy(), rows["positive_key"].to_numpy()
    chosen: list[Keys] = []
    for start in range(0, len(rows), ANCHORS_AT_ONCE):
        batch = slice(start, start + ANCHORS_AT_ONCE)
        known = answers.of_anchors(anchors[batch])
        found = rank(vectors[batch], positives[batch], known, map(Block.open, blocks), settings)
        if guide is not None:
            opened, count = map(Block.open, blocks), settings.num_negatives
            drop_false(found, guide[batch], positives[batch], opened, count, judged or Judged())
        chosen += found.first(settings.num_negatives)
        report(len(anchors[batch]))
    texts: dict[int, str] = {}
    needed = np.unique(np.concatenate([*chosen, np.empty(0, np.uint64)]))
    for block in map(Block.open, blocks):
        places, present = block.find(needed)
        block_texts = block.texts.take(pa.array(places[present])).to_pylist()
        texts |= dict(zip(needed[present].tolist(), block_texts, strict=True))
    return [[texts[key] for key in keys.tolist()] for keys in chosen]


@dataclass
class Ranked:
    """The nearest texts of each of B anchors: (B, k) keys, nearest first, and which of them may be negatives."""

    keys: Keys
    allowed: npt.NDArray[np.bool_]

    def first(self, count: int) -> list[Keys]:
        """The keys of each anchor's first `count` texts that are allowed."""
        kept = self.allowed & (self.allowed.cumsum(axis=1) <= count)
        return [keys[each] for keys, each in zip(self.keys, kept, strict=True)]


def rank(
    anchors: Floats, positives: Keys, known: tuple[Ints, Keys], blocks: Iterable[Block], settings: Mining
) -> Ranked:
    """Rank texts for B anchors, (B, D) unit vectors; `positives` are (B,) keys.

    `known` are pairs of an anchor's row and the key of a text that answers it; positives count as known too.
    """
    rows, keys = np.concatenate([np.arange(len(anchors)), known[0]]), np.concatenate([positives, known[1]])
    found, positive_scores = TopK.empty(len(anchors)), np.full(len(anchors), -np.inf, dtype=np.float32)
    for block in blocks:
        places, present = block.find(positives)
        vectors = block.vectors[places[present]].astype(np.float64)
        positive_scores[present] = (anchors[present] * vectors).sum(axis=1)
        places, present = block.find(keys)
        excluded = rows[present], places[present]
        best = nearest_in_block(anchors, block.vectors, block.keys, settings.range_max, excluded)
        found = merged(found, best, settings.range_max)
    allowed = _allowed(found.scores, positive_scores, settings)
    allowed[:, : settings.range_min] = False
    return Ranked(found.ids, allowed)


def drop_false(
    found: Ranked, guide: Floats, positives: Keys, blocks: Iterable[Block], count: int, judged: Judged
) -> None:
    """Disallow texts that the guide places nearer to the anchor than its positive; `guide` has (B, E) unit vectors.

    `judged` counts those of the first `count` that would have been negatives without a guide.
    """
    keys = np.concatenate([positives[:, None], found.keys], axis=1)
    scores = np.full(keys.shape, -np.inf, dtype=np.float32)
    for block in blocks:
        assert block.guide is not None
        places, present = block.find(keys)
        anchor = np.nonzero(present)[0]
        scores[present] = np.einsum("ij,ij->i", guide[anchor], block.guide[places[present]])
    false = scores[:, 1:] > scores[:, :1]
    first = found.allowed & (found.allowed.cumsum(axis=1) <= count)
    judged.seen += int(first.sum())
    judged.false += int((first & false).sum())
    found.allowed &= ~false


def _allowed(scores: Floats, positive_scores: Floats, settings: Mining) -> npt.NDArray[np.bool_]:
    """(B, k) mask of the scores within all bounds."""
    allowed = np.isfinite(scores)
    if settings.relative_margin is not None:
        # abs() keeps the bound below the positive's score if that is negative
        bound = positive_scores - (1 - settings.relative_margin) * np.abs(positive_scores)
        allowed &= scores <= bound[:, None]
    if settings.min_score is not None:
        allowed &= scores >= settings.min_score
    if settings.max_score is not None:
        allowed &= scores <= settings.max_score
    return allowed
