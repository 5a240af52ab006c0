"""Write the run's best model as a folder that sentence-transformers and transformers load, without code of ours.

examples:
  python jobs/export.py --to exported
  python jobs/export.py --to exported --license apache-2.0 --onnx
  python jobs/export.py --config configs/pairs.yaml --to exported --embeddings float16
  python jobs/export.py --to exported embedding.model=FOLDER
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import Config, ConfigError
from pipeline.runtime.console import log
from pipeline.runtime.job import JobError, Result, parser, run_job
from pipeline.storage.object_store import holds_credentials
from pipeline.storage.path import StoragePath, absolute, as_path

MARKER, VERSION = "export.json", 1


def arguments() -> argparse.ArgumentParser:
    own = parser("export", __doc__ or "", prepares=False)
    own.add_argument("--to", required=True, metavar="DIR", help="a folder that is new, empty or an earlier export")
    own.add_argument("--license", metavar="ID", help="for the model card, in the hub's terms: mit, apache-2.0, …")
    own.add_argument("--onnx", action="store_true", help="write model.onnx too: token ids and mask in, vectors out")
    own.add_argument("--embeddings", choices=("float32", "float16"), help="write the run's vectors too, as a matrix")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    license_id, folder = checked_license(args.license), destination(args.to)
    from pipeline.export.card import Extras, model_card, read_origin
    from pipeline.export.destination import exporting, refuse_foreign
    from pipeline.export.onnx import check_packages
    from pipeline.model.reading import model_fingerprint, read_card
    from pipeline.stages import consolidated_model
    from pipeline.storage.files import fetched

    refuse_foreign(folder, MARKER)
    if args.onnx:
        check_packages("--onnx")
    place = consolidated_model(config)
    model = fetched(place)
    with exporting(folder, MARKER, {"version": VERSION, "model": model_fingerprint(model)}) as temporary:
        metrics = write_model(config, args, model, temporary)
        text = model_card(
            read_card(model),
            read_origin(place, config.run_dir / "evaluation.json"),
            name=folder.name,
            license_id=license_id,
            evaluate_command=evaluate_command(args),
            extras=Extras(args.onnx, metrics.get("embeddings", 0)),
        )
        (temporary / "README.md").write_text(text, encoding="utf-8")
    log.info("export: %s", folder)
    return Result(metrics, {"export": str(folder), "model": str(place)})


def write_model(config: Config, args: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """The model, and what else was asked for. Returns how near each came to the model, and the rows written."""
    from pipeline.export.folder import export_model, quiet_transformers
    from pipeline.export.onnx import export_onnx
    from pipeline.model.reading import read_card

    quiet_transformers()
    card = read_card(model)
    metrics: dict[str, Any] = {"width": card.width, "cosine": round(export_model(model, folder), 6)}
    log.info("export: vectors as transformers gives them are at cosine %.6f or nearer", metrics["cosine"])
    if args.onnx:
        cosine = export_onnx(folder, pooling=card.head.pooling, normalize=card.head.normalize)
        metrics["onnx_cosine"] = round(cosine, 6)
    if args.embeddings:
        metrics["embeddings"] = write_embeddings(config, args.embeddings, model, folder / "embeddings")
    return metrics


def write_embeddings(config: Config, dtype: Any, model: Path, folder: Path) -> int:
    """The vectors of the run's table, which must hold all of its data. Returns their number."""
    from pipeline.embedding.store import recipe_of, table_of
    from pipeline.export.embedding_matrix import save_embeddings_for_model
    from pipeline.model.reading import model_fingerprint

    vectors = table_of(config, recipe_of(config, model))
    if not vectors.exists() or not vectors.is_verified(vectors.open()):
        raise JobError(f"the vectors of the model in {model} are not all there; python jobs/embed.py makes them")
    try:
        return save_embeddings_for_model(folder, vectors.scan, model=model_fingerprint(model), dtype=dtype)
    except ValueError as error:
        raise JobError(f"--embeddings: {error}") from None


def destination(to: str) -> StoragePath:
    try:
        if holds_credentials(to):
            raise ValueError("credentials in a URI")
        return absolute(as_path(os.path.expanduser(to)))
    except ValueError as error:
        raise ConfigError(f"--to: found {error}; allowed is a folder on disk, or s3://, gs:// or az://") from None


def checked_license(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise ConfigError(f"--license: found {name!r}; allowed are the hub's identifiers, such as mit or apache-2.0")
    return name


def evaluate_command(args: argparse.Namespace) -> str:
    """What gives the card's scores again, from the project's folder."""
    config = Path(args.config).resolve()
    shown = config.relative_to(ROOT) if config.is_relative_to(ROOT) else args.config
    return shlex.join(["python", "jobs/evaluate.py", "--config", str(shown), *args.overrides])


if __name__ == "__main__":
    sys.exit(run_job("export", __doc__ or "", main, arguments()))
