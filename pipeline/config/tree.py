"""The one config tree: every key, its unit, its default and where the default comes from.

Precedence: defaults < YAML file < the DeepSpeed file it names < environment (`PIPELINE_STORAGE`) < `section.key=value`
arguments.

    >>> config = load("configs/quickstart.yaml", ["training.learning_rate=3e-4"])
    >>> config.get("training.learning_rate")
    0.0003

Whatever is wrong with it is a `ConfigError` of one sentence that names the file, the key, what was found and what is
allowed. Nothing here imports Ray or torch, so that a wrong key costs a second and not a cluster.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator

from pipeline.config.data import Data, Tokenizer
from pipeline.config.deepspeed import Row, apply_deepspeed, origin
from pipeline.config.model import Model
from pipeline.config.objective import Objective
from pipeline.config.reading import ConfigError, explain, kind_of, parse_override, read_yaml
from pipeline.config.section import Name, PathStr, Section
from pipeline.config.training import Checkpointing, Scaling, Training
from pipeline.storage.bucket import SCHEMES, AnyPath, as_path

DEFAULT_ROOT = "~/.cache/text-embedding-pipeline"


class Storage(Section):
    root: PathStr = DEFAULT_ROOT
    """Folder for runs, prepared data and tables, or one in a bucket: s3://bucket/prefix, gs://bucket/prefix, with
    pyarrow's options (?region=…&endpoint_override=…) and credentials from the environment. Default:
    $PIPELINE_STORAGE, else ~/.cache/text-embedding-pipeline."""
    run: Name = "default"
    """Name of the run: its folder is `<root>/runs/<run>`; training in it again resumes it."""


class Logging(Section):
    save_dir: PathStr | None = None
    """Folder of training.log; relative to storage.root, or an absolute one on disk. Default: the run's folder."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe messages written, to the console and to the file."""
    format: str = Field("%(asctime)s %(levelname)-7s %(message)s", min_length=1)
    """Of lines in training.log, in the style of Python's logging."""
    trackers: list[Literal["tensorboard", "wandb", "ray"]] = []
    """Where training's metrics go beside the console and metrics.jsonl: TensorBoard's event files and Weights & Biases
    (offline without WANDB_API_KEY) in the run's folder, and Ray's metrics endpoint."""
    wandb_project: str = Field("text-embedding-pipeline", min_length=1)
    """Project of Weights & Biases; the run goes by `storage.run`."""
    loss_spike_deviations: float = Field(6.0, gt=0)
    """A loss so many standard deviations above the mean of the last 100 logged ones raises an alert. Ours."""
    memory_alert_fraction: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory beyond which an alert is raised."""

    @field_validator("format")
    @classmethod
    def _formats(cls, value: str) -> str:
        try:
            logging.Formatter(value).format(logging.makeLogRecord({"msg": "a line"}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"a format of Python's logging such as '%(asctime)s %(message)s' ({error})") from None
        return value


class Embedding(Section):
    model: PathStr | None = None
    """A checkpoint folder, or one of transformers or sentence-transformers; by default the run's best."""
    field: Literal["auto", "anchor", "positive", "text"] = "auto"
    """Field of the record that is embedded: `positive`, else `text`."""
    store: Literal["lancedb"] = "lancedb"
    """Where vectors are written."""
    uri: PathStr = "lancedb"
    """LanceDB's folder; relative to storage.root, or an absolute one on disk."""
    dimensions: int | None = Field(None, ge=1)
    """Cut vectors to this size, one of the model's `matryoshka_dims`; by default its width."""
    batch_tokens: int = Field(8_192, ge=16)
    """Tokens encoded in one forward pass."""
    max_workers: int | None = Field(None, ge=1)
    """Encoding actors at most; by default as many as the cluster has CPUs (GPUs, where there are some)."""


class Pinecone(Section):
    """Takes no keys yet: `embedding.store` knows LanceDB alone so far."""


class Evaluation(Section):
    beir_dir: PathStr | None = None
    """A BEIR folder to score as well: corpus.jsonl, queries.jsonl, qrels/test.tsv."""
    sts_file: PathStr | None = None
    """A TSV of score, sentence1, sentence2 under a header: Spearman's correlation, also at each validation."""
    held_out_queries: int = Field(1000, ge=0)
    """Anchors of the validation split that are looked up; 0 for none."""
    held_out_documents: int = Field(10_000, ge=1)
    """Documents they are looked up among: their own, and others first by hash."""


class Tune(Section):
    """Takes no keys yet: sweeps are still to come."""


class Config(Section):
    storage: Storage = Storage()
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    objective: Objective = Objective()
    training: Training = Training()
    checkpointing: Checkpointing = Checkpointing()
    logging: Logging = Logging()
    embedding: Embedding = Embedding()
    pinecone: Pinecone = Pinecone()
    evaluation: Evaluation = Evaluation()
    tune: Tune = Tune()
    scaling: Scaling = Scaling()
    _deepspeed: tuple[Row, ...] = PrivateAttr(())

    def get(self, dotted: str) -> Any:
        """The value at a dotted path: `get("training.learning_rate")`; KeyError names a path that is not there."""
        value: Any = self
        for part in dotted.split("."):
            if not (isinstance(value, BaseModel) and part in type(value).model_fields):
                raise KeyError(f"no config key {dotted}")
            value = getattr(value, part)
        return value

    @property
    def deepspeed(self) -> tuple[Row, ...]:
        """What became of each key of `training.deepspeed_config`, for a table under `deepspeed.HEADER`."""
        return self._deepspeed

    @property
    def root(self) -> AnyPath:
        return as_path(self.storage.root)

    def under_root(self, folder: str) -> AnyPath:
        """A folder relative to `root`, or an absolute one on disk; ConfigError for a URI, which may hold secrets."""
        if "://" in folder:
            raise ConfigError(
                "embedding.uri, logging.save_dir: found a URI; allowed is a folder relative to storage.root, which may "
                "be in a bucket, or an absolute one on disk"
            )
        return Path(folder) if os.path.isabs(folder) else self.root / folder

    @property
    def run_dir(self) -> AnyPath:
        return self.root / "runs" / self.storage.run

    @property
    def log_dir(self) -> AnyPath:
        return self.under_root(self.logging.save_dir) if self.logging.save_dir else self.run_dir

    def dump(self) -> dict[str, Any]:
        """The resolved tree as plain values. No key of it is a secret.

        The settings of a DeepSpeed file stand in it as our own, so it goes without the file, which would take the place
        of what arguments had changed.
        """
        tree: dict[str, Any] = self.model_dump(mode="json")
        tree["training"]["deepspeed_config"] = None
        return tree


def load(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    sources: list[dict[str, Any]] | None = None,
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and validate. Raises ConfigError.

    `sources` take the place of `data.sources`.
    """
    environ = dict(os.environ) if environ is None else environ
    file = Path(path)
    tree = read_yaml(file)
    from_arguments = {}
    for override in overrides:
        key, value = parse_override(override)
        _assign(tree, key.split("."), value, override)
        from_arguments[key] = override
    if sources is not None:
        _assign(tree, ["data", "sources"], sources, "sources")
    rows = apply_deepspeed(tree, list(from_arguments))
    _apply_environment(tree, from_arguments, environ)
    _take_pretrained_tokenizer(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        where = origin(rows, file, tree["training"]["deepspeed_config"], error.errors()[0]["loc"]) if rows else file
        raise ConfigError(explain(error, where, list(from_arguments), Config)) from None
    config._deepspeed = tuple(rows)
    return config


def _assign(tree: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    """Set a dotted key; a number picks an item of a list that is there."""
    place: Any = tree
    for depth, part in enumerate(parts):
        key: str | int = part
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            key = int(part)
        elif not isinstance(place, dict):
            holder = ".".join(parts[:depth])
            raise ConfigError(f"argument {override!r}: {holder} holds {kind_of(place)}; allowed is a key that is there")
        if depth == len(parts) - 1:
            place[key] = value
        else:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]


def _apply_environment(tree: dict[str, Any], from_arguments: dict[str, str], environ: dict[str, str]) -> None:
    """PIPELINE_STORAGE beats the file and yields to an argument; without either, a folder under ~/.cache."""
    if "storage" in tree and not isinstance(tree["storage"], dict):
        return  # validation names it
    storage = tree.setdefault("storage", {})
    if "storage.root" not in from_arguments and environ.get("PIPELINE_STORAGE"):
        storage["root"] = environ["PIPELINE_STORAGE"]
    storage.setdefault("root", DEFAULT_ROOT)
    if isinstance(storage["root"], str) and "://" in storage["root"]:
        storage["root"] = _bucket(storage["root"])
    elif isinstance(storage["root"], str) and storage["root"]:
        storage["root"] = os.path.abspath(os.path.expandvars(os.path.expanduser(storage["root"])))


def _bucket(uri: str) -> str:
    """A bucket's URI as it is shown and sent about: it must hold no secret, so what may be one is not repeated."""
    scheme, _, rest = uri.partition("://")
    location, _, query = rest.partition("?")
    secret = next((name for name in parse_qs(query) if re.search(r"key|secret|token|password", name)), None)
    if "@" in rest or secret:
        raise ConfigError(
            f"storage.root: found credentials in a URI of {scheme}://; allowed are those of the environment alone"
        )
    if scheme not in SCHEMES or not location.strip("/") or location.startswith("/"):
        raise ConfigError(
            f"storage.root: found {scheme}://{location}; allowed is a folder on disk, s3://bucket/prefix or "
            "gs://bucket/prefix"
        )
    return str(as_path(uri))


def _take_pretrained_tokenizer(tree: dict[str, Any]) -> None:
    """A pretrained model reads with its own tokenizer, unless told otherwise."""
    model, tokenizer = tree.get("model"), tree.setdefault("tokenizer", {})
    if isinstance(model, dict) and isinstance(tokenizer, dict) and model.get("pretrained"):
        tokenizer.setdefault("load_path", model["pretrained"])
