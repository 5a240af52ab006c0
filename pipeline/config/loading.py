"""From a YAML file, the environment and arguments to a config.

Precedence: defaults < YAML file < the DeepSpeed file it names < environment (`PIPELINE_STORAGE`) < `section.key=value`
arguments.

    >>> config = load("configs/quickstart.yaml", ["training.learning_rate=3e-4"])
    >>> config.get("training.learning_rate")
    0.0003

Whatever is wrong with it is a `ConfigError` of one sentence that names the file, the key, what was found and what is
allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from pydantic import ValidationError

from pipeline.config.deepspeed import apply_deepspeed, origin
from pipeline.config.reading import ConfigError, assign, explain, parse_override, read_yaml
from pipeline.config.space import check_space
from pipeline.config.tree import DEFAULT_ROOT, Config
from pipeline.storage.bucket import SCHEMES, as_path


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
        assign(tree, key.split("."), value, f"argument {override!r}")
        from_arguments[key] = override
    if sources is not None:
        assign(tree, ["data", "sources"], sources, "sources")
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
    check_space(config, "argument tune.space" if swept else f"{file}: tune.space")
    return config


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
