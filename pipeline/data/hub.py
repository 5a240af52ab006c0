"""Data sets of the Hugging Face hub, streamed: only their cards are kept on disk. Works with a local folder too.

    found = find_dataset(source)            # HubDataset(path='qiaojin/PubMedQA', revision='9001f285…', shards=1, …)
    for row in dataset_rows(source, found.path, found.revision, ['question'], start=0, stop=1): ...

A branch is resolved to its commit once, so that all workers read the same data. A shard is a file of the data set. A
row's position is split, shard and row, whatever the number of workers. Private data needs HF_TOKEN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError, Source
from pipeline.core.object_store import cause
from pipeline.core.outcome import JobError
from pipeline.data.fields import Row, broken
from pipeline.data.input_files import list_files
from pipeline.data.read_tables import BATCH_ROWS, batch_rows, wanted_columns

LOOKUP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class HubDataset:
    """A data set's name or folder, commit ("" for a folder), number of shards, and what identifies its content."""

    path: str
    revision: str
    shards: int
    inputs: list[tuple[str, int, int]]
    sizes: dict[str, int]
    """Bytes of each of its files."""


def find_dataset(source: Source) -> HubDataset:
    """The data set as it is now. Raises ConfigError if it does not exist or cannot be reached."""
    _dataset.cache_clear()
    path, commit = source.path or "", ""
    try:
        if os.path.isdir(path):
            path, files = list_files(source.name, path, suffixes=("",))
            inputs = [(file.name, file.size, file.mtime_ns) for file in files]
            sizes = {file.name: file.size for file in files}
        elif path.startswith(("/", ".")):
            raise FileNotFoundError(2, "there is no such folder")
        else:
            commit, sizes = _commit(source)
            inputs = [(f"{path}@{commit}:{source.config or ''}:{source.split}", sum(sizes.values()), 0)]
        shards = _dataset(path, source.config, source.split, commit).num_shards
    except _errors() as error:
        raise ConfigError(_refusal(source, error)) from None
    return HubDataset(path, commit, shards, inputs, sizes)


def dataset_rows(
    source: Source, path: str, revision: str, columns: Sequence[str], start: int, stop: int
) -> Iterator[Row]:
    """Rows of the shards `start` to `stop`. Raises JobError if the hub cannot be reached."""
    try:
        data = _dataset(path, source.config, source.split, revision)
    except _errors() as error:
        raise JobError(f"source {source.name}: {path} could not be fetched: {cause(error)}") from None
    for shard in range(start, stop):
        name = f"{source.split}:{shard}"
        try:
            yield from _shard_rows(data.shard(num_shards=data.num_shards, index=shard), name, columns)
        except _errors() as error:
            if _is_network(error):
                raise JobError(f"source {source.name}: shard {shard} could not be fetched: {cause(error)}") from None
            yield broken(name, "unreadable_file", cause(error))


def _shard_rows(shard: Any, name: str, columns: Sequence[str]) -> Iterator[Row]:
    first = 0
    for table in shard.with_format("arrow").iter(BATCH_ROWS):
        names = table.column_names
        for batch in table.select(wanted_columns(columns, names)).to_batches():
            yield from batch_rows(batch, name, first, names)
            first += batch.num_rows


def _commit(source: Source) -> tuple[str, dict[str, int]]:
    """The commit that a source's revision points to, and the sizes of its configuration's files."""
    from huggingface_hub import HfApi

    api = HfApi()
    info = api.dataset_info(str(source.path), revision=source.revision, files_metadata=True, timeout=LOOKUP_TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return str(info.sha), {name: size for name, size in sizes.items() if source.config in name.split("/")} or sizes


@lru_cache(maxsize=8)
def _dataset(path: str, config: str | None, split: str, revision: str) -> Any:
    """The streamed data set. Cached, because it takes ten small requests."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(path, config, split=split, revision=revision or None, streaming=True)


def _errors() -> tuple[type[Exception], ...]:
    """What the hub's libraries raise for data sets that are missing, broken or out of reach."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    return (OSError, ValueError, RuntimeError, DatasetsError, HTTPError, pa.ArrowException)


def _is_network(error: Exception) -> bool:
    from huggingface_hub.errors import HTTPError

    return isinstance(error, ConnectionError | TimeoutError | HTTPError)


def _refusal(source: Source, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    allowed = "a data set of the hub, or a folder of one, with its `config`, `split` and `revision`"
    if isinstance(error, GatedRepoError):
        found, allowed = "a gated data set", "one whose terms you accepted, with your HF_TOKEN in the environment"
    elif isinstance(error, RepositoryNotFoundError):
        found = "no data set of that name on the hub, or a private one and no HF_TOKEN in the environment"
    elif isinstance(error, RevisionNotFoundError):
        found, allowed = f"no revision {source.revision}", "a commit, tag or branch of the data set, best a full commit"
    elif "scripts are no longer supported" in str(error):
        found = "a data set that is a Python script, which datasets 5 does not run"
        allowed = "one of data files; `revision: refs/convert/parquet` is the hub's own copy of many as Parquet"
    elif _is_network(error):
        found, allowed = f"no way to the hub ({cause(error)})", "a machine that reaches it, or the path of a folder"
    else:
        found = cause(error).partition(" Example of usage")[0].rstrip(".")
    return f"data.sources {source.name}: {source.path}: found {found}; allowed is {allowed}"
