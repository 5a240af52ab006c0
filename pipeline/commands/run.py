"""Prepare, train, evaluate, embed and publish. Skips what is done.

examples:
  tep run    # the packages installed here (configs/quickstart.yaml)
  tep run --config pairs training.max_epochs=10
  tep run --local-data-dir notes/ storage.run=notes
"""

from argparse import Namespace

from pipeline.config import Config
from pipeline.core.outcome import Result


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import run

    return run(config, check=args.check, rehash=args.rehash)
