"""Convert a DeepSpeed JSON file to a config. A table in its first lines says what became of each key.

examples:
  python jobs/from_deepspeed.py ds.json > config.yaml
  python jobs/train.py --config config.yaml --local-data-dir notes/
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import ConfigError
from pipeline.config.deepspeed import to_yaml
from pipeline.core.escaping import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for a file that cannot be converted."""
    parser = argparse.ArgumentParser(
        prog="python jobs/from_deepspeed.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="DeepSpeed's JSON")
    try:
        print(to_yaml(parser.parse_args(argv).file), end="")
    except ConfigError as error:
        print(printable(f"from_deepspeed: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
