"""The config tree: every key, its unit, its default and where the default comes from.

Nothing in this folder imports Ray or torch, so a wrong key is reported within a second.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator

from pipeline.config.data import Data, Tokenizer
from pipeline.config.embedding import Embedding, Pinecone
from pipeline.config.evaluation import Evaluation, Mining
from pipeline.config.model import Model
from pipeline.config.objective import Objective
from pipeline.config.reading import assign, explain
from pipeline.config.section import PathStr, RunName, Section
from pipeline.config.training import Checkpointing, Scaling, Training
from pipeline.config.tune import Tune
from pipeline.core.outcome import ConfigError, flatten
from pipeline.core.path import StoragePath, as_path, below

DEFAULT_ROOT = "~/.cache/text-embedding-pipeline"
EVALUATION_PATHS = ("beir_dir", "sts_file", "clustering_file", "classification_dir")


class Storage(Section):
    root: PathStr = DEFAULT_ROOT
    """Folder for runs, prepared data and tables, on disk or in a bucket: s3://bucket/prefix, gs://bucket/prefix or
    az://container/prefix, with options such as ?region=…&endpoint_override=… and credentials from the environment.
    Default: $PIPELINE_STORAGE, else ~/.cache/text-embedding-pipeline."""
    run: RunName = "default"
    """Name of the run. Its folder is `<root>/runs/<run>`; training again with the same name resumes it. A sweep's
    trials are runs inside it, such as `default/tune/trials/0003`."""


class Logging(Section):
    save_dir: PathStr | None = None
    """Folder of training.log: relative to storage.root, or absolute on disk. Default: the run's folder."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level of the messages written to the console and to training.log."""
    format: str = Field("%(asctime)s %(levelname)-7s %(message)s", min_length=1)
    """Format of the lines in training.log, in the style of Python's logging."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "ray"]] = []
    """Where training metrics go besides the console and metrics.jsonl: TensorBoard's event files and Weights & Biases
    (offline without WANDB_API_KEY) in the run's folder, MLflow at MLFLOW_TRACKING_URI (by default mlflow.db in
    storage.root), and Ray's metrics endpoint."""
    project: str = Field("text-embedding-pipeline", min_length=1)
    """Project of Weights & Biases, and experiment and registered model of MLflow; the run's name is `storage.run`."""
    loss_spike_deviations: float = Field(6.0, gt=0)
    """Alert if a loss is this many standard deviations above the mean of the last 100 logged losses. Ours."""
    memory_alert_fraction: float = Field(0.85, gt=0, le=1)
    """Alert if a larger share of a GPU's memory is used."""

    @field_validator("format")
    @classmethod
    def _formats(cls, value: str) -> str:
        try:
            logging.Formatter(value).format(logging.makeLogRecord({"msg": "a line"}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"a format of Python's logging such as '%(asctime)s %(message)s' ({error})") from None
        return value


class Config(Section):
    """The whole config. Read a key as `config.training.learning_rate` or `config.get("training.learning_rate")`."""

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
    _folder: Path = PrivateAttr(Path())

    def get(self, dotted: str) -> Any:
        """The value at a dotted path: `get("training.learning_rate")`. Raises KeyError for an unknown path."""
        value: Any = self
        for part in dotted.split("."):
            if not (isinstance(value, BaseModel) and part in type(value).model_fields):
                raise KeyError(f"no config key {dotted}")
            value = getattr(value, part)
        return value

    @property
    def secret_files(self) -> list[str]:
        """Possible locations of `api.env`: the working directory, and the config file's folder."""
        return [str(folder.absolute() / "api.env") for folder in (Path(), self._folder)]

    @property
    def root(self) -> StoragePath:
        return as_path(self.storage.root)

    def under_root(self, folder: str) -> StoragePath:
        """Resolve a folder: relative to `root`, absolute on disk, or a URI."""
        return below(self.root, folder)

    @property
    def run_dir(self) -> StoragePath:
        return self.root / "runs" / self.storage.run

    @property
    def log_dir(self) -> StoragePath:
        return self.under_root(self.logging.save_dir) if self.logging.save_dir else self.run_dir

    def dump(self) -> dict[str, Any]:
        """The resolved tree as plain values, without secrets."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """The resolved tree as dotted keys and their values."""
        return flatten(self.dump())

    def changed(self, values: dict[str, Any], where: str) -> Config:
        """A copy with other values at dotted keys. Raises ConfigError; `where` names the origin of the values."""
        tree = self.dump()
        for key, value in values.items():
            assign(tree, key.split("."), value, where)
        try:
            config = Config.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(explain(error, where, Config)) from None
        check_dropout(config, f"{where}: objective.contrastive.views")
        config._folder = self._folder
        return config


def check_dropout(config: Config, where: str) -> None:
    """Raise ConfigError if two views of a text would be equal because our own encoder has no dropout.

    `where` names the origin of the key of the views.
    """
    contrastive, model = config.objective.contrastive, config.model
    if contrastive is None or contrastive.views != "dropout" or model.pretrained:
        return
    better = {
        "model.dropout": 0.1 if not model.dropout else None,
        "model.num_layers": 1 if not model.dimensions()["num_layers"] else None,
        "training.table_warmup_fraction": 0 if config.training.table_warmup_fraction else None,
    }
    for key, value in better.items():
        if value is not None:
            raise ConfigError(
                f"{where}: found dropout with {key}={config.get(key):g}, under which both views of a text are equal; "
                f"allowed are {key}={value} and objective.contrastive.views=crops"
            )
