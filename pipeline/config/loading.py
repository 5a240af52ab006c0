"""Load a config from a YAML file, the environment and arguments.

Precedence: defaults < YAML file < environment (`PIPELINE_STORAGE`) < `section.key=value` arguments.

    >>> config = load("configs/quickstart.yaml", ["training.learning_rate=3e-4"])
    >>> config.get("training.learning_rate")
    0.0003

Every error is a `ConfigError` of one sentence that names the file, the key, what was found and what is allowed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.reading import assign, explain, parse_override, read_yaml
from pipeline.config.space import check_space
from pipeline.config.tree import DEFAULT_ROOT, EVALUATION_PATHS, Config, check_dropout
from pipeline.core.object_store import OPTIONS, holds_credentials
from pipeline.core.outcome import ConfigError
from pipeline.core.path import absolute, as_path, without_options

_PACKAGE = Path(__file__).parents[1]
SHIPPED = next(each for each in (_PACKAGE / "shipped", _PACKAGE.parent / "configs") if each.is_dir())
"""The folder of the configs that come with the package: in an installed one, and in the repository."""


def load(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    local_data_dir: Path | None = None,
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and validate. Raises ConfigError.

    `path` may be the name of a shipped config, with or without .yaml, if there is no such file. `local_data_dir` is a
    folder to read instead of the path of `data.sources`.
    """
    environ = dict(os.environ) if environ is None else environ
    file = _config_file(Path(path))
    tree = read_yaml(file)
    from_arguments, changed = set[str](), dict[str, str]()
    for override in overrides:
        key, value = parse_override(override, Config)
        changed[_new_part(tree, key)] = key
        assign(tree, key.split("."), value, f"argument {override!r}")
        from_arguments.add(key)
    if local_data_dir is not None:
        _read_from(local_data_dir, tree)
    _apply_environment(tree, from_arguments, environ)
    _refuse_credentials(tree)
    _default_to_pretrained_tokenizer(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, file, Config, changed)) from None
    _check_uris(config)
    key = "objective.contrastive.views"
    check_dropout(config, f"argument {key}" if key in from_arguments else f"{file}: {key}")
    config._folder = file.absolute().parent
    swept = any(key == "tune" or key.startswith("tune.space") for key in from_arguments)
    check_space(config, "argument tune.space" if swept else f"{file}: tune.space")
    return config


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def _config_file(path: Path) -> Path:
    """The file itself, or the shipped config of that name. Raises ConfigError if there is neither."""
    if os.path.lexists(path):
        return path
    shipped, name = shipped_configs(), path.name.removesuffix(".yaml").removesuffix(".yml")
    if path.parent == Path() and name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, 1)
    meant = f"did you mean --config {near[0]}? The" if near else "the"
    raise ConfigError(
        f"--config: found no file {path}, and no shipped config of that name; {meant} shipped configs are "
        f"{', '.join(shipped)}"
    )


def _new_part(tree: Any, key: str) -> str:
    """The shortest part of a dotted key that the tree lacks, else the key."""
    parts = key.split(".")
    for depth, part in enumerate(parts, 1):
        if not isinstance(tree, dict) or part not in tree:
            return ".".join(parts[:depth])
        tree = tree[part]
    return key


def _read_from(folder: Path, tree: dict[str, Any]) -> None:
    """Make the source read a folder. A source that reads no text files becomes one that does: title → the rest."""
    data = tree.setdefault("data", {})
    if not isinstance(data, dict):
        return  # validation reports it
    sources = data.get("sources")
    texts = [each for each in sources or () if isinstance(each, dict) and each.get("type") == "text"]
    if len(texts) > 1:
        names = ", ".join(str(each.get("name")) for each in texts)
        raise ConfigError(
            f"--local-data-dir: found {len(texts)} text sources, {names}; allowed is one; set the path of each with "
            "data.sources.0.path=DIR"
        )
    source = texts[0] if texts else {"name": "local", "type": "text"}
    data["sources"] = [{**source, "path": str(folder.resolve())}]


def _apply_environment(tree: dict[str, Any], from_arguments: set[str], environ: dict[str, str]) -> None:
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
