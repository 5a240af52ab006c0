"""Find hard negatives for the training pairs with a trained model, and write a data set that has them.

examples:
  python jobs/mine.py                                  # prints where it is, such as data.prepared=prepared/3f9c2a…
  python jobs/train.py data.prepared=prepared/3f9c2a… storage.run=harder
  python jobs/mine.py --config configs/pairs.yaml mining.num_negatives=2 mining.range_min=5 mining.max_score=0.9
  python jobs/mine.py embedding.model=some/checkpoint mining.relative_margin=null mining.min_score=0.3
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import run_job


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import mine

    return mine(config, check=args.check, rehash=args.rehash)


if __name__ == "__main__":
    sys.exit(run_job("mine", __doc__, main))
