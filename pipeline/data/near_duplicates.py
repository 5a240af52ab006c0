"""Removes near-duplicates and evaluation texts from the records of all sources.

    records/ ──► signatures ──► bands ──► components ──► shuffle by component ──► compare ──► records/, rejected/
    a file       per file        per band  one task       per file                 per part    per file

MinHash bands only propose pairs; exact Jaccard similarity decides. Records that share a band, directly or through other
records, form a component. Within a component, records are visited by descending number of shingles (ties by id), and a
record is dropped only if it is similar to one that stays (similarity.drop_similar). The result does not depend on
processing order or on how the work is split. Records similar to an evaluation text are dropped first, and never cause
another record to be dropped.

A record's number is its position in all files, concatenated. Memory: one task holds one band of all records (24 bytes
per record), another the shingles of its components (8 bytes per word).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config import Data
from pipeline.core.artifact import Artifact, Output, open_parquet
from pipeline.core.files import file_sizes, for_each, parquet_file
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.decontamination import contamination
from pipeline.data.manifest import count_outcomes, rejections
from pipeline.data.partitions import read_part, write_parts
from pipeline.data.records import merge_outcomes
from pipeline.data.similarity import Shingles, band_keys, bands_of, drop_similar, shingle_sets

Ints = npt.NDArray[np.int64]

CLUSTERS_REPORTED = 10
DROPPED = "scratch/dropped.parquet"
BATCH_ROWS = 4096
KEYS_A_TASK = 1_000_000  # a task sorts several bands, up to this many keys: seconds of work
ALONE = -1  # component of a record that shares no band
_CANDIDATES = pa.schema(
    [
        *((name, pa.int64()) for name in ("component", "record")),
        *((name, pa.string()) for name in ("id", "source_id")),
        ("shingles", pa.list_(pa.uint64())),
    ]
)
_DROPPED = pa.schema([("record", pa.int64()), ("duplicate_of", pa.string()), ("similarity", pa.float64())])


def find_duplicates(distinct: Artifact, progress: Progress, files: Sequence[StoragePath], data: Data) -> int:
    """Write which records to drop to the artifact's scratch folder. Returns the number of near-duplicates."""
    scratch, threshold = distinct.scratch, data.near_duplicates.threshold
    file_bytes = [size or 0 for size in file_sizes(files)]
    offsets = _offsets(files)
    keys = [scratch / "keys" / f"{file.stem}.parts" for file in files]
    bands = bands_of(threshold, data.near_duplicates.permutations)[0] if threshold else 0

    def sign(index: int, output: Output) -> None:
        _sign(files[index], output, data)

    distinct.tasks(progress, "prepare: signatures", file_bytes, sign)
    if threshold is None:
        distinct.output.write_table(DROPPED, _DROPPED.empty_table())
        return 0

    band_bytes, together = 8 * int(offsets[-1]), max(1, KEYS_A_TASK // int(offsets[-1] or 1))
    runs = [range(first, min(first + together, bands)) for first in range(0, bands, together)]
    links = [scratch / "links" / f"{run[0]:04d}" for run in runs]

    def link(index: int, output: Output) -> None:
        found = [_links(read_part(keys, band)["key"].to_numpy()) for band in runs[index]]
        _save(np.concatenate(found, axis=1), output, f"scratch/links/{links[index].name}")

    distinct.tasks(progress, "prepare: likely pairs", [band_bytes * len(run) for run in runs], link)

    def join(index: int, output: Output) -> None:
        _save(_components(links, int(offsets[-1])), output, "scratch/components")

    distinct.tasks(progress, "prepare: join the pairs", [band_bytes], join)
    candidates = [scratch / "candidates" / f"{file.stem}.parts" for file in files]

    def collect(index: int, output: Output) -> None:
        component = _load(scratch / "components", int(offsets[index]), int(offsets[index + 1]))
        table = _candidates(files[index], component, int(offsets[index]))
        with output.writing(f"scratch/candidates/{candidates[index].name}") as file:
            write_parts(table, table["component"].to_numpy() % len(files), len(files), file)

    distinct.tasks(progress, "prepare: collect likely duplicates", file_bytes, collect)
    part_bytes = sum(filter(None, file_sizes(candidates))) // len(files)

    def compare(part: int, output: Output) -> None:
        output.write_table(f"scratch/dropped/{part:05d}.parquet", _compare(read_part(candidates, part), threshold))

    distinct.tasks(progress, "prepare: compare likely duplicates", [part_bytes] * len(files), compare)
    dropped = [scratch / "dropped" / f"{part:05d}.parquet" for part in range(len(files))]
    found = pa.concat_tables(for_each(scratch, lambda path: parquet_file(path).read(), dropped)).sort_by("record")
    distinct.output.write_table(DROPPED, found)
    return len(found)


def write_distinct(distinct: Artifact, progress: Progress, files: Sequence[StoragePath]) -> dict[str, Counter[str]]:
    """Write kept records to `records/` and the others to `rejected/`. Returns source → `kept` or a reason → rows."""
    scratch, folder, offsets = distinct.scratch, distinct.folder, _offsets(files)
    file_bytes = [size or 0 for size in file_sizes(files)]

    def write(index: int, output: Output) -> dict[str, Counter[str]]:
        file, first, last = files[index], int(offsets[index]), int(offsets[index + 1])
        with (folder / DROPPED).open("rb") as opened:
            dropped = pq.read_table(opened, filters=[("record", ">=", first), ("record", "<", last)])
        hits = json.loads((scratch / "hits" / f"{file.stem}.json").read_text())
        dropped = dropped.set_column(0, "record", pc.subtract(dropped["record"], first))
        kept, rejected = _split(open_parquet(file).read(), dropped, hits)
        output.write_table(f"records/{file.name}", kept)
        output.write_table(f"rejected/{file.name}", rejected)
        output.report(records=len(kept) + len(rejected), rejected=len(rejected))
        return count_outcomes(kept, rejected)

    return merge_outcomes(distinct.tasks(progress, "prepare: write distinct records", file_bytes, write))


def largest_clusters(distinct: Artifact) -> list[dict[str, Any]]:
    """The records with the most near-duplicates: source_id, and how many were removed."""
    dropped = parquet_file(distinct.folder / DROPPED).read(columns=["duplicate_of"])
    counts = dropped.group_by("duplicate_of").aggregate([([], "count_all")])
    largest = counts.sort_by([("count_all", "descending"), ("duplicate_of", "ascending")]).slice(0, CLUSTERS_REPORTED)
    return [{"source_id": row["duplicate_of"], "removed": row["count_all"]} for row in largest.to_pylist()]


def _offsets(files: Sequence[StoragePath]) -> Ints:
    """The number of each file's first record, and the total number of records."""
    return np.cumsum([0, *for_each(files[0], lambda file: parquet_file(file).metadata.num_rows, files)])


def _texts(file: StoragePath) -> Iterator[list[list[str]]]:
    """Batches of records; each record is a list of its texts, without negatives."""
    for batch in open_parquet(file).iter_batches(BATCH_ROWS, columns=["anchor", "positive", "text"]):
        yield [[text for text in row.values() if text is not None] for row in batch.to_pylist()]


def _hits(file: StoragePath, data: Data) -> dict[int, tuple[str, float]]:
    """Record → the evaluation text that one of its texts, or one of its negatives, is most similar to."""
    known, hits = contamination(data), dict[int, tuple[str, float]]()
    negatives = (
        texts or []
        for batch in open_parquet(file).iter_batches(BATCH_ROWS, columns=["negatives"])
        for texts in batch["negatives"].to_pylist()
    )
    for row, (texts, more) in enumerate(zip(itertools.chain.from_iterable(_texts(file)), negatives, strict=True)):
        if hit := known.nearest([*texts, *more]):
            hits[row] = hit
    return hits


def _sign(file: StoragePath, output: Output, data: Data) -> None:
    """Write a file's band keys, grouped by band, and which of its records are similar to an evaluation text."""
    near = data.near_duplicates
    hits = _hits(file, data) if data.decontaminate else {}
    bands = bands_of(near.threshold, near.permutations)[0] if near.threshold else 0
    keys = [np.zeros((bands, 0), dtype=np.uint64)]
    count = 0
    for batch in _texts(file):
        if near.threshold:
            sets = shingle_sets(["" if row in hits else "\n".join(texts) for row, texts in enumerate(batch, count)])
            keys.append(band_keys(sets, near.threshold, near.permutations).T)
        count += len(batch)
    output.write(f"scratch/hits/{file.stem}.json", json.dumps(hits).encode())
    if bands:
        flat = pa.table({"key": np.concatenate(keys, axis=1).ravel()})
        with output.writing(f"scratch/keys/{file.stem}.parts") as path:
            write_parts(flat, np.repeat(np.arange(bands), count), bands, path)


def _links(keys: npt.NDArray[np.uint64]) -> Ints:
    """(2, n) pairs of record numbers: each record with the previous one of the same key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
    return np.stack([order[same], order[same + 1]])


def _components(links: Sequence[StoragePath], records: int) -> Ints:
    """Each record's component, or ALONE."""
    labels = np.arange(records)
    for path in links:  # so that only one band's pairs are in memory
        a, b = labels[_load(path).reshape(2, -1)]
        graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(records, records))
        labels = connected_components(graph, directed=False)[1].astype(np.int64)[labels]
    return np.where(np.bincount(labels, minlength=records)[labels] > 1, labels, ALONE)


def _candidates(file: StoragePath, component: Ints, offset: int) -> pa.Table:
    """The file's records that belong to a component, with their shingles."""
    chosen = np.flatnonzero(component != ALONE)
    if not len(chosen):
        return _CANDIDATES.empty_table()
    keys = open_parquet(file).read(columns=["id", "source_id"]).take(chosen)
    sets: list[Shingles] = []
    first = 0
    for batch in _texts(file):
        here = chosen[(chosen >= first) & (chosen < first + len(batch))] - first
        sets += shingle_sets(["\n".join(batch[place]) for place in here.tolist()])
        first += len(batch)
    columns = [component[chosen], chosen + offset, keys["id"], keys["source_id"], pa.array(sets, pa.list_(pa.uint64()))]
    return pa.table(columns, schema=_CANDIDATES)


def _compare(candidates: pa.Table, threshold: float) -> pa.Table:
    """Which records of these components to drop, as _DROPPED."""
    if not len(candidates):
        return _DROPPED.empty_table()
    candidates = candidates.sort_by([("component", "ascending"), ("id", "ascending")]).combine_chunks()
    component, record = candidates["component"].to_numpy(), candidates["record"].to_numpy()
    source_ids, lists = candidates["source_id"], candidates["shingles"].chunk(0)
    flat, bounds = _rarest_first(lists.flatten().to_numpy()), lists.offsets.to_numpy() - lists.offsets[0].as_py()
    sets = [np.sort(flat[start:stop]) for start, stop in itertools.pairwise(bounds)]
    rows = []
    for places in np.split(np.arange(len(sets)), np.flatnonzero(np.diff(component)) + 1):
        order = sorted(places.tolist(), key=lambda place: (-len(sets[place]), place))
        for place, (kept, similarity) in drop_similar(sets, order, threshold).items():
            rows.append((record[place], source_ids[kept].as_py(), similarity))
    return pa.Table.from_pylist([dict(zip(_DROPPED.names, row, strict=True)) for row in rows], _DROPPED)


def _rarest_first(shingles: Shingles) -> Shingles:
    """Renumber shingles from rare to common, so that the first ones of a set distinguish it best."""
    _, place, texts = np.unique(shingles, return_inverse=True, return_counts=True)
    rank = np.empty(len(texts), dtype=np.uint64)
    rank[np.argsort(texts, kind="stable")] = np.arange(len(texts), dtype=np.uint64)
    return rank[place]


def _split(records: pa.Table, dropped: pa.Table, hits: dict[str, tuple[str, float]]) -> tuple[pa.Table, pa.Table]:
    """Kept and rejected records; `dropped` and `hits` refer to positions in this file."""
    contaminated = np.array([int(place) for place in hits], dtype=np.int64)
    near = dropped["record"].to_numpy()
    stay = np.ones(len(records), dtype=bool)
    stay[near] = stay[contaminated] = False
    duplicates = records.take(near).append_column("duplicate_of", dropped["duplicate_of"])
    known = records.take(contaminated).append_column(
        "duplicate_of", pa.array([name for name, _ in hits.values()], pa.string())
    )
    rejected = [
        rejections(duplicates, "near_duplicate", dropped["similarity"]),
        rejections(known, "contaminated", pa.array([similarity for _, similarity in hits.values()], pa.float64())),
    ]
    return records.filter(pa.array(stay)), pa.concat_tables(rejected)


def _load(path: StoragePath, start: int = 0, stop: int | None = None) -> Ints:
    """Read the numbers that `_save` wrote, or only a slice of them."""
    with path.open("rb") as file:
        file.seek(8 * start)
        return np.frombuffer(file.read(-1 if stop is None else 8 * (stop - start)), np.int64)


def _save(numbers: Ints, output: Output, name: str) -> None:
    output.write(name, np.ascontiguousarray(numbers).tobytes())
