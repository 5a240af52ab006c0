"""The whole job: prepare, train, embed, evaluate. Stages that are done are skipped.

examples:
  python jobs/run.py                                         # the packages installed here (configs/quickstart.yaml)
  python jobs/run.py --config configs/pairs.yaml training.max_epochs=10
  python jobs/run.py --local_data_dir notes/ storage.run=notes
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.console import log, table
from pipeline.core.outcome import Result
from pipeline.job import run_job


def main(config: Config, args: Namespace) -> Result:
    from pipeline.evaluate.report import score_table
    from pipeline.stages import Session, check_stage, embed_stage, evaluate_stage, prepare_stage, train_stage

    with Session(config, args.rehash, ("prepare", "train", "encode", "store")) as session:
        if args.check:
            return check_stage(session)
        results = {
            "prepare": prepare_stage(config, session),
            "train": train_stage(config, session),
            "embed": embed_stage(config, session),
            "evaluate": evaluate_stage(config, session, again=False),
        }
    whole = Result()
    for name, result in results.items():
        whole.metrics[name] = result.metrics
        whole.paths |= result.paths
    log.info("\n%s\n\n%s", score_table(results["evaluate"].metrics), table(whole.paths.items(), ("what", "where")))
    return whole


if __name__ == "__main__":
    sys.exit(run_job("run", __doc__, main))
