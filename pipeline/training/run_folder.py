"""A run's folder: records the config and data of a run, and refuses to resume it with others.

<root>/runs/<run>/config.resolved.yaml    the full config; --config accepts it
<root>/runs/<run>/tokenizer.json          the tokenizer of the data and the model
<root>/runs/<run>/run.json                the data (see data/drift.py), git SHA, versions
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Container, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline.config import Config, ConfigError
from pipeline.core.files import link_or_copy, write_atomically, xxh3_of
from pipeline.core.path import StoragePath
from pipeline.data.drift import TrainedOn, has_moved
from pipeline.data.manifest import Manifest
from pipeline.training.checkpoints import TrainState
from pipeline.training.stopping import is_finished

FIXED_SECTIONS = ("model", "objective", "training")
FREE_KEYS = (
    "training.max_time_s",
    "training.log_every_steps",
    "training.max_skipped_steps",
    "training.best_metric",
    "training.early_stopping.patience",
    "training.early_stopping.min_delta",
)
"""Keys of the fixed sections that do not affect the weights at a given step."""


def claim_run_folder(config: Config, prepared: StoragePath, manifest: Manifest, steps: int) -> None:
    """Write the files above. Raises ConfigError if the folder holds another run."""
    refuse_other_run(config, manifest)
    folder = config.run_dir
    link_or_copy(prepared / "tokenizer.json", folder / "tokenizer.json")
    described = {
        **vars(TrainedOn.of(config, prepared, manifest, steps)),
        "git_sha": _git_sha(),
        "versions": {name: version(name) for name in ("torch", "ray", "tokenizers")},
        "python": platform.python_version(),
        "fixed": fixed_keys(config),
    }
    write_atomically(folder / "run.json", json.dumps(described, indent=2).encode())
    write_atomically(folder / "config.resolved.yaml", yaml.safe_dump(config.dump(), sort_keys=False).encode())


def refuse_other_run(config: Config, manifest: Manifest) -> None:
    """Raise ConfigError if something other than `checkpointing.accept_changes` changed since the run was started."""
    then = TrainedOn.read(config)
    if then is None:
        return
    differing = _other_keys(config, config.checkpointing.accept_changes)
    if has_moved(config, manifest):
        differing.append(_other_data(then.changed_settings(config)))
    if differing:
        _refuse(config, differing)


def refuse_unfinished(config: Config, manifest: Manifest, state: TrainState, model: StoragePath | None = None) -> None:
    """Raise ConfigError unless a run whose data have changed can still be used.

    It can if it is finished and its config and tokenizer are the same. A job that only uses its `model` accepts
    another config.
    """
    then = TrainedOn.read(config)
    assert then
    differing = [] if model else _other_keys(config)
    settings = then.changed_settings(config)
    if manifest.files["tokenizer.json"]["xxh3"] != xxh3_of(config.run_dir / "tokenizer.json"):
        settings = settings or ["tokenizer.load_path (another tokenizer under the same name)"]
    if differing or settings:
        _refuse(config, [*differing, _other_data(settings)])
    if not is_finished(config, then.steps, state):
        embed = f"; to use its model as it is, embedding.model={model}" if model else ""
        raise ConfigError(
            f"{config.run_dir} holds a run that is at step {state.step:,} of {then.steps:,}, and its data have changed "
            "since it began; use another run with storage.run=NAME, restore the earlier data, or continue with the new "
            f"data with checkpointing.accept_changes=[data]{embed}"
        )


def _other_data(settings: list[str]) -> str:
    return f"data (the prepared data{' under other settings: ' if settings else ''}{', '.join(settings)})"


def _refuse(config: Config, differing: list[str]) -> NoReturn:
    raise ConfigError(
        f"{config.run_dir} holds a run that differs in {', '.join(differing)}; "
        "use another run with storage.run=NAME, delete that folder, or accept the changes with "
        f"checkpointing.accept_changes=[{', '.join(key.partition(' ')[0] for key in differing)}]"
    )


def _other_keys(config: Config, accepted: Container[str] = ()) -> list[str]:
    """The fixed keys that differ, with both values."""
    then = json.loads((config.run_dir / "run.json").read_text())["fixed"]
    return [
        f"{key} (then {then.get(key)!r}, now {value!r})"
        for key, value in fixed_keys(config).items()
        if then.get(key) != value and key not in accepted
    ]


def fixed_keys(config: Config) -> dict[str, Any]:
    """The keys and values of the config that must not change while a run or a sweep is resumed."""
    flat = config.flat().items()
    return {key: value for key, value in flat if key.partition(".")[0] in FIXED_SECTIONS and key not in FREE_KEYS}


def begun_with(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    """The values of fixed keys with which the run began; empty before that."""
    path = config.run_dir / "run.json"
    if not path.is_file():
        return {}
    then = json.loads(path.read_text())["fixed"]
    return {key: then[key] for key in keys}


def _git_sha() -> str | None:
    """The commit of this checkout; None outside a checkout, as in a submitted job."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
