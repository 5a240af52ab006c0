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

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import Artifact, Output, checked, open_parquet
from pipeline.core.console import log
from pipeline.core.files import matching, replacing, sizes
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath, on_disk
from pipeline.core.session import Progress
from pipeline.data.manifest import RECORD_SCHEMA, Manifest, read_prepared, sha256
from pipeline.data.partitions import read_part, write_parts
from pipeline.data.shards import PreparedParts, assemble, token_recipe, token_shards, tokens_of
from pipeline.data.tokenizing import TokenRecipe
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.negatives import Answers, Block, TextKeys, negatives_of, text_keys

FORMAT = 2  # of what is written; a change makes earlier mined data sets stale
READ_ROWS = 1024
BLOCK_ROWS = 8192  # candidates ranked together
MINE_ROWS = 8192  # anchors a task, for which it goes through all blocks once
CHOSEN = pa.schema([("id", pa.string()), ("negatives", pa.list_(pa.string()))])


def mine(
    config: Config, folder: StoragePath, manifest: Manifest, model: EncoderRecipe, progress: Callable[[], Progress]
) -> tuple[StoragePath, Manifest]:
    """The data set in `folder` with mined negatives, in a folder of its own. Raises ConfigError where it has no pairs.

    A record's own negatives, where it has some, stay behind those that are mined.
    """
    if not manifest.holds_pairs:
        raise ConfigError(
            f"data.sources: found records of {', '.join(manifest.text_fields)} alone; allowed for mining are sources "
            "that give anchor and positive"
        )
    if on_disk(config.root) is None:
        raise ConfigError(
            f"storage.root: found {config.root}; allowed for mining, which maps its vectors into memory, is a folder "
            "on disk that all nodes see"
        )
    files, recipe = matching(folder / "records", "*.parquet"), _recipe(config, manifest)
    tokenizer, stages = checked(folder / "tokenizer.json"), config.root / "stages"
    settings = [config.mining.model_dump(), recipe.validation_fraction]
    mined = Artifact(stages, "mined", [FORMAT, folder.name, manifest.fingerprint, model.space, settings])
    tokens = tokens_of(stages, mined.key, sha256(tokenizer), recipe)
    target = Artifact(config.root / "prepared", "", ["mined", tokens.key])

    def fill() -> dict[str, Any]:
        mined.make(lambda: _fill(mined, config, files, manifest, model, progress()))
        records = [mined.folder / "records" / file.name for file in files]
        described = tokens.make(lambda: token_shards(tokens, progress(), records, recipe, tokenizer))
        rejected = {path.name: path for path in matching(folder / "rejected", "*.parquet")}
        parts = PreparedParts(records, tokenizer, recipe, manifest.sources, manifest.clusters, rejected)
        return asdict(assemble(target, tokens, described, parts))

    if target.read():
        log.info("mine: nothing to do, %s is up to date", target.folder)
    target.make(fill)
    made = read_prepared(target.folder)
    assert made
    return target.folder, made


def _recipe(config: Config, manifest: Manifest) -> TokenRecipe:
    """That of the data set, with negatives; one without a prompt of its own for them has the positives' there."""
    fields = [name for name in manifest.text_fields if name != "negatives"]
    recipe = token_recipe(config, [*fields, "negatives"])
    for prompts in recipe.prompts.values():
        if "positive" in prompts:
            prompts.setdefault("negatives", prompts["positive"])
    return recipe


def _fill(
    mined: Artifact,
    config: Config,
    files: Sequence[StoragePath],
    manifest: Manifest,
    model: EncoderRecipe,
    progress: Progress,
) -> dict[str, Any]:
    """Write the record files. Returns how many negatives there are."""
    scratch = on_disk(mined.scratch)
    assert scratch  # `mine` has seen to it
    keys = text_keys(mined, files, config.data.validation_fraction, progress)
    encoding = _Encoding(config, manifest, files, keys, model, progress)
    mined.once("candidates", lambda: _candidates(scratch / "candidates", encoding))
    blocks = sorted((scratch / "candidates").glob("*.arrow"))
    mined.once("chosen", lambda: _choose_all(scratch / "chosen", encoding, blocks))
    return _write_records(mined, files, sorted((scratch / "chosen").glob("*.parts")), progress)


@dataclass(frozen=True)
class _Encoding:
    """What it takes to embed a field of some of the records."""

    config: Config
    manifest: Manifest
    files: Sequence[StoragePath]
    keys: TextKeys
    model: EncoderRecipe
    progress: Progress

    def of(self, field: str, prompt: str, wanted: npt.NDArray[np.bool_]) -> Any:
        """A dataset of `id`, `file`, `anchor_key`, `positive_key`, `text` and `vector` of the records wanted, (N,)."""
        import ray

        from pipeline.index.pool import a_task_each, encoded

        files, keys, shared = self.files, ray.put(self.keys), ray.put(wanted)

        def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
            for index in batch["id"].tolist():
                yield from _read(files[index], index, field, ray.get(keys), ray.get(shared))

        rows = a_task_each(len(files)).map_batches(read, batch_size=1, num_cpus=0.5)
        prompts = {source.name: source.prompts[field] for source in self.manifest.sources if field in source.prompts}
        return encoded(rows, int(wanted.sum()), self.model, self.progress, prompt, prompts)


def _read(
    file: StoragePath, index: int, field: str, keys: TextKeys, wanted: npt.NDArray[np.bool_]
) -> Iterator[pa.Table]:
    start = keys.file_starts[index]
    for batch in open_parquet(file).iter_batches(READ_ROWS, columns=["id", "source", field]):
        here = slice(start, start + len(batch))
        start += len(batch)
        columns = {"id": batch["id"], "source": batch["source"], "text": batch[field]}
        columns |= {"file": np.full(len(batch), index), "anchor_key": keys.anchors[here]}
        yield pa.table({**columns, "positive_key": keys.positives[here]}).filter(pa.array(wanted[here]))


def _candidates(folder: Path, encoding: _Encoding) -> int:
    """Encode every distinct positive of the training split, in blocks. Returns their number."""
    shutil.rmtree(folder, ignore_errors=True)
    wanted = encoding.keys.first_of_each_positive()
    count = int(wanted.sum())

    def write(block: pa.Table) -> dict[str, list[int]]:
        if len(block):
            Block.write(block, folder)
        return {"rows": [len(block)]}

    with encoding.progress.stage("mine: encode positives", count, "texts", counter="embedded"):
        dataset = encoding.of("positive", "document", wanted)
        dataset.map_batches(write, batch_size=BLOCK_ROWS, batch_format="pyarrow", num_cpus=0.5).materialize()
    written = sum(len(Block.open(path).keys) for path in folder.glob("*.arrow"))
    if written != count:  # tasks that Ray has had to repeat may have got other rows together
        raise JobError(f"mine: {written:,} of {count:,} texts were encoded; run the same command again")
    return count


def _choose_all(folder: Path, encoding: _Encoding, blocks: Sequence[Path]) -> int:
    """Choose the negatives of every training record, as files for `read_part` by record file. Returns their number."""
    import ray

    shutil.rmtree(folder, ignore_errors=True)
    keys, wanted = encoding.keys, encoding.config.mining
    answers, parts = ray.put(Answers.of(keys.anchors, keys.positives)), len(encoding.files)
    progress = encoding.progress.handle

    def choose_batch(rows: pa.Table) -> dict[str, list[int]]:
        if len(rows):
            texts = negatives_of(rows, blocks, ray.get(answers), wanted, partial(progress.add.remote, "mined"))
            table = pa.table({"id": rows["id"], "negatives": texts}).cast(CHOSEN)
            with replacing(folder / f"{rows['id'][0].as_py()}.parts") as file:
                write_parts(table, rows["file"].to_numpy(), parts, file)
        return {"rows": [len(rows)]}

    count = int(keys.trains.sum())
    with encoding.progress.stage("mine: nearest texts", count, "anchors", counter="mined"):
        dataset = encoding.of("anchor", "query", keys.trains)
        dataset.map_batches(choose_batch, batch_size=MINE_ROWS, batch_format="pyarrow", num_cpus=0.5).materialize()
    return count


def _write_records(
    mined: Artifact, files: Sequence[StoragePath], chosen: Sequence[Path], progress: Progress
) -> dict[str, Any]:
    """The record files with their negatives. Returns the counts of training records by how many they got."""

    def write(index: int, output: Output) -> list[int]:
        rows = read_part(chosen, index).to_pylist() if chosen else []
        records, by_id = open_parquet(files[index]).read(), {row["id"]: row["negatives"] for row in rows}
        output.write_table(f"records/{files[index].name}", with_negatives(records, by_id))
        output.report(records=len(records))
        found: list[int] = np.bincount([len(texts) for texts in by_id.values()] or [0], minlength=1).tolist()
        return found if by_id else []

    found = mined.tasks(progress, "mine: write records", [size or 0 for size in sizes(files)], write)
    return {"records_by_negatives": [sum(column) for column in itertools.zip_longest(*found, fillvalue=0)]}


def with_negatives(records: pa.Table, mined: dict[str, list[str]]) -> pa.Table:
    """Records with their mined negatives, by id, before their own; a record that is not named stays as it is."""
    both = [
        list(dict.fromkeys([*mined[record_id], *(own or [])])) if record_id in mined else own
        for record_id, own in zip(records["id"].to_pylist(), records["negatives"].to_pylist(), strict=True)
    ]
    column = pa.array(both, RECORD_SCHEMA.field("negatives").type)
    return records.set_column(RECORD_SCHEMA.get_field_index("negatives"), "negatives", column)
