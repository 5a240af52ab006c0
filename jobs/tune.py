"""Search for better values of the config's keys, and write the best as a config; prepares first.

examples:
  python jobs/tune.py                                        # the rate, its warm-up, the temperature; 16 trials
  python jobs/tune.py --config configs/tune.yaml             # a space, a searcher and a scheduler of your own
  python jobs/tune.py tune.trials=40 tune.max_steps=500 tune.searcher=random
  python jobs/tune.py 'tune.space={model.d_model: {choice: [128, 256]}, training.weight_decay: {uniform: [0, 0.1]}}'
  python jobs/train.py --config RUN_DIR/tune/best.yaml       # what the sweep found, trained to its own length
  ray job submit --working-dir . -- python jobs/tune.py      # on a cluster; submit it again to resume
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import run_job


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import tune

    return tune(config, check=args.check, rehash=args.rehash)


if __name__ == "__main__":
    sys.exit(run_job("tune", __doc__, main))
