"""Export the run's best model as a folder that sentence-transformers and transformers load without remote code.

examples:
  python jobs/export.py --to exported
  python jobs/export.py --to exported --license apache-2.0 --onnx
  python jobs/export.py --config configs/pairs.yaml --to exported --embeddings float16
  python jobs/export.py --to exported embedding.model=FOLDER
"""

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import parser, run_job


def arguments() -> argparse.ArgumentParser:
    own = parser("export", __doc__ or "", prepares=False)
    own.add_argument("--to", required=True, metavar="DIR", help="a folder that is new, empty or an earlier export")
    own.add_argument("--license", metavar="ID", help="for the model card, in the hub's terms: mit, apache-2.0, …")
    own.add_argument("--onnx", action="store_true", help="write model.onnx too: token ids and mask in, vectors out")
    own.add_argument("--embeddings", choices=("float32", "float16"), help="write the run's vectors too, as a matrix")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.api import export

    return export(
        config,
        args.to,
        license_id=args.license,
        onnx=args.onnx,
        embeddings=args.embeddings,
        evaluate_command=evaluate_command(args),
    )


def evaluate_command(args: argparse.Namespace) -> str:
    """The command that repeats the model card's scores, from the project's folder."""
    config = Path(args.config).resolve()
    shown = config.relative_to(ROOT) if config.is_relative_to(ROOT) else args.config
    return shlex.join(["python", "jobs/evaluate.py", "--config", str(shown), *args.overrides])


if __name__ == "__main__":
    sys.exit(run_job("export", __doc__ or "", main, arguments()))
