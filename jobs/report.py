"""Write a run's report: one HTML page with its data, training, scores, queries and map. Several runs are compared.

examples:
  python jobs/report.py                                      # report.html in the run's folder
  python jobs/report.py --config configs/pairs.yaml storage.run=notes
  python jobs/report.py quickstart quickstart-2              # two runs on one page, in reports/
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import parser, run_job


def arguments() -> argparse.ArgumentParser:
    return parser("report", __doc__ or "", prepares=False, runs=True)


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.api import report

    return report(config, args.runs)


if __name__ == "__main__":
    sys.exit(run_job("report", __doc__ or "", main, arguments()))
