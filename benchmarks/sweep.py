"""What a sweep finds: the best of its trials against the config as it is, both trained anew with other seeds.

examples:
  python benchmarks/sweep.py --data data                      # data/debian/train.jsonl; configs/tune.yaml, 16 trials
  python benchmarks/sweep.py --data data --seeds 3 tune.trials=30 training.global_batch_size=128

The sweep chose by validation at one seed, so its own score of the best trial is a lucky one; these seeds are new. Both
are trained by jobs/train.py with the sweep's budget, on one worker as the trials were.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpora import machine
from pipeline.config import load
from pipeline.core.console import table

CONFIG = ROOT / "configs" / "tune.yaml"


def job(name: str, config: Path, storage: Path, *overrides: str) -> dict[str, Any]:
    """A job's last line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--config", str(config), *overrides],
        env=os.environ | {"PIPELINE_STORAGE": str(storage)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def score(name: str, config: Path, storage: Path, steps: int, seed: int, overrides: list[str]) -> float:
    """NDCG@10 of validation at the end of a run of so many steps."""
    budget = [f"training.max_steps={steps}", "training.max_epochs=null", "training.validate_every_steps=100"]
    run = [f"storage.run={name}-{seed}", f"training.seed={seed}", "scaling.num_workers=1"]
    return float(job("train", config, storage, *overrides, *budget, *run)["metrics"]["validation_ndcg@10"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/train.jsonl")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the sweep's pictures and tables")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of keys that the space has not")
    args = parser.parse_args()
    path = args.data.resolve() / "debian" / "train.jsonl"
    source = f"data.sources={json.dumps([{'name': 'pairs', 'type': 'json', 'path': str(path)}])}"
    overrides = [source, *args.overrides]
    steps = load(CONFIG, overrides).tune.max_steps or 0
    with tempfile.TemporaryDirectory() as temporary:
        storage = args.keep.resolve() if args.keep else Path(temporary)
        swept = job("tune", CONFIG, storage, *overrides)
        found, best = swept["metrics"], Path(swept["paths"]["best"])
        rows = [
            [name, seed, f"{score(name, config, storage, steps, seed, overrides):.4f}"]
            for seed in range(1, args.seeds + 1)
            for name, config in (("config", CONFIG), ("best", best))
        ]
    print(json.dumps(found, indent=2))
    share = 100 * found["steps"] / found["whole_steps"]
    print(
        f"\n{machine()}\n\nsweep: {swept['seconds']:.0f} s, {found['steps']:,} steps, {share:.0f}% of all to their end"
    )
    print(f"\n{table(rows, ['config', 'seed', 'validation NDCG@10'])}")


if __name__ == "__main__":
    main()
