"""What the recipes of this repository reach on a BEIR folder, with BM25 on the same queries and documents beside.

examples:
  python benchmarks/retrieval.py --data data                  # data/debian/train.jsonl, scored on data/debian/beir
  python benchmarks/retrieval.py --data data --only "the recipe"

Each line is one run of the whole job (jobs/run.py) in a folder of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.console import table

RECIPES: dict[str, list[str]] = {
    "the recipe (configs/pairs.yaml)": [],
    "an ordinary norm, eps 1e-5": ["model.norm_eps=1e-5"],
    "batch 256, rate 1e-3": ["training.global_batch_size=256", "training.table_learning_rate=1e-3"],
    "one layer for the last 3%": ["model.num_layers=1", "model.d_ff=256", "training.table_warmup_fraction=0.97"],
}


def run(data: Path, overrides: list[str], seed: int) -> dict[str, Any]:
    """One whole job. Returns its last line."""
    source = {"name": "pairs", "type": "json", "path": str(data / "debian" / "train.jsonl")}
    with tempfile.TemporaryDirectory() as storage:
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "jobs" / "run.py"),
                "--config",
                str(ROOT / "configs" / "pairs.yaml"),
                f"data.sources=[{json.dumps(source)}]",
                f"evaluation.beir_dir={data / 'debian' / 'beir'}",
                "evaluation.held_out_queries=0",
                f"training.seed={seed}",
                *overrides,
            ],
            env=os.environ | {"PIPELINE_STORAGE": storage},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/train.jsonl and debian/beir")
    parser.add_argument("--only", default="", help="recipes whose name has these words")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    rows = []
    for name, overrides in RECIPES.items():
        for seed in range(args.seeds) if args.only in name else ():
            last = run(args.data.resolve(), overrides, seed)
            (scores,) = last["metrics"]["evaluate"].values()
            train = last["metrics"]["train"]
            rows.append(
                [name, seed, train["step"], f"{train['train_seconds']:.0f}", f"{last['seconds']:.0f}"]
                + [f"{scores[system]['ndcg@10']:.4f}" for system in ("model", "bm25")]
            )
    header = ["recipe", "seed", "steps", "training s", "whole job s", "NDCG@10", "BM25"]
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n\n{table(rows, header)}")


if __name__ == "__main__":
    main()
