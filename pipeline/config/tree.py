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
from pipeline.config.embedding import Embedding
from pipeline.config.evaluation import Evaluation
from pipeline.config.mining import Mining
from pipeline.config.model import Model
from pipeline.config.objective import Objective
from pipeline.config.pinecone import Pinecone
from pipeline.config.reading import ConfigError, explain, kind_of, parse_override, read_yaml
from pipeline.config.section import PathStr, RunName, Section
from pipeline.config.space import check_space
from pipeline.config.training import Checkpointing, Scaling, Training
from pipeline.config.tune import Tune
from pipeline.storage.bucket import SCHEMES, AnyPath, as_path

DEFAULT_ROOT = "~/.cache/text-embedding-pipeline"


class Storage(Section):
    root: PathStr = DEFAULT_ROOT
    """Folder for runs, prepared data and tables, or one in a bucket: s3://bucket/prefix, gs://bucket/prefix, with
    pyarrow's options (?region=…&endpoint_override=…) and credentials from the environment. Default:
    $PIPELINE_STORAGE, else ~/.cache/text-embedding-pipeline."""
    run: RunName = "default"
    """Name of the run: its folder is `<root>/runs/<run>`; training in it again resumes it. A sweep's trials are runs
    below it, such as `default/tune/trials/0003`."""


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
    mining: Mining = Mining()
    tune: Tune = Tune()
    scaling: Scaling = Scaling()
    _deepspeed: tuple[Row, ...] = PrivateAttr(())
    _folder: Path = PrivateAttr(Path())

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
    def secret_files(self) -> list[str]:
        """Where an `api.env` of secrets may be: the folder that the job runs in, and the config file's."""
        return [str(folder.absolute() / "api.env") for folder in (Path(), self._folder)]

    @property
    def root(self) -> AnyPath:
        return as_path(self.storage.root)

    def under_root(self, folder: str) -> AnyPath:
        """A folder relative to `root`, or an absolute one on disk; ConfigError for a URI, which may hold secrets."""
        if "://" in folder:
            raise ConfigError(
                "logging.save_dir: found a URI; allowed is a folder relative to storage.root, which may be in a "
                "bucket, or an absolute one on disk"
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
        _assign(tree, key.split("."), value, f"argument {override!r}")
        from_arguments[key] = override
    if sources is not None:
        _assign(tree, ["data", "sources"], sources, "sources")
    rows = apply_deepspeed(tree, list(from_arguments))
    _apply_environment(tree, from_arguments, environ)
    _check_vectors_uri(tree)
    _take_pretrained_tokenizer(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        where = origin(rows, file, tree["training"]["deepspeed_config"], error.errors()[0]["loc"]) if rows else file
        raise ConfigError(explain(error, where, list(from_arguments), Config)) from None
    config._deepspeed, config._folder = tuple(rows), file.absolute().parent
    swept = any(key == "tune" or key.startswith("tune.space") for key in from_arguments)
    check_space(config, "argument tune.space" if swept else f"{file}: tune.space", changed)
    return config


def changed(config: Config, values: dict[str, Any], where: str) -> Config:
    """The config with other values at dotted keys. Raises ConfigError that says `where` they come from."""
    tree = config.dump()
    for key, value in values.items():
        _assign(tree, key.split("."), value, where)
    try:
        found = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, where, [], Config)) from None
    found._deepspeed, found._folder = config._deepspeed, config._folder
    return found


def _assign(tree: dict[str, Any], parts: list[str], value: Any, where: str) -> None:
    """Set a dotted key; a number picks an item of a list that is there. `where` is said in the error."""
    place: Any = tree
    for depth, part in enumerate(parts):
        key: str | int = part
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            key = int(part)
        elif not isinstance(place, dict):
            holder = ".".join(parts[:depth])
            raise ConfigError(f"{where}: {holder} holds {kind_of(place)}; allowed is a key that is there")
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
        storage["root"] = _bucket("storage.root", storage["root"])
    elif isinstance(storage["root"], str) and storage["root"]:
        storage["root"] = os.path.abspath(os.path.expandvars(os.path.expanduser(storage["root"])))


def _check_vectors_uri(tree: dict[str, Any]) -> None:
    embedding = tree.get("embedding")
    uri = embedding.get("uri") if isinstance(embedding, dict) else None
    if isinstance(embedding, dict) and isinstance(uri, str) and "://" in uri:
        embedding["uri"] = _bucket("embedding.uri", uri)


def _bucket(key: str, uri: str) -> str:
    """A bucket's URI as it is shown and sent about: it must hold no secret, so what may be one is not repeated."""
    scheme, _, rest = uri.partition("://")
    location, _, query = rest.partition("?")
    secret = next((name for name in parse_qs(query) if re.search(r"key|secret|token|password", name)), None)
    if "@" in rest or secret:
        raise ConfigError(
            f"{key}: found credentials in a URI of {scheme}://; allowed are those of the environment alone"
        )
    if scheme not in SCHEMES or not location.strip("/") or location.startswith("/"):
        raise ConfigError(
            f"{key}: found {scheme}://{location}; allowed is a folder on disk, s3://bucket/prefix or gs://bucket/prefix"
        )
    return str(as_path(uri))


def _take_pretrained_tokenizer(tree: dict[str, Any]) -> None:
    """A pretrained model reads with its own tokenizer, unless told otherwise."""
    model, tokenizer = tree.get("model"), tree.setdefault("tokenizer", {})
    if isinstance(model, dict) and isinstance(tokenizer, dict) and model.get("pretrained"):
        tokenizer.setdefault("load_path", model["pretrained"])
