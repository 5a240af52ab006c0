"""Prepare, train, evaluate, embed and publish. Skips what is done.

examples:
  python jobs/run.py                                         # the packages installed here (configs/quickstart.yaml)
  python jobs/run.py --config configs/pairs.yaml training.max_epochs=10
  python jobs/run.py --local-data-dir notes/ storage.run=notes
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.console import log_lines, table
from pipeline.core.outcome import Result
from pipeline.job import run_job


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import run
    from pipeline.evaluation.report import score_table

    result = run(config, check=args.check, rehash=args.rehash)
    if not args.check:
        scores, paths = score_table(result.metrics["evaluate"]), table(result.paths.items(), ("what", "where"))
        log_lines(f"\n{scores}\n\n{paths}")
    return result


if __name__ == "__main__":
    sys.exit(run_job("run", __doc__, main))
