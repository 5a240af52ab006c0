"""Streams data sets from the Hugging Face hub, or from a local folder. Only their cards are stored on disk.

    found = find_dataset(source)            # HubDataset(path='qiaojin/PubMedQA', revision='9001f285…', shards=1, …)
    for row in dataset_rows(source, found.path, found.revision, ['question'], start=0, stop=1): ...

A branch is resolved to a commit once, so all workers read the same data. A shard is a file of the data set. A row's
position is its split, shard and row number; it does not depend on the number of workers. Private data needs HF_TOKEN.
Cost: about ten small requests per process to open a data set.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import yaml

from pipeline.config import ConfigError, Source
from pipeline.core.object_store import cause
from pipeline.core.outcome import JobError
from pipeline.data.batches import BATCH_ROWS, column_indices, rows_of_batch
from pipeline.data.fields import UNPACKS_TOO_MUCH, UNREADABLE_FILE, Row, broken
from pipeline.data.input_files import FREE_BYTES, UnpackingError, as_text, list_files, unpacked, without_compression
from pipeline.data.read_arrow import ARROW_SUFFIXES, arrow_rows
from pipeline.data.read_json import JSON_SUFFIXES, json_rows
from pipeline.data.read_tables import CSV_SUFFIXES, PARQUET_SUFFIXES, csv_rows, parquet_rows

LOOKUP_TIMEOUT_S = 30.0
_SUFFIXES = {
    "arrow": ARROW_SUFFIXES,
    "csv": CSV_SUFFIXES,
    "json": JSON_SUFFIXES,
    "parquet": (*PARQUET_SUFFIXES, ".geoparquet", ".gpq"),
}


@dataclass(frozen=True)
class HubDataset:
    """A data set's name or folder, its commit ("" for a folder), its shards, and the identity of its content."""

    path: str
    revision: str
    shards: list[str]
    """Name of each: the path of its file, or its split and number if a shard is not a file."""
    inputs: list[tuple[str, int, int]]
    sizes: dict[str, int]
    """Bytes of each of its files."""


def find_dataset(source: Source) -> HubDataset:
    """Resolve the data set's current commit and files. Raises ConfigError if it does not exist or is unreachable."""
    _opened.cache_clear()
    path, commit = source.path or "", ""
    try:
        if os.path.isdir(path):
            path, files = list_files(source, suffixes=("",))
            inputs = [(file.name, file.size, file.mtime_ns) for file in files]
            sizes = {file.name: file.size for file in files}
        elif path.startswith(("/", ".")):
            raise FileNotFoundError(2, "no such folder")
        else:
            commit, sizes = _commit(source)
            inputs = [(f"{path}@{commit}:{source.config or ''}:{source.split}", sum(sizes.values()), 0)]
        _, data, files_of_split = _dataset(source, path, commit)
        shards = _shard_names(source.split, data, files_of_split)
    except hub_errors() as error:
        raise ConfigError(_refusal(source, error)) from None
    return HubDataset(path, commit, shards, inputs, sizes)


def dataset_rows(
    source: Source, path: str, revision: str, columns: Sequence[str], start: int, stop: int
) -> Iterator[Row]:
    """Rows of the shards `start` to `stop`. Raises JobError if the hub is unreachable."""
    try:
        builder, data, files = _dataset(source, path, revision)
    except hub_errors() as error:
        raise JobError(f"source {source.name}: cannot fetch {path}: {cause(error)}; run the job again") from None
    names = _shard_names(source.split, data, files)
    for shard in range(start, stop):
        try:
            if len(files) == data.num_shards and _is_ours(builder.config, names[shard]):
                url, position = str(builder.config.data_files[source.split][shard]), f"{source.split}:{shard}"
                with fsspec.open(url) as raw:
                    yield from _file_rows(raw, builder.config, names[shard], position, columns)
                continue
            rows = data.shard(num_shards=data.num_shards, index=shard)
            yield from _shard_rows(rows, f"{source.split}:{shard}", columns)
        except hub_errors() as error:
            if _is_network(error):
                raise JobError(f"source {source.name}: cannot fetch shard {shard}: {cause(error)}; retry") from None
            yield broken(names[shard], UNREADABLE_FILE, cause(error))
        except UnpackingError as error:
            yield broken(names[shard], UNPACKS_TOO_MUCH, str(error))


def _kind(config: Any) -> str:
    """`json` for a JsonConfig."""
    return type(config).__name__.removesuffix("Config").lower()


def _is_ours(config: Any, name: str) -> bool:
    """Whether our readers read a file, because `datasets` has no limits for what a file unpacks to.

    False for other formats, for archives, and for options in a card that our readers do not have.
    """
    from datasets import BuilderConfig

    kind = _kind(config)
    common = {each.name for each in fields(BuilderConfig)} | {"features", "sep", "delimiter"}
    options = {each.name: each.default for each in fields(config) if each.name not in common}
    has_defaults = kind == "parquet" or all(getattr(config, option) == value for option, value in options.items())
    is_file = without_compression(name).lower().endswith(_SUFFIXES.get(kind, ()))
    return is_file and has_defaults and (kind != "csv" or len(config.sep) == 1)


def _file_rows(raw: Any, config: Any, name: str, position: str, columns: Sequence[str]) -> Iterator[Row]:
    match _kind(config):
        case "parquet":
            return parquet_rows(raw, position, columns)
        case "arrow":
            return arrow_rows(unpacked(raw, name, FREE_BYTES), position, columns)
        case "csv":
            return csv_rows(as_text(unpacked(raw, name)), name, config.sep)
        case _:
            return json_rows(as_text(unpacked(raw, name)), name)


def _shard_rows(shard: Any, name: str, columns: Sequence[str]) -> Iterator[Row]:
    first = 0
    for table in shard.with_format("arrow").iter(BATCH_ROWS):
        names = table.column_names
        for batch in table.select(column_indices(columns, names)).to_batches():
            yield from rows_of_batch(batch, name, first, names)
            first += batch.num_rows


def _commit(source: Source) -> tuple[str, dict[str, int]]:
    """The commit that a source's revision points to, and the sizes of its configuration's files."""
    from huggingface_hub import HfApi

    api = HfApi()
    info = api.dataset_info(str(source.path), revision=source.revision, files_metadata=True, timeout=LOOKUP_TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return str(info.sha), {name: size for name, size in sizes.items() if source.config in name.split("/")} or sizes


def _dataset(source: Source, path: str, revision: str) -> tuple[Any, Any, list[str]]:
    return _opened(path, source.config, source.split, revision, source.follow_symlinks)


@lru_cache(maxsize=8)
def _opened(
    path: str, config: str | None, split: str, revision: str, follow_symlinks: bool
) -> tuple[Any, Any, list[str]]:
    """The builder, the streamed data set and the files of its split. Cached: opening takes ten small requests.

    Raises ValueError if its card names files outside the data set.
    """
    import datasets

    if not revision:
        _check_card(path)
    datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(path, config, revision=revision or None)
    data_files = builder.config.data_files or {}
    files = [str(file) for one_split in data_files.values() for file in one_split]
    if revision:
        outside = [file for file in files if not file.startswith(f"hf://datasets/{path}@")]
    else:
        real = os.path.normpath if follow_symlinks else os.path.realpath
        outside = [file for file in files if not Path(real(file)).is_relative_to(real(path))]
    if outside:
        raise ValueError(f"the file {outside[0]} of its data_files outside the data set")
    base = f"{builder.base_path}/"
    of_split = [str(file).removeprefix(base) for file in data_files.get(split, [])]
    return builder, builder.as_streaming_dataset(split), of_split


def _shard_names(split: str, data: Any, files: list[str]) -> list[str]:
    return files if len(files) == data.num_shards else [f"{split}:{shard}" for shard in range(data.num_shards)]


def _check_card(folder: str) -> None:
    """Raise ValueError if the card of a local data set names a URI, which `datasets` would open to list its files."""
    from huggingface_hub import metadata_load

    card, standalone = Path(folder) / "README.md", Path(folder) / ".huggingface.yaml"
    contents = [metadata_load(card) if card.is_file() else None]
    contents += [yaml.safe_load(standalone.read_text("utf-8")) if standalone.is_file() else None]
    configs = [content.get("configs") for content in contents if isinstance(content, dict)]
    if uri := next((text for text in _strings(configs) if "://" in text), None):
        raise ValueError(f"{uri} in its card, but a folder's data_files are names of files in it")


def _strings(content: Any) -> Iterator[str]:
    """All strings in a YAML document."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from _strings(each)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's libraries raise for a missing, broken or unreachable data set."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    damaged = (OSError, ValueError, RuntimeError, EOFError, zlib.error, MemoryError, pa.ArrowException)
    return (*damaged, yaml.YAMLError, DatasetsError, HTTPError)


def _is_network(error: Exception) -> bool:
    from huggingface_hub.errors import HTTPError

    return isinstance(error, ConnectionError | TimeoutError | HTTPError)


def _refusal(source: Source, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    allowed = "a hub data set, or a folder that holds one, with its `config`, `split` and `revision`"
    if isinstance(error, GatedRepoError):
        found, allowed = "a gated data set", "your HF_TOKEN in the environment, after you accepted its terms"
    elif isinstance(error, RepositoryNotFoundError):
        found = "no such data set on the hub, or a private one without HF_TOKEN in the environment"
    elif isinstance(error, RevisionNotFoundError):
        found, allowed = f"no revision {source.revision}", "an existing commit, tag or branch, preferably a commit"
    elif "scripts are no longer supported" in str(error):
        found = "a data set defined by a Python script, which datasets 5 does not run"
        allowed = "one made of data files; try `revision: refs/convert/parquet`, the hub's own Parquet copy"
    elif _is_network(error):
        found, allowed = f"the hub unreachable ({cause(error)})", "the path of a local folder, or check the network"
    else:
        found = cause(error).partition(" Example of usage")[0].rstrip(".")
    return f"data.sources {source.name}: {source.path}: found {found}; give {allowed}"
