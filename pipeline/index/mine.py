"""Mines hard negatives for the training split of a prepared data set, and writes them as a new data set.

    records ──► hash ──► encode distinct positives ──► encode anchors, rank ──► records with ──► token
                texts    to candidates/, in blocks     blocks, choose           negatives        shards

Candidates and the records that get negatives come from the training split only, so no held-out text is trained on;
records keep their ids, and thus their split. A text that answers an anchor anywhere in the data set is never its
negative. Vectors are stored in blocks that tasks memory-map: no process holds all vectors, or more scores than some
anchors times a block. Cost: N x N x D multiplications for N records, spread over the cluster, and about 60 bytes per
record in the driver. A killed job continues after its last complete stage.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import Artifact, Output, checked, open_parquet
from pipeline.core.console import log
from pipeline.core.files import file_sizes, replacing, sorted_glob
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath, on_disk
from pipeline.core.session import Progress
from pipeline.data.manifest import RECORD_SCHEMA, Manifest, read_prepared, sha256
from pipeline.data.partitions import read_part, write_parts
from pipeline.data.shards import PreparedParts, assemble, token_recipe, token_shards, tokens_of
from pipeline.data.tokenizing import TokenRecipe
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.negatives import Answers, Block, Judged, TextKeys, negatives_of, text_keys

FORMAT = 3  # of the written files; raising it makes earlier mined data sets stale
READ_ROWS = 1024
BLOCK_ROWS = 8192  # candidates per block
SAMPLED = 50
MINE_ROWS = 8192  # anchors per task, which reads all blocks once
CHOSEN = pa.schema([("id", pa.string()), ("negatives", pa.list_(pa.string()))])


def mine(
    config: Config,
    folder: StoragePath,
    manifest: Manifest,
    model: EncoderRecipe,
    progress: Callable[[], Progress],
    guide: EncoderRecipe | None = None,
) -> tuple[StoragePath, Manifest]:
    """Write a copy of the data set in `folder` with mined negatives. Raises ConfigError if it has no pairs.

    Negatives that a record already has are kept, after the mined ones. `guide` is the model of `mining.guide`.
    """
    if not manifest.holds_pairs:
        raise ConfigError(
            f"data.sources: found records with only {', '.join(manifest.text_fields)}; allowed for mining are sources "
            "with anchor and positive"
        )
    if on_disk(config.root) is None:
        raise ConfigError(
            f"storage.root: found {config.root}; allowed for mining, which memory-maps its vectors, is a folder on "
            "disk that all nodes share"
        )
    files, recipe = sorted_glob(folder / "records", "*.parquet"), _recipe(config, manifest)
    tokenizer, stages = checked(folder / "tokenizer.json"), config.root / "stages"
    settings = [config.mining.model_dump(exclude={"guide"}), recipe.validation_fraction, guide and guide.fingerprint]
    mined = Artifact(stages, "mined", [FORMAT, folder.name, manifest.fingerprint, model.fingerprint, settings])
    tokens = tokens_of(stages, mined.key, sha256(tokenizer), recipe)
    target = Artifact(config.root / "prepared", "", ["mined", tokens.key])

    def fill() -> dict[str, Any]:
        mined.make(lambda: _fill(mined, config, files, manifest, (model, guide), progress()))
        records = [mined.folder / "records" / file.name for file in files]
        described = tokens.make(lambda: token_shards(tokens, progress(), records, recipe, tokenizer))
        rejected = {path.name: path for path in sorted_glob(folder / "rejected", "*.parquet")}
        fraction = config.data.validation_fraction
        parts = PreparedParts(records, tokenizer, recipe, manifest.sources, manifest.clusters, fraction, rejected)
        return asdict(assemble(target, tokens, described, parts))

    if target.read():
        log.info("mine: nothing to do, %s is up to date", target.folder)
    target.make(fill)
    made, of_mined = read_prepared(target.folder), mined.read()
    assert made
    assert of_mined
    judged = Judged(**of_mined["judged"])
    if judged.seen:
        log.info(
            "mine: %.1f%% of %s negatives are probably false: the guide places them nearer to the anchor than the "
            "positive; others took their place",
            *(100 * judged.false / judged.seen, f"{judged.seen:,}"),
        )
    log.info("mine: look for false negatives in a sample: %s", mined.folder / "sample.jsonl")
    return target.folder, made


def _recipe(config: Config, manifest: Manifest) -> TokenRecipe:
    """The data set's token recipe, with negatives; their prompt defaults to the positives'."""
    fields = [name for name in manifest.text_fields if name != "negatives"]
    recipe = token_recipe(config, [*fields, "negatives"])
    recipe = replace(recipe, validation_fraction=manifest.held_out_fraction or recipe.validation_fraction)
    for prompts in recipe.prompts.values():
        if "positive" in prompts:
            prompts.setdefault("negatives", prompts["positive"])
    return recipe


def _fill(
    mined: Artifact,
    config: Config,
    files: Sequence[StoragePath],
    manifest: Manifest,
    models: tuple[EncoderRecipe, EncoderRecipe | None],
    progress: Progress,
) -> dict[str, Any]:
    """Write the record files, mined with a model and perhaps a guide. Returns the counts of `_write_records`."""
    scratch = on_disk(mined.scratch)
    assert scratch  # checked in `mine`
    keys = text_keys(mined, files, _recipe(config, manifest).validation_fraction, progress)
    encoding = _Encoding(config, manifest, files, keys, *models, progress)
    mined.once("candidates", lambda: _candidates(scratch / "candidates", encoding))
    blocks = sorted((scratch / "candidates").glob("*.arrow"))
    judged = Judged(**mined.once("chosen", lambda: vars(_choose_all(scratch / "chosen", encoding, blocks))))
    written = _write_records(mined, files, sorted((scratch / "chosen").glob("*.parts")), progress)
    mined.output.write("sample.jsonl", _sample([mined.folder / "records" / file.name for file in files]))
    return {**written, "judged": vars(judged)}


@dataclass(frozen=True)
class _Encoding:
    """Encodes a field of selected records on the cluster."""

    config: Config
    manifest: Manifest
    files: Sequence[StoragePath]
    keys: TextKeys
    model: EncoderRecipe
    guide: EncoderRecipe | None
    progress: Progress

    def of(self, field: str, prompt: str, selected: npt.NDArray[np.bool_]) -> Any:
        """A dataset of `id`, `file`, `anchor_key`, `positive_key`, `text`, `vector` and, with a guide, `guide`.

        `selected` is an (N,) mask.
        """
        import ray

        from pipeline.index.pool import encoded, one_task_per_item

        files, keys, mask = self.files, ray.put(self.keys), ray.put(selected)

        def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
            for index in batch["id"].tolist():
                yield from _read(files[index], index, field, ray.get(keys), ray.get(mask))

        rows = one_task_per_item(len(files)).map_batches(read, batch_size=1, num_cpus=0.5)
        if self.guide:
            guided = encoded(rows, int(selected.sum()), self.guide, Progress(), prompt)
            rows = guided.rename_columns({"vector": "guide"})
        prompts = {source.name: source.prompts[field] for source in self.manifest.sources if field in source.prompts}
        return encoded(rows, int(selected.sum()), self.model, self.progress, prompt, prompts)


def _read(
    file: StoragePath, index: int, field: str, keys: TextKeys, selected: npt.NDArray[np.bool_]
) -> Iterator[pa.Table]:
    start = keys.file_starts[index]
    for batch in open_parquet(file).iter_batches(READ_ROWS, columns=["id", "source", field]):
        rows = slice(start, start + len(batch))
        start += len(batch)
        columns = {"id": batch["id"], "source": batch["source"], "text": batch[field]}
        columns |= {"file": np.full(len(batch), index), "anchor_key": keys.anchors[rows]}
        yield pa.table({**columns, "positive_key": keys.positives[rows]}).filter(pa.array(selected[rows]))


def _candidates(folder: Path, encoding: _Encoding) -> int:
    """Encode every distinct positive of the training split, in blocks. Returns the number of positives."""
    shutil.rmtree(folder, ignore_errors=True)
    selected = encoding.keys.first_of_each_positive()
    count = int(selected.sum())

    def write(block: pa.Table) -> dict[str, list[int]]:
        if len(block):
            Block.write(block, folder)
        return {"rows": [len(block)]}

    from pipeline.index.pool import starting

    with encoding.progress.stage("mine: encode positives", count, "texts", counter="embedded", describe=starting):
        dataset = encoding.of("positive", "document", selected)
        dataset.map_batches(write, batch_size=BLOCK_ROWS, batch_format="pyarrow", num_cpus=0.5).materialize()
    written = sum(len(Block.open(path).keys) for path in folder.glob("*.arrow"))
    if written != count:  # a task that Ray repeated may have received other rows
        raise JobError(f"mine: {written:,} of {count:,} texts were encoded; run the same command again")
    return count


def _choose_all(folder: Path, encoding: _Encoding, blocks: Sequence[Path]) -> Judged:
    """Choose the negatives of every training record; write them partitioned by record file, for `read_part`.

    Returns the guide's counts.
    """
    import ray

    shutil.rmtree(folder, ignore_errors=True)
    keys, settings = encoding.keys, encoding.config.mining
    answers, parts = ray.put(Answers.of(keys.anchors, keys.positives)), len(encoding.files)
    progress = encoding.progress.handle

    def choose_batch(rows: pa.Table) -> dict[str, list[int]]:
        judged = Judged()
        if len(rows):
            report = partial(progress.add.remote, "mined")
            texts = negatives_of(rows, blocks, ray.get(answers), settings, report, judged)
            table = pa.table({"id": rows["id"], "negatives": texts}).cast(CHOSEN)
            with replacing(folder / f"{rows['id'][0].as_py()}.parts") as file:
                write_parts(table, rows["file"].to_numpy(), parts, file)
        return {name: [count] for name, count in vars(judged).items()}

    count = int(keys.trains.sum())
    with encoding.progress.stage("mine: nearest texts", count, "anchors", counter="mined"):
        dataset = encoding.of("anchor", "query", keys.trains)
        counts = dataset.map_batches(choose_batch, batch_size=MINE_ROWS, batch_format="pyarrow", num_cpus=0.5)
        judged = [Judged(**row) for row in counts.iter_rows()]
    return Judged(sum(each.seen for each in judged), sum(each.false for each in judged))


def _sample(files: Sequence[StoragePath]) -> bytes:
    """The first SAMPLED records that have negatives, as JSON Lines, for you to look for false ones."""
    rows = (row for file in files for batch in open_parquet(file).iter_batches(READ_ROWS) for row in batch.to_pylist())
    sampled = itertools.islice((row for row in rows if row["negatives"]), SAMPLED)
    names = ("anchor", "positive", "negatives")
    lines = [json.dumps({name: row[name] for name in names}, ensure_ascii=False) + "\n" for row in sampled]
    return "".join(lines).encode()


def _write_records(
    mined: Artifact, files: Sequence[StoragePath], chosen: Sequence[Path], progress: Progress
) -> dict[str, Any]:
    """Write the record files with their negatives. Returns how many training records got 0, 1, 2, … negatives."""

    def write(index: int, output: Output) -> list[int]:
        rows = read_part(chosen, index).to_pylist() if chosen else []
        records, by_id = open_parquet(files[index]).read(), {row["id"]: row["negatives"] for row in rows}
        output.write_table(f"records/{files[index].name}", with_negatives(records, by_id))
        output.report(records=len(records))
        counts: list[int] = np.bincount([len(texts) for texts in by_id.values()] or [0], minlength=1).tolist()
        return counts if by_id else []

    by_file = mined.tasks(progress, "mine: write records", [size or 0 for size in file_sizes(files)], write)
    return {"records_by_negatives": [sum(column) for column in itertools.zip_longest(*by_file, fillvalue=0)]}


def with_negatives(records: pa.Table, mined: dict[str, list[str]]) -> pa.Table:
    """Put mined negatives, by record id, before the records' existing ones; other records stay unchanged."""
    negatives = [
        list(dict.fromkeys([*mined[record_id], *(existing or [])])) if record_id in mined else existing
        for record_id, existing in zip(records["id"].to_pylist(), records["negatives"].to_pylist(), strict=True)
    ]
    column = pa.array(negatives, RECORD_SCHEMA.field("negatives").type)
    return records.set_column(RECORD_SCHEMA.get_field_index("negatives"), "negatives", column)
