"""Weights & Biases: a run of `logging.wandb_project`, offline without WANDB_API_KEY, its files in the run's folder.

    wandb sync <root>/runs/<run>/wandb/offline-run-*        # sends what was kept offline, resumed parts in their order

Steps that workers take again are drawn twice, with the same values: what was logged cannot be taken back.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.storage.files import write_atomically
from pipeline.training.tracking.tracker import Metrics, Tracker, grouped

INIT_TIMEOUT_S = 30  # until a server that does not answer is given up, and the tracker with it


class WeightsAndBiases(Tracker):
    """One run over all starts of the driver."""

    name = "wandb"

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=config.logging.wandb_project,
            name=config.storage.run,
            id=run_id(folder),
            resume="allow",
            dir=folder,
            mode=_mode(dict(os.environ)),
            config=config.dump(),
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
        )
        # NOTE: its own step may not go back, and training's does when workers restart, so that is a metric of its own.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics) -> None:
        self.run.log({"step": int(metrics["step"]), **grouped(metrics)})

    def alert(self, row: dict[str, Any]) -> None:
        self.run.alert(title=row["title"], text=row["text"], level="WARN")

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def run_id(run_dir: Path) -> str:
    """What Weights & Biases knows the run by. It lies in the run's folder, moves with it, and is gone with it."""
    path = run_dir / "wandb" / "run_id"
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex.encode())
    return path.read_text().strip()


def _mode(environ: dict[str, str]) -> Any:
    """Without a key it would ask for one."""
    return environ.get("WANDB_MODE", "online") if environ.get("WANDB_API_KEY") else "offline"
