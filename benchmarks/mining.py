"""One round of mined hard negatives: further training with them, beside the same further training without.

examples:
  python benchmarks/mining.py --data data                       # data/debian/train.jsonl, scored on data/debian/beir
  python benchmarks/mining.py --data data --epochs 8 --further 4 --negatives 2
  python benchmarks/mining.py --data data -- mining.range_min=5 mining.relative_margin=0.9

A model is trained for some epochs and mines negatives for its own training pairs. Then two copies of its run go on for
some more epochs, one on the pairs as they were, one on them with negatives; all else is the same, seeds and steps too.
Scored are the weights that each ends with, BM25 and the fusion of both beside.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpora import machine
from pipeline.core.console import table
from pipeline.training.checkpoints import newest_valid

METRICS = ("ndcg@10", "mrr@10", "recall@10")


def run(job: str, storage: Path, name: str, args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """One job on the run of a name. Returns its last line."""
    source = {"name": "pairs", "type": "json", "path": str(args.data / "debian" / "train.jsonl")}
    source |= {"max_samples": args.pairs} if args.pairs else {}
    settings = [
        f"data.sources=[{json.dumps(source)}]",
        f"storage.root={storage}",
        f"storage.run={name}",
        f"objective.contrastive.hard_negatives={args.negatives}",
        f"training.seed={args.seed}",
        *args.overrides,
        *more,
    ]
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--config", str(ROOT / "configs" / "pairs.yaml")]
    done = subprocess.run([*command, *settings], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def scores(storage: Path, name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By system, of the weights that a run ended with."""
    model = newest_valid(storage / "runs" / name).folder
    beir = f"evaluation.beir_dir={args.data / 'debian' / 'beir'}"
    last = run("evaluate", storage, "scored", args, f"embedding.model={model}", beir, "evaluation.held_out_queries=0")
    (found,) = last["metrics"].values()
    return {system: values for system, values in found.items() if isinstance(values, dict)}


def measure(storage: Path, args: argparse.Namespace) -> tuple[list[list[str]], str]:
    """A line a model and system, and what was mined."""
    run("train", storage, "base", args, f"training.max_epochs={args.epochs}")
    mined = run("mine", storage, "base", args)
    lines: list[list[str]] = []

    def add(title: str, name: str) -> None:
        found = scores(storage, name, args)
        systems = (*(() if lines else ("bm25",)), "model", "hybrid")
        lines.extend(
            [title if system != "bm25" else "", system, *(f"{found[system][metric]:.4f}" for metric in METRICS)]
            for system in systems
        )

    add(f"{args.epochs:g} epochs", "base")
    go_on = [
        f"training.max_epochs={args.epochs + args.further}",
        "checkpointing.accept_changes=[training.max_epochs,data]",
    ]
    for name, title, more in (
        ("without", f"{args.further:g} more without", []),
        ("with", f"{args.further:g} more with mined negatives", [f"data.prepared={mined['paths']['prepared']}"]),
    ):
        shutil.copytree(storage / "runs" / "base", storage / "runs" / name)
        seconds = run("train", storage, name, args, *go_on, *more)["seconds"]
        add(f"{title}, {seconds:.0f} s", name)
    train, negatives = mined["metrics"]["splits"]["train"], mined["metrics"]["negatives"]
    return lines, f"mined: {negatives:,} negatives for {train:,} pairs in {mined['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/train.jsonl and debian/beir")
    parser.add_argument("--pairs", type=int, help="train on so many pairs (default: all)")
    parser.add_argument("--epochs", type=float, default=4, help="before mining (default: %(default)s)")
    parser.add_argument("--further", type=float, default=2, help="epochs after it (default: %(default)s)")
    parser.add_argument("--negatives", type=int, default=1, help="that train, a record (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all jobs")
    args = parser.parse_args()
    args.data = args.data.resolve()
    with tempfile.TemporaryDirectory() as storage:
        lines, mined = measure(Path(storage), args)
    print(f"\n{machine()}\n\n{table(lines, ['', '', *METRICS])}\n\n{mined}")


if __name__ == "__main__":
    main()
