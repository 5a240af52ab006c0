"""Writing and reading shards through pipeline/core, and through pyarrow.fs.

    python benchmarks/storage.py                              # a folder on disk, and S3 by moto on loopback
    python benchmarks/storage.py --root s3://bucket/prefix    # a bucket of your own

Both sides write the same tables in the same way, by turns, and read them back whole and by row group; every figure is
the best of some rounds. Ours also flushes each file to the disk, hashes it, and checks that hash when it is read first.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core import artifact
from pipeline.core.artifact import Artifact, open_parquet
from pipeline.core.console import table
from pipeline.core.files import parquet_file, remove_folder
from pipeline.core.path import StoragePath, as_path

SHARDS, ROWS, GROUP_ROWS, ROUNDS = 24, 16_384, 1024, 5


def shard(number: int) -> pa.Table:
    """Rows like those of a token shard: an id, and some 60 tokens."""
    chance = np.random.default_rng(number)
    lengths = chance.integers(20, 100, ROWS)
    tokens = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()),
        pa.array(chance.zipf(1.3, lengths.sum()).clip(max=30_000), pa.int32()),
    )
    return pa.table({"id": [f"{number:08x}{row:024x}" for row in range(ROWS)], "text": tokens})


class Ours:
    def __init__(self, root: StoragePath, tables: list[pa.Table]) -> None:
        self.made, self.tables = Artifact(root, "ours", []), tables

    def write(self) -> None:
        for number, rows in enumerate(self.tables):
            with (
                self.made.output.writing(f"{number}.parquet") as file,
                pq.ParquetWriter(file, rows.schema, compression="zstd", write_page_checksum=True) as writer,
            ):
                writer.write_table(rows, row_group_size=GROUP_ROWS)
        self.made.finish({})

    def read(self) -> int:
        artifact._checked.clear()  # as a process does that reads them for the first time
        return sum(len(open_parquet(self.made.folder / f"{number}.parquet").read()) for number in range(SHARDS))

    def read_groups(self) -> int:
        files = [parquet_file(self.made.folder / f"{number}.parquet") for number in range(SHARDS)]
        return sum(len(file.read_row_group(group)) for file in files for group in range(0, file.num_row_groups, 4))


class Pyarrow:
    def __init__(self, root: StoragePath, tables: list[pa.Table]) -> None:
        self.tables = tables
        self.filesystem, path = pa.fs.FileSystem.from_uri(str(root))
        self.path, self.is_local = f"{path}/pyarrow", self.filesystem.type_name == "local"

    def write(self) -> None:
        self.filesystem.create_dir(self.path)
        for number, rows in enumerate(self.tables):
            with (
                self.filesystem.open_output_stream(f"{self.path}/{number}.parquet") as file,
                pq.ParquetWriter(file, rows.schema, compression="zstd") as writer,
            ):
                writer.write_table(rows, row_group_size=GROUP_ROWS)

    def read(self) -> int:
        return sum(len(self._open(number).read()) for number in range(SHARDS))

    def read_groups(self) -> int:
        files = [self._open(number) for number in range(SHARDS)]
        return sum(len(file.read_row_group(group)) for file in files for group in range(0, file.num_row_groups, 4))

    def _open(self, number: int) -> pq.ParquetFile:
        source = self.filesystem.open_input_file(f"{self.path}/{number}.parquet")
        return pq.ParquetFile(source, pre_buffer=not self.is_local)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(root: StoragePath) -> list[list[str]]:
    tables = [shard(number) for number in range(SHARDS)]
    megabytes = sum(rows.nbytes for rows in tables) / 1e6
    sides = Ours(root, tables), Pyarrow(root, tables)
    rows = []
    for name, share in (("write", 1.0), ("read", 1.0), ("read_groups", 0.25)):
        seconds = []
        for _ in range(ROUNDS):
            seconds.append([timed(getattr(side, name)) for side in sides])
        best = np.min(seconds, axis=0)
        rates = [f"{share * megabytes / each:,.0f}" for each in best]
        rows.append([str(root).partition("?")[0], name, *rates, f"{best[1] / best[0]:.2f}"])
    remove_folder(root)
    return rows


@contextmanager
def moto() -> Iterator[str]:
    """A bucket of moto's, in a process of its own."""
    import boto3  # type: ignore[import-untyped]

    os.environ.update(AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="nothing")
    script = "from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False); s.start(); "
    script += "print(s.get_host_and_port()[1], flush=True); import sys; sys.stdin.read()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout
        address = f"127.0.0.1:{int(server.stdout.readline())}"
        boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1").create_bucket(Bucket="shards")
        try:
            yield f"s3://shards/root?region=us-east-1&scheme=http&endpoint_override={address}"
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="a folder or a URI, in place of both")
    args = parser.parse_args()
    header = ("root", "work", "ours MB/s", "pyarrow.fs MB/s", "ours / pyarrow.fs")
    if args.root:
        print(table(measure(as_path(args.root)), header))
        return
    with tempfile.TemporaryDirectory() as folder, moto() as uri:
        print(table([*measure(Path(folder) / "root"), *measure(as_path(uri))], header))


if __name__ == "__main__":
    main()
