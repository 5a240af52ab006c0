"""Score the model, BM25 and both combined on held-out pairs, BEIR folders, sentence pairs and labelled texts.

examples:
  tep evaluate
  tep evaluate --config pairs evaluation.beir_dir=data/scifact
  tep evaluate evaluation.held_out_queries=0 evaluation.beir_dir=data/scifact evaluation.bm25=false
  tep evaluate evaluation.sts_file=sts_b/test.tsv evaluation.clustering_file=topics.tsv
  tep evaluate evaluation.classification_dir=banking    # train.tsv and test.tsv of text and label
  tep evaluate --mteb STSBenchmark --mteb SciFact       # from the hub; needs the extra mteb
"""

import argparse

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.job import parser


def arguments() -> argparse.ArgumentParser:
    own = parser("evaluate", __doc__ or "")
    own.add_argument("--mteb", action="append", default=[], metavar="TASK", help="an MTEB task, beside evaluation.mteb")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.api import evaluate

    if args.mteb:
        tasks = {"mteb": list(dict.fromkeys([*config.evaluation.mteb, *args.mteb]))}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=tasks)})
    return evaluate(config, again=True, check=args.check, rehash=args.rehash)
