"""Search for better values of the config's keys, and write the best as a config; prepares first.

examples:
  tep tune                                      # the rate, its warm-up, the temperature; 16 trials
  tep tune --config tune                        # a space, a searcher and a scheduler of your own
  tep tune tune.trials=40 tune.max_steps=500 tune.searcher=random
  tep tune 'tune.space={model.d_model: {choice: [128, 256]}, training.weight_decay: {uniform: [0, 0.1]}}'
  tep train --config RUN_DIR/tune/best.yaml     # what the sweep found, trained to its own length
  ray job submit --working-dir . -- tep tune    # on a cluster; submit it again to resume
"""

from argparse import Namespace

from pipeline.config import Config
from pipeline.core.outcome import Result


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import tune

    return tune(config, check=args.check, rehash=args.rehash)
