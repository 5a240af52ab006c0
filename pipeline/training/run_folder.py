"""A run's folder: what it was started with, and the refusal to go on with something else.

<root>/runs/<run>/config.resolved.yaml    the whole tree; --config takes it back
<root>/runs/<run>/run.json                data fingerprint, git SHA, versions
"""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config, ConfigError
from pipeline.storage.files import write_atomically

FIXED_SECTIONS = ("model", "objective", "training")
FREE_KEYS = (
    "training.max_time_s",
    "training.log_every_steps",
    "training.max_skipped_steps",
    "training.best_metric",
    "training.early_stopping.patience",
    "training.early_stopping.min_delta",
)
"""Keys of the fixed sections that change nothing about the weights at a given step."""


def claim_run_folder(config: Config, data_fingerprint: str) -> None:
    """Write what a run is started with. Raises ConfigError where its folder holds another one."""
    refuse_other_run(config, data_fingerprint)
    folder = config.run_dir
    described = {
        "data_fingerprint": data_fingerprint,
        "git_sha": _git_sha(),
        "versions": {name: version(name) for name in ("torch", "ray", "tokenizers")},
        "python": platform.python_version(),
        "fixed": fixed_keys(config),
    }
    write_atomically(folder / "run.json", json.dumps(described, indent=2).encode())
    write_atomically(folder / "config.resolved.yaml", yaml.safe_dump(config.dump(), sort_keys=False).encode())


def refuse_other_run(config: Config, data_fingerprint: str, *, data_alone: bool = False) -> None:
    """Raise ConfigError naming what differs from what the run's folder was started with, if it was.

    What `checkpointing.accept_changes` names may differ.
    """
    path = config.run_dir / "run.json"
    if not path.is_file():
        return
    then, accepted = json.loads(path.read_text()), config.checkpointing.accept_changes
    differing = [
        f"{key} (then {then['fixed'].get(key)!r}, now {value!r})"
        for key, value in ({} if data_alone else fixed_keys(config)).items()
        if then["fixed"].get(key) != value and key not in accepted
    ]
    if then["data_fingerprint"] != data_fingerprint and "data" not in accepted:
        differing.append("data (the prepared data)")
    if differing:
        raise ConfigError(
            f"{config.run_dir} holds a run that differs in {', '.join(differing)}; "
            "name another run with storage.run=NAME, delete that folder, or go on with what is now there by "
            f"checkpointing.accept_changes=[{', '.join(key.partition(' ')[0] for key in differing)}]"
        )


def fixed_keys(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section in FIXED_SECTIONS:
        _flatten(config.dump()[section], section, flat)
    return {key: value for key, value in flat.items() if key not in FREE_KEYS}


def _flatten(tree: dict[str, Any], prefix: str, into: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}.{key}", into)
        else:
            into[f"{prefix}.{key}"] = value


def _git_sha() -> str | None:
    """The commit of this checkout; None where it is none, as in a submitted job."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
