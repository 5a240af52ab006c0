"""Exports a model to a folder of your choice: model files, a model card, an ONNX graph, vectors as a matrix.

    write_export(config, model, Path("exported"), license_id="mit", onnx=True, embeddings="float16")

An export overwrites only files of earlier exports: `export.json` lists every file with its size and hash, and a later
export replaces the folder only if it holds no other files. In a bucket, files are uploaded one by one and the list
last; until then the list is marked as unfinished, so a killed export can be repeated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import entries_of
from pipeline.core.console import log
from pipeline.core.files import files_below, local_copy, replacing_folder
from pipeline.core.object_store import holds_credentials
from pipeline.core.outcome import JobError, Result, command
from pipeline.core.path import StoragePath, absolute, as_path

MARKER, VERSION = "export.json", 1

Dtype = Literal["float32", "float16"]


def write_export(
    config: Config,
    model: StoragePath,
    folder: StoragePath,
    *,
    license_id: str | None = None,
    onnx: bool = False,
    embeddings: Dtype | None = None,
    evaluate_command: str = "tep evaluate",
) -> Result:
    """Write a model, with a model card, to a folder that sentence-transformers and transformers load.

    `license_id` is the hub's identifier. `onnx` adds model.onnx; `embeddings` adds the run's vectors as a matrix of
    this type. `evaluate_command` is the command on the card that reproduces its scores. Raises ConfigError for invalid
    options or a folder with other files, JobError if vectors are missing.
    """
    from pipeline.evaluation.model_card import model_card, read_origin
    from pipeline.model.folder import load_model, model_fingerprint, read_model_spec
    from pipeline.model.hf_export import export_model
    from pipeline.model.onnx import check_packages, export_onnx

    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id):
        raise ConfigError(
            f"--license: found {license_id!r}; allowed are identifiers of the hub, such as mit or apache-2.0"
        )
    refuse_foreign(folder, MARKER)
    if onnx:
        check_packages("--onnx")
    local = local_copy(model)
    spec = read_model_spec(local)
    with exporting(folder, MARKER, {"version": VERSION, "model": model_fingerprint(local)}) as temporary:
        metrics: dict[str, Any] = {"width": spec.width, "cosine": round(export_model(local, temporary), 6)}
        log.info("export: transformers reproduces the model's vectors with cosine %.6f or more", metrics["cosine"])
        if onnx:
            metrics["onnx_cosine"] = round(export_onnx(temporary, load_model(local)[0]), 6)
        if embeddings:
            metrics["embeddings"] = _write_embeddings(config, embeddings, local, temporary / "embeddings")
        origin, rows = read_origin(model, config.run_dir), metrics.get("embeddings", 0)
        text = model_card(spec, origin, folder.name, license_id, evaluate_command, onnx=onnx, embeddings=rows)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    log.info("export: %s", folder)
    return Result(metrics, {"export": str(folder), "model": str(model)})


def destination(to: str) -> StoragePath:
    """The folder that `--to` names. Raises ConfigError for an invalid URI, or one with credentials."""
    try:
        if holds_credentials(to):
            raise ValueError("credentials in a URI")
        return absolute(as_path(os.path.expanduser(to)))
    except ValueError as error:
        raise ConfigError(f"--to: found {error}; allowed is a folder on disk, or s3://, gs:// or az://") from None


def refuse_foreign(folder: StoragePath, manifest: str) -> None:
    """Raise ConfigError if `folder` has a file that its manifest does not list."""
    if folder.is_symlink() or folder.is_file():
        raise ConfigError(f"{folder} is not a folder; choose one that is new, empty or an earlier export")
    foreign = sorted(files_below(folder).keys() - _listed(folder / manifest))
    if foreign:
        raise ConfigError(
            f"{folder} holds {foreign[0]}, which no export wrote; choose one that is new, empty or an earlier export"
        )


@contextmanager
def exporting(folder: StoragePath, manifest: str, content: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to fill; then write the manifest, with `content`, and replace `folder` with it.

    Raises ConfigError as `refuse_foreign` does.
    """
    refuse_foreign(folder, manifest)

    def claim(names: list[str]) -> bytes:
        return json.dumps({**content, "unfinished": True, "files": {name: {} for name in names}}).encode()

    with replacing_folder(folder, manifest, claim) as temporary:
        yield temporary
        text = json.dumps({**content, "files": entries_of(temporary)}, indent=2) + "\n"
        (temporary / manifest).write_text(text, encoding="utf-8")
        refuse_foreign(folder, manifest)  # again, because the work may have taken hours


def _listed(manifest: StoragePath) -> set[str]:
    try:
        return {manifest.name, *json.loads(manifest.read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_embeddings(config: Config, dtype: Dtype, model: Path, folder: Path) -> int:
    """Write the vectors of the run's table, which must be verified. Returns their number."""
    from pipeline.evaluation.embedding_matrix import save_embeddings_for_model
    from pipeline.index.published import encoder_recipe, table_of
    from pipeline.model.folder import model_fingerprint

    table = table_of(config, encoder_recipe(config, model))
    if not table.exists() or not table.is_verified(table.open()):
        raise JobError(f"the model in {model} has no complete set of vectors; run {command('embed')} first")
    try:
        return save_embeddings_for_model(folder, table.scan, model=model_fingerprint(model), dtype=dtype)
    except ValueError as error:
        raise JobError(f"--embeddings: {error}") from None
