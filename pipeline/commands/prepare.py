"""Turn raw text into token shards: read, filter, deduplicate, tokenize.

examples:
  tep prepare                   # the packages installed here (configs/quickstart.yaml)
  tep prepare --config pairs    # a JSON Lines file of your own
  tep prepare --local-data-dir notes/ data.min_chars=20
"""

from argparse import Namespace

from pipeline.config import Config
from pipeline.core.outcome import Result


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import prepare

    return prepare(config, check=args.check, rehash=args.rehash)
