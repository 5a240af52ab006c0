"""Turn raw text into token shards: read, filter, deduplicate, tokenize.

examples:
  python jobs/prepare.py                                     # the packages installed here (configs/quickstart.yaml)
  python jobs/prepare.py --config configs/pairs.yaml         # a JSON Lines file of your own
  python jobs/prepare.py --local-data-dir notes/ data.min_chars=20
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import run_job


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import prepare

    return prepare(config, check=args.check, rehash=args.rehash)


if __name__ == "__main__":
    sys.exit(run_job("prepare", __doc__, main))
