"""Find hard negatives for the training pairs with a trained model, and write a data set that has them.

examples:
  tep mine    # prints where it is, such as data.prepared=prepared/3f9c2a…
  tep train data.prepared=prepared/3f9c2a… storage.run=harder
  tep mine --config pairs mining.num_negatives=2 mining.range_min=5 mining.max_score=0.9
  tep mine embedding.model=some/checkpoint mining.relative_margin=null mining.min_score=0.3
"""

from argparse import Namespace

from pipeline.config import Config
from pipeline.core.outcome import Result


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import mine

    return mine(config, check=args.check, rehash=args.rehash)
