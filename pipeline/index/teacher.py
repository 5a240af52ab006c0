"""Embeds a prepared data set once with a teacher, so that training reads the teacher's vectors beside the tokens.

    manifest = with_teacher(config, folder, manifest, session.progress)       # manifest.teacher.folder, .width

The vectors are an artifact, named by the teacher and the data. It has one file per token shard, with the same rows and
row groups, so a feed can start at any step. The teacher is a model, which encodes each distinct text of a record file
once, or a folder of vectors by record id, or of scores, in a column `teacher_scores` then. Cost: encoding all texts
once; 4 bytes per number on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Config, ConfigError, Embedding
from pipeline.core.artifact import Artifact, Output, open_parquet
from pipeline.core.files import parquet_file, sorted_glob
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath, as_path
from pipeline.core.session import Progress
from pipeline.data.manifest import SPLITS, Manifest, Shard, TeacherVectors
from pipeline.data.partitions import read_part, shard_of, write_parts
from pipeline.index.encoder import EncoderRecipe, TextEncoder, open_encoder
from pipeline.index.published import copy_model, prompt_name
from pipeline.index.vectors import as_column

FORMAT = 1  # of the written files; raising it makes earlier ones stale
MODEL_FILES = ("model.json", "modules.json", "config.json")
READ_ROWS = 4096
SCORES = "scores"  # column of a cross-encoder's scores
TITLE = "train: teacher's vectors"


def with_teacher(
    config: Config, prepared: StoragePath, manifest: Manifest, progress: Callable[[], Progress]
) -> Manifest:
    """The manifest with the teacher's vectors of all texts, which are made first if they do not exist.

    Without a teacher in the config, returns the manifest. Raises ConfigError and JobError.
    """
    if config.objective.teacher is None:
        return manifest
    made = Teaching.of(config, prepared, manifest).make(progress)
    return replace(manifest, teacher=made)


def check_teacher(config: Config) -> None:
    """Raise ConfigError if the teacher is neither a model nor a folder of vectors. Does not read weights."""
    if config.model.static_from:
        _given_model(config, "model.static_from", config.model.static_from)
    if config.objective.teacher is None:
        return
    place, key = as_path(config.objective.teacher), config.objective.teacher_key
    if place.is_dir() and not holds_model(place) and not sorted_glob(place, "*.parquet"):
        raise ConfigError(f"{key}: found no model and no Parquet files in {place}; allowed is a folder of either")
    if not (place.is_dir() and sorted_glob(place, "*.parquet")):
        _given_model(config, key, config.objective.teacher)


def holds_vectors(name: str) -> bool:
    """Whether a teacher is a folder of vectors or scores, not a model."""
    place = as_path(name)
    return place.is_dir() and not holds_model(place) and bool(sorted_glob(place, "*.parquet"))


def holds_model(folder: StoragePath) -> bool:
    return any((folder / name).is_file() for name in MODEL_FILES)


def model_recipe(config: Config, key: str, name: str) -> EncoderRecipe:
    """The encoder of a model's folder or name on the hub, copied below storage.root, where all nodes see it.

    Raises ConfigError, which names the config's `key`.
    """
    recipe, labels = _given_model(config, key, name), config.scaling.labels
    return replace(recipe, folder=copy_model(config, recipe.local), labels=labels.encode or labels.data)


def _given_model(config: Config, key: str, name: str) -> EncoderRecipe:
    from pipeline.model.folder import read_model_spec
    from pipeline.model.pretrained import fetch

    place = as_path(name)
    try:
        recipe = EncoderRecipe(place if place.is_dir() else fetch(name), Embedding(), config.root / "onnx")
        read_model_spec(recipe.local)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from None
    return recipe


@dataclass(frozen=True)
class Teaching:
    """What to embed, with what, and where the vectors go."""

    config: Config
    prepared: StoragePath
    files: Sequence[StoragePath]  # record files
    fields: Sequence[str]  # of the texts to embed
    shards: dict[str, Shard]  # by path
    artifact: Artifact
    model: EncoderRecipe | None
    vectors: Sequence[StoragePath]  # files of vectors; empty with a model

    @property
    def key(self) -> str:
        return self.config.objective.teacher_key

    @classmethod
    def of(cls, config: Config, prepared: StoragePath, manifest: Manifest) -> Teaching:
        """Raises ConfigError if the teacher cannot be read."""
        place = as_path(str(config.objective.teacher))
        vectors = sorted_glob(place, "*.parquet") if place.is_dir() and not holds_model(place) else []
        key = config.objective.teacher_key
        model = None if vectors else model_recipe(config, key, str(config.objective.teacher))
        fields = [name for name in manifest.text_fields if name != "negatives" or config.objective.hard_negatives]
        if vectors and SCORES in parquet_file(vectors[0]).schema_arrow.names:
            _check_scores(config, manifest)
            fields = [SCORES]
        stats = [(file.name, file.stat()) for file in vectors]
        of_teacher = model.fingerprint if model else [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        inputs = [FORMAT, manifest.fingerprint, of_teacher, fields]
        files = sorted_glob(prepared / "records", "*.parquet")
        shards = {shard.path: shard for shard in manifest.shards}
        artifact = Artifact(config.root / "stages", "teacher", inputs)
        return cls(config, prepared, files, fields, shards, artifact, model, vectors)

    def make(self, progress: Callable[[], Progress]) -> TeacherVectors:
        """Embed the texts, or read the given vectors. A killed job continues with the record files that are left."""
        made = self.artifact.make(lambda: self._fill(progress()))
        return TeacherVectors(str(self.artifact.folder), made["width"])

    def _fill(self, progress: Progress) -> dict[str, Any]:
        rows, widths = Counter[str](), set[int]()
        for shard in self.shards.values():
            rows[as_path(shard.path).name] += shard.rows
        sizes = [len(self.fields) * rows[file.name] for file in self.files]
        if self.model:
            options = pool_options(self.model, sum(rows.values()), tasks=len(self.files))
            widths = set(self.artifact.tasks(progress, TITLE, sizes, self._encode_file, options=options, unit="texts"))
        else:
            parts = self._partition(progress)
            join = partial(self._join_file, parts)
            widths = set(self.artifact.tasks(progress, TITLE, sizes, join, unit="texts"))
        if self.fields == [SCORES]:
            return {"width": 0}
        if len(widths := widths - {0}) != 1:
            found = " and ".join(map(str, sorted(widths))) or "no numbers"
            raise JobError(f"{self.key}: found vectors of {found} numbers; give vectors of one size")
        return {"width": widths.pop()}

    def _encode_file(self, index: int, output: Output) -> int:
        assert self.model
        encoder = opened(self.model)
        records = open_parquet(self.files[index]).read(columns=["id", *self.fields])
        for number, name in enumerate(self.fields):

            def advance(share: float, number: int = number) -> None:
                output.advance((number + share) / len(self.fields))

            flat = _flattened(records[name])
            distinct = flat.dictionary_encode()
            vectors = encoder.encode(distinct.dictionary.to_pylist(), prompt_name(name), advance)
            column = as_column(vectors.take(distinct.indices.to_numpy(), axis=0))
            records = _replaced(records, name, _nested(column, records[name]))
        self._write(index, records, output)
        return encoder.width

    def _partition(self, progress: Progress) -> list[StoragePath]:
        """Group the given vectors by the record file that holds their id."""
        groups = [(file, number) for file in self.vectors for number in range(parquet_file(file).num_row_groups)]
        folder = self.artifact.scratch / "vectors"

        def partition(index: int, output: Output) -> None:
            file, number = groups[index]
            rows = self._given(file, parquet_file(file).read_row_group(number))
            places = [shard_of(one, len(self.files)) for one in rows["id"].to_pylist()]
            with output.writing(f"scratch/vectors/{index:06d}.parts") as temporary:
                write_parts(rows, places, len(self.files), temporary)

        self.artifact.tasks(
            progress, "train: read the teacher's vectors", [1] * len(groups), partition, unit="row groups"
        )
        return [folder / f"{index:06d}.parts" for index in range(len(groups))]

    def _given(self, file: StoragePath, rows: pa.Table) -> pa.Table:
        """The ids, and each field's vectors as float32. Raises JobError for other columns."""
        columns: dict[str, Any] = {}
        for name in ("id", *self.fields):
            if name not in rows.column_names:
                raise JobError(
                    f"{self.key}: found no column {name} in {file}; give a column of {', '.join(self.fields)}"
                )
            wanted: Any = pa.string() if name == "id" else pa.list_(pa.float32())
            try:
                columns[name] = rows[name].cast(pa.list_(wanted) if name == "negatives" else wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise JobError(f"{self.key}: found no vectors in column {name} of {file} ({error})") from None
        others = columns["id"].filter(pc.invert(pc.match_substring_regex(columns["id"], "^[0-9a-f]{32}$")))
        if len(others):
            raise JobError(
                f"{self.key}: found the id {others[0].as_py()!r} in {file}; give the ids in {self.prepared / 'records'}"
            )
        return pa.table(columns)

    def _join_file(self, parts: Sequence[StoragePath], index: int, output: Output) -> int:
        given = read_part(parts, index) if parts else pa.table({"id": pa.array([], pa.string())})
        wanted = open_parquet(self.files[index]).read(columns=["id"])["id"].combine_chunks()
        places = pc.index_in(wanted, given["id"].combine_chunks())
        if places.null_count:
            missing = wanted.filter(places.is_null())
            raise JobError(
                f"{self.key}: found no vectors of {len(missing):,} records of {self.files[index].name}, such as "
                f"{missing[0].as_py()}; give vectors of all ids in {self.prepared / 'records'}"
            )
        records, widths = given.take(places), set[int]()
        if self.fields == [SCORES]:
            self._check_counts(index, records)
        for name in self.fields if self.fields != [SCORES] else ():
            vectors = _flattened(records[name])
            lengths = {int(length) for length in pc.unique(pc.list_value_length(vectors)).drop_null().to_pylist()}
            widths |= lengths
            if vectors.null_count or len(lengths) > 1:
                found = "missing vectors" if vectors.null_count else f"vectors of {' and '.join(map(str, lengths))}"
                raise JobError(f"{self.key}: found {found} in column {name}; give vectors of one size")
            fixed = pa.FixedSizeListArray.from_arrays(vectors.flatten(), max(lengths, default=1))
            records = _replaced(records, name, _nested(fixed, records[name]))
        self._write(index, records, output)
        if len(widths) > 1:
            raise JobError(f"{self.key}: found vectors of {' and '.join(map(str, widths))} numbers; give one size")
        return max(widths, default=0)

    def _check_counts(self, index: int, records: pa.Table) -> None:
        """Raise JobError unless each record has a score for its positive and one for each of its negatives."""
        negatives = open_parquet(self.files[index]).read(columns=["negatives"])["negatives"]
        expected = pc.add(pc.fill_null(pc.list_value_length(negatives), 0), 1)
        wrong = pc.fill_null(pc.not_equal(pc.list_value_length(records[SCORES]), expected), True)
        if pc.any(wrong).as_py():
            one = records.filter(wrong)["id"][0].as_py()
            raise JobError(
                f"{self.key}: found another number of scores than texts in the record {one}; give one for its positive "
                "and one for each of its negatives"
            )

    def _write(self, index: int, records: pa.Table, output: Output) -> None:
        """Write the vectors of a record file in the rows and row groups of its shards. Raises JobError for NaN."""
        for name in self.fields:
            numbers = _flattened(records[name]).flatten()
            if not np.isfinite(numbers).all():
                raise JobError(
                    f"{self.key}: found NaN or infinite numbers in {name} of {self.files[index].name}; use "
                    "another teacher, or correct its vectors"
                )
        ids = records["id"].combine_chunks()
        records = records.select(self.fields).rename_columns([f"teacher_{name}" for name in self.fields])
        for split in SPLITS:
            shard = self.shards.get(f"{split}/{self.files[index].name}")
            if shard is None:
                continue
            of_shard = open_parquet(self.prepared / shard.path).read(columns=["id"])["id"].combine_chunks()
            rows = records.take(pc.index_in(of_shard, ids))
            with (
                output.writing(shard.path) as temporary,
                pq.ParquetWriter(temporary, rows.schema, compression="zstd", write_page_checksum=True) as writer,
            ):
                first = 0
                for count in shard.row_groups:
                    writer.write_table(rows.slice(first, count).combine_chunks(), row_group_size=max(count, 1))
                    first += count
        output.report(records=len(ids))


def _check_scores(config: Config, manifest: Manifest) -> None:
    """Raise ConfigError if given scores cannot be used."""
    contrastive, key = config.objective.contrastive, config.objective.teacher_key
    if not config.objective.distills_scores or (contrastive and contrastive.guide):
        raise ConfigError(f"{key}: found scores; they need objective.distillation.loss=scores, and cannot guide")
    if "negatives" not in manifest.text_fields or not config.objective.hard_negatives:
        raise ConfigError(f"{key}: found scores; they need records with negatives, and hard_negatives of 1 or more")


def pool_options(model: EncoderRecipe, texts: int, tasks: int) -> dict[str, Any]:
    """Options of Ray Data for a pool of actors, which keep the encoder that `opened` returns."""
    from ray.data import ActorPoolStrategy

    from pipeline.index.pool import pool_of

    pool = pool_of(texts, model)
    most = min(pool.most, tasks)
    return {
        "compute": ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(pool.now, most)),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus or None,
        "label_selector": model.labels or None,
    }


def opened(model: EncoderRecipe) -> TextEncoder:
    """The encoder, opened once per process."""
    return _opened(model.folder, model.graphs)


@lru_cache(maxsize=1)
def _opened(folder: StoragePath, graphs: StoragePath) -> TextEncoder:
    return open_encoder(EncoderRecipe(folder, Embedding(), graphs))


def _flattened(column: pa.ChunkedArray) -> pa.Array:
    """The texts or vectors of a field; of negatives, those of all records end to end."""
    array = column.combine_chunks()
    nested = pa.types.is_list(array.type) and not pa.types.is_floating(array.type.value_type)
    return array.flatten() if nested else array


def _nested(values: pa.Array, column: pa.ChunkedArray) -> pa.Array:
    """The values in lists as long as the column's, if it holds lists of texts or vectors; null stays null."""
    array = column.combine_chunks()
    if not pa.types.is_list(array.type) or pa.types.is_floating(array.type.value_type):
        return values
    counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], counts.cumsum()]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=array.is_null())


def _replaced(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, values)
