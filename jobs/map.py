"""Draw a sample of the store's vectors on a plane, coloured by source, or by cluster where there is one source alone.

examples:
  python jobs/map.py                                         # map.png and map.html in the run's folder
  python jobs/map.py --sample 2000 --clusters 20 --to pictures
  python jobs/map.py --config configs/pairs.yaml embedding.model=some/checkpoint
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config, ConfigError
from pipeline.runtime.console import Stage
from pipeline.runtime.job import JobError, Result, parser, run_job


def arguments() -> argparse.ArgumentParser:
    own = parser("map", __doc__ or "", prepares=False)
    own.add_argument("--sample", type=int, default=5000, metavar="N", help="vectors drawn (default: %(default)s)")
    own.add_argument("--clusters", type=int, default=12, metavar="K", help="of one source (default: %(default)s)")
    own.add_argument("--to", metavar="DIR", help="a folder for map.png and map.html (default: the run's)")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.evaluation.space import COLUMNS, FEWEST, group, project, sample

    for name, fewest in (("sample", FEWEST), ("clusters", 1)):
        if getattr(args, name) < fewest:
            raise ConfigError(f"--{name}: found {getattr(args, name)}; allowed is {fewest} or more")
    from pipeline.embedding.store import recipe_of, table_of
    from pipeline.evaluation.picture import draw_png, write_page
    from pipeline.stages import consolidated_model

    model = consolidated_model(config)
    vectors = table_of(config, recipe_of(config, model))
    if not vectors.exists():
        raise JobError(f"no vectors yet of the model in {model}; python jobs/embed.py makes them")
    points = sample(vectors.scan(COLUMNS), args.sample)
    count, total = len(points.texts), vectors.count()
    if count < FEWEST:
        raise JobError(f"{vectors.name} holds {count} vectors; a map takes {FEWEST} or more")
    with Stage("map: project", count, "vectors") as stage:
        plane, groups = project(points.vectors), group(points, args.clusters)
        stage.advance(count)
    folder = Path(args.to).expanduser().absolute() if args.to else config.run_dir
    title = f"{vectors.name}: {count:,} of {total:,} vectors"
    draw_png(plane, groups, title, folder / "map.png")
    write_page(plane, groups, points, title, folder / "map.html")
    found = {"points": count, "groups": len(set(groups))}
    return Result(found, {"picture": str(folder / "map.png"), "page": str(folder / "map.html")})


if __name__ == "__main__":
    sys.exit(run_job("map", __doc__ or "", main, arguments()))
