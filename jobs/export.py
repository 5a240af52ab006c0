"""Export the run's best model as a folder that sentence-transformers and transformers load without remote code.

examples:
  python jobs/export.py --to exported
  python jobs/export.py --to exported --license apache-2.0 --onnx
  python jobs/export.py --config configs/pairs.yaml --to exported --embeddings float16
  python jobs/export.py --to exported embedding.model=FOLDER
  python jobs/export.py --config configs/fine_tune.yaml model.pretrained=DIR --to exported --merge-share auto
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
    merge = "merge with model.pretrained, so that less of it is forgotten: the trained model's share, 0 to 1, or auto"
    own.add_argument("--merge-share", type=share, metavar="SHARE", help=f"{merge}: the best on the validation split")
    return own


def share(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed are 0 to 1, and auto")
    return found


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.api import export

    return export(
        config,
        args.to,
        license_id=args.license,
        onnx=args.onnx,
        embeddings=args.embeddings,
        merge_share=args.merge_share,
        evaluate_command=evaluate_command(args),
    )


def evaluate_command(args: argparse.Namespace) -> str:
    """The command that repeats the model card's scores, from the project's folder."""
    config = Path(args.config).resolve()
    shown = config.relative_to(ROOT) if config.is_relative_to(ROOT) else args.config
    return shlex.join(["python", "jobs/evaluate.py", "--config", str(shown), *args.overrides])


if __name__ == "__main__":
    sys.exit(run_job("export", __doc__ or "", main, arguments()))
