"""Score the model, BM25 and both combined on held-out pairs, BEIR folders, sentence pairs and labelled texts.

examples:
  python jobs/evaluate.py
  python jobs/evaluate.py --config configs/pairs.yaml evaluation.beir_dir=data/scifact
  python jobs/evaluate.py evaluation.held_out_queries=0 evaluation.beir_dir=data/scifact evaluation.bm25=false
  python jobs/evaluate.py evaluation.sts_file=sts_b/test.tsv evaluation.clustering_file=topics.tsv
  python jobs/evaluate.py evaluation.classification_dir=banking    # train.tsv and test.tsv of text and label
  python jobs/evaluate.py --mteb STSBenchmark --mteb SciFact       # from the hub; needs the extra mteb
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.core.console import log_lines
from pipeline.core.outcome import Result
from pipeline.job import parser, run_job


def arguments() -> argparse.ArgumentParser:
    own = parser("evaluate", __doc__ or "")
    own.add_argument("--mteb", action="append", default=[], metavar="TASK", help="an MTEB task, beside evaluation.mteb")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.api import evaluate
    from pipeline.evaluation.report import score_table

    if args.mteb:
        tasks = {"mteb": list(dict.fromkeys([*config.evaluation.mteb, *args.mteb]))}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=tasks)})
    result = evaluate(config, again=True, check=args.check, rehash=args.rehash)
    if not args.check:
        log_lines(score_table(result.metrics))
    return result


if __name__ == "__main__":
    sys.exit(run_job("evaluate", __doc__ or "", main, arguments()))
