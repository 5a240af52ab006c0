"""Hard negatives for the training split of a prepared data set, as a new data set that has them.

    records ──► keys ──► distinct positives encoded ──► anchors encoded, nearest ──► records with ──► token
                of texts  candidates/, by block          blocks ranked, chosen        negatives       shards

Both the texts that are chosen from and the records that get them are of the training split alone, so nothing of what
is held out is trained on; a record's id, and so its split, stays. What answers an anchor anywhere in the data set is no
negative of it. Vectors lie on disk in blocks that tasks map into memory: no process holds all of them, or scores beyond
some anchors times a block. Cost: N x N x D products for N records, spread over the cluster, and some 60 bytes a record
in the driver. A killed job goes on after the last of its stages that was done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config, ConfigError
from pipeline.data.exchange import read_part, write_parts
from pipeline.data.manifest import RECORD_SCHEMA, Manifest, read_manifest, sha256, write_table
from pipeline.data.shards import Parts, assemble, recipe_of, token_shards, tokens_stage
from pipeline.data.tokenizing import Recipe
from pipeline.data.work import Report, Stage, Task, run_tasks
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.mining.blocks import negatives_of, open_block, write_block
from pipeline.mining.choosing import Answers
from pipeline.mining.keys import TextKeys, text_keys
from pipeline.runtime.console import log
from pipeline.runtime.files import write_atomically
from pipeline.runtime.job import JobError, alone_in
from pipeline.runtime.session import Board
from pipeline.storage.bucket import AnyPath

FORMAT = 1  # of what is written; a change makes earlier mined data sets stale
READ_ROWS = 1024
BLOCK_ROWS = 8192  # candidates ranked together
MINE_ROWS = 8192  # anchors a task, for which it goes through all blocks once
_CHOSEN = pa.schema([("id", pa.string()), ("negatives", pa.list_(pa.string()))])


def mine(
    config: Config, folder: AnyPath, manifest: Manifest, model: EncoderRecipe, board: Callable[[], Board]
) -> tuple[Path, Manifest]:
    """The data set in `folder` with mined negatives, in a folder of its own. Raises ConfigError where it has no pairs.

    A record's own negatives, where it has some, stay behind those that are mined.
    """
    if not manifest.holds_pairs:
        raise ConfigError(
            f"data.sources: found records of {', '.join(manifest.text_fields)} alone; allowed for mining are sources "
            "that give anchor and positive"
        )
    root = config.root
    if not isinstance(root, Path) or not isinstance(folder, Path):
        raise ConfigError(
            f"storage.root: found {root}; allowed for mining, which maps its vectors into memory, is a folder on disk "
            "that all nodes see"
        )
    files, recipe = sorted((folder / "records").glob("*.parquet")), _recipe(config, manifest)
    tokenizer = folder / "tokenizer.json"
    settings = [config.mining.model_dump(), recipe.validation_fraction]
    of = [FORMAT, folder.name, manifest.fingerprint, model.space, settings]
    mined = Stage(root / "stages", "mined", of)
    tokens = tokens_stage(root / "stages", mined.key, sha256(tokenizer), recipe)
    target = root / "prepared" / hashlib.sha256(json.dumps(["mined", tokens.key]).encode()).hexdigest()[:16]
    there = read_manifest(target)
    if there:
        log.info("mine: nothing to do, %s is up to date", target)
        return target, there
    with alone_in(target):
        if mined.summary is None:
            with mined.open():
                mined.finish(_fill(mined, config, files, manifest, model, board()))
        records = [mined.folder / "records" / file.name for file in files]
        described = tokens.summary or token_shards(tokens, board(), records, recipe, tokenizer)
        rejected = {path.name: path for path in (folder / "rejected").glob("*.parquet")}
        parts = Parts(records, tokenizer, recipe, manifest.sources, manifest.clusters, rejected)
        return target, assemble(target, tokens, described, parts)


def on_disk(path: AnyPath) -> Path:
    """A path under a storage.root that `mine` has let pass."""
    assert isinstance(path, Path)
    return path


def _recipe(config: Config, manifest: Manifest) -> Recipe:
    """That of the data set, with negatives; one without a prompt of its own for them has the positives' there."""
    fields = [name for name in manifest.text_fields if name != "negatives"]
    recipe = recipe_of(config, [*fields, "negatives"])
    for prompts in recipe.prompts.values():
        if "positive" in prompts:
            prompts.setdefault("negatives", prompts["positive"])
    return recipe


def _fill(
    stage: Stage, config: Config, files: Sequence[Path], manifest: Manifest, model: EncoderRecipe, board: Board
) -> dict[str, Any]:
    """Write the stage's record files. Returns how many negatives there are."""
    keys = text_keys(on_disk(stage.scratch) / "keys", files, config.data.validation_fraction, board)
    encoding = _Encoding(config, manifest, files, keys, model, board)
    blocks = _candidates(stage, encoding)
    chosen = _choose_all(stage, encoding, blocks)
    return _write_records(stage, files, chosen, board)


@dataclass(frozen=True)
class _Encoding:
    """What it takes to embed a field of some of the records."""

    config: Config
    manifest: Manifest
    files: Sequence[Path]
    keys: TextKeys
    model: EncoderRecipe
    board: Board

    def of(self, field: str, prompt: str, wanted: npt.NDArray[np.bool_]) -> Any:
        """A dataset of `id`, `file`, `anchor_key`, `positive_key`, `text` and `vector` of the records wanted, (N,)."""
        import ray
        import ray.data

        from pipeline.embedding.embed import encoded

        files, keys, shared = self.files, ray.put(self.keys), ray.put(wanted)

        def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
            for index in batch["id"].tolist():
                yield from _read(files[index], index, field, ray.get(keys), ray.get(shared))

        rows = ray.data.range(len(files), override_num_blocks=len(files)).map_batches(read, batch_size=1, num_cpus=0.5)
        prompts = {source.name: source.prompts[field] for source in self.manifest.sources if field in source.prompts}
        return encoded(rows, int(wanted.sum()), self.model, self.board, prompt, prompts)


def _read(file: Path, index: int, field: str, keys: TextKeys, wanted: npt.NDArray[np.bool_]) -> Iterator[pa.Table]:
    start = keys.file_starts[index]
    for batch in pq.ParquetFile(file).iter_batches(READ_ROWS, columns=["id", "source", field]):
        here = slice(start, start + len(batch))
        start += len(batch)
        table = pa.table(
            {
                "id": batch["id"],
                "source": batch["source"],
                "text": batch[field],
                "file": np.full(len(batch), index, dtype=np.int64),
                "anchor_key": keys.anchors[here],
                "positive_key": keys.positives[here],
            }
        )
        yield table.filter(pa.array(wanted[here]))


def _candidates(stage: Stage, encoding: _Encoding) -> list[Path]:
    """Encode every distinct positive of the training split. Returns the files of the blocks."""
    folder, done = on_disk(stage.scratch) / "candidates", stage.scratch / "candidates.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        wanted = encoding.keys.first_of_each_positive()
        count = int(wanted.sum())

        def write(block: pa.Table) -> dict[str, list[int]]:
            if len(block):
                write_block(block, folder)
            return {"rows": [len(block)]}

        with encoding.board.stage("mine: encode positives", count, "texts", counter="embedded"):
            dataset = encoding.of("positive", "document", wanted)
            dataset.map_batches(write, batch_size=BLOCK_ROWS, batch_format="pyarrow", num_cpus=0.5).materialize()
        written = sum(len(open_block(path)[0].keys) for path in folder.glob("*.arrow"))
        if written != count:  # tasks that Ray has had to repeat may have got other rows together
            raise JobError(f"mine: {written:,} of {count:,} texts were encoded; run the same command again")
        write_atomically(done, json.dumps({"rows": count}).encode())
    return sorted(folder.glob("*.arrow"))


def _choose_all(stage: Stage, encoding: _Encoding, blocks: Sequence[Path]) -> list[Path]:
    """Choose the negatives of every training record. Returns files for `read_part` by record file."""
    folder, done = on_disk(stage.scratch) / "chosen", stage.scratch / "chosen.json"
    if not done.exists():
        import ray

        shutil.rmtree(folder, ignore_errors=True)
        keys, wanted = encoding.keys, encoding.config.mining
        answers, parts = ray.put(Answers.of(keys.anchors, keys.positives)), len(encoding.files)
        board = encoding.board.handle

        def choose_batch(rows: pa.Table) -> dict[str, list[int]]:
            if len(rows):
                texts = negatives_of(rows, blocks, ray.get(answers), wanted, partial(board.add.remote, "mined"))
                table = pa.table({"id": rows["id"], "negatives": texts}).cast(_CHOSEN)
                write_parts(table, rows["file"].to_numpy(), parts, folder / f"{rows['id'][0].as_py()}.parts")
            return {"rows": [len(rows)]}

        count = int(keys.trains.sum())
        with encoding.board.stage("mine: nearest texts", count, "anchors", counter="mined"):
            dataset = encoding.of("anchor", "query", keys.trains)
            dataset.map_batches(choose_batch, batch_size=MINE_ROWS, batch_format="pyarrow", num_cpus=0.5).materialize()
        write_atomically(done, json.dumps({"rows": count}).encode())
    return sorted(folder.glob("*.parts"))


def _write_records(stage: Stage, files: Sequence[Path], chosen: Sequence[Path], board: Board) -> dict[str, Any]:
    """The record files with their negatives. Returns the counts of training records by how many they got."""
    counts = [stage.scratch / "counts" / f"{file.stem}.json" for file in files]
    sizes = [file.stat().st_size for file in files]

    def write(index: int, report: Report) -> None:
        mined = read_part(chosen, index).to_pylist() if chosen else []
        records, by_id = pq.read_table(files[index]), {row["id"]: row["negatives"] for row in mined}
        table = with_negatives(records, by_id)
        write_table(table, stage.folder / "records" / files[index].name)
        found = np.bincount([len(texts) for texts in by_id.values()] or [0], minlength=1)
        write_atomically(counts[index], json.dumps(found.tolist() if by_id else []).encode())
        report({"bytes": sizes[index], "records": len(records)})

    run_tasks(board, "mine: write records", [Task(*of) for of in zip(sizes, counts, strict=True)], write)
    found = [json.loads(path.read_text()) for path in counts]
    return {"records_by_negatives": [sum(column) for column in itertools.zip_longest(*found, fillvalue=0)]}


def with_negatives(records: pa.Table, mined: dict[str, list[str]]) -> pa.Table:
    """Records with their mined negatives, by id, before their own; a record that is not named stays as it is."""
    both = [
        list(dict.fromkeys([*mined[record_id], *(own or [])])) if record_id in mined else own
        for record_id, own in zip(records["id"].to_pylist(), records["negatives"].to_pylist(), strict=True)
    ]
    column = pa.array(both, RECORD_SCHEMA.field("negatives").type)
    return records.set_column(RECORD_SCHEMA.get_field_index("negatives"), "negatives", column)
