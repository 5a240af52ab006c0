"""The vector table at some million rows of 64 numbers: its first write, syncs, commits, and the memory of the driver.

  python benchmarks/table.py                                    # 0.5 and 5 million rows, 8 GB of disk
  python benchmarks/table.py --rows 500000 --folder /tmp/table  # 0.05 and 0.5 million

There is no encoder: vectors are random, of length 1. Documents are record files of text alone and token shards, as
jobs/prepare.py leaves them. Each step is a process of its own, the driver; `driver MB` is the most that it held, and
`CPU s` the time of all its processes in user code, which other work on the machine changes less than it does seconds.

  first write     read documents, write fragments, commit them in waves; on all cores, without Ray
  join and index  small files are joined, and ids indexed
  nothing changed what jobs/embed.py does but for encoding: compare, write, rewrite, delete, join, compare again
  1% changed      a quarter of it each: another text, other metadata, vanished, new
  all checked     compare, as after a job that was killed: texts, metadata and vectors are hashed

Then 200 waves of 16 small fragments: what a commit takes as fragments get many, and its share of a wave, which lasts a
second and no less than 50 commits; in the second column small files are joined every 50 waves.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.session import Progress, ray_session, set_environment

set_environment()

from benchmarks.corpora import machine
from pipeline.core.artifact import Artifact
from pipeline.core.console import table as lines_of
from pipeline.index.dead_letters import DeadLetters
from pipeline.index.documents import Documents
from pipeline.index.embed import MIN_WAVE_S, WaveCommitter, differences, fragment_rows, rewrite, write_fragments
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.indexing import finish
from pipeline.index.sync import Difference, Sync
from pipeline.index.table import Fragment, VectorTable
from pipeline.index.vectors import as_column

WIDTH, RANGE_ROWS = 64, 16_667  # of a million records, prepare makes 60 shards
WAVES, WAVE_FRAGMENTS, COMPACTED_EVERY = 200, 16, 50
AIMS = {
    "first write": "100,000 rows/s",
    "join and index": "",
    "nothing changed": "60 s",
    "1% changed": "90 s",
    "all checked": "",
}


@dataclass(frozen=True)
class World:
    """A folder with record files and the table of their vectors."""

    folder: Path
    rows: int

    @property
    def table(self) -> VectorTable:
        return VectorTable(self.folder, "table", WIDTH)

    @property
    def ranges(self) -> int:
        return max(1, round(self.rows / RANGE_ROWS))

    @property
    def letters(self) -> DeadLetters:
        return DeadLetters(self.folder / "dead_letters")

    def prepared(self, *, changed: bool) -> Path:
        return self.folder / ("changed" if changed else "prepared")

    def documents(self, *, changed: bool = False) -> Documents:
        prepared = self.prepared(changed=changed)
        records = sorted((prepared / "records").iterdir())
        return Documents(records, "text", {}, True, prepared, Artifact(self.folder, "documents", []), True)

    def write(self, index: int) -> None:
        """A record file and its token shard, in which 1% is changed, and as they were before."""
        chance = np.random.default_rng(index)
        rows = records(chance, index, self.ranges, self.rows // self.ranges)
        self._write(index, rows, changed=False)
        new = records(chance, index, self.ranges, max(1, len(rows) // 400))
        other, metadata, vanished = np.split(chance.permutation(len(rows))[: 3 * len(new)], 3)
        kept = np.setdiff1d(np.arange(len(rows)), [*other, *vanished])
        is_other = pa.array(np.isin(kept, metadata))
        rest = rows.take(pa.array(kept))
        rest = rest.set_column(3, "metadata", pc.if_else(is_other, '{"page": "another"}', rest["metadata"]))
        rewritten = records(chance, index, self.ranges, len(other))
        rewritten = rewritten.set_column(2, "source_id", rows["source_id"].take(pa.array(other)))
        self._write(index, pa.concat_tables([rest, rewritten, new]).sort_by("id"), changed=True)

    def _write(self, index: int, rows: pa.Table, *, changed: bool) -> None:
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(16 * len(rows), dtype=np.int32) % 30_000), 16)
        shard = pa.table({"id": rows["id"], "text": tokens.cast(pa.list_(pa.int32()))})
        for name, table in {"records": rows, "train": shard}.items():
            path = self.prepared(changed=changed) / name / f"{index:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=1024, compression="zstd")


def records(chance: np.random.Generator, index: int, ranges: int, count: int) -> pa.Table:
    """Records of text alone whose ids, 128 random bits, lie in this range."""
    first, last = (-(-(each << 32) // ranges) for each in (index, index + 1))
    bits = chance.integers(0, 256, (count, 16), np.uint8)
    bits[:, :4] = chance.integers(first, last, count).astype(">u4").view(np.uint8).reshape(-1, 4)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    hexadecimal = digits[np.stack([bits >> 4, bits & 15], axis=-1)].reshape(count, 32)
    ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(hexadecimal.tobytes())])
    ids = ids.cast(pa.binary()).cast(pa.string())
    words = [np.base_repr(word, 36).lower() for word in range(40_000, 41_000)]
    phrases = pa.array([" ".join(words[(7 * i + 3 * i * j) % 1000] for j in range(16)) for i in range(1000)])
    return pa.table(
        {
            "id": ids,
            "source": pa.array(["synthetic"] * count),
            "source_id": pc.binary_join_element_wise("synthetic", pc.utf8_slice_codeunits(ids, 0, 20), ":"),
            "metadata": pa.array([f'{{"page": {i}}}' for i in range(1000)]).take(chance.integers(0, 1000, count)),
            "text": pc.binary_join_element_wise("text", ids, phrases.take(chance.integers(0, 1000, count)), " "),
        }
    ).sort_by("id")


def with_random_vectors(rows: pa.Table) -> pa.Table:
    vectors = np.random.default_rng().standard_normal((len(rows), WIDTH), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return rows.append_column("vector", as_column(vectors))


def written(world: World, ranges: list[int]) -> list[Fragment]:
    """Fragments of the documents of these ranges."""
    found = pa.concat_tables([rows for index in ranges for rows in world.documents().read(index)])
    return write_fragments(world.table, with_random_vectors(found), world.letters)[0]


def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))


def first_write(world: World) -> dict[str, float]:
    together = max(1, round(fragment_rows(world.rows) / RANGE_ROWS))
    tasks = [list(range(world.ranges)[start : start + together]) for start in range(0, world.ranges, together)]
    with pool() as workers, world.table.writing() as writer:
        list(workers.map(str, range(os.cpu_count() or 1)))
        cpu, began, waves = cpu_s(), time.perf_counter(), WaveCommitter(writer)
        for found in workers.map(written, [world] * len(tasks), tasks):
            waves.add(found)
        waves.commit()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "cpu_s": cpu_s() - cpu, "commits": waves.commits, "commit": waves.commit_s}


def sync(world: World, *, changed: bool) -> dict[str, float]:
    documents, table, times = world.documents(changed=changed), world.table, {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        times[name] = time.perf_counter() - began
        return result

    def compared(version: int) -> tuple[Sync, list[Difference]]:
        one = Sync(documents, table, NO_MODEL, "", version)
        return one, differences(one, progress)

    with lazy_progress() as progress, table.writing() as writer:
        writer.begin()
        cpu, began = cpu_s(), time.perf_counter()
        one, found = timed("compare", lambda: compared(int(writer.dataset.version)))
        whole = Difference.total(found)

        def due() -> Iterator[pa.Table]:
            """What a task writes at once; the rows of many ranges."""
            some, most = list[pa.Table](), fragment_rows(whole.summary["new"] + whole.summary["changed"])
            for index, each in enumerate(found):
                some += one.due(index) if each.counts["new"] else ()
                if sum(map(len, some)) > most or (some and index == len(found) - 1):
                    yield with_random_vectors(pa.concat_tables(some).drop_columns(["tokens"]))
                    some = []

        def embed() -> None:
            waves = WaveCommitter(writer)
            for rows in due():
                waves.add(write_fragments(table, rows, world.letters)[0])
            waves.commit()

        timed("write", embed)
        timed("rewrite", lambda: rewrite(one, [i for i, each in enumerate(found) if each.counts["metadata"]], writer))
        timed("delete", lambda: writer.delete(whole.obsolete))
        timed("finish", lambda: finish(table, None, 0))
        counts = Difference.total(timed("compare again", lambda: compared(table.version()))[1]).summary
        seconds, cpu = time.perf_counter() - began, cpu_s() - cpu
    if counts["untouched"] != table.count() or counts.total() != counts["untouched"]:
        raise SystemExit(f"the table of {table.count():,} rows is not what the documents say: {counts}")
    print({name: round(each, 2) for name, each in times.items()}, whole.summary, file=sys.stderr)
    return {"seconds": seconds, "cpu_s": cpu, **times}


@contextmanager
def lazy_progress() -> Iterator[Callable[[], Progress]]:
    """Ray begins when there is work for it: few documents are compared in the driver."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(ray_session()))


NO_MODEL = cast(EncoderRecipe, None)
"""Tokens come from the token shards, so nothing asks for a model."""


def join_and_index(world: World) -> dict[str, float]:
    with world.table.writing():
        cpu, began = cpu_s(), time.perf_counter()
        finish(world.table, None, 0)
        return {"seconds": time.perf_counter() - began, "cpu_s": cpu_s() - cpu}


def all_checked(world: World) -> dict[str, float]:
    with lazy_progress() as progress:
        cpu, began = cpu_s(), time.perf_counter()
        one = Sync(world.documents(changed=True), world.table, NO_MODEL, "", world.table.version(), check=True)
        counts = Difference.total(differences(one, progress)).summary
        seconds, cpu = time.perf_counter() - began, cpu_s() - cpu
    if counts.total() != counts["untouched"]:
        raise SystemExit(f"rows are not what their digests say: {counts}")
    return {"seconds": seconds, "cpu_s": cpu}


def waves(world: World, *, compacted: bool) -> list[float]:
    """Milliseconds of each commit."""
    table = replace(world.table, name="compacted" if compacted else "waves")
    rows = with_random_vectors(pa.concat_tables(world.documents().read(0)).slice(0, 16))
    took = []
    with table.writing() as writer:
        for number in range(WAVES):
            fragments = [write_fragments(table, rows, world.letters)[0][0] for _ in range(WAVE_FRAGMENTS)]
            began = time.perf_counter()
            writer.append(fragments)
            took.append(1000 * (time.perf_counter() - began))
            if compacted and (number + 1) % COMPACTED_EVERY == 0:
                finish(table, None, 0)
                writer.refresh()
    return took


def cpu_s() -> float:
    """User time of this process and all that it started."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(each.cpu_times().user + each.cpu_times().children_user for each in processes)


def run_step(world: World, step: str) -> Any:
    if step == "documents":
        with pool() as workers:
            list(workers.map(world.write, range(world.ranges)))
        return {}
    if step.startswith("waves"):
        return waves(world, compacted=step == "waves, compacted")
    if step == "first write":
        found = first_write(world)
    elif step == "join and index":
        found = join_and_index(world)
    elif step == "all checked":
        found = all_checked(world)
    else:
        found = sync(world, changed=step == "1% changed")
    return {**found, "driver MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def in_process(world: World, step: str) -> Any:
    print(f"{world.rows:,} rows: {step}", file=sys.stderr)
    command = [sys.executable, __file__, "--rows", str(world.rows), "--folder", str(world.folder), "--step", step]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000, help="of the larger table; the other has a tenth")
    parser.add_argument("--folder", type=Path, help="a folder with room for it; by default a temporary one")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(run_step(World(args.folder, args.rows), args.step)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        worlds = [World(Path(folder) / f"{rows}", rows) for rows in (args.rows // 10, args.rows)]
        found = {}
        for world in worlds:
            in_process(world, "documents")
            found[world.rows] = {step: in_process(world, step) for step in AIMS}
        commits = [in_process(worlds[0], step) for step in ("waves", "waves, compacted")]
    print(f"\n{machine()}\n\n{steps_table(found)}\n\n{commits_table(commits)}")


def steps_table(found: dict[int, dict[str, dict[str, float]]]) -> str:
    (small, few), (large, many) = found.items()
    lines = []
    for step in AIMS:
        sides = [[side[step][name] for side in (few, many)] for name in ("seconds", "cpu_s", "driver MB")]
        cells = [f"{each:,.1f}" for pair in sides for each in pair]
        lines.append([step, *cells, f"{sides[2][1] / sides[2][0]:.2f}", f"{large / sides[0][1]:,.0f}", AIMS[step]])
    header = [f"{name}, {rows:,}" for name in ("seconds", "CPU s", "driver MB") for rows in (small, large)]
    return lines_of(lines, ["rows", *header, "times", "rows/s", "aim"])


def commits_table(commits: list[list[float]]) -> str:
    lines, some = [], WAVES // 4
    for start in range(0, WAVES, some):
        medians = [f"{np.median(each[start : start + some]):.1f}" for each in commits]
        lines.append([f"{start + 1} to {start + some}", *medians])
    shares = [sum(each) / WAVES / max(1000 * MIN_WAVE_S, 50 * max(each)) for each in commits]
    lines.append(["share of a wave's time (aim: under 2%)", *(f"{share:.2%}" for share in shares)])
    return lines_of(lines, ["waves", "commit ms, median", "joined every 50 waves"])


if __name__ == "__main__":
    main()
