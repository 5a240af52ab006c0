"""Export the run's best model as a folder that sentence-transformers and transformers load without remote code.

examples:
  tep export --to exported
  tep export --to exported --license apache-2.0 --onnx
  tep export --config pairs --to exported --embeddings float16
  tep export --to exported embedding.model=FOLDER
  tep export --config fine_tune model.pretrained=DIR --to exported --merge-share auto
"""

import argparse
from pathlib import Path

from pipeline.config import Config
from pipeline.config.loading import SHIPPED
from pipeline.core.outcome import Result, command
from pipeline.job import parser


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
    """The command that repeats the model card's scores."""
    config = Path(args.config)
    shown = config.stem if config.absolute().parent == SHIPPED else args.config
    return command("evaluate", ["--config", shown, *args.overrides])
