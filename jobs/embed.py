"""Bring the vector table up to date with the data: embed new texts, update metadata, delete what is gone.

examples:
  python jobs/embed.py
  python jobs/embed.py --dry-run
  python jobs/embed.py --verify
  python jobs/embed.py --rebuild
  python jobs/embed.py --config configs/pairs.yaml embedding.batch_tokens=16384
  python jobs/embed.py embedding.model=some/checkpoint
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import parser, run_job


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


if __name__ == "__main__":
    sys.exit(run_job("embed", __doc__ or "", main, arguments()))
