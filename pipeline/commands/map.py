"""Draw a map of the run's vectors: a sample on a plane, coloured by cluster or source, with search.

examples:
  tep map    # map.png, map.html and map.json in the run's folder
  tep map --sample 2000 --clusters 20 --to pictures
  tep map --config pairs embedding.model=some/checkpoint
"""

import argparse
from pathlib import Path

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import parser


def arguments() -> argparse.ArgumentParser:
    own = parser("map", __doc__ or "", prepares=False)
    own.add_argument("--sample", type=int, default=5000, metavar="N", help="vectors drawn (default: %(default)s)")
    own.add_argument("--clusters", type=int, default=12, metavar="K", help="clusters to name (default: %(default)s)")
    own.add_argument("--to", metavar="DIR", help="a folder for map.png, map.html and map.json (default: the run's)")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.report.map import draw_map
    from pipeline.stages import consolidated_model

    folder = Path(args.to).expanduser().absolute() if args.to else config.run_dir
    return draw_map(config, consolidated_model(config), folder, sample_size=args.sample, clusters=args.clusters)
