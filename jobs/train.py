"""Train an embedding model, or resume training; prepares first if token shards are missing or stale.

examples:
  python jobs/train.py                                       # the packages installed here (configs/quickstart.yaml)
  python jobs/train.py --config configs/pairs.yaml training.max_steps=2000
  python jobs/train.py --local-data-dir notes/ storage.run=notes
  ray job submit --working-dir . -- python jobs/train.py     # on a cluster, with the same config
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import run_job


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import train

    return train(config, check=args.check, rehash=args.rehash)


if __name__ == "__main__":
    sys.exit(run_job("train", __doc__, main))
