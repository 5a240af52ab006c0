"""Train an embedding model, or resume training; prepares first if token shards are missing or stale.

examples:
  tep train                                      # the packages installed here (configs/quickstart.yaml)
  tep train --config pairs training.max_steps=2000
  tep train --local-data-dir notes/ storage.run=notes
  ray job submit --working-dir . -- tep train    # on a cluster, with the same config
"""

from argparse import Namespace

from pipeline.config import Config
from pipeline.core.outcome import Result


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import train

    return train(config, check=args.check, rehash=args.rehash)
