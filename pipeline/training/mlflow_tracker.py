"""MLflow: a run's parameters and metrics, and its model in MLflow's registry once it is promoted.

    tracker = MLflow(config, folder)                        # logging.trackers=[mlflow]
    tracker.log({"step": 10, "loss": 2.3})
    register(config, folder, model, "production")           # models:/<logging.project>@production

Runs go to MLFLOW_TRACKING_URI, by default to `<storage.root>/mlflow.db`: mlflow ui --backend-store-uri
sqlite:////path/mlflow.db. The experiment and the registered model are called `logging.project`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.core.files import write_atomically
from pipeline.core.path import StoragePath, on_disk, public_uri
from pipeline.training.history import Metrics, Tracker, grouped

RUN_ID = "mlflow/run_id"
PARAMS_AT_ONCE = 100  # MLflow's limit of a request
VALUE_CHARS = 6_000  # MLflow's limit of a parameter's value


class MLflow(Tracker):
    """One MLflow run, which each start of the driver resumes."""

    name = "mlflow"

    def __init__(self, config: Config, folder: Path) -> None:
        self.client = _client(config)
        self.run_id = _resumed(self.client, folder) or _started(self.client, config, folder)

    def log(self, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now_ms, step = int(time.time() * 1000), int(metrics["step"])
        values = {re.sub(r"[^\w./ -]+", "_at_", name): float(value) for name, value in grouped(metrics).items()}
        self.client.log_batch(self.run_id, [Metric(name, value, now_ms, step) for name, value in values.items()])

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def register(config: Config, run_dir: StoragePath, model: StoragePath, alias: str) -> str:
    """Register a model folder as a new version with this alias. Returns its URI, such as models:/project@production."""
    from mlflow.exceptions import MlflowException

    client, name = _client(config), config.logging.project
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    run_id = (run_dir / RUN_ID).read_text().strip() if (run_dir / RUN_ID).is_file() else None
    version = client.create_model_version(name, public_uri(model), run_id)
    client.set_registered_model_alias(name, alias, version.version)
    return f"models:/{name}@{alias}"


def _client(config: Config) -> Any:
    """A client of MLFLOW_TRACKING_URI, or of a database below storage.root. Raises ImportError or ValueError."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ImportError(f"{error}; to install it: pip install 'text-embedding-pipeline[mlflow]'") from None
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        root = on_disk(config.root)
        if root is None:
            raise ValueError(f"{config.root} is in a bucket, where it can keep no database; set MLFLOW_TRACKING_URI")
        root.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{root.absolute()}/mlflow.db"
    return MlflowClient(uri, uri)


def _resumed(client: Any, folder: Path) -> str | None:
    """The run that an earlier start of the driver began, if MLflow still has it."""
    from mlflow.exceptions import MlflowException

    if not (folder / RUN_ID).is_file():
        return None
    run_id = (folder / RUN_ID).read_text().strip()
    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException:
        return None
    return run_id


def _started(client: Any, config: Config, folder: Path) -> str:
    """Begin a run, with the config as its parameters."""
    from mlflow.entities import Param

    name = config.logging.project
    experiment = client.get_experiment_by_name(name)
    home = on_disk(config.root)
    artifacts = None if home is None or os.environ.get("MLFLOW_TRACKING_URI") else (home / "mlflow").absolute().as_uri()
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, artifacts)
    run_id = str(client.create_run(experiment_id, run_name=config.storage.run).info.run_id)
    flat = [Param(key, _text(value)[:VALUE_CHARS]) for key, value in config.flat().items()]
    for start in range(0, len(flat), PARAMS_AT_ONCE):
        client.log_batch(run_id, params=flat[start : start + PARAMS_AT_ONCE])
    write_atomically(folder / RUN_ID, run_id.encode())
    return run_id


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
