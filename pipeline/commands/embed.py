"""Bring the vector table up to date with the data: embed new texts, update metadata, delete what is gone.

examples:
  tep embed
  tep embed --dry-run
  tep embed --verify
  tep embed --rebuild
  tep embed --config pairs embedding.batch_tokens=16384
  tep embed embedding.model=some/checkpoint
"""

import argparse

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import parser


def arguments() -> argparse.ArgumentParser:
    own = parser("embed", __doc__ or "")
    choice = own.add_mutually_exclusive_group()
    choice.add_argument("--dry-run", action="store_true", help="say what there is to do, and about how long it takes")
    choice.add_argument("--verify", action="store_true", help="compare the table with the data, and do no more")
    choice.add_argument("--rebuild", action="store_true", help="embed everything again, into an empty table")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.api import embed

    options = {name: getattr(args, name) for name in ("dry_run", "verify", "rebuild", "check", "rehash")}
    return embed(config, **options)
