"""Write a run's report: one HTML page with its data, training, scores, queries and map. Several runs are compared.

examples:
  tep report                                   # report.html in the run's folder
  tep report --config pairs storage.run=notes
  tep report quickstart quickstart-2           # two runs on one page, in reports/
"""

import argparse

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import parser


def arguments() -> argparse.ArgumentParser:
    return parser("report", __doc__ or "", prepares=False, names="RUN")


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.api import report

    return report(config, args.names)
