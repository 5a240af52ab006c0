"""Load a config from a YAML file, the environment and arguments.

Precedence: defaults < YAML file < environment (`PIPELINE_STORAGE`) < `section.key=value` arguments.

    >>> config = load("configs/quickstart.yaml", ["training.learning_rate=3e-4"])
    >>> config.get("training.learning_rate")
    0.0003

Every error is a `ConfigError` of one sentence that names the file, the key, what was found and what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.reading import assign, explain, parse_override, read_yaml
from pipeline.config.space import check_space
from pipeline.config.tree import DEFAULT_ROOT, EVALUATION_PATHS, Config
from pipeline.core.object_store import OPTIONS, holds_credentials
from pipeline.core.outcome import ConfigError
from pipeline.core.path import absolute, as_path, without_options


def load(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    sources: list[dict[str, Any]] | None = None,
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and validate. Raises ConfigError.

    `sources` replaces `data.sources`.
    """
    environ = dict(os.environ) if environ is None else environ
    file = Path(path)
    tree = read_yaml(file)
    from_arguments = {}
    for override in overrides:
        key, value = parse_override(override)
        assign(tree, key.split("."), value, f"argument {override!r}")
        from_arguments[key] = override
    if sources is not None:
        assign(tree, ["data", "sources"], sources, "sources")
    _apply_environment(tree, from_arguments, environ)
    _refuse_credentials(tree)
    _default_to_pretrained_tokenizer(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, file, list(from_arguments), Config)) from None
    _check_uris(config)
    config._folder = file.absolute().parent
    swept = any(key == "tune" or key.startswith("tune.space") for key in from_arguments)
    check_space(config, "argument tune.space" if swept else f"{file}: tune.space")
    return config


def _apply_environment(tree: dict[str, Any], from_arguments: dict[str, str], environ: dict[str, str]) -> None:
    """Set `storage.root` from an argument, else PIPELINE_STORAGE, else the file, else the default."""
    if "storage" in tree and not isinstance(tree["storage"], dict):
        return  # validation reports it
    storage = tree.setdefault("storage", {})
    if "storage.root" not in from_arguments and environ.get("PIPELINE_STORAGE"):
        storage["root"] = environ["PIPELINE_STORAGE"]
    storage.setdefault("root", DEFAULT_ROOT)
    if isinstance(storage["root"], str) and storage["root"]:
        with suppress(ValueError):  # `_check_uris` reports it
            storage["root"] = str(absolute(as_path(os.path.expandvars(os.path.expanduser(storage["root"])))))


def _refuse_credentials(value: Any, key: str = "") -> None:
    """Raise ConfigError if any URI holds credentials. The message does not repeat them."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_credentials(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _refuse_credentials(inner, f"{key}[{place}]")
    elif isinstance(value, str) and holds_credentials(value):
        raise ConfigError(
            f"{key}: found credentials in a URI of {value.partition('://')[0]}://; allowed are credentials from the "
            "environment only"
        )


def _check_uris(config: Config) -> None:
    """Raise ConfigError for a URI without a bucket, or with credentials after variables are expanded."""
    _refuse_credentials(config.dump())
    keys = [f"evaluation.{name}" for name in EVALUATION_PATHS]
    keys += ["storage.root", "embedding.uri", "logging.save_dir", "embedding.model", "tokenizer.load_path"]
    for key in keys:
        text = config.get(key)
        try:
            as_path(text or "")
        except ValueError as error:
            raise ConfigError(
                f"{key}: found {error} in {without_options(str(text))}; allowed is a path on disk, s3://bucket/prefix, "
                f"gs://bucket/prefix or az://container/prefix, with the options {', '.join(OPTIONS)}"
            ) from None


def _default_to_pretrained_tokenizer(tree: dict[str, Any]) -> None:
    model, tokenizer = tree.get("model"), tree.setdefault("tokenizer", {})
    if isinstance(model, dict) and isinstance(tokenizer, dict) and model.get("pretrained"):
        tokenizer.setdefault("load_path", model["pretrained"])
