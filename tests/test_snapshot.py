"""The vector table as Parquet files that anything reads: the same rows, complete or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.core.artifact import MANIFEST, read_manifest
from pipeline.core.files import files_below
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath, as_path
from pipeline.data.partitions import content_id
from pipeline.index import table as table_module
from pipeline.index.snapshot import write_snapshot
from pipeline.index.table import VectorTable
from tests.bucket_servers import serving
from tests.conftest import no_progress, progress
from tests.vector_table import WIDTH, World, vector_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "RANGE_ROWS", 8)


def rows_in(folder: StoragePath) -> list[dict[str, Any]]:
    files = [name for name in files_below(folder) if name.endswith(".parquet")]
    return [row for name in sorted(files) for row in _read(folder / name).to_pylist()]


def _read(file: StoragePath) -> pa.Table:
    with file.open("rb") as opened:
        return pq.read_table(pa.BufferReader(opened.read()))


def check(world: World, rows: list[dict[str, Any]]) -> None:
    """Rows are the documents, each once, sorted by id."""
    expected = {content_id([text]): text for text in world.documents}
    assert [row["id"] for row in rows] == sorted(expected)
    for row in rows:
        places = [{**place, "metadata": json.loads(place["metadata"])} for place in row["places"]]
        assert (row["text"], places) == (expected[row["id"]], world.documents[row["text"]])
        assert {name: row[name] for name in ("source", "source_id", "metadata")} == row["places"][0]
        np.testing.assert_array_equal(np.float32(row["vector"]), vector_of(row["text"]))


def test_random_changes_are_in_the_next_snapshot_and_older_ones_go(tmp_path: Path) -> None:
    world, neighbour = World(tmp_path), World(tmp_path / "b", seed=1)
    home = tmp_path / "parquet"
    for each in (world, neighbour):
        with each.table.writing() as writer:
            each.add(writer, each.new(30))
    kept = write_snapshot(neighbour.table, home, progress)
    for _ in range(5):
        with world.table.writing() as writer:
            world.step(writer)
        folder = write_snapshot(world.table, home, progress)
        check(world, rows_in(folder))
        assert sorted(home.iterdir()) == sorted([folder, kept])
    check(neighbour, rows_in(kept))  # another table of this name


def test_without_a_change_there_is_nothing_to_do(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world.table.writing() as writer:
        world.add(writer, world.new(20))
    folder = write_snapshot(world.table, tmp_path / "parquet", progress)
    before = files_below(folder)
    with world.table.writing():
        pass  # another version with the same rows
    assert write_snapshot(world.table, tmp_path / "parquet", no_progress) == folder
    assert files_below(folder) == before


def test_pandas_and_pyarrow_read_it(tmp_path: Path) -> None:
    world = World(tmp_path, vector_type="float16")
    with world.table.writing() as writer:
        world.add(writer, world.new(200))
    folder = write_snapshot(world.table, tmp_path / "parquet", progress)
    frame = pd.read_parquet(folder / "rows").set_index("text")
    assert sorted(frame.index) == sorted(world.documents)
    for text, vector in frame["vector"].items():
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, vector_of(str(text)).astype(np.float16).astype(np.float32))
    found = ds.dataset(folder / "rows").to_table()
    assert found.schema.field("vector").type == pa.list_(pa.field("element", pa.float32()))
    assert found.num_rows == 200
    assert (read_manifest(folder) or {})["rows"] == 200
    assert len(files_below(folder / "rows")) == 25


def test_an_empty_table(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.table.create()
    folder = write_snapshot(world.table, tmp_path / "parquet", progress)
    assert rows_in(folder) == []
    assert len(ds.dataset(folder / "rows").schema.field("vector").type.value_field.name) > 0


class FailingTable(VectorTable):
    """One whose ids from 8 on cannot be read while there is a file `full`."""

    def read(self, columns: Sequence[str], between: Any = ("", None), version: int | None = None) -> pa.Table:
        if between[0].startswith("8") and (self.home / "full").exists():
            raise JobError("the disk is full")
        return super().read(columns, between, version)


def test_killed_it_is_absent_and_the_rest_is_written_later(tmp_path: Path) -> None:
    world, home = World(tmp_path), tmp_path / "parquet"
    with world.table.writing() as writer:
        world.add(writer, world.new(60))
    whole = write_snapshot(world.table, home, progress)
    with world.table.writing() as writer:
        world.add(writer, world.new(5))
    table = FailingTable(tmp_path, "t", WIDTH)
    (tmp_path / "full").touch()
    with pytest.raises(JobError, match=r"^parquet: write: the disk is full$"):
        write_snapshot(table, home, progress)
    (broken,) = set(home.iterdir()) - {whole}
    assert not (broken / MANIFEST).exists()
    assert (whole / MANIFEST).exists()  # until there is another
    written = {name: stat for name, stat in files_below(broken / "rows").items() if name.endswith("parquet")}
    assert 0 < len(written) < 9
    (tmp_path / "full").unlink()
    assert write_snapshot(table, home, progress) == broken
    after = files_below(broken / "rows")
    assert [name for name in written if after[name] == written[name]]  # those that had a note are not written again
    check(world, rows_in(broken))
    assert list(home.iterdir()) == [broken]


def test_in_a_bucket(tmp_path: Path) -> None:
    world = World(tmp_path)
    with serving("s3", "bucket", tmp_path) as bucket:
        home = as_path(bucket.uri("parquet"))
        for _ in range(2):
            with world.table.writing() as writer:
                world.add(writer, world.new(10))
            folder = write_snapshot(world.table, home, progress)
            check(world, rows_in(folder))
            assert {name.partition("/")[0] for name in files_below(home)} == {folder.name}
