"""Embed every prepared record into the vector store, each once; run again, it embeds what is missing.

examples:
  python jobs/embed.py
  python jobs/embed.py --config configs/pairs.yaml embedding.batch_tokens=16384
  python jobs/embed.py embedding.model=some/checkpoint
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.runtime.job import Result, run_job


def main(config: Config, args: Namespace) -> Result:
    from pipeline.stages import Session, embed_stage

    with Session(config, args.rehash) as session:
        return embed_stage(config, session)


if __name__ == "__main__":
    sys.exit(run_job("embed", __doc__, main))
